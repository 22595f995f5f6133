"""The book of one pool: immutable; a change makes a new one.

Per bucket of the grid and per node set (whole nodes, fraction nodes) it counts devices: what each
rank of sale holds over its whole interval (`active`: the *equals* of that rank), what it locks to
a fixed free-by (`fixed`), what rolls with the clock (`rolling`: one entry per lead, not per claim,
so that the book need not change while time passes), and what the owner needs (`need`). A claim's
share is a function of the claim and the slot alone: taking it out subtracts exactly what putting
it in added.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from sublet.capacity.allocation.grid import SLOT, Grid, grid_at
from sublet.capacity.allocation.model import Claim, Rank, Urgency, not_ended_before

Counts = NDArray[np.int32]

RANKS = len(Rank)
WHOLE, FRACTION = 0, 1
CHUNKS = 512
VOUCHED = timedelta(minutes=10)
"""How far ahead the owner's need is known without a forecast; longer locks need the firm shelf."""
HEAD_ROOM_FROM = 50
"""Pools with fewer devices keep no head-room."""


def head_room_of(supply: int, percent: int) -> int:
    """Devices kept free for the owner's own starts."""
    return 0 if supply < HEAD_ROOM_FROM else supply * percent // 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """The nodes of a pool that has more than one, as columns: devices on each, and those free.

    A node with a fraction claim on it is a fraction node; it changes set only when empty.
    """

    size: int
    """Devices of an undamaged node."""
    devices: Counts
    free: Counts
    fractions: int
    """Nodes on which fractions are held now."""
    unbound_whole: int = 0
    """Nodes promised to whole-node claims that have started and are not bound yet."""

    @property
    def whole(self) -> int:
        return int(np.count_nonzero(self.devices == self.size))

    @property
    def broken_devices(self) -> int:
        """Sellable devices on nodes that are not whole: for fractions only."""
        return int(self.devices[self.devices != self.size].sum())

    def fits(self, devices: int, count: int, *, whole_node: bool) -> bool:
        """Whether so many units are free together now."""
        empty = int(np.count_nonzero((self.free == self.devices) & (self.devices == self.size)))
        spare = empty - self.unbound_whole
        if whole_node:
            return spare >= count
        is_empty = (self.free == self.devices) & (self.devices == self.size)
        begun = int((self.free[~is_empty] // devices).sum())
        return begun + max(spare, 0) * (self.size // devices) >= count


class Shelves:
    """Claims by id in shared chunks: a change copies one chunk and the list of chunks."""

    __slots__ = ("_all", "_chunks", "_count")

    def __init__(self, chunks: tuple[Mapping[str, Claim], ...], count: int) -> None:
        self._chunks = chunks
        self._count = count
        self._all: tuple[Claim, ...] | None = None
        """Gathered when first asked for: a loop's look goes through all claims several times."""

    @classmethod
    def of(cls, claims: Iterable[Claim]) -> Shelves:
        chunks: list[dict[str, Claim]] = [{} for _ in range(CHUNKS)]
        for claim in claims:
            chunks[crc32(claim.id.encode()) % CHUNKS][claim.id] = claim
        return cls(tuple(chunks), sum(map(len, chunks)))

    def __repr__(self) -> str:
        return f"Shelves({self._count} claims)"

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Claim]:
        if self._all is None:
            self._all = tuple(claim for chunk in self._chunks for claim in chunk.values())
        return iter(self._all)

    def find(self, claim_id: str) -> Claim | None:
        return self._chunks[crc32(claim_id.encode()) % CHUNKS].get(claim_id)

    def put(self, claim_id: str, claim: Claim | None) -> Shelves:
        """With this claim under the id, or with none."""
        place = crc32(claim_id.encode()) % CHUNKS
        chunk = dict(self._chunks[place])
        before = len(chunk)
        if claim is None:
            chunk.pop(claim_id, None)
        else:
            chunk[claim_id] = claim
        chunks = (*self._chunks[:place], chunk, *self._chunks[place + 1 :])
        return Shelves(chunks, self._count + len(chunk) - before)


@dataclass(frozen=True, slots=True)
class Share:
    """What one claim adds to the vectors of a book on a given grid."""

    node_set: int
    size: int
    rank: int
    span: tuple[int, int]
    """Buckets of its whole interval: of `active` for a sale, of `need` for the owner."""
    lock: tuple[int, int] | None
    """Buckets of a lock with a fixed end."""
    lead: timedelta | None
    """Or: its lock ends this long after the clock."""
    is_sale: bool
    is_waiting: bool = False


