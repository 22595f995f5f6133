"""Sealed replicas and strangers: never on one node at one time.

Where a pool has several nodes a sealed replica takes a whole node, and so nobody stands beside it.
Where it has one, that node is either the sealed model's or the strangers': whoever comes second is
refused. Filler leaves for them: each refusal that leaves its demand behind, and each waiter, gives
it its notice, and it does not come back while they wait or have just been refused.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta

from sqlalchemy import Connection

from sublet.base.store import Work
from sublet.capacity import allocation
from sublet.capacity.allocation import Claim, Rank
from sublet.rights import market
from sublet.shops.compute import life, store
from sublet.shops.compute.model import Reason, SealedNode, StrangersPresent, Workload

SLACK = timedelta(seconds=5)
"""From the refusal to the notice that it leads to, and from the scrub to the free device."""
KEPT_FREE = timedelta(minutes=2)
"""How long filler keeps away after a stranger was refused for it."""


def check_stranger(work: Work, workload: Workload, starts_at: datetime) -> None:
    """Raises SealedNode while a sealed replica stands, or will still stand at `starts_at`, where
    this workload of somebody else would run."""
    claims = _claims_in_the_way(work.tx, workload)
    staying = [c for c in claims if c is None or c.free_by is None or c.free_by > starts_at]
    if staying:
        raise _refusal(staying, work.now)


def is_in_the_way(tx: Connection, workload: Workload) -> bool:
    """A sealed replica stands where this workload of somebody else would be placed now."""
    return bool(_claims_in_the_way(tx, workload))


def check_sealed(work: Work, replica: Workload, *, is_filler: bool) -> None:
    """Raises StrangersPresent while others' workloads stand on the one node of the pool, from
    their admission to the end of their scrub; for filler, also while others wait for it."""
    tx, pool_id, owner = work.tx, replica.pool_id, replica.organisation_id
    if store.has_strangers(tx, pool_id, owner):
        raise StrangersPresent(reason=StrangersPresent.code)
    if is_filler and (
        store.has_waiting_strangers(tx, pool_id, owner)
        or market.was_unmet(tx, pool_id, SealedNode.code, since=work.now - KEPT_FREE)
    ):
        raise StrangersPresent(
            "Others wait for the node on which a sealed model would be served as filler.",
            reason=StrangersPresent.code,
        )


def make_room(work: Work, pool_id: str) -> None:
    """Others ask for the node: sealed filler that stands there alone with it gets its notice."""
    for replica in store.list_sealed(work.tx, pool_id):
        if replica.rank == Rank.FILLER and replica.claim_id is not None:
            try:
                life.give_notice(work, replica, Reason.SPOT_INTERRUPTION)
            except allocation.NoticeRecentlyWithdrawn:
                continue


def _claims_in_the_way(tx: Connection, workload: Workload) -> list[Claim | None]:
    """Of each sealed replica that a stranger would stand beside its claim; None: it has none any
    more, and its devices await their scrub."""
    if workload.kind == "replica" or workload.party == "first_party":
        return []
    found = store.list_sealed(tx, workload.pool_id)
    contracts = market.get_contracts(tx, [replica.contract_id for replica in found])
    return [
        None if replica.claim_id is None else allocation.get_claim(tx, replica.claim_id)
        for replica in found
        if replica.organisation_id != workload.organisation_id
        and not contracts[replica.contract_id].whole_node
    ]


def _refusal(claims: Iterable[Claim | None], now: datetime) -> SealedNode:
    ends = [_free_at(claim, now) for claim in claims]
    known = [at for at in ends if at is not None]
    if len(known) < len(ends):
        return SealedNode(reason=SealedNode.code, earliest_at=None, offer_to_wait=True)
    earliest_at = (max(known) + SLACK).isoformat()
    return SealedNode(
        "A sealed model is served on the only node there. It makes room: ask again at "
        f"{earliest_at}, or send `wait` to be served then.",
        reason=SealedNode.code,
        earliest_at=earliest_at,
        offer_to_wait=True,
    )


def _free_at(claim: Claim | None, now: datetime) -> datetime | None:
    """When its node can be had. Filler leaves for this demand; what stands firm, when it ends."""
    if claim is None:
        return now
    if claim.free_by is not None or claim.rank != Rank.FILLER:
        return claim.free_by
    return allocation.lock_free_by(claim, now)
