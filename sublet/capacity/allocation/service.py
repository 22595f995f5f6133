"""The book of capacity as the packages above call it.

Every change takes the pool's row first, so decisions on one pool are made one at a time and in
every process on the same book: a process keeps the last committed book and brings it up to date by
the claims whose generation is newer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from weakref import WeakKeyDictionary

import numpy as np
from sqlalchemy import Connection, Engine

from sublet.base.store import Work
from sublet.capacity import fleet
from sublet.capacity.allocation import admit as admission
from sublet.capacity.allocation import place as placing
from sublet.capacity.allocation import roll, store
from sublet.capacity.allocation.book import Nodes, PoolBook, head_room_of
from sublet.capacity.allocation.model import (
    WITHDRAWN_REST,
    Admitted,
    Claim,
    ClaimNoticed,
    ClaimReleased,
    NoticeInForce,
    NoticeRecentlyWithdrawn,
    NoticeWithdrawn,
    NotNoticeable,
    ParentInUse,
    Party,
    Rank,
    Refused,
    earliest_term_at,
)
from sublet.capacity.fleet import Device

SPOT_INTERRUPTION = "spot_interruption"
OWNER_RECALL = "owner_recall"
RECALL_PREFIX = "rec_"
"""Claims held by a recall: the owner's loop gives their notices, by its plan."""
NOTICE_SLACK = timedelta(seconds=2)
"""A pinned claim is told this much before its last moment, so that its end need not move."""

_committed: WeakKeyDictionary[Engine, dict[str, PoolBook]] = WeakKeyDictionary()
"""By database and pool, the newest committed book that this process has seen. Books are immutable:
two threads may both bring one up to date, and either result is right."""


def get_book(work: Work | Connection, pool_id: str, *, now: datetime | None = None) -> PoolBook:
    """The pool's book as this transaction sees it. A bare connection must say `now`."""
    if isinstance(work, Work):
        changed: PoolBook | None = work.facts.get(_fact(pool_id))
        return changed if changed is not None else _load(work.tx, pool_id, work.now)
    assert now is not None, "only a Work brings its own time"
    return _load(work, pool_id, now)


def admit(work: Work, claim: Claim) -> Admitted | Refused:
    """Decide a sale and, if it is admitted, write it and pin what it displaces.

    What has to go at once is noticed here; the rest by `step`. The claim's start may be later than
    asked: until then `place` answers None.
    """
    book = _open(work, claim.pool_id)
    decision = admission.admit(book, claim, now=work.now)
    if isinstance(decision, Refused):
        return decision
    displaced = [
        roll.pinned(_held(book, pin.claim_id), pin, displaced_by=claim.id)
        for pin in decision.displaced
    ]
    (kept, *_) = _write(work, [decision.claim], displaced)
    for pin in decision.displaced:
        if pin.notice_at <= work.now + NOTICE_SLACK:
            give_notice(work, pin.claim_id, reason=SPOT_INTERRUPTION, term_at=pin.term_at)
    if kept.starts_at <= work.now and not kept.whole_node:
        place(work, kept.id)
    return replace(decision, claim=kept)


def file_first_party(work: Work, claim: Claim) -> Claim:
    """Enter the owner's own claim: it is never refused, and counts in need at once.

    With `parent_claim_id` it runs on devices of that claim and adds nothing to need beyond it.
    """
    assert claim.party is Party.FIRST_PARTY
    _open(work, claim.pool_id)
    if claim.parent_claim_id is not None:
        parent = store.get_claim(work.tx, claim.parent_claim_id)
        assert parent.party is Party.FIRST_PARTY
        assert parent.pool_id == claim.pool_id
    (kept,) = _write(work, [claim], [])
    return kept


def opened(work: Work, claim_id: str, at: datetime) -> Claim:
    """Its meter opened: firm time and young runs count from `at`. The first call stands.

    Raises NoticeInForce if its end is fixed before its firm time would be over: end the run then.
    """
    claim = _locked(work, claim_id)
    if claim.opened_at is not None:
        return claim
    firm_until = at + timedelta(seconds=claim.release.firm_seconds)
    if claim.term_at is not None and claim.term_at < firm_until:
        raise NoticeInForce
    (kept,) = _write(work, [], [replace(claim, opened_at=at)])
    return kept


