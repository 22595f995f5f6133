"""What the owner may do: plan a recall, accept, cancel or return it, and use devices first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from datetime import datetime, timedelta

from sqlalchemy import Connection

from sublet.base.kernel.errors import Invalid
from sublet.base.store import Work
from sublet.capacity import allocation, fleet
from sublet.capacity.allocation import Claim, Party, Rank, Release, Urgency
from sublet.records import metering
from sublet.records.metering import Use
from sublet.records.tenancy import Identity
from sublet.rights.owner import needs, planning, store
from sublet.rights.owner.model import (
    LIVE,
    NEXT,
    ON_TIME,
    PLAN_VALID,
    PlanExpired,
    PlanStale,
    Recall,
    RecallChanged,
    RecallRow,
    RecallState,
    RecallStateWrong,
    RowState,
    Shortfall,
)

get_recall = store.get_recall
list_recalls = store.list_recalls
list_shortfalls = store.list_shortfalls

OWNER_RECALL = "owner_recall"


def plan_recall(
    work: Work,
    identity: Identity,
    *,
    pool_id: str,
    devices: int,
    count: int,
    by: datetime | None,
    until: datetime | None,
) -> Recall:
    """A plan, valid for 60 seconds; nothing happens until it is accepted.

    `devices` × `count` in addition to what first-party holds. Errors: PoolNotFound, Invalid.
    """
    size = len(fleet.list_devices(work.tx, fleet.get_pool(work.tx, pool_id).id))
    if (
        devices > 1
        and not _is_whole_node(work.tx, pool_id, devices)
        and _has_nodes(work.tx, pool_id)
    ):
        raise Invalid(
            "devices: over several nodes a recall is for single devices or whole nodes; "
            f"send 1 or {_largest_node(work.tx, pool_id)}.",
            param="devices",
        )
    if not 1 <= devices * count <= size:
        raise Invalid(f"count: the pool has {size} devices; ask for 1 to {size}.", param="count")
    if by is not None and by <= work.now:
        raise Invalid("by: must lie in the future; leave it out for the earliest.", param="by")
    if until is not None and until <= (by or work.now):
        raise Invalid("until: must lie after `by`; leave it out: until given back.", param="until")
    return _plan(work, identity.organisation.id, pool_id, devices, count, by, until)


def _has_nodes(tx: Connection, pool_id: str) -> bool:
    return len(fleet.list_nodes(tx, pool_id)) > 1


def _largest_node(tx: Connection, pool_id: str) -> int:
    return max(Counter(device.node_id for device in fleet.list_devices(tx, pool_id)).values())


def _is_whole_node(tx: Connection, pool_id: str, devices: int) -> bool:
    """Whether so many devices are all of a node, in a pool where that is not everything."""
    return devices > 1 and _has_nodes(tx, pool_id) and devices == _largest_node(tx, pool_id)


def plan_again(work: Work, recall_id: str) -> Recall:
    """The plan for the same wish as of now: what a stale plan is answered with."""
    old = store.get_recall(work.tx, recall_id)
    by = old.by if old.by is not None and old.by > work.now else None
    return _plan(work, old.organisation_id, old.pool_id, old.devices, old.count, by, old.until)


def _plan(
    work: Work,
    organisation_id: str,
    pool_id: str,
    devices: int,
    count: int,
    by: datetime | None,
    until: datetime | None,
) -> Recall:
    book = allocation.get_book(work, pool_id)
    wanted = devices * count
    rows, plan = planning.make_plan(
        book,
        wanted,
        by=by,
        until=until,
        now=work.now,
        pledged=needs.pledged_by_recalls(work.tx),
        whole_node=_is_whole_node(work.tx, pool_id, devices),
    )
    missing, earliest_at = planning.shortfall_of(plan, rows, wanted)
    return store.insert_recall(
        work,
        Recall(
            id=work.ids.new("rec"),
            seq=0,
            organisation_id=organisation_id,
            pool_id=pool_id,
            devices=devices,
            count=count,
            by=by,
            until=until,
            state=RecallState.PLANNED,
            is_late=False,
            planned_at=work.now,
            expires_at=work.now + PLAN_VALID,
            accepted_at=None,
            delivered_at=None,
            ended_at=None,
            rows=rows,
            shortfall_devices=missing,
            shortfall_earliest_at=earliest_at,
            buy_back_micros=planning.buy_back_micros(book, plan, work.now),
            gap_micros=0 if plan.is_exact else max(plan.cost_micros - plan.bound_micros, 0),
            version=1,
        ),
    )


def accept_recall(work: Work, recall_id: str, rows: Collection[int] | None = None) -> Recall:
    """Carry out the plan, or the rows of it that are named.

    From here its devices are the owner's from each row's free-by until they are given back.
    Errors: PlanExpired, PlanStale (ask `plan_again`), RecallStateWrong, Invalid.
    """
    recall = store.get_recall(work.tx, recall_id)
    if recall.state is not RecallState.PLANNED:
        raise RecallStateWrong(f"The recall is {recall.state} already.", state=str(recall.state))
    if work.now >= recall.expires_at:
        raise PlanExpired
    numbers = {row.number for row in recall.rows} if rows is None else set(rows)
    unknown = numbers - {row.number for row in recall.rows}
    if unknown or not numbers:
        raise Invalid(
            f"rows: the plan has rows 1 to {len(recall.rows)}, not {sorted(unknown)}."
            if recall.rows
            else "rows: the plan has none, only a shortfall: nothing can be accepted.",
            param="rows",
        )
    book = allocation.get_book(work, recall.pool_id)
    chosen = [row for row in recall.rows if row.number in numbers]
    pledged = needs.pledged_by_recalls(work.tx)
    kept = planning.kept(book, recall, chosen, now=work.now, pledged=pledged)
    if kept is None:
        raise PlanStale
    for row in kept:
        claim = allocation.file_first_party(work, _row_claim(work, recall, row))
        store.change_row(
            work,
            recall_id,
            row.number,
            claim_id=claim.id,
            free_by=row.free_by,
            victims=store.victims_json(row.victims),
        )
    for row in recall.rows:
        if row.number not in numbers:
            store.change_row(work, recall_id, row.number, state=RowState.WITHDRAWN)
    move(work, recall, RecallState.ACCEPTED, accepted_at=work.now)
    if recall.shortfall_devices:
        store.insert_shortfall(
            work,
            Shortfall(
                id=work.ids.new("sho"),
                seq=0,
                organisation_id=recall.organisation_id,
                pool_id=recall.pool_id,
                devices=recall.shortfall_devices,
                recall_id=recall.id,
                claim_id=None,
                needed_at=recall.by or work.now,
                earliest_at=recall.shortfall_earliest_at,
                recorded_at=work.now,
                ended_at=None,
            ),
        )
    return progress(work, store.get_recall(work.tx, recall_id))


def _row_claim(work: Work, recall: Recall, row: RecallRow, *, is_early: bool = False) -> Claim:
    shape = recall.devices if row.devices % recall.devices == 0 else 1
    starts_at = work.now if is_early else max(row.free_by, work.now)
    ends_at = recall.until if recall.until is not None and recall.until > starts_at else None
    return Claim(
        id=work.ids.new("clm"),
        holder=recall.id,
        organisation_id=recall.organisation_id,
        pool_id=recall.pool_id,
        party=Party.FIRST_PARTY,
        urgency=Urgency.COMMITTED,
        rank=Rank.LEASE,
        devices=shape,
        count=row.devices // shape,
        whole_node=_is_whole_node(work.tx, recall.pool_id, shape),
        starts_at=starts_at,
        release=Release(ends_at=ends_at, notice_seconds=0),
    )


def progress(work: Work, recall: Recall) -> Recall:
    """Give the notices that are due, hand over what is free, move the state along."""
    for row in recall.rows:
        is_due = row.state is RowState.WAITING and row.claim_id is not None
        if is_due and not _delivered(work, recall, row):
            _notify(work, row)
    recall = store.get_recall(work.tx, recall.id)
    return _settled(work, recall)


def _delivered(work: Work, recall: Recall, row: RecallRow) -> bool:
    """Hand the row over if its devices are free, before its date too."""
    assert row.claim_id is not None
    claim = allocation.get_claim(work.tx, row.claim_id)
    if claim.starts_at > work.now:
        if allocation.list_children(work.tx, claim.id):
            return False  # Work waits inside it already, and with it for its date.
        book = allocation.get_book(work, recall.pool_id).without(claim.id)
        if allocation.plan(book, row.devices, work.now, now=work.now).delivered < row.devices:
            return False
        allocation.release(work, claim.id)
        claim = allocation.file_first_party(work, _row_claim(work, recall, row, is_early=True))
        store.change_row(work, recall.id, row.number, claim_id=claim.id)
    device_ids = allocation.place(work, claim.id)
    if device_ids is None:
        return False
    for device_id in device_ids:
        metering.switch_device(work, device_id, Use.FIRST_PARTY, work.now, recall.id)
    store.change_row(
        work,
        recall.id,
        row.number,
        state=RowState.DELIVERED,
        delivered_at=work.now,
        device_ids=list(device_ids),
    )
    needs.ask(work, recall.pool_id)
    return True


def _notify(work: Work, row: RecallRow) -> None:
    for victim in row.victims:
        if victim.notice_at > work.now:
            continue
        claim = allocation.get_claim(work.tx, victim.claim_id)
        if claim.released_at is not None or claim.noticed_at is not None:
            continue
        term_at = max(victim.term_at, allocation.earliest_term_at(claim, work.now))
        try:
            allocation.give_notice(work, claim.id, reason=OWNER_RECALL, term_at=term_at)
        except allocation.NoticeRecentlyWithdrawn:
            continue  # Told again in less than ten minutes it is not; the row comes late, and says so.


def _settled(work: Work, recall: Recall) -> Recall:
    """The state that its rows have brought it to."""
    rows = [row for row in recall.rows if row.claim_id is not None]
    waiting = [row for row in rows if row.state is RowState.WAITING]
    is_late = recall.is_late or any(
        (row.delivered_at or work.now) > row.free_by + ON_TIME for row in rows
    )
    if is_late and not recall.is_late:
        store.change_recall(work, recall.id, is_late=True)
        work.emit(RecallChanged(recall.id, recall.state, True))
        recall = replace(recall, is_late=True)
    state = recall.state
    if state is RecallState.DELIVERED:
        return store.get_recall(work.tx, recall.id)
    if not waiting:
        move(work, recall, RecallState.DELIVERED, delivered_at=work.now)
        return store.get_recall(work.tx, recall.id)
    noticed = [v for row in rows for v in row.victims if v.notice_at <= work.now]
    if any(v.term_at <= work.now for v in noticed):
        state = RecallState.DRAINING
    elif noticed and state is RecallState.ACCEPTED:
        state = RecallState.NOTICING
    if state is not recall.state:
        move(work, recall, state)
    return store.get_recall(work.tx, recall.id)


def cancel_recall(work: Work, recall_id: str) -> Recall:
    """Call it off: notices not used up are withdrawn, what was freed goes back to sale.

    Errors: RecallStateWrong once it is delivered (then `return_recall`) or over.
    """
    recall = store.get_recall(work.tx, recall_id)
    if RecallState.CANCELLED not in NEXT[recall.state]:
        raise RecallStateWrong(
            f"The recall is {recall.state}: "
            + ("give it back instead." if recall.state is RecallState.DELIVERED else "it is over."),
            state=str(recall.state),
        )
    _let_go(work, recall, RowState.WITHDRAWN)
    move(work, recall, RecallState.CANCELLED, ended_at=work.now)
    # Its notices are taken back now, but for those that somebody else has come to rely on.
    needs.ask(work, recall.pool_id)
    return store.get_recall(work.tx, recall_id)


def return_recall(work: Work, recall_id: str) -> Recall:
    """Give the devices back to sale. First-party work that runs on them goes on, on its own claim.

    Errors: RecallStateWrong unless it is delivered.
    """
    recall = store.get_recall(work.tx, recall_id)
    if recall.state is not RecallState.DELIVERED:
        raise RecallStateWrong(
            f"The recall is {recall.state}, and only a delivered one is given back: "
            "cancel it, or wait.",
            state=str(recall.state),
        )
    _let_go(work, recall, RowState.RETURNED)
    move(work, recall, RecallState.RETURNED, ended_at=work.now)
    return store.get_recall(work.tx, recall_id)


def _let_go(work: Work, recall: Recall, row_state: RowState) -> None:
    for row in recall.rows:
        if row.claim_id is None or row.state not in (RowState.WAITING, RowState.DELIVERED):
            continue
        kept = allocation.release_around(work, row.claim_id)
        for device_id in row.device_ids:
            if device_id not in kept:
                use = fleet.resting_use(work.tx, device_id)
                metering.switch_device(work, device_id, use, work.now)
        store.change_row(work, recall.id, row.number, state=row_state)
    store.end_shortfalls(work, recall_id=recall.id)


def expire(work: Work, recall_id: str) -> None:
    """A plan that nobody accepted in its minute."""
    recall = store.get_recall(work.tx, recall_id)
    if recall.state is RecallState.PLANNED and work.now >= recall.expires_at:
        move(work, recall, RecallState.EXPIRED, ended_at=work.now)


def move(work: Work, recall: Recall, state: RecallState, **values: object) -> None:
    """Along the table, and told."""
    assert state in NEXT[recall.state], f"{recall.state} does not become {state}"
    store.change_recall(work, recall.id, state=state, **values)
    work.emit(RecallChanged(recall.id, state, recall.is_late))


def first_party_claim(
    work: Work,
    *,
    pool_id: str,
    organisation_id: str,
    devices: int,
    count: int,
    urgency: Urgency,
    holder: str,
) -> Claim:
    """A claim for the owner's own work: never refused.

    It is drawn from what an accepted recall has brought or will bring, where there is room;
    else it stands on its own, takes a free device, and where none is free its need brings notices
    (committed and urgent only). What cannot be had within the pool's promise is a Shortfall.
    """
    parent = _room_in_recalls(work, pool_id, devices, count)
    claim = allocation.file_first_party(
        work,
        Claim(
            id=work.ids.new("clm"),
            holder=holder,
            organisation_id=organisation_id,
            pool_id=pool_id,
            party=Party.FIRST_PARTY,
            urgency=urgency,
            rank=Rank.LEASE,
            devices=devices,
            count=count,
            starts_at=work.now,
            release=Release(
                notice_seconds=0, stop_seconds=fleet.get_pool(work.tx, pool_id).scrub_seconds
            ),
            parent_claim_id=parent,
        ),
    )
    if parent is None and urgency is not Urgency.PATIENT:
        _note_shortfall(work, claim)
        needs.ask(work, pool_id)
    return claim


def _room_in_recalls(work: Work, pool_id: str, devices: int, count: int) -> str | None:
    """A recall's claim with room for such units: one that is delivered; else, if no device is
    free, one that will be within the pool's promise."""
    soon = work.now + promise_of(work.tx, pool_id)
    found: list[tuple[datetime, str]] = []
    for recall in store.list_recalls(work.tx, limit=1000, live_only=True):
        for row in recall.rows:
            if recall.pool_id != pool_id or row.claim_id is None:
                continue
            claim = allocation.get_claim(work.tx, row.claim_id)
            used = sum(child.size for child in allocation.list_children(work.tx, row.claim_id))
            if claim.devices % devices or row.devices - used < devices * count:
                continue
            if row.state is RowState.DELIVERED:
                return row.claim_id
            if row.state is RowState.WAITING and row.free_by <= soon:
                found.append((row.free_by, row.claim_id))
    book = allocation.get_book(work, pool_id)
    size = devices * count
    is_free = allocation.plan(book, size, work.now, now=work.now).delivered >= size
    return None if is_free or not found else min(found)[1]


