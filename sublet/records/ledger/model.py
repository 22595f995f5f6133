"""Accounts, transfers and holds as values.

An account is a name. Its balance is credit less debit, so what we owe a customer is positive and
what we have earned is too:

    customer:<organisation>     prepaid credit; never negative
    first_party:<organisation>  the owner's own use, priced and credited in full
    revenue:<product>           earned
    credits                     given back after interruptions: less revenue (balance ≤ 0)
    losses                      use that no credit covered, borne by the owner: less revenue
                                (balance ≤ 0)
    trial                       given at sign-up (balance ≤ 0)
    payments                    received from outside (balance ≤ 0)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sublet.base.kernel.errors import Conflict, NotFound, PaymentRequired
from sublet.base.kernel.money import Money

TRIAL = "trial"
PAYMENTS = "payments"
CREDITS = "credits"
LOSSES = "losses"
_CUSTOMER = "customer:"
_FIRST_PARTY = "first_party:"
_REVENUE = "revenue:"


def customer_account(organisation_id: str) -> str:
    return _CUSTOMER + organisation_id


def first_party_account(organisation_id: str) -> str:
    return _FIRST_PARTY + organisation_id


def revenue_account(product: str) -> str:
    return _REVENUE + product


def is_prepaid(account: str) -> bool:
    """Whether the account may never be overdrawn."""
    return account.startswith(_CUSTOMER)


def is_organisations(account: str) -> bool:
    return account.startswith((_CUSTOMER, _FIRST_PARTY))


def charge_of(debit: str, credit: str, amount_micros: int) -> int:
    """What a transfer costs its organisation, as settlement and budgets count it.

    Positive when it is charged for use, negative when a charge is taken back or an interruption
    is credited, zero for what is no use at all: trial credit, payments, payouts.
    """
    if is_organisations(debit) and _is_trade(credit):
        return amount_micros
    if is_organisations(credit) and _is_trade(debit):
        return -amount_micros
    return 0


def _is_trade(account: str) -> bool:
    return account == CREDITS or account.startswith(_REVENUE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """`amount_micros` from `debit` to `credit`, once. `[starts_at, ends_at)`: the use it is for."""

    id: str
    seq: int
    key: str
    debit: str
    credit: str
    amount_micros: int
    currency: str
    kind: str
    organisation_id: str
    project_id: str | None
    key_id: str | None
    subject: str | None
    contract_id: str | None
    starts_at: datetime | None
    ends_at: datetime | None
    detail: Mapping[str, Any]
    at: datetime

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)

    @property
    def charge_micros(self) -> int:
        return charge_of(self.debit, self.credit, self.amount_micros)


class HoldState(StrEnum):
    OPEN = "open"
    RELEASED = "released"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hold:
    """Credit set aside for one subject. `admitted_at`: when its present size was granted."""

    id: str
    organisation_id: str
    account: str
    amount_micros: int
    currency: str
    subject: str
    project_id: str | None
    key_id: str | None
    epoch: int
    expires_at: datetime
    state: HoldState
    created_at: datetime
    admitted_at: datetime
    version: int

    @property
    def amount(self) -> Money:
        return Money(self.amount_micros, self.currency)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """An account whose kept figures are not what its rows sum to: a broken invariant."""

    account: str
    balance_kept: int
    balance_counted: int
    held_kept: int
    held_counted: int


class InsufficientCredit(PaymentRequired):
    """The organisation's credit does not cover this: add credit or ask for less."""


class HoldExists(Conflict):
    """This subject has an open hold already: resize that one."""

    code = "hold_exists"


class HoldReleased(Conflict):
    """This hold has been released: make a new one."""

    code = "hold_released"


class HoldNotFound(NotFound):
    """There is no such hold."""

    code = "hold_not_found"


class TransferKeyReused(Conflict):
    """Another transfer was posted under this key: use a key of its own for each transfer."""

    code = "transfer_key_reused"
