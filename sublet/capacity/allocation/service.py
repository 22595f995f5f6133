"""The book of capacity as the packages above call it.

Every change takes the pool's row first, so decisions on one pool are made one at a time and in
every process on the same book: a process keeps the last committed book and brings it up to date by
the claims whose generation is newer.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from weakref import WeakKeyDictionary

from sqlalchemy import Connection, Engine

from sublet.base.store import Work
from sublet.capacity import fleet
from sublet.capacity.allocation import admit as admission
from sublet.capacity.allocation import place as placing
from sublet.capacity.allocation import roll, store
from sublet.capacity.allocation.book import Nodes, PoolBook, head_room_of
from sublet.capacity.allocation.floor import Floor, rung_of
from sublet.capacity.allocation.model import (
    NOTICE_SLACK,
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
    RefusalReason,
    Refused,
    earliest_term_at,
)

SPOT_INTERRUPTION = "spot_interruption"
OWNER_RECALL = "owner_recall"
RECALL_PREFIX = "rec_"
"""Claims held by a recall: the owner's loop gives their notices, by its plan."""

MANY_CHANGES = 500
"""A process that is so far behind reads all that is held instead."""

_committed: WeakKeyDictionary[Engine, dict[str, tuple[PoolBook, Floor]]] = WeakKeyDictionary()
"""By database and pool, the newest committed book that this process has seen, and the floor that
goes with it. Both are immutable: two threads may both bring them up to date, and either result is
right."""


def get_book(work: Work | Connection, pool_id: str, *, now: datetime | None = None) -> PoolBook:
    """The pool's book as this transaction sees it. A bare connection must say `now`."""
    if isinstance(work, Work):
        changed: PoolBook | None = work.facts.get(_fact(pool_id))
        return changed if changed is not None else _load(work.tx, pool_id, work.now)[0]
    assert now is not None, "only a Work brings its own time"
    return _load(work, pool_id, now)[0]


def admit(work: Work, claim: Claim, *, with_ways_on: bool = True) -> Admitted | Refused:
    """Decide a sale and, if it is admitted, write it and pin what it displaces.

    What has to go at once is noticed here; the rest by `step`. The claim's start may be later than
    asked: until then `place` answers None, and `begin_early` may bring it forward. Without
    `with_ways_on` a refusal names its reason only.
    """
    book = _open(work, claim.pool_id)
    decision = admission.admit(book, claim, now=work.now, with_ways_on=with_ways_on)
    if isinstance(decision, Refused):
        return _looked_at(work.tx, claim, decision)
    displaced = [
        roll.pinned(_held(book, pin.claim_id), pin, displaced_by=claim.id)
        for pin in decision.displaced
    ]
    (kept, *_) = _write(work, [decision.claim], displaced)
    for victim in displaced:
        if _tell_at(victim) <= work.now:
            assert victim.term_at is not None
            give_notice(work, victim.id, reason=SPOT_INTERRUPTION, term_at=victim.term_at)
    if kept.starts_at <= work.now and not kept.whole_node:
        _bind(work, kept)
    return replace(decision, claim=kept)


