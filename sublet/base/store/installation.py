"""The installation: its id, and the anchors of its clock, one set per boot."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.kernel.clock import Anchor
from sublet.base.store.types import Instant, metadata
from sublet.base.store.work import Work

facts = sa.Table(
    "base_installation",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
    sa.Column("at", Instant, nullable=False),
)

anchors = sa.Table(
    "base_clock_anchor",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("boot_id", sa.String(64), nullable=False, index=True),
    sa.Column("boot_ns", sa.BigInteger, nullable=False),
    sa.Column("utc_us", sa.BigInteger, nullable=False),
    sa.Column("rate_ppm", sa.Integer, nullable=False),
    sa.Column("wall_us", sa.BigInteger, nullable=False),
)
"""`wall_us`: what the wall clock read when the anchor was made; its difference is the step."""


_FACT = sa.select(facts.c.value).where(facts.c.name == sa.bindparam("of"))


def find_fact(tx: Connection, name: str) -> str | None:
    return tx.execute(_FACT, {"of": name}).scalar()


def keep_fact(work: Work, name: str, value: str) -> None:
    """Set a fact of the installation, such as its id or when it was last seen alive."""
    found = work.tx.execute(
        facts.update().where(facts.c.name == name).values(value=value, at=work.now)
    )
    if found.rowcount == 0:
        work.tx.execute(facts.insert().values(name=name, value=value, at=work.now))


def last_seen(tx: Connection) -> datetime | None:
    """The latest instant at which the loops are known to have run."""
    return tx.execute(sa.select(facts.c.at).where(facts.c.name == "alive")).scalar()


def list_anchors(tx: Connection, boot_id: str) -> list[Anchor]:
    rows = tx.execute(
        sa.select(anchors).where(anchors.c.boot_id == boot_id).order_by(anchors.c.seq)
    )
    return [
        Anchor(boot_id=r.boot_id, boot_ns=r.boot_ns, utc_us=r.utc_us, rate_ppm=r.rate_ppm)
        for r in rows
    ]


def keep_anchor(tx: Connection, anchor: Anchor, *, wall_us: int) -> None:
    tx.execute(
        anchors.insert().values(
            boot_id=anchor.boot_id,
            boot_ns=anchor.boot_ns,
            utc_us=anchor.utc_us,
            rate_ppm=anchor.rate_ppm,
            wall_us=wall_us,
        )
    )
