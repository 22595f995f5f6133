"""What the owner can have back, by when, and whom it costs: plans, as pure decisions.

A plan uses exact instants, not the grid. Idle devices come first, then what frees by itself, then
whole workloads, each noticed at the last moment that still frees it in time. A claim under notice
counts as freed at its free-by and is never chosen again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
from numpy.typing import NDArray

from sublet.capacity.allocation.book import PoolBook
from sublet.capacity.allocation.grid import SLOT, slot_of
from sublet.capacity.allocation.model import (
    LATE_CHECK,
    WITHDRAWN_REST,
    Claim,
    Urgency,
    earliest_term_at,
)
from sublet.capacity.allocation.victims import Candidate, Choice, candidate_of, choose

LATE_STEPS = 64
"""Past this many distinct late instants a plan rounds them up to five minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """One workload that a row ends, and what that costs."""

    claim_id: str
    holder: str
    organisation_id: str
    devices: int
    notice_at: datetime
    term_at: datetime
    free_by: datetime
    lost_revenue_micros: int
    credit_micros: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """So many devices by an instant. Without victims they are idle, or free by themselves."""

    devices: int
    free_by: datetime
    notice_at: datetime | None = None
    term_at: datetime | None = None
    victims: tuple[Victim, ...] = ()

    @property
    def lost_revenue_micros(self) -> int:
        return sum(victim.lost_revenue_micros for victim in self.victims)

    @property
    def credit_micros(self) -> int:
        return sum(victim.credit_micros for victim in self.victims)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuyBack:
    """Devices that no notice frees: offer their holder a price, or have them at `free_by`."""

    claim_id: str
    holder: str
    organisation_id: str
    devices: int
    free_by: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanShortfall:
    """What cannot be had in time.

    `rows` say when it can: by notice given now, or at an end. `earliest_at` is the first of them,
    `complete_at` when all of it is there; None: never by itself.
    """

    devices: int
    earliest_at: datetime | None
    complete_at: datetime | None
    rows: tuple[Row, ...]
    buy_back: tuple[BuyBack, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer to "so many devices by then". `generation` is the book it was made on."""

    pool_id: str
    generation: int
    devices: int
    by: datetime
    until: datetime | None
    planned_at: datetime
    rows: tuple[Row, ...]
    shortfall: PlanShortfall | None
    cost_micros: int
    bound_micros: int
    is_exact: bool
    spread_micros: int

    @property
    def delivered(self) -> int:
        """Devices that come in time."""
        return sum(row.devices for row in self.rows)


def plan(
    book: PoolBook,
    deficit: int,
    by: datetime,
    *,
    now: datetime,
    until: datetime | None = None,
    whole_node: bool = False,
    pledged: Mapping[str, datetime] | None = None,
) -> Plan:
    """How the owner can have `deficit` devices from `by` to `until`, beyond what it holds.

    `pledged`: claims that accepted recalls will end, with their free-by: they count as freed then
    and are not chosen again. With `whole_node`, in a pool of many nodes, only devices that make
    up whole nodes count.
    """
    by = max(by, now)
    supply = _Supply(book, now=now, by=by, until=until, whole_node=whole_node, pledged=pledged)
    target = min(deficit, supply.reachable(by))
    choices: list[Choice] = []
    if target > 0:
        choices = supply.take(target, by)
    rows = supply.rows(max(target, 0), by)
    shortfall = None
    if target < deficit:
        shortfall = _shortfall(supply, deficit, max(target, 0), by)
    return Plan(
        pool_id=book.pool_id,
        generation=book.generation,
        devices=deficit,
        by=by,
        until=until,
        planned_at=now,
        rows=rows,
        shortfall=shortfall,
        cost_micros=sum(row.lost_revenue_micros + row.credit_micros for row in rows),
        bound_micros=sum(choice.bound_micros for choice in choices),
        is_exact=all(choice.is_exact for choice in choices),
        spread_micros=sum(choice.spread_micros for choice in choices),
    )


def still_holds(book: PoolBook, row: Row, *, now: datetime) -> bool:
    """Whether the row can still be kept: its victims are there, unnoticed, and can go in time."""
    for victim in row.victims:
        claim = book.find(victim.claim_id)
        if claim is None or claim.is_fixed or claim.size != victim.devices:
            return False
        option = _option(claim, victim.free_by, now)
        if option is None or option.free_by > victim.free_by:
            return False
    return True


@dataclass(frozen=True, slots=True)
class _Option:
    """How one claim can be ended by an instant."""

    notice_at: datetime
    term_at: datetime
    free_by: datetime


def _option(claim: Claim, by: datetime, now: datetime) -> _Option | None:
    """The last moment to notice it so that it is free by then; None if that has passed."""
    release = claim.release
    if claim.is_fixed or release.notice_seconds is None:
        return None
    stop = timedelta(seconds=release.stop_seconds)
    first = now if claim.withdrawn_at is None else max(now, claim.withdrawn_at + WITHDRAWN_REST)
    unopened_firm = claim.opened_at is None and release.firm_seconds > 0
    if not unopened_firm:
        notice_at = by - stop - timedelta(seconds=release.notice_seconds)
        firm = claim.opened_at or claim.starts_at
        is_firm_over = firm + timedelta(seconds=release.firm_seconds) <= by - stop
        if notice_at >= first and is_firm_over:
            return _Option(notice_at, by - stop, by)
    if claim.opened_at is None and max(first, claim.starts_at) + stop <= by:
        # Nothing runs yet: it may be ended without notice, so now, before it begins to.
        return _Option(first, first, first + stop)
    return None


def _earliest(claim: Claim, now: datetime) -> datetime:
    """The first instant at which notice can free it."""
    first = now if claim.withdrawn_at is None else max(now, claim.withdrawn_at + WITHDRAWN_REST)
    return earliest_term_at(claim, first) + timedelta(seconds=claim.release.stop_seconds)


class _Supply:
    """What the owner could have at each instant, and the claims that could make it more."""

    def __init__(
        self,
        book: PoolBook,
        *,
        now: datetime,
        by: datetime,
        until: datetime | None,
        whole_node: bool,
        pledged: Mapping[str, datetime] | None,
    ) -> None:
        self.now = now
        self.until = until
        self.picked: dict[str, _Option] = {}
        self._candidates: dict[str, Candidate] = {}
        nodes = book.nodes
        by_node = whole_node and nodes is not None
        if by_node:
            assert nodes is not None
            supply = (nodes.whole - nodes.fractions) * nodes.size
        else:
            supply = int(book.supply[0])
        pledged = pledged or {}
        self.holding: list[tuple[Claim, datetime, datetime | None]] = []
        for claim in sorted(book.claims, key=lambda c: c.id):
            if claim.parent_claim_id is not None or (by_node and not claim.whole_node):
                continue
            if claim.urgency is Urgency.PATIENT and claim.opened_at is None:
                continue
            start, end = max(claim.starts_at, now), claim.held_until()
            if claim.id in pledged:
                end = pledged[claim.id] if end is None else min(end, pledged[claim.id])
            if end is not None and end <= now:
                end = now + LATE_CHECK
            if until is None or start < until:
                self.holding.append((claim, start, end))
        self.able = {
            claim.id: (claim, start, end)
            for claim, start, end in self.holding
            if claim.is_sale
            and not claim.is_fixed
            and claim.id not in pledged
            and claim.release.notice_seconds is not None
        }
        self.evictable: dict[str, int] = {}
        for claim, _, _ in self.able.values():
            organisation = claim.organisation_id
            self.evictable[organisation] = self.evictable.get(organisation, 0) + claim.size
        self.late = self._late_instants(by)
        # A claim that ends at once without notice is free at an instant of its own.
        sudden = {
            option.free_by
            for at in (by, *self.late)
            for claim, _, _ in self.able.values()
            if claim.opened_at is None and (option := _option(claim, at, now)) is not None
        }
        edges = {now, by, *self.late, *sudden}
        for _, start, end in self.holding:
            edges.add(start)
            if end is not None:
                edges.add(end)
        self.times = sorted(at for at in edges if until is None or at < until)
        if not self.times:
            self.times = [now]
        self.place = {at: i for i, at in enumerate(self.times)}
        change = np.zeros(len(self.times) + 1, np.int64)
        for claim, start, end in self.holding:
            change[self.place[start]] -= claim.size
            if end is not None and end in self.place:
                change[self.place[end]] += claim.size
        self.free = np.cumsum(change)[:-1] + supply

    def _late_instants(self, by: datetime) -> list[datetime]:
        found = {at for c, _, _ in self.able.values() if (at := _earliest(c, self.now)) > by}
        found |= {end for _, _, end in self.holding if end is not None and end > by}
        if len(found) > LATE_STEPS:
            found = {slot_of(at) + SLOT for at in found}
        return sorted(found)

    def _extent(self, claim_id: str, free_by: datetime) -> slice:
        """The instants at which ending this claim gives something: up to where it ends anyway."""
        _, start, end = self.able[claim_id]
        first = self.place.get(max(start, free_by), len(self.times))
        return slice(
            first, len(self.times) if end is None else self.place.get(end, len(self.times))
        )

    def _options(self, by: datetime) -> dict[str, _Option]:
        options = {}
        for claim_id, (claim, _, _) in self.able.items():
            if claim_id in self.picked:
                continue
            option = _option(claim, by, self.now)
            if option is not None:
                options[claim_id] = option
        return options

    def reachable(self, by: datetime) -> int:
        """The most that can be had from `by` on, for good."""
        if by not in self.place:
            return 0
        free = self.free.copy()
        for claim_id, option in self._options(by).items():
            extent = self._extent(claim_id, option.free_by)
            free[extent] += self.able[claim_id][0].size
        return int(free[self.place[by] :].min())

    def take(self, target: int, by: datetime) -> list[Choice]:
        """Pick victims until `target` devices are there from `by` on. It must be reachable."""
        choices = []
        before = set(self.picked)
        first = self.place[by]
        options = self._options(by)
        while True:
            missing = target - self.free[first:]
            worst = int(np.argmax(missing))
            if missing[worst] <= 0:
                break
            at = first + worst
            pool = [
                self._candidate(claim_id, option)
                for claim_id, option in options.items()
                if claim_id not in self.picked and self._covers(claim_id, option, at)
            ]
            choice = choose(pool, int(missing[worst]), evictable=self.evictable)
            assert choice is not None, "a reachable target is reached"
            for candidate in choice.picked:
                self._pick(candidate.claim_id, options[candidate.claim_id])
            choices.append(choice)
        if len(choices) > 1:
            self._drop_redundant(set(self.picked) - before, target, first)
        return choices

    def _covers(self, claim_id: str, option: _Option, at: int) -> bool:
        extent = self._extent(claim_id, option.free_by)
        return bool(extent.start <= at < extent.stop)

    def _candidate(self, claim_id: str, option: _Option) -> Candidate:
        claim = self.able[claim_id][0]
        candidate = candidate_of(
            claim,
            notice_at=option.notice_at,
            free_by=option.free_by,
            size=claim.size,
            until=self.until,
        )
        self._candidates[claim_id] = candidate
        return candidate

    def _pick(self, claim_id: str, option: _Option) -> None:
        self.picked[claim_id] = option
        self.free[self._extent(claim_id, option.free_by)] += self.able[claim_id][0].size

    def _drop_redundant(self, picked: Collection[str], target: int, first: int) -> None:
        """Choices for several instants may overlap: whoever the others can do without stays."""
        order = sorted(
            picked,
            key=lambda i: (
                self._candidates[i].rung,
                self._candidates[i].cost_micros,
                self._candidates[i].size,
                i,
            ),
            reverse=True,
        )
        for claim_id in order:
            extent = self._extent(claim_id, self.picked[claim_id].free_by)
            free = self.free.copy()
            free[extent] -= self.able[claim_id][0].size
            if int(free[first:].min()) >= target:
                self.free = free
                del self.picked[claim_id]

    def rows(self, target: int, by: datetime) -> tuple[Row, ...]:
        """What the picks and time itself deliver up to `by`, in order of time.

        Victims of one notice go together. A row counts only what lasts without the victims of
        later rows, so that it holds alone; who gives nothing by itself yet stands in the row that
        lasts because of it.
        """
        coming: dict[tuple[int, datetime], list[str]] = {}
        free = self.free.copy()
        for claim_id, option in sorted(self.picked.items()):
            free[self._extent(claim_id, option.free_by)] -= self.able[claim_id][0].size
            coming.setdefault((self.place[option.free_by], option.notice_at), []).append(claim_id)
        rows: list[Row] = []
        have = 0
        waiting: list[Victim] = []
        for i, at in enumerate(self.times):
            if at > by:
                break
            # First what comes by itself, then one notice after the other.
            notices = sorted(notice_at for place, notice_at in coming if place == i)
            for group in ([], *(coming[i, notice_at] for notice_at in notices)):
                for claim_id in group:
                    option = self.picked[claim_id]
                    free[self._extent(claim_id, option.free_by)] += self.able[claim_id][0].size
                    waiting.append(self._victim(claim_id, option))
                gained = min(int(_lasting(free)[i]), target) - have
                if gained > 0:
                    rows.append(_row(gained, at, waiting))
                    have += gained
                    waiting = []
        assert not waiting, "no victim leaves for nothing"
        return tuple(rows)

    def _victim(self, claim_id: str, option: _Option) -> Victim:
        claim = self.able[claim_id][0]
        candidate = self._candidates[claim_id]
        return Victim(
            claim_id=claim.id,
            holder=claim.holder,
            organisation_id=claim.organisation_id,
            devices=claim.size,
            notice_at=option.notice_at,
            term_at=option.term_at,
            free_by=option.free_by,
            lost_revenue_micros=candidate.lost_revenue_micros,
            credit_micros=candidate.credit_micros,
        )


def _lasting(free: NDArray[np.int64]) -> NDArray[np.int64]:
    """At each instant, what is free from there on for good."""
    return np.minimum.accumulate(free[::-1])[::-1]


def _row(devices: int, free_by: datetime, victims: Sequence[Victim]) -> Row:
    return Row(
        devices=devices,
        free_by=free_by,
        notice_at=min((victim.notice_at for victim in victims), default=None),
        term_at=min((victim.term_at for victim in victims), default=None),
        victims=tuple(sorted(victims, key=lambda victim: victim.claim_id)),
    )


def _shortfall(supply: _Supply, deficit: int, have: int, by: datetime) -> PlanShortfall:
    """When the rest can be had: by notice given now, or as things end; and what could be bought."""
    missing = deficit - have
    last = by
    for at in supply.late:
        if have >= deficit or at not in supply.place:
            break
        target = min(deficit, supply.reachable(at))
        if target <= have:
            continue
        supply.take(target, at)
        have, last = target, at
    rows = [row for row in supply.rows(have, last) if row.free_by > by]
    buy_back = tuple(
        BuyBack(
            claim_id=claim.id,
            holder=claim.holder,
            organisation_id=claim.organisation_id,
            devices=claim.size,
            free_by=end,
        )
        for claim, start, end in supply.holding
        if claim.is_sale
        and not claim.is_fixed
        and claim.release.notice_seconds is None
        and end is not None
        and start <= supply.now
    )
    return PlanShortfall(
        devices=missing,
        earliest_at=rows[0].free_by if rows else None,
        complete_at=rows[-1].free_by if rows and have >= deficit else None,
        rows=tuple(rows),
        buy_back=buy_back,
    )


def curve(book: PoolBook, now: datetime) -> list[tuple[int, int]]:
    """Excess as a curve: (n, the devices that the owner could have n seconds after asking now)."""
    leads = {0}
    for claim in book.claims:
        if claim.is_sale and not claim.is_fixed and claim.release.notice_seconds is not None:
            lasting = _earliest(claim, now) - now
            leads.add(-(-lasting // timedelta(seconds=1)))
    points = []
    for lead in sorted(leads):
        by = now + timedelta(seconds=lead)
        supply = _Supply(book, now=now, by=by, until=None, whole_node=False, pledged=None)
        points.append((lead, max(supply.reachable(by), 0)))
    return points
