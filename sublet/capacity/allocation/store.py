"""Rows of the book: pools with their generation, claims, placements. Rows ↔ frozen values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from sublet.base.store import Instant, metadata
from sublet.capacity.allocation.model import (
    Claim,
    ClaimNotFound,
    Displacement,
    DisplacementRule,
    Party,
    Rank,
    Release,
    Urgency,
)

pools = sa.Table(
    "allocation_pool",
    metadata,
    sa.Column("pool_id", sa.String(40), primary_key=True),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("firm_shelf_devices", sa.Integer, nullable=False),
    sa.Column("firm_shelf_until", Instant),
)
"""`firm_shelf_until` None: until the owner says otherwise."""

claims = sa.Table(
    "allocation_claim",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("holder", sa.String(40), nullable=False, index=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("pool_id", sa.String(40), nullable=False),
    sa.Column("party", sa.String(24), nullable=False),
    sa.Column("urgency", sa.String(24)),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("whole_node", sa.Boolean, nullable=False),
    sa.Column("starts_at", Instant, nullable=False),
    sa.Column("ends_at", Instant),
    sa.Column("notice_seconds", sa.Integer),
    sa.Column("firm_seconds", sa.Integer, nullable=False),
    sa.Column("stop_seconds", sa.Integer, nullable=False),
    sa.Column("displacement_rule", sa.String(24), nullable=False),
    sa.Column("displacement_younger_than_seconds", sa.Integer, nullable=False),
    sa.Column("displacement_micros_per_device_hour", sa.BigInteger, nullable=False),
    sa.Column("value_micros_per_device_hour", sa.BigInteger, nullable=False),
    sa.Column("parent_claim_id", sa.String(40), index=True),
    sa.Column("opened_at", Instant),
    sa.Column("noticed_at", Instant),
    sa.Column("notice_reason", sa.String(24)),
    sa.Column("term_at", Instant),
    sa.Column("free_by", Instant),
    sa.Column("withdrawn_at", Instant),
    sa.Column("displaced_by", sa.String(40)),
    sa.Column("released_at", Instant),
    sa.Column("generation", sa.BigInteger, nullable=False),
    sa.Column("asked_at", Instant),
    sa.Index("ix_allocation_claim_pool_active", "pool_id", "released_at"),
    sa.Index("ix_allocation_claim_pool_generation", "pool_id", "generation"),
)

placements = sa.Table(
    "allocation_placement",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("claim_id", sa.String(40), nullable=False, index=True),
    sa.Column("pool_id", sa.String(40), nullable=False, index=True),
    sa.Column("node_id", sa.String(40), nullable=False),
    sa.Column("device_id", sa.String(40), nullable=False),
    sa.Column("level", sa.Integer, nullable=False),
    sa.Column("starts_at", Instant, nullable=False),
    sa.Column("ends_at", Instant),
)
"""The history of who held what. `level` 0: the holder; 1: its child inside a first-party claim."""

sa.Index(
    "uq_allocation_placement_held",
    placements.c.device_id,
    placements.c.level,
    unique=True,
    sqlite_where=placements.c.ends_at.is_(None),
    postgresql_where=placements.c.ends_at.is_(None),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolRow:
    pool_id: str
    generation: int
    firm_shelf_devices: int
    firm_shelf_until: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A device in a claim's hands over `[starts_at, ends_at)`; `ends_at` None: still."""

    claim_id: str
    pool_id: str
    node_id: str
    device_id: str
    level: int
    starts_at: datetime
    ends_at: datetime | None


