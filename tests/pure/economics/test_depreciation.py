"""Depreciation sums exactly, however the time is cut (field case M6)."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.interval import next_month
from sublet.money.economics.depreciation import Asset, add_months, book_value, booked, life

M6 = Asset(
    cost_micros=100_000_000_000,
    residual_micros=10_000_000_000,
    in_service_on=date(2026, 11, 16),
    life_months=36,
)


def month(year: int, number: int) -> datetime:
    return datetime(year, number, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    ("year", "number", "micros"),
    [(2026, 11, 1_231_751_824), (2027, 2, 2_299_270_073), (2028, 2, 2_381_386_862)],
)
def test_the_months_of_the_field_case(year: int, number: int, micros: int) -> None:
    start = month(year, number)
    assert booked(M6, start, next_month(start)) == micros


def test_thirty_seven_bookings_sum_to_cost_less_residual() -> None:
    start, end = life(M6)
    assert (end - start).days == 1096
    bookings, here = [], month(2026, 11)
    while here < end:
        bookings.append(booked(M6, here, next_month(here)))
        here = next_month(here)
    assert len(bookings) == 37
    assert sum(bookings) == 90_000_000_000
    assert book_value(M6, end) == M6.residual_micros


assets = st.builds(
    lambda cost, share, day, months: Asset(
        cost_micros=cost,
        residual_micros=cost * share // 100,
        in_service_on=day,
        life_months=months,
    ),
    st.integers(0, 10**13),
    st.integers(0, 100),
    st.dates(date(2020, 1, 1), date(2035, 12, 31)),
    st.integers(1, 120),
)


@given(assets, st.lists(st.integers(0, 4_000 * 86_400_000), max_size=12))
def test_any_cut_sums_to_the_whole(asset: Asset, cuts: list[int]) -> None:
    start, end = life(asset)
    inside = {start + timedelta(milliseconds=ms) for ms in cuts}
    edges = sorted({start, end, *(at for at in inside if at < end)})
    parts = [booked(asset, a, b) for a, b in pairwise(edges)]
    assert all(part >= 0 for part in parts)
    assert sum(parts) == asset.cost_micros - asset.residual_micros
    assert booked(asset, end, end + timedelta(days=400)) == 0
    assert booked(asset, start - timedelta(days=400), start) == 0


def test_a_life_ends_on_the_last_of_a_shorter_month() -> None:
    assert add_months(date(2027, 1, 31), 1) == date(2027, 2, 28)
    assert add_months(date(2027, 12, 31), 2) == date(2028, 2, 29)


def test_what_is_no_asset_is_refused() -> None:
    with pytest.raises(ValueError, match="residual"):
        Asset(cost_micros=1, residual_micros=2, in_service_on=date(2026, 1, 1), life_months=1)
