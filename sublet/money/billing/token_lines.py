"""From requests to lines of money. Pure.

A line is all tokens of one class that a key used on one day (UTC, by the request's start) of one
model, tier and price version. What stands in the ledger for it is always

    posted + lost = rate(all its tokens)            rounded once, half-even
    posted ≤ spent                                  what gateways took for it, each request's
                                                    classes rounded up

so neither the number of requests nor the order of their coming changes an amount. `lost` is what
could not be taken from the customer: a bill that a gateway cut to what it had held, or the one
micro by which a half that was rounded down is made good when there is no credit left for it.
What an engine made and nobody is billed for has lines of its own, of the kind `token_loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from sublet.base.kernel.price import cover_quantity, rate_quantity
from sublet.base.wire.gateway import PER_TOKENS, Outcome, Price, UsageEvent

TOKEN_USAGE = "token_usage"  # noqa: S105 - a kind of transfer
TOKEN_LOSS = "token_loss"  # noqa: S105 - a kind of transfer
INPUT, CACHED, OUTPUT = "input", "cached", "output"
CLASSES = (INPUT, CACHED, OUTPUT)
DAY_US = 86_400_000_000
_UNBILLED = (Outcome.FAILED, Outcome.LOST)


class LineKey(NamedTuple):
    """What a line is of. `replica_id` is named where no key is: tokens that nobody asked for."""

    kind: str
    organisation_id: str
    project_id: str | None
    key_id: str
    replica_id: str
    is_first_party: bool
    model: str
    tier: str
    version: str
    day: int
    """Days since the epoch."""
    token_class: str


@dataclass(slots=True)
class Tally:
    """What came to a line: tokens, and what gateways spent on them."""

    quantity: int = 0
    spent_micros: int = 0


@dataclass(slots=True)
class Spending:
    """What came to a key's allowance."""

    micros: int = 0
    tokens: int = 0


@dataclass(slots=True)
class Book:
    """Some requests, added up."""

    lines: dict[LineKey, Tally] = field(default_factory=dict)
    spending: dict[str, Spending] = field(default_factory=dict)
    """By key."""


class Group(NamedTuple):
    """Requests that share a price and a payer."""

    organisation_id: str
    project_id: str | None
    key_id: str
    is_first_party: bool
    model: str
    tier: str
    version: str
    day: int

    def key(self, kind: str, token_class: str) -> LineKey:
        return LineKey(
            kind=kind,
            organisation_id=self.organisation_id,
            project_id=self.project_id,
            key_id=self.key_id,
            replica_id="",
            is_first_party=self.is_first_party,
            model=self.model,
            tier=self.tier,
            version=self.version,
            day=self.day,
            token_class=token_class,
        )


def tally(events: Iterable[UsageEvent], price_of: Callable[[str], Price]) -> Book:
    """Add requests up to lines, each at the price version that it names."""
    groups: dict[Group, list[int]] = {}
    prices: dict[str, Price] = {}
    book = Book()
    for event in events:
        version = event.price_version
        price = prices.get(version)
        if price is None:
            price = prices[version] = price_of(version)
        group = Group(
            event.organisation_id,
            event.project_id,
            event.key_id,
            event.is_first_party,
            event.model,
            event.tier,
            version,
            event.started_us // DAY_US,
        )
        sums = groups.get(group)
        if sums is None:
            sums = groups[group] = [0, 0, 0, 0, 0, 0, 0]
        if event.outcome in _UNBILLED:
            sums[6] += event.made
            continue
        uncached, cached, output = event.input_uncached, event.cache_read, event.output
        sums[0] += uncached
        sums[1] += cached
        sums[2] += output
        # A bill that was cut to what was held is short in its last classes.
        left = event.micros
        for place, (tokens, micros) in enumerate(
            (
                (uncached, price.input_micros),
                (cached, price.cached_micros),
                (output, price.output_micros),
            ),
            start=3,
        ):
            taken = -(-tokens * micros // PER_TOKENS)
            if taken > left:
                taken = left
            sums[place] += taken
            left -= taken
        sums[6] += event.made - output
        spending = book.spending.get(event.key_id)
        if spending is None:
            spending = book.spending[event.key_id] = Spending()
        spending.micros += event.micros
        spending.tokens += uncached + cached + output
    for group, sums in groups.items():
        for place, token_class in enumerate(CLASSES):
            if sums[place]:
                key = group.key(TOKEN_USAGE, token_class)
                book.lines[key] = Tally(sums[place], sums[place + 3])
        if sums[6]:
            book.lines[group.key(TOKEN_LOSS, OUTPUT)] = Tally(sums[6])
    return book


def price_of_class(price: Price, token_class: str) -> int:
    return {
        INPUT: price.input_micros,
        CACHED: price.cached_micros,
        OUTPUT: price.output_micros,
    }[token_class]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLine:
    """How a line stands. `posted_quantity`, `lost_quantity`: tokens that its transfers name;
    `number`: how often it was posted."""

    seq: int
    key: LineKey
    price_micros: int
    quantity: int = 0
    spent_micros: int = 0
    posted_micros: int = 0
    lost_micros: int = 0
    posted_quantity: int = 0
    lost_quantity: int = 0
    number: int = 0

    @property
    def rated_micros(self) -> int:
        return rate_quantity(self.quantity, self.price_micros, PER_TOKENS)

    @property
    def is_capped(self) -> bool:
        """Charged to a customer, who never pays more than gateways took."""
        return self.key.kind == TOKEN_USAGE and not self.key.is_first_party

    @property
    def due_micros(self) -> int:
        """What posting would charge now, below zero what it would give back.

        What is lost stays lost, but a correction undoes a loss before it gives anything back.
        """
        owed = self.rated_micros - self.lost_micros
        if owed <= self.posted_micros:
            return min(self.rated_micros - self.posted_micros, 0)
        most = min(owed, self.spent_micros) if self.is_capped else owed
        return max(most - self.posted_micros, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What brings a line to where it should stand: micros and tokens charged and lost."""

    pay_micros: int
    lose_micros: int
    pay_quantity: int
    lose_quantity: int


def step(line: TokenLine, purse_micros: int) -> Step:
    """Post a line, of which at most `purse_micros` can be charged: the rest is lost."""
    rated = line.rated_micros
    pay = min(line.due_micros, max(purse_micros, 0))
    lost = rated - line.posted_micros - pay
    lost_for = line.quantity * lost // rated if lost else 0
    paid_for = line.quantity - lost_for
    return Step(
        pay_micros=pay,
        lose_micros=lost - line.lost_micros,
        pay_quantity=paid_for - line.posted_quantity,
        lose_quantity=lost_for - line.lost_quantity,
    )


def deemed_spent(quantity: int, price_micros: int) -> int:
    """What a correction that adds tokens may charge for them."""
    return cover_quantity(max(quantity, 0), price_micros, PER_TOKENS)
