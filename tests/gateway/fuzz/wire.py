"""HTTP/1.1 by hand: requests written in every lawful way and in many unlawful ones, and answers
read strictly."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

KEY = b"sk-fuzz"
SMUGGLED = 7777
"""Prompt tokens of a request that no client asks for: the mock must never see it."""
WAIT_SECONDS = 20.0


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        """Of an error."""
        found = json.loads(self.body)["error"]["code"]
        return None if found is None else str(found)

    @property
    def words(self) -> int:
        """How many tokens the mock made, of a chat in one piece or of a stream."""
        if self.headers["content-type"].startswith("application/json"):
            return len(json.loads(self.body)["choices"][0]["message"]["content"].split())
        return self.body.count(b'"content":" w')


class Malformed(AssertionError):
    """What came back is no HTTP/1.1."""


class Wire:
    """One connection."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._read = b""

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, *pieces: bytes) -> None:
        """Each piece in a write of its own. What is sent after the other side closed is lost."""
        with contextlib.suppress(ConnectionError):
            for piece in pieces:
                self.socket.sendall(piece)

    def half_close(self) -> None:
        """Nothing more is sent; what comes is still read."""
        with contextlib.suppress(OSError):  # The other side has closed all of it.
            self.socket.shutdown(socket.SHUT_WR)

    def abort(self) -> None:
        """A reset, not an end."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.socket.close()

    def answers(self, most: int = 1000, *, heads: Sequence[bool] = ()) -> list[Answer]:
        """All answers until the other side closes, or so many. `heads`: of HEAD requests."""
        found: list[Answer] = []
        while len(found) < most:
            answer = self.answer(is_head=len(found) < len(heads) and heads[len(found)])
            if answer is None:
                break
            found.append(answer)
        return found

    def answer(self, *, is_head: bool = False) -> Answer | None:
        """The next answer, interim ones left out; None: the other side closed between answers."""
        while True:
            head = self._until(b"\r\n\r\n", may_end=True)
            if head is None:
                return None
            line, *lines = head[:-4].split(b"\r\n")
            if not line.startswith(b"HTTP/1.1 ") or not line[9:12].isdigit():
                raise Malformed(line)
            status = int(line[9:12])
            headers: dict[str, str] = {}
            for text in lines:
                name, sign, value = text.decode("latin-1").partition(": ")
                if not sign or name != name.strip().lower() or name in headers:
                    raise Malformed(text)
                headers[name] = value
            if status >= 200:
                break
        if is_head or status == 204:
            return Answer(status, headers, b"")
        if headers.get("transfer-encoding") == "chunked":
            if "content-length" in headers:
                raise Malformed("both framings")
            return Answer(status, headers, self._chunks())
        if "content-length" in headers:
            return Answer(status, headers, self._exactly(int(headers["content-length"])))
        if headers.get("connection") != "close":
            raise Malformed("no framing")
        body, self._read = self._read, b""
        while data := self._more():
            body += data
        return Answer(status, headers, body)

    def is_closed(self) -> bool:
        """Nothing more comes."""
        return not self._read and not self._more()

    def _chunks(self) -> bytes:
        parts: list[bytes] = []
        while True:
            line = self._until(b"\r\n")
            assert line is not None
            size = int(line[:-2], 16)
            data = self._exactly(size + 2)
            if data[-2:] != b"\r\n":
                raise Malformed("a chunk is longer than it says")
            if not size:
                return b"".join(parts)
            parts.append(data[:-2])

    def _until(self, mark: bytes, *, may_end: bool = False) -> bytes | None:
        while mark not in self._read:
            data = self._more()
            if not data:
                if may_end and not self._read:
                    return None
                raise Malformed(f"it ended in the middle: {self._read!r}")
            self._read += data
        end = self._read.index(mark) + len(mark)
        found, self._read = self._read[:end], self._read[end:]
        return found

    def _exactly(self, size: int) -> bytes:
        while len(self._read) < size:
            data = self._more()
            if not data:
                raise Malformed("it ended in the middle of a body")
            self._read += data
        found, self._read = self._read[:size], self._read[size:]
        return found

    def _more(self) -> bytes:
        try:
            return self.socket.recv(1 << 18)
        except ConnectionResetError:
            return b""


# ---- requests -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chat:
    """A request that is in order. `words`: tokens asked for, by which its answer is known."""

    words: int
    is_stream: bool = False
    chunk_sizes: tuple[int, ...] = ()
    """Of a chunked body; empty: Content-Length."""
    extension: bytes = b""
    trailers: bytes = b""
    headers: tuple[tuple[bytes, bytes], ...] = ()
    is_upper: bool = False
    path: bytes = b"/v1/chat/completions"
    extra: dict[str, object] = field(default_factory=dict, hash=False)

    def body(self) -> bytes:
        return chat_body(f"n={self.words}", stream=self.is_stream, **self.extra)

    def head(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"Host", b"gateway"),
            (b"Authorization", b"Bearer " + KEY),
            (b"Content-Type", b"application/json"),
            *self.headers,
        ]

    def framing(self, body: bytes) -> tuple[list[tuple[bytes, bytes]], bytes]:
        if not self.chunk_sizes:
            return [(b"Content-Length", b"%d" % len(body))], body
        parts, at, turn = [], 0, 0
        while at < len(body):
            size = self.chunk_sizes[turn % len(self.chunk_sizes)]
            part = body[at : at + size]
            parts.append(b"%x%b\r\n%b\r\n" % (len(part), self.extension, part))
            at += size
            turn += 1
        return [(b"Transfer-Encoding", b"chunked")], b"%b0\r\n%b\r\n" % (
            b"".join(parts),
            self.trailers,
        )

    def bytes(self) -> bytes:
        framing, data = self.framing(self.body())
        return write(b"POST %b HTTP/1.1" % self.path, [*self.head(), *framing], data, self.is_upper)


def chat_body(words: str, **fields: object) -> bytes:
    body = {"model": "mock", "messages": [{"role": "user", "content": words}], **fields}
    return json.dumps(body).encode()


def write(
    line: bytes, headers: Sequence[tuple[bytes, bytes]], body: bytes = b"", is_upper: bool = False
) -> bytes:
    named = [(name.upper() if is_upper else name, value) for name, value in headers]
    lines = b"".join(b"%b: %b\r\n" % pair for pair in named)
    return b"%b\r\n%b\r\n%b" % (line, lines, body)


def smuggled() -> bytes:
    """What an attacker hides behind a request: whole, and with a valid key."""
    body = chat_body(f"n=1 prompt={SMUGGLED}")
    return write(
        b"POST /v1/chat/completions HTTP/1.1",
        [*Chat(1).head(), (b"Content-Length", b"%d" % len(body))],
        body,
    )


def cut(data: bytes, places: Sequence[int]) -> Iterator[bytes]:
    """The same bytes in pieces."""
    begin = 0
    for at in sorted({place % (len(data) + 1) for place in places}):
        if at > begin:
            yield data[begin:at]
            begin = at
    if begin < len(data):
        yield data[begin:]
