"""The loop of allocation: notices at their last responsible moment. It runs after the owner's."""

from __future__ import annotations

from datetime import datetime, timedelta

from sublet.base.store import Actor, Store
from sublet.capacity.allocation import service, store

ACTOR = Actor.system("allocation")
AT_LEAST_EVERY = timedelta(seconds=30)
"""A claim may be filed by another process: nobody then wakes this loop."""


def step(database: Store, now: datetime) -> datetime:
    """Give the notices that are due in every pool; returns when to look again.

    It looks without a lock first, so that a quiet cloud writes nothing.
    """
    with database.read() as tx:
        looks = {pool: service.is_due(tx, now, pool) for pool in store.list_pool_ids(tx)}
    moments = [now + AT_LEAST_EVERY]
    for pool_id, (is_due, again_at) in looks.items():
        moment = _give(database, pool_id) if is_due else again_at
        if moment is not None:
            moments.append(moment)
    return min(moments)


def _give(database: Store, pool_id: str) -> datetime | None:
    with database.work(ACTOR) as work:
        return service.step(work, pool_id)
