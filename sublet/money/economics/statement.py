"""The owner's statement: from facts to figures, each with its formula in words. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction
from typing import Literal

from sublet.base.kernel.money import Money, round_half_even
from sublet.base.kernel.price import DEVICE_HOUR_MS
from sublet.money.economics import power
from sublet.money.economics.depreciation import Asset, booked
from sublet.money.economics.power import BUSY_USES, Draw

FIRST_PARTY = "first_party"
SOLD_USES = ("sold_used", "sold_unused")

Unit = Literal["money", "money per device-hour", "permille", "device-ms"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFacts:
    """A pool as the books see it. `asset` and `draw` None: no cost facts are known for it."""

    pool_id: str
    devices: int
    asset: Asset | None
    draw: Draw | None
    ms_by_use: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Posted:
    """What the ledger moved in the window, in micros; all amounts are positive as named."""

    revenue_by_product: Mapping[str, int]
    """`first_party` among them: what the owner's own use was priced at."""
    credits: int
    """Given back: after interruptions, and in full for first-party use."""
    trial: int
    payments: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number and how it came about. `value` None: it divides by nothing."""

    name: str
    value: int | None
    unit: Unit
    formula: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """The owner's view of `[start, end)`. `figures` hold every number again, with its formula."""

    start: datetime
    end: datetime
    currency: str
    revenue_by_product: Mapping[str, Money]
    revenue: Money
    credits: Money
    trial: Money
    payments: Money
    first_party: Money
    depreciation: Money
    power: Money
    margin: Money
    device_ms_by_use: Mapping[str, int]
    idle_cost: Money
    idle_cost_micros_per_device_hour: int | None
    revenue_micros_per_device_hour: int | None
    utilisation_permille: int | None
    pools_without_costs: tuple[str, ...]
    figures: tuple[Figure, ...]


def compose(
    *,
    start: datetime,
    end: datetime,
    currency: str,
    posted: Posted,
    pools: tuple[PoolFacts, ...],
) -> Statement:
    """All figures of a window from what was posted, owned and done in it."""
    by_use = _by_use(pools)
    whole_ms = sum(by_use.values())
    first_party = posted.revenue_by_product.get(FIRST_PARTY, 0)
    sold = {p: m for p, m in sorted(posted.revenue_by_product.items()) if p != FIRST_PARTY}
    revenue = sum(sold.values())
    credits = posted.credits - first_party
    depreciation = sum(_depreciation(pool, start, end) for pool in pools)
    power_cost = power.cost(_draws(pools), {pool.pool_id: pool.ms_by_use for pool in pools})
    margin = revenue - credits - depreciation - power_cost
    idle_cost = _idle_cost(pools, start, end)
    sold_ms = sum(by_use.get(use, 0) for use in SOLD_USES)
    busy_ms = sum(by_use.get(use, 0) for use in BUSY_USES)

    def money(micros: int) -> Money:
        return Money(micros, currency)

    statement = Statement(
        start=start,
        end=end,
        currency=currency,
        revenue_by_product={product: money(micros) for product, micros in sold.items()},
        revenue=money(revenue),
        credits=money(credits),
        trial=money(posted.trial),
        payments=money(posted.payments),
        first_party=money(first_party),
        depreciation=money(depreciation),
        power=money(power_cost),
        margin=money(margin),
        device_ms_by_use=by_use,
        idle_cost=money(idle_cost),
        idle_cost_micros_per_device_hour=_per_hour(idle_cost, by_use.get("idle", 0)),
        revenue_micros_per_device_hour=_per_hour(revenue - credits, sold_ms),
        utilisation_permille=_ratio(1000 * busy_ms, whole_ms),
        pools_without_costs=tuple(p.pool_id for p in pools if p.asset is None or p.draw is None),
        figures=(),
    )
    return _with_figures(statement)


def _by_use(pools: tuple[PoolFacts, ...]) -> dict[str, int]:
    found: dict[str, int] = {}
    for pool in pools:
        for use, ms in pool.ms_by_use.items():
            found[use] = found.get(use, 0) + ms
    return found


