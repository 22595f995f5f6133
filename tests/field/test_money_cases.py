"""Field cases M2–M5: sums that sum, windows of budgets, prices in force, months of use."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

import pytest

from sublet.base.kernel.price import DEVICE_HOUR_MS
from sublet.money import billing
from sublet.records import metering, tenancy
from sublet.rehearsal import World
from sublet.rights import market

Worlds = Callable[..., World]
CARD = """
currency = "USD"
[[offer]]
id = "gpu-on-demand"
product = "on_demand"
device_kind = "gpu"
price_usd_per_device_hour = 2.0
shapes = [1]
default_notice_seconds = 3600
notices = [{ seconds = 3600, factor_permille = 1000 }]
[[offer]]
id = "gpu-spot"
product = "spot"
device_kind = "gpu"
price_usd_per_device_hour = 2.0
shapes = [1]
default_notice_seconds = 120
notices = [{ seconds = 120, factor_permille = 1000 }]
"""


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def costing(price: str) -> str:
    return re.sub(r"(?<=hour = )[\d.]+", price, CARD)


def test_m2_three_lines_of_a_third_sum_to_the_total_that_is_shown(worlds: Worlds) -> None:
    """0.334000 three times: 1.00 = 0.34 + 0.33 + 0.33, and 1.002000 is what the ledger moved."""
    world = worlds(devices_per_node=1, start_seconds=0.0, rate_card=costing("0.8"), audit_every=5)
    buyer = world.sign_up()
    for _ in range(3):
        buyer.job("sleep", "1503", offer="gpu-on-demand")
        world.run_for(1700)
    invoice = buyer.invoice()
    assert [line.amount_micros for line in invoice.lines] == [334_000] * 3
    assert [line.shown_minor for line in invoice.lines] == [34, 33, 33]
    assert (invoice.total_micros, invoice.total_minor) == (1_002_000, 100)
    assert sum(line.shown_minor for line in invoice.lines) == invoice.total_minor
    assert buyer.balance == 1_000_000_000 - invoice.total_micros
    for line in invoice.lines:
        assert line.quantity == 1_503_000
        assert line.per == DEVICE_HOUR_MS


@pytest.fixture(params=["UTC", "Asia/Tokyo"])
def zone(request: pytest.FixtureRequest) -> Iterator[str]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = request.param
    time.tzset()
    yield request.param
    if before is None:
        del os.environ["TZ"]
    else:
        os.environ["TZ"] = before
    time.tzset()


@pytest.mark.usefixtures("zone")
def test_m3_a_days_budget_reopens_at_midnight_utc(worlds: Worlds) -> None:
    """1.00 a day, spent at 23:00Z: refused at 23:59:59.999999Z, admitted at 00:00:00Z."""
    world = worlds(
        start=at("2026-11-02T22:00:00"), start_seconds=0.0, rate_card=CARD, audit_every=8
    )
    buyer = world.sign_up()
    buyer.job("sleep", "1800", offer="gpu-on-demand")
    world.run_until(at("2026-11-02T23:00:00"))
    assert buyer.invoice().total_micros == 1_000_000
    with world.work() as work:
        tenancy.set_budget(
            work,
            tenancy.Budget(
                scope_kind=tenancy.ScopeKind.ORGANISATION,
                scope_id=buyer.organisation_id,
                period="day",
                limit_micros=1_000_000,
            ),
        )
    midnight = at("2026-11-03T00:00:00")
    world.run_until(midnight - timedelta(microseconds=1))
    with pytest.raises(market.BudgetExceeded) as refused:
        buyer.rent("gpu-spot")
    assert refused.value.details["period"] == "day"
    assert datetime.fromisoformat(refused.value.details["resets_at"]) == midnight
    assert "2026-11-03T00:00:00+00:00" in refused.value.message
    world.run_until(midnight)
    made = buyer.rent("gpu-spot")
    world.run_for(30)
    assert buyer.state(made) == "running"
    hold = buyer.held(made)
    assert hold is not None
    assert hold.admitted_at == midnight, "a hold counts in the window of its admission"


def test_m4_the_price_in_force_at_use_and_the_same_for_its_correction(worlds: Worlds) -> None:
    """Posted 2.00 to 12:00Z, 2.40 from there (a step is 20 % at most): 11:30–12:30 is two lines."""
    world = worlds(
        start=at("2026-11-02T09:00:00"), start_seconds=0.0, rate_card=CARD, audit_every=8
    )
    buyer = world.sign_up()
    world.owner.load_card(costing("3.0"), at("2026-11-02T12:00:00"))
    world.run_until(at("2026-11-02T11:30:00"))
    job = buyer.job("sleep", "3600", offer="gpu-spot")
    world.run_until(at("2026-11-02T12:31:00"))
    lines = [(line.price_micros, line.amount_micros) for line in buyer.invoice().lines]
    assert lines == [(2_000_000, 1_000_000), (2_400_000, 1_200_000)]
    first, second = buyer.invoice().lines
    assert (first.starts_at, first.ends_at) == (
        at("2026-11-02T11:30:00"),
        at("2026-11-02T12:00:00"),
    )
    assert (second.starts_at, second.ends_at) == (
        at("2026-11-02T12:00:00"),
        at("2026-11-02T12:30:00"),
    )

    world.sleep_until(at("2026-11-03T12:00:00"))
    run = buyer.run(job)
    begin, end = at("2026-11-02T11:40:00"), at("2026-11-02T11:50:00")
    with world.work() as work:
        for record in metering.list_usage(work.tx, run.id):
            start, stop = max(record.starts_at, begin), min(record.ends_at, end)
            if start < stop:
                metering.correct(
                    work,
                    run_id=run.id,
                    starts_at=start,
                    ends_at=stop,
                    devices=-1,
                    corrects=record.event_id,
                    event_id=f"correction of {record.event_id}",
                )
        taken_back = market.settle(work, job.contract_id)
    assert taken_back.micros == -333_333
    first, second = buyer.invoice().lines
    assert (first.price_micros, first.amount_micros) == (2_000_000, 666_667)
    assert (second.price_micros, second.amount_micros) == (2_400_000, 1_200_000)
    assert buyer.balance == 1_000_000_000 - 1_866_667


def test_m4_an_agreed_price_stands(worlds: Worlds) -> None:
    """On demand the price is the contract's: a dearer card changes nothing that was agreed."""
    world = worlds(
        start=at("2026-11-02T11:00:00"), start_seconds=0.0, rate_card=CARD, audit_every=8
    )
    buyer = world.sign_up()
    world.run_until(at("2026-11-02T11:30:00"))
    job = buyer.job("sleep", "3600", offer="gpu-on-demand")
    world.owner.load_card(costing("3.0"), at("2026-11-02T12:00:00"))
    world.run_until(at("2026-11-02T12:31:00"))
    (line,) = buyer.invoice().lines
    assert (line.price_micros, line.amount_micros) == (2_000_000, 2_000_000)
    later = buyer.job("sleep", "1800", offer="gpu-on-demand")
    world.run_until(at("2026-11-02T13:10:00"))
    assert buyer.posted(later) == 1_500_000
    assert buyer.posted(job) == 2_000_000


