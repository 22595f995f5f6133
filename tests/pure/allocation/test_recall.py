"""Recall: a plan frees what it says, by when it says, and nobody leaves for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import combinations

from allocation_builders import (
    DAY,
    HOUR,
    MINUTE,
    NOW,
    a_block,
    a_book,
    a_need,
    a_sale,
    examples,
    on_demand,
    seconds,
)
from hypothesis import given
from hypothesis import strategies as st

from sublet.capacity.allocation.book import PoolBook
from sublet.capacity.allocation.model import (
    Claim,
    Displacement,
    DisplacementRule,
    Rank,
    Urgency,
    earliest_term_at,
)
from sublet.capacity.allocation.recall import Plan, Row, curve, plan, still_holds
from sublet.capacity.allocation.victims import Candidate, _weights, choose

SCRUB = 2
SPOT_STOP = 30 + SCRUB


def filled(supply: int, claims: Sequence[Claim]) -> PoolBook:
    return a_book(supply).with_changes(claims)


def f3() -> PoolBook:
    """64 devices: 4 idle, 36 spot (120 s), 12 on-demand (24 h), 12 in a block (6 d)."""
    spot = [a_sale(stop=SPOT_STOP, start=NOW - DAY, opened=True) for _ in range(36)]
    firm = [
        a_sale(
            rank=Rank.ON_DEMAND,
            notice=24 * 3600,
            firm=3600,
            stop=SPOT_STOP,
            start=NOW - 2 * DAY,
            opened=True,
        )
        for _ in range(12)
    ]
    block = a_block(12, 6 * DAY, start=NOW, stop=SPOT_STOP)
    return filled(64, [*spot, *firm, block])


def test_f3_the_owner_asks_for_the_impossible() -> None:
    by = NOW + 5 * MINUTE
    answer = plan(f3(), 64, by, now=NOW)
    idle, spot = answer.rows
    assert (idle.devices, idle.free_by, idle.victims) == (4, NOW, ())
    assert (spot.devices, spot.free_by) == (36, by)
    assert spot.notice_at == by - seconds(150) - seconds(SCRUB)
    assert spot.term_at == spot.notice_at + seconds(120)
    assert len(spot.victims) == 36
    assert answer.shortfall is not None
    assert answer.shortfall.devices == 24
    later, at_end = answer.shortfall.rows
    assert (later.devices, later.free_by) == (12, NOW + DAY + seconds(SPOT_STOP))
    assert later.notice_at == NOW
    assert (at_end.devices, at_end.free_by) == (12, NOW + 6 * DAY + seconds(SPOT_STOP))
    assert at_end.victims == ()
    assert answer.shortfall.earliest_at == later.free_by
    assert answer.shortfall.complete_at == at_end.free_by
    (offer,) = answer.shortfall.buy_back
    assert (offer.devices, offer.free_by) == (12, at_end.free_by)


def test_f3_at_once_says_when_the_notice_lets_it() -> None:
    answer = plan(f3(), 64, NOW, now=NOW)
    (idle,) = answer.rows
    assert idle.devices == 4
    assert answer.shortfall is not None
    spot = answer.shortfall.rows[0]
    assert (spot.devices, spot.free_by) == (36, NOW + seconds(150 + SCRUB))
    assert spot.notice_at == NOW


def r3() -> tuple[PoolBook, Claim, Claim, Claim]:
    a = a_sale(4, rank=Rank.ON_DEMAND, notice=120, start=NOW - DAY, opened=True)
    b = a_sale(2, start=NOW - DAY, opened=True)
    c = a_sale(2, start=NOW - DAY, opened=True)
    return filled(8, [a, b, c]), a, b, c


def test_r3_one_need_one_notice_and_the_lowest_rank_first() -> None:
    book, _, b, c = r3()
    two = plan(book, 2, NOW + 10 * MINUTE, now=NOW)
    assert len(victims(two)) == 1
    assert victims(two) < {b.id, c.id}
    four = plan(book, 4, NOW + 10 * MINUTE, now=NOW)
    assert victims(four) == {b.id, c.id}


def test_a_slower_rung_gives_only_what_quicker_ones_cannot() -> None:
    book, a, b, c = r3()
    assert victims(plan(book, 5, NOW + 10 * MINUTE, now=NOW)) in ({a.id, b.id}, {a.id, c.id})
    assert victims(plan(book, 8, NOW + 10 * MINUTE, now=NOW)) == {a.id, b.id, c.id}


def test_a_gang_is_not_broken_for_one_device_while_singles_exist() -> None:
    gang = a_sale(1, count=8, start=NOW - DAY, opened=True)
    singles = [a_sale(start=NOW - DAY, opened=True) for _ in range(3)]
    book = filled(11, [gang, *singles])
    assert gang.id not in victims(plan(book, 3, NOW + HOUR, now=NOW))
    assert victims(plan(book, 4, NOW + HOUR, now=NOW)) == {gang.id}


def test_who_is_under_notice_counts_as_freed_and_is_not_chosen_again() -> None:
    spot = [a_sale(start=NOW - DAY, opened=True) for _ in range(3)]
    noticed = replace(
        spot[0],
        noticed_at=NOW - MINUTE,
        notice_reason="owner_recall",
        term_at=NOW + MINUTE,
        free_by=NOW + MINUTE + seconds(32),
    )
    book = filled(3, [noticed, *spot[1:]])
    one = plan(book, 1, NOW + HOUR, now=NOW)
    assert victims(one) == set()
    assert one.rows[0].free_by == noticed.free_by
    two = plan(book, 2, NOW + HOUR, now=NOW)
    assert len(victims(two)) == 1
    assert noticed.id not in victims(two)


def test_what_is_pledged_to_an_accepted_recall_is_not_had_twice() -> None:
    spot = [a_sale(start=NOW - DAY, opened=True) for _ in range(3)]
    need = a_need(1, start=NOW + 20 * MINUTE)
    book = filled(3, [*spot, need])
    pledged = {spot[0].id: NOW + 20 * MINUTE}
    answer = plan(book, 2, NOW + HOUR, now=NOW, pledged=pledged)
    assert victims(answer) == {spot[1].id, spot[2].id}
    assert plan(book, 3, NOW + HOUR, now=NOW, pledged=pledged).delivered == 2


def test_a_notice_withdrawn_a_moment_ago_is_not_planned_on() -> None:
    rested = replace(a_sale(start=NOW - DAY, opened=True), withdrawn_at=NOW - MINUTE)
    book = filled(1, [rested])
    early = plan(book, 1, NOW + 5 * MINUTE, now=NOW)
    assert early.rows == ()
    assert early.shortfall is not None
    (row,) = early.shortfall.rows
    assert row.notice_at == NOW + 9 * MINUTE
    (late,) = plan(book, 1, NOW + 20 * MINUTE, now=NOW).rows
    assert late.notice_at == NOW + 20 * MINUTE - seconds(152)


def test_what_has_not_opened_may_be_had_at_once() -> None:
    starting = on_demand(1)
    (row,) = plan(filled(1, [starting]), 1, NOW + MINUTE, now=NOW).rows
    assert (row.notice_at, row.term_at, row.free_by) == (NOW, NOW, NOW + seconds(32))


def test_the_spread_spares_who_would_lose_most() -> None:
    claims = [
        *(a_sale(organisation="org_a", value=1, start=NOW - DAY, opened=True) for _ in range(4)),
        *(a_sale(organisation="org_b", value=900, start=NOW - DAY, opened=True) for _ in range(4)),
    ]
    answer = plan(filled(8, claims), 4, NOW + HOUR, now=NOW)
    lost = [v.organisation_id for row in answer.rows for v in row.victims]
    assert lost.count("org_a") <= 3
    assert lost.count("org_b") >= 1
    assert answer.spread_micros > 0
    assert answer.cost_micros == answer.bound_micros + answer.spread_micros


def test_the_price_of_a_row_is_revenue_lost_and_credit_due() -> None:
    young = Displacement(
        rule=DisplacementRule.YOUNG_RUN, younger_than_seconds=600, micros_per_device_hour=3_600_000
    )
    sale = a_sale(2, value=1_000_000, start=NOW - MINUTE, displacement=young, opened=True)
    by = NOW + seconds(152)
    (row,) = plan(filled(2, [sale]), 2, by, now=NOW, until=by + HOUR).rows
    assert row.credit_micros == 2 * 1000 * 180
    # Two devices from SIGTERM to `until`: an hour and 32 seconds.
    assert row.lost_revenue_micros == round(2 * 1_000_000 * 3632 / 3600)


def test_a_row_stops_holding_when_its_victim_is_gone_or_its_moment_has_passed() -> None:
    spot = a_sale(start=NOW - DAY, opened=True)
    book = filled(1, [spot])
    (row,) = plan(book, 1, NOW + 5 * MINUTE, now=NOW).rows
    assert still_holds(book, row, now=NOW)
    assert row.notice_at is not None
    assert still_holds(book, row, now=row.notice_at)
    assert not still_holds(book, row, now=row.notice_at + seconds(1))
    assert not still_holds(book.without(spot.id), row, now=NOW)


def test_the_curve_of_excess() -> None:
    points = dict(curve(f3(), NOW))
    assert points[0] == 4
    assert points[150 + SCRUB] == 40
    assert points[24 * 3600 + SPOT_STOP] == 52


def victims(answer: Plan) -> set[str]:
    return {v.claim_id for row in answer.rows for v in row.victims}


@st.composite
def running(draw: st.DrawFn) -> Claim:
    rank = draw(st.sampled_from([Rank.FILLER, Rank.SPOT, Rank.ON_DEMAND, Rank.BLOCK]))
    lasting = draw(st.sampled_from([None, HOUR, DAY])) if rank is not Rank.BLOCK else 2 * DAY
    return a_sale(
        draw(st.integers(1, 5)),
        rank=rank,
        notice=None if rank is Rank.BLOCK else draw(st.sampled_from([30, 120, 1800])),
        firm=3600 if rank is Rank.ON_DEMAND else 0,
        stop=draw(st.sampled_from([0, 32])),
        start=NOW - draw(st.sampled_from([MINUTE, 30 * MINUTE])),
        lasting=lasting,
        organisation=draw(st.sampled_from(["org_a", "org_b", "org_c"])),
        value=draw(st.integers(0, 3)) * 500_000,
        opened=draw(st.booleans()),
    )


@st.composite
def sold(draw: st.DrawFn) -> PoolBook:
    claims = draw(st.lists(running(), max_size=9))
    needs = draw(
        st.lists(
            st.builds(
                lambda devices, start: a_need(devices, start=NOW + start),
                st.integers(1, 3),
                st.sampled_from([0 * MINUTE, 7 * MINUTE, 3 * HOUR]),
            ),
            max_size=2,
        )
    )
    held = sum(c.size for c in [*claims, *needs])
    return filled(held + draw(st.integers(0, 4)), [*claims, *needs])


def held_when(book: PoolBook, at: datetime, ended: dict[str, datetime]) -> int:
    total = 0
    for claim in book.claims:
        end = claim.held_until()
        if claim.id in ended:
            end = ended[claim.id] if end is None else min(end, ended[claim.id])
        if claim.starts_at <= at and (end is None or end > at):
            total += claim.size
    return total


def ends_of(rows: Sequence[Row]) -> dict[str, datetime]:
    return {v.claim_id: v.free_by for row in rows for v in row.victims}


asks = st.tuples(
    st.integers(1, 30),
    st.sampled_from([0 * MINUTE, MINUTE, 5 * MINUTE, 2 * HOUR]),
    st.sampled_from([None, HOUR, DAY]),
)


@given(sold(), asks)
@examples(300)
def test_a_plan_frees_what_it_says_by_its_times(
    book: PoolBook, ask: tuple[int, timedelta, timedelta | None]
) -> None:
    count, ahead, lasting = ask
    by = NOW + ahead
    until = None if lasting is None else by + lasting
    answer = plan(book, count, by, now=NOW, until=until)
    late = answer.shortfall.rows if answer.shortfall else ()
    rows = [*answer.rows, *late]
    ended = ends_of(rows)
    supply = int(book.supply[0])
    promised = 0
    for row in sorted(rows, key=lambda row: row.free_by):
        promised += row.devices
        changes = {c.starts_at for c in book.claims} | {
            c.held_until() for c in book.claims if c.held_until() is not None
        }
        for at in [row.free_by, *changes, *ended.values()]:
            if at is not None and at >= row.free_by and (until is None or at < until):
                # What the owner needs besides is met first, or the plan counts it as its own.
                assert supply - held_when(book, at, ended) >= promised
    short = 0 if answer.shortfall is None else answer.shortfall.devices
    assert answer.delivered + short == count
    if answer.shortfall is not None and answer.shortfall.complete_at is not None:
        assert sum(row.devices for row in rows) == count


@given(sold(), asks)
@examples(300)
def test_no_victim_is_redundant_and_each_has_its_notice(
    book: PoolBook, ask: tuple[int, timedelta, timedelta | None]
) -> None:
    count, ahead, _ = ask
    by = NOW + ahead
    answer = plan(book, count, by, now=NOW)
    ended = ends_of(answer.rows)
    supply = int(book.supply[0])
    moments = [
        at
        for at in {by, *(c.starts_at for c in book.claims)} | {c.held_until() for c in book.claims}
        if at is not None and at >= by
    ]
    for row in answer.rows:
        for victim in row.victims:
            claim = book.find(victim.claim_id)
            assert claim is not None
            assert not claim.is_fixed
            assert claim.is_sale
            assert victim.notice_at >= NOW
            assert victim.term_at >= earliest_term_at(claim, victim.notice_at)
            assert victim.free_by == victim.term_at + seconds(claim.release.stop_seconds)
            without = {k: at for k, at in ended.items() if k != claim.id}
            assert any(supply - held_when(book, at, without) < answer.delivered for at in moments)
    assert len(ended) == sum(len(row.victims) for row in answer.rows)


@given(sold(), asks)
@examples(300)
def test_a_row_is_never_empty_and_holds_without_those_after_it(
    book: PoolBook, ask: tuple[int, timedelta, timedelta | None]
) -> None:
    count, ahead, lasting = ask
    by = NOW + ahead
    until = None if lasting is None else by + lasting
    answer = plan(book, count, by, now=NOW, until=until)
    assert all(row.devices > 0 for row in answer.rows)
    supply = int(book.supply[0])
    for number, row in enumerate(answer.rows, start=1):
        kept = answer.rows[:number]
        ended = ends_of(kept)
        changes = {c.starts_at for c in book.claims} | {c.held_until() for c in book.claims}
        for at in [row.free_by, *changes, *ended.values()]:
            if at is not None and at >= row.free_by and (until is None or at < until):
                free = supply - held_when(book, at, ended)
                assert free >= sum(item.devices for item in kept if item.free_by <= row.free_by)


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    return [
        Candidate(
            claim_id=f"c{n}",
            organisation_id=draw(st.sampled_from(["a", "b"])),
            size=draw(st.integers(1, 6)),
            rung=draw(st.sampled_from([(1, 120), (2, 3600)])),
            lost_revenue_micros=draw(st.integers(0, 9)),
        )
        for n in range(draw(st.integers(1, 7)))
    ]


@given(candidates(), st.integers(1, 20))
@examples(200)
def test_small_choices_are_the_best_there_are(pool: list[Candidate], need: int) -> None:
    choice = choose(pool, need)
    covers = [
        subset
        for r in range(len(pool) + 1)
        for subset in combinations(pool, r)
        if sum(c.size for c in subset) >= need
    ]
    if choice is None:
        assert not covers
        return
    weights = _weights(pool)
    best = min(sum(weights[c.claim_id] for c in subset) for subset in covers)
    assert sum(weights[c.claim_id] for c in choice.picked) == best
    assert choice.is_exact


@given(st.integers(1, 10_000), st.integers(0, 1_000))
@examples(30)
def test_large_choices_cover_without_redundance_and_tell_their_gap(need: int, seed: int) -> None:
    pool = [
        Candidate(
            claim_id=f"c{n:05d}",
            organisation_id="a",
            size=1 + (n * 7 + seed) % 8,
            rung=(1, 120 + 1680 * (n % 2)),
            lost_revenue_micros=(n * 7919 + seed * 31) % 1000,
        )
        for n in range(3000)
    ]
    choice = choose(pool, need)
    assert choice is not None
    freed = sum(c.size for c in choice.picked)
    assert freed >= need
    assert all(freed - c.size < need for c in choice.picked)
    assert choice.bound_micros <= choice.cost_micros
    assert len({c.claim_id for c in choice.picked}) == len(choice.picked)


def test_patient_need_recalls_nobody() -> None:
    waiting = a_need(2, urgency=Urgency.PATIENT)
    spot = a_sale(2, start=NOW - DAY, opened=True)
    answer = plan(filled(4, [waiting, spot]), 2, NOW + HOUR, now=NOW)
    assert victims(answer) == set()
