"""What else there is when something is out of stock: offers that would be admitted now."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection

from sublet.capacity import allocation
from sublet.capacity.allocation import Admitted, Claim, Party, Rank, Release
from sublet.capacity.allocation.admit import admit
from sublet.rights import market

MOST_WAYS = 5


def alternatives(
    tx: Connection,
    now: datetime,
    *,
    refused_offer_id: str,
    grace_seconds: int,
    max_run_seconds: int | None,
) -> list[dict[str, Any]]:
    """Other shapes, products and pools that have room for one unit now, largest shapes first.

    Decided by the book's own rule on the book as it is, so that what is named is then admitted.
    """
    books: dict[str, allocation.PoolBook] = {}
    ways: list[dict[str, Any]] = []
    for offer in sorted(market.list_offers(tx, now), key=lambda o: (-o.devices, o.id)):
        if offer.id == refused_offer_id:
            continue
        if offer.pool_id not in books:
            books[offer.pool_id] = allocation.get_book(tx, offer.pool_id, now=now)
        wanted = _wanted(offer, now, grace_seconds, max_run_seconds)
        if isinstance(admit(books[offer.pool_id], wanted, now=now), Admitted):
            ways.append(
                {
                    "offer_id": offer.id,
                    "product": offer.product.value,
                    "devices": offer.devices,
                    "site_id": offer.site_id,
                    "pool_id": offer.pool_id,
                    "price_micros_per_device_hour": offer.price_micros_per_device_hour(),
                    "notice_seconds": offer.default_notice_seconds,
                }
            )
        if len(ways) == MOST_WAYS:
            break
    return ways


def _wanted(
    offer: market.Offer, now: datetime, grace_seconds: int, max_run_seconds: int | None
) -> Claim:
    """One unit of the offer at its default notice, as its contract would claim it."""
    ends_at = None if max_run_seconds is None else now + timedelta(seconds=max_run_seconds)
    return Claim(
        id="clm_wanted",
        holder="wanted",
        organisation_id="wanted",
        pool_id=offer.pool_id,
        party=Party.SALE,
        rank=Rank[offer.product.name],
        devices=offer.devices,
        whole_node=offer.whole_node,
        starts_at=now,
        release=Release(
            ends_at=ends_at,
            notice_seconds=offer.default_notice_seconds,
            firm_seconds=offer.firm_seconds,
            stop_seconds=grace_seconds + offer.scrub_seconds,
        ),
    )
