"""Tables of tokens, and rows ↔ values. Token rows are never updated nor deleted.

Instants stand here as the events carry them, in whole microseconds: thousands of rows a second are
written, and none of them is looked up by more than its id, its owner or its replica.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.store import Instant, metadata
from sublet.base.wire.gateway import Outcome, UsageEvent
from sublet.records.metering.token_model import (
    Epoch,
    EpochState,
    Reading,
    Sums,
    TokenUsage,
)

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

tokens = sa.Table(
    "metering_token",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("event_id", sa.String(80), nullable=False, unique=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("project_id", sa.String(40), nullable=True),
    sa.Column("key_id", sa.String(40), nullable=False),
    sa.Column("is_first_party", sa.Boolean, nullable=False),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("deployment_id", sa.String(40), nullable=False),
    sa.Column("replica_id", sa.String(40), nullable=False),
    sa.Column("surface", sa.String(24), nullable=False),
    sa.Column("tier", sa.String(24), nullable=False),
    sa.Column("price_version", sa.String(64), nullable=False),
    sa.Column("outcome", sa.String(24), nullable=False),
    sa.Column("started_us", sa.BigInteger, nullable=False),
    sa.Column("ended_us", sa.BigInteger, nullable=False),
    sa.Column("first_us", sa.BigInteger, nullable=True),
    sa.Column("input_uncached", sa.BigInteger, nullable=False),
    sa.Column("cache_read", sa.BigInteger, nullable=False),
    sa.Column("output", sa.BigInteger, nullable=False),
    sa.Column("made", sa.BigInteger, nullable=False),
    sa.Column("micros", sa.BigInteger, nullable=False),
    sa.Column("is_inconsistent", sa.Boolean, nullable=False),
    sa.Column("gateway", sa.String(40), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("corrects", sa.String(80), nullable=True),
    sa.Column("recorded_at", Instant, nullable=False),
    sa.CheckConstraint(
        "corrects IS NOT NULL OR (input_uncached >= 0 AND cache_read >= 0 AND output >= 0 "
        "AND made >= output AND micros >= 0)",
        name="only_corrections_take_back",
    ),
    sa.Index(None, "organisation_id", "seq"),
    sa.Index(None, "key_id", "seq"),
    sa.Index(None, "replica_id", "seq"),
    # Most keys are bound to no project, and their requests cost nothing here.
    sa.Index(
        "ix_metering_token_project_id_seq",
        "project_id",
        "seq",
        sqlite_where=sa.text("project_id IS NOT NULL"),
        postgresql_where=sa.text("project_id IS NOT NULL"),
    ),
    # Corrections are few, and each is looked up by what it corrects.
    sa.Index(
        "ix_metering_token_corrects",
        "corrects",
        sqlite_where=sa.text("corrects IS NOT NULL"),
        postgresql_where=sa.text("corrects IS NOT NULL"),
    ),
    sqlite_autoincrement=True,
)

spools = sa.Table(
    "metering_spool",
    metadata,
    sa.Column("gateway", sa.String(40), primary_key=True),
    sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("file", sa.Integer, nullable=False),
    sa.Column("offset", sa.BigInteger, nullable=False),
    sa.Column("state", sa.String(24), nullable=False, index=True),
    sa.Column("opened_at", Instant, nullable=False),
    sa.Column("closed_at", Instant, nullable=True),
)
"""How far a gateway's spool is kept: the mark moves in the transaction of the rows before it."""

readings = sa.Table(
    "metering_token_reading",
    metadata,
    sa.Column("replica_id", sa.String(40), primary_key=True),
    sa.Column("prompt", sa.BigInteger, nullable=False),
    sa.Column("cached", sa.BigInteger, nullable=True),
    sa.Column("predicted", sa.BigInteger, nullable=False),
    sa.Column("input_uncached", sa.BigInteger, nullable=False),
    sa.Column("cache_read", sa.BigInteger, nullable=False),
    sa.Column("made", sa.BigInteger, nullable=False),
    sa.Column("counted_seq", sa.BigInteger, nullable=False),
    sa.Column("read_at", Instant, nullable=False),
)
"""An engine's own totals, and beside them ours, of the rows up to `counted_seq`."""

