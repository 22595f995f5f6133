"""From spools to books: every line of every gateway's life, once, whoever dies when.

The mark up to which a spool is kept moves in the Work that keeps and bills what lies before it, so a
kill between any two steps repeats what is known already and loses nothing. A life is closed when its
lock can be taken, which only its end lets go, and its spool is read to the end; what it still had
open is the owner's loss. A spool that is damaged is read up to the damage, said aloud, and left.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import orjson
import structlog

from sublet.base.kernel.interval import from_micros
from sublet.base.store import Actor, Store, StoreUnavailable
from sublet.base.wire.gateway import Malformed, SpoolReader, UsageEvent, read_frames
from sublet.base.wire.gateway.spool import Batch, file_name
from sublet.money import billing
from sublet.records import metering
from sublet.records.metering import EpochState, SpoolFault

log = structlog.get_logger()

ACTOR = Actor.system("link")
LOCK = "lock"
INFLIGHT = "inflight.json"
LOOK = timedelta(milliseconds=200)
DEAD_LOOK = timedelta(seconds=1)
YOUNG = timedelta(seconds=5)
"""Between making its folder and taking its lock a gateway is not to be taken for dead."""
BATCH_BYTES = 1 << 18
"""Of a spool in one Work: some 400 lines, a few tens of milliseconds."""
ROUNDS = 64
"""Batches of one life in a step, so that all are served."""
FIRST_PAUSE = timedelta(seconds=1)
LONGEST_PAUSE = timedelta(seconds=30)


class SpoolDamaged(Exception):
    """What should be a frame is none, where nothing was being written."""


@dataclass(frozen=True, slots=True)
class Life:
    """One epoch of a gateway: its folder, and where reading goes on."""

    gateway: str
    epoch: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.gateway}/{self.epoch}"


@dataclass(slots=True)
class _Trouble:
    life: Life
    why: str
    pause: timedelta
    until: datetime


class Spools:
    """Steps: reads what has come, and closes lives that are over."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store = store
        self._folder = folder
        self._marks: dict[str, tuple[int, int]] = {}
        self._troubles: dict[str, _Trouble] = {}
        self._dead_look_at: datetime | None = None
        self._closed: set[str] | None = None
        """Lives that are closed in the books and whose folders may still be there."""
        self._is_shown = False

    def step(self, now: datetime) -> datetime:
        is_time = self._dead_look_at is None or now >= self._dead_look_at
        if is_time:
            self._dead_look_at = now + DEAD_LOOK
        self._pass(now, may_close=is_time, is_last=False)
        return now + LOOK

    def finish(self, now: datetime) -> bool:
        """The last look, when all gateways have ended. True: no spool is left unread."""
        before = None
        # A step serves all lives in turn; what has gathered while the books were away takes several.
        while before != self._marks:
            before = dict(self._marks)
            self._troubles.clear()
            self._pass(now, may_close=True, is_last=True)
        return not self.lives()

    def lives(self) -> list[Life]:
        """What lies there, oldest first."""
        found: list[Life] = []
        for gateway in _folders(self._folder):
            found += [
                Life(gateway.name, int(epoch.name), epoch)
                for epoch in _folders(gateway)
                if epoch.name.isdigit()
            ]
        return sorted(found, key=lambda life: life.epoch)

    def alive(self, now: datetime) -> dict[str, list[int]]:
        """By gateway the lives that are not known to be over."""
        found: dict[str, list[int]] = {}
        for life in self.lives():
            with _taken(life, now, is_last=False) as is_over:
                if not is_over:
                    found.setdefault(life.gateway, []).append(life.epoch)
        return found

    def _pass(self, now: datetime, *, may_close: bool, is_last: bool) -> None:
        if self._closed is None:
            self._begin()
        lives = self.lives()
        for life in lives:
            trouble = self._troubles.get(life.name)
            if trouble is not None and now < trouble.until:
                continue
            try:
                self._serve(life, now, may_close=may_close, is_last=is_last)
            except StoreUnavailable:
                raise  # Nothing of this life's: all wait for the database.
            except Exception as error:
                self._note_trouble(life, error, now)
            else:
                self._note_well(life)
        names = {life.name for life in lives}
        self._marks = {name: mark for name, mark in self._marks.items() if name in names}
        for name in self._troubles.keys() - names:
            # A person has taken it away: its life is closed at the next start.
            log.warning("spool_gone", life=name, why=self._troubles.pop(name).why)
            self._is_shown = False
        if not self._is_shown:
            self._show()

    def _begin(self) -> None:
        """What a link before us has left: folders of lives that it had closed, and lives that the
        books hold open and that have no folder any more. Only a person can have removed that, and
        nothing more can come of them: it is said, and they are closed."""
        with self._store.read() as tx:
            closed = metering.list_epochs(tx, EpochState.CLOSED)
            opened = metering.list_epochs(tx, EpochState.OPEN)
        there = {life.name for life in self.lives()}
        for epoch in opened:
            if f"{epoch.gateway}/{epoch.epoch}" not in there:
                log.error("gateway_folder_gone", gateway=epoch.gateway, epoch=epoch.epoch)
                with self._store.work(ACTOR) as work:
                    billing.close_epoch(work, gateway=epoch.gateway, epoch=epoch.epoch, lost=[])
        self._closed = {f"{epoch.gateway}/{epoch.epoch}" for epoch in closed} & there

    def _serve(self, life: Life, now: datetime, *, may_close: bool, is_last: bool) -> None:
        assert self._closed is not None
        if life.name in self._closed:
            shutil.rmtree(life.folder)
            self._closed.remove(life.name)
            return
        # What is damage in a spool that is written may be the torn end of one that is not.
        if not may_close and life.name not in self._troubles:
            self._read(life, is_over=False)
            return
        with _taken(life, now, is_last=is_last) as is_over:
            is_at_end = self._read(life, is_over=is_over)
            if is_over and is_at_end:
                self._close(life)

    # ---- reading -------------------------------------------------------------------------------

    def _read(self, life: Life, *, is_over: bool) -> bool:
        """Keep what is there, batch by batch. True: all that there is."""
        reader = SpoolReader(life.folder)
        file, offset = self._mark(life)
        for _ in range(ROUNDS):
            batch = reader.read(file, offset, most_bytes=BATCH_BYTES)
            if not batch.bodies:
                _check_end(life, batch, is_over=is_over)
                self._clear(life, reader, batch.file)
                return True
            self._keep(life, batch)
            if batch.passed_bytes:
                log.warning("spool_end_torn", life=life.name, bytes=batch.passed_bytes)
            file, offset = batch.file, batch.offset
            self._clear(life, reader, file)
        return False

    def _mark(self, life: Life) -> tuple[int, int]:
        mark = self._marks.get(life.name)
        if mark is None:
            with self._store.read() as tx:
                mark = metering.spool_position(tx, life.gateway, life.epoch)
            self._marks[life.name] = mark
        return mark

    def _keep(self, life: Life, batch: Batch) -> None:
        events = [UsageEvent.from_json(body) for body in batch.bodies]
        with self._store.work(ACTOR) as work:
            billing.ingest_usage(
                work,
                gateway=life.gateway,
                epoch=life.epoch,
                events=events,
                file=batch.file,
                offset=batch.offset,
            )
        self._marks[life.name] = (batch.file, batch.offset)

    def _clear(self, life: Life, reader: SpoolReader, file: int) -> None:
        """Files before the mark's are kept in the books, and are not the newest."""
        for number in reader.files():
            if number < min(file, self._marks[life.name][0]):
                (life.folder / file_name(number)).unlink(missing_ok=True)

    # ---- the end of a life ---------------------------------------------------------------------

    def _close(self, life: Life) -> None:
        """Its spool is read: what it held comes free, its folder goes."""
        lost = _inflight(life)
        with self._store.work(ACTOR) as work:
            billing.close_epoch(work, gateway=life.gateway, epoch=life.epoch, lost=lost)
        assert self._closed is not None
        self._closed.add(life.name)
        shutil.rmtree(life.folder)
        self._closed.remove(life.name)
        log.info("gateway_life_closed", gateway=life.gateway, epoch=life.epoch, open=len(lost))

    # ---- trouble -------------------------------------------------------------------------------

    def _note_trouble(self, life: Life, error: Exception, now: datetime) -> None:
        before = self._troubles.get(life.name)
        why = str(error) or type(error).__name__
        pause = FIRST_PAUSE if before is None else min(before.pause * 2, LONGEST_PAUSE)
        self._troubles[life.name] = _Trouble(life, why, pause, now + pause)
        expected = isinstance(error, (SpoolDamaged, Malformed, OSError))
        log.error(
            "spool_not_read",
            gateway=life.gateway,
            epoch=life.epoch,
            why=why,
            exc_info=None if expected else error,
        )
        if before is None or before.why != why:
            self._is_shown = False

    def _note_well(self, life: Life) -> None:
        if self._troubles.pop(life.name, None) is not None:
            log.info("spool_read_again", gateway=life.gateway, epoch=life.epoch)
            self._is_shown = False

    def _show(self) -> None:
        """In the books, where the owner's list of gateways reads it."""
        found = [
            SpoolFault(gateway=trouble.life.gateway, epoch=trouble.life.epoch, why=trouble.why)
            for trouble in self._troubles.values()
        ]
        with self._store.read() as tx:
            shown = metering.list_spool_faults(tx)
        if set(found) != set(shown):
            with self._store.work(ACTOR) as work:
                metering.keep_spool_faults(work, found)
        self._is_shown = True


