"""The posted spot price: steps, lead, floor."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.price import DEVICE_HOUR_MS, Terms, Window, rate
from sublet.rights.market.model import SpotPrice
from sublet.rights.market.spotprice import (
    HOUR,
    POSTING_LEAD,
    Market,
    hour_of,
    next_posting_at,
    points_of,
    post,
    step,
)

START = datetime(2026, 3, 2, 10, 20, tzinfo=UTC)
prices = st.integers(10, 10**8)


@given(prices, prices, st.integers(0, 10**8))
def test_a_step_is_at_most_a_fifth_and_goes_to_the_target(
    previous: int, bid: int, floor: int
) -> None:
    found = step(previous, bid=bid, floor=floor)
    target = max(bid, floor)
    assert previous * 80 <= found * 100 <= previous * 120
    assert found == target or abs(found - previous) * 100 >= previous * 20 - 100
    assert min(previous, target) <= found <= max(previous, target)


@given(prices, prices, st.integers(0, 10**8))
def test_steps_reach_the_target_from_anywhere(first: int, bid: int, floor: int) -> None:
    price = first
    for _ in range(150):
        price = step(price, bid=bid, floor=floor)
    assert price == max(bid, floor)


def test_the_first_price_is_the_target_itself() -> None:
    assert step(None, bid=100, floor=300) == 300
    assert step(100, bid=1000, floor=0) == 120
    assert step(100, bid=10, floor=0) == 80


def run(
    moments: list[timedelta], market: list[tuple[int, int]]
) -> tuple[list[SpotPrice], datetime]:
    """Rounds of the loop at these distances, under changing bids and floors."""
    rows: list[SpotPrice] = []
    now = START
    for number, wait in enumerate(moments):
        now += wait
        bid, floor = market[number % len(market)]
        last = rows[-1] if rows else None
        rows += post("pol", last, now, lambda _, b=bid, f=floor: Market(bid=b, floor=f))
    return rows, now


waits = st.lists(st.integers(0, 5 * 86_400).map(lambda s: timedelta(seconds=s)), max_size=12)


@given(waits, st.lists(st.tuples(prices, st.integers(0, 10**8)), min_size=1, max_size=5))
def test_a_change_is_always_told_one_lead_before_its_hour(
    moments: list[timedelta], market: list[tuple[int, int]]
) -> None:
    rows, _ = run([timedelta(0), *moments], market)
    for before, after in itertools.pairwise(rows):
        assert after.hour > before.hour
        assert before.micros * 80 <= after.micros * 100 <= before.micros * 120
        if after.micros != before.micros:
            assert after.posted_at <= after.hour - POSTING_LEAD


@given(waits)
def test_after_a_round_every_hour_within_the_lead_has_its_price(moments: list[timedelta]) -> None:
    rows, now = run([timedelta(0), *moments], [(100, 50)])
    assert rows[-1].hour + HOUR > now + POSTING_LEAD
    assert {r.hour for r in rows} >= {hour_of(now), hour_of(now) + HOUR}
    again = post("pol", rows[-1], now, lambda _: Market(bid=1000, floor=0))
    assert again == []


@given(st.integers(0, 10**7))
def test_coming_when_told_misses_no_hour(seconds: int) -> None:
    now = START + timedelta(seconds=seconds)
    due = next_posting_at(now)
    assert now < due <= now + HOUR
    rows = post("pol", None, now, lambda _: Market(bid=100, floor=0))
    early = post("pol", rows[-1], due - timedelta(microseconds=1), lambda _: Market(bid=1, floor=0))
    assert early == []
    [fresh] = post("pol", rows[-1], due, lambda _: Market(bid=1, floor=0))
    assert fresh.micros == 80
    assert fresh.posted_at <= fresh.hour - POSTING_LEAD


def test_hours_without_a_spot_offer_are_not_posted() -> None:
    assert post("pol", None, START, lambda _: None) == []


def a_row(hours: int, micros: int) -> SpotPrice:
    return SpotPrice(
        pool_id="pol",
        hour=hour_of(START) + hours * HOUR,
        micros=micros,
        floor_micros=0,
        bid_micros=micros,
        posted_at=START,
    )


@given(st.lists(prices, min_size=1, max_size=12), st.integers(1000, 2000), st.integers(1, 12))
def test_points_of_the_past_do_not_change_when_hours_are_added(
    micros: list[int], factor: int, known: int
) -> None:
    rows = [a_row(n, m) for n, m in enumerate(micros)]
    earlier = points_of(rows[:known], factor)
    assert points_of(rows, factor)[: len(earlier)] == earlier


def test_field_case_m4() -> None:
    """2.00 to 12:00Z, then 3.00: 11:30–12:30 → 1.00 + 1.50; −600 s of 11:40–11:50 → −0.333333."""
    rows = [a_row(1, 2_000_000), a_row(2, 3_000_000)]
    points = points_of(rows, 1000)
    terms = Terms(product="spot", currency="USD", per=DEVICE_HOUR_MS, points=points)
    noon = rows[1].hour
    used = Window(start=noon - HOUR / 2, end=noon + HOUR / 2, units=1)
    before = rate(terms, [used])
    assert [line.amount.micros for line in before.lines] == [1_000_000, 1_500_000]
    wrong = Window(start=noon - timedelta(minutes=20), end=noon - timedelta(minutes=10), units=-1)
    after = rate(terms, [used, wrong])
    assert after.amount.micros - before.amount.micros == -333_333


def test_equal_neighbours_are_one_point_and_a_limit_caps() -> None:
    rows = [a_row(0, 100), a_row(1, 100), a_row(2, 120), a_row(3, 140), a_row(4, 100)]
    assert [(p.starts_at, p.micros) for p in points_of(rows, 1050, 126)] == [
        (rows[0].hour, 105),
        (rows[2].hour, 126),
        (rows[4].hour, 105),
    ]
    assert points_of(rows, 1000)[0].version == "spot 2026-03-02T10Z"