def give_notice(work: Work, claim_id: str, *, reason: str, term_at: datetime) -> Claim:
    """Fix the claim's end and tell its holder: SIGTERM at `term_at`, free by then + stop.

    A claim already noticed keeps the notice it has. `term_at` must not lie before its release
    allows. Where an end was pinned before, the later of the two stands.
    """
    claim = _locked(work, claim_id)
    assert claim.released_at is None
    if claim.noticed_at is not None:
        return claim
    if claim.release.notice_seconds is None:
        raise NotNoticeable
    if claim.withdrawn_at is not None and work.now < claim.withdrawn_at + WITHDRAWN_REST:
        raise NoticeRecentlyWithdrawn(
            retry_at=(claim.withdrawn_at + WITHDRAWN_REST).isoformat(),
        )
    earliest = earliest_term_at(claim, work.now)
    if claim.term_at is not None:
        # The loop may be late for a pinned end; the notice promised to the holder comes first.
        term_at = max(term_at, claim.term_at, earliest)
    assert term_at >= earliest, "nobody is ended before its release allows"
    free_by = term_at + timedelta(seconds=claim.release.stop_seconds)
    noticed = replace(
        claim, noticed_at=work.now, notice_reason=reason, term_at=term_at, free_by=free_by
    )
    (kept,) = _write(work, [], [noticed])
    work.emit(
        ClaimNoticed(
            claim_id=kept.id,
            holder=kept.holder,
            pool_id=kept.pool_id,
            reason=reason,
            noticed_at=work.now,
            term_at=term_at,
            free_by=free_by,
        )
    )
    return kept


def withdraw_notice(work: Work, claim_id: str) -> Claim:
    """Take back a notice, or a pinned end; it is not given again for ten minutes.

    Raises NoticeInForce once SIGTERM is due. Without a notice: no effect.
    """
    claim = _locked(work, claim_id)
    if claim.term_at is None:
        return claim
    if claim.term_at <= work.now:
        raise NoticeInForce
    was_told = claim.noticed_at is not None
    (kept,) = _write(
        work,
        [],
        [
            replace(
                claim,
                noticed_at=None,
                notice_reason=None,
                term_at=None,
                free_by=None,
                displaced_by=None,
                withdrawn_at=work.now if was_told else claim.withdrawn_at,
            )
        ],
    )
    if was_told:
        work.emit(NoticeWithdrawn(claim_id=kept.id, holder=kept.holder, pool_id=kept.pool_id))
    return kept


def release(work: Work, claim_id: str) -> None:
    """The claim is over and its devices are clean: they are free from now on.

    What it displaced and does not need to any more stays, if the book has room for it. Released
    already: no effect. Raises ParentInUse while something runs inside it.
    """
    claim = _locked(work, claim_id)
    if claim.released_at is not None:
        return
    if store.list_children(work.tx, claim_id):
        raise ParentInUse
    store.end_placements(work.tx, claim_id, work.now)
    (kept,) = _write(work, [], [replace(claim, released_at=work.now)])
    work.emit(ClaimReleased(claim_id=kept.id, holder=kept.holder, pool_id=kept.pool_id))
    _restore_displaced(work, kept)


def release_around(work: Work, claim_id: str) -> frozenset[str]:
    """Release a first-party claim, but for what runs inside it: that stands on its own from now on.

    Returns the devices that stay held. A child that has no devices yet waits like any other need.
    """
    claim = _locked(work, claim_id)
    assert claim.party is Party.FIRST_PARTY
    children = store.list_children(work.tx, claim_id)
    if not children:
        release(work, claim_id)
        return frozenset()
    kept = {
        placement.device_id
        for child in children
        for placement in store.placements_of(work.tx, child.id)
    }
    store.end_placements(work.tx, claim_id, work.now)
    for child in children:
        store.raise_placements(work.tx, child.id, work.now)
    alone = [replace(child, parent_claim_id=None) for child in children]
    _write(work, [], [*alone, replace(claim, released_at=work.now)])
    work.emit(ClaimReleased(claim_id, claim.holder, claim.pool_id))
    return frozenset(kept)


