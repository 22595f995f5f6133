"""From the book's plan to a recall's rows, and whether a row can still be kept. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from fractions import Fraction

from sublet.base.kernel.interval import millis_between
from sublet.base.kernel.money import round_half_even
from sublet.base.kernel.price import DEVICE_HOUR_MS
from sublet.capacity import allocation
from sublet.capacity.allocation import Plan, PoolBook, Rank
from sublet.rights.owner.model import Recall, RecallRow, Victim

NEVER = timedelta(days=3650)
LEAD_SLACK = timedelta(seconds=1)
"""A plan is computed to the microsecond; a lead that grew by more than this is another plan."""


def make_plan(
    book: PoolBook,
    wanted: int,
    *,
    by: datetime | None,
    until: datetime | None,
    now: datetime,
    pledged: Mapping[str, datetime],
    whole_node: bool = False,
) -> tuple[tuple[RecallRow, ...], Plan]:
    """The rows of a recall and the plan they come from; what is not in rows is its shortfall.

    `pledged`: whom accepted recalls end already, and by when. Without a date the rows are all that idle devices and spot's notices give, each as soon as
    its notice allows; firmer sales stand in the shortfall, with their dates.
    """
    plan = allocation.plan(
        book, wanted, by or now, now=now, until=until, whole_node=whole_node, pledged=pledged
    )
    found = list(plan.rows)
    if by is None and plan.shortfall is not None:
        found += [row for row in plan.shortfall.rows if is_quick(book, row)]
    rows = tuple(
        RecallRow(
            number=number,
            devices=row.devices,
            free_by=row.free_by,
            victims=tuple(_victim(victim) for victim in row.victims),
        )
        for number, row in enumerate(found, start=1)
    )
    return rows, plan


def is_quick(book: PoolBook, row: allocation.Row) -> bool:
    """Whether only spot and filler leave for it: what nobody has to ask the owner twice about."""
    claims = [book.find(victim.claim_id) for victim in row.victims]
    return bool(claims) and all(claim is not None and claim.rank <= Rank.SPOT for claim in claims)


def _victim(victim: allocation.Victim) -> Victim:
    return Victim(
        claim_id=victim.claim_id,
        workload_id=victim.holder,
        organisation_id=victim.organisation_id,
        devices=victim.devices,
        notice_at=victim.notice_at,
        term_at=victim.term_at,
        lost_revenue_micros=victim.lost_revenue_micros,
        credit_micros=victim.credit_micros,
    )


def shortfall_of(plan: Plan, rows: Sequence[RecallRow], wanted: int) -> tuple[int, datetime | None]:
    """Devices that the rows do not give, and when the first of those can be had."""
    missing = wanted - sum(row.devices for row in rows)
    if missing <= 0 or plan.shortfall is None:
        return max(missing, 0), None
    given = {victim.claim_id for row in rows for victim in row.victims}
    later = [
        row.free_by
        for row in plan.shortfall.rows
        if not row.victims or any(victim.claim_id not in given for victim in row.victims)
    ]
    return missing, min(later, default=None)


def buy_back_micros(book: PoolBook, plan: Plan, now: datetime) -> int | None:
    """What the holders in the way would be paid at their own price for the time they give up."""
    if plan.shortfall is None or not plan.shortfall.buy_back:
        return None
    total = 0
    for item in plan.shortfall.buy_back:
        claim = book.find(item.claim_id)
        assert claim is not None
        quantity = item.devices * millis_between(now, item.free_by)
        total += round_half_even(
            Fraction(quantity * claim.value_micros_per_device_hour, DEVICE_HOUR_MS)
        )
    return total


def kept(
    book: PoolBook,
    recall: Recall,
    rows: Sequence[RecallRow],
    *,
    now: datetime,
    pledged: Mapping[str, datetime],
) -> tuple[RecallRow, ...] | None:
    """The rows as they stand if they are accepted now, or None if one no longer holds.

    A row whose notice goes out at once counts from acceptance when no date was asked for: its
    instants move with it, and its lead stays what the plan said. With a date they do not move.
    """
    found = []
    for row in rows:
        if not row.victims:
            found.append(replace(row, free_by=max(row.free_by, now)))
            continue
        moved = _moved(book, recall, row, now=now)
        if moved is None:
            return None
        found.append(moved)
    return tuple(found) if delivers(book, found, now=now, pledged=pledged) else None


def delivers(
    book: PoolBook,
    rows: Sequence[RecallRow],
    *,
    now: datetime,
    pledged: Mapping[str, datetime],
) -> bool:
    """Whether the rows together bring what they say by their dates, if only their own victims and
    those of recalls accepted before leave."""
    stays = {c.id: c.held_until() or now + NEVER for c in book.claims if c.is_sale}
    leaves = {victim.claim_id: row.free_by for row in rows for victim in row.victims}
    known = {**stays, **pledged, **leaves}
    devices = 0
    for row in sorted(rows, key=lambda row: row.free_by):
        devices += row.devices
        if allocation.plan(book, devices, row.free_by, now=now, pledged=known).delivered < devices:
            return False
    return True


def _moved(book: PoolBook, recall: Recall, row: RecallRow, *, now: datetime) -> RecallRow | None:
    victims = []
    free_by = row.free_by
    for victim in row.victims:
        claim = book.find(victim.claim_id)
        if claim is None or claim.is_fixed or claim.size != victim.devices:
            return None
        notice_at = max(victim.notice_at, now)
        term_at = max(victim.term_at, allocation.earliest_term_at(claim, notice_at))
        free_by = max(free_by, term_at + timedelta(seconds=claim.release.stop_seconds))
        victims.append(replace(victim, notice_at=notice_at, term_at=term_at))
    if recall.by is not None and free_by > row.free_by:
        return None
    if free_by - now > row.free_by - recall.planned_at + LEAD_SLACK:
        return None
    return replace(row, free_by=free_by, victims=tuple(victims))
