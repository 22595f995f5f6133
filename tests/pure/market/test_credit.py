"""Credits for runs that the owner ended: when, and never more than was metered."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.interval import Interval
from sublet.base.kernel.price import DEVICE_HOUR_MS, PricePoint, Terms, Window, rate
from sublet.capacity.allocation import Displacement, DisplacementRule
from sublet.rights.market.credit import YOUNG_RUN_SECONDS, clip, free_intervals
from sublet.rights.market.model import Closed

START = datetime(2026, 3, 31, 22, 30, tzinfo=UTC)
YOUNG = Displacement(rule=DisplacementRule.YOUNG_RUN, younger_than_seconds=YOUNG_RUN_SECONDS)
HOURLY = Displacement(rule=DisplacementRule.RUNNING_HOUR)


def at(minutes: float) -> datetime:
    return START + timedelta(minutes=minutes)


def closed(t0: float | None, end: float, reason: str, notice_reason: str | None = None) -> Closed:
    return Closed(
        t0=None if t0 is None else at(t0),
        opened_at=START,
        closed_at=at(end),
        reason=reason,
        notice_reason=notice_reason,
    )


WHOLE = (Interval(START, at(12)),)


@pytest.mark.parametrize(
    ("ended", "free"),
    [
        (closed(9.99, 12, "owner_recall"), WHOLE),
        (closed(9.99, 12, "spot_interruption"), WHOLE),
        (closed(9.99, 12, "maintenance"), WHOLE),
        (closed(10, 12, "owner_recall"), ()),
        (closed(9, 12, "price"), ()),
        (closed(9, 12, "user", "price"), ()),
        (closed(9, 12, "user", "owner_recall"), WHOLE),
        (closed(9, 12, "completed", "spot_interruption"), WHOLE),
        (closed(9, 12, "user"), WHOLE),
        (closed(11, 12, "user", "owner_recall"), ()),
        (closed(None, 12, "user"), ()),
        (closed(None, 12, "owner_recall"), ()),
        (closed(9, 12, "abuse", "owner_recall"), ()),
        (closed(None, 12, "node_fault"), ()),
        (closed(9, 12, "node_fault", "owner_recall"), WHOLE),
        (closed(None, 12, "credit_exhausted"), ()),
        (closed(None, 12, "control_lost"), ()),
        (closed(None, 12, "shutdown"), ()),
        (closed(None, 9, "shutdown"), (Interval(START, at(9)),)),
        (closed(5, 12, "shutdown", "owner_recall"), WHOLE),
        (closed(13, 12, "user", "owner_recall"), ()),
    ],
)
def test_when_a_spot_run_is_free(ended: Closed, free: tuple[Interval, ...]) -> None:
    assert free_intervals(YOUNG, ended) == free


@pytest.mark.parametrize(
    ("ended", "free"),
    [
        (closed(70, 131, "owner_recall"), (Interval(at(60), at(120)),)),
        (closed(70, 100, "owner_recall"), (Interval(at(60), at(100)),)),
        (closed(0, 60, "owner_recall"), (Interval(START, at(60)),)),
        (closed(70, 100, "user", "owner_recall"), ()),
        (closed(70, 131, "price"), ()),
        (closed(None, 100, "shutdown"), (Interval(at(60), at(100)),)),
        (closed(None, 100, "node_fault"), ()),
    ],
)
def test_which_hour_of_on_demand_is_free(ended: Closed, free: tuple[Interval, ...]) -> None:
    assert free_intervals(HOURLY, ended) == free


def test_first_party_use_has_no_displacement_credit() -> None:
    assert free_intervals(Displacement(), closed(1, 2, "shutdown")) == ()


@given(
    t0=st.timedeltas(timedelta(seconds=YOUNG_RUN_SECONDS), timedelta(days=30)),
    length=st.timedeltas(timedelta(0), timedelta(days=40)),
    reason=st.sampled_from(["owner_recall", "spot_interruption", "maintenance", "user"]),
)
def test_nothing_is_free_once_the_young_window_is_over(
    t0: timedelta, length: timedelta, reason: str
) -> None:
    ended = Closed(t0=START + t0, opened_at=START, closed_at=START + length, reason=reason)
    assert free_intervals(YOUNG, ended) == ()


TERMS = Terms(
    product="spot",
    currency="USD",
    per=DEVICE_HOUR_MS,
    points=tuple(
        PricePoint(starts_at=START.replace(minute=0) + timedelta(hours=n), micros=m, version=str(n))
        for n, m in enumerate([1_000_003, 1_200_001, 1_000_007, 800_009])
    ),
)
minutes = st.floats(0, 200, allow_nan=False)


@given(
    runs=st.lists(st.tuples(minutes, minutes, minutes), min_size=1, max_size=4),
    devices=st.integers(1, 9),
    reason=st.sampled_from(["owner_recall", "spot_interruption", "shutdown", "price", "user"]),
    displacement=st.sampled_from([YOUNG, HOURLY]),
    taken_back=st.floats(0, 1),
)
def test_a_credit_is_never_more_than_the_usage_posted(
    runs: list[tuple[float, float, float]],
    devices: int,
    reason: str,
    displacement: Displacement,
    taken_back: float,
) -> None:
    windows: list[Window] = []
    free: list[Interval] = []
    opened = START
    for length, noticed, gap in runs:
        end = opened + timedelta(minutes=length)
        windows.append(Window(start=opened, end=end, units=devices))
        cut = opened + (end - opened) * (1 - taken_back)
        windows.append(Window(start=cut, end=end, units=-devices))
        ended = Closed(
            t0=opened + timedelta(minutes=noticed),
            opened_at=opened,
            closed_at=end,
            reason=reason,
        )
        free += free_intervals(displacement, ended)
        if reason == "owner_recall" and displacement is YOUNG and noticed >= 10:
            assert free_intervals(displacement, ended) == ()
        opened = end + timedelta(minutes=gap)
    usage, credited = rate(TERMS, windows), rate(TERMS, clip(windows, free))
    assert 0 <= credited.amount.micros <= usage.amount.micros
    by_line = {(line.month, line.version): line.amount for line in usage.lines}
    assert all(line.amount <= by_line[line.month, line.version] for line in credited.lines)
    if reason == "price":
        assert credited.amount.micros == 0


def test_clipping_keeps_only_what_is_free() -> None:
    windows = [
        Window(start=at(0), end=at(30), units=2),
        Window(start=at(20), end=at(30), units=-2),
    ]
    free = [Interval(at(10), at(25)), Interval(at(40), at(50))]
    assert clip(windows, free) == [
        Window(start=at(10), end=at(25), units=2),
        Window(start=at(20), end=at(25), units=-2),
    ]
