"""What the whole earns and costs an hour, as of now."""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import Connection

from sublet.base.kernel.price import DEVICE_HOUR_MS
from sublet.capacity import fleet
from sublet.edge.api.show.fleet import use_of
from sublet.money import economics
from sublet.money.economics import power
from sublet.records import metering
from sublet.rights import market

HOUR = timedelta(hours=1)


def earning_micros_per_hour(tx: Connection, now: datetime) -> int:
    """What open meters of sales come to in an hour at the prices of now."""
    total = 0
    for meter in metering.list_open_meters(tx):
        if meter.contract_id is None:
            continue
        contract = market.get_contract(tx, meter.contract_id)
        if not contract.is_first_party:
            terms = market.terms_of(tx, contract, None)
            total += meter.devices * terms.point_at(now).micros
    return total


def cost_micros_per_hour(tx: Connection, now: datetime) -> int:
    """Depreciation and power of an hour, at what the devices do now. Pools without facts: nothing."""
    total = 0
    costs = {cost.pool_id: cost for cost in fleet.list_costs(tx)}
    for pool in fleet.list_pools(tx):
        cost = costs.get(pool.id)
        if cost is None:
            continue
        devices = [device.id for device in fleet.list_devices(tx, pool.id)]
        asset = economics.asset_of(cost)
        total += len(devices) * economics.booked(asset, now, now + HOUR)
        draw = economics.draw_of(cost, fleet.get_site(tx, pool.site_id))
        uses = {use: n * DEVICE_HOUR_MS for use, n in use_of(tx, devices, now).items()}
        total += power.cost({pool.id: draw}, {pool.id: uses})
    return total