def test_m5_use_across_the_first_of_a_month_is_cut_there(worlds: Worlds) -> None:
    """10-31T23:30Z–11-01T00:30Z: 1800 s on either invoice."""
    world = worlds(
        start=at("2026-10-31T23:00:00"), start_seconds=0.0, rate_card=CARD, audit_every=8
    )
    buyer = world.sign_up()
    world.run_until(at("2026-10-31T23:30:00"))
    buyer.job("sleep", "3600", offer="gpu-on-demand")
    world.run_until(at("2026-11-01T00:31:00"))
    (october,) = buyer.invoice(at("2026-10-31T00:00:00")).lines
    (november,) = buyer.invoice(at("2026-11-01T00:00:00")).lines
    assert (october.quantity, november.quantity) == (1_800_000, 1_800_000)
    assert october.ends_at == november.starts_at == at("2026-11-01T00:00:00")
    assert (october.amount_micros, november.amount_micros) == (1_000_000, 1_000_000)


def test_m5_use_that_is_told_late_is_a_correction_on_the_next_invoice(worlds: Worlds) -> None:
    """A node is silent from 20 October to 5 November; October was closed on the 4th."""
    world = worlds(
        nodes=2,
        devices_per_node=1,
        start=at("2026-10-20T11:00:00"),
        start_seconds=0.0,
        rate_card=CARD,
        audit_every=20,
    )
    buyer = world.sign_up()
    early = buyer.job("sleep", "1800", offer="gpu-on-demand")
    late = buyer.job("sleep", "3000", offer="gpu-on-demand")
    world.run_until(at("2026-10-20T11:40:00"))
    assert buyer.state(early) == "completed"
    node = world.engine.run(buyer.run(late).id).node
    world.engine.silence(node, 17 * 86_400)
    world.sleep_until(at("2026-11-04T00:00:05"))
    world.run_for(120)
    month = at("2026-10-01T00:00:00")
    closed = buyer.invoice(month)
    assert closed.issued_at is not None
    billed = buyer.posted(late)
    assert closed.total_micros == 1_000_000 + billed

    world.sleep_until(at("2026-11-05T12:00:00"))
    world.engine.end_silence(node)
    world.run_for(120)
    assert buyer.state(late) == "completed"
    assert buyer.posted(late) == round(3000 * 2_000_000 / 3600)
    assert buyer.invoice(month) == closed, "byte for byte"
    (line,) = buyer.invoice(at("2026-11-01T00:00:00")).lines
    assert line.charge_class is billing.ChargeClass.CORRECTION
    assert line.starts_at.date() == at("2026-10-20T00:00:00").date()
    assert line.amount_micros == buyer.posted(late) - billed > 0
    assert line.quantity == 3_000_000 - billed * 3_600_000 // 2_000_000
    assert buyer.balance == 1_000_000_000 - 1_000_000 - buyer.posted(late)
