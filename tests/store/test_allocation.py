"""The book of capacity on rows: one lock, one generation, two processes that agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from sqlalchemy.exc import IntegrityError

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.ids import SeededIds
from sublet.base.store import Actor, Event, Store, Work, metadata, open_store, pending
from sublet.capacity import allocation, fleet
from sublet.capacity.allocation import (
    Admitted,
    Claim,
    Party,
    Rank,
    Refused,
    Release,
    Urgency,
    loops,
    service,
)
from sublet.capacity.allocation import store as rows
from sublet.capacity.allocation.book import PoolBook
from sublet.capacity.engines.port import FENCES, Device, Fence, Inventory

START = datetime(2026, 3, 2, 10, tzinfo=UTC)
SYSTEM = Actor.system("test")


def seconds(n: int) -> timedelta:
    return timedelta(seconds=n)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(START)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/sublet.db"


@pytest.fixture
def store(url: str, clock: VirtualClock) -> Iterator[Store]:
    opened = open_store(url, clock, SeededIds(1))
    metadata.create_all(opened.engine)
    yield opened
    opened.close()


def a_pool(store: Store, *nodes: int, shelf: int = 1000) -> str:
    """A pool with nodes of so many devices; everything may be sold firm unless said."""
    with store.work(SYSTEM) as work:
        for number, devices in enumerate(nodes):
            inventory = Inventory(
                node=f"node-{number}",
                devices=tuple(
                    Device(name=f"cpu{n}", kind="cpu", model="EPYC", memory_bytes=8 << 30)
                    for n in range(devices)
                ),
                disk_bytes=1 << 40,
                fences={n: Fence(strength="enforced", by="probe", evidence="") for n in FENCES},
                outbound="none",
                boot_id="boot",
            )
            node = fleet.enrol(work, inventory, site_name="home", trusted_tenants=False)
        allocation.open_pool(work, node.pool_id, firm_shelf_devices=shelf)
    return node.pool_id


def a_sale(
    work: Work,
    pool_id: str,
    devices: int = 1,
    *,
    rank: Rank = Rank.SPOT,
    notice: int | None = 120,
    stop: int = 32,
    firm: int = 0,
    lasting: timedelta | None = None,
    start: datetime | None = None,
    count: int = 1,
    whole_node: bool = False,
    organisation: str = "org_a",
) -> Claim:
    starts_at = start or work.now
    return Claim(
        id=work.ids.new("clm"),
        holder=work.ids.new("ins"),
        organisation_id=organisation,
        pool_id=pool_id,
        party=Party.SALE,
        rank=rank,
        devices=devices,
        count=count,
        whole_node=whole_node,
        starts_at=starts_at,
        release=Release(
            ends_at=None if lasting is None else starts_at + lasting,
            notice_seconds=notice,
            firm_seconds=firm,
            stop_seconds=stop,
        ),
        value_micros_per_device_hour=1_000_000,
    )


def an_owner_claim(
    work: Work,
    pool_id: str,
    devices: int = 1,
    *,
    urgency: Urgency = Urgency.URGENT,
    start: datetime | None = None,
    parent: str | None = None,
    holder: str | None = None,
) -> Claim:
    return Claim(
        id=work.ids.new("clm"),
        holder=holder or work.ids.new("ned"),
        organisation_id="org_owner",
        pool_id=pool_id,
        party=Party.FIRST_PARTY,
        urgency=urgency,
        rank=Rank.LEASE,
        devices=devices,
        starts_at=start or work.now,
        release=Release(notice_seconds=0),
        parent_claim_id=parent,
    )


def rent(store: Store, pool_id: str, devices: int = 1, **options: object) -> Claim:
    """A sale that is admitted, placed and running."""
    with store.work(SYSTEM) as work:
        decision = allocation.admit(work, a_sale(work, pool_id, devices, **options))  # type: ignore[arg-type]
        assert isinstance(decision, Admitted), decision
        assert allocation.place(work, decision.claim.id) is not None
        return allocation.opened(work, decision.claim.id, work.now)


def emitted(store: Store, kind: type[Event]) -> int:
    with store.read() as tx:
        return len(pending(tx, "test", [kind]))


def same(one: PoolBook, other: PoolBook) -> bool:
    return (
        np.array_equal(one.supply, other.supply)
        and np.array_equal(one.active, other.active)
        and np.array_equal(one.fixed, other.fixed)
        and np.array_equal(one.need, other.need)
        and dict(one.rolling) == dict(other.rolling)
        and one.waiting == other.waiting
        and {c.id: c for c in one.claims} == {c.id: c for c in other.claims}
    )


def test_the_last_device_is_sold_once_and_the_refusal_names_a_true_instant(
    store: Store, clock: VirtualClock
) -> None:
    pool_id = a_pool(store, 1)
    rent(store, pool_id, lasting=timedelta(minutes=10))
    refusals = []
    for _ in range(5):
        with store.work(SYSTEM) as work:
            sale = a_sale(work, pool_id, lasting=timedelta(minutes=10))
            decision = allocation.admit(work, sale)
            assert isinstance(decision, Refused)
            refusals.append(decision)
    assert {r.earliest_at for r in refusals} == {START + timedelta(minutes=15)}
    with store.read() as tx:
        (held,) = allocation.list_active_claims(tx, pool_id)
    clock.advance_to(START + seconds(632))
    with store.work(SYSTEM) as work:
        allocation.release(work, held.id)
    clock.advance_to(START + timedelta(minutes=15))
    rent(store, pool_id, lasting=timedelta(minutes=10))


def test_only_open_ended_equals_in_the_way_is_no_instant_but_an_offer_to_wait(
    store: Store,
) -> None:
    pool_id = a_pool(store, 2)
    rent(store, pool_id, 2)
    with store.work(SYSTEM) as work:
        decision = allocation.admit(work, a_sale(work, pool_id))
    assert isinstance(decision, Refused)
    assert decision.earliest_at is None
    assert decision.offer_to_wait
    assert decision.reason is allocation.RefusalReason.SOLD


def test_a_rolled_back_work_leaves_no_trace_in_the_book(store: Store) -> None:
    pool_id = a_pool(store, 1)

    def sell_and_fail() -> None:
        with store.work(SYSTEM) as work:
            assert isinstance(allocation.admit(work, a_sale(work, pool_id)), Admitted)
            raise RuntimeError("the caller thought better of it")

    with pytest.raises(RuntimeError):
        sell_and_fail()
    rent(store, pool_id)


def test_two_processes_keep_the_same_book(store: Store, url: str, clock: VirtualClock) -> None:
    """Each store has an engine of its own, so a cache of its own, as two processes have."""
    pool_id = a_pool(store, 8)
    other = open_store(url, clock, SeededIds(2))
    try:
        first = rent(store, pool_id, 2)
        rent(other, pool_id, 3, rank=Rank.ON_DEMAND, firm=3600, notice=3600)
        with store.work(SYSTEM) as work:
            allocation.give_notice(
                work,
                first.id,
                reason="owner_recall",
                term_at=allocation.earliest_term_at(first, work.now),
            )
        clock.advance_to(START + timedelta(minutes=7))
        with other.work(SYSTEM) as work:
            allocation.release(work, first.id)
        rent(store, pool_id, 1)
        with store.read() as mine, other.read() as theirs:
            one = allocation.get_book(mine, pool_id, now=clock.now())
            two = allocation.get_book(theirs, pool_id, now=clock.now())
            fresh = PoolBook.empty(pool_id, now=clock.now(), supply=8).with_changes(
                allocation.list_active_claims(mine, pool_id), one.generation
            )
        assert one.generation == two.generation
        assert same(one, two)
        assert same(one, fresh)
        assert one.claims.find(first.id) is None
    finally:
        other.close()


def test_a_device_has_one_holder_and_the_database_insists(store: Store) -> None:
    pool_id = a_pool(store, 2)
    held = rent(store, pool_id)
    with store.read() as tx:
        (placement,) = allocation.placements_of(tx, held.id)
        holder = allocation.holder_of_device(tx, placement.device_id)
    assert holder is not None
    assert holder.id == held.id
    with pytest.raises(IntegrityError), store.work(SYSTEM) as work:
        rows.insert_placements(work.tx, [replace(placement, claim_id="clm_other")])
    with store.work(SYSTEM) as work:
        allocation.release(work, held.id)
    with store.read() as tx:
        assert allocation.holder_of_device(tx, placement.device_id) is None


def test_release_twice_is_releasing_once(store: Store) -> None:
    pool_id = a_pool(store, 1)
    held = rent(store, pool_id)
    for _ in range(2):
        with store.work(SYSTEM) as work:
            allocation.release(work, held.id)
    assert emitted(store, allocation.ClaimReleased) == 1


def test_placing_twice_gives_the_same_devices(store: Store) -> None:
    pool_id = a_pool(store, 4)
    held = rent(store, pool_id, 2)
    with store.work(SYSTEM) as work:
        first = allocation.place(work, held.id)
        assert allocation.place(work, held.id) == first


def test_a_notice_is_never_shorter_than_what_was_sold(store: Store) -> None:
    pool_id = a_pool(store, 1)
    held = rent(store, pool_id, rank=Rank.ON_DEMAND, firm=3600, notice=1800)
    assert allocation.earliest_term_at(held, START) == START + seconds(3600)
    with pytest.raises(AssertionError), store.work(SYSTEM) as work:
        allocation.give_notice(work, held.id, reason="owner_recall", term_at=START + seconds(3599))
    with store.work(SYSTEM) as work:
        noticed = allocation.give_notice(
            work, held.id, reason="owner_recall", term_at=START + seconds(3600)
        )
        again = allocation.give_notice(
            work, held.id, reason="owner_recall", term_at=START + seconds(9000)
        )
    assert noticed.free_by == START + seconds(3632)
    assert again == noticed
    assert emitted(store, allocation.ClaimNoticed) == 1


def test_a_withdrawn_notice_is_not_repeated_within_ten_minutes(
    store: Store, clock: VirtualClock
) -> None:
    pool_id = a_pool(store, 1)
    held = rent(store, pool_id)
    with store.work(SYSTEM) as work:
        allocation.give_notice(work, held.id, reason="owner_recall", term_at=START + seconds(120))
    clock.advance_to(START + seconds(60))
    with store.work(SYSTEM) as work:
        withdrawn = allocation.withdraw_notice(work, held.id)
    assert withdrawn.term_at is None
    assert emitted(store, allocation.NoticeWithdrawn) == 1
    clock.advance_to(START + seconds(659))
    with pytest.raises(allocation.NoticeRecentlyWithdrawn), store.work(SYSTEM) as work:
        allocation.give_notice(work, held.id, reason="owner_recall", term_at=START + seconds(900))
    clock.advance_to(START + seconds(660))
    with store.work(SYSTEM) as work:
        allocation.give_notice(work, held.id, reason="owner_recall", term_at=START + seconds(780))
    clock.advance_to(START + seconds(780))
    with pytest.raises(allocation.NoticeInForce), store.work(SYSTEM) as work:
        allocation.withdraw_notice(work, held.id)


def test_what_has_no_notice_gets_none(store: Store) -> None:
    pool_id = a_pool(store, 1)
    held = rent(store, pool_id, rank=Rank.BLOCK, notice=None, lasting=timedelta(days=6))
    with pytest.raises(allocation.NotNoticeable), store.work(SYSTEM) as work:
        allocation.give_notice(work, held.id, reason="owner_recall", term_at=START)


def test_a_higher_rank_displaces_a_lower_one_by_its_terms(
    store: Store, clock: VirtualClock
) -> None:
    pool_id = a_pool(store, 2)
    spot = rent(store, pool_id, 2)
    with store.work(SYSTEM) as work:
        decision = allocation.admit(
            work, a_sale(work, pool_id, rank=Rank.ON_DEMAND, firm=3600, notice=3600)
        )
    assert isinstance(decision, Admitted)
    starts_at = START + seconds(152) + service.NOTICE_SLACK
    assert decision.claim.starts_at == starts_at
    (pin,) = decision.displaced
    assert (pin.claim_id, pin.free_by) == (spot.id, starts_at)
    assert pin.notice_at == START + service.NOTICE_SLACK
    assert emitted(store, allocation.ClaimNoticed) == 1
    with store.work(SYSTEM) as work:
        told = allocation.get_claim(work.tx, spot.id)
        assert told.notice_reason == "spot_interruption"
        assert told.term_at == pin.term_at
        assert allocation.place(work, decision.claim.id) is None
    clock.advance_to(starts_at)
    with store.work(SYSTEM) as work:
        assert allocation.place(work, decision.claim.id) is None
        allocation.release(work, spot.id)
        assert allocation.place(work, decision.claim.id) is not None


def test_a_longer_notice_is_given_at_its_last_moment(store: Store, clock: VirtualClock) -> None:
    pool_id = a_pool(store, 1)
    rent(store, pool_id, notice=1800)
    with store.work(SYSTEM) as work:
        decision = allocation.admit(
            work, a_sale(work, pool_id, rank=Rank.ON_DEMAND, firm=3600, notice=3600)
        )
    assert isinstance(decision, Admitted)
    (pin,) = decision.displaced
    assert loops.step(store, clock.now()) == START + loops.AT_LEAST_EVERY
    assert emitted(store, allocation.ClaimNoticed) == 0
    clock.advance_to(pin.notice_at - service.NOTICE_SLACK)
    loops.step(store, clock.now())
    assert emitted(store, allocation.ClaimNoticed) == 1


def test_a_withdrawn_notice_is_repeated_for_a_sale_when_it_may_be(
    store: Store, clock: VirtualClock
) -> None:
    pool_id = a_pool(store, 1)
    spot = rent(store, pool_id)
    with store.work(SYSTEM) as work:
        allocation.give_notice(
            work, spot.id, reason="price", term_at=allocation.earliest_term_at(spot, work.now)
        )
        allocation.withdraw_notice(work, spot.id)
    clock.advance_to(START + timedelta(minutes=8))
    with store.work(SYSTEM) as work:
        decision = allocation.admit(
            work, a_sale(work, pool_id, rank=Rank.ON_DEMAND, firm=3600, notice=3600)
        )
    assert isinstance(decision, Admitted)
    may_be_told_at = START + timedelta(minutes=10)
    assert decision.claim.starts_at == may_be_told_at + seconds(152)
    clock.advance_to(may_be_told_at - seconds(1))
    loops.step(store, clock.now())
    assert emitted(store, allocation.ClaimNoticed) == 1
    clock.advance_to(may_be_told_at)
    loops.step(store, clock.now())
    assert emitted(store, allocation.ClaimNoticed) == 2


def test_who_leaves_sooner_lets_the_sale_begin_sooner(store: Store, clock: VirtualClock) -> None:
    pool_id = a_pool(store, 1)
    spot = rent(store, pool_id)
    with store.work(SYSTEM) as work:
        decision = allocation.admit(
            work, a_sale(work, pool_id, rank=Rank.ON_DEMAND, firm=3600, notice=3600)
        )
    assert isinstance(decision, Admitted)
    promised = decision.claim.starts_at
    clock.advance_to(START + seconds(40))
    with store.work(SYSTEM) as work:
        assert allocation.begin_early(work, decision.claim.id).starts_at == promised
        allocation.release(work, spot.id)
        assert allocation.place(work, decision.claim.id) is None
        begun = allocation.begin_early(work, decision.claim.id)
        assert (begun.starts_at, begun.asked_at) == (clock.now(), START)
        assert allocation.place(work, decision.claim.id) is not None


def test_a_block_dated_ahead_begins_when_it_was_asked_to(store: Store, clock: VirtualClock) -> None:
    pool_id = a_pool(store, 1)
    tomorrow = START + timedelta(days=1)
    with store.work(SYSTEM) as work:
        block = a_sale(
            work,
            pool_id,
            rank=Rank.BLOCK,
            notice=None,
            lasting=timedelta(hours=5),
            start=tomorrow,
        )
        decision = allocation.admit(work, block)
    assert isinstance(decision, Admitted)
    clock.advance_to(START + timedelta(hours=1))
    with store.work(SYSTEM) as work:
        assert allocation.begin_early(work, block.id) == decision.claim
        assert allocation.place(work, block.id) is None
        kept = allocation.get_claim(work.tx, block.id)
    assert (kept.starts_at, kept.release.ends_at) == (tomorrow, tomorrow + timedelta(hours=5))
    clock.advance_to(tomorrow)
    with store.work(SYSTEM) as work:
        assert allocation.place(work, block.id) is not None


def test_who_was_displaced_for_nothing_stays(store: Store, clock: VirtualClock) -> None:
    pool_id = a_pool(store, 1)
    spot = rent(store, pool_id)
    with store.work(SYSTEM) as work:
        decision = allocation.admit(
            work, a_sale(work, pool_id, rank=Rank.ON_DEMAND, firm=3600, notice=3600)
        )
    assert isinstance(decision, Admitted)
    clock.advance_to(START + seconds(100))
    loops.step(store, clock.now())
    assert emitted(store, allocation.ClaimNoticed) == 1
    with store.work(SYSTEM) as work:
        allocation.release(work, decision.claim.id)
        assert allocation.get_claim(work.tx, spot.id).term_at is None
    assert emitted(store, allocation.NoticeWithdrawn) == 1


def test_the_owners_claim_is_never_refused_and_keeps_new_sales_out(store: Store) -> None:
    pool_id = a_pool(store, 2)
    rent(store, pool_id, 2)
    with store.work(SYSTEM) as work:
        filed = allocation.file_first_party(work, an_owner_claim(work, pool_id, 2))
        assert allocation.place(work, filed.id) is None
        decision = allocation.admit(work, a_sale(work, pool_id))
    assert isinstance(decision, Refused)


def test_work_inside_a_recall_holds_its_devices_and_adds_no_need(store: Store) -> None:
    pool_id = a_pool(store, 4)
    with store.work(SYSTEM) as work:
        recall = allocation.file_first_party(
            work,
            an_owner_claim(work, pool_id, 3, urgency=Urgency.COMMITTED, holder="rec_1"),
        )
        top = allocation.place(work, recall.id)
        child = allocation.file_first_party(
            work, an_owner_claim(work, pool_id, 2, parent=recall.id)
        )
        inner = allocation.place(work, child.id)
        second = allocation.file_first_party(
            work, an_owner_claim(work, pool_id, 2, parent=recall.id)
        )
        assert allocation.place(work, second.id) is None
        book = allocation.get_book(work, pool_id)
    assert top is not None
    assert inner is not None
    assert set(inner) < set(top)
    assert int(book.owner_need()[0]) == 3
    with pytest.raises(allocation.ParentInUse), store.work(SYSTEM) as work:
        allocation.release(work, recall.id)
    rent(store, pool_id, 1)


def test_a_recall_given_back_leaves_alone_what_still_waits_inside_it(store: Store) -> None:
    pool_id = a_pool(store, 2)
    with store.work(SYSTEM) as work:
        recall = allocation.file_first_party(work, an_owner_claim(work, pool_id, 2))
        waiting = allocation.file_first_party(
            work, an_owner_claim(work, pool_id, 1, parent=recall.id)
        )
        assert allocation.release_around(work, recall.id) == frozenset()
        assert allocation.get_claim(work.tx, waiting.id).parent_claim_id is None
        assert rows.list_placements(work.tx, pool_id) == []
        assert allocation.place(work, waiting.id) is not None


def test_a_dated_need_of_the_owner_gets_its_notices_at_the_last_moment(
    store: Store, clock: VirtualClock
) -> None:
    pool_id = a_pool(store, 2)
    spot = [rent(store, pool_id), rent(store, pool_id)]
    need_at = START + timedelta(minutes=20)
    with store.work(SYSTEM) as work:
        allocation.file_first_party(
            work, an_owner_claim(work, pool_id, 1, urgency=Urgency.COMMITTED, start=need_at)
        )
    last_moment = need_at - seconds(152)
    clock.advance_to(last_moment - seconds(5))
    assert loops.step(store, clock.now()) == last_moment
    assert emitted(store, allocation.ClaimNoticed) == 0
    clock.advance_to(last_moment)
    loops.step(store, clock.now())
    with store.read() as tx:
        told = [allocation.get_claim(tx, claim.id) for claim in spot]
    (one,) = [claim for claim in told if claim.noticed_at is not None]
    assert one.free_by == need_at
    assert one.notice_reason == "owner_recall"


def test_the_shelf_bounds_what_is_sold_firm(store: Store) -> None:
    pool_id = a_pool(store, 4, shelf=0)
    with store.work(SYSTEM) as work:
        firm = a_sale(work, pool_id, 2, rank=Rank.ON_DEMAND, firm=3600, notice=3600)
        refused = allocation.admit(work, firm)
        assert isinstance(refused, Refused)
        assert refused.reason is allocation.RefusalReason.FIRM_SHELF
        allocation.set_firm_shelf(work, pool_id, 2, START + timedelta(days=1))
        assert isinstance(allocation.admit(work, firm), Admitted)
        more = a_sale(work, pool_id, 1, rank=Rank.ON_DEMAND, firm=3600, notice=3600)
        assert isinstance(allocation.admit(work, more), Refused)
        assert isinstance(allocation.admit(work, a_sale(work, pool_id, 2)), Admitted)
    with store.read() as tx:
        shelf = allocation.find_pool(tx, pool_id)
    assert shelf is not None
    assert shelf.firm_shelf_devices == 2


def test_many_nodes_fractions_pack_and_whole_nodes_bind_late(store: Store) -> None:
    pool_id = a_pool(store, 4, 4, 4)
    rent(store, pool_id, 2)
    rent(store, pool_id, 2)
    with store.work(SYSTEM) as work:
        whole = allocation.admit(work, a_sale(work, pool_id, 4, count=2, whole_node=True))
        assert isinstance(whole, Admitted)
        assert not allocation.placements_of(work.tx, whole.claim.id)
        # Both empty nodes are promised, so not even one device of them is sold apart.
        refused = allocation.admit(work, a_sale(work, pool_id, 1))
        assert isinstance(refused, Refused)
        devices = allocation.place(work, whole.claim.id)
        assert devices is not None
        assert len(devices) == 8


def test_free_devices_apart_do_not_make_a_unit(store: Store) -> None:
    pool_id = a_pool(store, 2, 2)
    first = [rent(store, pool_id) for _ in range(4)]
    with store.read() as tx:
        node_of = {c.id: allocation.placements_of(tx, c.id)[0].node_id for c in first}
    one = next(c for c in first if node_of[c.id] == node_of[first[0].id])
    two = next(c for c in first if node_of[c.id] != node_of[one.id])
    with store.work(SYSTEM) as work:
        allocation.release(work, one.id)
        allocation.release(work, two.id)
        refused = allocation.admit(work, a_sale(work, pool_id, 2))
        assert isinstance(refused, Refused)
        assert refused.reason is allocation.RefusalReason.NODES
    rent(store, pool_id, 1, count=2)
