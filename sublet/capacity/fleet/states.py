"""The states of a node and the judgement of what was seen of a device. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Literal

LOOKS_TO_DOWN = 3
TIME_TO_DOWN = timedelta(minutes=1)
"""A device is down when it was missed in three looks or more that span a minute or more."""
START_FAILURES_TO_TRIAGE = 3


class NodeState(StrEnum):
    ONBOARD = "onboard"
    BURN_IN = "burn_in"
    PRODUCTION = "production"
    CORDONED = "cordoned"
    """What runs goes on; nothing new starts."""
    DRAINING = "draining"
    """What runs is being ended, each by its own notice."""
    SCRUBBING = "scrubbing"
    TRIAGE = "triage"
    REPAIR = "repair"


TRANSITIONS: Mapping[NodeState, frozenset[NodeState]] = {
    NodeState.ONBOARD: frozenset({NodeState.BURN_IN}),
    NodeState.BURN_IN: frozenset({NodeState.PRODUCTION, NodeState.TRIAGE}),
    NodeState.PRODUCTION: frozenset({NodeState.CORDONED, NodeState.TRIAGE}),
    NodeState.CORDONED: frozenset({NodeState.PRODUCTION, NodeState.DRAINING, NodeState.TRIAGE}),
    # A drain may be called off as long as nothing was scrubbed.
    NodeState.DRAINING: frozenset({NodeState.SCRUBBING, NodeState.CORDONED, NodeState.TRIAGE}),
    NodeState.SCRUBBING: frozenset({NodeState.TRIAGE}),
    NodeState.TRIAGE: frozenset({NodeState.REPAIR}),
    NodeState.REPAIR: frozenset({NodeState.ONBOARD}),
}

OUT_OF_SERVICE = frozenset({NodeState.TRIAGE, NodeState.REPAIR})
"""From triage on the devices are down: nobody pays for that time."""
PREPARING = frozenset({NodeState.ONBOARD, NodeState.BURN_IN, NodeState.SCRUBBING})

RestingUse = Literal["down", "overhead", "idle"]


def reachable_states(state: NodeState) -> tuple[NodeState, ...]:
    """Where a node may go from here, in the order of the enum."""
    return tuple(s for s in NodeState if s in TRANSITIONS[state])


def use_at_rest(state: NodeState, *, healthy: bool) -> RestingUse:
    """What the time of a device is when nobody holds it."""
    if not healthy or state in OUT_OF_SERVICE:
        return "down"
    return "overhead" if state in PREPARING else "idle"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What is remembered of a device between looks."""

    healthy: bool
    misses: int
    missed_since: datetime | None


def judge(sight: Sight, *, seen_well: bool, now: datetime) -> Sight:
    """One look at a device. It goes down only after three looks and a minute, up with one."""
    if seen_well:
        return Sight(healthy=True, misses=0, missed_since=None)
    since = sight.missed_since or now
    misses = sight.misses + 1
    is_gone = misses >= LOOKS_TO_DOWN and now - since >= TIME_TO_DOWN
    return Sight(healthy=sight.healthy and not is_gone, misses=misses, missed_since=since)
