"""Tables of token lines and allowances, and rows ↔ values."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.store import Instant, metadata
from sublet.money.billing.token_lines import TOKEN_USAGE, LineKey, TokenLine

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

token_lines = sa.Table(
    "billing_token_line",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("kind", sa.String(24), nullable=False),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("project_id", sa.String(40), nullable=True),
    sa.Column("key_id", sa.String(40), nullable=False),
    sa.Column("replica_id", sa.String(40), nullable=False),
    sa.Column("is_first_party", sa.Boolean, nullable=False),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("tier", sa.String(24), nullable=False),
    sa.Column("version", sa.String(64), nullable=False),
    sa.Column("day", sa.Integer, nullable=False),
    sa.Column("token_class", sa.String(24), nullable=False),
    sa.Column("price_micros", sa.BigInteger, nullable=False),
    sa.Column("quantity", sa.BigInteger, nullable=False),
    sa.Column("spent_micros", sa.BigInteger, nullable=False),
    sa.Column("posted_micros", sa.BigInteger, nullable=False),
    sa.Column("lost_micros", sa.BigInteger, nullable=False),
    sa.Column("posted_quantity", sa.BigInteger, nullable=False),
    sa.Column("lost_quantity", sa.BigInteger, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    # A key has one organisation and one project for ever: they need not be in it.
    sa.UniqueConstraint(
        "key_id",
        "day",
        "model",
        "tier",
        "version",
        "token_class",
        "kind",
        "replica_id",
        name="uq_billing_token_line_what",
    ),
    sa.Index(None, "organisation_id", "day"),
    sa.Index(None, "replica_id", "day"),
    sqlite_autoincrement=True,
)

allowances = sa.Table(
    "billing_allowance",
    metadata,
    sa.Column("gateway", sa.String(40), primary_key=True),
    sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("key_id", sa.String(40), primary_key=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("project_id", sa.String(40), nullable=True),
    sa.Column("serial", sa.BigInteger, nullable=False),
    sa.Column("granted_micros", sa.BigInteger, nullable=False),
    sa.Column("settled_micros", sa.BigInteger, nullable=False),
    sa.Column("granted_tokens", sa.BigInteger, nullable=True),
    sa.Column("settled_tokens", sa.BigInteger, nullable=False),
    sa.Column("hold_id", sa.String(40), nullable=True),
    sa.Column("expires_at", Instant, nullable=False),
    sa.Column("state", sa.String(24), nullable=False),
    sa.Index(None, "state", "organisation_id"),
)


class AllowanceState(StrEnum):
    OPEN = "open"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowanceRow:
    """A key's slice at one gateway, as running totals of that gateway's life.

    `granted_*` bounds what it spends and holds; `settled_*` is what its events, so far read, spent.
    """

    gateway: str
    epoch: int
    key_id: str
    organisation_id: str
    project_id: str | None
    serial: int
    granted_micros: int
    settled_micros: int
    granted_tokens: int | None
    settled_tokens: int
    hold_id: str | None
    expires_at: datetime
    state: AllowanceState

    @property
    def subject(self) -> str:
        """Of its hold in the ledger."""
        return subject_of(self.gateway, self.epoch, self.key_id)

    @property
    def unsettled_micros(self) -> int:
        """What may still come of it: what its hold holds."""
        return max(self.granted_micros - self.settled_micros, 0)

    @property
    def unsettled_tokens(self) -> int:
        return max((self.granted_tokens or 0) - self.settled_tokens, 0)


def subject_of(gateway: str, epoch: int, key_id: str) -> str:
    return f"allowance:{gateway}:{epoch}:{key_id}"


_LINES = sa.select(token_lines)
_LINES_OF = _LINES.where(
    token_lines.c.key_id.in_(sa.bindparam("keys", expanding=True)),
    token_lines.c.day.in_(sa.bindparam("days", expanding=True)),
)
_LINES_OF_REPLICA = _LINES.where(token_lines.c.replica_id == sa.bindparam("of"))
CHUNK = 200
"""Keys looked up in one statement."""


def find_lines(tx: Connection, keys: Iterable[LineKey]) -> dict[LineKey, TokenLine]:
    """Those of the lines that there are."""
    wanted = set(keys)
    key_ids = sorted({key.key_id for key in wanted})
    days = sorted({key.day for key in wanted})
    found: dict[LineKey, TokenLine] = {}
    for start in range(0, len(key_ids), CHUNK):
        rows = tx.execute(_LINES_OF, {"keys": key_ids[start : start + CHUNK], "days": days})
        for line in map(_line, rows):
            if line.key in wanted:
                found[line.key] = line
    return found


def list_lines_of_replica(tx: Connection, replica_id: str) -> list[TokenLine]:
    """What was booked as made for nobody by this replica."""
    return [_line(row) for row in tx.execute(_LINES_OF_REPLICA, {"of": replica_id})]


def list_lines(
    tx: Connection,
    *,
    organisation_id: str | None,
    first_day: int,
    end_day: int,
    after: int | None,
    limit: int,
) -> list[TokenLine]:
    query = _LINES.where(
        token_lines.c.day >= first_day,
        token_lines.c.day < end_day,
        token_lines.c.seq > (after or 0),
    )
    if organisation_id is not None:
        query = query.where(token_lines.c.organisation_id == organisation_id)
    return [_line(row) for row in tx.execute(query.order_by(token_lines.c.seq).limit(limit))]


_INSERT_LINE = token_lines.insert()
_UPDATE_LINE = token_lines.update().where(token_lines.c.seq == sa.bindparam("of"))
_MOVING = (
    "quantity",
    "spent_micros",
    "posted_micros",
    "lost_micros",
    "posted_quantity",
    "lost_quantity",
    "number",
)


def insert_line(tx: Connection, line: TokenLine) -> int:
    """A new line; returns its number, by which its transfers are named."""
    values = {
        **line.key._asdict(),
        "price_micros": line.price_micros,
        **{name: getattr(line, name) for name in _MOVING},
    }
    key = tx.execute(_INSERT_LINE, values).inserted_primary_key
    assert key is not None
    return int(key[0])


def update_lines(tx: Connection, lines: Sequence[TokenLine]) -> None:
    if lines:
        tx.execute(
            _UPDATE_LINE,
            [{"of": line.seq, **{n: getattr(line, n) for n in _MOVING}} for line in lines],
        )


def used_tokens(tx: Connection, scope: str, scope_id: str, day: int) -> int:
    """Billed tokens of all classes on a day; `scope` is the column that names whose."""
    total = tx.execute(
        sa.select(sa.func.coalesce(sa.func.sum(token_lines.c.quantity), 0)).where(
            token_lines.c[scope] == scope_id,
            token_lines.c.day == day,
            token_lines.c.kind == TOKEN_USAGE,
        )
    ).scalar_one()
    return int(total)


_ALLOWANCES = sa.select(allowances)
_ALLOWANCE = _ALLOWANCES.where(
    allowances.c.gateway == sa.bindparam("at"),
    allowances.c.epoch == sa.bindparam("number"),
    allowances.c.key_id == sa.bindparam("of"),
)
_ALLOWANCES_OF = _ALLOWANCES.where(
    allowances.c.gateway == sa.bindparam("at"),
    allowances.c.epoch == sa.bindparam("number"),
    allowances.c.key_id.in_(sa.bindparam("keys", expanding=True)),
)
_OPEN_AT = _ALLOWANCES.where(
    allowances.c.gateway == sa.bindparam("at"),
    allowances.c.epoch == sa.bindparam("number"),
    allowances.c.state == AllowanceState.OPEN,
)
_UPDATE_ALLOWANCE = allowances.update().where(
    allowances.c.gateway == sa.bindparam("at"),
    allowances.c.epoch == sa.bindparam("number"),
    allowances.c.key_id == sa.bindparam("of"),
)


def find_allowance(tx: Connection, gateway: str, epoch: int, key_id: str) -> AllowanceRow | None:
    named = {"at": gateway, "number": epoch, "of": key_id}
    row = tx.execute(_ALLOWANCE, named).one_or_none()
    return None if row is None else _allowance(row)


def find_allowances(
    tx: Connection, gateway: str, epoch: int, key_ids: Collection[str]
) -> dict[str, AllowanceRow]:
    """By key; a key without one is left out."""
    wanted = sorted(key_ids)
    found: dict[str, AllowanceRow] = {}
    for start in range(0, len(wanted), CHUNK):
        named = {"at": gateway, "number": epoch, "keys": wanted[start : start + CHUNK]}
        for row in tx.execute(_ALLOWANCES_OF, named):
            found[row.key_id] = _allowance(row)
    return found


def list_open_at(tx: Connection, gateway: str, epoch: int) -> list[AllowanceRow]:
    return [_allowance(row) for row in tx.execute(_OPEN_AT, {"at": gateway, "number": epoch})]


def list_open(tx: Connection, scope: str | None = None, scope_id: str = "") -> list[AllowanceRow]:
    """Open allowances at all gateways; `scope` is the column that names whose."""
    query = _ALLOWANCES.where(allowances.c.state == AllowanceState.OPEN)
    if scope is not None:
        query = query.where(allowances.c[scope] == scope_id)
    return [_allowance(row) for row in tx.execute(query)]


def insert_allowance(tx: Connection, row: AllowanceRow) -> None:
    tx.execute(allowances.insert().values(**{c.name: getattr(row, c.name) for c in allowances.c}))


def update_allowances(tx: Connection, rows: Sequence[AllowanceRow]) -> None:
    if rows:
        tx.execute(
            _UPDATE_ALLOWANCE,
            [
                {
                    "at": row.gateway,
                    "number": row.epoch,
                    "of": row.key_id,
                    "serial": row.serial,
                    "granted_micros": row.granted_micros,
                    "settled_micros": row.settled_micros,
                    "granted_tokens": row.granted_tokens,
                    "settled_tokens": row.settled_tokens,
                    "hold_id": row.hold_id,
                    "expires_at": row.expires_at,
                    "state": row.state,
                }
                for row in rows
            ],
        )


def _line(row: sa.Row[Any]) -> TokenLine:
    fields = row._asdict()
    key = LineKey(**{name: fields.pop(name) for name in LineKey._fields})
    return TokenLine(key=key, **fields)


def _allowance(row: sa.Row[Any]) -> AllowanceRow:
    return AllowanceRow(**{**row._asdict(), "state": AllowanceState(row.state)})
