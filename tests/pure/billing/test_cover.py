"""Holds reach far enough, never too far, and a balance that covers them is never overdrawn."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.price import DEVICE_HOUR_MS, PricePoint, Terms, Window, rate
from sublet.money.billing.cover import (
    Ahead,
    Burn,
    Running,
    burn_micros_per_hour,
    cover,
    runs_out_at,
    warnings,
)

T0 = datetime(2026, 10, 31, 23, 30, tzinfo=UTC)
SPOT = Ahead(notice_seconds=120, grace_seconds=30, scrub_seconds=60)


def seconds(n: float) -> timedelta:
    return timedelta(seconds=n)


def at_price(*points: tuple[float, int]) -> Terms:
    return Terms(
        product="spot",
        currency="USD",
        per=DEVICE_HOUR_MS,
        points=tuple(
            PricePoint(starts_at=T0 + seconds(s), micros=micros, version=f"v{i}")
            for i, (s, micros) in enumerate(points)
        ),
    )


def running(terms: Terms, *, used: float = 0, devices: int = 1) -> Running:
    here = T0 + seconds(used)
    windows = (Window(start=T0, end=here, units=devices),) if used else ()
    return Running(terms=terms, used=windows, devices=devices, metered_to=here)


@pytest.mark.parametrize(
    ("notice", "grace", "scrub", "ahead", "renew"),
    [(30, 30, 2, 900, 310), (120, 30, 60, 900, 310), (3600, 30, 60, 3810, 3700)],
)
def test_how_far_ahead_follows_the_terms(
    notice: int, grace: int, scrub: int, ahead: int, renew: int
) -> None:
    terms = Ahead(notice_seconds=notice, grace_seconds=grace, scrub_seconds=scrub)
    assert (terms.ahead, terms.renew) == (seconds(ahead), seconds(renew))


def test_a_hold_is_kept_while_enough_is_left_and_renewed_before() -> None:
    run = running(at_price((0, 3_600_000)), used=600)
    now = T0 + seconds(600)
    kept = cover(
        SPOT, run, held_until=T0 + seconds(910), term_at=None, affordable_micros=10**9, now=now
    )
    assert kept.until == T0 + seconds(910)
    assert kept.amount_micros == 310 * 1000
    late = cover(
        SPOT, run, held_until=T0 + seconds(909), term_at=None, affordable_micros=10**9, now=now
    )
    assert late.until == now + seconds(900)
    assert late.amount_micros == 900 * 1000
    assert not late.falls_short


def test_what_the_money_does_not_reach_names_when_to_stop() -> None:
    run = running(at_price((0, 3_600_000)), used=600)  # 1,000 micros a second
    now = T0 + seconds(600)
    short = cover(
        SPOT, run, held_until=T0 + seconds(700), term_at=None, affordable_micros=250_999, now=now
    )
    assert short.until == now + timedelta(milliseconds=250_999)
    assert short.amount_micros == 250_999
    # grace 30 + scrub 60 + a look of 10 before the money ends
    assert short.stop_at == now + timedelta(milliseconds=150_999)
    assert SPOT.runway(short.until) == now + timedelta(milliseconds=190_999)


def test_the_first_hold_of_nothing_stops_at_once() -> None:
    run = running(at_price((0, 3_600_000)))
    none = cover(SPOT, run, held_until=None, term_at=None, affordable_micros=0, now=T0)
    assert none.until == T0
    assert none.amount_micros == 0
    assert none.stop_at is not None
    assert none.stop_at <= T0


prices = st.lists(
    st.tuples(st.integers(1, 9000), st.integers(0, 5_000_000)), max_size=4, unique_by=lambda p: p[0]
)
steps = st.lists(st.integers(1, 400_000), min_size=1, max_size=25)


@given(prices, steps, st.integers(1, 8), st.integers(0, 3_000_000), st.integers(1, 5_000_000))
def test_a_covered_balance_is_never_overdrawn(
    changes: list[tuple[int, int]], ms: list[int], devices: int, credit: int, first: int
) -> None:
    """Advance, settle, renew, in any steps: each posting is paid from the hold before it."""
    terms = at_price((0, first), *sorted(changes))
    ahead = Ahead(notice_seconds=5, grace_seconds=5, scrub_seconds=2)
    balance, posted, metered = credit, 0, T0
    held = cover(
        ahead,
        Running(terms=terms, used=(), devices=devices, metered_to=T0),
        held_until=None,
        term_at=None,
        affordable_micros=balance,
        now=T0,
    )
    used: tuple[Window, ...] = ()
    for step in ms:
        reached = min(metered + timedelta(milliseconds=step), held.until)
        used = (Window(start=T0, end=reached, units=devices),)
        metered = reached
        total = rate(terms, used).amount.micros
        assert total - posted <= held.amount_micros
        balance -= total - posted
        posted = total
        before = held
        held = cover(
            ahead,
            Running(terms=terms, used=used, devices=devices, metered_to=metered),
            held_until=held.until,
            term_at=None,
            affordable_micros=balance,
            now=metered,
        )
        assert 0 <= held.amount_micros <= balance
        # Money that sufficed once suffices on: a hold never shrinks in time by our own doing.
        assert held.until >= before.until


def test_a_fixed_sigterm_needs_cover_to_its_grace_and_scrub_and_no_further() -> None:
    run = running(at_price((0, 3_600_000)), used=600)
    now = T0 + seconds(600)
    term_at = now + seconds(100)
    # Held to 100 + 30 + 60: there is no more money, and none is needed for the notice to be kept.
    held = cover(
        SPOT,
        run,
        held_until=now + seconds(190),
        term_at=term_at,
        affordable_micros=190_000,
        now=now,
    )
    assert held.until == now + seconds(190)
    assert not held.falls_short


def test_what_has_passed_at_the_start_is_said_at_the_start_and_each_once() -> None:
    ends = T0 + seconds(3000)
    first = warnings(ends, (), T0)
    assert first.say == (86_400, 3_600)
    assert first.next_at == ends - seconds(900)
    assert warnings(ends, first.say, T0 + seconds(2099)).say == ()
    assert warnings(ends, first.say, T0 + seconds(2100)).say == (900,)


def test_a_top_up_puts_warnings_out_of_force_and_a_flutter_does_not() -> None:
    said = (86_400, 3_600, 900)
    assert warnings(T0 + seconds(950), said, T0).rearm == ()
    assert warnings(T0 + seconds(4000), said, T0).rearm == (900, 3_600)
    assert warnings(None, said, T0).say == ()


def test_runway_is_credit_by_burn() -> None:
    burn = burn_micros_per_hour([Burn(devices=2, price_micros=500_000, per=DEVICE_HOUR_MS)] * 2)
    assert burn == 2_000_000
    assert runs_out_at(4_000_000, burn, T0) == T0 + timedelta(hours=2)
    assert runs_out_at(-5, burn, T0) == T0
    assert runs_out_at(4_000_000, 0, T0) is None
