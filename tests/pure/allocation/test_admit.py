"""Admission: what is sold can be served, and what a refusal says is true."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

import numpy as np
import pytest
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

from sublet.capacity.allocation.admit import admit, applied, at_once
from sublet.capacity.allocation.book import Nodes, PoolBook
from sublet.capacity.allocation.grid import grid_at
from sublet.capacity.allocation.model import (
    LATE_CHECK,
    NOTICE_SLACK,
    Admitted,
    Claim,
    Rank,
    RefusalReason,
    Refused,
    Urgency,
    lock_free_by,
)

SUPPLY = 8


def touches(start: datetime, end: datetime | None, low: datetime, high: datetime | None) -> bool:
    """Counted by hand: does `[start, end)` touch the bucket? Something held is held now."""
    return (end is None or end > low) and (high is None or start < high)


def locked_by_hand(book: PoolBook, rank: Rank, bucket: int, now: datetime) -> int:
    low, high = book.grid.edges[bucket], book.grid.end_of(bucket)
    return locked_between(book, rank, low, high, now)


def locked_between(
    book: PoolBook, rank: Rank, low: datetime, high: datetime | None, now: datetime
) -> int:
    total = 0
    for claim in book.claims:
        if claim.is_sale:
            end = claim.held_until() if claim.rank >= rank else lock_free_by(claim, now)
            total += claim.size * touches(claim.starts_at, end, low, high)
    return total


def equals_by_hand(book: PoolBook, rank: Rank, bucket: int) -> int:
    low, high = book.grid.edges[bucket], book.grid.end_of(bucket)
    return sum(
        claim.size
        for claim in book.claims
        if claim.is_sale
        and claim.rank is rank
        and touches(claim.starts_at, claim.held_until(), low, high)
    )


def need_by_hand(book: PoolBook, bucket: int) -> int:
    low, high = book.grid.edges[bucket], book.grid.end_of(bucket)
    return sum(
        claim.size
        for claim in book.claims
        if not claim.is_sale
        and claim.parent_claim_id is None
        and claim.urgency is not Urgency.PATIENT
        and touches(claim.starts_at, claim.held_until(), low, high)
    )


@st.composite
def sales(draw: st.DrawFn, *, is_dated: bool | None = None) -> Claim:
    rank = draw(st.sampled_from([Rank.FILLER, Rank.SPOT, Rank.ON_DEMAND, Rank.BLOCK]))
    has_end = rank is Rank.BLOCK or draw(st.booleans())
    lasting = draw(st.sampled_from([10 * MINUTE, HOUR, 5 * HOUR, DAY, 20 * DAY]))
    dated = draw(st.booleans()) if is_dated is None else is_dated
    start = draw(st.sampled_from([15 * MINUTE, HOUR, 26 * HOUR, 15 * DAY])) if dated else HOUR * 0
    return a_sale(
        draw(st.integers(1, 4)),
        count=draw(st.integers(1, 2)),
        rank=rank,
        notice=None if rank is Rank.BLOCK else draw(st.sampled_from([5, 120, 1800, 3600])),
        firm=3600 if rank is Rank.ON_DEMAND else 0,
        stop=draw(st.sampled_from([0, 32, 90])),
        start=NOW + start,
        lasting=lasting if has_end else None,
        opened=not dated and rank is not Rank.BLOCK and draw(st.booleans()),
        organisation=draw(st.sampled_from(["org_a", "org_b"])),
    )


@st.composite
def needs(draw: st.DrawFn) -> Claim:
    return a_need(
        draw(st.integers(1, 3)),
        urgency=draw(st.sampled_from(list(Urgency))),
        start=NOW + draw(st.sampled_from([0 * MINUTE, 30 * MINUTE, 3 * HOUR, 2 * DAY])),
        lasting=draw(st.sampled_from([None, HOUR, DAY])),
    )


@st.composite
def books(draw: st.DrawFn) -> PoolBook:
    """A book as it comes to be: needs filed, sales admitted, some of them released again."""
    book = a_book(
        SUPPLY,
        shelf=draw(st.sampled_from([0, 3, SUPPLY])),
    )
    for need in draw(st.lists(needs(), max_size=2)):
        book = book.with_claim(need)
    for sale in draw(st.lists(sales(), max_size=8)):
        asked = replace(sale, opened_at=None)
        decision = admit(book, asked, now=NOW)
        if isinstance(decision, Admitted):
            book = applied(book, decision)
            if sale.opened_at is not None and decision.claim.starts_at == NOW:
                book = book.with_claim(replace(decision.claim, opened_at=NOW))
    return book


@given(books(), sales())
@examples(60)
def test_after_an_admitted_sale_its_lock_holds_in_every_bucket(book: PoolBook, sale: Claim) -> None:
    sale = replace(sale, opened_at=None)
    decision = admit(book, sale, now=NOW)
    if isinstance(decision, Refused):
        return
    after = applied(book, decision)
    claim = decision.claim
    first, stop = after.grid.span(claim.starts_at, lock_free_by(claim, NOW))
    locked = after.locked(claim.rank, NOW)
    for bucket in range(first, stop):
        assert locked_by_hand(after, claim.rank, bucket, NOW) <= int(locked[bucket])
    if is_dated(sale):
        by_book = locked + after.need_against_sales(NOW)
        assert (by_book[first:stop] <= after.supply[first:stop]).all()
    # Where it takes over from lower ranks within a bucket the grid counts both: no instant does.
    ends = [end for c in after.claims if (end := c.held_until()) is not None]
    ends += [lock_free_by(c, NOW) for c in after.claims if c.is_sale]
    for at in {claim.starts_at, *(c.starts_at for c in after.claims), *ends}:
        if claim.starts_at <= at < lock_free_by(claim, NOW):
            by_hand = locked_between(after, claim.rank, at, at + seconds(1e-6), NOW)
            assert by_hand + need_by_hand(after, after.grid.index(at)) <= SUPPLY
    for bucket in range(*after.grid.span(claim.starts_at, claim.held_until())):
        assert equals_by_hand(after, claim.rank, bucket) <= SUPPLY


def is_dated(sale: Claim) -> bool:
    return sale.starts_at > NOW


@st.composite
def low_books(draw: st.DrawFn) -> tuple[PoolBook, datetime]:
    """A book that is full, most of it of who leaves soon, at some moment within its slot."""
    now = NOW + draw(st.integers(0, 299)) * seconds(1)
    book = a_book(SUPPLY, now=now)
    for _ in range(draw(st.integers(0, 1))):
        book = book.with_claim(a_need(1, start=now + draw(st.sampled_from([MINUTE, HOUR]))))
    for rank in draw(st.lists(st.sampled_from([*Rank][:3]), min_size=SUPPLY, max_size=SUPPLY)):
        age = draw(st.sampled_from([0, 10, 290, 4000])) * seconds(1)
        asked = a_sale(
            draw(st.integers(1, 2)),
            rank=rank,
            notice=draw(st.sampled_from([5, 30, 60, 120, 400])),
            firm=3600 if rank is Rank.ON_DEMAND else 0,
            stop=draw(st.sampled_from([0, 7, 65])),
            start=now,
        )
        decision = admit(book, asked, now=now)
        if isinstance(decision, Admitted):
            book = applied(book, decision)
            begun = decision.claim
            if begun.starts_at == now and draw(st.booleans()):
                book = book.with_claim(replace(begun, starts_at=now - age, opened_at=now - age))
    return book, now


def held_at(book: PoolBook, at: datetime) -> int:
    """Sales that nobody ends but as the book has it, and the owner's need, at one instant."""
    sold = sum(
        claim.size
        for claim in book.claims
        if claim.is_sale
        and claim.starts_at <= at
        and ((end := claim.held_until()) is None or end > at)
    )
    return sold + need_by_hand(book, book.grid.index(at))


