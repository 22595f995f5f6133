"""What it came to: usage, balance, payments, invoices, the owner's statement."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, StringConstraints

from sublet.base.wire.rest.common import (
    REFERENCE,
    Body,
    Identifier,
    Instant,
    Money,
    PositiveMicros,
    Shape,
    text_of_one_line,
)


class UsageLine(Shape):
    """What one workload used in the window asked for. Two figures: held and ran."""

    workload_id: str
    kind: Literal["instance", "job"]
    name: str
    organisation_id: str
    project_id: str | None
    contract_id: str | None
    held_device_ms: int
    """Devices × milliseconds that it held them: what is billed."""
    ran_device_ms: int
    charged: Money
    """Posted in the window, less credits."""


class Balance(Shape):
    """`available` = `balance` − `held`: what a new hold may take."""

    organisation_id: str
    balance: Money
    held: Money
    available: Money
    burn_micros_per_hour: int
    runs_out_at: Instant | None
    """At the present burn; null: nothing is metered."""


Reference = Annotated[str, StringConstraints(pattern=REFERENCE)]
Note = Annotated[str, BeforeValidator(text_of_one_line), StringConstraints(max_length=500)]


class CreditCreate(Body):
    """The owner gives credit. A reference stands for one amount: the same again is one grant."""

    organisation_id: Identifier
    amount_micros: PositiveMicros
    reference: Reference
    note: Note = ""


class PaymentCreate(Body):
    """The business desk records money that came in, once a reference."""

    organisation_id: Identifier
    amount_micros: PositiveMicros
    reference: Reference
    note: Note = ""


class Transfer(Shape):
    """Money that moved: from `debit` to `credit`, once."""

    id: str
    seq: int
    at: Instant
    kind: str
    debit: str
    credit: str
    amount: Money
    organisation_id: str
    project_id: str | None
    subject: str | None
    contract_id: str | None
    starts_at: Instant | None
    ends_at: Instant | None
    detail: dict[str, Any]


class InvoiceLine(Shape):
    """One line explains itself: quantity × price ÷ per = amount, rounded once.

    `price_micros` null: the line is a sum, such as a credit, and not a price times a quantity.
    """

    number: int
    kind: str
    product: str
    charge_class: Literal["regular", "correction"]
    text: str
    subject: str | None
    contract_id: str | None
    project_id: str | None
    starts_at: Instant
    ends_at: Instant
    quantity: int
    price_micros: int | None
    per: int | None
    version: str
    amount: Money
    shown_minor: int
    """In the currency's minor unit, such that the lines sum to the total."""


class Invoice(Shape):
    """A calendar month, UTC. `issued_at` null: so far, and still moving; else frozen."""

    id: str | None
    number: str | None
    organisation_id: str
    month: Instant
    closes_at: Instant
    issued_at: Instant | None
    lines: list[InvoiceLine]
    total: Money
    total_minor: int
    """The total in the currency's minor unit, rounded once."""


class InvoiceSummary(Shape):
    id: str
    seq: int
    number: str
    organisation_id: str
    month: Instant
    issued_at: Instant
    total: Money
    total_minor: int


class Figure(Shape):
    """One number of a statement and how it came about. `value` null: it divides by nothing."""

    name: str
    value: int | None
    unit: Literal["money", "money per device-hour", "permille", "device-ms"]
    formula: str


class Statement(Shape):
    """The owner's view of `[start, end)`. `figures` hold every number again, with its formula."""

    start: Instant
    end: Instant
    revenue_by_product: dict[str, Money]
    revenue: Money
    credits: Money
    trial: Money
    payments: Money
    first_party: Money
    """The owner's own use at the bid price of each hour, credited in full."""
    depreciation: Money
    power: Money
    margin: Money
    device_ms_by_use: dict[str, int]
    idle_cost: Money
    idle_cost_micros_per_device_hour: int | None
    revenue_micros_per_device_hour: int | None
    utilisation_permille: int | None
    pools_without_costs: list[str]
    figures: list[Figure]
