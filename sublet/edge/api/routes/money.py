"""What it came to: usage, balance, credits, payments, transfers, invoices, the statement."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from sublet.base.kernel.errors import Invalid
from sublet.base.kernel.interval import month_of
from sublet.base.kernel.money import Money
from sublet.base.store import Work
from sublet.base.wire import rest
from sublet.edge.api.call import Call, Caller, Poster
from sublet.edge.api.errors import declared
from sublet.edge.api.paging import After, Id, Limit, OrganisationQuery, by_seq
from sublet.edge.api.show import money as show
from sublet.money import billing, economics
from sublet.records import ledger, metering, tenancy
from sublet.records.tenancy import Action
from sublet.shops import compute

router = APIRouter(prefix="/v1", tags=["money"], responses=declared())

Start = Annotated[
    rest.Instant | None,
    Query(description="The first instant; left out: the beginning of this month, UTC."),
]
End = Annotated[
    rest.Instant | None, Query(description="The first instant after it; left out: now.")
]
LONGEST = timedelta(days=5 * 366)


def window(call: Call, start: datetime | None, end: datetime | None) -> tuple[datetime, datetime]:
    """`[start, end)` as asked for, or this month so far."""
    now = call.deps.store.clock.now()
    first, last = start or month_of(end or now), end or now
    if last < first:
        raise Invalid("end: must not lie before `start`", param="end")
    if last - first > LONGEST:
        raise Invalid("start: at most five years before `end`", param="start")
    return first, last


def whose(call: Call, action: Action, organisation_id: str | None) -> str:
    """Whose money is asked about: one's own, or for the owner anybody's."""
    found = organisation_id or call.organisation_id
    tenancy.require(call.identity, action, found)
    if found != call.organisation_id:
        with call.read() as tx:
            tenancy.get_organisation(tx, found)
    return found


@router.get("/usage")
def list_usage(
    call: Caller,
    start: Start = None,
    end: End = None,
    organisation_id: OrganisationQuery = None,
    after: After = None,
    limit: Limit = 100,
) -> rest.Page[rest.UsageLine]:
    """By workload, oldest first: what it held and ran in the window, and what that came to."""
    project_id = call.identity.project_id
    if project_id is not None and organisation_id in (None, call.organisation_id):
        tenancy.require(call.identity, Action.READ_MONEY, call.organisation_id, project_id)
        found_id = call.organisation_id
    else:
        found_id = whose(call, Action.READ_MONEY, organisation_id)
    first, last = window(call, start, end)
    with call.read() as tx:
        workloads = compute.list_workloads(
            tx, organisation_id=found_id, project_id=project_id, after=after, limit=limit + 1
        )
        charged = _charged(tx, found_id, first, last)
        lines = {
            workload.id: _usage(tx, workload, charged, first, last)
            for workload in workloads[:limit]
        }
    return by_seq(workloads, limit, lambda workload: lines[workload.id])


def _charged(
    tx: Connection, organisation_id: str, start: datetime, end: datetime
) -> dict[str, int]:
    found: dict[str, int] = {}
    for transfer in ledger.list_transfers(tx, organisation_id, start, end):
        if transfer.contract_id is not None:
            before = found.get(transfer.contract_id, 0)
            found[transfer.contract_id] = before + transfer.charge_micros
    return found


def _usage(
    tx: Connection,
    workload: compute.Workload,
    charged: dict[str, int],
    start: datetime,
    end: datetime,
) -> rest.UsageLine:
    assert workload.kind != "replica", "a replica is its deployment's"
    contract_id = workload.contract_id
    sums = dict.fromkeys(("held", "ran"), 0)
    for kind in sums:
        for used in metering.windows(tx, contract_id, kind) if contract_id else ():
            begins, ends = max(used.start, start), min(used.end, end)
            if begins < ends:
                sums[kind] += used.units * ((ends - begins) // timedelta(milliseconds=1))
    return rest.UsageLine(
        workload_id=workload.id,
        kind=workload.kind,
        name=workload.name,
        organisation_id=workload.organisation_id,
        project_id=workload.project_id,
        contract_id=contract_id,
        held_device_ms=sums["held"],
        ran_device_ms=sums["ran"],
        charged=rest.Money.of(Money(charged.get(contract_id or "", 0))),
    )


@router.get("/balance")
def get_balance(call: Caller, organisation_id: OrganisationQuery = None) -> rest.Balance:
    """Credit, what of it is held, and how long it lasts."""
    found_id = whose(call, Action.READ_MONEY, organisation_id)
    with call.read() as tx:
        balance = ledger.balance(tx, ledger.customer_account(found_id))
        available = ledger.available(tx, found_id)
        runway = billing.runway(tx, found_id, call.deps.store.clock.now())
    return rest.Balance(
        organisation_id=found_id,
        balance=rest.Money.of(balance),
        held=rest.Money.of(balance - available),
        available=rest.Money.of(available),
        burn_micros_per_hour=runway.burn_micros_per_hour,
        runs_out_at=runway.ends_at,
    )


@router.post("/credits", status_code=201, response_model=rest.Transfer, responses=declared(409))
def grant_credit(call: Poster, body: rest.CreditCreate) -> Response:
    """The owner gives credit; once a reference. It makes an unverified organisation good."""

    def do(work: Work) -> rest.Transfer:
        amount = Money(body.amount_micros, call.deps.currency)
        return show.transfer(
            billing.grant(
                work,
                body.organisation_id,
                amount,
                reference=body.reference,
                note=body.note,
            )
        )

    detail = {"amount_micros": body.amount_micros, "reference": body.reference}
    return call.act(
        "grant_credit",
        do,
        needs=Action.ADMINISTER_ORGANISATIONS,
        status=201,
        about=body.organisation_id,
        detail=detail,
    )


@router.post("/payments", status_code=201, response_model=rest.Transfer, responses=declared(409))
def record_payment(call: Poster, body: rest.PaymentCreate) -> Response:
    """The owner records money that came in; once a reference."""

    def do(work: Work) -> rest.Transfer:
        amount = Money(body.amount_micros, call.deps.currency)
        return show.transfer(
            billing.record_payment(
                work,
                body.organisation_id,
                amount,
                reference=body.reference,
                note=body.note,
            )
        )

    detail = {"amount_micros": body.amount_micros, "reference": body.reference}
    return call.act(
        "record_payment",
        do,
        needs=Action.ADMINISTER_ORGANISATIONS,
        status=201,
        about=body.organisation_id,
        detail=detail,
    )


@router.get("/transfers")
def list_transfers(
    call: Caller,
    start: Start = None,
    end: End = None,
    organisation_id: OrganisationQuery = None,
    after: After = None,
    limit: Limit = 100,
) -> rest.Page[rest.Transfer]:
    """What moved on the organisation's account in the window, in the order of posting.

    The owner sees besides what was borne of the organisation's use: its losses.
    """
    found_id = whose(call, Action.READ_MONEY, organisation_id)
    first, last = window(call, start, end)
    # What nobody charges it for is no business of a customer's, not even how much it is.
    listed = ledger.list_transfers if call.identity.is_owner else ledger.list_own_transfers
    with call.read() as tx:
        found = listed(tx, found_id, first, last, after=after, limit=limit + 1)
    return by_seq(found, limit, show.transfer)


@router.get("/invoices/so-far")
def get_invoice_so_far(call: Caller, organisation_id: OrganisationQuery = None) -> rest.Invoice:
    """This month as it stands: its sum is the ledger's change."""
    found_id = whose(call, Action.READ_MONEY, organisation_id)
    with call.read() as tx:
        found = billing.invoice_so_far(tx, found_id, call.deps.store.clock.now())
    return show.invoice(found)


