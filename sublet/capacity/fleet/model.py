"""The values of the fleet, its events and its errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any, ClassVar, Literal

from sublet.base.kernel.errors import Conflict, NotFound
from sublet.base.store import Event
from sublet.capacity.engines.port import STRANGERS_NEED
from sublet.capacity.fleet.states import NodeState

DeviceKind = Literal["cpu", "gpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place with one power price. `pue`: power drawn by the site ÷ power of its machines."""

    id: str
    name: str
    region: str
    pue: Decimal
    tariff_micros_per_kwh: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """Alike nodes at one site. `memory_bytes` is a device's: what a shape promises."""

    id: str
    site_id: str
    name: str
    device_kind: DeviceKind
    device_model: str
    memory_bytes: int
    head_room_percent: int
    scrub_seconds: int
    return_promise_seconds: int
    outbound: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One machine as last enrolled. `fences` is the engine's table, name → strength, by, …"""

    id: str
    pool_id: str
    name: str
    engine: str
    boot_id: str
    state: NodeState
    fences: Mapping[str, Mapping[str, Any]]
    trusted_tenants: bool
    start_failures: int
    version: int


def missing_for_strangers(node: Node) -> tuple[str, ...]:
    """Fences that strangers' workloads need and that this node does not enforce.

    It says what is, whether or not the owner serves trusted tenants all the same.
    """
    return tuple(
        name
        for name in STRANGERS_NEED
        if node.fences.get(name, {}).get("strength", "none") != "enforced"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What an engine can fence. `name` is the engine's; `misses` are looks in a row without it."""

    id: str
    node_id: str
    pool_id: str
    name: str
    healthy: bool
    misses: int
    missed_since: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a device of this pool cost and costs; `source` says where the figures come from."""

    pool_id: str
    name: str
    purchase_micros: int
    residual_micros: int
    in_service_on: date
    life_months: int
    idle_watts: int
    busy_watts: int
    wear_micros_per_device_hour: int
    source: str


@dataclass(frozen=True, slots=True)
class NodeEnrolled(Event):
    kind: ClassVar[str] = "fleet.node_enrolled"
    node_id: str
    pool_id: str


@dataclass(frozen=True, slots=True)
class NodeStateChanged(Event):
    kind: ClassVar[str] = "fleet.node_state_changed"
    node_id: str
    pool_id: str
    before: str
    after: str
    why: str


@dataclass(frozen=True, slots=True)
class DeviceDown(Event):
    kind: ClassVar[str] = "fleet.device_down"
    device_id: str
    node_id: str
    pool_id: str


@dataclass(frozen=True, slots=True)
class DeviceUp(Event):
    kind: ClassVar[str] = "fleet.device_up"
    device_id: str
    node_id: str
    pool_id: str


class PoolNotFound(NotFound):
    """There is no such pool: list the pools to see which there are."""

    code = "pool_not_found"


class NodeNotFound(NotFound):
    """There is no such node: list the nodes to see which there are."""

    code = "node_not_found"


class SiteNotFound(NotFound):
    """There is no such site: list the sites to see which there are."""

    code = "site_not_found"


class DeviceNotFound(NotFound):
    """There is no such device: list the pool's devices to see which there are."""

    code = "device_not_found"


class NodeStateRefused(Conflict):
    """A node does not go from its present state to that one: `details` names where it may go."""

    code = "node_state_refused"


class CostFactsMissing(NotFound):
    """No cost facts match this pool's devices: load some that name their kind or model."""

    code = "cost_facts_missing"
