"""`rate`, the only sum that turns usage into money: F13, M4, M5 and the rounding of M2."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.interval import millis_between, month_of
from sublet.base.kernel.money import Money
from sublet.base.kernel.price import (
    DEVICE_HOUR_MS,
    PricePoint,
    Terms,
    Window,
    cover_quantity,
    rate,
    rate_quantity,
)

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def terms(*points: tuple[datetime, int], per: int = DEVICE_HOUR_MS) -> Terms:
    return Terms(
        product="spot",
        currency="USD",
        per=per,
        points=tuple(
            PricePoint(starts_at=at, micros=micros, version=f"v{n}")
            for n, (at, micros) in enumerate(points)
        ),
    )


def test_m4_a_window_across_a_change_of_price_is_cut_there() -> None:
    """M4: 2.00/h to 12:00Z, then 3.00: a run 11:30–12:30 costs 1.00 + 1.50."""
    price = terms((NOON - 300 * MINUTE, 2_000_000), (NOON, 3_000_000))
    run = Window(start=NOON - 30 * MINUTE, end=NOON + 30 * MINUTE, units=1)
    rated = rate(price, [run])
    assert [line.amount for line in rated.lines] == [Money(1_000_000), Money(1_500_000)]
    assert [line.version for line in rated.lines] == ["v0", "v1"]
    assert [(line.start, line.end) for line in rated.lines] == [
        (NOON - 30 * MINUTE, NOON),
        (NOON, NOON + 30 * MINUTE),
    ]
    assert rated.amount == Money(2_500_000)
    # Next day −600 s of 11:40–11:50: priced by the version of then.
    fix = Window(start=NOON - 20 * MINUTE, end=NOON - 10 * MINUTE, units=-1)
    assert rate(price, [run, fix]).amount - rated.amount == Money(-333_333)


def test_m5_usage_across_the_first_of_a_month_is_two_lines() -> None:
    """M5: 10-31T23:30Z–11-01T00:30Z is 1800 s in each month, wherever it was received."""
    first = datetime(2026, 11, 1, tzinfo=UTC)
    rated = rate(
        terms((NOON, 1_000_000)),
        [Window(start=first - 30 * MINUTE, end=first + 30 * MINUTE, units=1)],
    )
    assert [(line.month, line.quantity) for line in rated.lines] == [
        (datetime(2026, 10, 1, tzinfo=UTC), 1_800_000),
        (first, 1_800_000),
    ]


def test_m2_a_line_is_rounded_once_and_half_even() -> None:
    # One device-millisecond at 1.8 an hour is half a micro: 1 → 0, 3 → 2, 5 → 2.
    price = terms((NOON, 1_800_000))
    for units, micros in ((1, 0), (3, 2), (5, 2), (-1, 0), (-3, -2)):
        window = Window(start=NOON, end=NOON + timedelta(milliseconds=1), units=units)
        assert rate(price, [window]).amount == Money(micros)
    many = [
        Window(
            start=NOON + n * timedelta(milliseconds=1),
            end=NOON + (n + 1) * timedelta(milliseconds=1),
            units=1,
        )
        for n in range(1000)
    ]
    assert rate(price, many).amount == Money(500), "pieces are summed before they are rounded"


def test_nothing_used_costs_nothing_and_has_no_line() -> None:
    empty = Window(start=NOON, end=NOON, units=5)
    for windows in ([], [empty]):
        assert rate(terms((NOON, 1)), windows).lines == ()
        assert rate(terms((NOON, 1)), windows).amount == Money(0)


def test_the_first_price_covers_what_lies_before_it() -> None:
    price = terms((NOON, 1_000_000))
    early = Window(start=NOON - 60 * MINUTE, end=NOON, units=1)
    assert rate(price, [early]).amount == Money(1_000_000)


def test_terms_and_windows_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="price point"):
        terms()
    with pytest.raises(ValueError, match="price point"):
        terms((NOON, 1), per=0)
    with pytest.raises(ValueError, match="rise"):
        terms((NOON, 1), (NOON, 2))
    with pytest.raises(ValueError, match="ends before"):
        rate(terms((NOON, 1)), [Window(start=NOON, end=NOON - MINUTE, units=1)])


# 70 days around two month ends, to the microsecond.
instants = st.integers(0, 70 * 86_400 * 10**6).map(
    lambda us: datetime(2026, 10, 10, tzinfo=UTC) + timedelta(microseconds=us)
)
some_terms = st.builds(
    lambda changes, prices, per: terms(
        *zip(sorted(changes), prices, strict=False),
        per=per,
    ),
    st.sets(instants, min_size=1, max_size=5),
    st.lists(st.integers(0, 40_000_000), min_size=5, max_size=5),
    st.sampled_from([1, 1000, 7777, DEVICE_HOUR_MS]),
)
some_windows = st.lists(
    st.builds(
        lambda one, other, units: Window(start=min(one, other), end=max(one, other), units=units),
        instants,
        instants,
        st.integers(-4, 64),
    ),
    max_size=5,
)


def cut_up(windows: list[Window], cuts: list[datetime]) -> list[Window]:
    pieces = []
    for window in windows:
        edges = sorted(
            {window.start, window.end, *(c for c in cuts if window.start < c < window.end)}
        )
        pieces += [Window(start=a, end=b, units=window.units) for a, b in itertools.pairwise(edges)]
    return pieces


@given(some_terms, some_windows, st.lists(instants, max_size=8), st.randoms())
def test_f13_any_cutting_of_windows_into_pieces_rates_the_same(
    price: Terms, windows: list[Window], cuts: list[datetime], rng: object
) -> None:
    """F13: the quote's one window and the meter's thousand pieces are the same money, line by line."""
    pieces = cut_up(windows, cuts)
    rng.shuffle(pieces)  # type: ignore[attr-defined]
    assert rate(price, pieces) == rate(price, windows)


@given(some_terms, some_windows)
def test_lines_sum_to_the_amount_and_keep_to_their_month_and_price(
    price: Terms, windows: list[Window]
) -> None:
    rated = rate(price, windows)
    assert sum(line.amount.micros for line in rated.lines) == rated.amount.micros
    used = sum(w.units * millis_between(w.start, w.end) for w in windows)
    assert sum(line.quantity for line in rated.lines) == used
    keys = [(line.month, line.version) for line in rated.lines]
    assert len(keys) == len(set(keys))
    months = [line.month for line in rated.lines]
    assert months == sorted(months)
    for line in rated.lines:
        assert month_of(line.start) == line.month
        assert month_of(line.end - timedelta(microseconds=1)) == line.month
        assert line.price_micros == price.point_at(line.start).micros
        exact = line.quantity * line.price_micros
        assert abs(line.amount.micros * line.per * 2 - exact * 2) <= line.per, "rounded once"


@given(some_terms, some_windows)
def test_taking_everything_back_leaves_nothing(price: Terms, windows: list[Window]) -> None:
    back = [Window(start=w.start, end=w.end, units=-w.units) for w in windows]
    assert rate(price, [*windows, *back]).amount == Money(0)


@given(some_terms, instants, st.lists(instants, max_size=10), st.integers(1, 8))
def test_f13_what_is_posted_step_by_step_is_what_was_quoted(
    price: Terms, start: datetime, looks: list[datetime], units: int
) -> None:
    """Posting `rate(total so far) − already posted` at any moments sums to the quote's total."""
    end = max([start, *looks])
    posted = Money(0)
    pieces: list[Window] = []
    metered_to = start
    for look in [*sorted(looks), end]:
        if look > metered_to:
            pieces.append(Window(start=metered_to, end=look, units=units))
            metered_to = look
        posted += rate(price, pieces).amount - posted
    assert posted == rate(price, [Window(start=start, end=end, units=units)]).amount


