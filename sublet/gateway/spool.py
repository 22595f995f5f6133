"""The durable spool: what was used, on disk before its answer is out.

One writer thread commits in groups: whatever has come while the disk was busy is one write and one
fdatasync. The event loop thread only appends to a list. A write that fails acknowledges nothing and
is tried again in a fresh file; meanwhile the gateway takes no new requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import sys
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from sublet.base.wire.gateway import frame
from sublet.base.wire.gateway.spool import file_name

FILE_BYTES = 64 << 20
RETRY_SECONDS = 0.2
LAZY_SECONDS = 0.02
INFLIGHT_SECONDS = 1.0
INFLIGHT = "inflight.json"

Entry = tuple[bytes, Callable[[], None] | None]


class Spool:
    """The spool of one epoch, in a folder of its own, whose `lock` is held as long as we live.

    `rows`: called in the loop's thread once a second; what it gives (JSON objects) is kept in
    `inflight.json` as what would be lost if this process died now.
    """

    def __init__(
        self,
        folder: Path,
        loop: asyncio.AbstractEventLoop,
        *,
        ack: bool = True,
        rows: Callable[[], list[bytes]] = list,
        file_bytes: int = FILE_BYTES,
    ) -> None:
        self._folder = folder
        self._loop = loop
        self._ack = ack
        self._rows = rows
        self._file_bytes = file_bytes
        self._entries: deque[Entry] = deque()
        self._wake = threading.Event()
        self._is_idle = True
        self._is_ending = False
        self._inflight: bytes | None = None
        self._file = 1
        self._offset = 0
        self._fd = -1
        self.is_failing = False
        self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._position = (1, 0)
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()
        self._loop.call_later(INFLIGHT_SECONDS, self._look)

    @property
    def position(self) -> tuple[int, int]:
        """File and offset: all before it is on disk."""
        return self._position

    def append(self, body: bytes, on_disk: Callable[[], None] | None) -> None:
        """Keep one event; `on_disk` is called in the loop's thread once it is there."""
        if not self._ack and on_disk is not None:
            self._entries.append((body, None))
            on_disk()
        else:
            self._entries.append((body, on_disk))
        if self._is_idle:
            self._is_idle = False
            self._wake.set()

    async def finish(self) -> None:
        """Until all that was appended is on disk, or the disk fails."""
        while self._entries or not self._is_idle:
            if self.is_failing:
                return
            await asyncio.sleep(0.005)

    def close(self) -> None:
        """Write what is there, and end the thread. The lock is given up with the process."""
        self._is_ending = True
        self._wake.set()
        self._thread.join(5)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        os.close(self._lock)

    # ---- in the loop's thread ------------------------------------------------------------------

    def _look(self) -> None:
        rows = self._rows()
        if rows or self._inflight:
            self._inflight = b"[" + b",".join(rows) + b"]" if rows else b""
            if self._is_idle:
                self._is_idle = False
                self._wake.set()
        if not self._is_ending:
            self._loop.call_later(INFLIGHT_SECONDS, self._look)

    @staticmethod
    def _tell(told: list[Callable[[], None]]) -> None:
        for on_disk in told:
            on_disk()

    # ---- in the writer's thread ----------------------------------------------------------------

    def _run(self) -> None:
        while True:
            if not self._entries and self._inflight is None:
                self._is_idle = True
                # Between the look and the mark an entry may have come without a wake.
                if not self._entries and self._inflight is None:
                    if self._is_ending:
                        return
                    self._wake.wait()
                self._is_idle = False
                self._wake.clear()
            if not self._ack and not self._is_ending:
                threading.Event().wait(LAZY_SECONDS)
            # By count: what is appended meanwhile stays for the next group.
            entries = [self._entries.popleft() for _ in range(len(self._entries))]
            if entries:
                self._commit(entries)
            self._keep_inflight()

    def _commit(self, entries: list[Entry]) -> None:
        data = b"".join([frame(body) for body, _ in entries])
        while not self._write(data):
            if self._is_ending:
                return
            threading.Event().wait(RETRY_SECONDS)
        told = [on_disk for _, on_disk in entries if on_disk is not None]
        if told:
            try:
                self._loop.call_soon_threadsafe(self._tell, told)
            except RuntimeError:
                return  # The loop is closed: nobody waits any more.

    def _write(self, data: bytes) -> bool:
        try:
            if self._fd < 0 or self._offset >= self._file_bytes:
                self._next_file()
            view = memoryview(data)
            written = 0
            while written < len(data):
                written += os.write(self._fd, view[written:])
            os.fdatasync(self._fd)
        except OSError as error:
            self._failed(error)
            return False
        self._offset += len(data)
        self._position = (self._file, self._offset)
        self.is_failing = False
        return True

    def _next_file(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self._file += 1
        path = self._folder / file_name(self._file)
        # Not there yet: a name is used once.
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._offset = 0
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _failed(self, error: OSError) -> None:
        """Take back what is half written: after a failed sync nobody knows what is on the disk, so
        the next try goes into a new file, and the old one ends where it was last known good."""
        if not self.is_failing:
            self.is_failing = True
            sys.stderr.write(f"the spool cannot be written: {error}\n")
        if self._fd < 0:
            return
        with contextlib.suppress(OSError):
            os.ftruncate(self._fd, self._offset)
        os.close(self._fd)
        self._fd = -1
        self._file += 1

    def _keep_inflight(self) -> None:
        rows, self._inflight = self._inflight, None
        if rows is None:
            return
        path = self._folder / INFLIGHT
        try:
            if not rows:
                path.unlink(missing_ok=True)
                return
            temporary = path.with_name(f".{INFLIGHT}.new")
            temporary.write_bytes(rows)
            os.replace(temporary, path)
        except OSError as error:
            self._say_once(error)

    def _say_once(self, error: OSError) -> None:
        if not self.is_failing:
            sys.stderr.write(f"{INFLIGHT} cannot be written: {error}\n")
