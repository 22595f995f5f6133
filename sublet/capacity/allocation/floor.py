"""The floor of a pool: its devices node by node, and in whose hands each is now. Pure.

A floor is made from the fleet's roster and the placements that are open at the top level. A
change makes a new floor that shares all nodes but those it touches.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from sublet.capacity.allocation.book import Counts, Nodes
from sublet.capacity.allocation.model import Claim
from sublet.capacity.allocation.place import FIRST_PARTY_RUNG, NodeView, Rung, Slot
from sublet.capacity.allocation.store import Placement
from sublet.capacity.fleet import Roster


@dataclass(frozen=True, slots=True)
class Spot:
    """One device of a node, sellable or not, and who holds it."""

    device_id: str
    is_sellable: bool
    claim_id: str | None = None
    rung: Rung | None = None
    is_fraction: bool = False
    """Held by a claim that shares the node with others."""


@dataclass(frozen=True, slots=True)
class Ground:
    """One node: all its devices, and its sellable ones as placement sees them."""

    spots: tuple[Spot, ...]
    view: NodeView
    has_fraction: bool

    @classmethod
    def of(cls, node_id: str, spots: tuple[Spot, ...], *, largest: int) -> Ground:
        slots = tuple(Slot(device_id=s.device_id, rung=s.rung) for s in spots if s.is_sellable)
        return cls(
            spots=spots,
            view=NodeView(node_id=node_id, slots=slots, is_whole=len(slots) == largest),
            has_fraction=any(spot.is_fraction for spot in spots),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """`unbound`: claims of the book, not inside another, that stand nowhere yet."""

    edition: str
    """Of the roster: with another one the floor is made anew."""
    grounds: Mapping[str, Ground]
    """By node, in the order of their ids."""
    node_of: Mapping[str, str]
    """Device → node."""
    largest: int
    """Sellable devices of an undamaged node."""
    unbound: frozenset[str]

    @classmethod
    def of(cls, roster: Roster, claims: Iterable[Claim], placements: Iterable[Placement]) -> Floor:
        """The floor as the rows have it."""
        known = {claim.id: claim for claim in claims}
        held = {row.device_id: row.claim_id for row in placements if row.level == 0}
        sellable = {device.id for device in roster.sellable}
        spots: dict[str, list[Spot]] = {}
        for device in roster.devices:
            is_sellable = device.id in sellable
            holder = held.get(device.id)
            spot = Spot(device.id, is_sellable)
            if holder is not None:
                spot = _held(spot, holder, known.get(holder))
            spots.setdefault(device.node_id, []).append(spot)
        largest = max((sum(s.is_sellable for s in found) for found in spots.values()), default=0)
        bound = set(held.values())
        return cls(
            edition=roster.edition,
            grounds={
                node_id: Ground.of(node_id, tuple(spots[node_id]), largest=largest)
                for node_id in sorted(spots)
            },
            node_of={device.id: device.node_id for device in roster.devices},
            largest=largest,
            unbound=frozenset(
                c.id for c in known.values() if c.parent_claim_id is None and c.id not in bound
            ),
        )

    def with_placements(self, claims: Collection[Claim], placements: Iterable[Placement]) -> Floor:
        """With these claims as they are now; `placements` are all theirs, ended ones too."""
        changed = {claim.id: claim for claim in claims}
        rows = [row for row in placements if row.level == 0]
        open_rows = {row.device_id: row.claim_id for row in rows if row.ends_at is None}
        grounds = dict(self.grounds)
        for node_id in {row.node_id for row in rows}:
            spots = tuple(
                _now(spot, changed, open_rows.get(spot.device_id))
                for spot in grounds[node_id].spots
            )
            grounds[node_id] = Ground.of(node_id, spots, largest=self.largest)
        bound = set(open_rows.values())
        waiting = {
            claim.id
            for claim in claims
            if claim.released_at is None and claim.parent_claim_id is None and claim.id not in bound
        }
        return replace(self, grounds=grounds, unbound=(self.unbound - changed.keys()) | waiting)

    @property
    def views(self) -> list[NodeView]:
        """Nodes that have something to sell."""
        return [ground.view for ground in self.grounds.values() if ground.view.slots]

    def nodes(self, *, unbound_whole: int) -> Nodes | None:
        """The nodes as columns; None where there is no more than one."""
        views = self.views
        if len(views) < 2:
            return None
        devices: Counts = np.array([len(view.slots) for view in views], np.int32)
        return Nodes(
            size=self.largest,
            devices=devices,
            free=np.array([view.free for view in views], np.int32),
            fractions=sum(ground.has_fraction for ground in self.grounds.values()),
            unbound_whole=unbound_whole,
        )


def rung_of(claim: Claim) -> Rung:
    return claim.rung if claim.is_sale else FIRST_PARTY_RUNG


def _now(spot: Spot, changed: Mapping[str, Claim], holder: str | None) -> Spot:
    if holder is not None:
        return _held(spot, holder, changed[holder])
    return _free(spot) if spot.claim_id in changed else spot


def _held(spot: Spot, holder: str, claim: Claim | None) -> Spot:
    return replace(
        spot,
        claim_id=holder,
        rung=FIRST_PARTY_RUNG if claim is None else rung_of(claim),
        is_fraction=claim is not None and not claim.whole_node,
    )


def _free(spot: Spot) -> Spot:
    return replace(spot, claim_id=None, rung=None, is_fraction=False)