def _draws(pools: tuple[PoolFacts, ...]) -> dict[str, Draw]:
    return {pool.pool_id: pool.draw for pool in pools if pool.draw is not None}


def _depreciation(pool: PoolFacts, start: datetime, end: datetime) -> int:
    # Each device is an asset of its own, so that each sums exactly over its life.
    return 0 if pool.asset is None else pool.devices * booked(pool.asset, start, end)


def _idle_cost(pools: tuple[PoolFacts, ...], start: datetime, end: datetime) -> int:
    total = Fraction(0)
    for pool in pools:
        idle = pool.ms_by_use.get("idle", 0)
        whole = sum(pool.ms_by_use.values())
        if idle and whole:
            total += Fraction(_depreciation(pool, start, end) * idle, whole)
        if idle and pool.draw is not None:
            total += power.exact_cost(pool.draw, {"idle": idle})
    return round_half_even(total)


def _per_hour(micros: int, ms: int) -> int | None:
    return _ratio(micros * DEVICE_HOUR_MS, ms)


def _ratio(numerator: int, denominator: int) -> int | None:
    return round_half_even(Fraction(numerator, denominator)) if denominator else None


FORMULAS: Mapping[str, tuple[Unit, str]] = {
    "revenue": (
        "money",
        "sum of what was posted to revenue in the window, first-party use left out",
    ),
    "credits": (
        "money",
        "sum of credits posted in the window, those of first-party use left out, and of use that "
        "no credit covered",
    ),
    "trial": ("money", "credit granted in the window without payment"),
    "payments": ("money", "payments recorded in the window"),
    "first_party": (
        "money",
        "the owner's own use at the bid price of each hour, credited in full: no revenue",
    ),
    "depreciation": (
        "money",
        "for each device: (cost − residual) × time of its life in the window ÷ its whole life",
    ),
    "power": ("money", "device time by use × watts × PUE × tariff, rounded once"),
    "margin": ("money", "revenue − credits − depreciation − power"),
    "idle_cost": (
        "money",
        "for each pool: depreciation × idle time ÷ all device time + power drawn while idle",
    ),
    "idle_cost_per_device_hour": ("money per device-hour", "idle cost ÷ idle device-hours"),
    "revenue_per_device_hour": (
        "money per device-hour",
        "(revenue − credits) ÷ device-hours sold, used or not",
    ),
    "utilisation": (
        "permille",
        "device time of first-party, sold and used, and serving ÷ all device time",
    ),
}
"""Every figure of a statement: its unit and its formula in words."""


def _with_figures(statement: Statement) -> Statement:
    values: dict[str, int | None] = {
        "revenue": statement.revenue.micros,
        "credits": statement.credits.micros,
        "trial": statement.trial.micros,
        "payments": statement.payments.micros,
        "first_party": statement.first_party.micros,
        "depreciation": statement.depreciation.micros,
        "power": statement.power.micros,
        "margin": statement.margin.micros,
        "idle_cost": statement.idle_cost.micros,
        "idle_cost_per_device_hour": statement.idle_cost_micros_per_device_hour,
        "revenue_per_device_hour": statement.revenue_micros_per_device_hour,
        "utilisation": statement.utilisation_permille,
    }
    figures = [
        Figure(name=name, value=values[name], unit=unit, formula=formula)
        for name, (unit, formula) in FORMULAS.items()
    ]
    figures += [
        Figure(
            name=f"revenue:{product}",
            value=amount.micros,
            unit="money",
            formula=f"what was posted to revenue:{product} in the window",
        )
        for product, amount in statement.revenue_by_product.items()
    ]
    figures += [
        Figure(
            name=f"device_time:{use}",
            value=ms,
            unit="device-ms",
            formula=f"time of all devices whose use was {use}",
        )
        for use, ms in statement.device_ms_by_use.items()
    ]
    return dataclasses.replace(statement, figures=tuple(figures))
