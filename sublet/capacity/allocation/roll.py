"""Locks that roll with the clock, and when they must stop rolling.

Left alone, the lock of a claim without a fixed end moves on with every second. Before it would
reach an instant at which the devices are owed to somebody with a better right, notice is due.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from sublet.capacity.allocation.book import PoolBook
from sublet.capacity.allocation.model import (
    Claim,
    Pinned,
    Urgency,
    lock_free_by,
)
from sublet.capacity.allocation.victims import candidate_of, choose

LOOKAHEAD = timedelta(seconds=1)
"""Notice is given this much before the last moment at most, so that a loop's step is not missed."""
LATE_STEP = timedelta(seconds=30)
"""A loop that comes this late still gives the notices that were due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """Notice to give now; `for_owner`: the owner needs the devices, else a sale of higher rank."""

    pin: Pinned
    for_owner: bool


def due_notices(book: PoolBook, *, now: datetime, except_for: Collection[str] = ()) -> list[Due]:
    """Claims to notice now, so that what starts later finds its devices.

    For every claim that starts later it asks whether locks + committed + urgent need would exceed
    the supply at that start once the clock has moved a little, and picks among those claims whose
    last moment it is. `except_for` names first-party claims whose notices another loop gives.
    """
    found: dict[str, Due] = {}
    later_claims = _later(book, now, except_for)
    for start in sorted({claim.starts_at for claim in later_claims}):
        later = now + LOOKAHEAD
        counted = [c for c in _counted(book) if c.id not in except_for]
        excess = _locked_at(counted, start, later, found) - int(book.supply[0])
        # What is too much already is a shortage, and nobody who did not cause it leaves for it.
        excess -= max(_locked_at(counted, now, now, {}) - int(book.supply[0]), 0)
        if excess <= 0:
            continue
        able = {
            claim.id: claim
            for claim in counted
            if _is_last_moment(claim, start, now) and claim.id not in found
        }
        pool = [
            candidate_of(c, notice_at=now, free_by=lock_free_by(c, now), size=c.size)
            for c in able.values()
        ]
        choice = choose(pool, min(excess, sum(c.size for c in pool)))
        assert choice is not None
        for picked in choice.picked:
            claim = able[picked.claim_id]
            free_by = lock_free_by(claim, now)
            stop = timedelta(seconds=claim.release.stop_seconds)
            found[claim.id] = Due(
                pin=Pinned(
                    claim_id=claim.id, notice_at=now, term_at=free_by - stop, free_by=free_by
                ),
                for_owner=any(not c.is_sale for c in later_claims if c.starts_at == start),
            )
    return sorted(found.values(), key=lambda due: due.pin.claim_id)


def next_look(
    book: PoolBook, *, now: datetime, except_for: Collection[str] = ()
) -> datetime | None:
    """When the next rolling lock could reach the start of something; None if nothing starts later."""
    leads = {
        lock_free_by(claim, now) - now
        for claim in book.claims
        if claim.is_sale and not claim.is_fixed and claim.release.notice_seconds is not None
    }
    moments = [
        claim.starts_at - lead
        for claim in _later(book, now, except_for)
        for lead in leads
        if claim.starts_at - lead > now
    ]
    return min(moments, default=None)


def _later(book: PoolBook, now: datetime, except_for: Collection[str]) -> list[Claim]:
    return [c for c in _counted(book) if c.starts_at > now and c.id not in except_for]


def _counted(book: PoolBook) -> list[Claim]:
    return [
        claim
        for claim in book.claims
        if claim.parent_claim_id is None
        and not (claim.urgency is Urgency.PATIENT and claim.opened_at is None)
    ]


def _locked_at(claims: list[Claim], at: datetime, clock: datetime, leaving: Collection[str]) -> int:
    """All sales to their free-by as of `clock`, and the owner's claims, at one instant."""
    total = 0
    for claim in claims:
        if claim.starts_at > at or claim.id in leaving:
            continue
        end = lock_free_by(claim, clock) if claim.is_sale else claim.held_until()
        if end is None or end > at or (end <= clock and at <= clock):
            total += claim.size
    return total


def _is_last_moment(claim: Claim, start: datetime, now: datetime) -> bool:
    if not claim.is_sale or claim.is_fixed or claim.release.notice_seconds is None:
        return False
    if claim.starts_at > now:
        return False
    if claim.opened_at is None and claim.release.firm_seconds > 0:
        return False
    notice = timedelta(seconds=claim.release.notice_seconds)
    if claim.term_at is not None and claim.term_at - notice <= now:
        # Its pinned end is due to be told: there is no earlier one any more.
        return False
    return (
        lock_free_by(claim, now - LATE_STEP) <= start < lock_free_by(claim, now + LOOKAHEAD)
        or lock_free_by(claim, now) == start
    )


def pinned(claim: Claim, pin: Pinned, *, displaced_by: str | None = None) -> Claim:
    """The claim with its end fixed in the book, its notice still to come."""
    return replace(claim, term_at=pin.term_at, free_by=pin.free_by, displaced_by=displaced_by)
