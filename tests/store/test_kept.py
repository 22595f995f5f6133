"""What a process keeps between Works is what the rows say: rosters, floors, whoever changed them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.ids import SeededIds
from sublet.base.store import Actor, Store, Work, metadata, open_store
from sublet.capacity import allocation, fleet
from sublet.capacity.allocation import Admitted, Claim, Party, Rank, Release
from sublet.capacity.allocation.book import Nodes
from sublet.capacity.engines.port import FENCES, Device, Fence, Inventory

START = datetime(2026, 3, 2, 10, tzinfo=UTC)
SYSTEM = Actor.system("test")
NODES, DEVICES = 3, 4


def an_inventory(number: int, devices: int = DEVICES) -> Inventory:
    return Inventory(
        node=f"node-{number}",
        devices=tuple(
            Device(name=f"gpu{n}", kind="gpu", model="H100", memory_bytes=80 << 30)
            for n in range(devices)
        ),
        disk_bytes=1 << 40,
        fences={n: Fence(strength="enforced", by="probe", evidence="") for n in FENCES},
        outbound="none",
        boot_id="boot",
    )


def enrol(work: Work, inventory: Inventory) -> fleet.Node:
    return fleet.enrol(work, inventory, site_name="home", trusted_tenants=False)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(START)


@pytest.fixture
def stores(tmp_path: Path, clock: VirtualClock) -> Iterator[tuple[Store, Store]]:
    """Two processes on one database."""
    url = f"sqlite:///{tmp_path}/sublet.db"
    one, two = (open_store(url, clock, SeededIds(seed)) for seed in (1, 2))
    metadata.create_all(one.engine)
    yield one, two
    one.close()
    two.close()


def a_pool(store: Store) -> str:
    with store.work(SYSTEM) as work:
        for number in range(NODES):
            node = enrol(work, an_inventory(number))
        allocation.open_pool(work, node.pool_id, firm_shelf_devices=NODES * DEVICES)
    return node.pool_id


def cordon(work: Work, pool_id: str) -> None:
    [node, *_] = fleet.list_nodes(work.tx, pool_id)
    fleet.set_node_state(work, node.id, "cordoned", "test")


def miss(work: Work, pool_id: str) -> None:
    [node, *_] = fleet.list_nodes(work.tx, pool_id)
    fleet.look(work, node.id, an_inventory(0, devices=DEVICES - 1))


CHANGES: dict[str, Callable[[Work, str], object]] = {
    "a node's state": cordon,
    "a device that is missed": miss,
    "a setting": lambda work, pool_id: fleet.set_pool(work, pool_id, head_room_percent=7),
    "a start that failed": lambda work, pool_id: fleet.note_start_failure(
        work, fleet.list_nodes(work.tx, pool_id)[0].id
    ),
    "one more node": lambda work, _: enrol(work, an_inventory(NODES)),
    "the same node again": lambda work, _: enrol(work, replace(an_inventory(0), boot_id="two")),
}


def roster_is_what_the_rows_say(store: Store, pool_id: str) -> bool:
    with store.read() as tx:
        roster = fleet.get_roster(tx, pool_id)
        return (
            roster.pool == fleet.get_pool(tx, pool_id)
            and list(roster.nodes) == fleet.list_nodes(tx, pool_id)
            and list(roster.devices) == fleet.list_devices(tx, pool_id)
        )


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_fleet_is_seen_at_once_by_every_process(
    stores: tuple[Store, Store], change: str
) -> None:
    mine, theirs = stores
    pool_id = a_pool(mine)
    with mine.read() as tx:
        before = fleet.get_roster(tx, pool_id)
        assert fleet.get_roster(tx, pool_id) is before
    assert roster_is_what_the_rows_say(theirs, pool_id)
    with theirs.work(SYSTEM) as work:
        CHANGES[change](work, pool_id)
    for store in stores:
        assert roster_is_what_the_rows_say(store, pool_id)
        with store.read() as tx:
            assert fleet.get_roster(tx, pool_id) != before


def test_what_is_rolled_back_was_never_there(stores: tuple[Store, Store]) -> None:
    mine, _ = stores
    pool_id = a_pool(mine)

    def cordon_and_fail(work: Work) -> None:
        cordon(work, pool_id)
        assert len(fleet.get_roster(work.tx, pool_id).sellable) == DEVICES * (NODES - 1)
        raise RuntimeError

    with pytest.raises(RuntimeError), mine.work(SYSTEM) as work:
        cordon_and_fail(work)
    with mine.work(SYSTEM) as work:
        assert len(fleet.get_roster(work.tx, pool_id).sellable) == DEVICES * NODES
        miss(work, pool_id)
    with mine.work(SYSTEM) as work:
        assert [d.misses for d in fleet.get_roster(work.tx, pool_id).devices].count(1) == 1


# ---- the floor --------------------------------------------------------------------------------


def a_sale(work: Work, pool_id: str, devices: int, *, whole_node: bool, wait: bool) -> Claim:
    start = work.now + timedelta(minutes=5) if wait else work.now
    return Claim(
        id=work.ids.new("clm"),
        holder=work.ids.new("ins"),
        organisation_id="org_a",
        pool_id=pool_id,
        party=Party.SALE,
        rank=Rank.SPOT,
        devices=devices,
        whole_node=whole_node,
        starts_at=start,
        release=Release(notice_seconds=120, stop_seconds=32),
    )


acts = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(["rent", "rent", "node", "later", "place", "release", "cordon", "back"]),
        st.integers(0, 11),
    ),
    max_size=12,
)


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(acts)
def test_processes_that_take_turns_never_stand_on_each_others_devices(
    tmp_path_factory: pytest.TempPathFactory, done: list[tuple[int, str, int]]
) -> None:
    clock = VirtualClock(START)
    url = f"sqlite:///{tmp_path_factory.mktemp('kept')}/sublet.db"
    stores = [open_store(url, clock, SeededIds(seed)) for seed in (1, 2, 3)]
    cold = stores.pop()
    metadata.create_all(cold.engine)
    pool_id = a_pool(cold)
    for turn, act, pick in done:
        with stores[turn].work(SYSTEM) as work:
            _act(work, pool_id, act, pick)
        clock.advance_to(clock.now() + timedelta(minutes=2))
    books = []
    for store in stores:
        with store.read() as tx:
            books.append(allocation.get_book(tx, pool_id, now=clock.now()))
    cold.close()
    fresh = open_store(url, clock, SeededIds(4))
    with fresh.read() as tx:
        truth = allocation.get_book(tx, pool_id, now=clock.now())
    for book in books:
        assert book.generation == truth.generation
        assert columns(book.nodes) == columns(truth.nodes)
    for store in (*stores, fresh):
        store.close()


def columns(nodes: Nodes | None) -> object:
    if nodes is None:
        return None
    return list(nodes.free), list(nodes.devices), nodes.fractions, nodes.unbound_whole


def _act(work: Work, pool_id: str, act: str, pick: int) -> None:
    """One thing that a process may do. A device with two holders would break an index."""
    claims = allocation.list_active_claims(work.tx, pool_id)
    nodes = fleet.list_nodes(work.tx, pool_id)
    node = nodes[pick % len(nodes)]
    if act in ("rent", "node", "later"):
        is_whole = act == "node"
        devices = DEVICES if is_whole else 1 + pick % 3
        sale = a_sale(work, pool_id, devices, whole_node=is_whole, wait=act == "later")
        decision = allocation.admit(work, sale)
        if isinstance(decision, Admitted) and act != "later":
            allocation.place(work, decision.claim.id)
    elif act == "cordon" and node.state == "production":
        fleet.set_node_state(work, node.id, "cordoned", "test")
    elif act == "back" and node.state == "cordoned":
        fleet.set_node_state(work, node.id, "production", "test")
    elif claims and act == "place":
        allocation.place(work, claims[pick % len(claims)].id)
    elif claims and act == "release":
        allocation.release(work, claims[pick % len(claims)].id)
