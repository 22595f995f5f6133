"""Tables of the ledger, and rows ↔ values.

An account row carries its running balance and the sum of its open holds, so that a hold costs the
same after a year as on the first day. The UPDATE that changes it takes the account's lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import cache
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


# What every rent runs is built once: building a statement costs more than running it.
_CHANGE = (
    accounts.update()
    .where(accounts.c.name == sa.bindparam("account"), accounts.c.currency == sa.bindparam("unit"))
    .values(
        balance_micros=accounts.c.balance_micros + sa.bindparam("more_balance"),
        held_micros=accounts.c.held_micros + sa.bindparam("more_held"),
    )
)
_CHANGE_IF_BALANCE = _CHANGE.where(accounts.c.balance_micros >= sa.bindparam("least"))
_CHANGE_IF_FREE = _CHANGE.where(
    accounts.c.balance_micros - accounts.c.held_micros >= sa.bindparam("least")
)


def move(tx: Connection, name: str, more: Money, *, from_balance: bool = False) -> bool:
    """Lock an account and change its balance. False, and nothing changed: it is not there or in
    another currency, or `from_balance` and its balance is too small."""
    values = {"more_balance": more.micros, "more_held": 0}
    if from_balance:
        return _change(tx, _CHANGE_IF_BALANCE, name, more, least=-more.micros, **values)
    return _change(tx, _CHANGE, name, more, **values)


def tie(tx: Connection, name: str, more: Money) -> bool:
    """Lock an account and change what is held of it. False, and nothing changed: it is not there
    or in another currency, or less than that is free."""
    values = {"more_balance": 0, "more_held": more.micros}
    return _change(tx, _CHANGE_IF_FREE, name, more, least=more.micros, **values)


def untie(tx: Connection, name: str, less: Money) -> bool:
    """Lock an account and hold so much less of it, whatever its balance."""
    return _change(tx, _CHANGE, name, less, more_balance=0, more_held=-less.micros)


def _change(tx: Connection, statement: sa.Update, name: str, money: Money, **values: int) -> bool:
    changed = tx.execute(statement, {"account": name, "unit": money.currency, **values})
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


_ACCOUNT = sa.select(accounts).where(accounts.c.name == sa.bindparam("account"))


def find_account(tx: Connection, name: str) -> tuple[Money, Money] | None:
    """Balance and the sum of open holds."""
    row = tx.execute(_ACCOUNT, {"account": name}).one_or_none()
    if row is None:
        return None
    return Money(row.balance_micros, row.currency), Money(row.held_micros, row.currency)


_TRANSFER_BY_KEY = sa.select(transfers).where(transfers.c.key == sa.bindparam("by_key"))


def find_transfer(tx: Connection, key: str) -> Transfer | None:
    row = tx.execute(_TRANSFER_BY_KEY, {"by_key": key}).one_or_none()
    return None if row is None else _transfer(row)


def insert_transfer(tx: Connection, values: dict[str, Any]) -> int:
    """Append; returns the sequence number given."""
    charge = charge_of(values["debit"], values["credit"], values["amount_micros"])
    done = tx.execute(transfers.insert(), {**values, "charge_micros": charge})
    key = done.inserted_primary_key
    assert key is not None
    return int(key[0])


@cache
def _transfers(of_one: bool, is_own: bool, is_later: bool, is_limited: bool) -> sa.Select[Any]:
    query = (
        sa.select(transfers)
        .where(transfers.c.at >= sa.bindparam("start"), transfers.c.at < sa.bindparam("end"))
        .order_by(transfers.c.seq)
    )
    if of_one:
        query = query.where(transfers.c.organisation_id == sa.bindparam("of"))
    if is_own:
        own: sa.BindParameter[str] = sa.bindparam("own", expanding=True)
        query = query.where(sa.or_(transfers.c.debit.in_(own), transfers.c.credit.in_(own)))
    if is_later:
        query = query.where(transfers.c.seq > sa.bindparam("after"))
    return query.limit(sa.bindparam("most")) if is_limited else query


def list_transfers(
    tx: Connection,
    organisation_id: str | None,
    start: datetime,
    end: datetime,
    after: int | None,
    limit: int | None,
    on: Sequence[str] | None = None,
) -> list[Transfer]:
    """`on`: only what moved on one of these accounts."""
    query = _transfers(
        organisation_id is not None, on is not None, after is not None, limit is not None
    )
    given = {
        "start": start,
        "end": end,
        "of": organisation_id,
        "own": on,
        "after": after,
        "most": limit,
    }
    values = {name: value for name, value in given.items() if value is not None}
    return [_transfer(row) for row in tx.execute(query, values)]


_CHARGED = sa.select(sa.func.coalesce(sa.func.sum(transfers.c.charge_micros), 0)).where(
    transfers.c.contract_id == sa.bindparam("contract"),
    transfers.c.kind.in_(sa.bindparam("kinds", expanding=True)),
)


def charged_under(tx: Connection, contract_id: str, kinds: Sequence[str]) -> int:
    """What was posted for a contract under any of these kinds."""
    values = {"contract": contract_id, "kinds": list(kinds)}
    return int(tx.execute(_CHARGED, values).scalar_one())


_DEBITED = sa.select(
    sa.func.coalesce(
        sa.func.sum(
            sa.case(
                (transfers.c.debit == sa.bindparam("account"), transfers.c.amount_micros),
                else_=-transfers.c.amount_micros,
            )
        ),
        0,
    )
).where(
    transfers.c.contract_id == sa.bindparam("contract"),
    sa.or_(
        transfers.c.debit == sa.bindparam("account"), transfers.c.credit == sa.bindparam("account")
    ),
)


def debited_under(tx: Connection, contract_id: str, account: str) -> int:
    """What a contract took from an account, less what it gave back."""
    values = {"contract": contract_id, "account": account}
    return int(tx.execute(_DEBITED, values).scalar_one())


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
        holds.insert(),
        {
            "id": hold.id,
            "organisation_id": hold.organisation_id,
            "account": hold.account,
            "amount_micros": hold.amount_micros,
            "currency": hold.currency,
            "subject": hold.subject,
            "project_id": hold.project_id,
            "key_id": hold.key_id,
            "epoch": hold.epoch,
            "expires_at": hold.expires_at,
            "state": hold.state,
            "created_at": hold.created_at,
            "admitted_at": hold.admitted_at,
            "version": hold.version,
        },
    )


_UPDATE_HOLD = holds.update().where(holds.c.id == sa.bindparam("hold"))
_HOLD = sa.select(holds).where(holds.c.id == sa.bindparam("hold"))
_OPEN_HOLD_OF = sa.select(holds).where(
    holds.c.subject == sa.bindparam("of"), holds.c.state == HoldState.OPEN
)


def update_hold(tx: Connection, hold: Hold) -> None:
    tx.execute(
        _UPDATE_HOLD,
        {
            "hold": hold.id,
            "amount_micros": hold.amount_micros,
            "expires_at": hold.expires_at,
            "state": hold.state,
            "admitted_at": hold.admitted_at,
            "version": hold.version,
        },
    )


def find_hold(tx: Connection, hold_id: str) -> Hold | None:
    row = tx.execute(_HOLD, {"hold": hold_id}).one_or_none()
    return None if row is None else _hold(row)


def find_open_hold(tx: Connection, subject: str) -> Hold | None:
    row = tx.execute(_OPEN_HOLD_OF, {"of": subject}).one_or_none()
    return None if row is None else _hold(row)


_OPEN_HOLDS = (
    sa.select(holds).where(holds.c.state == HoldState.OPEN).order_by(holds.c.created_at, holds.c.id)
)
_EXPIRED = _OPEN_HOLDS.where(holds.c.expires_at <= sa.bindparam("by"))
_HOLDS_OF = _OPEN_HOLDS.where(holds.c.organisation_id == sa.bindparam("organisation"))


def list_expired_holds(tx: Connection, by: datetime) -> list[Hold]:
    return [_hold(row) for row in tx.execute(_EXPIRED, {"by": by})]


def list_holds(tx: Connection, organisation_id: str) -> list[Hold]:
    return [_hold(row) for row in tx.execute(_HOLDS_OF, {"organisation": organisation_id})]


def _transfer(row: sa.Row[Any]) -> Transfer:
    fields = row._asdict()
    del fields["charge_micros"]
    return Transfer(**fields)


def _hold(row: sa.Row[Any]) -> Hold:
    fields = row._asdict()
    return Hold(**{**fields, "state": HoldState(fields["state"])})
