"""The values of the market, its events and its errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from fractions import Fraction
from typing import ClassVar

from sublet.base.kernel.errors import Conflict, Forbidden, NotFound
from sublet.base.kernel.money import Money, round_half_even
from sublet.base.kernel.price import DEVICE_HOUR_MS, Line, PricePoint, Terms
from sublet.base.store import Event
from sublet.capacity.allocation import Displacement, DisplacementRule

CURRENCY = "USD"


class Product(StrEnum):
    SPOT = "spot"
    ON_DEMAND = "on_demand"
    FIRST_PARTY = "first_party"
    """The owner's own use: at the posted spot price, credited in full. It is on no rate card."""
    SERVING = "serving"
    """Devices for a model server: free of charge, for it is its tokens that are sold. On no rate
    card, and never quoted."""


def priced(micros: int, factor_permille: int) -> int:
    """A price with the factor of its notice, rounded once."""
    return round_half_even(Fraction(micros * factor_permille, 1000))


@dataclass(frozen=True, slots=True, kw_only=True)
class NoticeChoice:
    """A notice that may be bought; the price of a device-hour is the offer's × the factor."""

    seconds: int
    factor_permille: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What is for sale now: a shape in a pool, under a product's terms.

    `base_micros_per_device_hour` is the rate card's for on-demand, for spot the price posted for
    the hour that runs.
    """

    id: str
    product: Product
    pool_id: str
    site_id: str
    device_kind: str
    device_model: str
    memory_bytes: int
    devices: int
    whole_node: bool
    base_micros_per_device_hour: int
    notices: tuple[NoticeChoice, ...]
    default_notice_seconds: int
    firm_seconds: int
    card_version: int
    outbound: str
    scrub_seconds: int
    trusted_tenants: bool
    missing_fences: tuple[str, ...]
    currency: str = CURRENCY

    def find_notice(self, seconds: int) -> NoticeChoice | None:
        return next((n for n in self.notices if n.seconds == seconds), None)

    def price_micros_per_device_hour(self, notice_seconds: int | None = None) -> int:
        """The price now with a notice; None is the default one."""
        found = self.find_notice(notice_seconds or self.default_notice_seconds)
        assert found is not None, "an offer has its own notices"
        return priced(self.base_micros_per_device_hour, found.factor_permille)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpotPrice:
    """The price of one device for the hour from `hour`; immutable once posted."""

    pool_id: str
    hour: datetime
    micros: int
    floor_micros: int
    bid_micros: int
    posted_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Quote:
    """A price that stands until `expires_at`.

    `total` and `lines` are for `duration_seconds` from the quote on, or for one hour if open-ended.
    They are exact where `is_exact`: always for on-demand, for spot up to `exact_until`.
    """

    id: str
    organisation_id: str
    project_id: str | None
    product: Product
    offer_id: str
    pool_id: str
    devices: int
    count: int
    whole_node: bool
    notice_seconds: int
    factor_permille: int
    firm_seconds: int
    stop_grace_seconds: int
    scrub_seconds: int
    duration_seconds: int | None
    is_first_party: bool
    points: tuple[PricePoint, ...]
    max_price_micros: int | None
    total_micros: int
    lines: tuple[Line, ...]
    exact_until: datetime | None
    hold_micros: int
    hold_seconds: int
    credit_rule: str
    outbound: str
    missing_fences: tuple[str, ...]
    trusted_tenants: bool
    created_at: datetime
    expires_at: datetime
    contract_id: str | None
    currency: str = CURRENCY

    @property
    def units(self) -> int:
        return self.devices * self.count

    @property
    def total(self) -> Money:
        return Money(self.total_micros, self.currency)

    @property
    def hold(self) -> Money:
        return Money(self.hold_micros, self.currency)

    @property
    def terms(self) -> Terms:
        return Terms(
            product=self.product, currency=self.currency, per=DEVICE_HOUR_MS, points=self.points
        )

    @property
    def is_exact(self) -> bool:
        return self.exact_until is None or all(line.end <= self.exact_until for line in self.lines)


class ContractState(StrEnum):
    ACTIVE = "active"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """What was agreed for one subject. `points` are the fixed prices; spot and first-party have
    none and read the posted ones from `started_at` on."""

    id: str
    seq: int
    organisation_id: str
    project_id: str | None
    key_id: str | None
    quote_id: str
    """Serving was not quoted: its contract's own id."""
    subject: str
    product: Product
    offer_id: str
    """Serving: `serving-filler` or `serving-minimum`."""
    pool_id: str
    devices: int
    count: int
    whole_node: bool
    notice_seconds: int
    factor_permille: int
    firm_seconds: int
    stop_grace_seconds: int
    scrub_seconds: int
    rule: DisplacementRule
    younger_than_seconds: int
    price_micros: int
    """Of a device-hour when it was accepted: what the claim is worth."""
    points: tuple[PricePoint, ...]
    max_price_micros: int | None
    state: ContractState
    started_at: datetime
    ended_at: datetime | None
    currency: str = CURRENCY

    @property
    def units(self) -> int:
        return self.devices * self.count

    @property
    def is_first_party(self) -> bool:
        return self.product is Product.FIRST_PARTY

    @property
    def is_serving(self) -> bool:
        return self.product is Product.SERVING

    @property
    def takes_hold(self) -> bool:
        """It is paid for out of credit, so credit is held while it runs."""
        return not (self.is_first_party or self.is_serving)

    @property
    def displacement(self) -> Displacement:
        return Displacement(
            rule=self.rule,
            younger_than_seconds=self.younger_than_seconds,
            micros_per_device_hour=self.price_micros,
        )

    @property
    def hold_seconds(self) -> int:
        return hold_seconds(self.notice_seconds, self.stop_grace_seconds, self.scrub_seconds)


