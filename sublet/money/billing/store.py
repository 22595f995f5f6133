"""Tables of billing, and rows ↔ values."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.store import Instant, metadata
from sublet.money.billing.model import (
    Account,
    Cause,
    ChargeClass,
    Invoice,
    InvoiceLine,
    InvoiceNotFound,
    Warning,
)

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

accounts = sa.Table(
    "billing_account",
    metadata,
    sa.Column("organisation_id", sa.String(40), primary_key=True),
    sa.Column("email", sa.String(254), unique=True),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("opened_at", Instant, nullable=False),
)

invoices = sa.Table(
    "billing_invoice",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("month", Instant, nullable=False),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("closes_at", Instant, nullable=False),
    sa.Column("issued_at", Instant, nullable=False),
    sa.Column("total_micros", sa.BigInteger, nullable=False),
    sa.Column("total_minor", sa.BigInteger, nullable=False),
    sa.UniqueConstraint("organisation_id", "month"),
    sqlite_autoincrement=True,
)

lines = sa.Table(
    "billing_line",
    metadata,
    sa.Column("invoice_id", sa.String(40), primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("organisation_id", sa.String(40), nullable=False, index=True),
    sa.Column("kind", sa.String(24), nullable=False),
    sa.Column("product", sa.String(64), nullable=False),
    sa.Column("charge_class", sa.String(24), nullable=False),
    sa.Column("contract_id", sa.String(40)),
    sa.Column("project_id", sa.String(40)),
    sa.Column("subject", sa.String(80)),
    sa.Column("starts_at", Instant, nullable=False),
    sa.Column("ends_at", Instant, nullable=False),
    sa.Column("quantity", sa.BigInteger, nullable=False),
    sa.Column("price_micros", sa.BigInteger),
    sa.Column("per", sa.BigInteger),
    sa.Column("version", sa.String(64), nullable=False),
    sa.Column("amount_micros", sa.BigInteger, nullable=False),
    sa.Column("shown_minor", sa.BigInteger, nullable=False),
    sa.Column("text", sa.Text, nullable=False),
)

warned = sa.Table(
    "billing_warning",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("workload_id", sa.String(40), nullable=False, index=True),
    sa.Column("cause", sa.String(24), nullable=False),
    sa.Column("threshold_seconds", sa.Integer, nullable=False),
    sa.Column("ends_at", Instant, nullable=False),
    sa.Column("said_at", Instant, nullable=False),
    sa.Column("cleared_at", Instant),
    sqlite_autoincrement=True,
)

watches = sa.Table(
    "billing_watch",
    metadata,
    sa.Column("run_id", sa.String(40), primary_key=True),
    sa.Column("organisation_id", sa.String(40), nullable=False, index=True),
    sa.Column("next_at", Instant, nullable=False),
)
"""When a metered run is to be looked at again. One without a row is looked at now."""


def insert_account(tx: Connection, account: Account) -> None:
    tx.execute(
        accounts.insert().values(
            organisation_id=account.organisation_id,
            email=account.email,
            currency=account.currency,
            opened_at=account.opened_at,
        )
    )


def find_account(tx: Connection, *where: sa.ColumnElement[bool]) -> Account | None:
    row = tx.execute(sa.select(accounts).where(*where)).one_or_none()
    return None if row is None else Account(**row._asdict())


def find_account_by_email(tx: Connection, email: str) -> Account | None:
    return find_account(tx, accounts.c.email == email)


def insert_invoice(tx: Connection, invoice: Invoice) -> int:
    """Freeze it; returns its sequence number."""
    done = tx.execute(
        invoices.insert().values(
            id=invoice.id,
            organisation_id=invoice.organisation_id,
            month=invoice.month,
            currency=invoice.currency,
            closes_at=invoice.closes_at,
            issued_at=invoice.issued_at,
            total_micros=invoice.total_micros,
            total_minor=invoice.total_minor,
        )
    )
    if invoice.lines:
        tx.execute(lines.insert(), [_line_values(invoice, line) for line in invoice.lines])
    key = done.inserted_primary_key
    assert key is not None
    return int(key[0])


def find_invoice(tx: Connection, organisation_id: str, month: datetime) -> Invoice | None:
    row = tx.execute(
        sa.select(invoices).where(
            invoices.c.organisation_id == organisation_id, invoices.c.month == month
        )
    ).one_or_none()
    return None if row is None else _invoice(tx, row)


def get_invoice(tx: Connection, invoice_id: str) -> Invoice:
    """Raises InvoiceNotFound."""
    row = tx.execute(sa.select(invoices).where(invoices.c.id == invoice_id)).one_or_none()
    if row is None:
        raise InvoiceNotFound(invoice_id=invoice_id)
    return _invoice(tx, row)


def list_invoices(
    tx: Connection, organisation_id: str | None, after: int | None, limit: int
) -> list[Invoice]:
    """In the order of issue, each with its lines."""
    query = sa.select(invoices).order_by(invoices.c.seq).limit(limit)
    if organisation_id is not None:
        query = query.where(invoices.c.organisation_id == organisation_id)
    if after is not None:
        query = query.where(invoices.c.seq > after)
    return [_invoice(tx, row) for row in tx.execute(query).all()]


def insert_warning(
    tx: Connection,
    *,
    organisation_id: str,
    workload_id: str,
    cause: Cause,
    threshold_seconds: int,
    ends_at: datetime,
    now: datetime,
) -> None:
    tx.execute(
        warned.insert().values(
            organisation_id=organisation_id,
            workload_id=workload_id,
            cause=cause,
            threshold_seconds=threshold_seconds,
            ends_at=ends_at,
            said_at=now,
        )
    )


def clear_warnings(
    tx: Connection, workload_id: str, cause: Cause, thresholds: Collection[int], now: datetime
) -> None:
    tx.execute(
        warned.update()
        .where(
            warned.c.workload_id == workload_id,
            warned.c.cause == cause,
            warned.c.threshold_seconds.in_(list(thresholds)),
            warned.c.cleared_at.is_(None),
        )
        .values(cleared_at=now)
    )


_WARNINGS = (
    sa.select(warned).where(warned.c.workload_id == sa.bindparam("workload")).order_by(warned.c.seq)
)
_IN_FORCE = _WARNINGS.where(warned.c.cleared_at.is_(None))


def list_warnings(tx: Connection, workload_id: str, *, in_force: bool = False) -> list[Warning]:
    rows = tx.execute(_IN_FORCE if in_force else _WARNINGS, {"workload": workload_id})
    return [Warning(**{**row._asdict(), "cause": Cause(row.cause)}) for row in rows]


_LOOKS = sa.select(watches)
_FORGET = watches.delete().where(watches.c.organisation_id == sa.bindparam("organisation"))


def next_looks(tx: Connection) -> dict[str, datetime]:
    """By run, when to look at it again."""
    return {row.run_id: row.next_at for row in tx.execute(_LOOKS)}


def organisations_watching(tx: Connection, run_ids: Collection[str]) -> set[str]:
    """Whose runs these are."""
    if not run_ids:
        return set()
    query = sa.select(watches.c.organisation_id).where(watches.c.run_id.in_(list(run_ids)))
    return set(tx.execute(query).scalars())


def set_looks(
    tx: Connection, organisation_id: str, run_ids: Collection[str], next_at: datetime
) -> None:
    """Look at these runs of the organisation again then, and forget its others."""
    tx.execute(_FORGET, {"organisation": organisation_id})
    if run_ids:
        tx.execute(
            watches.insert(),
            [
                {"run_id": run_id, "organisation_id": organisation_id, "next_at": next_at}
                for run_id in run_ids
            ],
        )


def look_again(tx: Connection, organisation_id: str, now: datetime) -> None:
    """Its credit has changed: look at its runs at once."""
    tx.execute(
        watches.update().where(watches.c.organisation_id == organisation_id).values(next_at=now)
    )


def _line_values(invoice: Invoice, line: InvoiceLine) -> dict[str, Any]:
    return {
        "invoice_id": invoice.id,
        "number": line.number,
        "organisation_id": invoice.organisation_id,
        "kind": line.kind,
        "product": line.product,
        "charge_class": line.charge_class,
        "contract_id": line.contract_id,
        "project_id": line.project_id,
        "subject": line.subject,
        "starts_at": line.starts_at,
        "ends_at": line.ends_at,
        "quantity": line.quantity,
        "price_micros": line.price_micros,
        "per": line.per,
        "version": line.version,
        "amount_micros": line.amount_micros,
        "shown_minor": line.shown_minor,
        "text": line.text,
    }


def _invoice(tx: Connection, row: sa.Row[Any]) -> Invoice:
    query = sa.select(lines).where(lines.c.invoice_id == row.id).order_by(lines.c.number)
    return Invoice(**row._asdict(), lines=tuple(_line(found) for found in tx.execute(query)))


def _line(row: sa.Row[Any]) -> InvoiceLine:
    fields = row._asdict()
    del fields["invoice_id"], fields["organisation_id"]
    return InvoiceLine(**{**fields, "charge_class": ChargeClass(fields["charge_class"])})
