"""Around every request: its id, the bounds on its body and on waiting, its count, the last resort.

The outermost layer of the app. A body is read here, once and bounded in size and time, so that its
bytes can be hashed and no handler meets more than the limit. HEAD is GET without what it would say.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

import anyio
import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sublet.base.kernel.errors import SubletError, TooLarge
from sublet.base.wire import rest
from sublet.edge.api.errors import BodyInvalid, RequestSlow, TooBusy, answer

log = structlog.get_logger()

WAITING_AT_MOST = 500
"""Requests without an answer yet: those beyond are refused, since they would wait too long."""
HEALTH = "/healthz"
"""Answered however busy it is here."""
GONE = 499
"""Counted where the caller went away before the answer began."""
REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}")

Counted = Callable[[str, str, int, float], None]
"""Method, route template, status, seconds."""


class Envelope:
    """ASGI middleware. `new_id` makes request ids; `counted` hears of every answer; `standing`
    are headers that every answer carries."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        new_id: Callable[[], str],
        counted: Counted,
        standing: Mapping[str, str],
        body_seconds: float,
        waiting_at_most: int = WAITING_AT_MOST,
    ) -> None:
        self._app = app
        self._standing = standing
        self._new_id = new_id
        self._counted = counted
        self._body_seconds = body_seconds
        self._waiting_at_most = waiting_at_most
        self._waiting = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent_id = Headers(scope=scope).get("x-request-id", "")
        request_id = sent_id if REQUEST_ID.fullmatch(sent_id) else self._new_id()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        state["body"] = b""
        began = time.perf_counter()
        status = 0
        is_refused = self._waiting >= self._waiting_at_most and scope["path"] != HEALTH
        self._waiting += 1

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                self._waiting -= 1
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.update(self._standing)
            await send(message)

        # The server below goes by its own scope, in which HEAD stays HEAD.
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            if is_refused:
                raise TooBusy
            state["body"] = body = await self._body(scope, receive)
            receive = _replayed(body, receive)
            if asked is scope:
                await self._app(scope, receive, send_named)
            else:
                await _without_body(self._app, asked, send_named)
        except SubletError as refusal:
            await answer(refusal)(scope, receive, send_named)
        except Exception:
            # The one place where an error that nobody could act on is logged.
            log.exception("request_failed", request_id=request_id, path=scope["path"])
            if status == 0:
                await answer(SubletError(_LAST_RESORT))(scope, receive, send_named)
        finally:
            if status == 0:
                self._waiting -= 1
            template = getattr(asked.get("route"), "path", "unknown")
            self._counted(scope["method"], template, status or GONE, time.perf_counter() - began)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises TooLarge, BodyInvalid and RequestSlow."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return b""
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length[:20]) > rest.BODY_LIMIT_BYTES:
            raise _too_large()
        body = bytearray()
        try:
            with anyio.fail_after(self._body_seconds):
                await _fill(body, receive)
        except TimeoutError:
            raise RequestSlow(param="body") from None
        try:
            body.decode("utf-8")
        except UnicodeDecodeError:
            raise BodyInvalid(param="body") from None
        return bytes(body)


async def _fill(body: bytearray, receive: Receive) -> None:
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise BodyInvalid("The connection ended inside the body: send it again.")
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > rest.BODY_LIMIT_BYTES:
            raise _too_large()


async def _without_body(app: ASGIApp, scope: Scope, send: Send) -> None:
    """The head of the answer to a GET. One that would go on for long is broken off behind it."""
    headed = anyio.Event()

    async def receive() -> Message:
        await headed.wait()
        return {"type": "http.disconnect"}

    async def send_head(message: Message) -> None:
        if message["type"] == "http.response.start":
            await send(message)
        elif not headed.is_set():
            headed.set()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    await app(scope, receive, send_head)


def _too_large() -> TooLarge:
    return TooLarge(
        "The body is larger than 1 MiB: send less.",
        param="body",
        limit_bytes=rest.BODY_LIMIT_BYTES,
    )


_LAST_RESORT = (
    "Sublet failed on this request: nothing of it was done. "
    "Its log names the cause under this x-request-id."
)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` for the app: the body that was read, then what comes after it."""
    given = False

    async def receive_again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
