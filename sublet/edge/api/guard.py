"""The connections of one API process: bounded in number, and in how long they may say nothing.

Uvicorn bounds neither: who opens connections and never finishes a request would use up the process's
descriptors, and nobody else could ask. Here a request's head has a deadline (its body has one in
`envelope`), an answer that nobody reads is given up, and when all places are taken the connection
that has kept us waiting longest makes room; if none does, the newcomer is told to come again.
"""

from __future__ import annotations

import asyncio
from typing import Any, cast

from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from sublet.base.kernel.errors import SubletError
from sublet.edge.api.errors import RequestInvalid, RequestSlow, TooBusy, answer

HEAD_SECONDS = 15.0
"""From the opening of a connection, or the first byte of its next request, to the end of the head."""
UNREAD_SECONDS = 300.0
"""For this long an answer may stand unread; who follows a log may look away for a while."""
CLOSE_SECONDS = 5.0
HEAD_BYTES = 64 << 10
"""The parser below keeps whatever comes until a head is whole."""
CONNECTIONS_AT_MOST = 4000
DESCRIPTORS_KEPT = 200
"""For what a process needs besides: the database, engines, commands and logs."""


def places(descriptors: int) -> int:
    """How many connections a process with so many descriptors may have."""
    return max(8, min(CONNECTIONS_AT_MOST, descriptors - DESCRIPTORS_KEPT, descriptors * 3 // 4))


class GuardedProtocol(HttpToolsProtocol):
    """One connection. `guarded` makes the class for a process."""

    places = CONNECTIONS_AT_MOST
    head_seconds = HEAD_SECONDS

    def __init__(self, config: Config, server_state: ServerState, *rest: Any, **named: Any) -> None:
        super().__init__(config, server_state, *rest, **named)
        self._deadline: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._began = 0.0
        self._head_bytes = 0
        self._is_dropped = False

    # What asyncio calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.places and not self._make_room():
            self._refuse(TooBusy())
            return
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        self._cancel_unread()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._deadline is None and self._is_between_requests():
            self._await_head()
        super().data_received(data)
        if self._deadline is not None:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse(RequestInvalid("The head of the request is larger than 64 KiB."))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(UNREAD_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel_unread()
        super().resume_writing()

    # What the parser calls.

    def on_headers_complete(self) -> None:
        self._end_wait()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        del msg
        self._refuse(RequestInvalid())

    # Ours.

    def _is_between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _keeps_us_waiting(self) -> bool:
        """Whether the next byte is the caller's to send."""
        return self._is_between_requests() or self.cycle.more_body

    def _make_room(self) -> bool:
        """Drop the connection that has kept us waiting longest; False: all are being served."""
        waiting = [
            one
            for one in cast("set[GuardedProtocol]", self.connections)
            if one is not self and one._keeps_us_waiting() and not one._is_dropped
        ]
        if not waiting:
            return False
        oldest = min(waiting, key=lambda one: one._began)
        oldest._is_dropped = True
        # Without a last word: its descriptor is wanted now.
        oldest.transport.abort()
        return True

    def _await_head(self) -> None:
        self._began, self._head_bytes = self.loop.time(), 0
        self._deadline = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self._refuse(RequestSlow())

    def _end_wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _cancel_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _refuse(self, error: SubletError) -> None:
        """Answer in the one shape without any request, and close."""
        self._end_wait()
        said = answer(error)
        head = [f"HTTP/1.1 {said.status_code} {error.code}".encode()]
        head += [name + b": " + value for name, value in said.raw_headers]
        head += [b"connection: close", b"", b""]
        self.transport.write(b"\r\n".join(head) + bytes(said.body))
        self.transport.close()
        # Closing waits until all is sent; who does not read it must not keep the place.
        self.loop.call_later(CLOSE_SECONDS, self.transport.abort)


def guarded(descriptors: int, *, head_seconds: float = HEAD_SECONDS) -> type[GuardedProtocol]:
    """The protocol of a process that may open so many descriptors."""

    class Guarded(GuardedProtocol):
        pass

    Guarded.places = places(descriptors)
    Guarded.head_seconds = head_seconds
    return Guarded
