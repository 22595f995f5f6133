"""At which price: offers, posted spot prices, the rate card, quotes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from sublet.base.wire.rest.common import (
    Body,
    Count,
    Identifier,
    Instant,
    Money,
    PositiveMicros,
    Seconds,
    Shape,
    storable,
)

Product = Literal["spot", "on_demand"]
NoticeSeconds = Annotated[Seconds, Field(ge=1, le=86_400)]
GraceSeconds = Annotated[Seconds, Field(ge=1, le=600)]
DurationSeconds = Annotated[Seconds, Field(ge=1)]
TomlText = Annotated[
    str, BeforeValidator(storable), StringConstraints(min_length=1, max_length=262_144)
]


class NoticeChoice(Shape):
    """One notice that may be bought, and what a device-hour costs with it now."""

    notice_seconds: int
    price_micros_per_device_hour: int


class Offer(Shape):
    """What is for sale. A unit is `devices` devices; `count` in a quote is of units."""

    id: str
    product: Product
    pool_id: str
    site_id: str
    devices: int
    whole_node: bool
    device_kind: Literal["cpu", "gpu"]
    device_model: str
    memory_bytes_per_device: int
    price_micros_per_device_hour: int
    """With the default notice: on-demand by the rate card, spot as posted for this hour."""
    default_notice_seconds: int
    notices: list[NoticeChoice]
    firm_seconds: int
    """The first stretch of a run that the owner does not take back."""
    outbound: str
    trusted_tenants: bool
    """True: strangers are served although fences are missing."""
    missing_fences: list[str]
    currency: str
    rate_card_version: int


class SpotPrice(Shape):
    """The posted price of the hour from `starts_at`; it does not change once posted."""

    pool_id: str
    starts_at: Instant
    price_micros_per_device_hour: int
    floor_micros_per_device_hour: int
    currency: str
    posted_at: Instant


class RateCard(Shape):
    """One version. `newest_version` is what the next one names in `If-Match`."""

    version: int
    newest_version: int
    effective_from: Instant
    text: str
    """TOML, as the owner wrote it."""


class RateCardPut(Body):
    """A new version. `effective_from` left out: from now on. Quoted prices stand."""

    text: TomlText
    effective_from: Instant | None = None


class CostFacts(Shape):
    """What a pool's devices cost the owner, and where the figures come from."""

    pool_id: str
    name: str
    currency: str
    purchase_micros_per_device: int
    residual_micros_per_device: int
    in_service_on: str
    life_months: int
    idle_watts: int
    busy_watts: int
    wear_micros_per_device_hour: int
    floor_micros_per_device_hour: int
    """Power × PUE + wear: below it nothing is sold."""
    source: str


class CostFactsPut(Body):
    text: TomlText


class QuoteCreate(Body):
    """`duration_seconds` left out: open-ended; the estimate is then of one hour."""

    offer_id: Identifier
    count: Count = 1
    duration_seconds: DurationSeconds | None = None
    notice_seconds: NoticeSeconds | None = None
    max_price_micros_per_device_hour: PositiveMicros | None = None
    """Spot only: a posted hour above it ends the run, with full notice."""
    stop_grace_seconds: GraceSeconds = 30
    project_id: Identifier | None = None
    """Left out: the key's own, or none."""


class PricePoint(Shape):
    starts_at: Instant
    price_micros_per_device_hour: int
    version: str


class PriceLine(Shape):
    """quantity (device-milliseconds) × price ÷ per = amount, rounded once."""

    starts_at: Instant
    ends_at: Instant
    quantity: int
    price_micros: int
    per: int
    version: str
    amount: Money


class Quote(Shape):
    """A price that stands until `expires_at`; accepting it takes the hold from the credit."""

    id: str
    organisation_id: str
    project_id: str | None
    offer_id: str
    product: Product
    pool_id: str
    devices: int
    count: int
    whole_node: bool
    notice_seconds: int
    firm_seconds: int
    stop_grace_seconds: int
    duration_seconds: int | None
    max_price_micros_per_device_hour: int | None
    prices: list[PricePoint]
    hold: Money
    """Taken when it is accepted, and given back as far as it is not used."""
    hold_seconds: int
    total: Money
    """Of `duration_seconds`, or of one hour."""
    lines: list[PriceLine]
    is_exact: bool
    """True: the invoice for the same seconds will be `total`, to the micro."""
    exact_until: Instant | None
    credit_rule: str
    """What is given back if the owner ends it, in words."""
    outbound: str
    trusted_tenants: bool
    missing_fences: list[str]
    created_at: Instant
    expires_at: Instant
    is_first_party: bool
    """The owner's own use: at the posted spot price, credited in full, without a hold."""
    contract_id: str | None