@given(low_books(), st.integers(1, 3), st.sampled_from([Rank.ON_DEMAND, Rank.BLOCK]))
@examples(150)
def test_it_starts_once_the_notices_have_run_and_no_device_is_used_twice(
    found: tuple[PoolBook, datetime], devices: int, rank: Rank
) -> None:
    book, now = found
    sale = a_sale(devices, rank=rank, notice=600, start=now)
    decision = admit(book, sale, now=now)
    if isinstance(decision, Refused):
        return
    after, claim = applied(book, decision), decision.claim
    ends = [end for c in after.claims if (end := c.held_until()) is not None]
    lock_ends = lock_free_by(claim, now)
    for at in {now, *(c.starts_at for c in after.claims), *ends}:
        # What somebody else's notices are to make room for is not its excess.
        if now <= at < lock_ends:
            assert held_at(after, at) <= max(held_at(book, at), SUPPLY)
    for pin in decision.displaced:
        victim = book.find(pin.claim_id)
        assert victim is not None
        assert now <= pin.notice_at
        assert pin.term_at >= pin.notice_at + seconds(victim.release.notice_seconds or 0)
    quick = [
        c for c in book.claims if c.rank is Rank.FILLER and not c.is_fixed and c.term_at is None
    ]
    soon = max((lock_free_by(c, now) for c in quick), default=now) + NOTICE_SLACK
    is_enough = sum(c.size for c in quick) >= devices
    if is_enough and all(c.term_at is None and c.starts_at <= now for c in book.claims):
        assert claim.starts_at <= soon