@router.get("/invoices")
def list_invoices(
    call: Caller,
    organisation_id: OrganisationQuery = None,
    after: After = None,
    limit: Limit = 100,
) -> rest.Page[rest.InvoiceSummary]:
    """Issued ones, in the order of issue."""
    found_id = whose(call, Action.READ_MONEY, organisation_id)
    with call.read() as tx:
        found = billing.list_invoices(tx, found_id, after, limit + 1)
    return by_seq(found, limit, show.invoice_summary)


@router.get("/invoices/{invoice_id}")
def get_invoice(call: Caller, invoice_id: Id) -> rest.Invoice:
    """A frozen one, with its lines."""
    with call.read() as tx:
        found = billing.get_invoice(tx, invoice_id)
    try:
        tenancy.require(call.identity, Action.READ_MONEY, found.organisation_id)
    except tenancy.OrganisationNotFound:
        raise billing.InvoiceNotFound() from None
    return show.invoice(found)


@router.get("/statement")
def get_statement(call: Caller, start: Start = None, end: End = None) -> rest.Statement:
    """The owner's books of a window: revenue, depreciation, power, margin, idle."""
    call.require(Action.READ_BOOKS)
    first, last = window(call, start, end)
    with call.read() as tx:
        now = call.deps.store.clock.now()
        return show.statement(
            economics.statement(tx, first, last, now, currency=call.deps.currency)
        )