# What every rent runs is built once: building a statement costs more than running it.
_POOL_IDS = sa.select(pools.c.pool_id).order_by(pools.c.pool_id)
_POOL = sa.select(pools).where(pools.c.pool_id == sa.bindparam("pool"))
_CHANGE_POOL = pools.update().where(pools.c.pool_id == sa.bindparam("pool"))
_LOCK = _CHANGE_POOL.values(generation=pools.c.generation)
_CLAIM = sa.select(claims).where(claims.c.id == sa.bindparam("claim"))
_UPDATE_CLAIM = claims.update().where(claims.c.id == sa.bindparam("claim"))
_ACTIVE = sa.select(claims).where(claims.c.released_at.is_(None)).order_by(claims.c.seq)
_ACTIVE_CLAIMS = _ACTIVE.where(claims.c.pool_id == sa.bindparam("pool"))
_PINNED = _ACTIVE_CLAIMS.where(claims.c.term_at.is_not(None), claims.c.noticed_at.is_(None))
_CHILDREN = _ACTIVE.where(claims.c.parent_claim_id == sa.bindparam("parent"))
_CHANGED_CLAIMS = (
    sa.select(claims)
    .where(claims.c.pool_id == sa.bindparam("pool"), claims.c.generation > sa.bindparam("after"))
    .order_by(claims.c.seq)
)
_HELD = sa.select(placements).where(placements.c.ends_at.is_(None)).order_by(placements.c.seq)
_HELD_BY = _HELD.where(placements.c.claim_id == sa.bindparam("claim"))
_OF_CLAIMS = (
    sa.select(placements)
    .where(placements.c.claim_id.in_(sa.bindparam("ids", expanding=True)))
    .order_by(placements.c.seq)
)
_HELD_IN = _HELD.where(placements.c.pool_id == sa.bindparam("pool"))


def lock_pool(tx: Connection, pool_id: str) -> bool:
    """Take the pool's row for this transaction; False if the pool has no row yet."""
    return tx.execute(_LOCK, {"pool": pool_id}).rowcount > 0


def open_pool(tx: Connection, pool_id: str) -> None:
    """Give a pool its row. Somebody else may do so at the same time: one row comes of it."""
    try:
        with tx.begin_nested():
            tx.execute(
                pools.insert().values(
                    pool_id=pool_id, generation=0, firm_shelf_devices=0, firm_shelf_until=None
                )
            )
    except IntegrityError:
        return


def find_pool(tx: Connection, pool_id: str) -> PoolRow | None:
    row = tx.execute(_POOL, {"pool": pool_id}).one_or_none()
    return None if row is None else PoolRow(**row._mapping)


def list_pool_ids(tx: Connection) -> list[str]:
    return list(tx.execute(_POOL_IDS).scalars())


def keep_generation(tx: Connection, pool_id: str, generation: int) -> None:
    """Count one change of the pool. Its row must be locked, and its book known."""
    tx.execute(_CHANGE_POOL, {"pool": pool_id, "generation": generation})


def keep_firm_shelf(tx: Connection, pool_id: str, devices: int, until: datetime | None) -> None:
    tx.execute(
        pools.update()
        .where(pools.c.pool_id == pool_id)
        .values(firm_shelf_devices=devices, firm_shelf_until=until)
    )


def insert_claim(tx: Connection, claim: Claim) -> None:
    tx.execute(claims.insert(), _row(claim))


def update_claim(tx: Connection, claim: Claim) -> None:
    changed = tx.execute(_UPDATE_CLAIM, {"claim": claim.id, **_row(claim)})
    assert changed.rowcount == 1


def get_claim(tx: Connection, claim_id: str) -> Claim:
    """Raises ClaimNotFound."""
    row = tx.execute(_CLAIM, {"claim": claim_id}).one_or_none()
    if row is None:
        raise ClaimNotFound
    return _claim(row)


def find_claim_of(tx: Connection, holder: str) -> Claim | None:
    """The holder's latest claim that is not released."""
    row = tx.execute(
        sa.select(claims)
        .where(claims.c.holder == holder, claims.c.released_at.is_(None))
        .order_by(claims.c.seq.desc())
        .limit(1)
    ).one_or_none()
    return None if row is None else _claim(row)


def list_active_claims(tx: Connection, pool_id: str) -> list[Claim]:
    rows = tx.execute(_ACTIVE_CLAIMS, {"pool": pool_id})
    return [_claim(row) for row in rows]


def list_children(tx: Connection, claim_id: str) -> list[Claim]:
    """What runs inside a first-party claim now."""
    rows = tx.execute(_CHILDREN, {"parent": claim_id})
    return [_claim(row) for row in rows]


def list_changed_claims(tx: Connection, pool_id: str, after: int) -> list[Claim]:
    """Claims that changed since a generation, released ones included."""
    rows = tx.execute(_CHANGED_CLAIMS, {"pool": pool_id, "after": after})
    return [_claim(row) for row in rows]


def list_pinned(tx: Connection, pool_id: str) -> list[Claim]:
    """Claims whose end is fixed in the book and who have not been told yet."""
    rows = tx.execute(_PINNED, {"pool": pool_id})
    return [_claim(row) for row in rows]


