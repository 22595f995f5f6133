"""Invariants of the book of capacity: one holder, room for the owner, releases honoured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta

import sqlalchemy as sa

from sublet.audit.registry import Look, invariant
from sublet.base.kernel.interval import micros_since_epoch
from sublet.capacity.allocation.model import Claim, Party, Urgency, earliest_term_at
from sublet.capacity.allocation.store import (
    claims,
    list_active_claims,
    list_pool_ids,
    placements,
    placements_of,
)
from sublet.capacity.fleet.store import get_pool
from sublet.records.metering.model import Use
from sublet.records.metering.store import spans
from sublet.rights.owner.model import ON_TIME, RowState
from sublet.rights.owner.store import list_recalls, list_shortfalls

SLACK = timedelta(seconds=5)
"""How long a loop may take to write down what time has made true."""


@invariant("No device has two holders at any instant, nor two children inside one holder.")
def one_holder(look: Look) -> Iterator[str]:
    query = sa.select(placements).order_by(
        placements.c.device_id, placements.c.level, placements.c.starts_at, placements.c.seq
    )
    last: sa.Row[tuple[object, ...]] | None = None
    for row in look.tx.execute(query):
        same = last is not None and (last.device_id, last.level) == (row.device_id, row.level)
        if same and last is not None and (last.ends_at is None or last.ends_at > row.starts_at):
            yield f"{row.device_id} is held by {last.claim_id} and {row.claim_id}"
        last = row


@invariant("What runs inside a first-party claim runs on that claim's own devices.")
def children_stay_inside(look: Look) -> Iterator[str]:
    held = placements.alias("held")
    inside = (
        sa.select(placements.c.device_id, placements.c.claim_id, claims.c.parent_claim_id)
        .join(claims, claims.c.id == placements.c.claim_id)
        .where(placements.c.level == 1, placements.c.ends_at.is_(None))
    )
    for row in look.tx.execute(inside):
        found = look.tx.execute(
            sa.select(held.c.claim_id).where(
                held.c.device_id == row.device_id, held.c.level == 0, held.c.ends_at.is_(None)
            )
        ).scalar()
        if found != row.parent_claim_id:
            yield f"{row.claim_id} is on {row.device_id} of {found}, not of {row.parent_claim_id}"


@invariant("A released claim holds nothing; a claim holds no more devices than its size.")
def claims_hold_what_they_may(look: Look) -> Iterator[str]:
    held = (
        sa.select(placements.c.claim_id, sa.func.count().label("devices"))
        .where(placements.c.ends_at.is_(None))
        .group_by(placements.c.claim_id)
        .subquery()
    )
    query = sa.select(claims, held.c.devices.label("held_devices")).join(
        held, held.c.claim_id == claims.c.id
    )
    for row in look.tx.execute(query):
        if row.released_at is not None:
            yield f"{row.id} was released and holds {row.devices} devices"
        elif row.held_devices != row.devices * row.count:
            yield f"{row.id} is for {row.devices * row.count} devices and holds {row.held_devices}"


@invariant("Nobody is told to end before the release allows: notice and firm time are kept.")
def releases_are_honoured(look: Look) -> Iterator[str]:
    for pool_id in list_pool_ids(look.tx):
        for claim in list_active_claims(look.tx, pool_id):
            if claim.noticed_at is None or claim.party is not Party.SALE:
                continue
            assert claim.term_at is not None
            if claim.term_at < _allowed(claim):
                yield f"{claim.id}: SIGTERM at {claim.term_at}, allowed from {_allowed(claim)}"


def _allowed(claim: Claim) -> datetime:
    """The earliest SIGTERM that its release allowed when it was told."""
    assert claim.noticed_at is not None
    untold = replace(claim, noticed_at=None, notice_reason=None, term_at=None, free_by=None)
    return earliest_term_at(untold, claim.noticed_at)


@invariant("A fixed end is SIGTERM plus what the stop takes, and nothing less.")
def free_by_covers_the_stop(look: Look) -> Iterator[str]:
    query = sa.select(claims).where(claims.c.term_at.is_not(None))
    for row in look.tx.execute(query):
        if row.free_by != row.term_at + timedelta(seconds=row.stop_seconds):
            yield f"{row.id}: SIGTERM {row.term_at}, stop {row.stop_seconds} s, free {row.free_by}"


@invariant("The owner's need is met within the pool's promise, or a Shortfall is recorded for it.")
def need_is_met_or_recorded(look: Look) -> Iterator[str]:
    recorded = {s.claim_id for s in list_shortfalls(look.tx, limit=100_000)}
    for pool_id in list_pool_ids(look.tx):
        promise = timedelta(seconds=get_pool(look.tx, pool_id).return_promise_seconds)
        for claim in list_active_claims(look.tx, pool_id):
            is_need = claim.urgency in (Urgency.COMMITTED, Urgency.URGENT)
            is_recall = claim.holder.startswith("rec_")
            overdue = look.now > claim.starts_at + promise + SLACK
            if not is_need or is_recall or not overdue or claim.id in recorded:
                continue
            if not placements_of(look.tx, claim.id):
                yield f"{claim.id} of {claim.holder} waits since {claim.starts_at}"


@invariant("A row of an accepted recall is handed over by its date, or the recall is marked late.")
def recalls_are_on_time_or_late(look: Look) -> Iterator[str]:
    for recall in list_recalls(look.tx, limit=100_000):
        for row in recall.rows:
            if row.claim_id is None or recall.is_late:
                continue
            came = row.delivered_at
            overdue = row.state is RowState.WAITING and look.now > row.free_by + SLACK
            if overdue or (came is not None and came > row.free_by + ON_TIME):
                yield f"{recall.id} row {row.number}: due {row.free_by}, came {came}, not marked"


@invariant("A device's time is idle exactly while nobody holds it.")
def uses_match_holders(look: Look) -> Iterator[str]:
    held: dict[str, str] = {
        row.device_id: row.claim_id
        for row in look.tx.execute(
            sa.select(placements).where(placements.c.level == 0, placements.c.ends_at.is_(None))
        )
    }
    query = sa.select(spans.c.device_id, spans.c.use).where(spans.c.ends_at.is_(None))
    for row in look.tx.execute(query):
        is_free = row.use in (Use.IDLE, Use.DOWN)
        if row.device_id in held and row.use == Use.IDLE:
            yield f"{row.device_id} counts as idle and is held by {held[row.device_id]}"
        if row.device_id not in held and not is_free and row.use != Use.OVERHEAD:
            yield f"{row.device_id} counts as {row.use} and nobody holds it"


@invariant("A device's placements never run backwards.")
def placements_run_forward(look: Look) -> Iterator[str]:
    counts: dict[str, int] = defaultdict(int)
    for row in look.tx.execute(sa.select(placements)):
        if row.ends_at is not None and micros_since_epoch(row.ends_at) < micros_since_epoch(
            row.starts_at
        ):
            counts[row.device_id] += 1
    for device_id, count in counts.items():
        yield f"{device_id}: {count} placements end before they begin"
