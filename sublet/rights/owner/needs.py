"""Notices for first-party work that found no free device.

One plan for all that waits: by each promised instant so many devices, in the order of the promises.
Whoever has to leave for it is told, spot and filler only: spot at the last responsible moment, for
it has been sold; filler, which has not, at once. What was sold firmer leaves by an accepted recall,
and until then the need has its Shortfall. A notice that turns out not to be needed is taken back if
the book still has room for its workload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from sqlalchemy import Connection

from sublet.base.store import Work
from sublet.capacity import allocation, fleet
from sublet.capacity.allocation import WITHDRAWN_REST, Claim, PoolBook, Rank, Urgency
from sublet.rights.owner import store
from sublet.rights.owner.model import LIVE, RowState
from sublet.rights.owner.planning import NEVER, is_quick

OWNER_RECALL = "owner_recall"
RECALL_PREFIX = "rec_"

Demand = tuple[datetime, int]
"""By that instant so many devices in all."""


def is_pending(tx: Connection, pool_id: str) -> bool:
    """Whether `ask` may have something to do: somebody waits, or was told for somebody."""
    claims = allocation.list_active_claims(tx, pool_id)
    return any(_may_wait(claim) or _is_told(claim) for claim in claims)


def ask(work: Work, pool_id: str) -> datetime | None:
    """Give the notices that are due for waiting need, withdraw those that are not needed.

    Returns when the next notice is due, or None.
    """
    pledged = pledged_by_recalls(work.tx)
    waiting = _waiting(work, pool_id)
    promise = timedelta(seconds=fleet.get_pool(work.tx, pool_id).return_promise_seconds)
    demands = _demands(waiting, promise, work.now)
    next_at: datetime | None = None
    for demand in demands:
        later = _tell(work, _bare(work, pool_id, waiting), demand, pledged)
        if later is not None:
            next_at = later if next_at is None else min(next_at, later)
    _withdraw_spare(work, pool_id, waiting, demands, pledged)
    return next_at


def _may_wait(claim: Claim) -> bool:
    """First-party need that stands on its own; a recall's claim has its own schedule."""
    is_need = claim.urgency in (Urgency.COMMITTED, Urgency.URGENT)
    return is_need and claim.parent_claim_id is None and not claim.holder.startswith(RECALL_PREFIX)


def _is_told(claim: Claim) -> bool:
    return claim.is_sale and claim.noticed_at is not None and claim.notice_reason == OWNER_RECALL


def _waiting(work: Work, pool_id: str) -> list[Claim]:
    placed = {row.claim_id for row in allocation.list_placements(work.tx, pool_id)}
    return [
        claim
        for claim in allocation.list_active_claims(work.tx, pool_id)
        if _may_wait(claim) and claim.starts_at <= work.now and claim.id not in placed
    ]


def pledged_by_recalls(tx: Connection) -> dict[str, datetime]:
    """Whom accepted recalls end, with the date: they free devices for those, and only once."""
    return {
        victim.claim_id: row.free_by
        for recall in store.list_recalls(tx, limit=1000, live_only=True)
        if recall.state in LIVE
        for row in recall.rows
        if row.claim_id is not None and row.state is RowState.WAITING
        for victim in row.victims
    }


def _demands(waiting: Sequence[Claim], promise: timedelta, now: datetime) -> list[Demand]:
    """Promises of one second are one demand; what is overdue is wanted now."""
    sizes: dict[datetime, int] = {}
    for claim in waiting:
        by = max((claim.starts_at + promise).replace(microsecond=0), now)
        sizes[by] = sizes.get(by, 0) + claim.size
    total = 0
    found = []
    for by in sorted(sizes):
        total += sizes[by]
        found.append((by, total))
    return found


def _bare(work: Work, pool_id: str, waiting: Sequence[Claim]) -> PoolBook:
    """The book as if nobody waited: what is to be found for those who do."""
    book = allocation.get_book(work, pool_id)
    for claim in waiting:
        book = book.without(claim.id)
    return book


def _tell(
    work: Work, bare: PoolBook, demand: Demand, pledged: Mapping[str, datetime]
) -> datetime | None:
    by, devices = demand
    plan = allocation.plan(bare, devices, by, now=work.now, pledged=pledged)
    rows = list(plan.rows)
    if plan.shortfall is not None:
        # Late is better than not at all, as long as it is spot that leaves.
        rows += [row for row in plan.shortfall.rows if is_quick(bare, row)]
    next_at: datetime | None = None
    for row in rows:
        for victim in row.victims:
            claim = allocation.get_claim(work.tx, victim.claim_id)
            tell_at = _tell_at(claim, victim)
            if tell_at > work.now:
                next_at = tell_at if next_at is None else min(next_at, tell_at)
                continue
            term_at = allocation.earliest_term_at(claim, work.now)
            if claim.rank is not Rank.FILLER:
                term_at = max(victim.term_at, term_at)
            allocation.give_notice(work, claim.id, reason=OWNER_RECALL, term_at=term_at)
    return next_at


def _tell_at(claim: Claim, victim: allocation.Victim) -> datetime:
    """When to tell it: the plan's moment; filler as soon as it may be told."""
    if claim.rank is not Rank.FILLER:
        return victim.notice_at
    if claim.withdrawn_at is None:
        return claim.starts_at
    return max(claim.starts_at, claim.withdrawn_at + WITHDRAWN_REST)


def _withdraw_spare(
    work: Work,
    pool_id: str,
    waiting: Sequence[Claim],
    demands: Sequence[Demand],
    pledged: Mapping[str, datetime],
) -> None:
    """Take back what no demand needs, the latest to leave first."""
    bare = _bare(work, pool_id, waiting)
    told = [
        claim
        for claim in bare.claims
        if _is_told(claim)
        and claim.id not in pledged
        and claim.term_at is not None
        and claim.term_at > work.now
    ]
    for claim in sorted(told, key=lambda c: (c.term_at, c.id), reverse=True):
        untold = replace(claim, noticed_at=None, notice_reason=None, term_at=None, free_by=None)
        kept = bare.with_claim(untold)
        if not _suffices(kept, bare, demands, work.now) or not _has_room(work, claim):
            continue
        allocation.withdraw_notice(work, claim.id)
        bare = kept


def _suffices(kept: PoolBook, bare: PoolBook, demands: Sequence[Demand], now: datetime) -> bool:
    """Whether every demand is met as well with this book as with the other."""
    return all(
        _coming(kept, demand, now) >= _coming(bare, demand, now) for demand in reversed(demands)
    )


def _coming(book: PoolBook, demand: Demand, now: datetime) -> int:
    """How much of the demand is met if nobody else is told to leave."""
    by, devices = demand
    nobody = {claim.id: claim.held_until() or now + NEVER for claim in book.claims if claim.is_sale}
    return allocation.plan(book, devices, by, now=now, pledged=nobody).delivered


def _has_room(work: Work, told: Claim) -> bool:
    """Whether its devices are nobody else's from its free-by on: something may have been sold on
    them since."""
    assert told.free_by is not None
    book = allocation.get_book(work, told.pool_id).without(told.id)
    return _coming(book, (told.free_by, told.size), work.now) >= told.size
