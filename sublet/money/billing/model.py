"""What billing knows: accounts, charges and invoices, warnings, the events it emits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import ClassVar

from sublet.base.kernel.errors import Conflict, NotFound
from sublet.base.kernel.money import Money
from sublet.base.store import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """An organisation's account with us. `email` is whom it writes to, one account each."""

    organisation_id: str
    email: str | None
    currency: str
    opened_at: datetime


class ChargeClass(StrEnum):
    REGULAR = "regular"
    CORRECTION = "correction"
    """Use of an earlier month that was already closed when this was posted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One posted transfer as an invoice sees it: positive is charged, negative given back."""

    transfer_id: str
    kind: str
    product: str
    organisation_id: str
    project_id: str | None
    subject: str | None
    contract_id: str | None
    starts_at: datetime
    ends_at: datetime
    posted_at: datetime
    quantity: int
    price_micros: int | None
    per: int | None
    version: str
    amount_micros: int
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InvoiceLine:
    """One explained amount. `price_micros` None: not a price times a quantity, but a sum."""

    number: int
    kind: str
    product: str
    charge_class: ChargeClass
    contract_id: str | None
    project_id: str | None
    subject: str | None
    starts_at: datetime
    ends_at: datetime
    quantity: int
    price_micros: int | None
    per: int | None
    version: str
    amount_micros: int
    shown_minor: int
    text: str

    def numbered(self, number: int, shown_minor: int) -> InvoiceLine:
        return dataclasses.replace(self, number=number, shown_minor=shown_minor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Invoice:
    """A calendar month, UTC. `issued_at` None: so far, and still moving; else frozen."""

    id: str | None
    seq: int | None
    organisation_id: str
    month: datetime
    currency: str
    closes_at: datetime
    issued_at: datetime | None
    total_micros: int
    total_minor: int
    lines: tuple[InvoiceLine, ...]

    @property
    def number(self) -> str | None:
        return None if self.seq is None else f"{self.month:%Y-%m}-{self.seq:06d}"

    @property
    def total(self) -> Money:
        return Money(self.total_micros, self.currency)


class Cause(StrEnum):
    CREDIT = "credit_exhausted"
    BUDGET = "budget"


@dataclass(frozen=True, slots=True, kw_only=True)
class Warning:
    """It was said that this workload's money ends at `ends_at`; `cleared_at`: a top-up came."""

    seq: int
    organisation_id: str
    workload_id: str
    cause: Cause
    threshold_seconds: int
    ends_at: datetime
    said_at: datetime
    cleared_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Runway:
    """How long the credit lasts at the present burn. `ends_at` None: nothing is metered."""

    organisation_id: str
    credit: Money
    burn_micros_per_hour: int
    ends_at: datetime | None


@dataclass(frozen=True, slots=True)
class CustomerCame(Event):
    """A consumer organisation has signed up, with its trial credit."""

    kind: ClassVar[str] = "billing.customer_came"
    organisation_id: str
    trial_micros: int


@dataclass(frozen=True, slots=True)
class CreditAdded(Event):
    """Credit was granted, or a payment recorded."""

    kind: ClassVar[str] = "billing.credit_added"
    organisation_id: str
    amount_micros: int
    reference: str


@dataclass(frozen=True, slots=True)
class RunwayWarned(Event):
    """A workload's money ends soon: at `ends_at`, at the present burn."""

    kind: ClassVar[str] = "billing.runway_warned"
    organisation_id: str
    workload_id: str
    cause: str
    threshold_seconds: int
    ends_at: datetime


@dataclass(frozen=True, slots=True)
class InvoiceIssued(Event):
    """A month's invoice is frozen."""

    kind: ClassVar[str] = "billing.invoice_issued"
    organisation_id: str
    invoice_id: str
    total_micros: int


@dataclass(frozen=True, slots=True)
class TokenGapFound(Event):
    """A replica counted more tokens than are recorded of it, or, below zero, fewer."""

    kind: ClassVar[str] = "billing.token_gap_found"
    replica_id: str
    input_tokens: int
    cached_tokens: int
    output_tokens: int


class AlreadySignedUp(Conflict):
    """This address has signed up already: use its key, or sign up with another address."""

    code = "already_signed_up"


class ReferenceReused(Conflict):
    """Another amount was recorded under this reference: use a reference of its own."""

    code = "reference_reused"


class MonthNotClosed(Conflict):
    """A month is invoiced 72 hours after its end: until then look at the invoice so far."""

    code = "month_not_closed"


class InvoiceNotFound(NotFound):
    """There is no such invoice."""

    code = "invoice_not_found"