@given(books(), sales())
@examples(60)
def test_nobody_is_pinned_before_its_release_allows_and_only_lower_ranks(
    book: PoolBook, sale: Claim
) -> None:
    sale = replace(sale, opened_at=None)
    decision = admit(book, sale, now=NOW)
    if isinstance(decision, Refused):
        return
    for pin in decision.displaced:
        victim = book.find(pin.claim_id)
        assert victim is not None
        assert victim.rank < sale.rank
        assert pin.notice_at >= NOW
        assert pin.term_at - pin.notice_at >= seconds(victim.release.notice_seconds or 0)
        if victim.opened_at is not None:
            assert pin.term_at >= victim.opened_at + seconds(victim.release.firm_seconds)
        assert pin.free_by == pin.term_at + seconds(victim.release.stop_seconds)


@given(books(), sales())
@examples(60)
def test_a_unit_is_free_at_its_start_counting_everybody_who_may_still_be_there(
    book: PoolBook, sale: Claim
) -> None:
    """Condition 3: with the pinned gone, all that is held at the start fits beside the sale."""
    before = _held_at(book, NOW)
    sale = replace(sale, opened_at=None)
    decision = admit(book, sale, now=NOW)
    if isinstance(decision, Refused):
        return
    after = applied(book, decision)
    start = decision.claim.starts_at
    need = need_by_hand(after, after.grid.index(start))
    excess_before = max(_held_at(book, start) + need - SUPPLY, 0)
    assert before >= 0
    assert _held_at(after, start) + need <= SUPPLY + excess_before


def _held_at(book: PoolBook, at: datetime) -> int:
    return sum(
        claim.size
        for claim in book.claims
        if claim.is_sale
        and claim.starts_at <= at
        and ((end := claim.held_until()) is None or end > at)
    )


@given(books(), sales())
@examples(60)
def test_admit_then_release_gives_the_same_book(book: PoolBook, sale: Claim) -> None:
    after = book.with_claim(sale).without(sale.id)
    assert np.array_equal(after.active, book.active)
    assert np.array_equal(after.fixed, book.fixed)
    assert np.array_equal(after.need, book.need)
    assert dict(after.rolling) == dict(book.rolling)
    assert after.waiting == book.waiting
    assert {c.id for c in after.claims} == {c.id for c in book.claims}
    assert after.generation == book.generation + 2


@given(books(), sales())
@examples(60)
def test_the_book_kept_by_changes_equals_the_book_made_from_its_claims(
    book: PoolBook, sale: Claim
) -> None:
    kept = book.with_claim(sale).at(NOW + 7 * MINUTE)
    made = a_book(SUPPLY, shelf=book.firm_shelf, now=NOW + 7 * MINUTE).with_changes(kept.claims)
    assert np.array_equal(kept.active, made.active)
    assert np.array_equal(kept.fixed, made.fixed)
    assert np.array_equal(kept.need, made.need)
    assert dict(kept.rolling) == dict(made.rolling)


