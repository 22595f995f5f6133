"""Invoices: so far, and issued. Reads the ledger, writes what is frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import UTC, datetime

from sqlalchemy import Connection

from sublet.base.kernel.interval import (
    EPOCH,
    from_micros,
    micros_since_epoch,
    month_of,
    next_month,
)
from sublet.base.store import Work
from sublet.base.store.installation import find_fact, keep_fact
from sublet.money.billing import store
from sublet.money.billing.invoice import billing_month, closes_at, draft
from sublet.money.billing.model import Charge, Invoice, InvoiceIssued, MonthNotClosed
from sublet.records import ledger

CURRENCY = "USD"
CLOSED_TO = "billing_closed_to"
"""The installation's fact: every month before this instant has its invoices."""


def charge_of(transfer: ledger.Transfer) -> Charge | None:
    """The transfer as an invoice sees it; None for what is no charge: grants and payments."""
    if transfer.charge_micros == 0:
        return None
    detail = transfer.detail
    starts_at = transfer.starts_at or transfer.at
    return Charge(
        transfer_id=transfer.id,
        kind=transfer.kind,
        product=str(detail.get("product", transfer.kind)),
        organisation_id=transfer.organisation_id,
        project_id=transfer.project_id,
        subject=transfer.subject,
        contract_id=transfer.contract_id,
        starts_at=starts_at,
        ends_at=transfer.ends_at or starts_at,
        posted_at=transfer.at,
        quantity=int(detail.get("quantity", 0)),
        price_micros=detail.get("price_micros"),
        per=detail.get("per"),
        version=str(detail.get("version", "")),
        amount_micros=transfer.charge_micros,
        note=str(detail.get("why", "")),
    )


def charges(tx: Connection, organisation_id: str, month: datetime) -> list[Charge]:
    """All that may stand on a month's invoice.

    Use is charged after it began, so nothing of this month was posted before it; what is posted
    after it has closed belongs to a later one.
    """
    return _charges(ledger.list_transfers(tx, organisation_id, month, closes_at(month)))


def _charges(transfers: Iterable[ledger.Transfer]) -> list[Charge]:
    return [charge for found in transfers if (charge := charge_of(found)) is not None]


def invoice_of(tx: Connection, organisation_id: str, month: datetime) -> Invoice:
    """A month's invoice: as issued, else as it stands by what is posted."""
    month = month_of(month)
    issued = store.find_invoice(tx, organisation_id, month)
    if issued is not None:
        return issued
    return draft(
        organisation_id=organisation_id,
        month=month,
        currency=CURRENCY,
        charges=charges(tx, organisation_id, month),
    )


def invoice_so_far(tx: Connection, organisation_id: str, now: datetime) -> Invoice:
    """The invoice of the month that `now` lies in. What is metered and not yet settled, a minute
    at most, is not on it: its sum is the ledger's change."""
    return invoice_of(tx, organisation_id, month_of(now))


def issue(work: Work, organisation_id: str, month: datetime) -> Invoice:
    """Freeze a month's invoice. Issuing it twice is issuing it once.

    Raises MonthNotClosed within 72 h of the month's end: until then late use may still come.
    """
    month = month_of(month)
    if work.now < closes_at(month):
        raise MonthNotClosed(closes_at=closes_at(month).isoformat())
    found = invoice_of(work.tx, organisation_id, month)
    if found.issued_at is not None:
        return found
    made = dataclasses.replace(found, id=work.ids.new("inv"), issued_at=work.now)
    assert made.id is not None
    seq = store.insert_invoice(work.tx, made)
    work.emit(
        InvoiceIssued(
            organisation_id=organisation_id, invoice_id=made.id, total_micros=made.total_micros
        )
    )
    return dataclasses.replace(made, seq=seq)


def list_invoices(
    tx: Connection, organisation_id: str | None, after: int | None = None, limit: int = 100
) -> list[Invoice]:
    """Issued invoices in the order of issue; None: of all organisations."""
    return store.list_invoices(tx, organisation_id, after, limit)


def get_invoice(tx: Connection, invoice_id: str) -> Invoice:
    return store.get_invoice(tx, invoice_id)


def issue_due(work: Work) -> list[Invoice]:
    """Issue what the oldest month that has closed and is not done yet owes; none: nothing is due.

    One month a Work. A closed month never gains a charge, so a month that is done stays done.
    """
    month = next_to_close(work.tx)
    if month is None or closes_at(month) > work.now:
        return []
    found = ledger.list_transfers(work.tx, None, month, closes_at(month))
    owing = {
        charge.organisation_id
        for charge in _charges(found)
        if billing_month(charge.starts_at, charge.posted_at) == month
    }
    made = [issue(work, organisation_id, month) for organisation_id in sorted(owing)]
    keep_fact(work, CLOSED_TO, str(micros_since_epoch(next_month(month))))
    return made


def next_to_close(tx: Connection) -> datetime | None:
    """The oldest month whose invoices are not all issued; None before the first transfer."""
    closed_to = find_fact(tx, CLOSED_TO)
    if closed_to is not None:
        return from_micros(int(closed_to))
    first = ledger.list_transfers(tx, None, EPOCH, datetime.max.replace(tzinfo=UTC), limit=1)
    return month_of(first[0].at) if first else None
