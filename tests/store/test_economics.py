"""The owner's statement from real rows: fleet, metering and ledger."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.errors import Invalid
from sublet.base.kernel.ids import SeededIds
from sublet.base.kernel.money import Money
from sublet.base.store import Actor, Store, Work, metadata, open_store
from sublet.capacity import fleet
from sublet.capacity.engines.port import FENCES, Device, Fence, Inventory
from sublet.money import economics
from sublet.records import ledger, metering

START = datetime(2026, 3, 2, 10, tzinfo=UTC)
HOUR = timedelta(hours=1)
SYSTEM = Actor.system("test")
COSTS = """
[[site]]
name = "home"
region = "here"
pue = 1.5
tariff_usd_per_kwh = 0.10

[[device]]
name = "cpu"
kind = "cpu"
model = ""
purchase_usd = 8760
residual_usd = 0
in_service_on = 2026-01-01
life_months = 12
idle_watts = 100
busy_watts = 500
wear_usd_per_device_hour = 0
source = "by hand: one dollar a device-hour"
"""


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(START)


@pytest.fixture
def store(tmp_path: Path, clock: VirtualClock) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path}/sublet.db", clock, SeededIds(1))
    metadata.create_all(opened.engine)
    yield opened
    opened.close()


def enrolled(work: Work, devices: int = 2) -> list[str]:
    """A node with its devices, idle from now on; the devices' ids."""
    fences = {name: Fence(strength="enforced", by="probe", evidence="held") for name in FENCES}
    node = fleet.enrol(
        work,
        Inventory(
            node="here",
            devices=tuple(
                Device(name=f"cpu{n}", kind="cpu", model="EPYC", memory_bytes=1 << 30)
                for n in range(devices)
            ),
            disk_bytes=1 << 40,
            fences=fences,
            outbound="none",
            boot_id="boot",
        ),
        site_name="home",
        trusted_tenants=False,
    )
    return [device.id for device in fleet.list_devices(work.tx, node.pool_id)]


def earn(work: Work, product: str, micros: int, key: str, *, first_party: bool = False) -> None:
    account = ledger.first_party_account if first_party else ledger.customer_account
    ledger.post(
        work,
        key=key,
        debit=account("org_1"),
        credit=ledger.revenue_account(product),
        amount=Money(micros),
        kind="usage",
        organisation_id="org_1",
    )


def give(work: Work, source: str, micros: int, key: str, *, first_party: bool = False) -> None:
    account = ledger.first_party_account if first_party else ledger.customer_account
    ledger.post(
        work,
        key=key,
        debit=source,
        credit=account("org_1"),
        amount=Money(micros),
        kind="credit",
        organisation_id="org_1",
    )


def test_a_morning_of_two_devices(store: Store, clock: VirtualClock) -> None:
    with store.work(SYSTEM) as work:
        fleet.load_costs(work, COSTS)
        first, second = enrolled(work)
        metering.switch_device(work, first, "sold_used", START)
    clock.advance_to(START + 2 * HOUR)
    with store.work(SYSTEM) as work:
        metering.switch_device(work, first, "idle", work.now)
        metering.switch_device(work, second, "first_party", work.now)
        give(work, ledger.TRIAL, 5_000_000, "trial")
        earn(work, "spot", 4_000_000, "usage")
        give(work, ledger.CREDITS, 1_000_000, "interrupted")
        earn(work, "first_party", 2_500_000, "own", first_party=True)
        give(work, ledger.CREDITS, 2_500_000, "own-back", first_party=True)
    clock.advance_to(START + 4 * HOUR)
    with store.read() as tx:
        found = economics.statement(tx, START, START + 24 * HOUR, clock.now())

    assert found.end == START + 4 * HOUR
    assert {use: ms // 3_600_000 for use, ms in found.device_ms_by_use.items() if ms} == {
        "sold_used": 2,
        "idle": 4,
        "first_party": 2,
    }
    assert found.revenue.micros == 4_000_000
    assert found.credits.micros == 1_000_000
    assert found.first_party.micros == 2_500_000
    assert found.trial.micros == 5_000_000
    assert found.depreciation.micros == 8_000_000
    # 4 h × 0.5 kW + 4 h × 0.1 kW = 2.4 kWh, × 1.5 × 0.10
    assert found.power.micros == 360_000
    assert found.margin.micros == 4_000_000 - 1_000_000 - 8_000_000 - 360_000
    # half of the depreciation, and 0.4 kWh
    assert found.idle_cost.micros == 4_000_000 + 60_000
    assert found.revenue_micros_per_device_hour == 1_500_000
    assert found.utilisation_permille == 500
    assert found.pools_without_costs == ()


def test_windows_that_meet_sum_to_the_whole(store: Store, clock: VirtualClock) -> None:
    with store.work(SYSTEM) as work:
        fleet.load_costs(work, COSTS)
        enrolled(work, devices=3)
    clock.advance_to(START + 3 * HOUR)
    edges = [START + timedelta(milliseconds=ms) for ms in (0, 1, 999_999, 3_600_001, 10_800_000)]
    with store.read() as tx:
        whole = economics.statement(tx, edges[0], edges[-1], clock.now())
        parts = [economics.statement(tx, a, b, clock.now()) for a, b in pairwise(edges)]
    assert sum(p.depreciation.micros for p in parts) == whole.depreciation.micros
    assert sum(p.device_ms_by_use["idle"] for p in parts) == whole.device_ms_by_use["idle"]


def test_without_cost_facts_the_pool_is_named(store: Store, clock: VirtualClock) -> None:
    with store.work(SYSTEM) as work:
        fleet.load_costs(work, COSTS.replace('kind = "cpu"', 'kind = "gpu"'))
        enrolled(work)
    clock.advance_to(START + HOUR)
    with store.read() as tx:
        found = economics.statement(tx, START, clock.now(), clock.now())
        [pool] = fleet.list_pools(tx)
    assert found.pools_without_costs == (pool.id,)
    assert found.margin.micros == 0


def test_a_window_that_has_not_begun_is_refused(store: Store, clock: VirtualClock) -> None:
    with store.read() as tx, pytest.raises(Invalid):
        economics.statement(tx, START + HOUR, START + 2 * HOUR, clock.now())