CHUNK = 500
"""Ids looked up in one statement."""

_INSERT = tokens.insert()
_KNOWN = sa.select(tokens.c.event_id).where(
    tokens.c.event_id.in_(sa.bindparam("ids", expanding=True))
)


def known_ids(tx: Connection, ids: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for start in range(0, len(ids), CHUNK):
        found.update(tx.execute(_KNOWN, {"ids": list(ids[start : start + CHUNK])}).scalars())
    return found


def insert_events(
    tx: Connection, gateway: str, epoch: int, events: Sequence[UsageEvent], now: datetime
) -> None:
    if events:
        tx.execute(_INSERT, [_row(event, gateway, epoch, now) for event in events])


def _row(event: UsageEvent, gateway: str, epoch: int, now: datetime) -> dict[str, Any]:
    return {
        "event_id": event.id,
        "organisation_id": event.organisation_id,
        "project_id": event.project_id,
        "key_id": event.key_id,
        "is_first_party": event.is_first_party,
        "model": event.model,
        "deployment_id": event.deployment_id,
        "replica_id": event.replica_id,
        "surface": event.surface,
        "tier": event.tier,
        "price_version": event.price_version,
        "outcome": event.outcome,
        "started_us": event.started_us,
        "ended_us": event.ended_us,
        "first_us": event.first_us,
        "input_uncached": event.input_uncached,
        "cache_read": event.cache_read,
        "output": event.output,
        "made": event.made,
        "micros": event.micros,
        "is_inconsistent": event.is_inconsistent,
        "gateway": gateway,
        "epoch": epoch,
        "corrects": None,
        "recorded_at": now,
    }


def insert_usage(tx: Connection, usage: TokenUsage) -> int:
    """Append one row; returns the sequence number given."""
    values = {column.name: getattr(usage, column.name) for column in tokens.c}
    del values["seq"]
    key = tx.execute(_INSERT, values).inserted_primary_key
    assert key is not None
    return int(key[0])


_USAGE = sa.select(tokens)
_BY_ID = _USAGE.where(tokens.c.event_id == sa.bindparam("of"))
_CORRECTING = _USAGE.where(tokens.c.corrects == sa.bindparam("of")).order_by(tokens.c.seq)


def find_usage(tx: Connection, event_id: str) -> TokenUsage | None:
    row = tx.execute(_BY_ID, {"of": event_id}).one_or_none()
    return None if row is None else _usage(row)


def list_corrections(tx: Connection, event_id: str) -> list[TokenUsage]:
    return [_usage(row) for row in tx.execute(_CORRECTING, {"of": event_id})]


def where_usage(named: Mapping[str, str]) -> list[sa.ColumnElement[bool]]:
    """Rows of all that is named, narrowest first. Only the first is left to an index: a planner
    without statistics takes any, and would walk a whole organisation for one of its keys."""
    return [
        (tokens.c[name] if place == 0 else sa.func.coalesce(tokens.c[name], "")) == value
        for place, (name, value) in enumerate(named.items())
    ]


def list_usage(
    tx: Connection,
    *where: sa.ColumnElement[bool],
    is_newest_first: bool,
    after: int | None,
    limit: int,
) -> list[TokenUsage]:
    seq = tokens.c.seq
    query = _USAGE.where(*where).order_by(seq.desc() if is_newest_first else seq).limit(limit)
    if after is not None:
        query = query.where(seq < after if is_newest_first else seq > after)
    return [_usage(row) for row in tx.execute(query)]


def _sum(column: sa.ColumnElement[int], *, where: sa.ColumnElement[bool] | None = None) -> Any:
    counted = column if where is None else sa.case((where, column), else_=0)
    return sa.func.coalesce(sa.func.sum(counted), 0)


UNBILLED = (Outcome.FAILED, Outcome.LOST)
"""Outcomes of which the consumer pays nothing."""


def sums(tx: Connection, *where: sa.ColumnElement[bool]) -> Sums:
    """Billed tokens by class and lost output, corrections included, of the rows chosen."""
    billed = tokens.c.outcome.not_in(UNBILLED)
    output = _sum(tokens.c.output, where=billed)
    row = tx.execute(
        sa.select(
            _sum(tokens.c.input_uncached, where=billed),
            _sum(tokens.c.cache_read, where=billed),
            output,
            _sum(tokens.c.made) - output,
        ).where(*where)
    ).one()
    return Sums(*(int(value) for value in row))


_COUNTED = sa.select(
    _sum(tokens.c.input_uncached), _sum(tokens.c.cache_read), _sum(tokens.c.made)
).where(tokens.c.replica_id == sa.bindparam("of"), tokens.c.seq > sa.bindparam("after"))
_LAST_SEQ = sa.select(sa.func.coalesce(sa.func.max(tokens.c.seq), 0))
_LAST_SERVED = (
    _USAGE.where(tokens.c.replica_id == sa.bindparam("of")).order_by(tokens.c.seq.desc()).limit(1)
)


def counted_since(tx: Connection, replica_id: str, after: int) -> tuple[int, int, int]:
    """Uncached input, cached input and output made, in the replica's rows after that one."""
    row = tx.execute(_COUNTED, {"of": replica_id, "after": after}).one()
    return int(row[0]), int(row[1]), int(row[2])


def last_seq(tx: Connection) -> int:
    return int(tx.execute(_LAST_SEQ).scalar_one())


def last_served(tx: Connection, replica_id: str) -> TokenUsage | None:
    row = tx.execute(_LAST_SERVED, {"of": replica_id}).one_or_none()
    return None if row is None else _usage(row)


_READINGS = sa.select(readings)
_READING = _READINGS.where(readings.c.replica_id == sa.bindparam("of"))


def find_reading(tx: Connection, replica_id: str) -> Reading | None:
    row = tx.execute(_READING, {"of": replica_id}).one_or_none()
    return None if row is None else Reading(**row._asdict())


def list_readings(tx: Connection, since: datetime) -> list[Reading]:
    query = _READINGS.where(readings.c.read_at >= since).order_by(readings.c.replica_id)
    return [Reading(**row._asdict()) for row in tx.execute(query)]


def put_reading(tx: Connection, reading: Reading) -> None:
    values = {column.name: getattr(reading, column.name) for column in readings.c}
    where = readings.c.replica_id == reading.replica_id
    if tx.execute(readings.update().where(where).values(**values)).rowcount == 0:
        tx.execute(readings.insert().values(**values))


_EPOCH = sa.select(spools).where(
    spools.c.gateway == sa.bindparam("of"), spools.c.epoch == sa.bindparam("number")
)
_MOVE = spools.update().where(
    spools.c.gateway == sa.bindparam("of"), spools.c.epoch == sa.bindparam("number")
)


def find_epoch(tx: Connection, gateway: str, epoch: int) -> Epoch | None:
    row = tx.execute(_EPOCH, {"of": gateway, "number": epoch}).one_or_none()
    return None if row is None else _epoch(row)


def list_epochs(tx: Connection, states: Collection[EpochState]) -> list[Epoch]:
    query = sa.select(spools).where(spools.c.state.in_(list(states)))
    rows = tx.execute(query.order_by(spools.c.gateway, spools.c.epoch))
    return [_epoch(row) for row in rows]


def insert_epoch(tx: Connection, epoch: Epoch) -> None:
    tx.execute(spools.insert().values(**{c.name: getattr(epoch, c.name) for c in spools.c}))


def update_epoch(tx: Connection, epoch: Epoch) -> None:
    tx.execute(
        _MOVE,
        {
            "of": epoch.gateway,
            "number": epoch.epoch,
            "file": epoch.file,
            "offset": epoch.offset,
            "state": epoch.state,
            "closed_at": epoch.closed_at,
        },
    )


def _usage(row: sa.Row[Any]) -> TokenUsage:
    return TokenUsage(**{**row._asdict(), "outcome": Outcome(row.outcome)})


def _epoch(row: sa.Row[Any]) -> Epoch:
    return Epoch(**{**row._asdict(), "state": EpochState(row.state)})
