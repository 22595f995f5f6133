"""The statement's figures, by hand and in general."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from sublet.money.economics.depreciation import Asset
from sublet.money.economics.power import Draw
from sublet.money.economics.statement import PoolFacts, Posted, Statement, compose

START = datetime(2026, 3, 1, tzinfo=UTC)
HOUR = 3_600_000
# One device-hour costs 1.00 of depreciation: 8,760 over 365 days.
ASSET = Asset(
    cost_micros=8_760_000_000,
    residual_micros=0,
    in_service_on=date(2026, 1, 1),
    life_months=12,
)
DRAW = Draw(idle_watts=100, busy_watts=500, pue=Fraction(1), tariff_micros_per_kwh=1_000_000)


def a_pool(name: str = "pol_1", devices: int = 2, **hours: int) -> PoolFacts:
    return PoolFacts(
        pool_id=name,
        devices=devices,
        asset=ASSET,
        draw=DRAW,
        ms_by_use={use: count * HOUR for use, count in hours.items()},
    )


def state(
    *pools: PoolFacts, hours: int = 4, credits_: int = 0, trial: int = 0, **revenue: int
) -> Statement:
    return compose(
        start=START,
        end=START + timedelta(hours=hours),
        currency="USD",
        posted=Posted(revenue_by_product=revenue, credits=credits_, trial=trial, payments=0),
        pools=pools,
    )


def test_a_window_by_hand() -> None:
    # Two devices for four hours: 3 h sold, 1 h first-party, 4 h idle. The first-party hour was
    # priced at 2.00 and credited in full; an interruption gave 0.50 back.
    found = state(
        a_pool(sold_used=3, first_party=1, idle=4),
        spot=9_000_000,
        first_party=2_000_000,
        credits_=2_500_000,
        trial=5_000_000,
    )
    assert found.revenue.micros == 9_000_000
    assert found.credits.micros == 500_000
    assert found.first_party.micros == 2_000_000
    assert found.depreciation.micros == 8_000_000
    # 4 h × 0.5 kW + 4 h × 0.1 kW = 2.4 kWh at 1.00
    assert found.power.micros == 2_400_000
    assert found.margin.micros == 9_000_000 - 500_000 - 8_000_000 - 2_400_000
    # half of all device time was idle: 4.00 of depreciation and 0.4 kWh, over 4 hours
    assert found.idle_cost.micros == 4_400_000
    assert found.idle_cost_micros_per_device_hour == 1_100_000
    assert found.revenue_micros_per_device_hour == 2_833_333
    assert found.utilisation_permille == 500


def test_a_window_without_idle_or_sold_time_divides_by_nothing() -> None:
    found = state(a_pool(down=8))
    assert found.idle_cost_micros_per_device_hour is None
    assert found.revenue_micros_per_device_hour is None
    assert found.utilisation_permille == 0
    assert state().utilisation_permille is None


def test_a_pool_without_cost_facts_is_named_and_costs_nothing() -> None:
    bare = PoolFacts(
        pool_id="pol_2", devices=1, asset=None, draw=None, ms_by_use={"idle": 4 * HOUR}
    )
    found = state(bare)
    assert found.pools_without_costs == ("pol_2",)
    assert (found.depreciation.micros, found.power.micros, found.idle_cost.micros) == (0, 0, 0)


def test_every_figure_says_how_it_came_about() -> None:
    found = state(a_pool(sold_used=4, idle=4), spot=1_000_000)
    by_name = {figure.name: figure for figure in found.figures}
    assert by_name["margin"].value == found.margin.micros
    assert by_name["revenue:spot"].value == 1_000_000
    assert by_name["device_time:sold_used"].value == 4 * HOUR
    assert all(figure.formula for figure in found.figures)


uses = st.fixed_dictionaries({use: st.integers(0, 20) for use in ("sold_used", "idle", "down")})


@given(st.lists(uses, min_size=1, max_size=4), st.integers(0, 10**9), st.integers(0, 10**8))
def test_idle_cost_is_a_part_of_all_cost_and_margin_is_what_is_left(
    by_pool: list[dict[str, int]], revenue: int, credit: int
) -> None:
    pools = [a_pool(f"pol_{i}", **hours) for i, hours in enumerate(by_pool)]
    found = state(*pools, spot=revenue, credits_=credit)
    assert 0 <= found.idle_cost.micros <= found.depreciation.micros + found.power.micros
    cost = found.depreciation.micros + found.power.micros
    assert found.margin.micros + cost + found.credits.micros == found.revenue.micros
    assert sum(found.device_ms_by_use.values()) == HOUR * sum(
        sum(hours.values()) for hours in by_pool
    )
