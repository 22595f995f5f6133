"""Time. The kernel alone reads the wall and boot clocks.

`Clock.now()` is the wall clock at an anchor plus what has elapsed on the boot clock since. Anchors
are kept in the store, one set per installation and boot, so that every process computes the same
instant and a step of the wall clock moves nothing: it is recorded and slewed away.
Deadlines are kept as (boot id, nanoseconds of CLOCK_BOOTTIME).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Protocol

from sublet.base.kernel.interval import from_micros, micros_since_epoch

SLEW_PPM = 500
"""How fast a wall step is followed: half a millisecond a second, as ntpd does."""
STEP_TOLERANCE_US = 1_000_000
SETTLED_US = 10_000


class Clock(Protocol):
    """Where `now` comes from: the system, or a rehearsal."""

    def now(self) -> datetime: ...

    def boot_id(self) -> str: ...

    def boot_ns(self) -> int: ...

    def to_boot_ns(self, at: datetime) -> int:
        """The boot-clock reading at that instant, by the anchor in force."""
        ...

    def from_boot_ns(self, boot_ns: int) -> datetime: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchor:
    """From `boot_ns` of boot `boot_id` on, UTC = `utc_us` + elapsed × (1 + rate_ppm/10⁶)."""

    boot_id: str
    boot_ns: int
    utc_us: int
    rate_ppm: int = 0

    def utc_us_at(self, boot_ns: int) -> int:
        elapsed = boot_ns - self.boot_ns
        return self.utc_us + (elapsed * (1_000_000 + self.rate_ppm)) // 1_000_000_000

    def boot_ns_at(self, utc_us: int) -> int:
        elapsed = utc_us - self.utc_us
        return self.boot_ns + -(-elapsed * 1_000_000_000 // (1_000_000 + self.rate_ppm))


def read_boot_id() -> str:
    """The kernel's id of this boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


read_boot_ns: Callable[[], int] = partial(time.clock_gettime_ns, time.CLOCK_BOOTTIME)
"""Nanoseconds since the boot, sleep included. No frame of its own: the gateway reads it a lot."""


def read_wall_us() -> int:
    return time.time_ns() // 1000


class SystemClock:
    """UTC from anchors and the boot clock. `anchors` are of this boot, oldest first."""

    def __init__(self, anchors: Sequence[Anchor]) -> None:
        self._anchors = tuple(anchors)
        self._boot_id = read_boot_id()
        if not self._anchors or any(a.boot_id != self._boot_id for a in self._anchors):
            raise ValueError("a clock needs an anchor of this boot")

    @classmethod
    def unanchored(cls) -> SystemClock:
        """A clock of one process, anchored now: for tools that share no store."""
        return cls([first_anchor(read_boot_id(), read_boot_ns(), read_wall_us(), None)])

    def adopt(self, anchors: Sequence[Anchor]) -> None:
        """Take over anchors that another process has written."""
        mine = tuple(a for a in anchors if a.boot_id == self._boot_id)
        if mine:
            self._anchors = mine

    def _anchor(self, boot_ns: int) -> Anchor:
        for anchor in reversed(self._anchors):
            if anchor.boot_ns <= boot_ns:
                return anchor
        return self._anchors[0]

    def now(self) -> datetime:
        return self.from_boot_ns(read_boot_ns())

    def boot_id(self) -> str:
        return self._boot_id

    def boot_ns(self) -> int:
        return read_boot_ns()

    def to_boot_ns(self, at: datetime) -> int:
        utc_us = micros_since_epoch(at)
        for anchor in reversed(self._anchors):
            # Strictly: an anchor may begin within the microsecond that the one before it shows.
            if anchor.utc_us < utc_us:
                return anchor.boot_ns_at(utc_us)
        return self._anchors[0].boot_ns_at(utc_us)

    def from_boot_ns(self, boot_ns: int) -> datetime:
        return from_micros(self._anchor(boot_ns).utc_us_at(boot_ns))


class VirtualClock:
    """A clock that moves only when told: for the rehearsal and for tests."""

    def __init__(self, start: datetime) -> None:
        self._start = start
        self._now = start

    def now(self) -> datetime:
        return self._now

    def boot_id(self) -> str:
        return "virtual"

    def boot_ns(self) -> int:
        return self.to_boot_ns(self._now)

    def to_boot_ns(self, at: datetime) -> int:
        return (micros_since_epoch(at) - micros_since_epoch(self._start)) * 1000

    def from_boot_ns(self, boot_ns: int) -> datetime:
        return self._start + timedelta(microseconds=boot_ns // 1000)

    def advance_to(self, at: datetime) -> None:
        """Never backwards."""
        if at < self._now:
            raise ValueError("a clock does not run backwards")
        self._now = at


def first_anchor(boot_id: str, boot_ns: int, wall_us: int, last_seen_us: int | None) -> Anchor:
    """The anchor of a new boot. UTC never runs backwards, whatever the wall says."""
    return Anchor(boot_id=boot_id, boot_ns=boot_ns, utc_us=max(wall_us, last_seen_us or 0))


def discipline(anchors: Sequence[Anchor], boot_ns: int, wall_us: int) -> Anchor | None:
    """The anchor to add when clock and wall differ, or None.

    The clock follows the wall by slewing, never by a jump. The new anchor continues where the
    old one stands. `boot_ns` is when it takes effect; `wall_us` the wall at that moment.
    """
    current = anchors[-1]
    here = current.utc_us_at(boot_ns)
    error = wall_us - here
    if current.rate_ppm == 0 and abs(error) <= STEP_TOLERANCE_US:
        return None
    rate_ppm = 0 if abs(error) <= SETTLED_US else (SLEW_PPM if error > 0 else -SLEW_PPM)
    if rate_ppm == current.rate_ppm:
        return None
    return Anchor(boot_id=current.boot_id, boot_ns=boot_ns, utc_us=here, rate_ppm=rate_ppm)
