"""Events go up: written with their cause, read by the loops of higher packages.

At least once: a consumer handles an envelope and advances its cursor in one Work, so a crash
between the two repeats nothing; handlers whose effect lies outside the database dedupe by `seq`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.store.types import metadata
from sublet.base.store.work import Event, Work, outbox, restore

E = TypeVar("E", bound=Event)

cursors = sa.Table(
    "base_outbox_cursor",
    metadata,
    sa.Column("consumer", sa.String(64), primary_key=True),
    sa.Column("seq", sa.BigInteger, nullable=False),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    seq: int
    kind: str
    payload: Mapping[str, Any]
    at: datetime

    def read(self, event_type: type[E]) -> E:
        """The event as it was emitted."""
        assert event_type.kind == self.kind
        return event_type(**restore(event_type, self.payload))


_PENDING = (
    sa.select(outbox)
    .where(
        outbox.c.seq
        > sa.select(sa.func.coalesce(sa.func.max(cursors.c.seq), 0))
        .where(cursors.c.consumer == sa.bindparam("consumer"))
        .scalar_subquery(),
        outbox.c.kind.in_(sa.bindparam("kinds", expanding=True)),
    )
    .order_by(outbox.c.seq)
    .limit(sa.bindparam("most"))
)


def pending(
    tx: Connection, consumer: str, kinds: Sequence[type[Event]], *, limit: int = 200
) -> list[Envelope]:
    """The oldest events of these kinds that the consumer has not passed, in order."""
    asked = {"consumer": consumer, "kinds": [k.kind for k in kinds], "most": limit}
    rows = tx.execute(_PENDING, asked)
    return [Envelope(seq=r.seq, kind=r.kind, payload=r.payload, at=r.at) for r in rows]


def advance(work: Work, consumer: str, seq: int) -> None:
    """Everything up to `seq` is dealt with. Never backwards."""
    changed = work.tx.execute(
        cursors.update()
        .where(cursors.c.consumer == consumer)
        .values(seq=sa.case((cursors.c.seq < seq, seq), else_=cursors.c.seq))
    )
    if changed.rowcount == 0:
        work.tx.execute(cursors.insert().values(consumer=consumer, seq=seq))
