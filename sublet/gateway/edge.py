"""HTTP/1.1 from clients: one connection, its requests in order, its limits.

A hand-made edge owns its protocol bugs: what is not plainly well formed is refused and the
connection closed, so that nobody behind or before it can read a request otherwise than we do.
One request is worked on at a time; the next ones of a pipeline wait, and reading stops when too many
do. A client that reads slowly slows down its engine; one that goes away ends it.

A client that closes its side is gone, whether or not it still reads: a generation that nobody waits
for costs money, and no SDK half-closes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import httptools

from sublet.base.kernel.clock import read_boot_ns
from sublet.gateway import errors, pages
from sublet.gateway.dialects import SURFACES
from sublet.gateway.errors import Refusal
from sublet.gateway.exchange import Exchange
from sublet.gateway.log import say
from sublet.gateway.state import Gateway

HEAD_LIMIT = 32_768
HEADERS_AT_MOST = 100
URL_LIMIT = 4096
PIPELINE = 8
"""Requests read ahead on one connection; beyond, it is not read until they are answered."""
PIPELINE_LIMIT = 256
LARGE = 16_384
"""A body beyond this is read only with a valid key, and no further request is read ahead of it."""
WRITE_HIGH = 262_144
HEAD_NS = 20_000_000_000
BODY_NS = 300_000_000_000
STALL_NS = 120_000_000_000
IDLE_NS = 75_000_000_000
LINGER_NS = 5_000_000_000
LINGER_BYTES = 8 << 20
"""What still comes after the last request is read and dropped, for so long and so much: a connection
that is closed with unread bytes is reset, and the client might lose what was answered."""
PARTS = 64
"""Pieces of a body that are kept one by one; from there on in one growing buffer."""

REASONS = {
    200: b"OK", 204: b"No Content", 400: b"Bad Request", 401: b"Unauthorized",
    402: b"Payment Required", 403: b"Forbidden", 404: b"Not Found", 405: b"Method Not Allowed",
    408: b"Request Timeout", 413: b"Content Too Large", 417: b"Expectation Failed",
    429: b"Too Many Requests", 431: b"Request Header Fields Too Large",
    500: b"Internal Server Error", 501: b"Not Implemented", 503: b"Service Unavailable",
}  # fmt: skip

AWAIT_HEAD, AWAIT_BODY = range(2)
CLOSE = b"connection: close\r\n"


class Request:
    """One request as it came. `surface` is None where no model is asked."""

    __slots__ = (
        "body", "expects", "has_connection", "hosts", "is_chunked", "is_http10", "keep_alive",
        "length", "method", "path", "refusal", "secret", "surface", "url",
    )  # fmt: skip

    def __init__(self) -> None:
        self.body = self.path = self.url = self.method = b""
        self.secret: bytes | None = None
        self.surface: Any = None
        self.expects = self.is_chunked = self.is_http10 = self.has_connection = False
        self.hosts = self.length = 0
        self.keep_alive = True
        self.refusal: Refusal | None = None


class Downstream(asyncio.Protocol):
    """One client connection."""

    __slots__ = (
        "body", "connection", "exchange", "feed", "fields", "g", "head_size", "headers", "idle_bytes",
        "is_chunked", "is_deaf", "is_last", "is_lingering", "is_odd", "is_paused", "is_stalled", "parser",
        "parts", "queue", "request", "since_ns", "size", "t", "unsent", "waits",
    )  # fmt: skip

    def __init__(self, g: Gateway) -> None:
        self.g = g
        self.t: Any = None
        self.exchange: Exchange | None = None
        self.request = Request()
        self.queue: deque[Request] = deque()
        self.body = b""
        self.parts: list[bytes | bytearray] = []
        self.size = self.head_size = self.headers = self.fields = self.unsent = 0
        self.idle_bytes = 0
        self.is_paused = self.is_stalled = self.is_last = False
        self.is_odd = False
        """A header is a trailer, or may be part of a head that is too long."""
        self.is_deaf = False
        """Nothing that comes is read as a request any more."""
        self.is_lingering = False
        self.is_chunked = True
        self.connection = b""
        self.waits = AWAIT_HEAD
        self.since_ns = g.second_ns

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.t = transport
        self._parse_anew()
        self.t.set_write_buffer_limits(high=WRITE_HIGH)
        self.g.connections[self] = None

    def _parse_anew(self) -> None:
        self.parser = httptools.HttpRequestParser(self)
        self.feed = self.parser.feed_data

    def connection_lost(self, exc: Exception | None) -> None:
        self.t = None
        self.g.connections.pop(self, None)
        self._gone()

    def eof_received(self) -> None:
        """What was written is still sent; then the connection is closed."""
        self._gone()

    def _gone(self) -> None:
        self.is_deaf = self.is_last = True
        self.queue.clear()
        self.parts = []
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.client_gone()

    # ---- back-pressure ---------------------------------------------------------------------

    def pause_writing(self) -> None:
        self.is_stalled = True
        self.since_ns = read_boot_ns()
        self.unsent = 0
        if self.exchange is not None:
            self.exchange.hold_back()

    def resume_writing(self) -> None:
        self.is_stalled = False
        if self.exchange is not None:
            self.exchange.go_on()
        elif self.queue:
            self.g.loop.call_soon(self._next)

    def overdue(self, now_ns: int) -> bool:
        """It has kept us waiting too long: with its head, its body, its next request, or reading."""
        waited = now_ns - self.since_ns
        if self.is_stalled and self.t is not None:
            unsent = self.t.get_write_buffer_size()
            if unsent != self.unsent:
                self.unsent = unsent  # It reads, however slowly.
                self.since_ns = now_ns
                return False
            return waited > STALL_NS
        if self.exchange is not None or self.queue:
            return False
        if self.is_lingering:
            return waited > LINGER_NS
        if self.waits == AWAIT_BODY:
            return waited > BODY_NS
        return waited > (HEAD_NS if self.head_size else IDLE_NS)

    # ---- reading ---------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self.is_deaf:
            self._drop(data)
            return
        size = -1
        if self.waits == AWAIT_HEAD:
            if not self.head_size:
                self.since_ns = self.g.second_ns
            self.head_size += len(data)
            if self.head_size > HEAD_LIMIT:
                self.is_odd = True
        else:
            size = self.size
        try:
            self.feed(data)
        except httptools.HttpParserUpgrade:
            """It was refused as its head was read."""
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserError:
            self._turn_away(400, "invalid_request", "This is not a well-formed request.")
        if self.waits == AWAIT_HEAD:
            if self.head_size > HEAD_LIMIT:
                self._turn_away(431, "headers_too_large", "The head of this request is too long.")
        elif self.size == size:
            # A chunk's size or a trailer that has no end.
            self.idle_bytes += len(data)
            if self.idle_bytes > HEAD_LIMIT:
                self._turn_away(400, "invalid_request", "This body has more around it than in it.")
        else:
            self.idle_bytes = 0

    def _drop(self, data: bytes) -> None:
        """What follows the last request of a connection is nobody's."""
        if not self.is_lingering:
            self.is_lingering = True
            self.size = 0
        self.size += len(data)
        if self.size > LINGER_BYTES:
            self.close()

    def on_message_begin(self) -> None:
        self.request = Request()
        self.size = self.headers = self.fields = 0
        self.is_odd = self.head_size > HEAD_LIMIT

    def on_url(self, url: bytes) -> None:
        request = self.request
        request.url = request.url + url if request.url else url  # It may come in pieces.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers += 1
        if self.is_odd:
            if self.waits == AWAIT_BODY:
                return  # A trailer: of no meaning here.
            self.fields += len(name) + len(value)
        try:
            known = _HEADERS[name]
        except KeyError:
            known = _HEADERS.get(name.lower())  # A spelling of its own.
        if known is not None:
            known(self.request, value)

    def on_headers_complete(self) -> None:
        request = self.request
        self.waits = AWAIT_BODY
        self.is_odd = True
        request.method = self.parser.get_method()
        keep_alive = request.keep_alive = self.parser.should_keep_alive()
        if request.has_connection or not keep_alive:
            # Else it is HTTP/1.1: HTTP/1.0 is kept alive by a header only.
            version = self.parser.get_http_version()
            request.is_http10 = version != "1.1"
            if version not in ("1.0", "1.1"):
                request.refusal = Refusal(400, "invalid_request", "Only HTTP/1.1 is spoken here.")
            if self.parser.should_upgrade():
                # Its body would not be read as HTTP.
                request.refusal = Refusal(400, "invalid_request", "Only HTTP/1.1 is spoken here.")
        url = request.url
        if url in SURFACES:
            request.path = url
        else:
            request.path = _path(url)
            if request.method == b"CONNECT":
                request.refusal = Refusal(405, "method_not_allowed", "This is no tunnel.")
            elif len(url) > URL_LIMIT:
                request.refusal = Refusal(404, "unknown_url", "There is no such path here.")
        if (
            request.refusal is not None
            or request.hosts != 1
            or self.headers > HEADERS_AT_MOST
            or self.fields > HEAD_LIMIT
        ):
            self._check_head(request)
            if request.refusal is not None:
                self._refuse_early(request)
                return
        if request.length > LARGE and not self.is_deaf:
            self._check_large(request.length)
        if request.expects and not self.is_deaf:
            if request.is_http10:
                request.expects = False
            elif self.exchange is None and not self.queue:
                self._expected(request)

    def _check_head(self, request: Request) -> None:
        if self.headers > HEADERS_AT_MOST or self.fields > HEAD_LIMIT:
            request.refusal = Refusal(431, "headers_too_large", "Too many headers: send fewer.")
        elif request.refusal is None and request.hosts != 1 and not request.is_http10:
            request.refusal = Refusal(400, "invalid_request", "Send exactly one Host header.")
        elif request.refusal is None and request.is_http10 and request.is_chunked:
            # HTTP/1.0 has no chunks: who stands between us may see another end of it.
            request.refusal = Refusal(400, "invalid_request", "HTTP/1.0 knows no chunked bodies.")

    def _expected(self, request: Request) -> None:
        """The client waits for a word before it sends its body."""
        request.expects = False
        if self.t is not None:
            self.t.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        size = self.size + len(body)
        if not self.size:
            self.body = body
        else:
            self._add(body)
        if size > LARGE and self.request.refusal is None and not self.is_deaf:
            self._check_large(size)
        self.size = size

    def _add(self, body: bytes) -> None:
        """A further piece. Many small ones must not take many times their size."""
        parts = self.parts
        if not parts:
            self.parts = [self.body, body]
        elif len(parts) < PARTS and type(parts[0]) is bytes:
            parts.append(body)
        elif type(parts[0]) is bytes:
            self.parts = [bytearray().join((*parts, body))]
        else:
            parts[0] += body

    def _check_large(self, size: int) -> None:
        """Strangers cannot fill the memory: a large body is read with a valid key only."""
        request = self.request
        if size > self.g.body_limit:
            request.refusal = _too_large(self.g.body_limit)
        elif request.path not in SURFACES:
            request.refusal = Refusal(413, "request_too_large", "Nothing is read here: send less.")
        elif self.size <= LARGE:
            try:
                self.g.identify(request, read_boot_ns())
            except Refusal as refusal:
                request.refusal = refusal
        if request.refusal is not None:
            self._refuse_early(request)

    def on_message_complete(self) -> None:
        request = self.request
        self.waits = AWAIT_HEAD
        self.head_size = 0
        if request.refusal is not None or self.is_deaf:
            return
        if not request.keep_alive:
            self.is_deaf = True
        if self.size:
            if self.parts:
                request.body = b"".join(self.parts)
                self.parts = []
            else:
                request.body = self.body
            self.body = b""
        if self.exchange is None and not self.queue and not self.is_stalled:
            self._work(request)
            return
        self.queue.append(request)
        if len(self.queue) >= PIPELINE_LIMIT:
            self._turn_away(400, "invalid_request", "Too many requests in one pipeline.")
        elif (
            (len(self.queue) >= PIPELINE or self.size > LARGE)
            and not self.is_paused
            and self.t is not None
        ):
            self.is_paused = True
            self.t.pause_reading()

    def _refuse_early(self, request: Request) -> None:
        """The head alone, or the body so far, is refused: answer, and read no more of it."""
        self.parts = []
        self.body = b""
        if self.is_deaf:
            return
        self.is_deaf = self.is_lingering = True
        self.size = 0
        request.keep_alive = False
        request.surface = SURFACES.get(request.path)
        if self.exchange is not None or self.queue or self.is_stalled:
            self.queue.append(request)
        else:
            self._work(request)

    def _turn_away(self, status: int, code: str, message: str) -> None:
        """An error answer in its turn, and the end: nothing after it on this connection counts."""
        request = Request()
        if self.waits == AWAIT_BODY:
            request.path, request.method = self.request.path, self.request.method
        request.refusal = Refusal(status, code, message)
        self._refuse_early(request)

    def close(self) -> None:
        """At once: who keeps us waiting would keep a polite end waiting, too."""
        if self.t is not None:
            self.t.abort()

    def end(self) -> None:
        """After the answer that is being made, if any. What is not begun is not answered."""
        self.is_deaf = self.is_last = True
        self.queue.clear()
        if self.exchange is None and self.t is not None:
            self.t.close()

    # ---- working ---------------------------------------------------------------------------

    def _work(self, request: Request) -> None:
        if request.keep_alive and not request.is_http10:
            self.is_chunked = True
            self.connection = b""
        else:
            self.is_last = not request.keep_alive
            self.is_chunked = not request.is_http10
            self.connection = CLOSE if self.is_last else b"connection: keep-alive\r\n"
        surface = SURFACES.get(request.path)
        if surface is None or request.method != b"POST" or request.refusal is not None:
            self._page(request)
            return
        request.surface = surface
        exchange = self.exchange = Exchange(self.g, self, request)
        try:
            exchange.start()
        except Exception as error:
            # A fault of ours: what is held must not stay held, nor the client wait for ever.
            say("request_failed", error=f"{type(error).__name__}: {error}")
            exchange.fail()

    def _page(self, request: Request) -> None:
        """What no model answers: lists, health, and what is not there."""
        rid = self.g.next_id()
        try:
            if request.refusal is not None:
                raise request.refusal
            page = pages.answer(self.g, request)
        except Refusal as refusal:
            self.g.refused(refusal.code)
            body = errors.body(SURFACES.get(request.path), refusal)
            answer = self.error(refusal, body, rid, b"")
        else:
            body = page.body
            kind = b"content-type: %b\r\n" % page.kind if body else b""
            length = b"" if page.status == 204 else b"content-length: %d\r\n" % len(body)
            answer = b"HTTP/1.1 %d %b\r\n%b%bx-request-id: %b\r\n%b%b%b\r\n%b" % (
                page.status, REASONS[page.status], self.g.date, self.connection, rid,
                kind, length, page.head, body,
            )  # fmt: skip
        if request.method == b"HEAD" and body:
            answer = answer[: -len(body)]
        self.done(answer)

    def error(self, refusal: Refusal, body: bytes, rid: bytes, limits: bytes) -> bytes:
        """A whole error answer."""
        return (
            b"HTTP/1.1 %d %b\r\n%b%bx-request-id: %b\r\ncontent-type: application/json\r\n"
            b"%b%bcontent-length: %d\r\n\r\n%b"
            % (
                refusal.status, REASONS[refusal.status], self.g.date, self.connection, rid,
                refusal.headers or limits, errors.head(refusal), len(body), body,
            )
        )  # fmt: skip

    def ends_here(self) -> None:
        """The answer that is made is the last."""
        self.is_deaf = self.is_last = True
        self.queue.clear()

    def ends_by_close(self) -> None:
        """The answer that begins now has no other end: HTTP/1.0 knows no chunks."""
        self.ends_here()
        self.connection = CLOSE

    def done(self, data: bytes) -> None:
        """The last bytes of an answer."""
        self.exchange = None
        t = self.t
        if t is None:
            return
        if data:
            t.write(data)
        if self.is_last:
            self._close()
        elif self.queue:
            self.g.loop.call_soon(self._next)
        else:
            self.since_ns = self.g.second_ns
            if self.waits and self.request.expects:
                self._expected(self.request)

    def _close(self) -> None:
        self.is_deaf = True
        self.queue.clear()
        self.since_ns = read_boot_ns()
        if (self.is_lingering or self.is_paused) and not self.t.is_closing():
            if self.is_paused:
                self.is_paused = False
                self.size = 0
                self.is_lingering = True
                self.t.resume_reading()
            self.t.write_eof()
        else:
            self.t.close()

    def _next(self) -> None:
        if self.t is None or self.exchange is not None or self.is_stalled or not self.queue:
            return
        request = self.queue.popleft()
        if self.is_paused and not self.queue:
            self.is_paused = False
            self.t.resume_reading()
        self._work(request)