@given(
    milliseconds=st.integers(0, 10**7),
    micros=st.integers(0, 10**7),
    per=st.sampled_from([1, 7, 1_000_000, DEVICE_HOUR_MS]),
)
def test_a_plain_quantity_is_rated_as_a_window_is(milliseconds: int, micros: int, per: int) -> None:
    run = Window(start=NOON, end=NOON + timedelta(milliseconds=milliseconds), units=1)
    rated = rate(terms((NOON, micros), per=per), [run]).amount.micros
    assert rate_quantity(milliseconds, micros, per) == rated
    assert rate_quantity(-milliseconds, micros, per) == -rated


@pytest.mark.parametrize(
    ("quantity", "rated", "covered"), [(0, 0, 0), (1, 0, 1), (2, 1, 1), (3, 2, 2), (5, 2, 3)]
)
def test_a_quantity_is_rated_half_even_and_covered_by_rounding_up(
    quantity: int, rated: int, covered: int
) -> None:
    assert rate_quantity(quantity, 500_000, 1_000_000) == rated
    assert cover_quantity(quantity, 500_000, 1_000_000) == covered


@given(parts=st.lists(st.integers(0, 10**6)), micros=st.integers(0, 10**7))
def test_what_parts_set_aside_suffices_for_the_whole(parts: list[int], micros: int) -> None:
    covered = sum(cover_quantity(part, micros, 1_000_000) for part in parts)
    assert rate_quantity(sum(parts), micros, 1_000_000) <= covered
