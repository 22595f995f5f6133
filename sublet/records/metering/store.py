"""Tables of metering, and rows ↔ values. Usage rows are never updated nor deleted."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.kernel.interval import from_micros, micros_since_epoch
from sublet.base.store import Instant, metadata
from sublet.records.metering.model import Meter, MeterParty, Span, Usage, UsageKind, Use

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

meters = sa.Table(
    "metering_meter",
    metadata,
    sa.Column("run_id", sa.String(40), primary_key=True),
    sa.Column("workload_id", sa.String(40), nullable=False, index=True),
    sa.Column("organisation_id", sa.String(40), nullable=False, index=True),
    sa.Column("project_id", sa.String(40), nullable=True),
    sa.Column("contract_id", sa.String(40), nullable=True, index=True),
    sa.Column("pool_id", sa.String(40), nullable=False),
    sa.Column("node_id", sa.String(40), nullable=False),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("party", sa.String(24), nullable=False),
    sa.Column("opened_at", Instant, nullable=False),
    sa.Column("metered_to", Instant, nullable=False),
    sa.Column("closed_at", Instant, nullable=True, index=True),
    sa.Column("close_reason", sa.String(24), nullable=True),
    sa.Column("cpu_ms", sa.BigInteger, nullable=False),
    sa.Column("last_evidence_at", Instant, nullable=False),
)

usage = sa.Table(
    "metering_usage",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("event_id", sa.String(120), nullable=False, unique=True),
    sa.Column("run_id", sa.String(40), nullable=False),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("contract_id", sa.String(40), nullable=True),
    sa.Column("kind", sa.String(24), nullable=False),
    sa.Column("starts_at", Instant, nullable=False),
    sa.Column("ends_at", Instant, nullable=False),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("corrects", sa.String(120), nullable=True),
    sa.Column("recorded_at", Instant, nullable=False),
    sa.CheckConstraint("ends_at > starts_at", name="has_length"),
    sa.CheckConstraint(
        "(corrects IS NULL AND devices > 0) OR (corrects IS NOT NULL AND devices < 0)",
        name="only_corrections_take_back",
    ),
    sa.Index(None, "run_id", "kind", "starts_at"),
    sa.Index(None, "contract_id", "kind"),
    sa.Index(None, "organisation_id", "starts_at"),
    sqlite_autoincrement=True,
)

spans = sa.Table(
    "metering_span",
    metadata,
    sa.Column("device_id", sa.String(40), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("use", sa.String(24), nullable=False),
    sa.Column("starts_at", Instant, nullable=False),
    sa.Column("ends_at", Instant, nullable=True),
    sa.Column("ref", sa.String(80), nullable=False),
    sa.Index(
        "uq_metering_span_open_device",
        "device_id",
        unique=True,
        sqlite_where=sa.text("ends_at IS NULL"),
        postgresql_where=sa.text("ends_at IS NULL"),
    ),
    sa.Index(None, "ends_at"),
)


def insert_meter(tx: Connection, meter: Meter) -> None:
    tx.execute(
        meters.insert(),
        {
            "run_id": meter.run_id,
            "workload_id": meter.workload_id,
            "organisation_id": meter.organisation_id,
            "project_id": meter.project_id,
            "contract_id": meter.contract_id,
            "pool_id": meter.pool_id,
            "node_id": meter.node_id,
            "devices": meter.devices,
            "party": meter.party,
            "opened_at": meter.opened_at,
            "metered_to": meter.metered_to,
            "closed_at": meter.closed_at,
            "close_reason": meter.close_reason,
            "cpu_ms": meter.cpu_ms,
            "last_evidence_at": meter.last_evidence_at,
        },
    )


_UPDATE_METER = meters.update().where(meters.c.run_id == sa.bindparam("run"))
_METER = sa.select(meters).where(meters.c.run_id == sa.bindparam("run"))
_METER_LOCKED = _METER.with_for_update()


def update_meter(tx: Connection, meter: Meter) -> None:
    tx.execute(
        _UPDATE_METER,
        {
            "run": meter.run_id,
            "metered_to": meter.metered_to,
            "closed_at": meter.closed_at,
            "close_reason": meter.close_reason,
            "cpu_ms": meter.cpu_ms,
            "last_evidence_at": meter.last_evidence_at,
        },
    )


def find_meter(tx: Connection, run_id: str, *, lock: bool = False) -> Meter | None:
    row = tx.execute(_METER_LOCKED if lock else _METER, {"run": run_id}).one_or_none()
    return None if row is None else _meter(row)


_METERS = sa.select(meters).order_by(meters.c.opened_at, meters.c.run_id)
_OPEN_METERS = _METERS.where(meters.c.closed_at.is_(None))
_METERS_OF_CONTRACT = _METERS.where(meters.c.contract_id == sa.bindparam("contract"))


def list_open_meters(tx: Connection) -> list[Meter]:
    return [_meter(row) for row in tx.execute(_OPEN_METERS)]


def list_meters(tx: Connection, contract_id: str) -> list[Meter]:
    return [_meter(row) for row in tx.execute(_METERS_OF_CONTRACT, {"contract": contract_id})]


def insert_usage(tx: Connection, rows: list[dict[str, Any]]) -> None:
    tx.execute(usage.insert(), rows)


def find_usage(tx: Connection, event_id: str) -> Usage | None:
    row = tx.execute(sa.select(usage).where(usage.c.event_id == event_id)).one_or_none()
    return None if row is None else _usage(row)


def list_usage(tx: Connection, *where: sa.ColumnElement[bool]) -> list[Usage]:
    return [_usage(row) for row in tx.execute(sa.select(usage).where(*where).order_by(usage.c.seq))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """The plain usage rows of one run, as a whole."""

    run_id: str
    devices: int
    starts_at: datetime
    ends_at: datetime
    covered_us: int


Side = Literal["contract_id", "run_id"]
"""By what use is looked up."""


@cache
def _stretches(side: Side) -> sa.Select[Any]:
    starts = sa.type_coerce(usage.c.starts_at, sa.BigInteger)
    ends = sa.type_coerce(usage.c.ends_at, sa.BigInteger)
    return (
        sa.select(
            usage.c.run_id,
            usage.c.devices,
            sa.func.min(starts).label("first"),
            sa.func.max(ends).label("last"),
            sa.func.sum(ends - starts).label("covered"),
        )
        .where(
            usage.c[side] == sa.bindparam("of"),
            usage.c.kind == sa.bindparam("as_kind"),
            usage.c.corrects.is_(None),
        )
        .group_by(usage.c.run_id, usage.c.devices)
        .order_by(sa.func.min(starts), usage.c.run_id)
    )


@cache
def _corrections(side: Side) -> sa.Select[Any]:
    return (
        sa.select(usage)
        .where(
            usage.c[side] == sa.bindparam("of"),
            usage.c.kind == sa.bindparam("as_kind"),
            usage.c.corrects.is_not(None),
        )
        .order_by(usage.c.seq)
    )


def list_corrections(tx: Connection, side: Side, of: str, kind: str) -> list[Usage]:
    return [_usage(row) for row in tx.execute(_corrections(side), {"of": of, "as_kind": kind})]


def list_stretches(tx: Connection, side: Side, of: str, kind: str) -> list[Stretch]:
    rows = tx.execute(_stretches(side), {"of": of, "as_kind": kind})
    return [
        Stretch(
            run_id=row.run_id,
            devices=row.devices,
            starts_at=from_micros(int(row.first)),
            ends_at=from_micros(int(row.last)),
            covered_us=int(row.covered),
        )
        for row in rows
    ]


_OPEN_SPAN = (
    sa.select(spans)
    .where(spans.c.device_id == sa.bindparam("device"), spans.c.ends_at.is_(None))
    .with_for_update()
)
_UPDATE_SPAN = spans.update().where(
    spans.c.device_id == sa.bindparam("device"), spans.c.seq == sa.bindparam("number")
)


def find_open_span(tx: Connection, device_id: str) -> Span | None:
    row = tx.execute(_OPEN_SPAN, {"device": device_id}).one_or_none()
    return None if row is None else _span(row)


def insert_span(tx: Connection, span: Span) -> None:
    tx.execute(
        spans.insert(),
        {
            "device_id": span.device_id,
            "seq": span.seq,
            "use": span.use,
            "starts_at": span.starts_at,
            "ends_at": span.ends_at,
            "ref": span.ref,
        },
    )


def update_span(tx: Connection, span: Span) -> None:
    """Only the open span of a device is ever changed: ended, or before it has any length, named."""
    tx.execute(
        _UPDATE_SPAN,
        {
            "device": span.device_id,
            "number": span.seq,
            "use": span.use,
            "ends_at": span.ends_at,
            "ref": span.ref,
        },
    )


def list_spans(tx: Connection, device_id: str) -> list[Span]:
    rows = tx.execute(sa.select(spans).where(spans.c.device_id == device_id).order_by(spans.c.seq))
    return [_span(row) for row in rows]


def first_span_start(tx: Connection) -> datetime | None:
    found: datetime | None = tx.execute(sa.select(sa.func.min(spans.c.starts_at))).scalar()
    return found


def sum_spans(
    tx: Connection, start: datetime, end: datetime, device_ids: Collection[str] | None
) -> dict[str, int]:
    """Milliseconds of `[start, end)` by use; an open span counts up to `end`."""
    first, last = micros_since_epoch(start), micros_since_epoch(end)
    starts = sa.type_coerce(spans.c.starts_at, sa.BigInteger)
    ends = sa.type_coerce(spans.c.ends_at, sa.BigInteger)
    from_ = sa.case((starts > first, starts), else_=first)
    to = sa.case((ends < last, ends), else_=last)
    query = (
        sa.select(spans.c.use, sa.func.sum(to - from_))
        .where(starts < last, ends.is_(None) | (ends > first))
        .group_by(spans.c.use)
    )
    if device_ids is not None:
        query = query.where(spans.c.device_id.in_(list(device_ids)))
    return {use: int(total) // 1000 for use, total in tx.execute(query)}


def _meter(row: sa.Row[Any]) -> Meter:
    return Meter(**{**row._asdict(), "party": MeterParty(row.party)})


def _usage(row: sa.Row[Any]) -> Usage:
    return Usage(**{**row._asdict(), "kind": UsageKind(row.kind)})


def _span(row: sa.Row[Any]) -> Span:
    return Span(**{**row._asdict(), "use": Use(row.use)})
