"""Settling: what a contract's use comes to goes to the ledger, once.

    to post = rate(everything metered so far) − what was posted

It is taken line by line (month × price version), so that a transfer never crosses a month's end
and an invoice can be read from transfers alone. Credits for runs that the owner ended are rated in
the same way over the free part of what was metered, so they never exceed it.
"""

from __future__ import annotations

import dataclasses
from datetime import datetime

from sublet.base.kernel.interval import millis
from sublet.base.kernel.money import Money
from sublet.base.kernel.price import Line, Rated, Terms, rate
from sublet.base.store import Work
from sublet.records import ledger, metering
from sublet.rights.market import credit, service, store
from sublet.rights.market.model import Closed, Contract, ContractNotFound

USAGE = "usage"
INTERRUPTION_CREDIT = "interruption_credit"
FIRST_PARTY_CREDIT = "first_party_credit"


def settle(work: Work, contract_id: str, *, closed: Closed | None = None) -> Money:
    """Post what is not posted yet; with `closed`, the credit for how the run ended, too.

    Call it in the Work that advances or closes the meter. The hold shrinks by what is posted, and
    ends with the run. Doing it twice posts once. Returns the usage posted now (negative where a
    correction took some back). Raises InsufficientCredit where a customer would be overdrawn.
    """
    contract = store.find_contract(work.tx, contract_id, lock=True)
    if contract is None:
        raise ContractNotFound(contract_id=contract_id)
    windows = metering.windows(work.tx, contract_id, "held")
    terms = service.terms_of(work.tx, contract, None)
    usage = rate(terms, windows)
    posted = _post_changes(work, contract, USAGE, terms, usage)
    if contract.is_first_party:
        _post_changes(work, contract, FIRST_PARTY_CREDIT, terms, usage)
    if closed is not None:
        _keep_free(work, contract, closed)
    free = store.list_free_windows(work.tx, contract_id)
    if free:
        credited = rate(terms, credit.clip(windows, free))
        _post_changes(work, contract, INTERRUPTION_CREDIT, terms, credited)
    if closed is not None:
        service.release_hold(work, contract)
    elif posted.micros > 0:
        _shrink_hold(work, contract, posted)
    return posted


def _keep_free(work: Work, contract: Contract, closed: Closed) -> None:
    for part in credit.free_intervals(contract.displacement, closed):
        store.keep_free_window(
            work.tx,
            contract,
            part,
            t0=closed.t0,
            reason=closed.notice_reason or closed.reason,
            at=work.now,
        )


def _shrink_hold(work: Work, contract: Contract, posted: Money) -> None:
    """What is posted is no longer to be held; the time it covers ends as before."""
    known = ledger.find_hold(work.tx, contract.subject)
    if known is not None:
        left = Money(max(known.amount_micros - posted.micros, 0), known.currency)
        ledger.resize_hold(work, known.id, amount=left, expires_at=known.expires_at)


def _post_changes(work: Work, contract: Contract, kind: str, terms: Terms, rated: Rated) -> Money:
    """Post, for each line, its total less what stands; returns the sum of what was posted."""
    before = store.list_postings(work.tx, contract.id, kind)
    posted = 0
    for line in rated.lines:
        price_from = terms.point_at(line.start).starts_at
        key = (line.month, price_from)
        row = before.get(key)
        change = line.amount.micros - (row.micros if row else 0)
        if change == 0:
            continue
        number = (row.number if row else 0) + 1
        name = f"{contract.id}:{kind}:{millis(line.month)}:{millis(price_from)}:{number}"
        quantity = line.quantity - (row.quantity if row else 0)
        fresh = line if row is None else _grown(line, row.ends_at)
        _transfer(work, contract, kind, name, change, fresh, quantity)
        store.keep_posting(
            work.tx,
            contract,
            kind,
            key,
            number=number,
            micros=line.amount.micros,
            quantity=line.quantity,
            ends_at=line.end,
        )
        posted += change
    stands = ledger.posted(work.tx, contract.id, kind).micros
    assert abs(stands) == rated.amount.micros, f"{contract.id} {kind}: ledger and rating differ"
    return Money(posted, contract.currency)


def _grown(line: Line, posted_to: datetime) -> Line:
    """The part of a line that came after what was posted; a correction keeps the whole line's."""
    return dataclasses.replace(line, start=posted_to) if posted_to < line.end else line


def _transfer(
    work: Work,
    contract: Contract,
    kind: str,
    key: str,
    change: int,
    line: Line,
    quantity: int,
) -> None:
    organisation_id = contract.organisation_id
    account = (
        ledger.first_party_account(organisation_id)
        if contract.is_first_party
        else ledger.customer_account(organisation_id)
    )
    revenue = ledger.revenue_account(contract.product)
    debit, to = (account, revenue) if kind == USAGE else (ledger.CREDITS, account)
    if change < 0:
        debit, to = to, debit
    ledger.post(
        work,
        key=key,
        debit=debit,
        credit=to,
        amount=Money(abs(change), contract.currency),
        kind=kind,
        organisation_id=organisation_id,
        project_id=contract.project_id,
        key_id=contract.key_id,
        subject=contract.subject,
        contract_id=contract.id,
        starts_at=line.start,
        ends_at=line.end,
        detail={
            "product": str(contract.product),
            "quantity": quantity,
            "price_micros": line.price_micros,
            "per": line.per,
            "version": line.version,
        },
    )
