"""The market's loop: prices are posted in time."""

from __future__ import annotations

from datetime import datetime

from sublet.base.store import Actor, Store
from sublet.rights.market.prices import post_spot_prices


def step(store: Store, now: datetime) -> datetime:
    """Post the hours that are due; returns when the next one is."""
    with store.work(Actor.system("market")) as work:
        return max(post_spot_prices(work, work.now), now)