def hold_seconds(notice_seconds: int, stop_grace_seconds: int, scrub_seconds: int) -> int:
    """How long a hold must carry a run: a quarter of an hour, or what an orderly end takes."""
    return max(900, notice_seconds + stop_grace_seconds + scrub_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """How a run ended, for the credit. `t0`: when its notice was given, None if there was none or
    it was withdrawn. `reason`: of the close; `notice_reason`: of the notice (None: the same)."""

    t0: datetime | None
    opened_at: datetime
    closed_at: datetime
    reason: str
    notice_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceVictim:
    """A contract whose `max_price` the price of `hour` passes.

    Its notice is to be given by `notice_by`, so that SIGTERM comes at `term_at` and the grace is
    over when the hour begins.
    """

    contract: Contract
    hour: datetime
    price_micros: int
    notice_by: datetime
    term_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmet:
    """A demand that was refused: what was wanted, at which price, and why it was not met."""

    seq: int
    organisation_id: str
    pool_id: str | None
    offer_id: str | None
    devices: int
    count: int
    starts_at: datetime
    duration_seconds: int | None
    price_micros: int | None
    reason: str
    at: datetime


@dataclass(frozen=True, slots=True)
class RateCardLoaded(Event):
    kind: ClassVar[str] = "market.rate_card_loaded"
    version: int
    effective_from: datetime


@dataclass(frozen=True, slots=True)
class ContractStarted(Event):
    kind: ClassVar[str] = "market.contract_started"
    contract_id: str
    organisation_id: str
    subject: str


@dataclass(frozen=True, slots=True)
class ContractEnded(Event):
    kind: ClassVar[str] = "market.contract_ended"
    contract_id: str
    organisation_id: str
    subject: str


@dataclass(frozen=True, slots=True)
class DemandUnmet(Event):
    """Somebody was refused, and what they wanted is kept."""

    kind: ClassVar[str] = "market.demand_unmet"
    organisation_id: str
    pool_id: str | None
    reason: str


class OfferNotFound(NotFound):
    """There is no such offer now: list the offers to see which there are."""

    code = "offer_not_found"


class NoRateCard(NotFound):
    """No rate card is in force yet: the owner loads one."""

    code = "no_rate_card"


class QuoteNotFound(NotFound):
    """There is no such quote, or this key may not see it: ask for a new one."""

    code = "quote_not_found"


class ContractNotFound(NotFound):
    """There is no such contract, or this key may not see it."""

    code = "contract_not_found"


class QuoteExpired(Conflict):
    """The quote is no longer valid: ask for a new one."""

    code = "quote_expired"


class QuoteAccepted(Conflict):
    """The quote was accepted already, for another workload: ask for a new one."""

    code = "quote_accepted"


class ContractOver(Conflict):
    """The contract has ended: ask for a new quote."""

    code = "contract_ended"


class FencesMissing(Conflict):
    """This pool's nodes do not fence strangers off from each other: `details` names what is
    missing and the way to have it."""

    code = "fences_missing"


class PriceAboveLimit(Forbidden):
    """The posted price is above the limit that was set for this: raise the limit, or wait."""

    code = "price_above_limit"


class BudgetExceeded(Forbidden):
    """A budget does not allow this before its window ends: `details` names window and end."""

    code = "budget_exceeded"


def named(choices: Sequence[object]) -> str:
    """Choices as a reader expects them: `30, 120 or 600`."""
    *most, last = (str(choice) for choice in choices)
    return f"{', '.join(most)} or {last}" if most else last
