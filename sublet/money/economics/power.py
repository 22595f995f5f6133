"""Power: what device time costs in electricity. Pure, exact, rounded once.

    device-milliseconds by use × watts ÷ 3.6 × 10⁹ × PUE × tariff

A device draws its busy watts while somebody's work has it (`sold_used`, `first_party`, `serving`)
and its idle watts otherwise: `idle`, `sold_unused`, and `overhead` (burn-in, provisioning, drain,
scrub). A device that is down draws nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from sublet.base.kernel.money import round_half_even

BUSY_USES = ("first_party", "sold_used", "serving")
IDLE_USES = ("overhead", "sold_unused", "idle")
WATT_MS_PER_KWH = 3_600_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """What one device draws, and what a kilowatt-hour at its site costs."""

    idle_watts: int
    busy_watts: int
    pue: Fraction
    tariff_micros_per_kwh: int


def watt_ms(draw: Draw, ms_by_use: Mapping[str, int]) -> int:
    busy = sum(ms_by_use.get(use, 0) for use in BUSY_USES)
    idle = sum(ms_by_use.get(use, 0) for use in IDLE_USES)
    return busy * draw.busy_watts + idle * draw.idle_watts


def exact_cost(draw: Draw, ms_by_use: Mapping[str, int]) -> Fraction:
    """Micros, not rounded: add those of several pools first, then round the sum once."""
    energy = Fraction(watt_ms(draw, ms_by_use), WATT_MS_PER_KWH)
    return energy * draw.pue * draw.tariff_micros_per_kwh


def cost(draws: Mapping[str, Draw], ms_by_pool: Mapping[str, Mapping[str, int]]) -> int:
    """Micros for all pools together."""
    parts = [exact_cost(draws[pool], uses) for pool, uses in ms_by_pool.items() if pool in draws]
    return round_half_even(sum(parts, Fraction(0)))
