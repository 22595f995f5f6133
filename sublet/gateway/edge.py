"""HTTP/1.1 from clients: one connection, its requests in order, its limits.

A hand-made edge owns its protocol bugs: what is not plainly well formed is refused and the
connection closed, so that nobody behind or before it can read a request otherwise than we do.
One request is worked on at a time; the next ones of a pipeline wait, and reading stops when too many
do. A client that reads slowly slows down its engine; one that goes away ends it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, ClassVar

import httptools

from sublet.base.kernel.clock import read_boot_ns
from sublet.gateway import errors, pages
from sublet.gateway.dialects import SURFACES
from sublet.gateway.errors import Refusal
from sublet.gateway.exchange import Exchange
from sublet.gateway.state import Gateway

HEAD_LIMIT = 32_768
HEADERS_AT_MOST = 100
URL_LIMIT = 4096
PIPELINE = 8
"""Requests read ahead on one connection; beyond, it is not read until one is answered."""
PIPELINE_LIMIT = 256
WRITE_HIGH = 262_144
HEAD_NS = 20_000_000_000
BODY_NS = 300_000_000_000
STALL_NS = 120_000_000_000
IDLE_NS = 75_000_000_000

REASONS = {
    200: b"OK", 204: b"No Content", 400: b"Bad Request", 401: b"Unauthorized",
    402: b"Payment Required", 403: b"Forbidden", 404: b"Not Found", 405: b"Method Not Allowed",
    408: b"Request Timeout", 413: b"Content Too Large", 417: b"Expectation Failed",
    429: b"Too Many Requests", 431: b"Request Header Fields Too Large",
    500: b"Internal Server Error", 501: b"Not Implemented", 503: b"Service Unavailable",
}  # fmt: skip


class Request:
    """One request as it came. `surface` is None where no model is asked."""

    __slots__ = (
        "body", "expects", "has_host", "has_length", "is_chunked", "is_http10", "keep_alive",
        "method", "path", "query", "refusal", "secret", "surface",
    )  # fmt: skip

    def __init__(self) -> None:
        self.body = b""
        self.path = self.query = b""
        self.method = b""
        self.secret: bytes | None = None
        self.surface: Any = None
        self.expects = self.has_length = self.is_chunked = self.is_http10 = False
        self.has_host = 0
        self.keep_alive = True
        self.refusal: Refusal | None = None


class Downstream(asyncio.Protocol):
    """One client connection."""

    __slots__ = (
        "connection", "exchange", "g", "head_size", "headers", "is_chunked", "is_deaf", "is_last",
        "is_paused", "is_stalled", "parser", "parts", "queue", "request", "since_ns", "size", "t", "waits",
    )  # fmt: skip

    AWAIT_HEAD, AWAIT_BODY, WORKING = range(3)
    LIMITS: ClassVar[dict[int, int]] = {AWAIT_HEAD: HEAD_NS, AWAIT_BODY: BODY_NS}

    def __init__(self, g: Gateway) -> None:
        self.g = g
        self.t: Any = None
        self.exchange: Exchange | None = None
        self.request = Request()
        self.queue: deque[Request] = deque()
        self.parts: list[bytes] = []
        self.size = self.head_size = self.headers = 0
        self.is_paused = self.is_stalled = self.is_last = self.is_deaf = False
        self.is_chunked = True
        self.connection = b""
        self.waits = self.AWAIT_HEAD
        self.since_ns = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.t = transport
        self.parser = httptools.HttpRequestParser(self)
        self.since_ns = read_boot_ns()
        self.t.set_write_buffer_limits(high=WRITE_HIGH)
        self.g.connections[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self.t = None
        self.g.connections.pop(self, None)
        self.queue.clear()
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()

    def eof_received(self) -> None:
        """A client that closes its side is gone: a generation that nobody waits for is stopped."""
        return

    # ---- back-pressure ---------------------------------------------------------------------

    def pause_writing(self) -> None:
        self.is_stalled = True
        self.since_ns = read_boot_ns()
        if self.exchange is not None:
            self.exchange.hold_back(True)

    def resume_writing(self) -> None:
        self.is_stalled = False
        if self.exchange is not None:
            self.exchange.hold_back(False)

    def overdue(self, now_ns: int) -> bool:
        """It has kept us waiting too long: with its head, its body, its next request, or reading."""
        waited = now_ns - self.since_ns
        if self.exchange is not None or self.queue:
            return self.is_stalled and waited > STALL_NS
        if self.waits == self.AWAIT_HEAD and not self.head_size:
            return waited > IDLE_NS
        return waited > self.LIMITS[self.waits]

    # ---- reading ---------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.is_deaf:
            return  # What follows the last request of a connection is nobody's.
        if self.waits == self.AWAIT_HEAD:
            if not self.head_size:
                self.since_ns = read_boot_ns()
            self.head_size += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._turn_away(400, "invalid_request", "This gateway speaks HTTP/1.1 and no other.")
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserError:
            self._turn_away(400, "invalid_request", "This is not a well-formed request.")
        if self.waits == self.AWAIT_HEAD and self.head_size > HEAD_LIMIT:
            self._turn_away(431, "headers_too_large", "The head of this request is too long.")

    def on_message_begin(self) -> None:
        self.request = Request()
        self.parts = []
        self.size = self.headers = 0

    def on_url(self, url: bytes) -> None:
        request = self.request
        path, _, request.query = url.partition(b"?")
        request.path += path
        if len(request.path) > URL_LIMIT:
            request.refusal = Refusal(404, "unknown_url", "There is no such path here.")

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers += 1
        if self.headers > HEADERS_AT_MOST:
            self.request.refusal = Refusal(
                431, "headers_too_large", "Too many headers: send fewer."
            )
            return
        known = _HEADERS.get(name.lower())
        if known is not None:
            known(self.request, value)

    def on_headers_complete(self) -> None:
        request, parser = self.request, self.parser
        self.waits = self.AWAIT_BODY
        request.method = parser.get_method()
        request.keep_alive = parser.should_keep_alive()
        request.is_http10 = parser.get_http_version() == "1.0"
        if request.refusal is None and request.has_host != 1 and not request.is_http10:
            request.refusal = Refusal(400, "invalid_request", "Send exactly one Host header.")
        if request.refusal is not None:
            self._refuse_early(request)
        elif request.expects and not request.is_http10 and self.exchange is None and self.t:
            self.t.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self.size += len(body)
        if self.size > self.g.body_limit:
            request = self.request
            if request.refusal is None:
                request.refusal = _too_large(self.g.body_limit)
                self._refuse_early(request)
            return
        self.parts.append(body)

    def on_message_complete(self) -> None:
        request = self.request
        self.waits = self.AWAIT_HEAD
        self.head_size = 0
        if request.refusal is not None or self.is_deaf:
            return
        self.is_deaf = not request.keep_alive
        parts = self.parts
        request.body = parts[0] if len(parts) == 1 else b"".join(parts)
        self.parts = []
        if self.exchange is None and not self.queue:
            self._work(request)
            return
        self.queue.append(request)
        if len(self.queue) >= PIPELINE_LIMIT:
            self._turn_away(400, "invalid_request", "Too many requests in one pipeline.")
        elif len(self.queue) >= PIPELINE and not self.is_paused and self.t is not None:
            self.is_paused = True
            self.t.pause_reading()

    def _refuse_early(self, request: Request) -> None:
        """The head alone, or the body so far, is refused: answer, and read no more of it."""
        refusal = request.refusal
        assert refusal is not None
        self._turn_away(refusal.status, refusal.code, refusal.message)

    def _turn_away(self, status: int, code: str, message: str) -> None:
        """An error answer in its turn, and the end: nothing after it on this connection counts."""
        if self.is_deaf or self.t is None:
            return
        self.is_deaf = True
        request = Request()
        request.keep_alive = False
        request.refusal = Refusal(status, code, message)
        if self.exchange is not None or self.queue:
            self.queue.append(request)
        else:
            self._work(request)

    def close(self) -> None:
        if self.t is not None:
            self.t.close()

    # ---- working ---------------------------------------------------------------------------

    def _work(self, request: Request) -> None:
        self.is_last = not request.keep_alive
        self.is_chunked = not request.is_http10
        if request.keep_alive and request.is_http10:
            self.connection = b"connection: keep-alive\r\n"
        else:
            self.connection = b"" if request.keep_alive else b"connection: close\r\n"
        surface = SURFACES.get(request.path)
        if surface is None or request.method != b"POST" or request.refusal is not None:
            self._page(request)
            return
        request.surface = surface
        exchange = self.exchange = Exchange(self.g, self, request)
        exchange.start()

    def _page(self, request: Request) -> None:
        """What no model answers: lists, health, and what is not there."""
        rid = self.g.next_id()
        try:
            if request.refusal is not None:
                raise request.refusal
            page = pages.answer(self.g, request)
            body, kind, head = page.body, page.kind, page.head
            status = page.status
        except Refusal as refusal:
            self.g.refused(refusal.code)
            body = errors.body(SURFACES.get(request.path), refusal)
            status, kind, head = refusal.status, b"application/json", _extra(refusal)
        length = b"" if status == 204 else b"content-length: %d\r\n" % len(body)
        answer = b"HTTP/1.1 %d %b\r\n%b%bx-request-id: %b\r\n%b%b%b\r\n" % (
            status,
            REASONS[status],
            self.g.date,
            self.connection,
            rid,
            b"content-type: %b\r\n" % kind if body else b"",
            length,
            head,
        )
        if request.method != b"HEAD":
            answer += body
        self._done(answer)

    def error(self, refusal: Refusal, body: bytes, rid: bytes, limits: bytes) -> bytes:
        """A whole error answer."""
        return (
            b"HTTP/1.1 %d %b\r\n%b%bx-request-id: %b\r\ncontent-type: application/json\r\n"
            b"%b%bcontent-length: %d\r\n\r\n%b"
            % (
                refusal.status, REASONS[refusal.status], self.g.date, self.connection, rid,
                refusal.headers or limits, _extra(refusal), len(body), body,
            )
        )  # fmt: skip

    def answer(self, exchange: Exchange, data: bytes) -> None:
        """The last bytes of an answer. The exchange is over."""
        if self.exchange is exchange:
            self._done(data)

    def _done(self, data: bytes) -> None:
        self.exchange = None
        t = self.t
        if t is None:
            return
        if data:
            t.write(data)
        if self.is_last:
            self.queue.clear()
            t.close()
            return
        queue = self.queue
        if queue:
            self.g.loop.call_soon(self._next)
        else:
            self.since_ns = self.g.second_ns

    def _next(self) -> None:
        if self.t is None or self.exchange is not None or not self.queue:
            return
        request = self.queue.popleft()
        if self.is_paused and len(self.queue) < PIPELINE // 2:
            self.is_paused = False
            self.t.resume_reading()
        self._work(request)
        if self.exchange is None and self.queue:
            self.g.loop.call_soon(self._next)


def _extra(refusal: Refusal) -> bytes:
    if refusal.retry_after_s is None:
        return b""
    return b"retry-after: %d\r\n" % refusal.retry_after_s


def _too_large(limit: int) -> Refusal:
    return Refusal(413, "request_too_large", f"The body is larger than {limit} bytes: send less.")


# ---- the headers that mean something here ---------------------------------------------------------


def _authorization(request: Request, value: bytes) -> None:
    if value[:7].lower() == b"bearer ":
        request.secret = value[7:].strip()


def _api_key(request: Request, value: bytes) -> None:
    request.secret = value.strip()


def _host(request: Request, value: bytes) -> None:
    del value
    request.has_host += 1


def _expect(request: Request, value: bytes) -> None:
    if value.lower() == b"100-continue":
        request.expects = True
    else:
        request.refusal = Refusal(417, "invalid_request", "Only `Expect: 100-continue` is known.")


def _transfer_encoding(request: Request, value: bytes) -> None:
    if value.lower() != b"chunked" or request.is_chunked:
        request.refusal = Refusal(
            501, "invalid_request", "Only `Transfer-Encoding: chunked` is known."
        )
    request.is_chunked = True


def _content_encoding(request: Request, value: bytes) -> None:
    if value.lower() != b"identity":
        request.refusal = Refusal(
            400, "invalid_request", "Send the body as it is, without Content-Encoding."
        )


_HEADERS = {
    b"authorization": _authorization,
    b"x-api-key": _api_key,
    b"host": _host,
    b"expect": _expect,
    b"transfer-encoding": _transfer_encoding,
    b"content-encoding": _content_encoding,
}
