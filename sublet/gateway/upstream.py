"""Connections to model servers: a pool for each replica, HTTP/1.1 framing of their replies.

A connection carries one request at a time. What its reply means is the reader's business: it gets
the head, then either whole pieces of a streamed body as they come, or one whole body.

Framing is read by hand: a token is one read with one chunk in it, and cutting that out is cheaper
than a parser's three callbacks. Servers are ours but may be buggy: what is not well formed ends the
connection, never the gateway.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Protocol, cast

from sublet.base.wire.gateway import ReplicaRoute
from sublet.gateway.log import say

CONNECT_SECONDS = 2.0
FAILURES_ALLOWED = 3
EJECTED_NS = 30_000_000_000
"""Three failures in a row, and a replica is out for half a minute."""
HEAD_LIMIT = 65_536
CHUNK_LIMIT = 16 << 20
REPLY_LIMIT = 64 << 20
LONGEST_SOCKET_PATH = 107
IDLE_AT_MOST = 512

END_SECONDS = 5.0
"""A reply that has told all it has to is given so long to come to its end."""
JOINED = 262_144
"""A body up to here is copied behind its head: that costs less than a second write, which wakes the
server twice."""

_HEX = frozenset(b"0123456789abcdefABCDEF")
_SIZES: dict[bytes, int] = {}
"""Sizes of chunks as they are written: a token's are the same few again and again, and finding one
is cheaper than reading it."""
_SIZES_KEPT = 4096
_HEADS_KEPT = 1024


# What the next bytes of a connection are.
IDLE, HEAD, LENGTH, CHUNKS, CLOSED = range(5)


class Reader(Protocol):
    """Who reads a reply. Each call may be the last: after `ended` or `lost` there is none."""

    def answered(self, up: Upstream, status: int, is_stream: bool) -> None:
        """The head is there."""

    def streamed(self, data: bytes, chunk: bytes = b"") -> None:
        """A piece of the body, cut anywhere. `chunk`: it with its framing, where it was one chunk."""

    def ended(self, up: Upstream, body: bytes) -> None:
        """The reply is complete; `body` is all of it, or empty where it was streamed."""

    def lost(self, up: Upstream, why: str) -> None:
        """The connection is gone in the middle, or never gave an answer."""


class Replica:
    """One model server as this gateway meets it. Kept from snapshot to snapshot by its id."""

    __slots__ = (
        "failures",
        "id",
        "idle",
        "inflight",
        "is_filler",
        "is_leaving",
        "out_until_ns",
        "route",
        "server",
        "slots",
    )

    def __init__(self, route: ReplicaRoute, server: str) -> None:
        self.id = route.id
        self.server = server
        self.inflight = 0
        self.idle: dict[Upstream, None] = {}
        self.failures = 0
        self.out_until_ns = 0
        self.is_leaving = False
        self.take(route)

    def take(self, route: ReplicaRoute) -> None:
        """What a newer snapshot says of it."""
        self.route = route
        self.slots = route.slots
        self.is_filler = route.is_filler

    def failed(self, now_ns: int) -> None:
        self.failures += 1
        if self.failures >= FAILURES_ALLOWED:
            self.out_until_ns = now_ns + EJECTED_NS

    def answered(self) -> None:
        self.failures = 0
        self.out_until_ns = 0

    def reached(self) -> None:
        """It takes a connection: if it was out it is in again, on probation."""
        if self.out_until_ns:
            self.out_until_ns = 0
            self.failures = FAILURES_ALLOWED - 1

    def close_idle(self) -> None:
        for up in list(self.idle):
            up.close()


class Upstream(asyncio.Protocol):
    """One connection. `uses` counts requests: a failure on a used one may be its idle end."""

    __slots__ = (
        "buffer", "is_last", "is_stream", "left", "parts", "reader", "replica", "state", "t", "uses",
    )  # fmt: skip

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self.reader: Reader | None = None
        self.t: asyncio.Transport | None = None
        self.state = IDLE
        self.buffer = b""
        self.parts: list[bytes] = []
        self.left = 0
        self.is_stream = self.is_last = False
        self.uses = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.t = t = cast(asyncio.Transport, transport)
        # At once, not when the loop has been through all that came with it: of several requests in
        # one batch the first need not wait for the last.
        t.set_write_buffer_limits(high=0)

    def send(self, reader: Reader, head: bytes, body: bytes) -> None:
        """Begin a request on an idle connection."""
        t = self.t
        assert t is not None
        self.reader = reader
        self.state = HEAD
        self.uses += 1
        if len(body) <= JOINED:
            t.write(head + body)
        else:
            t.write(head)
            t.write(body)

    def close(self) -> None:
        """End it now; its reader hears no more of it."""
        self.reader = None
        self.state = CLOSED
        self.replica.idle.pop(self, None)
        if self.t is not None:
            self.t.abort()

    def pause(self) -> None:
        if self.t is not None and self.state != CLOSED:
            self.t.pause_reading()

    def resume(self) -> None:
        if self.t is not None and self.state != CLOSED:
            self.t.resume_reading()

    # ---- what comes ------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        state = self.state
        try:
            if state == CHUNKS:
                self._chunks(data)
            elif state == HEAD:
                self._head(data)
            elif state == LENGTH:
                self._length(data)
            else:
                self.close()  # Bytes out of turn: nobody asked.
        except Exception as error:
            # What a server says must not bring down more than its own answer.
            say("reply_not_read", error=f"{type(error).__name__}: {error}")
            self._broken("its answer could not be read")

    def eof_received(self) -> None:
        return None

    def connection_lost(self, exc: Exception | None) -> None:
        self.replica.idle.pop(self, None)
        reader, self.reader = self.reader, None
        was, self.state = self.state, CLOSED
        if reader is not None and was != IDLE:
            reader.lost(self, "the model server closed the connection")

    def _broken(self, why: str) -> None:
        reader = self.reader
        self.close()
        if reader is not None:
            reader.lost(self, why)

    def _head(self, data: bytes) -> None:
        if self.buffer:
            data = self.buffer + data
            self.buffer = b""
        end = data.find(b"\r\n\r\n")
        if end < 0:
            self.buffer = data
            if len(data) > HEAD_LIMIT:
                self._broken("the head of the reply is too long")
            return
        raw = data[:end]
        rest = data[end + 4 :]
        head = _HEADS.get(raw) or _read_head(raw)
        if head.broken:
            self._broken(head.broken)
            return
        if head.status < 200:  # 100 Continue and the like: the answer comes after it.
            self._head(rest)
            return
        reader = self.reader
        assert reader is not None
        # A reply in chunks that is no event stream is collected like one with a length.
        self.is_stream = is_stream = head.is_stream
        self.is_last = head.is_last
        length = head.length
        if length < 0:
            self.state = CHUNKS
            self.left = 0
        else:
            self.state = LENGTH
            self.left = length
        if self.replica.failures:
            self.replica.answered()
        reader.answered(self, head.status, is_stream)
        if self.reader is not reader:
            return  # It has let go of us.
        if len(rest) == length:
            self._rest()  # All in one read, as short answers are.
            reader.ended(self, rest)
        elif length >= 0:
            self._length(rest)
        elif rest:
            self._chunks(rest)

    def _length(self, data: bytes) -> None:
        self.left -= len(data)
        if self.left < 0:
            self._broken("the reply is longer than it says")
        elif self.left > 0:
            self.parts.append(data)
        elif self.parts:
            self._end(b"".join((*self.parts, data)))
        else:
            self._end(data)

    def _chunks(self, data: bytes) -> None:
        if self.buffer:
            data = self.buffer + data
            self.buffer = b""
        elif self.is_stream:
            # A read that is one chunk, as a token's is.
            line = data.find(b"\r\n", 0, 20)
            if _SIZES.get(data[:line]) == len(data) - line - 4 and data[-2:] == b"\r\n":
                reader = self.reader
                if reader is not None:
                    reader.streamed(data[line + 2 : -2], data)
                    if self.reader is not reader:
                        self._hurry()
                return
        at, size = 0, len(data)
        pieces: list[bytes] = []
        is_over = False
        while at < size:
            line = data.find(b"\r\n", at, at + 20)
            if line < 0:
                if size - at >= 20:
                    self._broken("a chunk without its size")
                    return
                break
            length = _chunk_size(data[at:line])
            if not 0 <= length <= CHUNK_LIMIT:
                self._broken("a chunk without its size, or too large")
                return
            end = line + 2 + length
            if end + 2 > size:
                break
            if data[end : end + 2] != b"\r\n":
                self._broken("a chunk is longer than it says")
                return
            if length == 0:
                if size > end + 2:
                    self._broken("bytes after the end of the reply")
                    return
                is_over = True
                at = size
                break
            pieces.append(data[line + 2 : end])
            at = end + 2
        if at < size:
            self.buffer = data[at:] if at else data
        if pieces:
            self._take(pieces)
        if is_over and self.state == CHUNKS:
            self._end(b"".join(self.parts))
        elif pieces and self.reader is None:
            self._hurry()

    def _hurry(self) -> None:
        """A server that does not end its reply must not keep the connection for ever."""
        if self.state == CHUNKS:
            asyncio.get_running_loop().call_later(END_SECONDS, self._overdue, self.uses)

    def _overdue(self, uses: int) -> None:
        if self.uses == uses and self.state == CHUNKS:
            self.close()

    def _take(self, pieces: list[bytes]) -> None:
        if self.is_stream:
            if self.reader is not None:  # None: it had enough, and left the end to us.
                self.reader.streamed(pieces[0] if len(pieces) == 1 else b"".join(pieces))
            return
        self.parts += pieces
        self.left += sum(map(len, pieces))
        if self.left > REPLY_LIMIT:
            self._broken("the reply is too long")

    def let_go(self) -> None:
        """The reader has all it needs; the connection finds its own way back to the pool."""
        self.reader = None

    def _end(self, body: bytes) -> None:
        reader = self.reader
        self._rest()
        if reader is not None:
            reader.ended(self, body)

    def _rest(self) -> None:
        self.reader = None
        self.state = IDLE
        if self.buffer:
            self.buffer = b""
        if self.parts:
            self.parts = []
        replica = self.replica
        if replica.is_leaving or self.is_last or len(replica.idle) >= IDLE_AT_MOST:
            self.close()
        else:
            replica.idle[self] = None


def _chunk_size(text: bytes) -> int:
    """-1: it is none."""
    size = _SIZES.get(text)
    if size is None:
        if not text or not _HEX.issuperset(text):
            return -1
        size = int(text, 16)
        if size and len(_SIZES) < _SIZES_KEPT:
            _SIZES[text] = size
    return size


class Head:
    """What the head of a reply says. `length` is -1 where the body comes in chunks."""

    __slots__ = ("broken", "is_last", "is_stream", "length", "status")

    def __init__(self, head: bytes) -> None:
        head = head.lower()
        status = head[9:12]
        self.broken = ""
        self.status = self.length = 0
        self.is_stream = self.is_last = False
        if head[:7] != b"http/1." or not status.isdigit():
            self.broken = "the reply is not HTTP/1.1"
            return
        self.status = int(status)
        self.length = _content_length(head)
        self.is_last = b"\r\nconnection: close" in head
        if self.length < 0 and b"\r\ntransfer-encoding: chunked" in head:
            self.is_stream = b"\r\ncontent-type: text/event-stream" in head
        elif self.status >= 200 and not 0 <= self.length <= REPLY_LIMIT:
            self.broken = "the reply has no length"


_HEADS: dict[bytes, Head] = {}
"""Heads as they were read: a model server's are the same few again and again."""