def _restore_displaced(work: Work, gone: Claim) -> None:
    """Withdraw the notices that were given for a claim that is no more."""
    left_for = [c for c in _open(work, gone.pool_id).claims if c.displaced_by == gone.id]
    for victim in sorted(left_for, key=lambda c: c.id):
        if victim.term_at is None or victim.term_at <= work.now:
            continue
        book = _open(work, gone.pool_id).without(victim.id)
        free_again = replace(
            victim,
            starts_at=max(victim.starts_at, work.now),
            noticed_at=None,
            notice_reason=None,
            term_at=None,
            free_by=None,
            displaced_by=None,
        )
        again = admission.admit(book, free_again, now=work.now)
        # It stays only where it is, at once, and at nobody else's cost.
        if (
            isinstance(again, Admitted)
            and not again.displaced
            and again.claim.starts_at == free_again.starts_at
        ):
            withdraw_notice(work, victim.id)


def place(work: Work, claim_id: str) -> tuple[str, ...] | None:
    """The claim's devices, bound now if they are free; None if it must wait for them.

    Device ids unit by unit. A claim inside another gets devices of its parent that no other child
    holds. Placed already: the same devices.
    """
    claim = _locked(work, claim_id)
    assert claim.released_at is None
    held = store.placements_of(work.tx, claim_id)
    if held:
        return tuple(row.device_id for row in held)
    if claim.starts_at > work.now:
        return None
    devices = fleet.sellable_devices(work.tx, claim.pool_id)
    placed = store.list_placements(work.tx, claim.pool_id)
    level = 0 if claim.parent_claim_id is None else 1
    if level == 0:
        found = _place_top(work, claim, devices, placed)
    else:
        found = _place_child(claim, devices, placed)
    if found is None:
        return None
    nodes = {device.id: device.node_id for device in devices}
    rows = [
        store.Placement(
            claim_id=claim.id,
            pool_id=claim.pool_id,
            node_id=nodes[device_id],
            device_id=device_id,
            level=level,
            starts_at=work.now,
            ends_at=None,
        )
        for device_id in found
    ]
    store.insert_placements(work.tx, rows)
    return found


def _place_top(
    work: Work, claim: Claim, devices: list[Device], placed: list[store.Placement]
) -> tuple[str, ...] | None:
    book = _open(work, claim.pool_id)
    top = {row.device_id: row.claim_id for row in placed if row.level == 0}
    bound = set(top.values())
    unbound = [
        other
        for other in book.claims
        if other.id != claim.id
        and other.id not in bound
        and other.parent_claim_id is None
        and other.starts_at <= work.now
        and _right_of_way(other) < _right_of_way(claim)
    ]
    free = sum(device.id not in top for device in devices)
    if free - sum(other.size for other in unbound) < claim.size:
        return None
    views = _views(book, devices, top)
    return placing.choose_devices(
        views,
        devices=claim.devices,
        count=claim.count,
        rung=_rung(claim),
        whole_node=claim.whole_node,
        kept_empty=sum(other.count for other in unbound if other.whole_node),
    )


def _place_child(
    claim: Claim, devices: list[Device], placed: list[store.Placement]
) -> tuple[str, ...] | None:
    taken = {row.device_id for row in placed if row.level == 1}
    own = {row.device_id for row in placed if row.claim_id == claim.parent_claim_id}
    by_node: dict[str, list[placing.Slot]] = {}
    for device in devices:
        if device.id in own:
            rung = placing.FIRST_PARTY_RUNG if device.id in taken else None
            by_node.setdefault(device.node_id, []).append(
                placing.Slot(device_id=device.id, rung=rung)
            )
    views = [
        placing.NodeView(node_id=node_id, slots=tuple(slots), is_whole=False)
        for node_id, slots in sorted(by_node.items())
    ]
    return placing.choose_devices(
        views,
        devices=claim.devices,
        count=claim.count,
        rung=placing.FIRST_PARTY_RUNG,
        whole_node=False,
    )


def _right_of_way(claim: Claim) -> tuple[int, datetime, str]:
    """The order in shortage: who gets a device first when fewer are free than are owed."""
    if not claim.is_sale:
        place_in_line = 4 if claim.urgency is not None else 5
    elif claim.rank in (Rank.LEASE, Rank.BLOCK):
        place_in_line = 1
    elif claim.rank is Rank.RESERVATION:
        place_in_line = 2
    elif claim.rank is Rank.ON_DEMAND:
        place_in_line = 3
    else:
        place_in_line = 6 if claim.rank is Rank.SPOT else 7
    return place_in_line, claim.starts_at, claim.id