def _path(url: bytes) -> bytes:
    """Without its query, and without the scheme and host that a proxy's client may write."""
    path = url.partition(b"?")[0]
    if path[:1] != b"/" and path[:7].lower() in (b"http://", b"https:/"):
        path = b"/" + path.partition(b"://")[2].partition(b"/")[2]
    return path


def _too_large(limit: int) -> Refusal:
    return Refusal(413, "request_too_large", f"The body is larger than {limit} bytes: send less.")


# ---- the headers that mean something here ---------------------------------------------------------


def _authorization(request: Request, value: bytes) -> None:
    if value[:7] == b"Bearer " or value[:7].lower() == b"bearer ":
        request.secret = value[7:].strip()


def _api_key(request: Request, value: bytes) -> None:
    request.secret = value.strip()


def _host(request: Request, _value: bytes) -> None:
    request.hosts += 1


def _connection(request: Request, _value: bytes) -> None:
    request.has_connection = True


def _content_length(request: Request, value: bytes) -> None:
    if len(value) > 4 and value.isdigit():
        request.length = int(value)


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


_HEADERS: dict[bytes, Any] = {
    b"authorization": _authorization,
    b"x-api-key": _api_key,
    b"host": _host,
    b"connection": _connection,
    b"content-length": _content_length,
    b"expect": _expect,
    b"transfer-encoding": _transfer_encoding,
    b"content-encoding": _content_encoding,
}
for _name in (*_HEADERS, b"content-type", b"accept", b"user-agent",
              b"accept-encoding"):  # fmt: skip
    # As HTTP libraries write them: at once known for what they are, or for nothing to us.
    _HEADERS[_name.title()] = _HEADERS.setdefault(_name, None)
