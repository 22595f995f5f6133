"""The loop of the owner's rights: recalls along their schedule."""

from __future__ import annotations

from datetime import datetime, timedelta

from sublet.base.store import Actor, Store
from sublet.capacity import allocation, fleet
from sublet.rights.owner import needs, service, store
from sublet.rights.owner.model import Recall, RecallState, RowState

ACTOR = Actor.system("owner")
LOOK_AGAIN = timedelta(seconds=30)
DRAINING_LOOK = timedelta(milliseconds=500)
"""While devices are being freed the row is tried this often, besides every release's event."""


def step(books: Store, now: datetime) -> datetime:
    """Expire plans, give due notices, hand over, return; when to look again."""
    with books.read() as tx:
        expired = store.list_unaccepted(tx, now)
        live = store.list_recalls(tx, limit=1000, live_only=True)
        missing = store.list_shortfalls(tx, limit=1000, open_only=True)
    for recall_id in expired:
        with books.work(ACTOR) as work:
            service.expire(work, recall_id)
    for shortfall in missing:
        if shortfall.claim_id is not None:
            _end_if_met(books, shortfall.claim_id)
    due = [now + LOOK_AGAIN, *_overdue(books, now), *_asked(books)]
    for recall in live:
        stepped = _stepped(books, recall) if _has_work(recall, now) else recall
        due += _moments(stepped, now)
    return max(min(due), now)


def _asked(books: Store) -> list[datetime]:
    """Notices for first-party work that waits; when the next ones are due."""
    with books.read() as tx:
        pools = [pool.id for pool in fleet.list_pools(tx) if needs.is_pending(tx, pool.id)]
    moments = []
    for pool_id in pools:
        with books.work(ACTOR) as work:
            next_at = needs.ask(work, pool_id)
        if next_at is not None:
            moments.append(next_at)
    return moments


def _has_work(recall: Recall, now: datetime) -> bool:
    if recall.until is not None and recall.until <= now:
        return True
    return any(row.state is RowState.WAITING and row.claim_id for row in recall.rows)


def _stepped(books: Store, recall: Recall) -> Recall:
    with books.work(ACTOR) as work:
        recall = service.get_recall(work.tx, recall.id)
        if not service.is_live(recall):
            return recall
        recall = service.progress(work, recall)
        if recall.until is not None and recall.until <= work.now:
            if recall.state is RecallState.DELIVERED:
                return service.return_recall(work, recall.id)
            return service.cancel_recall(work, recall.id)
        return recall


def _moments(recall: Recall, now: datetime) -> list[datetime]:
    """When this recall needs a look."""
    found = [] if recall.until is None else [recall.until]
    for row in recall.rows:
        if row.state is not RowState.WAITING or row.claim_id is None:
            continue
        found += [victim.notice_at for victim in row.victims if victim.notice_at > now]
        found += [victim.term_at for victim in row.victims if victim.term_at > now]
        if all(victim.term_at <= now for victim in row.victims):
            found.append(now + DRAINING_LOOK)
        found.append(row.free_by if row.free_by > now else now + DRAINING_LOOK)
    return found


def _overdue(books: Store, now: datetime) -> list[datetime]:
    """Record a Shortfall for need that the promise has passed by; when the next one would be."""
    moments = []
    with books.read() as tx:
        waiting = service.unmet_needs(tx)
    for claim_id, promised_at in waiting:
        if promised_at > now:
            moments.append(promised_at)
            continue
        with books.work(ACTOR) as work:
            service.note_overdue(work, claim_id, promised_at)
    return moments


def _end_if_met(books: Store, claim_id: str) -> None:
    """A first-party claim that has its devices, or is over, lacks nothing any more."""
    with books.read() as tx:
        claim = allocation.get_claim(tx, claim_id)
        is_met = bool(allocation.placements_of(tx, claim_id)) or claim.released_at is not None
    if is_met:
        with books.work(ACTOR) as work:
            store.end_shortfalls(work, claim_id=claim_id)
