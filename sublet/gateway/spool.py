"""The durable spool: what was used, on disk before its answer is out.

One writer thread commits in groups: whatever has come while the disk was busy is one synced write.
The event loop's thread only appends to a list, and wakes the writer if it sleeps. A write
that fails acknowledges nothing and is repeated in a fresh file until it succeeds; meanwhile
`is_failing` says that no new requests should be taken.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from sublet.base.wire.gateway import frame
from sublet.base.wire.gateway.spool import file_name
from sublet.gateway.log import say

FILE_BYTES = 64 << 20
RETRY_SECONDS = 0.2
LAZY_SECONDS = 0.02
GATHER_SECONDS = 0.001
BUSY_GROUP = 5
"""After a group as large as that the next one gathers for a moment: fewer, larger commits cost less
than a millisecond at the end of an answer is worth. A lone request never waits for others."""
INFLIGHT_SECONDS = 1.0
INFLIGHT = "inflight.json"
LOCK = "lock"

Entry = tuple[bytes, Callable[[], None] | None]


class Spool:
    """The spool of one epoch, in a folder of its own, whose `lock` is held as long as we live.

    `rows`: called in the loop's thread once a second; what it gives (JSON objects) is kept in
    `inflight.json`, a JSON list, as what would be lost if this process died now. No rows, no file.
    Without `ack` callbacks are called at once, and the disk follows within some 20 ms.
    Raises BlockingIOError if another process holds the lock.
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
        self._inflight: deque[bytes] = deque(maxlen=1)
        self._has_inflight = False
        # A lock is the cheapest bell there is: the writer sleeps in `acquire`.
        self._bell = threading.Lock()
        self._bell.acquire()
        self._is_idle = False
        self._is_ending = False
        self._last_group = 0
        self._file = 1
        self._offset = 0
        self._fd = -1
        self._position = (1, 0)
        self.is_failing = False
        self._lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            raise
        self._thread = threading.Thread(target=self._run, name="spool", daemon=True)
        self._thread.start()
        self._timer = self._loop.call_later(INFLIGHT_SECONDS, self._look)

    @property
    def position(self) -> tuple[int, int]:
        """File and offset: all before it is on disk."""
        return self._position

    def append(self, body: bytes, on_disk: Callable[[], None] | None) -> None:
        """Keep one event; `on_disk` is called in the loop's thread once it is there."""
        if self._ack:
            self._entries.append((body, on_disk))
        else:
            self._entries.append((body, None))
            if on_disk is not None:
                on_disk()
        if self._is_idle:
            self._ring()

    async def finish(self) -> None:
        """Until all that was appended is on disk, or the disk fails."""
        while (self._entries or not self._is_idle) and not self.is_failing:
            await asyncio.sleep(0.005)

    def close(self) -> None:
        """Write what is there, end the thread, give up the lock. What a failing disk does not take
        now was not acknowledged to anybody."""
        self._timer.cancel()
        self._keep(self._rows())
        self._is_ending = True
        self._ring()
        self._thread.join(5)
        if self._thread.is_alive():
            return  # It hangs in the disk; its descriptors go with the process.
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        os.close(self._lock)

    # ---- in the loop's thread ------------------------------------------------------------------

    def _ring(self) -> None:
        self._is_idle = False
        # A bell that rings already does as well: the writer looks again before it sleeps.
        with contextlib.suppress(RuntimeError):
            self._bell.release()

    def _look(self) -> None:
        self._keep(self._rows())
        self._timer = self._loop.call_later(INFLIGHT_SECONDS, self._look)

    def _keep(self, rows: list[bytes]) -> None:
        if not rows and not self._has_inflight:
            return
        self._has_inflight = bool(rows)
        self._inflight.append(b"[" + b",".join(rows) + b"]" if rows else b"")
        if self._is_idle:
            self._ring()

    def _tell(self, told: list[Callable[[], None]]) -> None:
        for on_disk in told:
            try:
                on_disk()
            except Exception as error:
                # One request's fault must not keep back the answers of the others.
                self._loop.call_exception_handler({"message": "on_disk", "exception": error})

    # ---- in the writer's thread ----------------------------------------------------------------

    def _run(self) -> None:
        while True:
            if not self._entries and not self._inflight:
                self._is_idle = True
                # Between the look and the mark something may have come without a ring.
                if not self._entries and not self._inflight:
                    if self._is_ending:
                        return
                    self._bell.acquire()
                self._is_idle = False
            if not self._is_ending:
                if not self._ack:
                    time.sleep(LAZY_SECONDS)
                elif self._last_group >= BUSY_GROUP:
                    time.sleep(GATHER_SECONDS)
            # By count: what is appended meanwhile stays for the next group.
            entries = [self._entries.popleft() for _ in range(len(self._entries))]
            self._last_group = len(entries)
            if entries:
                self._commit(entries)
            self._write_inflight()

    def _commit(self, entries: list[Entry]) -> None:
        data = b"".join([frame(body) for body, _ in entries])
        while not self._write(data):
            if self._is_ending:
                return
            time.sleep(RETRY_SECONDS)
        told = [on_disk for _, on_disk in entries if on_disk is not None]
        if told:
            # RuntimeError: the loop is closed, nobody waits any more.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._tell, told)

    def _write(self, data: bytes) -> bool:
        try:
            if self._fd < 0 or self._offset >= self._file_bytes:
                self._next_file()
            written = os.write(self._fd, data)
            while written < len(data):
                written += os.write(self._fd, data[written:])
        except OSError as error:
            self._failed(error)
            return False
        self._offset += len(data)
        self._position = (self._file, self._offset)
        if self.is_failing:
            self.is_failing = False
            say("spool_written_again", file=self._file)
        return True

    def _next_file(self) -> None:
        if self._fd >= 0:
            full, self._fd = self._fd, -1
            self._file += 1
            self._offset = 0
            os.close(full)
        path = self._folder / file_name(self._file)
        # Not there yet: a name is used once.
        # With O_DSYNC a write is on the disk as it returns: one call where fdatasync is a second,
        # and one change of threads less.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_DSYNC
        self._fd = os.open(path, flags, 0o600)
        folder = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _failed(self, error: OSError) -> None:
        """Take back what is half written. After a failed sync nobody knows what is on the disk, so
        the next try goes into a new file, and the old one ends where it was last known good."""
        if not self.is_failing:
            self.is_failing = True
            say("spool_not_written", file=self._file, error=str(error))
        if self._fd < 0:
            return
        failed, self._fd = self._fd, -1
        with contextlib.suppress(OSError):
            os.ftruncate(failed, self._offset)
        with contextlib.suppress(OSError):
            os.close(failed)
        self._file += 1
        self._offset = 0

    def _write_inflight(self) -> None:
        try:
            rows = self._inflight.popleft()
        except IndexError:
            return
        path = self._folder / INFLIGHT
        try:
            if rows:
                temporary = path.with_name(f".{INFLIGHT}.new")
                temporary.write_bytes(rows)
                os.replace(temporary, path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            if not self.is_failing:
                say("inflight_not_written", error=str(error))
