"""A pool's nodes and devices as one value, read anew only when they have changed.

A roster is kept by the edition of its pool: every change of the pool, a node or a device writes a
new edition in the same transaction, so what is kept under the edition read now is what is there.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine

from sublet.capacity.fleet import store
from sublet.capacity.fleet.model import Device, Node, Pool, missing_for_strangers
from sublet.capacity.fleet.states import NodeState

_kept: WeakKeyDictionary[Engine, dict[str, Roster]] = WeakKeyDictionary()
"""By database and pool, the last roster read. Rosters are immutable: whoever comes last wins."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """`nodes` and `devices` in the order they were enrolled, whatever their state."""

    pool: Pool
    edition: str
    nodes: tuple[Node, ...]
    devices: tuple[Device, ...]
    sellable: tuple[Device, ...]
    """Devices that may be placed on now: healthy, and their node is in production."""
    largest_node: int
    """How many devices the largest node has; 0: the pool is bare."""
    missing_fences: tuple[str, ...]
    """What strangers need and some node does not enforce, by name."""
    closed_to_strangers: tuple[Node, ...]
    """Nodes that miss such a fence and do not serve trusted tenants all the same."""


def get_roster(tx: Connection, pool_id: str) -> Roster:
    """Raises PoolNotFound."""
    return _current(tx, *store.get_pool_edition(tx, pool_id))


def list_rosters(tx: Connection) -> list[Roster]:
    """Of all pools, oldest first."""
    return [_current(tx, pool, edition) for pool, edition in store.list_pool_editions(tx)]


def sellable_devices(tx: Connection, pool_id: str) -> list[Device]:
    """Devices that may be placed on now: healthy, and their node is in production."""
    return list(get_roster(tx, pool_id).sellable)


def _current(tx: Connection, pool: Pool, edition: str) -> Roster:
    kept = _kept.setdefault(tx.engine, {})
    found = kept.get(pool.id)
    if found is None or found.edition != edition:
        # The edition was read first: what is read now may be newer than it, never older.
        found = kept[pool.id] = _read(tx, pool, edition)
    return found


def _read(tx: Connection, pool: Pool, edition: str) -> Roster:
    nodes = store.list_nodes(tx, pool.id)
    devices = store.list_devices(tx, pool.id)
    in_production = {node.id for node in nodes if node.state is NodeState.PRODUCTION}
    sizes = Counter(device.node_id for device in devices)
    missing = {node.id: missing_for_strangers(node) for node in nodes}
    return Roster(
        pool=pool,
        edition=edition,
        nodes=tuple(nodes),
        devices=tuple(devices),
        sellable=tuple(d for d in devices if d.healthy and d.node_id in in_production),
        largest_node=max(sizes.values(), default=0),
        missing_fences=tuple(sorted({name for names in missing.values() for name in names})),
        closed_to_strangers=tuple(n for n in nodes if missing[n.id] and not n.trusted_tenants),
    )
