"""The snapshot that gateways act by: composed from the books, numbered, replaced atomically.

A number is used once, whatever dies when: it is written down, with the replicas that its snapshot
names, before the file is. What has not changed keeps its number and only says anew, every ten
seconds, that it is still the newest.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event

import structlog

from sublet.base.kernel.errors import Conflict
from sublet.base.kernel.interval import micros_since_epoch
from sublet.base.store import Actor, Store
from sublet.base.wire.gateway import Malformed, Snapshot, read_snapshot, write_snapshot
from sublet.shops import models

log = structlog.get_logger()

ACTOR = Actor.system("link")
SNAPSHOT = "snapshot"
COMPOSED = "composed"
"""Beside the snapshot: the microsecond as of which it is known to be true."""
SHORTEST = timedelta(milliseconds=100)
"""Between two compositions; longer where one takes long, so that it is a tenth of the time."""
IDLE_SHARE = 10
FRESH = timedelta(seconds=10)
STALE_SHARE = 4
"""Of the time after which a gateway takes what it has for stale, but no more than FRESH."""
LOOK_SECONDS = 0.01
AWAITED_SECONDS = 2.0


class Publisher:
    """Steps on every nudge. `tell(number)`: a snapshot was written. `stale`: after what time
    without a fresh one gateways refuse."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        *,
        gateways: int,
        stale: timedelta,
        tell: Callable[[int], None],
    ) -> None:
        self._store = store
        self._folder = folder
        self._gateways = gateways
        self._fresh = min(FRESH, stale / STALE_SHARE)
        self._tell = tell
        self._composer = models.Composer()
        self._content: bytes | None = None
        """What the file says, but for its number and instant."""
        self._number = 0
        self._written_at: datetime | None = None
        self._not_before: datetime | None = None
        found = _read(folder / SNAPSHOT)
        if found is not None:
            self._number = found.number
            self._content = _content(found)

    @property
    def number(self) -> int:
        """Of the snapshot that is out."""
        return self._number

    def step(self, now: datetime) -> datetime:
        """Look at the books; write what is new. A full disk is said, and tried again."""
        if self._not_before is not None and now < self._not_before:
            return self._not_before
        with self._store.read() as tx:
            made = self._composer.compose(tx, number=0, now=now, gateways=self._gateways)
        try:
            self._publish(made, now)
        except Conflict:
            return now  # A replica began to leave meanwhile: compose anew.
        except OSError as error:
            log.error("snapshot_not_written", why=str(error))
            return now + timedelta(seconds=1)
        took = self._store.clock.now() - now
        self._not_before = now + max(SHORTEST, took * IDLE_SHARE)
        assert self._written_at is not None
        return max(self._written_at + self._fresh, self._not_before)

    def _publish(self, made: Snapshot, now: datetime) -> None:
        content = _content(made)
        if content != self._content:
            self._write(dataclasses.replace(made, number=self._reserve(made)), now)
            self._content = content
        elif self._written_at is None or now >= self._written_at + self._fresh:
            self._write(dataclasses.replace(made, number=self._number), now)
        self._note_composed(now)

    def _reserve(self, made: Snapshot) -> int:
        """The next number, for ever this snapshot's."""
        with self._store.work(ACTOR) as work:
            number = max(self._number, models.last_snapshot(work.tx)) + 1
            models.keep_snapshot(work, dataclasses.replace(made, number=number))
        return number

    def _write(self, snapshot: Snapshot, now: datetime) -> None:
        path = self._folder / SNAPSHOT
        _replace(path, write_snapshot(snapshot))
        self._number = snapshot.number
        self._written_at = now
        log.debug("snapshot_written", number=snapshot.number, keys=len(snapshot.keys))
        self._tell(snapshot.number)

    def _note_composed(self, now: datetime) -> None:
        """One small write in place: who waits for it reads no snapshot."""
        descriptor = os.open(
            self._folder / COMPOSED, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            os.pwrite(descriptor, b"%020d" % micros_since_epoch(now), 0)
        finally:
            os.close(descriptor)


def await_published(folder: Path, after: datetime, seconds: float = AWAITED_SECONDS) -> bool:
    """Wait until the snapshot that is out was composed later than that; False: it took too long.

    What was committed by `after` is in it then.
    """
    pause = Event()
    wanted = micros_since_epoch(after)
    for _ in range(int(seconds / LOOK_SECONDS)):
        if _composed(folder) > wanted:
            return True
        pause.wait(LOOK_SECONDS)
    return False


def _composed(folder: Path) -> int:
    try:
        return int((folder / COMPOSED).read_bytes())
    except (OSError, ValueError):
        return 0


def _content(snapshot: Snapshot) -> bytes:
    return write_snapshot(dataclasses.replace(snapshot, number=0, made_us=0))


def _read(path: Path) -> Snapshot | None:
    try:
        return read_snapshot(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, Malformed) as error:
        log.error("snapshot_unreadable", why=str(error))
        return None


def _replace(path: Path, data: bytes) -> None:
    """Whole or not at all, for its user alone. Which of the two it is after a power cut is all one:
    the next start writes it anew."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
