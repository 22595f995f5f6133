"""Around every request: its id, the bound on its body, its count, and the last resort.

The outermost layer of the app. A body is read here, once and bounded, so that its bytes can be
hashed and no handler meets more than the limit.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sublet.base.kernel.errors import SubletError, TooLarge
from sublet.base.wire import rest
from sublet.edge.api.errors import BodyInvalid, answer

log = structlog.get_logger()

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
    ) -> None:
        self._app = app
        self._standing = standing
        self._new_id = new_id
        self._counted = counted

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

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers.update(self._standing)
            await send(message)

        try:
            state["body"] = body = await self._body(scope, receive)
            await self._app(scope, _replayed(body, receive), send_named)
        except SubletError as refusal:
            await answer(refusal)(scope, receive, send_named)
        except Exception:
            # The one place where an error that nobody could act on is logged.
            log.exception("request_failed", request_id=request_id, path=scope["path"])
            if status == 0:
                await answer(SubletError(_LAST_RESORT))(scope, receive, send_named)
        finally:
            template = getattr(scope.get("route"), "path", "unknown")
            self._counted(scope["method"], template, status or GONE, time.perf_counter() - began)

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body. Raises TooLarge and BodyInvalid."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return b""
        length = Headers(scope=scope).get("content-length", "0")
        if length.isdigit() and int(length[:20]) > rest.BODY_LIMIT_BYTES:
            raise _too_large()
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise BodyInvalid("The connection ended inside the body: send it again.")
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > rest.BODY_LIMIT_BYTES:
                raise _too_large()
        try:
            body.decode("utf-8")
        except UnicodeDecodeError:
            raise BodyInvalid(param="body") from None
        return bytes(body)


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