def _note_shortfall(work: Work, claim: Claim) -> None:
    """Say at once what the plan cannot bring within the promise."""
    needed_at = work.now + promise_of(work.tx, claim.pool_id)
    book = allocation.get_book(work, claim.pool_id).without(claim.id)
    plan = allocation.plan(book, claim.size, needed_at, now=work.now)
    if plan.shortfall is not None:
        _record(work, claim, plan.shortfall.devices, needed_at, plan.shortfall.earliest_at)


def _record(
    work: Work, claim: Claim, devices: int, needed_at: datetime, earliest_at: datetime | None
) -> None:
    store.insert_shortfall(
        work,
        Shortfall(
            id=work.ids.new("sho"),
            seq=0,
            organisation_id=claim.organisation_id,
            pool_id=claim.pool_id,
            devices=devices,
            recall_id=None,
            claim_id=claim.id,
            needed_at=needed_at,
            earliest_at=earliest_at,
            recorded_at=work.now,
            ended_at=None,
        ),
    )


def promise_of(tx: Connection, pool_id: str) -> timedelta:
    return timedelta(seconds=fleet.get_pool(tx, pool_id).return_promise_seconds)


def unmet_needs(tx: Connection) -> list[tuple[str, datetime]]:
    """First-party claims without devices and without a Shortfall, and when the promise ends."""
    recorded = {item.claim_id for item in store.list_shortfalls(tx, limit=10_000, open_only=True)}
    found = []
    for pool in fleet.list_pools(tx):
        for claim in allocation.list_active_claims(tx, pool.id):
            is_need = claim.urgency in (Urgency.COMMITTED, Urgency.URGENT)
            if not is_need or claim.holder.startswith("rec_") or claim.id in recorded:
                continue
            if not allocation.placements_of(tx, claim.id):
                found.append((claim.id, claim.starts_at + promise_of(tx, pool.id)))
    return found


def note_overdue(work: Work, claim_id: str, promised_at: datetime) -> None:
    """The promise has passed and the devices have not come: that is a Shortfall too."""
    claim = allocation.get_claim(work.tx, claim_id)
    if claim.released_at is None and not allocation.placements_of(work.tx, claim_id):
        _record(work, claim, claim.size, promised_at, None)


def is_live(recall: Recall) -> bool:
    return recall.state in LIVE