def share_of(claim: Claim, grid: Grid, node_set: int) -> Share | None:
    """The claim's share; None for a claim inside another, which adds nothing beyond its parent."""
    if claim.parent_claim_id is not None:
        return None
    span = grid.span(claim.starts_at, claim.held_until())
    if not claim.is_sale:
        waiting = claim.urgency is Urgency.PATIENT and claim.opened_at is None
        return Share(node_set, claim.size, claim.rank, span, None, None, False, waiting)
    fixed_end, lead = _lock(claim, grid.slot)
    lock = None if lead is not None else grid.span(claim.starts_at, fixed_end)
    return Share(node_set, claim.size, claim.rank, span, lock, lead, True)


def _lock(claim: Claim, slot: datetime) -> tuple[datetime | None, timedelta | None]:
    """`(end, None)` of a lock that stands still in this slot, or `(None, lead)` of a rolling one.

    Where a lock begins to roll within the slot it is taken at its greatest reach in the slot: a
    lock may be counted a few minutes too long, never too short.
    """
    release = claim.release
    if claim.is_fixed or release.notice_seconds is None:
        return claim.held_until(), None
    last = claim.held_until()
    if claim.opened_at is None and release.firm_seconds > 0:
        # Its firm time has not begun to count, so nobody can say yet when it may be ended.
        return last, None
    stop = timedelta(seconds=release.stop_seconds)
    notice = timedelta(seconds=release.notice_seconds)
    slot_end = slot + SLOT
    floor = not_ended_before(claim)
    if floor <= slot + notice:
        if last is not None and slot_end + notice + stop >= last:
            return last, None
        return None, notice + stop
    end = max(floor, slot_end + notice) + stop
    return (end if last is None else min(end, last)), None


