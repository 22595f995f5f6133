"""The one rule of admission, as a pure decision.

A sale of rank r that wants `size` devices from `start` on passes if
(1) in every bucket of its lock `locked + need + size ≤ supply`, where locked = equals and higher
    over their whole intervals, lower ranks to their free-by;
(2) in every later bucket of its interval `equals + size ≤ supply`;
(3) its units are free at its start, or are freed by then by lower ranks, which are pinned here.
Where only lower ranks stand in the way, the start (and with it the end) moves to when they are
gone; a claim dated ahead is not moved but refused. Whether and after whom a sale may start is
decided on the grid; when those are gone is an instant, and it starts then.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from sublet.capacity.allocation.book import (
    FRACTION,
    RANKS,
    VOUCHED,
    WHOLE,
    Counts,
    Nodes,
    PoolBook,
)
from sublet.capacity.allocation.grid import Grid
from sublet.capacity.allocation.model import (
    LATE_CHECK,
    NOTICE_SLACK,
    Admitted,
    Claim,
    Pinned,
    RefusalReason,
    Refused,
    lock_free_by,
)
from sublet.capacity.allocation.roll import pinned
from sublet.capacity.allocation.victims import Candidate, candidate_of, choose


def admit(
    book: PoolBook, claim: Claim, *, now: datetime, with_ways_on: bool = True
) -> Admitted | Refused:
    """Decide one sale against the book. Reads nothing else.

    Without `with_ways_on` a refusal names its reason only: looking for the ways on takes a hundred
    times as long as the decision, and who waits in a queue asks for them in vain.
    """
    assert claim.is_sale, "the owner's claims are filed, never refused"
    assert claim.term_at is None
    assert claim.released_at is None
    book = book.at(now)
    is_dated = claim.starts_at > now
    if not is_dated:
        claim = _moved(claim, to=now)
    room = _Room(book, claim, now)
    found = _tried(room, is_dated=is_dated)
    if isinstance(found, Admitted):
        return found
    return _refused(room, is_dated=is_dated, with_ways_on=with_ways_on, reason=found)


def at_once(book: PoolBook, claim: Claim, *, now: datetime) -> Claim | None:
    """A sale of the book that was asked for at once, begun now instead of when it was promised.

    None: its devices are not free yet, or would be at somebody's cost; or it was dated.
    """
    assert claim.starts_at > now
    if claim.asked_at is None:
        return None
    again = admit(book.without(claim.id), _moved(claim, to=now), now=now, with_ways_on=False)
    if isinstance(again, Refused) or again.displaced or again.claim.starts_at > now:
        return None
    return again.claim


def _tried(room: _Room, *, is_dated: bool) -> Admitted | RefusalReason | None:
    """The decision, without ways on. None: there is no start, and why must be looked for."""
    claim = room.claim
    start = room.start(claim.starts_at, clock=room.now, is_dated=is_dated)
    if start is None:
        return None
    for moment in (room.sooner(start), start) if start > claim.starts_at else (start,):
        moved = _moved(claim, to=moment)
        displaced = _displaced(room, moved)
        if displaced is not None:
            if moment > claim.starts_at:
                moved = replace(moved, asked_at=claim.starts_at)
            return Admitted(claim=moved, displaced=displaced)
    return RefusalReason.NODES


def applied(book: PoolBook, admitted: Admitted) -> PoolBook:
    """The book after the decision: the claim in it, the displaced pinned."""
    changes = [admitted.claim]
    for pin in admitted.displaced:
        found = book.find(pin.claim_id)
        assert found is not None
        changes.append(pinned(found, pin, displaced_by=admitted.claim.id))
    return book.with_changes(changes)


def _moved(claim: Claim, *, to: datetime) -> Claim:
    """The same claim from another start; a fixed end keeps its distance."""
    if to == claim.starts_at:
        return claim
    release = claim.release
    if release.ends_at is not None:
        release = replace(release, ends_at=release.ends_at + (to - claim.starts_at))
    return replace(claim, starts_at=to, release=release)


PROMPT = timedelta(minutes=10)
"""So far ahead a sale may take over within a bucket. The grid counts both in that bucket, so that
until then a device less may be sold than there is; who starts later can wait for an edge."""

Flags = NDArray[np.bool_]


class _Room:
    """What one sale finds in one book, ready to be asked about many starts."""

    def __init__(self, book: PoolBook, claim: Claim, now: datetime) -> None:
        self.book = book
        self.claim = claim
        self.now = now
        self.size = claim.size
        release = claim.release
        notice = release.notice_seconds
        self.lead = None if notice is None else max(notice, release.firm_seconds)
        self.stop = timedelta(seconds=release.stop_seconds)
        self.length = None if release.ends_at is None else release.ends_at - claim.starts_at
        rank = claim.rank
        self.hard = book.held(slice(rank, RANKS))
        self.soft_fixed: Counts = book.fixed[:, :rank].sum(axis=1, dtype=np.int32)
        self.soft_rolling = [item for item in book.rolling.items() if item[0][1] < rank]
        need = book.owner_need()
        taken = self.hard.sum(axis=0, dtype=np.int32)
        self.near: Counts = book.supply - need - np.int32(book.head_room) - taken
        self.far: Counts = np.minimum(self.near, book.shelf() - taken)
        equals = book.active[:, rank].sum(axis=0, dtype=np.int32)
        self.equals_fit: Flags = book.supply - equals >= self.size

    def lock_end(self, start: datetime) -> datetime:
        """The end of its lock if it starts then."""
        ends = []
        if self.lead is not None:
            ends.append(start + timedelta(seconds=self.lead))
        if self.length is not None:
            ends.append(start + self.length)
        return min(ends) + self.stop

    def span(self, start: datetime) -> tuple[int, int]:
        end = None if self.length is None else start + self.length + self.stop
        return self.book.grid.span(start, end)

    def beyond(self, end: datetime, clock: datetime) -> int:
        """The first bucket of a lock up to `end` that the owner's need is not known for at `clock`.

        Asked about a later clock, a coarse bucket counts as beyond if any part of it may be.
        """
        grid = self.book.grid
        vouched = clock + VOUCHED
        if clock == self.now:
            return grid.stop(vouched)
        return len(grid) if end <= vouched else grid.index(vouched)

    def flags(
        self, end: datetime, clock: datetime, soft: Counts | None, *, low: int, high: int
    ) -> Flags:
        """For buckets `[low, high)`: is there room beside equals and higher, and `soft` if given."""
        beyond = min(max(self.beyond(end, clock), low), high)
        room = np.concatenate((self.near[low:beyond], self.far[beyond:high]))
        if soft is not None:
            room -= soft[0, low:high] + soft[1, low:high]
        if self.book.waiting and low <= self.book.grid.index(clock) < high:
            room[self.book.grid.index(clock) - low] -= self.book.waiting
        found: Flags = room >= self.size
        if self.book.nodes is not None:
            locked = self.hard if soft is None else self.hard + soft
            found &= self.nodes_pass(self.book.nodes, locked)[low:high]
        return found

    def nodes_pass(self, nodes: Nodes, locked: Counts) -> Flags:
        """Per bucket, whether whole and fraction nodes together are no more than there are."""
        held = locked + self.book.need
        held[WHOLE if self.claim.whole_node else FRACTION] += self.size
        by_count = -(-np.maximum(held[FRACTION] - nodes.broken_devices, 0) // nodes.size)
        # A fraction node stays one as long as anything is on it, however little.
        begun = np.minimum(nodes.fractions, self.book.active[FRACTION].sum(axis=0))
        found: Flags = held[WHOLE] // nodes.size + np.maximum(by_count, begun) <= nodes.whole
        return found

    def soft(self, clock: datetime) -> Counts | None:
        """Per node set, what lower ranks lock at `clock`; None: nothing."""
        if not self.soft_rolling and not self.soft_fixed.any():
            return None
        soft = self.soft_fixed.copy()
        for (node_set, _, lead), size in self.soft_rolling:
            soft[node_set, : max(self.book.grid.stop(clock + lead), 1)] += size
        return soft

    def passes(self, start: datetime, clock: datetime, soft: Counts | None, *, since: int) -> bool:
        """(1) and (2) for this start; from bucket `since` on, where it could have begun before."""
        grid = self.book.grid
        end = self.lock_end(start)
        _, stop = grid.span(start, end)
        _, last = self.span(start)
        room = self.flags(end, clock, soft, low=since, high=stop)
        return bool(room.all()) and bool(self.equals_fit[stop:last].all())

    def units_free(self, start: datetime, clock: datetime) -> bool:
        """(3) where there are many nodes: its units are together, now or for certain then."""
        nodes = self.book.nodes
        claim = self.claim
        if nodes is None:
            return True
        if clock == self.now and start <= clock:
            return nodes.fits(claim.devices, claim.count, whole_node=claim.whole_node)
        return self._units_certain(nodes, self.book.grid.index(start))

    def _units_certain(self, nodes: Nodes, bucket: int) -> bool:
        """However its neighbours lie by then: each node may waste up to a unit less one device."""
        claim = self.claim
        active = self.book.active[:, :, bucket].sum(axis=1) + self.book.need[:, bucket]
        begun = min(nodes.fractions, int(active[FRACTION]))
        if claim.whole_node:
            return int(active[WHOLE]) // nodes.size + begun + claim.count <= nodes.whole
        free = int(self.book.supply[bucket] - active.sum())
        wasted = len(nodes.devices) * (claim.devices - 1)
        return free - wasted >= claim.size

    def start(self, asked: datetime, *, clock: datetime, is_dated: bool) -> datetime | None:
        """When it can start if it is asked for at `clock`: then, or once lower ranks are gone."""
        grid = self.book.grid
        since = grid.index(asked)
        if not self.passes(asked, clock, None, since=since):
            return None
        is_free = is_dated or self.units_free(asked, clock)
        if not is_free and not self.any_device_does(clock):
            return None
        soft = self.soft(clock)
        if soft is None or self.passes(asked, clock, soft, since=since):
            return asked if is_free else None
        if is_dated:
            return None
        return self._start_after_lower(asked, clock, soft)

    def _start_after_lower(self, asked: datetime, clock: datetime, soft: Counts) -> datetime | None:
        """The first later start that passes, as long as nothing but lower ranks stands between."""
        grid = self.book.grid
        since = grid.index(asked)
        start = asked
        for _ in range(len(grid)):
            end = self.lock_end(start)
            first, stop = grid.span(start, end)
            room = self.flags(end, clock, soft, low=0, high=len(grid))
            blocked = np.flatnonzero(~room[first:stop])
            if not blocked.size:
                return start if self.passes(start, clock, None, since=since) else None
            # Every start up to the last blocked bucket has that bucket in its lock.
            after = first + int(blocked[-1]) + 1
            open_again = np.flatnonzero(room[after:])
            if not open_again.size:
                return None
            start = grid.edges[after + int(open_again[0])]
            if not self.passes(start, clock, None, since=since):
                return None
        return None

    def any_device_does(self, clock: datetime) -> bool:
        """Whose units are single devices has one wherever a lower rank leaves; larger units might
        be free in pieces only."""
        return clock == self.now and self.claim.devices == 1 and not self.claim.whole_node

    def sooner(self, edge: datetime) -> datetime:
        """From when on it has room beside all who are not gone by then; `edge` was found to do.

        Equals, higher ranks and the owner's need count bucket by bucket as ever, and there is room
        for them from now on: only lower ranks are looked at more closely, each to its free-by.
        """
        grid, asked = self.book.grid, self.claim.starts_at
        leaving = sorted(
            (_gone_at(c, grid, self.now), self.book.node_set(c), c.size)
            for c in self.book.claims
            if c.is_sale and c.rank < self.claim.rank and c.starts_at < edge
        )
        moments = {asked, *(end for end, _, _ in leaving if end < edge)}
        moments.update(grid.edges[: grid.index(edge)])
        locked: Counts = np.zeros((2, 1), np.int32)
        start = edge
        for at in sorted((at for at in moments if at >= asked), reverse=True):
            while leaving and leaving[-1][0] > at:
                _, node_set, size = leaving.pop()
                locked[node_set] += size
            if not self._fits_beside(locked, grid.index(at)):
                break
            start = at
        if start == asked and not self.units_free(asked, self.now):
            return edge
        return start if start <= asked + PROMPT else edge

    def _fits_beside(self, locked: Counts, bucket: int) -> bool:
        """Whether the bucket has room beside so much of lower ranks, per node set."""
        beyond = bucket >= self.beyond(self.now, self.now)
        room = int((self.far if beyond else self.near)[bucket]) - int(locked.sum())
        if bucket == self.book.grid.index(self.now):
            room -= self.book.waiting
        if room < self.size or self.book.nodes is None:
            return room >= self.size
        return bool(self.nodes_pass(self.book.nodes, self.hard + locked)[bucket])

    def earliest(self) -> datetime | None:
        """The first edge of the grid at which it would be admitted if all else stayed as it is."""
        grid = self.book.grid
        if self.length is None and not self.equals_fit[-1]:
            return None
        from_bucket = grid.index(self.claim.starts_at) + 1
        hopeful = np.flatnonzero(self.near[from_bucket:] >= self.size) + from_bucket
        for bucket in hopeful:
            at = grid.edges[bucket]
            if self.start(at, clock=at, is_dated=False) is not None:
                return at
        return None


def _refused(
    room: _Room, *, is_dated: bool, with_ways_on: bool, reason: RefusalReason | None = None
) -> Refused:
    claim, book = room.claim, room.book
    if claim.size > int(book.supply.max()):
        earliest, reason = None, RefusalReason.TOO_LARGE
    else:
        earliest = room.earliest() if with_ways_on else None
        reason = reason or _reason(room)
    return Refused(
        reason=reason,
        earliest_at=earliest,
        offer_to_wait=reason is not RefusalReason.TOO_LARGE,
        smaller_count=_smaller(room, is_dated=is_dated) if with_ways_on else None,
    )


def _reason(room: _Room) -> RefusalReason:
    """The weightiest thing in the way at the start asked for."""
    book, grid, size = room.book, room.book.grid, room.size
    start = room.claim.starts_at
    first, stop = grid.span(start, room.lock_end(start))
    _, last = room.span(start)
    sold = room.hard[:, first:stop].sum(axis=0)
    if (book.supply[first:stop] - sold < size).any() or not room.equals_fit[stop:last].all():
        return RefusalReason.SOLD
    waiting = book.waiting if first == 0 else 0
    if (room.near[first:stop] < size).any() or room.near[first] - waiting < size:
        return RefusalReason.OWNER_NEED
    if book.nodes is not None:
        together = room.nodes_pass(book.nodes, room.hard)[first:stop].all()
        if not together or not room.units_free(start, room.now):
            return RefusalReason.NODES
    if not room.passes(start, room.now, None, since=first):
        return RefusalReason.FIRM_SHELF
    return RefusalReason.SOLD


def _smaller(room: _Room, *, is_dated: bool) -> int | None:
    """The most units that would be admitted now: what passes passes with fewer too."""
    low, high = 0, room.claim.count - 1
    while low < high:
        middle = (low + high + 1) // 2
        fewer = replace(room.claim, count=middle)
        found = _tried(_Room(room.book, fewer, room.now), is_dated=is_dated)
        low, high = (middle, high) if isinstance(found, Admitted) else (low, middle - 1)
    return low or None


def _displaced(room: _Room, claim: Claim) -> tuple[Pinned, ...] | None:
    """Lower ranks that must be gone for this claim, each with its pinned end; None if they cannot.

    Its lock is walked in order: what is too much leaves by then. Too much is never more than the
    claim's own size: an excess that was there before is not its.
    """
    book, grid = room.book, room.book.grid
    first, stop = grid.span(claim.starts_at, room.lock_end(claim.starts_at))
    active = book.active[:, :, first:stop].sum(axis=(0, 1), dtype=np.int32)
    room_for_sales = book.supply - book.owner_need() - np.int32(book.head_room)
    if (
        claim.starts_at == room.claim.starts_at
        and (active + claim.size <= room_for_sales[first:stop]).all()
    ):
        return ()
    cells = list(zip(grid.edges[first:stop], range(first, stop), active.tolist(), strict=True))
    # Up to so far ahead one may take over from another within a bucket: instant by instant.
    near = min(grid.index(room.now + PROMPT) + 1, stop)
    if near > first:
        cells[: near - first] = _held_within(room, claim.starts_at, near)
    edges = [at for at, _, _ in cells]
    pins: dict[str, Pinned] = {}
    freed = np.zeros(len(cells), np.int32)
    for place, (edge, bucket, held) in enumerate(cells):
        excess = min(held + claim.size - int(room_for_sales[bucket]), claim.size)
        missing = excess - int(freed[place])
        if missing <= 0:
            continue
        able = {
            c.id: c for c in book.claims if c.id not in pins and _may_leave(room, c, bucket, edge)
        }
        chosen = choose([_candidate(room, c, edge) for c in able.values()], missing)
        if chosen is None:
            return None
        for picked in chosen.picked:
            victim = able[picked.claim_id]
            pins[victim.id] = _pin(victim, edge)
            until = victim.held_until()
            last = len(cells) if until is None else bisect_left(edges, until)
            freed[place : max(last, place)] += picked.size
    return tuple(sorted(pins.values(), key=lambda pin: (pin.notice_at, pin.claim_id)))


def _held_within(room: _Room, start: datetime, stop: int) -> list[tuple[datetime, int, int]]:
    """What sales hold from `start` to the bucket `stop`, from each instant at which that changes or
    a bucket begins: the instant, its bucket, the devices."""
    grid = room.book.grid
    end = grid.edges[stop] if stop < len(grid) else None
    changes = {start: 0} | dict.fromkeys(grid.edges[grid.index(start) + 1 : stop], 0)
    for claim in room.book.claims:
        until = claim.held_until()
        if not claim.is_sale:
            continue
        if until is not None and (until := _late(until, grid, room.now)) <= start:
            continue
        begun = max(claim.starts_at, start)
        changes[begun] = changes.get(begun, 0) + claim.size
        if until is not None:
            changes[until] = changes.get(until, 0) - claim.size
    moments = sorted(changes)
    sums = accumulate(changes[at] for at in moments)
    return [
        (at, grid.index(at), held)
        for at, held in zip(moments, sums, strict=True)
        if end is None or at < end
    ]


def _gone_at(claim: Claim, grid: Grid, now: datetime) -> datetime:
    """When a claim of lower rank can be gone if it is told now, with time to tell it."""
    if claim.is_fixed or (claim.opened_at is None and claim.release.firm_seconds > 0):
        end = claim.held_until()
        return grid.edges[-1] if end is None else _late(end, grid, now)
    return _late(lock_free_by(claim, now + NOTICE_SLACK), grid, now)


def _late(end: datetime, grid: Grid, now: datetime) -> datetime:
    """Who should be gone and is not is expected within the limit of the check."""
    return end if end > now else min(now + LATE_CHECK, grid.edges[1])


def _may_leave(room: _Room, victim: Claim, bucket: int, edge: datetime) -> bool:
    """Whether it is of lower rank, holds something in the bucket from the edge on, and can be gone
    by then."""
    if not victim.is_sale or victim.rank >= room.claim.rank or victim.is_fixed:
        return False
    if victim.opened_at is None and victim.release.firm_seconds > 0:
        return False
    grid = room.book.grid
    until = victim.held_until()
    first, stop = grid.span(victim.starts_at, until)
    if (until is not None and until <= edge) or victim.starts_at > edge > grid.edges[bucket]:
        return False
    if not first <= bucket < stop or lock_free_by(victim, room.now) > edge:
        return False
    return room.book.nodes is None or _units(room.claim, victim) > 0


def _units(claim: Claim, victim: Claim) -> int:
    """How many units of the claim's shape come free with the victim, whatever lies beside it."""
    if claim.whole_node:
        return victim.count if victim.whole_node else 0
    return victim.count * (victim.devices // claim.devices)


def _candidate(room: _Room, victim: Claim, edge: datetime) -> Candidate:
    size = victim.size
    if room.book.nodes is not None:
        size = _units(room.claim, victim) * room.claim.devices
    return candidate_of(victim, notice_at=_notice_at(victim, edge), free_by=edge, size=size)


def _notice_at(victim: Claim, free_by: datetime) -> datetime:
    release = victim.release
    assert release.notice_seconds is not None
    return free_by - timedelta(seconds=release.notice_seconds + release.stop_seconds)


def _pin(victim: Claim, free_by: datetime) -> Pinned:
    return Pinned(
        claim_id=victim.id,
        notice_at=_notice_at(victim, free_by),
        term_at=free_by - timedelta(seconds=victim.release.stop_seconds),
        free_by=free_by,
    )
