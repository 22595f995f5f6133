"""Half-open intervals of UTC instants, and the calendar conventions of money.

Days, weeks (from Monday) and months begin at 00:00Z. Durations on usage are whole milliseconds:
an instant is cut down to its millisecond first, so that neighbours partition time exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

Period = Literal["day", "week", "month", "lifetime"]


def micros_since_epoch(at: datetime) -> int:
    """Whole microseconds since 1970-01-01T00:00Z. Raises ValueError on a naive instant."""
    if at.tzinfo is None:
        raise ValueError("an instant needs a time zone")
    return (at - EPOCH) // _MICROSECOND


def from_micros(micros: int) -> datetime:
    return EPOCH + timedelta(microseconds=micros)


def millis(at: datetime) -> int:
    """Whole milliseconds since the epoch, cut down."""
    return micros_since_epoch(at) // 1000


def floor_ms(at: datetime) -> datetime:
    """The instant cut down to its millisecond: the grain of every meter."""
    return from_micros(millis(at) * 1000)


def millis_between(start: datetime, end: datetime) -> int:
    return millis(end) - millis(start)


@dataclass(frozen=True, slots=True)
class Interval:
    """`[start, end)`; `end` None is open."""

    start: datetime
    end: datetime | None

    def contains(self, at: datetime) -> bool:
        return self.start <= at and (self.end is None or at < self.end)

    def overlaps(self, other: Interval) -> bool:
        return (self.end is None or other.start < self.end) and (
            other.end is None or self.start < other.end
        )


def month_of(at: datetime) -> datetime:
    """The first instant of the instant's month, UTC."""
    at = at.astimezone(UTC)
    return datetime(at.year, at.month, 1, tzinfo=UTC)


def next_month(at: datetime) -> datetime:
    first = month_of(at)
    return datetime(first.year + first.month // 12, first.month % 12 + 1, 1, tzinfo=UTC)


def period_start(at: datetime, period: Period) -> datetime:
    at = at.astimezone(UTC)
    midnight = datetime(at.year, at.month, at.day, tzinfo=UTC)
    if period == "day":
        return midnight
    if period == "week":
        return midnight - timedelta(days=midnight.weekday())
    if period == "month":
        return month_of(at)
    return EPOCH


def period_end(at: datetime, period: Period) -> datetime | None:
    """Where the window that holds `at` ends; None for a lifetime."""
    start = period_start(at, period)
    if period == "day":
        return start + timedelta(days=1)
    if period == "week":
        return start + timedelta(days=7)
    if period == "month":
        return next_month(start)
    return None


def cut(start: datetime, end: datetime, at: Iterable[datetime]) -> Iterator[Interval]:
    """`[start, end)` in pieces, cut at each of `at` that lies inside."""
    edges = sorted({point for point in at if start < point < end})
    for left, right in zip([start, *edges], [*edges, end], strict=True):
        if left < right:
            yield Interval(left, right)


def months_between(start: datetime, end: datetime) -> Iterator[datetime]:
    """Every first of a month strictly inside `[start, end)`."""
    point = next_month(start)
    while point < end:
        yield point
        point = next_month(point)
