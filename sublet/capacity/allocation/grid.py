"""The grid of time on which the book counts.

Edges are fixed points of UTC, not distances from now: 5 minutes for two hours, 1 hour for fourteen
days, then days cut at 11:00Z for thirty-five weeks, and one bucket without end. As time passes
coarse buckets split into finer ones at edges they already had, so what was counted in a coarse
bucket is never more in its parts.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache

from sublet.base.kernel.interval import EPOCH

SLOT = timedelta(minutes=5)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
FINE = timedelta(hours=2)
HOURLY = timedelta(days=14)
DAYS = 35 * 7
CUT = timedelta(hours=11)
"""Days are cut at 11:00Z, when blocks of more than fourteen days begin and end."""


def slot_of(now: datetime) -> datetime:
    """The beginning of the five minutes that hold `now`."""
    return now - (now - EPOCH) % SLOT


def _ceil(at: datetime, step: timedelta, offset: timedelta = timedelta(0)) -> datetime:
    return at + -(at - EPOCH - offset) % step


@dataclass(frozen=True, slots=True)
class Grid:
    """Bucket i is `[edges[i], edges[i + 1])`; the last one has no end."""

    slot: datetime
    edges: tuple[datetime, ...]

    def __len__(self) -> int:
        return len(self.edges)

    def index(self, at: datetime) -> int:
        """The bucket that holds the instant; what is past counts as the first."""
        return max(bisect_right(self.edges, at) - 1, 0)

    def stop(self, end: datetime | None) -> int:
        """One past the last bucket that `[…, end)` touches; None reaches the one without end."""
        if end is None:
            return len(self.edges)
        return bisect_left(self.edges, end)

    def span(self, start: datetime, end: datetime | None) -> tuple[int, int]:
        """The buckets that `[start, end)` touches, as a slice. Something held is never nowhere."""
        first = self.index(start)
        return first, max(self.stop(end), first + 1)

    def end_of(self, bucket: int) -> datetime | None:
        return self.edges[bucket + 1] if bucket + 1 < len(self.edges) else None


@lru_cache(maxsize=64)
def grid_from(slot: datetime) -> Grid:
    """The grid whose first bucket begins at `slot`."""
    edges = []
    at = slot
    hourly_from = _ceil(slot + FINE, HOUR)
    while at < hourly_from:
        edges.append(at)
        at += SLOT
    daily_from = _ceil(slot + HOURLY, DAY, CUT)
    while at < daily_from:
        edges.append(at)
        at += HOUR
    edges.extend(at + day * DAY for day in range(DAYS + 1))
    return Grid(slot, tuple(edges))


def grid_at(now: datetime) -> Grid:
    return grid_from(slot_of(now))
