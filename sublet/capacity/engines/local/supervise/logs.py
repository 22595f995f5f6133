"""A run's output: one stream of bytes with offsets, of which the beginning and the end are kept.

The first half of the budget is the beginning (how it started, usually why it failed); of the rest
the newest pieces stay. Offsets count the whole stream, so a reader that goes on from its last
offset notices a gap: a line says how much is missing, and the next offset lies behind it.
"""

from __future__ import annotations

import os

from .loop import Loop

PIECE_NAME = "log"
_BURST = 256 * 1024
_REST_NS = 50_000_000
_LARGEST_PIPE = 4 << 20
"""Four times what a tenant may enlarge it to."""


class LogWriter:
    """Only the supervisor writes; pieces are named by the offset at which they begin."""

    def __init__(self, folder: str, budget: int) -> None:
        self._folder = folder
        self._head = max(budget // 2, 4096)
        self._piece = max(budget // 4, 2048)
        self._offset = 0
        self._tail: list[int] = []
        self._room = self._head
        self._fd = self._open(0)

    def _open(self, start: int) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        return os.open(os.path.join(self._folder, _name(start)), flags, 0o600)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            if self._room == 0:
                self._turn()
            written = os.write(self._fd, view[: self._room])
            self._offset += written
            self._room -= written
            view = view[written:]

    def _turn(self) -> None:
        os.close(self._fd)
        self._tail.append(self._offset)
        while len(self._tail) > 2:
            os.unlink(os.path.join(self._folder, _name(self._tail.pop(0))))
        self._room = self._piece
        self._fd = self._open(self._offset)


class LogPump:
    """Carries output from a pipe to the log, a burst at a time: some 5 MB a second at most."""

    def __init__(self, loop: Loop, log: LogWriter) -> None:
        self._loop = loop
        self._log = log
        self._pipe, self.sink = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._pipe, False)
        loop.watch(self._pipe, self._carry)

    def _carry(self, _events: int) -> None:
        if not self._take(_BURST):
            self._loop.rest(self._pipe, _REST_NS)

    def _take(self, most: int) -> bool:
        """Write what is in the pipe, up to so much; True when it is empty."""
        taken = 0
        while taken < most:
            try:
                data = os.read(self._pipe, 65536)
            except BlockingIOError:
                return True
            if not data:
                return True
            taken += len(data)
            self._write(data)
        return False

    def _write(self, data: bytes) -> None:
        try:
            self._log.write(data)
        except OSError:
            return  # the disk is full: output is lost, the run is not

    def say(self, text: str) -> None:
        """A line of Sublet's own, after what was said before it."""
        self._take(_BURST)
        self._write(f"[sublet] {text}\n".encode())

    def finish(self) -> None:
        """Take what is left, once everybody who wrote is gone."""
        os.close(self.sink)
        self._take(_LARGEST_PIPE)


def read(folder: str, offset: int, limit: int) -> tuple[bytes, int]:
    """Output from `offset` on, and where to go on. Nothing yet: empty, the same offset."""
    offset = max(offset, 0)
    for _ in range(5):  # a piece may be dropped between listing and opening
        starts = _starts(folder)
        begins = [start for start in starts if start <= offset]
        if not begins:
            return b"", offset
        try:
            fd = os.open(os.path.join(folder, _name(begins[-1])), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            data = os.pread(fd, limit, offset - begins[-1])
        finally:
            os.close(fd)
        if data:
            return data, offset + len(data)
        later = [start for start in starts if start > offset]
        if not later:
            return b"", offset
        gap = later[0] - offset
        return f"\n[sublet] {gap} bytes of output were left out here\n".encode(), later[0]
    return b"", offset


def _name(start: int) -> str:
    return PIECE_NAME if start == 0 else f"{PIECE_NAME}.{start}"


def _starts(folder: str) -> list[int]:
    starts = []
    for name in os.listdir(folder):
        if name == PIECE_NAME:
            starts.append(0)
        elif name.startswith(f"{PIECE_NAME}.") and name[len(PIECE_NAME) + 1 :].isdigit():
            starts.append(int(name[len(PIECE_NAME) + 1 :]))
    return sorted(starts)