Rolling = Mapping[tuple[int, int, timedelta], int]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class PoolBook:
    """Who holds how much of one pool, when. `grid.slot` is the five minutes that it is made for."""

    pool_id: str
    generation: int
    grid: Grid
    supply: Counts
    head_room: int
    firm_shelf: int
    firm_shelf_until: datetime | None
    nodes: Nodes | None
    active: Counts
    fixed: Counts
    need: Counts
    rolling: Rolling
    waiting: int
    claims: Shelves

    @classmethod
    def empty(
        cls,
        pool_id: str,
        *,
        now: datetime,
        supply: int,
        head_room_percent: int = 2,
        firm_shelf: int = 0,
        firm_shelf_until: datetime | None = None,
        nodes: Nodes | None = None,
        generation: int = 0,
    ) -> PoolBook:
        """A pool of so many healthy devices that nobody holds."""
        grid = grid_at(now)
        width = len(grid)
        return cls(
            pool_id=pool_id,
            generation=generation,
            grid=grid,
            supply=np.full(width, supply, np.int32),
            head_room=head_room_of(supply, head_room_percent),
            firm_shelf=firm_shelf,
            firm_shelf_until=firm_shelf_until,
            nodes=nodes,
            active=np.zeros((2, RANKS, width), np.int32),
            fixed=np.zeros((2, RANKS, width), np.int32),
            need=np.zeros((2, width), np.int32),
            rolling={},
            waiting=0,
            claims=Shelves.of(()),
        )

    def __repr__(self) -> str:
        return (
            f"PoolBook({self.pool_id} #{self.generation}, {self.grid.slot:%Y-%m-%dT%H:%MZ}: "
            f"{int(self.supply[0])} devices, {len(self.claims)} claims)"
        )

    def node_set(self, claim: Claim) -> int:
        """Where there is one node it is a fraction node."""
        return WHOLE if claim.whole_node and self.nodes is not None else FRACTION

    def find(self, claim_id: str) -> Claim | None:
        return self.claims.find(claim_id)

    def with_claim(self, claim: Claim) -> PoolBook:
        """With this claim, in place of one of the same id; a released one is taken out."""
        return self.with_changes((claim,))

    def without(self, claim_id: str) -> PoolBook:
        found = self.claims.find(claim_id)
        if found is None:
            return self
        return self._changed((found,), (), self.claims.put(claim_id, None), self.generation + 1)

    def with_changes(self, claims: Iterable[Claim], generation: int | None = None) -> PoolBook:
        """With all of these claims put in their place: one new book."""
        removed: list[Claim] = []
        added: list[Claim] = []
        shelves = self.claims
        for claim in claims:
            found = shelves.find(claim.id)
            if found is not None:
                removed.append(found)
            kept = None if claim.released_at is not None else claim
            if kept is not None:
                added.append(kept)
            if kept is not None or found is not None:
                shelves = shelves.put(claim.id, kept)
        number = self.generation + 1 if generation is None else generation
        return self._changed(removed, added, shelves, number)

    def _changed(
        self, removed: Iterable[Claim], added: Iterable[Claim], shelves: Shelves, generation: int
    ) -> PoolBook:
        active, fixed, need = self.active.copy(), self.fixed.copy(), self.need.copy()
        rolling = dict(self.rolling)
        waiting = self.waiting
        for sign, claims in ((-1, removed), (1, added)):
            for claim in claims:
                share = share_of(claim, self.grid, self.node_set(claim))
                if share is None:
                    continue
                size = sign * share.size
                first, stop = share.span
                if not share.is_sale:
                    if share.is_waiting:
                        waiting += size
                    else:
                        need[share.node_set, first:stop] += size
                    continue
                active[share.node_set, share.rank, first:stop] += size
                if share.lock is not None:
                    fixed[share.node_set, share.rank, share.lock[0] : share.lock[1]] += size
                else:
                    assert share.lead is not None
                    key = (share.node_set, share.rank, share.lead)
                    rolling[key] = rolling.get(key, 0) + size
                    if rolling[key] == 0:
                        del rolling[key]
        return replace(
            self,
            generation=generation,
            active=active,
            fixed=fixed,
            need=need,
            rolling=rolling,
            waiting=waiting,
            claims=shelves,
        )

    def at(self, now: datetime) -> PoolBook:
        """The same claims on the grid of a later slot. Within a slot it is the book itself."""
        grid = grid_at(now)
        if grid.slot == self.grid.slot:
            return self
        width = len(grid)
        blank = replace(
            self,
            grid=grid,
            # Supply is known as of now: until tranches are dated it is the same in every bucket.
            supply=np.full(width, self.supply[0], np.int32),
            active=np.zeros((2, RANKS, width), np.int32),
            fixed=np.zeros((2, RANKS, width), np.int32),
            need=np.zeros((2, width), np.int32),
            rolling={},
            waiting=0,
        )
        return blank._changed((), self.claims, self.claims, self.generation)

    def with_supply(self, supply: int, head_room: int, nodes: Nodes | None) -> PoolBook:
        """What fleet has to sell now."""
        changed = replace(
            self, supply=np.full(len(self.grid), supply, np.int32), head_room=head_room, nodes=nodes
        )
        if (nodes is None) == (self.nodes is None):
            return changed
        # The pool has become one node, or more than one: its claims change sets.
        width = len(self.grid)
        blank = replace(
            changed,
            active=np.zeros((2, RANKS, width), np.int32),
            fixed=np.zeros((2, RANKS, width), np.int32),
            need=np.zeros((2, width), np.int32),
            rolling={},
            waiting=0,
        )
        return blank._changed((), self.claims, self.claims, self.generation)

    def with_firm_shelf(self, devices: int, until: datetime | None) -> PoolBook:
        return replace(self, firm_shelf=devices, firm_shelf_until=until)

    def locks(self, ranks: slice, now: datetime) -> Counts:
        """Per node set, what sales of these ranks lock to their free-by as of `now`."""
        locked: Counts = self.fixed[:, ranks].sum(axis=1, dtype=np.int32)
        low, high, _ = ranks.indices(RANKS)
        for (node_set, rank, lead), size in self.rolling.items():
            if low <= rank < high:
                locked[node_set, : max(self.grid.stop(now + lead), 1)] += size
        return locked

    def held(self, ranks: slice) -> Counts:
        """Per node set, what sales of these ranks hold over their whole intervals."""
        held: Counts = self.active[:, ranks].sum(axis=1, dtype=np.int32)
        return held

    def locked(self, rank: Rank, now: datetime) -> Counts:
        """What a sale of this rank finds locked: equals and higher whole, lower to their free-by."""
        total: Counts = self.held(slice(rank, RANKS)) + self.locks(slice(0, rank), now)
        return _summed(total)

    def owner_need(self) -> Counts:
        """Committed and urgent need: what a recall may be asked for."""
        return _summed(self.need)

    def shelf(self) -> Counts:
        """Per bucket, what the owner has decided to sell beyond what the forecast vouches for."""
        shelf = np.full(len(self.grid), self.firm_shelf, np.int32)
        if self.firm_shelf_until is not None:
            shelf[self.grid.index(self.firm_shelf_until) :] = 0
        return shelf

    def need_against_sales(self, now: datetime) -> Counts:
        """The need that a new sale finds: with head-room, patient waiters, and the firm shelf."""
        need = self.owner_need() + np.int32(self.head_room)
        need[0] += self.waiting
        beyond = self.grid.stop(now + VOUCHED)
        need[beyond:] = np.maximum(need[beyond:], (self.supply - self.shelf())[beyond:])
        return need


def _summed(counts: Counts) -> Counts:
    """Over both node sets."""
    summed: Counts = counts.sum(axis=0, dtype=np.int32)
    return summed