@given(books(), sales(), st.data())
@examples(60)
def test_smaller_or_shorter_of_the_same_shape_is_admitted_too(
    book: PoolBook, sale: Claim, data: st.DataObject
) -> None:
    sale = replace(sale, opened_at=None, count=data.draw(st.integers(1, 4)))
    if isinstance(admit(book, sale, now=NOW), Refused):
        return
    fewer = replace(sale, count=data.draw(st.integers(1, sale.count)))
    assert isinstance(admit(book, fewer, now=NOW), Admitted)
    ends = sale.release.ends_at
    full = DAY * 400 if ends is None else ends - sale.starts_at
    shorter = full * data.draw(st.integers(1, 99)) / 100
    cut = replace(fewer, release=replace(sale.release, ends_at=sale.starts_at + shorter))
    assert isinstance(admit(book, cut, now=NOW), Admitted)


@given(books(), sales())
@examples(100)
def test_what_a_refusal_names_is_then_admitted(book: PoolBook, sale: Claim) -> None:
    sale = replace(sale, opened_at=None)
    decision = admit(book, sale, now=NOW)
    if isinstance(decision, Admitted):
        return
    if decision.smaller_count is not None:
        assert decision.smaller_count < sale.count
        fewer = replace(sale, count=decision.smaller_count)
        assert isinstance(admit(book, fewer, now=NOW), Admitted)
        more = replace(sale, count=decision.smaller_count + 1)
        assert isinstance(admit(book, more, now=NOW), Refused)
    if decision.earliest_at is None:
        return
    at = decision.earliest_at
    assert at > NOW
    again = asked_at(sale, at)
    assert isinstance(admit(as_it_is_then(book, at), again, now=at), Admitted)


def asked_at(sale: Claim, at: datetime) -> Claim:
    ends = sale.release.ends_at
    moved = None if ends is None else at + (ends - sale.starts_at)
    return replace(sale, starts_at=at, release=replace(sale.release, ends_at=moved))


def as_it_is_then(book: PoolBook, at: datetime) -> PoolBook:
    """The same claims later: what was to end by then has ended, and nothing else happened."""
    over = [c.id for c in book.claims if (end := c.held_until()) is not None and end <= at]
    for claim_id in over:
        book = book.without(claim_id)
    return book.at(at)


@given(st.lists(st.sampled_from([1, 2, 4]), max_size=4), st.sampled_from([10, 45, 200]))
@examples(50)
def test_there_is_no_instant_only_where_something_without_end_stands_in_the_way(
    open_sales: list[int], minutes: int
) -> None:
    book = a_book(SUPPLY)
    for size in open_sales:
        decision = admit(book, a_sale(size), now=NOW)
        if isinstance(decision, Admitted):
            book = applied(book, decision)
    held = sum(c.size for c in book.claims)
    if held < SUPPLY:
        book = book.with_claim(a_sale(SUPPLY - held, lasting=minutes * MINUTE))
    for size in range(1, SUPPLY + 1):
        decision = admit(book, a_sale(size, lasting=HOUR), now=NOW)
        assert isinstance(decision, Refused)
        assert (decision.earliest_at is None) == (held + size > SUPPLY)
        assert decision.offer_to_wait


def test_a_job_behind_a_job_is_told_the_edge_after_its_end() -> None:
    book = a_book(1).with_claim(a_sale(lasting=10 * MINUTE))
    decision = admit(book, a_sale(lasting=10 * MINUTE), now=NOW)
    assert isinstance(decision, Refused)
    assert decision.earliest_at == NOW + 15 * MINUTE
    assert decision.reason is RefusalReason.SOLD


def test_more_than_the_pool_ever_has_is_not_worth_waiting_for() -> None:
    decision = admit(a_book(4), a_sale(2, count=3), now=NOW)
    assert isinstance(decision, Refused)
    assert decision.reason is RefusalReason.TOO_LARGE
    assert not decision.offer_to_wait
    assert decision.smaller_count == 2