def insert_placements(tx: Connection, rows: Sequence[Placement]) -> None:
    """None to insert is no row: an empty list would become one row of defaults."""
    if not rows:
        return
    tx.execute(
        placements.insert(),
        [
            {
                "claim_id": row.claim_id,
                "pool_id": row.pool_id,
                "node_id": row.node_id,
                "device_id": row.device_id,
                "level": row.level,
                "starts_at": row.starts_at,
                "ends_at": row.ends_at,
            }
            for row in rows
        ],
    )


def end_placements(tx: Connection, claim_id: str, at: datetime) -> None:
    tx.execute(
        placements.update()
        .where(placements.c.claim_id == claim_id, placements.c.ends_at.is_(None))
        .values(ends_at=at)
    )


def raise_placements(tx: Connection, claim_id: str, at: datetime) -> None:
    """What was held inside another claim is held at the top from `at` on."""
    held = placements_of(tx, claim_id)
    end_placements(tx, claim_id, at)
    insert_placements(tx, [replace(row, level=0, starts_at=at) for row in held])


def placements_of(tx: Connection, claim_id: str) -> list[Placement]:
    """The devices a claim holds now."""
    return _placements(tx.execute(_HELD_BY, {"claim": claim_id}))


def placements_of_all(tx: Connection, claim_ids: Collection[str]) -> list[Placement]:
    """All that these claims hold or have held."""
    return _placements(tx.execute(_OF_CLAIMS, {"ids": sorted(claim_ids)})) if claim_ids else []


def list_placements(tx: Connection, pool_id: str) -> list[Placement]:
    """Everything that is held in a pool now, at both levels."""
    return _placements(tx.execute(_HELD_IN, {"pool": pool_id}))


def holder_of_device(tx: Connection, device_id: str) -> Claim | None:
    """The top-level claim that holds a device now."""
    row = tx.execute(
        sa.select(claims)
        .join(placements, placements.c.claim_id == claims.c.id)
        .where(
            placements.c.device_id == device_id,
            placements.c.level == 0,
            placements.c.ends_at.is_(None),
        )
    ).one_or_none()
    return None if row is None else _claim(row)


def _placements(rows: Iterable[sa.Row[Any]]) -> list[Placement]:
    return [
        Placement(
            claim_id=row.claim_id,
            pool_id=row.pool_id,
            node_id=row.node_id,
            device_id=row.device_id,
            level=row.level,
            starts_at=row.starts_at,
            ends_at=row.ends_at,
        )
        for row in rows
    ]


_PLAIN = (
    "id",
    "holder",
    "organisation_id",
    "pool_id",
    "devices",
    "count",
    "whole_node",
    "starts_at",
    "asked_at",
    "value_micros_per_device_hour",
    "parent_claim_id",
    "opened_at",
    "noticed_at",
    "notice_reason",
    "term_at",
    "free_by",
    "withdrawn_at",
    "displaced_by",
    "released_at",
    "generation",
)
"""Fields of a claim that are columns as they are."""


def _row(claim: Claim) -> dict[str, Any]:
    release, displacement = claim.release, claim.release.displacement
    return {
        **{name: getattr(claim, name) for name in _PLAIN},
        "party": claim.party.value,
        "urgency": None if claim.urgency is None else claim.urgency.value,
        "rank": int(claim.rank),
        "ends_at": release.ends_at,
        "notice_seconds": release.notice_seconds,
        "firm_seconds": release.firm_seconds,
        "stop_seconds": release.stop_seconds,
        "displacement_rule": displacement.rule.value,
        "displacement_younger_than_seconds": displacement.younger_than_seconds,
        "displacement_micros_per_device_hour": displacement.micros_per_device_hour,
    }


def _claim(row: sa.Row[Any]) -> Claim:
    found = row._mapping
    return Claim(
        **{name: found[name] for name in _PLAIN},
        party=Party(found["party"]),
        urgency=None if found["urgency"] is None else Urgency(found["urgency"]),
        rank=Rank(found["rank"]),
        release=Release(
            ends_at=found["ends_at"],
            notice_seconds=found["notice_seconds"],
            firm_seconds=found["firm_seconds"],
            stop_seconds=found["stop_seconds"],
            displacement=Displacement(
                rule=DisplacementRule(found["displacement_rule"]),
                younger_than_seconds=found["displacement_younger_than_seconds"],
                micros_per_device_hour=found["displacement_micros_per_device_hour"],
            ),
        ),
    )