def _folders(path: Path) -> list[Path]:
    try:
        return [entry for entry in path.iterdir() if entry.is_dir()]
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def _taken(life: Life, now: datetime, *, is_last: bool) -> Iterator[bool]:
    """True: its gateway is dead, and cannot come back while this lasts."""
    if not is_last and abs(now - from_micros(life.epoch)) < YOUNG:
        yield False
        return
    try:
        descriptor = os.open(life.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        yield False  # The folder is gone.
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _check_end(life: Life, batch: Batch, *, is_over: bool) -> None:
    """What is left behind the last sound frame: the torn end of a write, or damage.

    Torn is what nobody was told is kept: without a sound frame behind it, and while its gateway
    lives without a whole line that is wrong.
    """
    if not batch.torn_bytes:
        return
    with (life.folder / file_name(batch.file)).open("rb") as source:
        source.seek(batch.offset)
        rest = source.read()
    where = f"{life.name}/{file_name(batch.file)} at byte {batch.offset}"
    line_end = rest.find(b"\n")
    if read_frames(rest[: line_end + 1])[0]:
        return  # It was written meanwhile.
    if not batch.is_last:
        raise SpoolDamaged(f"{where}: sound frames follow what is no frame")
    if line_end >= 0 and not is_over:
        raise SpoolDamaged(f"{where}: a line that does not check")
    while line_end >= 0:
        rest = rest[line_end + 1 :]
        line_end = rest.find(b"\n")
        if read_frames(rest[: line_end + 1])[0]:
            raise SpoolDamaged(f"{where}: sound frames follow what is no frame")


def _inflight(life: Life) -> list[UsageEvent]:
    """What was open in its last second. A file that cannot be read is none: it is rewritten every
    second and not synced, and what it names is billed to nobody."""
    try:
        rows = orjson.loads((life.folder / INFLIGHT).read_bytes())
        return [UsageEvent.from_json(orjson.dumps(row)) for row in rows]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        log.warning("inflight_unreadable", life=life.name, why=str(error))
        return []
