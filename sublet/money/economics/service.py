"""What others call: the statement, read from ledger, fleet and metering."""

from __future__ import annotations

from datetime import datetime
from fractions import Fraction

from sqlalchemy import Connection

from sublet.base.kernel.errors import Invalid
from sublet.capacity import fleet
from sublet.money.economics.depreciation import Asset
from sublet.money.economics.power import Draw
from sublet.money.economics.statement import PoolFacts, Posted, Statement, compose
from sublet.records import ledger, metering


def statement(
    tx: Connection, start: datetime, end: datetime, now: datetime, *, currency: str = "USD"
) -> Statement:
    """The owner's statement of `[start, end)`, cut at `now`: what has not been is not counted.

    It begins with the first device at the earliest: what the machine cost before is not this
    cloud's. Money counts when it was posted, device time and depreciation when it was. Raises Invalid on
    a window that ends before it starts or lies wholly ahead.
    """
    end = min(end, now)
    began = metering.find_beginning(tx)
    if began is not None and began < end:
        start = max(start, began)
    if end <= start:
        raise Invalid("The window ends after it starts, and begins in the past.", param="start")
    return compose(
        start=start,
        end=end,
        currency=currency,
        posted=_posted(tx, start, end),
        pools=tuple(_facts(tx, pool, start, end) for pool in fleet.list_pools(tx)),
    )


def _posted(tx: Connection, start: datetime, end: datetime) -> Posted:
    moved = {name: money.micros for name, money in ledger.changes(tx, start, end).items()}
    prefix = ledger.revenue_account("")
    return Posted(
        revenue_by_product={
            name.removeprefix(prefix): micros
            for name, micros in moved.items()
            if name.startswith(prefix)
        },
        credits=-(moved.get(ledger.CREDITS, 0) + moved.get(ledger.LOSSES, 0)),
        trial=-moved.get(ledger.TRIAL, 0),
        payments=-moved.get(ledger.PAYMENTS, 0),
    )


def _facts(tx: Connection, pool: fleet.Pool, start: datetime, end: datetime) -> PoolFacts:
    devices = fleet.list_devices(tx, pool.id)
    cost = next((cost for cost in fleet.list_costs(tx) if cost.pool_id == pool.id), None)
    site = fleet.get_site(tx, pool.site_id)
    return PoolFacts(
        pool_id=pool.id,
        devices=len(devices),
        asset=None if cost is None else asset_of(cost),
        draw=None if cost is None else draw_of(cost, site),
        ms_by_use=metering.partition(
            tx, device_ids=[device.id for device in devices], start=start, end=end
        ),
    )


def asset_of(cost: fleet.Cost) -> Asset:
    return Asset(
        cost_micros=cost.purchase_micros,
        residual_micros=cost.residual_micros,
        in_service_on=cost.in_service_on,
        life_months=cost.life_months,
    )


def draw_of(cost: fleet.Cost, site: fleet.Site) -> Draw:
    return Draw(
        idle_watts=cost.idle_watts,
        busy_watts=cost.busy_watts,
        pue=Fraction(site.pue),
        tariff_micros_per_kwh=site.tariff_micros_per_kwh,
    )