def _read_head(raw: bytes) -> Head:
    head = Head(raw)
    if len(raw) < 1024:
        if len(_HEADS) >= _HEADS_KEPT:
            _HEADS.clear()
        _HEADS[raw] = head
    return head


def _content_length(head: bytes) -> int:
    at = head.find(b"\r\ncontent-length:")
    if at < 0:
        return -1
    at += 17
    end = head.find(b"\r", at)
    text = head[at : end if end >= 0 else len(head)].strip()
    return int(text) if text.isdigit() and len(text) < 12 else REPLY_LIMIT + 1


async def dial(replica: Replica, factory: Callable[[Replica], Upstream] = Upstream) -> Upstream:
    """A new connection. Raises OSError or TimeoutError within two seconds."""
    up = await _dial(replica, factory)
    replica.reached()
    return up


async def _dial(replica: Replica, factory: Callable[[Replica], Upstream]) -> Upstream:
    loop = asyncio.get_running_loop()
    route = replica.route
    async with asyncio.timeout(CONNECT_SECONDS):
        if not route.path:
            _, up = await loop.create_connection(lambda: factory(replica), route.host, route.port)
            return up
        if len(os.fsencode(route.path)) <= LONGEST_SOCKET_PATH:
            _, up = await loop.create_unix_connection(lambda: factory(replica), route.path)
            return up
        folder, name = os.path.split(route.path)
        descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            path = f"/proc/self/fd/{descriptor}/{name}"
            _, up = await loop.create_unix_connection(lambda: factory(replica), path)
            return up
        finally:
            os.close(descriptor)