def test_the_book_counts_lower_ranks_as_far_as_their_locks_reach() -> None:
    spot, firm = a_sale(2, opened=True), on_demand(3, opened=True)
    book = a_book(SUPPLY).with_claim(spot).with_claim(firm)
    later = NOW + 3 * MINUTE
    assert book.locked(Rank.BLOCK, NOW)[:2].tolist() == [5, 3]
    assert book.locked(Rank.BLOCK, later)[:3].tolist() == [5, 5, 3]
    assert book.locked(Rank.ON_DEMAND, NOW)[[0, 1, -1]].tolist() == [5, 3, 3]
    assert book.locked(Rank.SPOT, NOW)[[0, 1, -1]].tolist() == [5, 5, 5]
    hour = book.grid.stop(NOW + HOUR + seconds(32))
    assert book.locked(Rank.BLOCK, NOW)[[hour - 1, hour]].tolist() == [3, 0]


def test_a_dated_sale_of_the_same_rank_is_not_promised_away() -> None:
    """Condition 2: past its own lock a sale still counts its equals."""
    tomorrow = on_demand(8, start=NOW + DAY, lasting=DAY)
    decision = admit(a_book(SUPPLY).with_claim(tomorrow), on_demand(1), now=NOW)
    assert isinstance(decision, Refused)
    shorter = on_demand(1, lasting=20 * HOUR)
    assert isinstance(admit(a_book(SUPPLY).with_claim(tomorrow), shorter, now=NOW), Admitted)


def test_equals_never_displace_equals() -> None:
    book = a_book(4).with_claim(a_sale(4, opened=True))
    decision = admit(book, a_sale(1), now=NOW)
    assert isinstance(decision, Refused)
    assert decision.earliest_at is None


def test_a_higher_rank_starts_when_the_lower_is_gone_and_keeps_its_length() -> None:
    spot = a_sale(4, opened=True)
    decision = admit(a_book(4).with_claim(spot), on_demand(2, lasting=2 * HOUR), now=NOW)
    assert isinstance(decision, Admitted)
    start = NOW + seconds(152) + NOTICE_SLACK
    assert decision.claim.starts_at == start
    assert decision.claim.release.ends_at == start + 2 * HOUR
    (pin,) = decision.displaced
    assert (pin.notice_at, pin.term_at, pin.free_by) == (
        start - seconds(152),
        start - seconds(32),
        start,
    )


@pytest.mark.parametrize("moment", [0, 1, 120, 240, 298])
@pytest.mark.parametrize("age", [0, 30, 4000])
def test_the_moment_within_the_slot_makes_no_difference(moment: int, age: int) -> None:
    now = NOW + seconds(moment)
    filler = a_sale(rank=Rank.FILLER, notice=30, stop=7, start=now - seconds(age), opened=True)
    decision = admit(a_book(1, now=now).with_claim(filler), on_demand(start=now), now=now)
    assert isinstance(decision, Admitted)
    assert decision.claim.starts_at == now + seconds(37) + NOTICE_SLACK
    (pin,) = decision.displaced
    assert pin.free_by == decision.claim.starts_at


def test_the_second_buyer_of_a_slot_waits_no_longer_than_the_first() -> None:
    book = a_book(3)
    for _ in range(3):
        book = book.with_claim(a_sale(rank=Rank.FILLER, notice=30, stop=7, opened=True))
    gone: set[str] = set()
    for asked_after in (0, 10, 20):
        now = NOW + seconds(asked_after)
        decision = admit(book, on_demand(start=now), now=now)
        assert isinstance(decision, Admitted)
        assert decision.claim.starts_at == now + seconds(37) + NOTICE_SLACK
        (pin,) = decision.displaced
        gone.add(pin.claim_id)
        book = applied(book, decision)
    assert len(gone) == 3


def test_who_is_late_to_leave_keeps_the_next_one_waiting_no_longer_than_its_check() -> None:
    late = a_sale(rank=Rank.FILLER, start=NOW - HOUR, opened=True)
    late = replace(
        late,
        noticed_at=NOW - 10 * MINUTE,
        term_at=NOW - 2 * MINUTE,
        free_by=NOW - MINUTE,
    )
    decision = admit(a_book(1).with_claim(late), on_demand(), now=NOW)
    assert isinstance(decision, Admitted)
    assert decision.claim.starts_at == NOW + LATE_CHECK
    assert decision.displaced == ()


