"""Power is a sum of integers and rationals, rounded once."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from sublet.money.economics.power import Draw, cost, exact_cost, watt_ms

HOUR = 3_600_000
GPU = Draw(idle_watts=100, busy_watts=700, pue=Fraction(5, 4), tariff_micros_per_kwh=120_000)


def test_an_hour_by_hand() -> None:
    # 0.7 kW × 1 h × 1.25 × 0.12 = 0.105
    assert exact_cost(GPU, {"sold_used": HOUR}) == 105_000
    # idle at 100 W: 0.1 × 1.25 × 0.12 = 0.015; down draws nothing
    assert exact_cost(GPU, {"idle": HOUR, "down": 50 * HOUR}) == 15_000


def test_a_device_that_is_held_and_not_used_draws_idle_watts() -> None:
    assert watt_ms(GPU, {"sold_unused": 10, "overhead": 10}) == 20 * 100
    assert watt_ms(GPU, {"first_party": 10, "serving": 10}) == 20 * 700


@given(st.dictionaries(st.sampled_from(["sold_used", "idle", "down"]), st.integers(0, 10**12)))
def test_pools_are_added_before_rounding(uses: dict[str, int]) -> None:
    draws = {"a": GPU, "b": GPU}
    together = cost(draws, {"a": uses, "b": uses})
    assert abs(together - 2 * exact_cost(GPU, uses)) <= Fraction(1, 2)


def test_a_pool_without_cost_facts_adds_nothing() -> None:
    assert cost({}, {"a": {"sold_used": HOUR}}) == 0