def _rung(claim: Claim) -> placing.Rung:
    return claim.rung if claim.is_sale else placing.FIRST_PARTY_RUNG


def _views(book: PoolBook, devices: list[Device], top: Mapping[str, str]) -> list[placing.NodeView]:
    by_node: dict[str, list[placing.Slot]] = {}
    for device in devices:
        holder = top.get(device.id)
        claim = None if holder is None else book.find(holder)
        rung = (
            None
            if holder is None
            else (placing.FIRST_PARTY_RUNG if claim is None else _rung(claim))
        )
        by_node.setdefault(device.node_id, []).append(placing.Slot(device_id=device.id, rung=rung))
    largest = max((len(slots) for slots in by_node.values()), default=0)
    return [
        placing.NodeView(node_id=node_id, slots=tuple(slots), is_whole=len(slots) == largest)
        for node_id, slots in sorted(by_node.items())
    ]


def open_pool(work: Work, pool_id: str, *, firm_shelf_devices: int = 0) -> None:
    """Begin the book of a pool with so many devices on the firm shelf. Begun already: no effect."""
    if store.find_pool(work.tx, pool_id) is None:
        set_firm_shelf(work, pool_id, firm_shelf_devices, None)


def set_firm_shelf(work: Work, pool_id: str, devices: int, until: datetime | None) -> None:
    """What the owner has decided to sell for longer than a forecast vouches for, until when.

    `until` None: until it is set again. It ends nothing that is sold.
    """
    assert devices >= 0
    book = _open(work, pool_id)
    store.keep_firm_shelf(work.tx, pool_id, devices, until)
    generation = store.next_generation(work.tx, pool_id)
    changed = book.with_changes((), generation).with_firm_shelf(devices, until)
    work.facts[_fact(pool_id)] = changed


def step(work: Work, pool_id: str) -> datetime | None:
    """Give the notices that are due in one pool; returns when to look again, or None.

    Pinned claims get theirs at the last responsible moment, and so does whoever's rolling lock
    would otherwise reach the start of somebody with a better right. Recalls' own victims are the
    owner's loop's.
    """
    for claim in store.list_pinned(work.tx, pool_id):
        if _tell_at(claim) <= work.now:
            assert claim.term_at is not None
            give_notice(work, claim.id, reason=SPOT_INTERRUPTION, term_at=claim.term_at)
    book = get_book(work, pool_id)
    recalls = {c.id for c in book.claims if c.holder.startswith(RECALL_PREFIX)}
    for due in roll.due_notices(book, now=work.now, except_for=recalls):
        reason = OWNER_RECALL if due.for_owner else SPOT_INTERRUPTION
        give_notice(work, due.pin.claim_id, reason=reason, term_at=due.pin.term_at)
    book = get_book(work, pool_id)
    moments = [_tell_at(claim) for claim in store.list_pinned(work.tx, pool_id)]
    rolling = roll.next_look(book, now=work.now, except_for=recalls)
    if rolling is not None:
        moments.append(rolling)
    return min(moments, default=None)


def is_due(tx: Connection, now: datetime, pool_id: str) -> tuple[bool, datetime | None]:
    """Whether `step` would do something, found out without any lock; and when to look again."""
    moments = [_tell_at(claim) for claim in store.list_pinned(tx, pool_id)]
    book = get_book(tx, pool_id, now=now)
    recalls = {c.id for c in book.claims if c.holder.startswith(RECALL_PREFIX)}
    if any(at <= now for at in moments) or roll.due_notices(book, now=now, except_for=recalls):
        return True, now
    rolling = roll.next_look(book, now=now, except_for=recalls)
    if rolling is not None:
        moments.append(rolling)
    return False, min(moments, default=None)


def _tell_at(claim: Claim) -> datetime:
    """The last responsible moment of a pinned claim's notice, less the slack."""
    assert claim.term_at is not None
    assert claim.release.notice_seconds is not None
    return claim.term_at - timedelta(seconds=claim.release.notice_seconds) - NOTICE_SLACK


