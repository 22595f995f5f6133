"""Sites, pools, nodes, devices and who holds them, as they are shown."""

from __future__ import annotations

from collections import Counter
from datetime import datetime, timedelta

from sqlalchemy import Connection

from sublet.base.kernel.interval import floor_ms
from sublet.base.store import Work
from sublet.base.wire import rest
from sublet.capacity import allocation, fleet
from sublet.records import metering

MILLISECOND = timedelta(milliseconds=1)
UNKNOWN = "idle"


def site(found: fleet.Site) -> rest.Site:
    return rest.Site(
        id=found.id,
        name=found.name,
        region=found.region,
        pue=str(found.pue),
        tariff_micros_per_kwh=found.tariff_micros_per_kwh,
    )


def node(tx: Connection, found: fleet.Node) -> rest.Node:
    pool = fleet.get_pool(tx, found.pool_id)
    devices = [d for d in fleet.list_devices(tx, pool.id) if d.node_id == found.id]
    return rest.Node(
        id=found.id,
        site_id=pool.site_id,
        pool_id=found.pool_id,
        name=found.name,
        engine=found.engine,
        state=found.state.value,
        may_become=[state.value for state in fleet.reachable_states(found.state)],
        fences=[
            rest.FenceRow(
                fence=name,
                strength=row["strength"],
                by=row.get("by", ""),
                evidence=row.get("evidence", ""),
                remedy=row.get("remedy", ""),
            )
            for name, row in found.fences.items()
        ],
        missing_for_strangers=list(fleet.missing_for_strangers(found)),
        trusted_tenants=found.trusted_tenants,
        start_failures=found.start_failures,
        devices=len(devices),
        version=found.version,
    )


def pool(where: Work | Connection, found: fleet.Pool, now: datetime) -> rest.Pool:
    """With what is free, held and sold now, and the excess curve; in a Work with its changes."""
    tx = where.tx if isinstance(where, Work) else where
    book = allocation.get_book(where, found.id, now=now)
    claims = _standing(tx, found.id, now)
    first_party = sum(c.size for c in claims if c.party is allocation.Party.FIRST_PARTY)
    sold = sum(c.size for c in claims if c.party is allocation.Party.SALE)
    sellable = len(fleet.sellable_devices(tx, found.id))
    return rest.Pool(
        id=found.id,
        site_id=found.site_id,
        name=found.name,
        device_kind=found.device_kind,
        device_model=found.device_model,
        memory_bytes_per_device=found.memory_bytes,
        head_room_percent=found.head_room_percent,
        scrub_seconds=found.scrub_seconds,
        return_promise_seconds=found.return_promise_seconds,
        outbound=found.outbound,
        sellable_devices=sellable,
        free_devices=max(0, sellable - first_party - sold),
        first_party_devices=first_party,
        sold_devices=sold,
        firm_shelf=rest.FirmShelf(devices=book.firm_shelf, until=book.firm_shelf_until),
        excess=[
            rest.ExcessPoint(notice_seconds=notice, devices=devices)
            for notice, devices in allocation.curve(book, now)
        ],
        version=book.generation,
    )


def _standing(tx: Connection, pool_id: str, now: datetime) -> list[allocation.Claim]:
    """Claims that hold devices of their own now: what is drawn from a recall's counts in that."""
    return [
        claim
        for claim in allocation.list_active_claims(tx, pool_id)
        if claim.parent_claim_id is None and claim.starts_at <= now
    ]


def use_of(tx: Connection, device_ids: list[str], now: datetime) -> Counter[str]:
    """How many of these devices are in which use: their last millisecond, by use."""
    at = floor_ms(now)
    spent = metering.partition(tx, device_ids=device_ids, start=at - MILLISECOND, end=at)
    return Counter({use: ms for use, ms in spent.items() if ms})


def device(tx: Connection, found: fleet.Device, its_pool: fleet.Pool, now: datetime) -> rest.Device:
    claim = allocation.holder_of_device(tx, found.id)
    used = use_of(tx, [found.id], now)
    return rest.Device(
        id=found.id,
        node_id=found.node_id,
        pool_id=found.pool_id,
        name=found.name,
        kind=its_pool.device_kind,
        healthy=found.healthy,
        use=next(iter(used), UNKNOWN),
        holder=None if claim is None else claim.holder,
        claim_id=None if claim is None else claim.id,
        organisation_id=None if claim is None else claim.organisation_id,
        party=None if claim is None else claim.party.value,
        rank=None if claim is None else claim.rank.name.lower(),
        free_by=None if claim is None else claim.free_by,
    )


def pool_status(tx: Connection, found: fleet.Pool, now: datetime) -> rest.PoolStatus:
    devices = [d.id for d in fleet.list_devices(tx, found.id)]
    held: Counter[tuple[str, str, str]] = Counter()
    for claim in _standing(tx, found.id, now):
        held[claim.organisation_id, claim.party.value, claim.rank.name.lower()] += claim.size
    return rest.PoolStatus(
        pool_id=found.id,
        name=found.name,
        devices=len(devices),
        by_use=[
            rest.UseCount(use=use, devices=count)
            for use, count in sorted(use_of(tx, devices, now).items())
        ],
        holders=[
            rest.HolderCount(organisation_id=who, party=party, rank=rank, devices=count)
            for (who, party, rank), count in sorted(held.items())
        ],
    )
