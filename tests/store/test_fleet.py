"""The fleet: enrolment, looks, node states, cost facts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.errors import Invalid
from sublet.base.kernel.ids import SeededIds
from sublet.base.store import Actor, Event, Store, metadata, open_store
from sublet.base.store.work import Work
from sublet.capacity import fleet
from sublet.capacity.engines.port import FENCES, Device, Fence, Inventory
from sublet.capacity.fleet.costs import parse_costs
from sublet.capacity.fleet.states import TRANSITIONS, NodeState, Sight, judge
from sublet.records import metering

START = datetime(2026, 3, 2, 10, tzinfo=UTC)
SYSTEM = Actor.system("test")


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(START)


@pytest.fixture
def store(tmp_path: Path, clock: VirtualClock) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path}/sublet.db", clock, SeededIds(1))
    metadata.create_all(opened.engine)
    yield opened
    opened.close()


def an_inventory(
    devices: int = 4,
    *,
    kind: str = "cpu",
    model: str = "EPYC",
    node: str = "here",
    memory: int = 8 << 30,
    weak: tuple[str, ...] = (),
    outbound: str = "none",
) -> Inventory:
    fences = {
        name: Fence(strength="none" if name in weak else "enforced", by="probe", evidence="held")
        for name in FENCES
    }
    return Inventory(
        node=node,
        devices=tuple(
            Device(name=f"{kind}{n}", kind=kind, model=model, memory_bytes=memory)  # type: ignore[arg-type]
            for n in range(devices)
        ),
        disk_bytes=1 << 40,
        fences=fences,
        outbound=outbound,  # type: ignore[arg-type]
        boot_id="boot-1",
    )


def enrol(work: Work, inventory: Inventory, site: str = "home") -> fleet.Node:
    return fleet.enrol(work, inventory, site_name=site, trusted_tenants=False)


def without(inventory: Inventory, name: str) -> Inventory:
    return replace(inventory, devices=tuple(d for d in inventory.devices if d.name != name))


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]


def uses(work: Work, pool_id: str) -> list[str]:
    return [
        str(metering.list_spans(work.tx, device.id)[-1].use)
        for device in fleet.list_devices(work.tx, pool_id)
    ]


def test_a_machine_is_enrolled_into_production_with_its_devices_idle(store: Store) -> None:
    with store.work(SYSTEM) as work:
        node = enrol(work, an_inventory())
        pool = fleet.get_pool(work.tx, node.pool_id)
        assert node.state == NodeState.PRODUCTION
        assert (pool.device_kind, pool.scrub_seconds, pool.head_room_percent) == ("cpu", 2, 2)
        assert [d.name for d in fleet.sellable_devices(work.tx, pool.id)] == [
            "cpu0",
            "cpu1",
            "cpu2",
            "cpu3",
        ]
        assert uses(work, pool.id) == ["idle"] * 4
        assert fleet.get_site(work.tx, pool.site_id).name == "home"


def test_enrolling_again_keeps_ids_and_state_and_takes_what_changed(store: Store) -> None:
    with store.work(SYSTEM) as work:
        first = enrol(work, an_inventory())
        fleet.set_node_state(work, first.id, NodeState.CORDONED, "hands off")
        before = fleet.list_devices(work.tx, first.pool_id)
    with store.work(SYSTEM) as work:
        grown = replace(an_inventory(5, memory=6 << 30, weak=("cpu",)), boot_id="boot-2")
        again = enrol(work, grown)
        after = fleet.list_devices(work.tx, first.pool_id)
        assert (again.id, again.state, again.boot_id) == (first.id, NodeState.CORDONED, "boot-2")
        assert [d.id for d in after[:4]] == [d.id for d in before]
        assert len(after) == 5
        assert fleet.get_pool(work.tx, first.pool_id).memory_bytes == 6 << 30
        assert again.fences["cpu"]["strength"] == "none"
        assert again.version > first.version


def test_more_nodes_and_sites_fit(store: Store) -> None:
    with store.work(SYSTEM) as work:
        one = enrol(work, an_inventory(node="a"))
        alike = enrol(work, an_inventory(node="b", memory=16 << 30))
        weaker = enrol(work, an_inventory(node="c", memory=4 << 30))
        other = enrol(work, an_inventory(node="d", kind="gpu", model="H100"))
        away = enrol(work, an_inventory(node="e"), site="away")
        assert alike.pool_id == one.pool_id
        assert len({one.pool_id, weaker.pool_id, other.pool_id, away.pool_id}) == 4
        assert fleet.get_pool(work.tx, other.pool_id).scrub_seconds == 60
        assert len(fleet.sellable_devices(work.tx, one.pool_id)) == 8
        # A site that no cost facts name takes the first one's.
        assert [site.tariff_micros_per_kwh for site in fleet.list_sites(work.tx)] == [89_200] * 2


def test_a_node_of_two_models_sells_the_one_it_has_more_of(store: Store) -> None:
    mixed = an_inventory(3, kind="gpu", model="H100")
    odd = Device(name="old", kind="gpu", model="T4", memory_bytes=16 << 30)
    with store.work(SYSTEM) as work:
        node = enrol(work, replace(mixed, devices=(odd, *mixed.devices)))
        assert len(fleet.list_devices(work.tx, node.pool_id)) == 3
        assert fleet.get_pool(work.tx, node.pool_id).device_model == "H100"


def test_a_node_without_devices_is_refused(store: Store) -> None:
    with store.work(SYSTEM) as work, pytest.raises(Invalid, match="no device"):
        enrol(work, an_inventory(0))


def test_a_device_goes_down_after_three_looks_and_a_minute(
    store: Store, clock: VirtualClock
) -> None:
    whole = an_inventory()
    gone = without(whole, "cpu1")
    with store.work(SYSTEM) as work:
        node = enrol(work, whole)
    for second, sellable in ((1, 4), (31, 4), (60, 4), (61, 3)):
        clock.advance_to(START + timedelta(seconds=second))
        with store.work(SYSTEM) as work:
            fleet.look(work, node.id, gone)
            assert len(fleet.sellable_devices(work.tx, node.pool_id)) == sellable
            assert kinds(work.emitted) == (["fleet.device_down"] if sellable == 3 else [])
    with store.work(SYSTEM) as work:
        assert uses(work, node.pool_id) == ["idle", "down", "idle", "idle"]
        down = fleet.list_devices(work.tx, node.pool_id)[1]
        assert fleet.resting_use(work.tx, down.id) == "down"
        fleet.look(work, node.id, whole)
        assert kinds(work.emitted) == ["fleet.device_up"]
        assert len(fleet.sellable_devices(work.tx, node.pool_id)) == 4


def test_many_looks_within_a_minute_change_nothing(store: Store, clock: VirtualClock) -> None:
    whole = an_inventory()
    with store.work(SYSTEM) as work:
        node = enrol(work, whole)
    for second in range(1, 60):
        clock.advance_to(START + timedelta(seconds=second))
        with store.work(SYSTEM) as work:
            fleet.look(work, node.id, without(whole, "cpu0"))
    with store.work(SYSTEM) as work:
        fleet.look(work, node.id, whole)
        assert len(fleet.sellable_devices(work.tx, node.pool_id)) == 4
        assert work.emitted == []


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 90)), max_size=40))
def test_a_device_is_down_exactly_while_a_run_of_misses_is_long_enough(
    looks: list[tuple[bool, int]],
) -> None:
    sight = Sight(healthy=True, misses=0, missed_since=None)
    now, missed = START, []
    for seen_well, seconds in looks:
        now += timedelta(seconds=seconds)
        missed = [] if seen_well else [*missed, now]
        sight = judge(sight, seen_well=seen_well, now=now)
        is_gone = len(missed) >= 3 and missed[-1] - missed[0] >= timedelta(minutes=1)
        assert sight.healthy == (not is_gone)


def test_a_held_device_keeps_its_time_until_it_is_let_go(store: Store, clock: VirtualClock) -> None:
    with store.work(SYSTEM) as work:
        node = enrol(work, an_inventory(2))
        held = fleet.list_devices(work.tx, node.pool_id)[0]
        metering.switch_device(work, held.id, "sold_used", work.now)
    clock.advance_to(START + timedelta(minutes=5))
    with store.work(SYSTEM) as work:
        fleet.set_node_state(work, node.id, NodeState.TRIAGE, "not clean")
        assert uses(work, node.pool_id) == ["sold_used", "down"]
        assert fleet.resting_use(work.tx, held.id) == "down"


def test_three_start_failures_in_a_row_take_the_node_out(store: Store) -> None:
    with store.work(SYSTEM) as work:
        node = enrol(work, an_inventory())
        fleet.note_start_failure(work, node.id)
        fleet.note_start_failure(work, node.id)
        fleet.note_start_success(work, node.id)
        for _ in range(2):
            assert fleet.note_start_failure(work, node.id).state == NodeState.PRODUCTION
        out = fleet.note_start_failure(work, node.id)
        assert out.state == NodeState.TRIAGE
        assert fleet.sellable_devices(work.tx, node.pool_id) == []
        assert uses(work, node.pool_id) == ["down"] * 4


def test_a_node_goes_round_the_whole_table(store: Store) -> None:
    round_trip = [
        "cordoned",
        "draining",
        "scrubbing",
        "triage",
        "repair",
        "onboard",
        "burn_in",
        "production",
        "cordoned",
        "production",
        "cordoned",
        "draining",
        "cordoned",
    ]
    with store.work(SYSTEM) as work:
        node = enrol(work, an_inventory(1))
        seen = []
        for state in round_trip:
            assert fleet.set_node_state(work, node.id, state, "test").state == state
            seen.append(uses(work, node.pool_id)[0])
        assert seen[:8] == ["idle", "idle", "overhead", "down", "down", *["overhead"] * 2, "idle"]


@pytest.mark.parametrize("state", list(NodeState))
def test_only_the_table_moves_a_node(store: Store, state: NodeState) -> None:
    way = {
        "production": "",
        "cordoned": "cordoned",
        "draining": "cordoned draining",
        "scrubbing": "cordoned draining scrubbing",
        "triage": "triage",
        "repair": "triage repair",
        "onboard": "triage repair onboard",
        "burn_in": "triage repair onboard burn_in",
    }
    with store.work(SYSTEM) as work:
        node = enrol(work, an_inventory(1))
        for step in way[state].split():
            fleet.set_node_state(work, node.id, step, "test")
        for target in NodeState:
            if target in TRANSITIONS[state] or target == state:
                continue
            with pytest.raises(fleet.NodeStateRefused) as refused:
                fleet.set_node_state(work, node.id, target, "test")
            assert refused.value.details["state"] == state
            assert set(refused.value.details["allowed"]) == TRANSITIONS[state]
        with pytest.raises(Invalid, match="`state` is one of"):
            fleet.set_node_state(work, node.id, "asleep", "test")


def test_the_fence_table_names_what_strangers_miss(store: Store) -> None:
    with store.work(SYSTEM) as work:
        node = enrol(work, an_inventory(weak=("network", "cpu", "memory")))
        assert fleet.missing_for_strangers(node) == ("network", "memory")


def test_unknown_things_are_not_found(store: Store) -> None:
    with store.read() as tx:
        with pytest.raises(fleet.PoolNotFound):
            fleet.get_pool(tx, "pol_none")
        with pytest.raises(fleet.NodeNotFound):
            fleet.get_node(tx, "nod_none")


def test_cost_facts_find_their_pool_by_the_longest_match(store: Store) -> None:
    with store.work(SYSTEM) as work:
        fleet.load_costs(work, fleet.seed_costs())
        pools = {
            model: enrol(work, an_inventory(node=model, kind=kind, model=model)).pool_id
            for kind, model in (("cpu", "EPYC"), ("gpu", "NVIDIA H100 80GB HBM3"), ("gpu", "T4"))
        }
        found = {model: fleet.get_cost(work.tx, pool).name for model, pool in pools.items()}
        assert found == {"EPYC": "logical-cpu", "NVIDIA H100 80GB HBM3": "h100", "T4": "gpu"}
        h100 = fleet.get_cost(work.tx, pools["NVIDIA H100 80GB HBM3"])
        site = fleet.list_sites(work.tx)[0]
        # 1.275 kW × 1.58 × 0.0892 USD + 0.059 = 0.2386934 USD
        assert fleet.floor_micros_per_device_hour(h100, site) == 238_694
        assert site.pue == Decimal("1.58")


def test_facts_loaded_again_replace_the_old_ones_and_reach_every_site(store: Store) -> None:
    with store.work(SYSTEM) as work:
        node = enrol(work, an_inventory(), site="mine")
        fleet.load_costs(work, fleet.seed_costs().replace("0.0892", "0.0588"))
        assert {s.tariff_micros_per_kwh for s in fleet.list_sites(work.tx)} == {58_800}
        assert [c.pool_id for c in fleet.list_costs(work.tx)] == [node.pool_id]


COSTS = """
[[site]]
name = "home"
pue = 1.2
tariff_usd_per_kwh = 0.1
[[device]]
name = "gpu"
kind = "gpu"
purchase_usd = 100
residual_usd = 10
in_service_on = 2026-01-01
life_months = 12
idle_watts = 10
busy_watts = 20
wear_usd_per_device_hour = 0
source = "a receipt"
"""


@pytest.mark.parametrize(
    ("old", "new", "param"),
    [
        ("pue = 1.2", "pue = 0.9", "site[0].pue"),
        ("pue = 1.2", "pue = 1.2345", "site[0].pue"),
        ("pue = 1.2", "pue = nan", "site[0].pue"),
        ("pue = 1.2", "pue = true", "site[0].pue"),
        ("tariff_usd_per_kwh = 0.1", "", "site[0].tariff_usd_per_kwh"),
        ("tariff_usd_per_kwh = 0.1", "tariff_usd_per_kwh = -1", "site[0].tariff_usd_per_kwh"),
        ('kind = "gpu"', 'kind = "tpu"', "device[0].kind"),
        ("residual_usd = 10", "residual_usd = 101", "device[0].residual_usd"),
        ("in_service_on = 2026-01-01", 'in_service_on = "2026"', "device[0].in_service_on"),
        ("life_months = 12", "life_months = 0", "device[0].life_months"),
        ("life_months = 12", "life_months = 1.5", "device[0].life_months"),
        ("idle_watts = 10", "idle_watts = 30", "device[0].idle_watts"),
        ("purchase_usd = 100", "purchase_usd = 100.0000001", "device[0].purchase_usd"),
        ('source = "a receipt"', 'source = ""', "device[0].source"),
        ('source = "a receipt"', 'source = "x"\ncolour = "red"', "device[0].colour"),
        ("[[site]]", 'currency = "EUR"\n[[site]]', "currency"),
        ("[[device]]", "[[gadget]]", "gadget"),
    ],
)
def test_a_wrong_fact_is_named(old: str, new: str, param: str) -> None:
    assert old in COSTS
    parse_costs(COSTS)
    with pytest.raises(Invalid) as error:
        parse_costs(COSTS.replace(old, new, 1))
    assert error.value.param == param
    assert param in error.value.message


def test_two_entries_for_the_same_devices_are_refused() -> None:
    device = COSTS[COSTS.index("[[device]]") :]
    with pytest.raises(Invalid, match="twice"):
        parse_costs(COSTS + device)
    with pytest.raises(Invalid, match="match the same devices"):
        parse_costs(COSTS + device.replace('name = "gpu"', 'name = "gpu2"'))
    with pytest.raises(Invalid, match="not TOML"):
        parse_costs("[[site")


def test_pool_settings_stay_within_their_bounds(store: Store) -> None:
    with store.work(SYSTEM) as work:
        pool_id = enrol(work, an_inventory()).pool_id
        assert fleet.set_pool(work, pool_id, scrub_seconds=5).scrub_seconds == 5
        with pytest.raises(Invalid) as error:
            fleet.set_pool(work, pool_id, head_room_percent=101)
        assert error.value.param == "head_room_percent"