def _looked_at(tx: Connection, claim: Claim, refused: Refused) -> Refused:
    """The book counts what can be sold now: what only that makes too large is out of service."""
    if refused.reason is not RefusalReason.TOO_LARGE:
        return refused
    roster = fleet.get_roster(tx, claim.pool_id)
    if claim.devices > roster.largest_node or claim.size > len(roster.devices):
        return refused
    return replace(refused, reason=RefusalReason.OUT_OF_SERVICE, offer_to_wait=True)


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
    allows. A pinned end is not put off for it, but by a notice that comes late.
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
        # Somebody of higher rank waits for the pinned end; the notice sold comes before that.
        term_at = max(min(term_at, claim.term_at), earliest)
    assert term_at >= earliest, "nobody is ended before its release allows"
    free_by = term_at + timedelta(seconds=claim.release.stop_seconds)
    noticed = replace(
        claim,
        noticed_at=work.now,
        notice_reason=reason,
        term_at=term_at,
        free_by=free_by,
        # A notice for another cause is not void when the displacing sale is.
        displaced_by=claim.displaced_by if reason == SPOT_INTERRUPTION else None,
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
    _stand(work, [kept], store.placements_of_all(work.tx, [kept.id]))
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
    written = _write(work, [], [*alone, replace(claim, released_at=work.now)])
    _stand(work, written, store.placements_of_all(work.tx, [one.id for one in written]))
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
        again = admission.admit(book, free_again, now=work.now, with_ways_on=False)
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
    found = _bind(work, claim)
    if found is not None:
        # By the claim's new generation other processes know that its placements have changed.
        _write(work, [], [claim])
    return found


def begin_early(work: Work, claim_id: str) -> Claim:
    """Begin a sale now that waits for whom it displaced, if they have gone sooner than they had to.

    Its end moves with its start. Not possible, or begun already, or dated: no effect.
    """
    claim = _locked(work, claim_id)
    if not claim.is_sale or claim.starts_at <= work.now or claim.term_at is not None:
        return claim
    book = _open(work, claim.pool_id)
    if any(other.displaced_by == claim.id for other in book.claims):
        return claim
    begun = admission.at_once(book, claim, now=work.now)
    if begun is None:
        return claim
    (kept,) = _write(work, [], [begun])
    return kept


def _bind(work: Work, claim: Claim) -> tuple[str, ...] | None:
    """Devices for a claim that has none."""
    floor = _floor(work, claim.pool_id)
    level = 0 if claim.parent_claim_id is None else 1
    found = _choose(work, claim, floor) if level == 0 else _choose_inside(work, claim)
    if found is None:
        return None
    rows = [
        store.Placement(
            claim_id=claim.id,
            pool_id=claim.pool_id,
            node_id=floor.node_of[device_id],
            device_id=device_id,
            level=level,
            starts_at=work.now,
            ends_at=None,
        )
        for device_id in found
    ]
    store.insert_placements(work.tx, rows)
    _stand(work, [claim], rows)
    return found


def _choose(work: Work, claim: Claim, floor: Floor) -> tuple[str, ...] | None:
    book = _open(work, claim.pool_id)
    waiting = [_held(book, claim_id) for claim_id in sorted(floor.unbound - {claim.id})]
    unbound = [
        other
        for other in waiting
        if other.starts_at <= work.now and _right_of_way(other) < _right_of_way(claim)
    ]
    views = floor.views
    if sum(view.free for view in views) - sum(other.size for other in unbound) < claim.size:
        return None
    return placing.choose_devices(
        views,
        devices=claim.devices,
        count=claim.count,
        rung=rung_of(claim),
        whole_node=claim.whole_node,
        kept_empty=sum(other.count for other in unbound if other.whole_node),
    )


def _choose_inside(work: Work, claim: Claim) -> tuple[str, ...] | None:
    """Devices of its parent that no other child holds."""
    placed = store.list_placements(work.tx, claim.pool_id)
    taken = {row.device_id for row in placed if row.level == 1}
    own = {row.device_id for row in placed if row.claim_id == claim.parent_claim_id}
    by_node: dict[str, list[placing.Slot]] = {}
    for device in fleet.sellable_devices(work.tx, claim.pool_id):
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
    generation = book.generation + 1
    store.keep_generation(work.tx, pool_id, generation)
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
    last = claim.term_at - timedelta(seconds=claim.release.notice_seconds)
    if claim.withdrawn_at is None:
        return last - NOTICE_SLACK
    return max(last - NOTICE_SLACK, claim.withdrawn_at + WITHDRAWN_REST)


def _fact(pool_id: str) -> str:
    return f"allocation.book:{pool_id}"


def _floor_fact(pool_id: str) -> str:
    return f"allocation.floor:{pool_id}"


def _open(work: Work, pool_id: str) -> PoolBook:
    """Take the pool's row, once a Work, and return the book with this Work's changes."""
    book: PoolBook | None = work.facts.get(_fact(pool_id))
    if book is not None:
        return book
    if not store.lock_pool(work.tx, pool_id):
        fleet.get_pool(work.tx, pool_id)
        store.open_pool(work.tx, pool_id)
        store.lock_pool(work.tx, pool_id)
    book, floor = _load(work.tx, pool_id, work.now)
    work.facts[_fact(pool_id)] = book
    work.facts[_floor_fact(pool_id)] = floor
    return book


def _floor(work: Work, pool_id: str) -> Floor:
    """Who stands where in a pool whose row is held, with this Work's changes."""
    book, roster = _open(work, pool_id), fleet.get_roster(work.tx, pool_id)
    floor: Floor = work.facts[_floor_fact(pool_id)]
    if floor.edition != roster.edition:
        floor = Floor.of(roster, book.claims, store.list_placements(work.tx, pool_id))
        work.facts[_floor_fact(pool_id)] = floor
    return floor


def _stand(work: Work, claims: list[Claim], placements: list[store.Placement]) -> None:
    """Bring the floor up to date; `placements`: all of these claims, ended ones too."""
    (pool_id,) = {claim.pool_id for claim in claims}
    floor: Floor = work.facts[_floor_fact(pool_id)]
    work.facts[_floor_fact(pool_id)] = floor.with_placements(claims, placements)


def _write(work: Work, new: list[Claim], changed: list[Claim]) -> list[Claim]:
    """Write claims under one new generation. The pool's row is held; returns them as written."""
    (pool_id,) = {claim.pool_id for claim in (*new, *changed)}
    book = _open(work, pool_id)
    generation = book.generation + 1
    store.keep_generation(work.tx, pool_id, generation)
    new = [replace(claim, generation=generation) for claim in new]
    changed = [replace(claim, generation=generation) for claim in changed]
    for claim in new:
        store.insert_claim(work.tx, claim)
    for claim in changed:
        store.update_claim(work.tx, claim)
    work.facts[_fact(pool_id)] = book.with_changes([*new, *changed], generation)
    if new:
        _stand(work, new, [])
    return [*new, *changed]


def _locked(work: Work, claim_id: str) -> Claim:
    """The claim as it is once its pool's row is held: the book of a Work that holds it knows."""
    books: list[PoolBook] = [b for name, b in work.facts.items() if name.startswith(_fact(""))]
    for book in books:
        found = book.find(claim_id)
        if found is not None:
            return found
    pool_id = store.get_claim(work.tx, claim_id).pool_id
    _open(work, pool_id)
    return store.get_claim(work.tx, claim_id)


def _held(book: PoolBook, claim_id: str) -> Claim:
    found = book.find(claim_id)
    assert found is not None
    return found


def _load(tx: Connection, pool_id: str, now: datetime) -> tuple[PoolBook, Floor]:
    """The committed book and floor, from the cache where that is no newer than this transaction."""
    row = store.find_pool(tx, pool_id)
    roster = fleet.get_roster(tx, pool_id)
    if row is None:
        row = store.PoolRow(
            pool_id=pool_id, generation=0, firm_shelf_devices=0, firm_shelf_until=None
        )
    cache = _committed.setdefault(tx.engine, {})
    cached = cache.get(pool_id)
    if cached is None or cached[0].generation > row.generation:
        blank = PoolBook.empty(pool_id, now=now, supply=0)
        book = blank.with_changes(store.list_active_claims(tx, pool_id), row.generation)
        floor = Floor.of(roster, book.claims, store.list_placements(tx, pool_id))
    else:
        book, floor = cached[0].at(now), cached[1]
        changed: list[Claim] = []
        if book.generation != row.generation:
            changed = store.list_changed_claims(tx, pool_id, book.generation)
            book = book.with_changes(changed, row.generation)
        if floor.edition != roster.edition or len(changed) > MANY_CHANGES:
            floor = Floor.of(roster, book.claims, store.list_placements(tx, pool_id))
        elif changed:
            rows = store.placements_of_all(tx, [claim.id for claim in changed])
            floor = floor.with_placements(changed, rows)
    supply = len(roster.sellable)
    head_room = head_room_of(supply, roster.pool.head_room_percent)
    book = book.with_supply(supply, head_room, _nodes(book, floor, now))
    book = book.with_firm_shelf(row.firm_shelf_devices, row.firm_shelf_until)
    if cached is None or cached[0].generation <= row.generation:
        cache[pool_id] = book, floor
    return book, floor


def _nodes(book: PoolBook, floor: Floor, now: datetime) -> Nodes | None:
    """The pool's nodes as columns; None where there is one."""
    promised = (_held(book, claim_id) for claim_id in floor.unbound)
    unbound = sum(c.count for c in promised if c.whole_node and c.starts_at <= now)
    return floor.nodes(unbound_whole=unbound)
