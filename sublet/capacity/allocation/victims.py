"""Whom to choose: whole workloads that together free enough, and not one too many.

Rungs come first: rank, then notice. A rung is asked only for what quicker rungs cannot free. Within
a rung the cheapest set is chosen: what is lost in revenue and credited, then fewer devices, then
fewer workloads. Small choices are exact (a dynamic programme); large ones are greedy on cost per
freed device, with redundant picks dropped and one swap pass, and the gap to a bound is told.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from fractions import Fraction

from sublet.base.kernel.interval import micros_since_epoch
from sublet.base.kernel.money import round_half_even
from sublet.capacity.allocation.model import Claim

EXACT_CELLS = 200_000
"""Candidates × devices up to which the dynamic programme runs: a tenth of a second."""
LOSS_HORIZON = timedelta(hours=24)
"""What a claim without end is taken to have earned yet, at most."""
HOUR_US = 3_600_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One workload that can be ended, and what that costs."""

    claim_id: str
    organisation_id: str
    size: int
    rung: tuple[int, int]
    lost_revenue_micros: int = 0
    credit_micros: int = 0

    @property
    def cost_micros(self) -> int:
        return self.lost_revenue_micros + self.credit_micros


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Who goes. `bound_micros` is what no choice can cost less than; `is_exact` means proven."""

    picked: tuple[Candidate, ...]
    cost_micros: int
    bound_micros: int
    is_exact: bool
    spread_micros: int = 0
    """What sparing an organisation that lost too much costs beyond the cheapest choice."""


def candidate_of(
    claim: Claim,
    *,
    notice_at: datetime,
    free_by: datetime,
    size: int,
    until: datetime | None = None,
) -> Candidate:
    """The price of ending a claim: revenue up to its own end or `until`, and the credit due."""
    term_at = free_by - timedelta(seconds=claim.release.stop_seconds)
    ends = [at for at in (claim.release.ends_at, until) if at is not None]
    lost_until = min([*ends, term_at + LOSS_HORIZON])
    lost = _amount(claim.value_micros_per_device_hour, claim.size, term_at, lost_until)
    credit = 0
    displacement = claim.release.displacement
    if claim.opened_at is not None:
        for window in displacement.free_windows(claim.opened_at, notice_at, term_at):
            assert window.end is not None
            rate = displacement.micros_per_device_hour
            credit += _amount(rate, claim.size, window.start, window.end)
    return Candidate(
        claim_id=claim.id,
        organisation_id=claim.organisation_id,
        size=size,
        rung=claim.rung,
        lost_revenue_micros=lost,
        credit_micros=credit,
    )


def _amount(micros_per_hour: int, devices: int, start: datetime, end: datetime) -> int:
    lasting = max(micros_since_epoch(end) - micros_since_epoch(start), 0)
    return round_half_even(Fraction(micros_per_hour * devices * lasting, HOUR_US))


def choose(
    candidates: Iterable[Candidate],
    need: int,
    *,
    evictable: Mapping[str, int] | None = None,
) -> Choice | None:
    """The victims for `need` devices, none of them redundant; None if all together are too few.

    `evictable`: devices by organisation, for the spread.
    """
    pool = sorted(candidates, key=lambda c: (c.rung, c.claim_id))
    if need <= 0:
        return Choice(picked=(), cost_micros=0, bound_micros=0, is_exact=True)
    if sum(c.size for c in pool) < need:
        return None
    pool = _rungs_needed(pool, need)
    weights = _weights(pool)
    is_exact = len(pool) * need <= EXACT_CELLS
    picked = _exact(pool, weights, need) if is_exact else _greedy(pool, weights, need)
    cost = sum(c.cost_micros for c in picked)
    bound = cost if is_exact else _bound(pool, need)
    spread = 0
    if evictable:
        evened = _evened(picked, pool, need, evictable)
        spread = sum(c.cost_micros for c in evened) - cost
        picked, cost = evened, cost + spread
    return Choice(
        picked=tuple(sorted(picked, key=lambda c: (c.rung, c.claim_id))),
        cost_micros=cost,
        bound_micros=min(bound, cost),
        is_exact=is_exact,
        spread_micros=spread,
    )


def _rungs_needed(pool: Sequence[Candidate], need: int) -> list[Candidate]:
    """The quickest rungs that together suffice: slower ones are not asked at all."""
    kept: list[Candidate] = []
    freed = 0
    for candidate in pool:
        if freed >= need and candidate.rung != kept[-1].rung:
            break
        kept.append(candidate)
        freed += candidate.size
    return kept


def _weights(pool: Sequence[Candidate]) -> dict[str, int]:
    """One integer per candidate that orders sets as the page above says.

    Cost, then devices, then one each; a slower rung outweighs all of the quicker ones together.
    """
    devices = sum(c.size for c in pool) + 1
    one = len(pool) + 1
    plain = {c.claim_id: (c.cost_micros * devices + c.size) * one + 1 for c in pool}
    step = sum(plain.values()) + 1
    rungs = {rung: place for place, rung in enumerate(sorted({c.rung for c in pool}))}
    return {c.claim_id: plain[c.claim_id] * step ** rungs[c.rung] for c in pool}


def _exact(pool: Sequence[Candidate], weights: Mapping[str, int], need: int) -> list[Candidate]:
    """The cover of least weight: best[n] is that of the first candidates for n devices."""
    best: list[int | None] = [0] + [None] * need
    taken: list[bytearray] = []
    for candidate in pool:
        weight, size = weights[candidate.claim_id], candidate.size
        took = bytearray(need + 1)
        for n in range(need, 0, -1):
            before = best[max(n - size, 0)]
            if before is None:
                continue
            here = best[n]
            if here is None or before + weight < here:
                best[n] = before + weight
                took[n] = 1
        taken.append(took)
    picked = []
    n = need
    for place in range(len(pool) - 1, -1, -1):
        if n > 0 and taken[place][n]:
            picked.append(pool[place])
            n = max(n - pool[place].size, 0)
    assert n == 0
    return picked


def _greedy(pool: Sequence[Candidate], weights: Mapping[str, int], need: int) -> list[Candidate]:
    by_price = sorted(
        pool, key=lambda c: (c.rung, Fraction(weights[c.claim_id], c.size), c.claim_id)
    )
    picked: list[Candidate] = []
    freed = 0
    for candidate in by_price:
        if freed >= need:
            break
        picked.append(candidate)
        freed += candidate.size
    picked = _without_redundant(picked, weights, need)
    return _without_redundant(_swapped(picked, by_price, weights, need), weights, need)


def _without_redundant(
    picked: Sequence[Candidate], weights: Mapping[str, int], need: int
) -> list[Candidate]:
    """Drop, the dearest first, whoever the rest can do without."""
    kept = list(picked)
    freed = sum(c.size for c in kept)
    for candidate in sorted(picked, key=lambda c: (-weights[c.claim_id], c.claim_id)):
        if freed - candidate.size >= need:
            kept.remove(candidate)
            freed -= candidate.size
    return kept


def _swapped(
    picked: Sequence[Candidate],
    by_price: Sequence[Candidate],
    weights: Mapping[str, int],
    need: int,
) -> list[Candidate]:
    """One pass: the dearest picks give way to a single candidate that does it for less."""
    kept = list(picked)
    chosen = {c.claim_id for c in kept}
    spare = sum(c.size for c in kept) - need
    # For each size the lightest free candidate of at least that size.
    free = sorted(
        (c for c in by_price if c.claim_id not in chosen), key=lambda c: weights[c.claim_id]
    )
    for victim in sorted(picked, key=lambda c: -weights[c.claim_id]):
        for other in free[:64]:
            if weights[other.claim_id] >= weights[victim.claim_id]:
                break
            if other.size >= victim.size - spare:
                kept[kept.index(victim)] = other
                free.remove(other)
                spare += other.size - victim.size
                break
    return kept


def _bound(pool: Sequence[Candidate], need: int) -> int:
    """No cover costs less than this: the cheapest devices, the last workload cut to size."""
    missing = need
    total = Fraction(0)
    for candidate in sorted(pool, key=lambda c: Fraction(c.cost_micros, c.size)):
        used = min(candidate.size, missing)
        total += Fraction(candidate.cost_micros * used, candidate.size)
        missing -= used
        if missing == 0:
            break
    return int(total)


def _evened(
    picked: Sequence[Candidate],
    pool: Sequence[Candidate],
    need: int,
    evictable: Mapping[str, int],
) -> list[Candidate]:
    """Spare whoever loses more than half while another organisation loses none.

    Soft: a pick is exchanged for one of the same rung of an organisation that has lost nothing,
    never for more notice, never leaving the need uncovered or a pick redundant.
    """
    kept = list(picked)
    for _ in range(len(picked)):
        lost: dict[str, int] = {}
        for candidate in kept:
            lost[candidate.organisation_id] = (
                lost.get(candidate.organisation_id, 0) + candidate.size
            )
        exchange = _exchange(kept, pool, need, lost, evictable)
        if exchange is None:
            break
        out, into = exchange
        kept[kept.index(out)] = into
    return kept


def _exchange(
    kept: Sequence[Candidate],
    pool: Sequence[Candidate],
    need: int,
    lost: Mapping[str, int],
    evictable: Mapping[str, int],
) -> tuple[Candidate, Candidate] | None:
    freed = sum(c.size for c in kept)
    smallest = min(c.size for c in kept)
    for out in sorted(kept, key=lambda c: (-c.cost_micros, c.claim_id)):
        organisation = out.organisation_id
        if 2 * lost[organisation] <= evictable.get(organisation, 0):
            continue
        for into in sorted(pool, key=lambda c: (c.cost_micros, c.size, c.claim_id)):
            if into.rung != out.rung or into.organisation_id in lost:
                continue
            if 2 * into.size > evictable.get(into.organisation_id, 0):
                continue
            after = freed - out.size + into.size
            least = min(into.size, smallest)
            if after >= need and after - least < need:
                return out, into
    return None