def test_who_needs_a_long_notice_leaves_by_an_edge_of_the_grid() -> None:
    spot = a_sale(notice=1800, opened=True)
    decision = admit(a_book(1).with_claim(spot), on_demand(), now=NOW)
    assert isinstance(decision, Admitted)
    assert decision.claim.starts_at == NOW + 35 * MINUTE


def test_a_sale_begins_early_only_where_who_left_made_room() -> None:
    filler = a_sale(rank=Rank.FILLER, notice=30, stop=7, opened=True)
    book = a_book(1).with_claim(filler)
    decision = admit(book, on_demand(lasting=HOUR), now=NOW)
    assert isinstance(decision, Admitted)
    book = applied(book, decision)
    soon = NOW + seconds(12)
    assert at_once(book, decision.claim, now=soon) is None
    begun = at_once(book.without(filler.id), decision.claim, now=soon)
    assert begun is not None
    assert begun.starts_at == soon
    assert begun.release.ends_at == soon + HOUR
    needed = book.without(filler.id).with_claim(a_need(1, start=soon, lasting=seconds(20)))
    assert at_once(needed, decision.claim, now=soon) is None


def test_a_dated_sale_never_begins_early() -> None:
    """However free the devices are: it was asked for then, and ends then."""
    block = a_block(1, 5 * HOUR, start=NOW + DAY)
    decision = admit(a_book(1), block, now=NOW)
    assert isinstance(decision, Admitted)
    assert decision.claim.asked_at is None
    assert at_once(applied(a_book(1), decision), decision.claim, now=NOW + HOUR) is None


@given(
    st.lists(st.sampled_from([5, 120, 1800]), min_size=1, max_size=4),
    st.integers(1, 4),
    st.sampled_from([0 * MINUTE, -MINUTE, HOUR, DAY]),
    st.sampled_from([None, 2 * HOUR]),
)
@examples(60)
def test_a_sale_knows_its_asked_start_where_and_only_where_it_was_moved(
    notices: list[int], devices: int, start: timedelta, lasting: timedelta | None
) -> None:
    book = a_book(4)
    for notice in notices:
        book = book.with_claim(a_sale(notice=notice, start=NOW - HOUR, opened=True))
    asked = on_demand(devices, start=NOW + start, lasting=lasting)
    decision = admit(book, asked, now=NOW)
    if isinstance(decision, Refused):
        return
    is_moved = start <= 0 * MINUTE and devices > 4 - len(notices)
    assert (decision.claim.starts_at > max(NOW, asked.starts_at)) == is_moved
    assert decision.claim.asked_at == (NOW if is_moved else None)


def a_pool_of_nodes(claims: list[Claim], *nodes: int) -> PoolBook:
    """Two nodes or more of four devices each, so many of them taken."""
    devices = np.full(len(nodes), 4, np.int32)
    free = devices - np.array(nodes, np.int32)
    columns = Nodes(size=4, devices=devices, free=free, fractions=sum(n > 0 for n in nodes))
    book = PoolBook.empty("pol_1", now=NOW, supply=4 * len(nodes), firm_shelf=99, nodes=columns)
    return book.with_changes(claims)


def test_where_there_are_many_nodes_filler_leaves_for_a_single_device_too() -> None:
    fillers = [a_sale(rank=Rank.FILLER, notice=30, stop=7, opened=True) for _ in range(8)]
    book = a_pool_of_nodes(fillers, 4, 4)
    decision = admit(book, on_demand(), now=NOW)
    assert isinstance(decision, Admitted)
    assert decision.claim.starts_at == NOW + seconds(37) + NOTICE_SLACK
    assert len(decision.displaced) == 1
    # Larger units might come free in pieces only.
    refused = admit(book, on_demand(2), now=NOW)
    assert isinstance(refused, Refused)
    assert refused.reason is RefusalReason.NODES


def test_only_as_much_is_displaced_as_is_needed() -> None:
    book = a_book(6)
    for _ in range(6):
        book = book.with_claim(a_sale(opened=True))
    decision = admit(book, on_demand(2), now=NOW)
    assert isinstance(decision, Admitted)
    assert len(decision.displaced) == 2


