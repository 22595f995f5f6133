"""Settling: what a contract's use comes to goes to the ledger, once.

    to post = rate(everything metered so far) − what was posted

as far as the customer's credit goes. Use past that (the cloud was down when the money ended) is
posted when credit comes; what is left when the run has ended is the owner's loss, so that
`posted + lost = rated` wherever no meter is open.

It is taken line by line (month × price version), so that a transfer never crosses a month's end
and an invoice can be read from transfers alone. Credits for runs that the owner ended are rated in
the same way over the free part of what was metered, so they never exceed it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
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
LOSS = "loss"


def settle(work: Work, contract_id: str, *, closed: Closed | None = None) -> Money:
    """Post what is not posted yet; with `closed`, the credit for how the run ended, too.

    Call it in the Work that advances or closes the meter. The hold shrinks by what is posted, and
    ends with the run. Doing it twice posts once. Returns the usage posted now (negative where a
    correction took some back); serving never becomes money. What the customer's credit does not cover stays unposted, and is
    the owner's loss with `closed`: closing never fails for want of money.
    """
    contract = store.find_contract(work.tx, contract_id, lock=True)
    if contract is None:
        raise ContractNotFound(contract_id=contract_id)
    if contract.is_serving:
        return Money(0, contract.currency)
    windows = metering.windows(work.tx, contract_id, "held")
    terms = service.terms_of(work.tx, contract, None)
    usage = rate(terms, windows)
    if closed is not None:
        _keep_free(work, contract, closed)
    free = store.list_free_windows(work.tx, contract_id)
    credited = rate(terms, credit.clip(windows, free))
    if closed is not None and free:
        # First, so that what is free is never lost, nor given back to whom it was not charged.
        _post_changes(work, contract, INTERRUPTION_CREDIT, terms, credited)
    posted = _post_usage(work, contract, terms, usage, is_final=closed is not None)
    if contract.is_first_party:
        _post_changes(work, contract, FIRST_PARTY_CREDIT, terms, usage)
    if closed is None and free:
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


@dataclass(frozen=True, slots=True)
class _Part:
    """How far a line stands under one kind."""

    micros: int = 0
    quantity: int = 0
    number: int = 0
    ends_at: datetime | None = None


def _parts(work: Work, contract: Contract, kind: str) -> dict[tuple[datetime, datetime], _Part]:
    rows = store.list_postings(work.tx, contract.id, kind)
    return {
        key: _Part(micros=row.micros, quantity=row.quantity, number=row.number, ends_at=row.ends_at)
        for key, row in rows.items()
    }


def _post_usage(
    work: Work, contract: Contract, terms: Terms, rated: Rated, *, is_final: bool
) -> Money:
    """Charge, for each line, its total less what stands, as far as the credit goes; with `is_final`
    the rest is lost. A correction undoes a loss before it gives back. Returns what was charged."""
    paid, lost = _parts(work, contract, USAGE), _parts(work, contract, LOSS)
    stood = sum(part.micros for part in (*paid.values(), *lost.values()))
    purse = _purse(work, contract, rated.amount.micros - stood)
    charged = unposted = 0
    for line in rated.lines:
        key = (line.month, terms.point_at(line.start).starts_at)
        was_paid, was_lost = paid.get(key, _Part()), lost.get(key, _Part())
        due = line.amount.micros - was_paid.micros - was_lost.micros
        pay = min(due, purse) if due > 0 else due + min(was_lost.micros, -due)
        purse -= pay
        lose = due - pay if is_final or due < 0 else 0
        left = due - pay - lose
        now_paid, now_lost = was_paid.micros + pay, was_lost.micros + lose
        lost_for = line.quantity * now_lost // line.amount.micros if now_lost else 0
        paid_for = line.quantity - lost_for
        if left:
            paid_for = line.quantity * now_paid // line.amount.micros
        _put(work, contract, USAGE, key, line, was_paid, micros=now_paid, quantity=paid_for)
        _put(work, contract, LOSS, key, line, was_lost, micros=now_lost, quantity=lost_for)
        charged += pay
        unposted += left
    stands = ledger.posted(work.tx, contract.id, USAGE) + ledger.lost(work.tx, contract.id)
    assert stands.micros == rated.amount.micros - unposted, f"{contract.id}: ledger, rating differ"
    return Money(charged, contract.currency)


def _purse(work: Work, contract: Contract, due: int) -> int:
    """The most that may be charged now: never what is held for other workloads."""
    known = None if contract.is_first_party else ledger.find_hold(work.tx, contract.subject)
    held = 0 if known is None else known.amount_micros
    if contract.is_first_party or due <= held:
        return max(due, held)
    return held + max(ledger.available(work.tx, contract.organisation_id).micros, 0)


def _put(
    work: Work,
    contract: Contract,
    kind: str,
    key: tuple[datetime, datetime],
    line: Line,
    before: _Part,
    *,
    micros: int,
    quantity: int,
) -> None:
    """Bring a line to where it should stand under one kind, with the transfer that does it."""
    change = micros - before.micros
    if change == 0:
        return
    number = before.number + 1
    month, price_from = key
    name = f"{contract.id}:{kind}:{millis(month)}:{millis(price_from)}:{number}"
    fresh = line if before.ends_at is None else _grown(line, before.ends_at)
    _transfer(work, contract, kind, name, change, fresh, quantity - before.quantity)
    store.keep_posting(
        work.tx,
        contract,
        kind,
        key,
        number=number,
        micros=micros,
        quantity=quantity,
        ends_at=line.end,
    )


def _post_changes(work: Work, contract: Contract, kind: str, terms: Terms, rated: Rated) -> None:
    """Post, for each line, its total less what stands."""
    before = _parts(work, contract, kind)
    for line in rated.lines:
        key = (line.month, terms.point_at(line.start).starts_at)
        was = before.get(key, _Part())
        micros, quantity = line.amount.micros, line.quantity
        _put(work, contract, kind, key, line, was, micros=micros, quantity=quantity)
    stands = ledger.posted(work.tx, contract.id, kind).micros
    assert abs(stands) == rated.amount.micros, f"{contract.id} {kind}: ledger and rating differ"


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
    debit, to = {USAGE: (account, revenue), LOSS: (ledger.LOSSES, revenue)}.get(
        kind, (ledger.CREDITS, account)
    )
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
