"""Intervals and the calendar: half-open windows in UTC, whatever the machine's zone (M3)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.interval import (
    EPOCH,
    Interval,
    Period,
    cut,
    floor_ms,
    from_micros,
    micros_since_epoch,
    millis,
    millis_between,
    month_of,
    months_between,
    next_month,
    period_end,
    period_start,
)

MICROSECOND = timedelta(microseconds=1)
periods = st.sampled_from(["day", "week", "month"])
zones = st.integers(-14 * 60, 14 * 60).map(lambda m: timezone(timedelta(minutes=m)))
instants = st.builds(
    lambda micros, zone: from_micros(micros).astimezone(zone),
    st.integers(86_400 * 10**6, 7_000_000_000 * 10**6),
    st.one_of(st.just(UTC), zones),
)


@pytest.fixture
def _tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("_tokyo")
def test_m3_a_day_opens_at_midnight_utc_and_not_a_microsecond_before() -> None:
    """M3: spent 23:00Z; 23:59:59.999999Z is the same day, 00:00:00Z the next; in any zone."""
    spent = datetime(2026, 3, 1, 23, tzinfo=UTC)
    resets_at = period_end(spent, "day")
    assert resets_at == datetime(2026, 3, 2, tzinfo=UTC)
    assert period_start(resets_at - MICROSECOND, "day") == period_start(spent, "day")
    assert period_start(resets_at, "day") == resets_at


@pytest.mark.parametrize(
    ("period", "start", "end"),
    [
        ("day", datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 2, tzinfo=UTC)),
        # 2026-03-01 is a Sunday: its week began on Monday the 23rd.
        ("week", datetime(2026, 2, 23, tzinfo=UTC), datetime(2026, 3, 2, tzinfo=UTC)),
        ("month", datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 4, 1, tzinfo=UTC)),
        ("lifetime", EPOCH, None),
    ],
)
def test_periods_begin_at_midnight_on_monday_on_the_first(
    period: Period, start: datetime, end: datetime | None
) -> None:
    sunday = datetime(2026, 3, 1, 8, 30, tzinfo=UTC)
    assert (period_start(sunday, period), period_end(sunday, period)) == (start, end)


@given(instants, periods)
def test_periods_partition_time(at: datetime, period: Period) -> None:
    start, end = period_start(at, period), period_end(at, period)
    assert end is not None
    assert start <= at < end
    assert period_start(start, period) == start
    assert period_start(end, period) == end
    assert period_end(start, period) == end == period_end(end - MICROSECOND, period)


def test_a_year_ends_in_december() -> None:
    at = datetime(2026, 12, 31, 23, 59, tzinfo=UTC)
    assert month_of(at) == datetime(2026, 12, 1, tzinfo=UTC)
    assert next_month(at) == datetime(2027, 1, 1, tzinfo=UTC)


def test_the_month_is_that_of_utc() -> None:
    # 2026-03-01T08:00 in Tokyo is still February in UTC.
    tokyo = datetime(2026, 3, 1, 8, tzinfo=timezone(timedelta(hours=9)))
    assert month_of(tokyo) == datetime(2026, 2, 1, tzinfo=UTC)


@given(instants, instants)
def test_months_between_are_the_firsts_strictly_inside(one: datetime, other: datetime) -> None:
    start = min(one, other)
    end = min(max(one, other), start + timedelta(days=800))
    found = list(months_between(start, end))
    assert all(start < first < end and month_of(first) == first for first in found)
    assert found == sorted(set(found))
    if start < end:
        first, last = month_of(start), month_of(end - MICROSECOND)
        assert len(found) == (last.year - first.year) * 12 + last.month - first.month


@given(instants, instants, st.lists(instants, max_size=6))
def test_a_cut_loses_nothing_and_cuts_at_every_edge_inside(
    one: datetime, other: datetime, at: list[datetime]
) -> None:
    start, end = sorted((one, other))
    pieces = list(cut(start, end, at))
    if start == end:
        assert pieces == []
        return
    assert pieces[0].start == start
    assert pieces[-1].end == end
    assert [p.end for p in pieces[:-1]] == [p.start for p in pieces[1:]]
    assert all(p.end is not None and p.start < p.end for p in pieces)
    assert {p.start for p in pieces[1:]} == {a for a in at if start < a < end}


@given(instants)
def test_an_instant_survives_as_micros_and_is_cut_down_to_millis(at: datetime) -> None:
    assert from_micros(micros_since_epoch(at)) == at
    floor = floor_ms(at)
    assert floor <= at < floor + timedelta(milliseconds=1)
    assert floor_ms(floor) == floor
    assert millis(floor) == millis(at)


@given(st.lists(instants, min_size=2, max_size=8))
def test_neighbours_partition_time_in_milliseconds(edges: list[datetime]) -> None:
    edges.sort()
    lengths = [millis_between(a, b) for a, b in itertools.pairwise(edges)]
    assert sum(lengths) == millis_between(edges[0], edges[-1])
    assert all(length >= 0 for length in lengths)


def test_a_naive_instant_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        micros_since_epoch(datetime(2026, 1, 1, tzinfo=UTC).replace(tzinfo=None))


def test_intervals_are_half_open() -> None:
    start = datetime(2026, 3, 1, tzinfo=UTC)
    end = start + timedelta(hours=1)
    hour, rest, ever = Interval(start, end), Interval(end, None), Interval(start, None)
    assert hour.contains(start)
    assert not hour.contains(end)
    assert rest.contains(end)
    assert not rest.contains(start)
    assert not hour.overlaps(rest)
    assert not rest.overlaps(hour)
    assert ever.overlaps(hour)
    assert hour.overlaps(ever)
    assert rest.overlaps(ever)
