"""Claims and releases: what a displacement makes free, and when an end is allowed."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from allocation_builders import HOUR, MINUTE, NOW, a_sale, on_demand, seconds
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.interval import Interval
from sublet.capacity.allocation.model import (
    Displacement,
    DisplacementRule,
    Release,
    earliest_term_at,
    lock_free_by,
)

YOUNG = Displacement(rule=DisplacementRule.YOUNG_RUN, younger_than_seconds=600)
HOURLY = Displacement(rule=DisplacementRule.RUNNING_HOUR)


def test_spot_is_free_if_told_in_its_first_ten_minutes() -> None:
    closed = NOW + 12 * MINUTE
    last = NOW + seconds(599.999)
    assert YOUNG.free_windows(NOW, last, closed) == (Interval(NOW, closed),)
    assert YOUNG.free_windows(NOW, NOW + seconds(600), closed) == ()


def test_on_demand_does_not_pay_the_hour_that_was_running() -> None:
    told, closed = NOW + 2 * HOUR + MINUTE, NOW + 3 * HOUR + MINUTE
    (window,) = HOURLY.free_windows(NOW, told, closed)
    assert window == Interval(NOW + 2 * HOUR, NOW + 3 * HOUR)
    (cut,) = HOURLY.free_windows(NOW, told, NOW + 2 * HOUR + 30 * MINUTE)
    assert cut == Interval(NOW + 2 * HOUR, NOW + 2 * HOUR + 30 * MINUTE)
    (edge,) = HOURLY.free_windows(NOW, NOW + 2 * HOUR, closed)
    assert edge.start == NOW + 2 * HOUR


def test_nothing_is_free_where_nothing_was_agreed() -> None:
    assert Displacement().free_windows(NOW, NOW, NOW + HOUR) == ()


@given(
    st.sampled_from([YOUNG, HOURLY]),
    st.integers(0, 20_000),
    st.integers(-5_000, 40_000),
)
def test_what_is_free_lies_within_the_run(rule: Displacement, lasted: int, told: int) -> None:
    closed = NOW + seconds(lasted)
    for window in rule.free_windows(NOW, NOW + seconds(told), closed):
        assert window.end is not None
        assert NOW <= window.start < window.end <= closed


def test_no_claim_without_a_release() -> None:
    with pytest.raises(ValueError, match="needs a release"):
        Release()


def test_firm_time_counts_from_the_opening() -> None:
    claim = on_demand()
    assert earliest_term_at(claim, NOW) == NOW
    opened = replace(claim, opened_at=NOW + MINUTE)
    assert earliest_term_at(opened, NOW + MINUTE) == NOW + MINUTE + HOUR
    assert earliest_term_at(opened, NOW + 2 * HOUR) == NOW + 3 * HOUR


def test_an_end_comes_before_a_notice_that_would_reach_past_it() -> None:
    claim = a_sale(notice=3600, lasting=HOUR, opened=True)
    assert earliest_term_at(claim, NOW + 30 * MINUTE) == NOW + HOUR
    assert lock_free_by(claim, NOW + 30 * MINUTE) == NOW + HOUR + timedelta(seconds=32)