def _fact(pool_id: str) -> str:
    return f"allocation.book:{pool_id}"


def _open(work: Work, pool_id: str) -> PoolBook:
    """Take the pool's row, once a Work, and return the book with this Work's changes."""
    book: PoolBook | None = work.facts.get(_fact(pool_id))
    if book is not None:
        return book
    if not store.lock_pool(work.tx, pool_id):
        fleet.get_pool(work.tx, pool_id)
        store.open_pool(work.tx, pool_id)
        store.lock_pool(work.tx, pool_id)
    book = _load(work.tx, pool_id, work.now)
    work.facts[_fact(pool_id)] = book
    return book


def _write(work: Work, new: list[Claim], changed: list[Claim]) -> list[Claim]:
    """Write claims under one new generation. The pool's row is held; returns them as written."""
    (pool_id,) = {claim.pool_id for claim in (*new, *changed)}
    generation = store.next_generation(work.tx, pool_id)
    new = [replace(claim, generation=generation) for claim in new]
    changed = [replace(claim, generation=generation) for claim in changed]
    for claim in new:
        store.insert_claim(work.tx, claim)
    for claim in changed:
        store.update_claim(work.tx, claim)
    book = _open(work, pool_id)
    work.facts[_fact(pool_id)] = book.with_changes([*new, *changed], generation)
    return [*new, *changed]


def _locked(work: Work, claim_id: str) -> Claim:
    """The claim, read again after its pool's row is held."""
    pool_id = store.get_claim(work.tx, claim_id).pool_id
    _open(work, pool_id)
    return store.get_claim(work.tx, claim_id)


def _held(book: PoolBook, claim_id: str) -> Claim:
    found = book.find(claim_id)
    assert found is not None
    return found


def _load(tx: Connection, pool_id: str, now: datetime) -> PoolBook:
    """The committed book, from the cache where that is no newer than this transaction."""
    row = store.find_pool(tx, pool_id)
    pool = fleet.get_pool(tx, pool_id)
    if row is None:
        row = store.PoolRow(
            pool_id=pool_id, generation=0, firm_shelf_devices=0, firm_shelf_until=None
        )
    cache = _committed.setdefault(tx.engine, {})
    cached = cache.get(pool_id)
    if cached is not None and cached.generation <= row.generation:
        changed = store.list_changed_claims(tx, pool_id, cached.generation)
        book = cached.at(now).with_changes(changed, row.generation)
    else:
        blank = PoolBook.empty(pool_id, now=now, supply=0)
        book = blank.with_changes(store.list_active_claims(tx, pool_id), row.generation)
    devices = fleet.sellable_devices(tx, pool_id)
    nodes = _nodes(tx, pool_id, book, devices, now)
    book = book.with_supply(
        len(devices), head_room_of(len(devices), pool.head_room_percent), nodes
    ).with_firm_shelf(row.firm_shelf_devices, row.firm_shelf_until)
    if cached is None or cached.generation <= row.generation:
        cache[pool_id] = book
    return book


def _nodes(
    tx: Connection, pool_id: str, book: PoolBook, devices: list[Device], now: datetime
) -> Nodes | None:
    """The pool's nodes as columns; None where there is one."""
    ids = sorted({device.node_id for device in devices})
    if len(ids) < 2:
        return None
    column = {node_id: i for i, node_id in enumerate(ids)}
    count = np.zeros(len(ids), np.int32)
    for device in devices:
        count[column[device.node_id]] += 1
    sellable = {device.id for device in devices}
    free = count.copy()
    fraction_nodes: set[str] = set()
    bound: set[str] = set()
    for row in store.list_placements(tx, pool_id):
        if row.level != 0:
            continue
        bound.add(row.claim_id)
        if row.device_id in sellable:
            free[column[row.node_id]] -= 1
        claim = book.find(row.claim_id)
        if claim is not None and not claim.whole_node:
            fraction_nodes.add(row.node_id)
    unbound = sum(
        claim.count
        for claim in book.claims
        if claim.whole_node and claim.id not in bound and claim.starts_at <= now
    )
    return Nodes(
        size=int(count.max()),
        devices=count,
        free=free,
        fractions=len(fraction_nodes),
        unbound_whole=unbound,
    )
