"""F13 Two truths of price: a quote, a new rate card, a retry; and a bill across a month's end."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import httpx2
import pytest
from starlette.testclient import TestClient

from sublet.edge.api import Deps, create_api
from sublet.rehearsal import Consumer, World
from sublet.rights import market

Worlds = Callable[..., World]
CARD = """
currency = "USD"
[[offer]]
id = "gpu-on-demand"
product = "on_demand"
device_kind = "gpu"
price_usd_per_device_hour = 0.7
shapes = [1]
default_notice_seconds = 3600
notices = [{ seconds = 3600, factor_permille = 1000 }]
[[offer]]
id = "gpu-spot"
product = "spot"
device_kind = "gpu"
price_usd_per_device_hour = 0.7
shapes = [1]
default_notice_seconds = 120
notices = [{ seconds = 120, factor_permille = 1000 }]
"""


def dearer(price: str) -> str:
    return re.sub(r"(?<=hour = )[\d.]+", price, CARD)


def post(world: World, who: Consumer, path: str, body: object, key: str | None) -> httpx2.Response:
    deps = Deps(store=world.store, engine=world.line.engine, version="test")
    headers = {"authorization": f"Bearer {who.secret}"}
    if key is not None:
        headers["idempotency-key"] = key
    return TestClient(create_api(deps)).post(path, json=body, headers=headers)


def test_f13_a_quote_stands_five_minutes_whatever_the_card_says(worlds: Worlds) -> None:
    world = worlds(rate_card=CARD)
    buyer = world.sign_up()
    asked_at = world.now
    quote = buyer.quote("gpu-on-demand", duration_seconds=3600)
    other = buyer.quote("gpu-on-demand", duration_seconds=3600)
    assert quote.total.micros == 700_000
    world.run_for(180)
    world.owner.load_card(dearer("1.4"), world.now)
    assert world.offers["gpu-on-demand"].price_micros_per_device_hour() == 1_400_000
    world.run_until(asked_at + timedelta(seconds=299))
    taken = post(world, buyer, "/v1/instances", {"quote_id": quote.id}, "k")
    assert taken.status_code == 201
    again = post(world, buyer, "/v1/instances", {"quote_id": quote.id}, None)
    assert again.json()["error"]["code"] == "quote_accepted"
    world.run_until(asked_at + timedelta(seconds=301))
    retried = post(world, buyer, "/v1/instances", {"quote_id": quote.id}, "k")
    assert retried.status_code == 201
    assert retried.json()["id"] == taken.json()["id"]
    assert retried.headers["idempotent-replayed"] == "true"
    late = post(world, buyer, "/v1/instances", {"quote_id": other.id}, None)
    assert (late.status_code, late.json()["error"]["code"]) == (409, "quote_expired")
    (workload,) = buyer.workloads()
    contract = world.read(market.get_contract, workload.contract_id)
    assert contract.price_micros == 700_000
    world.run_for(600)
    buyer.end(workload)
    world.run_for(60)
    (line,) = buyer.invoice().lines
    assert (line.price_micros, line.amount_micros) == (700_000, buyer.posted(workload))


@pytest.mark.parametrize("offer", ["gpu-on-demand", "gpu-spot"])
@pytest.mark.parametrize("seconds", [1, 601, 1800, 1803])
def test_f13_quoted_total_is_the_invoice_across_a_months_end(
    worlds: Worlds, offer: str, seconds: int
) -> None:
    """The same seconds, half of them in either month. Spot: for hours already posted."""
    start = datetime(2026, 10, 31, 23, 50, tzinfo=UTC)
    world = worlds(rate_card=CARD, start=start, start_seconds=0.0, audit_every=10)
    buyer = world.sign_up()
    world.run_until(datetime(2026, 11, 1, tzinfo=UTC) - timedelta(milliseconds=seconds * 500 + 1))
    quote = buyer.quote(offer, duration_seconds=seconds)
    job = buyer.take(quote, kind="job", command=("sleep", str(seconds)))
    world.run_for(seconds + 200)
    assert buyer.state(job) == "completed"
    meter = buyer.meter(job)
    assert meter is not None
    assert meter.opened_at == quote.created_at
    assert meter.closed_at == quote.created_at + timedelta(seconds=seconds)
    october, november = buyer.invoice(start), buyer.invoice(world.now)
    lines = [*october.lines, *november.lines]
    assert len(lines) == 2
    assert {line.amount_micros for line in lines} == {line.amount.micros for line in quote.lines}
    assert october.total_micros + november.total_micros == quote.total.micros
    assert buyer.posted(job) == quote.total.micros
    assert buyer.balance == 1_000_000_000 - quote.total.micros
