"""Offers, prices, rate cards, cost facts and quotes as they are shown."""

from __future__ import annotations

from typing import Literal, cast

from sublet.base.kernel.price import Line
from sublet.base.wire import rest
from sublet.capacity import fleet
from sublet.rights import market

Kind = Literal["cpu", "gpu"]
Sold = Literal["spot", "on_demand"]


def offer(found: market.Offer) -> rest.Offer:
    return rest.Offer(
        id=found.id,
        product=cast(Sold, found.product.value),
        pool_id=found.pool_id,
        site_id=found.site_id,
        devices=found.devices,
        whole_node=found.whole_node,
        device_kind=cast(Kind, found.device_kind),
        device_model=found.device_model,
        memory_bytes_per_device=found.memory_bytes,
        price_micros_per_device_hour=found.price_micros_per_device_hour(),
        default_notice_seconds=found.default_notice_seconds,
        notices=[
            rest.NoticeChoice(
                notice_seconds=choice.seconds,
                price_micros_per_device_hour=found.price_micros_per_device_hour(choice.seconds),
            )
            for choice in found.notices
        ],
        firm_seconds=found.firm_seconds,
        outbound=found.outbound,
        trusted_tenants=found.trusted_tenants,
        missing_fences=list(found.missing_fences),
        currency=found.currency,
        rate_card_version=found.card_version,
    )


def spot_price(found: market.SpotPrice, currency: str) -> rest.SpotPrice:
    return rest.SpotPrice(
        pool_id=found.pool_id,
        starts_at=found.hour,
        price_micros_per_device_hour=found.micros,
        floor_micros_per_device_hour=found.floor_micros,
        currency=currency,
        posted_at=found.posted_at,
    )


def rate_card(found: market.RateCard, newest_version: int) -> rest.RateCard:
    return rest.RateCard(
        version=found.version,
        newest_version=newest_version,
        effective_from=found.effective_from,
        text=found.text,
    )


def cost_facts(found: fleet.Cost, site: fleet.Site, currency: str) -> rest.CostFacts:
    return rest.CostFacts(
        pool_id=found.pool_id,
        name=found.name,
        currency=currency,
        purchase_micros_per_device=found.purchase_micros,
        residual_micros_per_device=found.residual_micros,
        in_service_on=found.in_service_on.isoformat(),
        life_months=found.life_months,
        idle_watts=found.idle_watts,
        busy_watts=found.busy_watts,
        wear_micros_per_device_hour=found.wear_micros_per_device_hour,
        floor_micros_per_device_hour=fleet.floor_micros_per_device_hour(found, site),
        source=found.source,
    )


def quote(found: market.Quote) -> rest.Quote:
    return rest.Quote(
        id=found.id,
        organisation_id=found.organisation_id,
        project_id=found.project_id,
        offer_id=found.offer_id,
        product=cast(Sold, found.product.value),
        pool_id=found.pool_id,
        devices=found.devices,
        count=found.count,
        whole_node=found.whole_node,
        notice_seconds=found.notice_seconds,
        firm_seconds=found.firm_seconds,
        stop_grace_seconds=found.stop_grace_seconds,
        duration_seconds=found.duration_seconds,
        max_price_micros_per_device_hour=found.max_price_micros,
        prices=[
            rest.PricePoint(
                starts_at=point.starts_at,
                price_micros_per_device_hour=point.micros,
                version=point.version,
            )
            for point in found.points
        ],
        hold=rest.Money.of(found.hold),
        hold_seconds=found.hold_seconds,
        total=rest.Money.of(found.total),
        lines=[_line(line) for line in found.lines],
        is_exact=found.is_exact,
        exact_until=found.exact_until,
        credit_rule=found.credit_rule,
        outbound=found.outbound,
        trusted_tenants=found.trusted_tenants,
        missing_fences=list(found.missing_fences),
        created_at=found.created_at,
        expires_at=found.expires_at,
        is_first_party=found.is_first_party,
        contract_id=found.contract_id,
    )


def _line(line: Line) -> rest.PriceLine:
    return rest.PriceLine(
        starts_at=line.start,
        ends_at=line.end,
        quantity=line.quantity,
        price_micros=line.price_micros,
        per=line.per,
        version=line.version,
        amount=rest.Money.of(line.amount),
    )
