"""Tables of recalls and shortfalls; rows to values and back."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.kernel.interval import from_micros, micros_since_epoch
from sublet.base.store import Instant, Json, Work, metadata
from sublet.rights.owner.model import (
    LIVE,
    Recall,
    RecallNotFound,
    RecallRow,
    RecallState,
    RowState,
    Shortfall,
    Victim,
)

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

recalls = sa.Table(
    "owner_recall",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("pool_id", sa.String(40), nullable=False, index=True),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("count", sa.Integer, nullable=False),
    sa.Column("by", Instant),
    sa.Column("until", Instant),
    sa.Column("state", sa.String(24), nullable=False, index=True),
    sa.Column("is_late", sa.Boolean, nullable=False),
    sa.Column("planned_at", Instant, nullable=False),
    sa.Column("expires_at", Instant, nullable=False),
    sa.Column("accepted_at", Instant),
    sa.Column("delivered_at", Instant),
    sa.Column("ended_at", Instant),
    sa.Column("shortfall_devices", sa.Integer, nullable=False),
    sa.Column("shortfall_earliest_at", Instant),
    sa.Column("buy_back_micros", sa.BigInteger),
    sa.Column("gap_micros", sa.BigInteger, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
)

recall_rows = sa.Table(
    "owner_recall_row",
    metadata,
    sa.Column("recall_id", sa.String(40), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("free_by", Instant, nullable=False),
    sa.Column("victims", Json, nullable=False),
    sa.Column("claim_id", sa.String(40), index=True),
    sa.Column("state", sa.String(24), nullable=False),
    sa.Column("delivered_at", Instant),
    sa.Column("device_ids", Json, nullable=False),
)

shortfalls = sa.Table(
    "owner_shortfall",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("pool_id", sa.String(40), nullable=False, index=True),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("recall_id", sa.String(40), index=True),
    sa.Column("claim_id", sa.String(40), index=True),
    sa.Column("needed_at", Instant, nullable=False),
    sa.Column("earliest_at", Instant),
    sa.Column("recorded_at", Instant, nullable=False),
    sa.Column("ended_at", Instant),
)


def insert_recall(work: Work, recall: Recall) -> Recall:
    found = work.tx.execute(
        recalls.insert().values(
            id=recall.id,
            organisation_id=recall.organisation_id,
            pool_id=recall.pool_id,
            devices=recall.devices,
            count=recall.count,
            by=recall.by,
            until=recall.until,
            state=recall.state,
            is_late=recall.is_late,
            planned_at=recall.planned_at,
            expires_at=recall.expires_at,
            shortfall_devices=recall.shortfall_devices,
            shortfall_earliest_at=recall.shortfall_earliest_at,
            buy_back_micros=recall.buy_back_micros,
            gap_micros=recall.gap_micros,
            version=recall.version,
        )
    )
    if recall.rows:
        work.tx.execute(recall_rows.insert(), [_row_values(recall.id, row) for row in recall.rows])
    assert found.inserted_primary_key is not None
    return get_recall(work.tx, recall.id)


def change_recall(work: Work, recall_id: str, **values: Any) -> None:
    work.tx.execute(
        recalls.update()
        .where(recalls.c.id == recall_id)
        .values(version=recalls.c.version + 1, **values)
    )


def change_row(work: Work, recall_id: str, number: int, **values: Any) -> None:
    work.tx.execute(
        recall_rows.update()
        .where(recall_rows.c.recall_id == recall_id, recall_rows.c.number == number)
        .values(**values)
    )


def get_recall(tx: Connection, recall_id: str) -> Recall:
    found = tx.execute(sa.select(recalls).where(recalls.c.id == recall_id)).first()
    if found is None:
        raise RecallNotFound
    return _recalls(tx, [found])[0]


# What the loops run at every step is built once: building a statement costs more than running it.
_RECALLS = (
    sa.select(recalls)
    .where(recalls.c.seq > sa.bindparam("after"))
    .order_by(recalls.c.seq)
    .limit(sa.bindparam("most"))
)
_LIVE_RECALLS = _RECALLS.where(recalls.c.state.in_([*LIVE]))
_UNACCEPTED = sa.select(recalls.c.id).where(
    recalls.c.state == RecallState.PLANNED, recalls.c.expires_at <= sa.bindparam("by")
)


def list_recalls(
    tx: Connection, *, after: int | None = None, limit: int = 100, live_only: bool = False
) -> list[Recall]:
    query = _LIVE_RECALLS if live_only else _RECALLS
    return _recalls(tx, tx.execute(query, {"after": after or 0, "most": limit}).all())


def list_unaccepted(tx: Connection, now: datetime) -> list[str]:
    """Plans whose minute is over."""
    return list(tx.execute(_UNACCEPTED, {"by": now}).scalars())


def _recalls(tx: Connection, found: Sequence[Any]) -> list[Recall]:
    rows: dict[str, list[RecallRow]] = {row.id: [] for row in found}
    if rows:
        query = sa.select(recall_rows).where(recall_rows.c.recall_id.in_(list(rows)))
        for row in tx.execute(query.order_by(recall_rows.c.recall_id, recall_rows.c.number)):
            rows[row.recall_id].append(_row(row))
    return [_recall(row, tuple(rows[row.id])) for row in found]


def _recall(row: Any, rows: tuple[RecallRow, ...]) -> Recall:
    return Recall(
        id=row.id,
        seq=row.seq,
        organisation_id=row.organisation_id,
        pool_id=row.pool_id,
        devices=row.devices,
        count=row.count,
        by=row.by,
        until=row.until,
        state=RecallState(row.state),
        is_late=bool(row.is_late),
        planned_at=row.planned_at,
        expires_at=row.expires_at,
        accepted_at=row.accepted_at,
        delivered_at=row.delivered_at,
        ended_at=row.ended_at,
        rows=rows,
        shortfall_devices=row.shortfall_devices,
        shortfall_earliest_at=row.shortfall_earliest_at,
        buy_back_micros=row.buy_back_micros,
        gap_micros=row.gap_micros,
        version=row.version,
    )


def _row_values(recall_id: str, row: RecallRow) -> dict[str, Any]:
    return {
        "recall_id": recall_id,
        "number": row.number,
        "devices": row.devices,
        "free_by": row.free_by,
        "victims": victims_json(row.victims),
        "claim_id": row.claim_id,
        "state": row.state,
        "delivered_at": row.delivered_at,
        "device_ids": list(row.device_ids),
    }


def victims_json(victims: Sequence[Victim]) -> list[dict[str, Any]]:
    return [
        {
            "claim_id": v.claim_id,
            "workload_id": v.workload_id,
            "organisation_id": v.organisation_id,
            "devices": v.devices,
            "notice_at": micros_since_epoch(v.notice_at),
            "term_at": micros_since_epoch(v.term_at),
            "lost_revenue_micros": v.lost_revenue_micros,
            "credit_micros": v.credit_micros,
        }
        for v in victims
    ]


def _row(row: Any) -> RecallRow:
    victims = tuple(
        Victim(
            **{
                **victim,
                "notice_at": from_micros(victim["notice_at"]),
                "term_at": from_micros(victim["term_at"]),
            }
        )
        for victim in row.victims
    )
    return RecallRow(
        number=row.number,
        devices=row.devices,
        free_by=row.free_by,
        victims=victims,
        claim_id=row.claim_id,
        state=RowState(row.state),
        delivered_at=row.delivered_at,
        device_ids=tuple(row.device_ids),
    )


def insert_shortfall(work: Work, shortfall: Shortfall) -> None:
    work.tx.execute(
        shortfalls.insert().values(
            id=shortfall.id,
            organisation_id=shortfall.organisation_id,
            pool_id=shortfall.pool_id,
            devices=shortfall.devices,
            recall_id=shortfall.recall_id,
            claim_id=shortfall.claim_id,
            needed_at=shortfall.needed_at,
            earliest_at=shortfall.earliest_at,
            recorded_at=shortfall.recorded_at,
        )
    )


def end_shortfalls(
    work: Work, *, recall_id: str | None = None, claim_id: str | None = None
) -> None:
    """What was missing has come, or is no longer wanted."""
    where = (
        shortfalls.c.recall_id == recall_id
        if recall_id is not None
        else shortfalls.c.claim_id == claim_id
    )
    work.tx.execute(
        shortfalls.update().where(where, shortfalls.c.ended_at.is_(None)).values(ended_at=work.now)
    )


_SHORTFALLS = (
    sa.select(shortfalls)
    .where(shortfalls.c.seq > sa.bindparam("after"))
    .order_by(shortfalls.c.seq)
    .limit(sa.bindparam("most"))
)
_OPEN_SHORTFALLS = _SHORTFALLS.where(shortfalls.c.ended_at.is_(None))


def list_shortfalls(
    tx: Connection, *, after: int | None = None, limit: int = 100, open_only: bool = False
) -> list[Shortfall]:
    query = _OPEN_SHORTFALLS if open_only else _SHORTFALLS
    return [
        Shortfall(
            id=row.id,
            seq=row.seq,
            organisation_id=row.organisation_id,
            pool_id=row.pool_id,
            devices=row.devices,
            recall_id=row.recall_id,
            claim_id=row.claim_id,
            needed_at=row.needed_at,
            earliest_at=row.earliest_at,
            recorded_at=row.recorded_at,
            ended_at=row.ended_at,
        )
        for row in tx.execute(query, {"after": after or 0, "most": limit})
    ]
