"""Rows of the fleet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from decimal import Decimal
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.store import Instant, Json, Work, metadata
from sublet.capacity.fleet.costs import DeviceFacts, SiteFacts
from sublet.capacity.fleet.model import (
    Device,
    DeviceNotFound,
    Node,
    NodeNotFound,
    Pool,
    PoolNotFound,
    Site,
    SiteNotFound,
)
from sublet.capacity.fleet.states import NodeState, Sight

sites = sa.Table(
    "fleet_site",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("region", sa.String(1000), nullable=False),
    sa.Column("pue_permille", sa.Integer, nullable=False),
    sa.Column("tariff_micros_per_kwh", sa.BigInteger, nullable=False),
)

pools = sa.Table(
    "fleet_pool",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("site_id", sa.String(40), sa.ForeignKey("fleet_site.id"), nullable=False),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("device_kind", sa.String(24), nullable=False),
    sa.Column("device_model", sa.String(200), nullable=False),
    sa.Column("memory_bytes", sa.BigInteger, nullable=False),
    sa.Column("head_room_percent", sa.Integer, nullable=False),
    sa.Column("scrub_seconds", sa.Integer, nullable=False),
    sa.Column("return_promise_seconds", sa.Integer, nullable=False),
    sa.Column("outbound", sa.String(24), nullable=False),
    sa.Column("edition", sa.String(40), nullable=False),
    sa.UniqueConstraint("site_id", "name"),
)
"""`edition` is new with every change of the pool, its nodes or its devices, and never comes back."""

nodes = sa.Table(
    "fleet_node",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("pool_id", sa.String(40), sa.ForeignKey("fleet_pool.id"), nullable=False, index=True),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("engine", sa.String(24), nullable=False),
    sa.Column("boot_id", sa.String(64), nullable=False),
    sa.Column("state", sa.String(24), nullable=False),
    sa.Column("fences", Json, nullable=False),
    sa.Column("trusted_tenants", sa.Boolean, nullable=False),
    sa.Column("start_failures", sa.Integer, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
)

devices = sa.Table(
    "fleet_device",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("node_id", sa.String(40), sa.ForeignKey("fleet_node.id"), nullable=False),
    sa.Column("pool_id", sa.String(40), sa.ForeignKey("fleet_pool.id"), nullable=False, index=True),
    sa.Column("name", sa.String(200), nullable=False),
    sa.Column("healthy", sa.Boolean, nullable=False),
    sa.Column("misses", sa.Integer, nullable=False),
    sa.Column("missed_since", Instant),
    sa.UniqueConstraint("node_id", "name"),
)

cost_facts = sa.Table(
    "fleet_cost",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("kind", sa.String(24), nullable=False),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("purchase_micros", sa.BigInteger, nullable=False),
    sa.Column("residual_micros", sa.BigInteger, nullable=False),
    sa.Column("in_service_on", sa.Date, nullable=False),
    sa.Column("life_months", sa.Integer, nullable=False),
    sa.Column("idle_watts", sa.Integer, nullable=False),
    sa.Column("busy_watts", sa.Integer, nullable=False),
    sa.Column("wear_micros_per_device_hour", sa.BigInteger, nullable=False),
    sa.Column("source", sa.String(1000), nullable=False),
)
"""Facts by kind and model, as the owner wrote them; a pool finds its own by match."""


def get_site(tx: Connection, site_id: str) -> Site:
    row = tx.execute(sa.select(sites).where(sites.c.id == site_id)).one_or_none()
    if row is None:
        raise SiteNotFound(param="site_id")
    return _site(row)


def find_site_named(tx: Connection, name: str) -> Site | None:
    row = tx.execute(sa.select(sites).where(sites.c.name == name)).one_or_none()
    return None if row is None else _site(row)


def list_sites(tx: Connection) -> list[Site]:
    return [_site(row) for row in tx.execute(sa.select(sites).order_by(sites.c.seq))]


def insert_site(tx: Connection, site: Site) -> None:
    tx.execute(
        sites.insert().values(
            id=site.id,
            name=site.name,
            region=site.region,
            pue_permille=int(site.pue * 1000),
            tariff_micros_per_kwh=site.tariff_micros_per_kwh,
        )
    )


def update_site_facts(tx: Connection, site_id: str, facts: SiteFacts) -> None:
    tx.execute(
        sites.update()
        .where(sites.c.id == site_id)
        .values(
            region=facts.region,
            pue_permille=int(facts.pue * 1000),
            tariff_micros_per_kwh=facts.tariff_micros_per_kwh,
        )
    )


_POOLS = sa.select(pools).order_by(pools.c.seq)
_POOL = sa.select(pools).where(pools.c.id == sa.bindparam("pool"))
_EDITION = pools.update().where(pools.c.id == sa.bindparam("pool"))


def get_pool(tx: Connection, pool_id: str) -> Pool:
    return get_pool_edition(tx, pool_id)[0]


def get_pool_edition(tx: Connection, pool_id: str) -> tuple[Pool, str]:
    row = tx.execute(_POOL, {"pool": pool_id}).one_or_none()
    if row is None:
        raise PoolNotFound(param="pool_id")
    return _pool(row), row.edition


def list_pool_editions(tx: Connection) -> list[tuple[Pool, str]]:
    return [(_pool(row), row.edition) for row in tx.execute(_POOLS)]


def _edited(work: Work, pool_id: str) -> None:
    work.tx.execute(_EDITION, {"pool": pool_id, "edition": work.ids.new("ed")})


def list_pools(tx: Connection) -> list[Pool]:
    """All pools, oldest first."""
    return [_pool(row) for row in tx.execute(_POOLS)]


def insert_pool(work: Work, pool: Pool) -> None:
    work.tx.execute(pools.insert().values(**asdict(pool), edition=work.ids.new("ed")))


def update_pool(work: Work, pool_id: str, **values: Any) -> None:
    work.tx.execute(pools.update().where(pools.c.id == pool_id).values(**values))
    _edited(work, pool_id)


def get_node(tx: Connection, node_id: str) -> Node:
    row = tx.execute(sa.select(nodes).where(nodes.c.id == node_id)).one_or_none()
    if row is None:
        raise NodeNotFound(param="node_id")
    return _node(row)


def get_node_locked(tx: Connection, node_id: str) -> Node:
    """The node, and nobody else changes it before this transaction ends."""
    row = tx.execute(sa.select(nodes).where(nodes.c.id == node_id).with_for_update()).one_or_none()
    if row is None:
        raise NodeNotFound(param="node_id")
    return _node(row)


def find_node_named(tx: Connection, name: str) -> Node | None:
    row = tx.execute(sa.select(nodes).where(nodes.c.name == name)).one_or_none()
    return None if row is None else _node(row)


def list_nodes(tx: Connection, pool_id: str | None = None) -> list[Node]:
    query = sa.select(nodes).order_by(nodes.c.seq)
    if pool_id is not None:
        query = query.where(nodes.c.pool_id == pool_id)
    return [_node(row) for row in tx.execute(query)]


def insert_node(work: Work, node: Node) -> None:
    work.tx.execute(nodes.insert().values(**{**asdict(node), "fences": dict(node.fences)}))
    _edited(work, node.pool_id)


def update_node(work: Work, node: Node, **values: Any) -> Node:
    """Change a node; its version rises by one."""
    work.tx.execute(
        nodes.update().where(nodes.c.id == node.id).values(version=node.version + 1, **values)
    )
    _edited(work, node.pool_id)
    return get_node(work.tx, node.id)


_DEVICES = sa.select(devices).where(devices.c.id.in_(sa.bindparam("ids", expanding=True)))


def get_devices(tx: Connection, device_ids: Sequence[str]) -> list[Device]:
    """In the order asked for. DeviceNotFound: one of them is not there."""
    rows = tx.execute(_DEVICES, {"ids": list(device_ids)})
    found = {row.id: _device(row) for row in rows}
    if len(found) < len(set(device_ids)):
        raise DeviceNotFound(param="device_id")
    return [found[device_id] for device_id in device_ids]


def get_device(tx: Connection, device_id: str) -> Device:
    [found] = get_devices(tx, [device_id])
    return found


def list_devices(tx: Connection, pool_id: str) -> list[Device]:
    """All devices of a pool, whatever their state, in the order they were enrolled."""
    return _devices(tx, devices.c.pool_id == pool_id)


def devices_of_node(tx: Connection, node_id: str) -> list[Device]:
    return _devices(tx, devices.c.node_id == node_id)


def insert_devices(work: Work, new: Sequence[Device]) -> None:
    if new:
        work.tx.execute(devices.insert(), [asdict(device) for device in new])
    for pool_id in {device.pool_id for device in new}:
        _edited(work, pool_id)


def keep_sight(work: Work, device: Device, sight: Sight) -> None:
    work.tx.execute(devices.update().where(devices.c.id == device.id).values(**asdict(sight)))
    _edited(work, device.pool_id)


def list_facts(tx: Connection) -> list[DeviceFacts]:
    rows = tx.execute(sa.select(cost_facts).order_by(cost_facts.c.seq))
    return [_facts(row) for row in rows]


def replace_facts(tx: Connection, facts: Sequence[DeviceFacts]) -> None:
    tx.execute(cost_facts.delete())
    tx.execute(cost_facts.insert(), [asdict(fact) for fact in facts])


def _devices(tx: Connection, *where: sa.ColumnElement[bool]) -> list[Device]:
    rows = tx.execute(sa.select(devices).where(*where).order_by(devices.c.seq))
    return [_device(row) for row in rows]


def _site(row: sa.Row[Any]) -> Site:
    return Site(
        id=row.id,
        name=row.name,
        region=row.region,
        pue=Decimal(row.pue_permille) / 1000,
        tariff_micros_per_kwh=row.tariff_micros_per_kwh,
    )


def _pool(row: sa.Row[Any]) -> Pool:
    return Pool(
        id=row.id,
        site_id=row.site_id,
        name=row.name,
        device_kind=row.device_kind,
        device_model=row.device_model,
        memory_bytes=row.memory_bytes,
        head_room_percent=row.head_room_percent,
        scrub_seconds=row.scrub_seconds,
        return_promise_seconds=row.return_promise_seconds,
        outbound=row.outbound,
    )


def _node(row: sa.Row[Any]) -> Node:
    return Node(
        id=row.id,
        pool_id=row.pool_id,
        name=row.name,
        engine=row.engine,
        boot_id=row.boot_id,
        state=NodeState(row.state),
        fences=row.fences,
        trusted_tenants=row.trusted_tenants,
        start_failures=row.start_failures,
        version=row.version,
    )


def _device(row: sa.Row[Any]) -> Device:
    return Device(
        id=row.id,
        node_id=row.node_id,
        pool_id=row.pool_id,
        name=row.name,
        healthy=row.healthy,
        misses=row.misses,
        missed_since=row.missed_since,
    )


def _facts(row: sa.Row[Any]) -> DeviceFacts:
    assert isinstance(row.in_service_on, date)
    return DeviceFacts(
        name=row.name,
        kind=row.kind,
        model=row.model,
        purchase_micros=row.purchase_micros,
        residual_micros=row.residual_micros,
        in_service_on=row.in_service_on,
        life_months=row.life_months,
        idle_watts=row.idle_watts,
        busy_watts=row.busy_watts,
        wear_micros_per_device_hour=row.wear_micros_per_device_hour,
        source=row.source,
    )
