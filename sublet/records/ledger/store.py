"""Tables of the ledger, and rows ↔ values.

An account row carries its running balance and the sum of its open holds, so that a hold costs the
same after a year as on the first day. The UPDATE that changes it takes the account's lock.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.kernel.money import Money
from sublet.base.store import Instant, Json, metadata
from sublet.records.ledger.model import Drift, Hold, HoldState, Transfer, charge_of

accounts = sa.Table(
    "ledger_account",
    metadata,
    sa.Column("name", sa.String(80), primary_key=True),
    sa.Column("organisation_id", sa.String(40), nullable=True),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("balance_micros", sa.BigInteger, nullable=False),
    sa.Column("held_micros", sa.BigInteger, nullable=False),
)

transfers = sa.Table(
    "ledger_transfer",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("key", sa.String(200), nullable=False, unique=True),
    sa.Column("debit", sa.String(80), nullable=False, index=True),
    sa.Column("credit", sa.String(80), nullable=False, index=True),
    sa.Column("amount_micros", sa.BigInteger, nullable=False),
    sa.Column("charge_micros", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("kind", sa.String(24), nullable=False),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("project_id", sa.String(40), nullable=True),
    sa.Column("key_id", sa.String(40), nullable=True),
    sa.Column("subject", sa.String(80), nullable=True),
    sa.Column("contract_id", sa.String(40), nullable=True),
    sa.Column("starts_at", Instant, nullable=True),
    sa.Column("ends_at", Instant, nullable=True),
    sa.Column("detail", Json, nullable=False),
    sa.Column("at", Instant, nullable=False),
    sa.CheckConstraint("amount_micros > 0", name="positive"),
    sa.Index(None, "contract_id", "kind"),
    sa.Index(None, "organisation_id", "at"),
    sa.Index(None, "project_id", "at"),
    sa.Index(None, "key_id", "at"),
    sa.Index(None, "at"),
    sqlite_autoincrement=True,
)

holds = sa.Table(
    "ledger_hold",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("account", sa.String(80), nullable=False),
    sa.Column("amount_micros", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("subject", sa.String(80), nullable=False),
    sa.Column("project_id", sa.String(40), nullable=True),
    sa.Column("key_id", sa.String(40), nullable=True),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("expires_at", Instant, nullable=False),
    sa.Column("state", sa.String(24), nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("admitted_at", Instant, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.CheckConstraint("amount_micros >= 0", name="not_negative"),
    sa.Index(None, "state", "expires_at"),
    sa.Index(None, "organisation_id", "state"),
    # A subject has one open hold: doing it twice must not tie up the credit twice.
    sa.Index(
        "uq_ledger_hold_open_subject",
        "subject",
        unique=True,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    ),
)


def change_account(
    tx: Connection,
    name: str,
    *,
    balance_micros: int = 0,
    held_micros: int = 0,
    guard: sa.ColumnElement[bool] | None = None,
) -> bool:
    """Lock and change one account; False if it is not there or the guard does not hold."""
    statement = accounts.update().where(accounts.c.name == name)
    if guard is not None:
        statement = statement.where(guard)
    changed = tx.execute(
        statement.values(
            balance_micros=accounts.c.balance_micros + balance_micros,
            held_micros=accounts.c.held_micros + held_micros,
        )
    )
    return changed.rowcount == 1


def insert_account(
    tx: Connection, name: str, organisation_id: str | None, currency: str, balance_micros: int
) -> None:
    tx.execute(
        accounts.insert().values(
            name=name,
            organisation_id=organisation_id,
            currency=currency,
            balance_micros=balance_micros,
            held_micros=0,
        )
    )


def find_account(tx: Connection, name: str) -> tuple[Money, Money] | None:
    """Balance and the sum of open holds."""
    row = tx.execute(sa.select(accounts).where(accounts.c.name == name)).one_or_none()
    if row is None:
        return None
    return Money(row.balance_micros, row.currency), Money(row.held_micros, row.currency)


def find_transfer(tx: Connection, key: str) -> Transfer | None:
    row = tx.execute(sa.select(transfers).where(transfers.c.key == key)).one_or_none()
    return None if row is None else _transfer(row)


def insert_transfer(tx: Connection, values: dict[str, Any]) -> int:
    """Append; returns the sequence number given."""
    charge = charge_of(values["debit"], values["credit"], values["amount_micros"])
    done = tx.execute(transfers.insert().values(**values, charge_micros=charge))
    key = done.inserted_primary_key
    assert key is not None
    return int(key[0])


def list_transfers(
    tx: Connection,
    organisation_id: str | None,
    start: datetime,
    end: datetime,
    after: int | None,
    limit: int | None,
) -> list[Transfer]:
    query = sa.select(transfers).where(transfers.c.at >= start, transfers.c.at < end)
    if organisation_id is not None:
        query = query.where(transfers.c.organisation_id == organisation_id)
    if after is not None:
        query = query.where(transfers.c.seq > after)
    return [_transfer(row) for row in tx.execute(query.order_by(transfers.c.seq).limit(limit))]


def charged(tx: Connection, *where: sa.ColumnElement[bool]) -> int:
    total = tx.execute(
        sa.select(sa.func.coalesce(sa.func.sum(transfers.c.charge_micros), 0)).where(*where)
    ).scalar_one()
    return int(total)


def held(tx: Connection, *where: sa.ColumnElement[bool]) -> int:
    total = tx.execute(
        sa.select(sa.func.coalesce(sa.func.sum(holds.c.amount_micros), 0)).where(
            holds.c.state == HoldState.OPEN, *where
        )
    ).scalar_one()
    return int(total)


def moved(tx: Connection, *where: sa.ColumnElement[bool]) -> dict[str, int]:
    """Credit less debit by account, over the transfers chosen."""
    found: dict[str, int] = {}
    for column, sign in ((transfers.c.credit, 1), (transfers.c.debit, -1)):
        rows = tx.execute(
            sa.select(column, sa.func.sum(transfers.c.amount_micros)).where(*where).group_by(column)
        )
        for name, total in rows:
            found[name] = found.get(name, 0) + sign * int(total)
    return found


def list_drifts(tx: Connection) -> list[Drift]:
    counted = moved(tx)
    tied = {
        name: int(total)
        for name, total in tx.execute(
            sa.select(holds.c.account, sa.func.sum(holds.c.amount_micros))
            .where(holds.c.state == HoldState.OPEN)
            .group_by(holds.c.account)
        )
    }
    kept = {
        row.name: (row.balance_micros, row.held_micros) for row in tx.execute(sa.select(accounts))
    }
    drifts = []
    for name in sorted({*counted, *tied, *kept}):
        balance, held_ = kept.get(name, (0, 0))
        if balance != counted.get(name, 0) or held_ != tied.get(name, 0):
            drifts.append(
                Drift(
                    account=name,
                    balance_kept=balance,
                    balance_counted=counted.get(name, 0),
                    held_kept=held_,
                    held_counted=tied.get(name, 0),
                )
            )
    return drifts


def sum_of_balances(tx: Connection) -> int:
    total = tx.execute(
        sa.select(sa.func.coalesce(sa.func.sum(accounts.c.balance_micros), 0))
    ).scalar_one()
    return int(total)


def insert_hold(tx: Connection, hold: Hold) -> None:
    tx.execute(
        holds.insert().values(
            id=hold.id,
            organisation_id=hold.organisation_id,
            account=hold.account,
            amount_micros=hold.amount_micros,
            currency=hold.currency,
            subject=hold.subject,
            project_id=hold.project_id,
            key_id=hold.key_id,
            epoch=hold.epoch,
            expires_at=hold.expires_at,
            state=hold.state,
            created_at=hold.created_at,
            admitted_at=hold.admitted_at,
            version=hold.version,
        )
    )


def update_hold(tx: Connection, hold: Hold) -> None:
    tx.execute(
        holds.update()
        .where(holds.c.id == hold.id)
        .values(
            amount_micros=hold.amount_micros,
            expires_at=hold.expires_at,
            state=hold.state,
            admitted_at=hold.admitted_at,
            version=hold.version,
        )
    )


def find_hold(tx: Connection, *where: sa.ColumnElement[bool]) -> Hold | None:
    row = tx.execute(sa.select(holds).where(*where)).one_or_none()
    return None if row is None else _hold(row)


def list_holds(tx: Connection, *where: sa.ColumnElement[bool]) -> list[Hold]:
    rows = tx.execute(
        sa.select(holds)
        .where(holds.c.state == HoldState.OPEN, *where)
        .order_by(holds.c.created_at, holds.c.id)
    )
    return [_hold(row) for row in rows]


def _transfer(row: sa.Row[Any]) -> Transfer:
    fields = row._asdict()
    del fields["charge_micros"]
    return Transfer(**fields)


def _hold(row: sa.Row[Any]) -> Hold:
    fields = row._asdict()
    return Hold(**{**fields, "state": HoldState(fields["state"])})