def test_a_dated_block_pins_open_spot_just_before_it_begins() -> None:
    spot = a_sale(4, opened=True)
    start = NOW + 6 * DAY + HOUR
    decision = admit(a_book(4).with_claim(spot), a_block(4, DAY, start=start), now=NOW)
    assert isinstance(decision, Admitted)
    (pin,) = decision.displaced
    assert pin.free_by == start
    assert pin.notice_at == start - seconds(152)


def test_a_dated_claim_is_not_moved_but_refused() -> None:
    start = NOW + MINUTE
    book = a_book(4).with_claim(a_sale(4, opened=True))
    decision = admit(book, a_block(4, HOUR, start=start), now=NOW)
    assert isinstance(decision, Refused)
    assert decision.earliest_at == NOW + 5 * MINUTE


def test_head_room_is_for_the_owner_and_small_pools_keep_none() -> None:
    large = PoolBook.empty("pol_1", now=NOW, supply=100, firm_shelf=100)
    assert isinstance(admit(large, a_sale(98), now=NOW), Admitted)
    refused = admit(large, a_sale(99), now=NOW)
    assert isinstance(refused, Refused)
    assert refused.reason is RefusalReason.OWNER_NEED
    small = PoolBook.empty("pol_1", now=NOW, supply=49, firm_shelf=49)
    assert isinstance(admit(small, a_sale(49), now=NOW), Admitted)


@pytest.mark.parametrize("shelf", [0, 2])
def test_what_locks_past_ten_minutes_comes_from_the_firm_shelf(shelf: int) -> None:
    book = a_book(4, shelf=shelf)
    assert isinstance(admit(book, a_sale(4, notice=500), now=NOW), Admitted)
    refused = admit(book, on_demand(shelf + 1), now=NOW)
    assert isinstance(refused, Refused)
    assert refused.reason is RefusalReason.FIRM_SHELF
    if shelf:
        assert isinstance(admit(book, on_demand(shelf), now=NOW), Admitted)


def test_the_shelf_ends_when_the_owner_said() -> None:
    book = a_book(4).with_firm_shelf(4, NOW + 3 * HOUR)
    assert isinstance(admit(book, a_block(4, HOUR), now=NOW), Admitted)
    assert isinstance(admit(book, a_block(4, 4 * HOUR), now=NOW), Refused)


def test_patient_need_that_waits_comes_before_new_sales_and_recalls_nobody() -> None:
    book = a_book(4).with_claim(a_need(3, urgency=Urgency.PATIENT))
    assert isinstance(admit(book, a_sale(1), now=NOW), Admitted)
    refused = admit(book, a_sale(2), now=NOW)
    assert isinstance(refused, Refused)
    assert int(book.owner_need().max()) == 0


def test_what_runs_inside_a_recall_adds_nothing_to_need() -> None:
    parent = a_need(3)
    book = a_book(4).with_claim(parent).with_claim(a_need(3, parent=parent.id))
    assert int(book.owner_need()[0]) == 3


def test_what_is_late_still_counts_now() -> None:
    book = a_book(2).with_claim(a_sale(2, start=NOW - HOUR, lasting=30 * MINUTE)).at(NOW)
    refused = admit(book, a_sale(1), now=NOW)
    assert isinstance(refused, Refused)
    assert refused.earliest_at == NOW + 5 * MINUTE


@given(st.integers(0, 40 * 24 * 12), st.integers(0, 299))
def test_the_grid_is_cut_at_fixed_points_of_time(slots: int, offset: int) -> None:
    now = NOW + slots * 5 * MINUTE + seconds(offset)
    grid = grid_at(now)
    steps = [b - a for a, b in zip(grid.edges, grid.edges[1:], strict=False)]
    assert steps == sorted(steps)
    assert set(steps) == {timedelta(minutes=5), HOUR, DAY}
    assert 590 <= len(grid) <= 640
    assert grid.edges[0] <= now < grid.edges[1]
    fine = steps.count(timedelta(minutes=5)) * 5 * MINUTE
    assert 2 * HOUR <= fine < 3 * HOUR
    assert all(edge.hour == 11 and edge.minute == 0 for edge in grid.edges[-245:])
    later = grid_at(now + HOUR)
    assert set(grid.edges[1:]) - set(later.edges) <= {e for e in grid.edges if e <= now + HOUR}
