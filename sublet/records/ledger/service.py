"""What others call. Money functions take and give `Money`; windows are half-open, UTC."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.kernel.money import Money
from sublet.base.store import Work
from sublet.records.ledger import store
from sublet.records.ledger.model import (
    LOSSES,
    Drift,
    Hold,
    HoldExists,
    HoldNotFound,
    HoldReleased,
    HoldState,
    InsufficientCredit,
    Transfer,
    TransferKeyReused,
    customer_account,
    first_party_account,
    is_organisations,
    is_prepaid,
)


def post(
    work: Work,
    *,
    key: str,
    debit: str,
    credit: str,
    amount: Money,
    kind: str,
    organisation_id: str,
    project_id: str | None = None,
    key_id: str | None = None,
    subject: str | None = None,
    contract_id: str | None = None,
    starts_at: datetime | None = None,
    ends_at: datetime | None = None,
    detail: Mapping[str, Any] | None = None,
) -> Transfer:
    """Move money once; a second post with the same key gives the first one's transfer.

    Raises InsufficientCredit where it would overdraw a customer, TransferKeyReused where the key
    stands for another transfer; then nothing has changed. It may use credit that is on hold:
    settling is what holds are for, and the caller shrinks the hold in the same Work.
    """
    if amount.micros <= 0:
        raise ValueError("a transfer moves a positive amount: swap debit and credit")
    assert not (is_organisations(debit) and is_organisations(credit)), "between two organisations"
    known = store.find_transfer(work.tx, key)
    if known is not None:
        if (known.debit, known.credit, known.amount) != (debit, credit, amount):
            raise TransferKeyReused(key=key)
        return known
    # Lock order: the organisation's account first, then ours. The only refusal is met first.
    sides = ((debit, -amount.micros), (credit, amount.micros))
    for name, micros in sorted(sides, key=lambda side: (not is_organisations(side[0]), side[0])):
        _move(work, name, Money(micros, amount.currency), organisation_id)
    values: dict[str, Any] = {
        "id": work.ids.new("trf"),
        "key": key,
        "debit": debit,
        "credit": credit,
        "amount_micros": amount.micros,
        "currency": amount.currency,
        "kind": kind,
        "organisation_id": organisation_id,
        "project_id": project_id,
        "key_id": key_id,
        "subject": subject,
        "contract_id": contract_id,
        "starts_at": starts_at,
        "ends_at": ends_at,
        "detail": dict(detail or {}),
        "at": work.now,
    }
    return Transfer(**values, seq=store.insert_transfer(work.tx, values))


def _move(work: Work, name: str, amount: Money, organisation_id: str) -> None:
    is_spending = is_prepaid(name) and amount.micros < 0
    if store.move(work.tx, name, amount, from_balance=is_spending):
        return
    found = store.find_account(work.tx, name)
    if found is None and not is_spending:
        owner = organisation_id if is_organisations(name) else None
        store.insert_account(work.tx, name, owner, amount.currency, amount.micros)
        return
    balance_ = found[0] if found else Money(0, amount.currency)
    if balance_.currency != amount.currency:
        raise ValueError(f"the account {name} is kept in {balance_.currency}")
    raise _insufficient(-amount, balance_)


def _insufficient(needed: Money, there: Money) -> InsufficientCredit:
    return InsufficientCredit(
        f"This needs {needed} and {there} is available: add credit or ask for less.",
        needed_micros=needed.micros,
        available_micros=there.micros,
        currency=needed.currency,
    )


def hold(
    work: Work,
    *,
    organisation_id: str,
    account: str,
    amount: Money,
    subject: str,
    project_id: str | None,
    key_id: str | None,
    expires_at: datetime,
    epoch: int = 0,
) -> Hold:
    """Set credit aside for a subject, which has at most one open hold.

    Raises InsufficientCredit where balance − open holds would fall below zero, HoldExists; then
    nothing has changed.
    """
    if amount.micros < 0:
        raise ValueError("a hold is not negative")
    if find_hold(work.tx, subject) is not None:
        raise HoldExists(subject=subject)
    _tie(work, account, amount)
    made = Hold(
        id=work.ids.new("hld"),
        organisation_id=organisation_id,
        account=account,
        amount_micros=amount.micros,
        currency=amount.currency,
        subject=subject,
        project_id=project_id,
        key_id=key_id,
        epoch=epoch,
        expires_at=expires_at,
        state=HoldState.OPEN,
        created_at=work.now,
        admitted_at=work.now,
        version=1,
    )
    store.insert_hold(work.tx, made)
    return made


def resize_hold(work: Work, hold_id: str, *, amount: Money, expires_at: datetime) -> Hold:
    """Give an open hold another size and expiry. Afterwards balance − open holds ≥ 0.

    Who has just posted against the hold and shrinks it by as much always succeeds. A later expiry
    or a larger size is a new admission: budgets count the hold in the window of that moment.
    Raises InsufficientCredit (nothing has changed), HoldReleased, HoldNotFound.
    """
    if amount.micros < 0:
        raise ValueError("a hold is not negative")
    known = store.find_hold(work.tx, hold_id)
    if known is None:
        raise HoldNotFound(hold_id=hold_id)
    if known.state is not HoldState.OPEN:
        raise HoldReleased(hold_id=hold_id)
    _tie(work, known.account, amount - known.amount)
    is_renewal = expires_at > known.expires_at or amount > known.amount
    resized = dataclasses.replace(
        known,
        amount_micros=amount.micros,
        expires_at=expires_at,
        admitted_at=work.now if is_renewal else known.admitted_at,
        version=known.version + 1,
    )
    store.update_hold(work.tx, resized)
    return resized


def _tie(work: Work, account: str, more: Money) -> None:
    """Change what is held of an account; `more` may be negative. The account stays locked."""
    if store.tie(work.tx, account, more):
        return
    found = store.find_account(work.tx, account)
    if found is None:
        raise _insufficient(more, Money(0, more.currency))
    balance_, held = found
    raise _insufficient(more, balance_ - held)


def release_hold(work: Work, hold_id: str) -> Hold:
    """Free what is held. Releasing twice is releasing once; raises HoldNotFound."""
    known = store.find_hold(work.tx, hold_id)
    if known is None:
        raise HoldNotFound(hold_id=hold_id)
    if known.state is HoldState.RELEASED:
        return known
    done = store.untie(work.tx, known.account, known.amount)
    assert done, "a hold has an account"
    released = dataclasses.replace(known, state=HoldState.RELEASED, version=known.version + 1)
    store.update_hold(work.tx, released)
    return released


def lapse(work: Work, now: datetime, keep: Collection[str]) -> list[Hold]:
    """Release open holds that expired at or before `now`, but for the subjects in `keep`.

    `keep` names the subjects whose meter is open: their use must stay covered, and the end of
    their hold only ends the runway.
    """
    expired = store.list_expired_holds(work.tx, now)
    return [release_hold(work, found.id) for found in expired if found.subject not in keep]


def find_hold(tx: Connection, subject: str) -> Hold | None:
    """The open hold of this subject."""
    return store.find_open_hold(tx, subject)


def list_holds(tx: Connection, organisation_id: str) -> list[Hold]:
    """The open holds of an organisation, oldest first."""
    return store.list_holds(tx, organisation_id)


def balance(tx: Connection, account: str) -> Money:
    """Credit less debit; zero for an account on which nothing has happened."""
    found = store.find_account(tx, account)
    return Money(0) if found is None else found[0]


def available(tx: Connection, organisation_id: str) -> Money:
    """What a customer may still hold or spend: balance less open holds."""
    found = store.find_account(tx, customer_account(organisation_id))
    return Money(0) if found is None else found[0] - found[1]


def posted(tx: Connection, contract_id: str, *kinds: str) -> Money:
    """What a contract was charged under these kinds: charges less what was given back.

    Negative for a kind that only gives back, such as interruption credits.
    """
    return Money(store.charged_under(tx, contract_id, kinds))


def lost(tx: Connection, contract_id: str) -> Money:
    """What of a contract's use no credit covered: the owner's loss, less what was taken back."""
    return Money(store.debited_under(tx, contract_id, LOSSES))


def spent(
    tx: Connection,
    *,
    organisation_id: str | None = None,
    project_id: str | None = None,
    key_id: str | None = None,
    start: datetime,
    end: datetime | None,
    without_hold: str | None = None,
) -> Money:
    """What counts against a budget over `[start, end)`; name exactly one scope.

    Charges less reversals and interruption credits posted in the window, and the open holds
    admitted in it; `without_hold` leaves out the hold that is about to be resized. `end` None is
    a lifetime.
    """
    scopes = {"organisation_id": organisation_id, "project_id": project_id, "key_id": key_id}
    [(column, value)] = [(name, found) for name, found in scopes.items() if found is not None]
    transfers, holds = store.transfers.c, store.holds.c
    posted_in = [transfers[column] == value, transfers.at >= start]
    held_in = [holds[column] == value, holds.admitted_at >= start]
    if end is not None:
        posted_in.append(transfers.at < end)
        held_in.append(holds.admitted_at < end)
    if without_hold is not None:
        held_in.append(holds.id != without_hold)
    return Money(store.charged(tx, *posted_in) + store.held(tx, *held_in))


def list_transfers(
    tx: Connection,
    organisation_id: str | None,
    start: datetime,
    end: datetime,
    *,
    after: int | None = None,
    limit: int | None = None,
) -> list[Transfer]:
    """Transfers posted in `[start, end)` in the order of posting; None: of all organisations.

    Those about an organisation's use that did not move on its accounts, such as what others bore
    of it, are among them.
    """
    return store.list_transfers(tx, organisation_id, start, end, after, limit)


def list_own_transfers(
    tx: Connection,
    organisation_id: str,
    start: datetime,
    end: datetime,
    *,
    after: int | None = None,
    limit: int | None = None,
) -> list[Transfer]:
    """As `list_transfers`, but only what moved on the organisation's own accounts: what it may see."""
    own = [customer_account(organisation_id), first_party_account(organisation_id)]
    return store.list_transfers(tx, organisation_id, start, end, after, limit, own)


def changes(
    tx: Connection, start: datetime, end: datetime, *, organisation_id: str | None = None
) -> dict[str, Money]:
    """By how much each account's balance changed in `[start, end)`; they sum to zero."""
    transfers = store.transfers.c
    where: list[sa.ColumnElement[bool]] = [transfers.at >= start, transfers.at < end]
    if organisation_id is not None:
        where.append(transfers.organisation_id == organisation_id)
    return {name: Money(micros) for name, micros in store.moved(tx, *where).items()}


def trial_balance(tx: Connection) -> Money:
    """The sum of all balances as kept: zero, or the books are broken."""
    return Money(store.sum_of_balances(tx))


def recount(tx: Connection) -> list[Drift]:
    """Accounts whose kept balance or holds differ from the sum of their rows: none, or broken."""
    return store.list_drifts(tx)
