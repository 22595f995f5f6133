"""Recalls and shortfalls in values, and the table of a recall's states."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import ClassVar

from sublet.base.kernel.errors import Conflict, NotFound
from sublet.base.store import Event

PLAN_VALID = timedelta(seconds=60)
ON_TIME = timedelta(milliseconds=500)
"""A row handed over within this of its date is not late: a loop's step takes its moment."""


class RecallState(StrEnum):
    PLANNED = "planned"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    ACCEPTED = "accepted"
    """Accepted, and no notice given yet: its first one lies ahead."""
    NOTICING = "noticing"
    DRAINING = "draining"
    DELIVERED = "delivered"
    RETURNED = "returned"


_S = RecallState
NEXT: dict[RecallState, frozenset[RecallState]] = {
    _S.PLANNED: frozenset({_S.ACCEPTED, _S.EXPIRED, _S.CANCELLED}),
    _S.ACCEPTED: frozenset({_S.NOTICING, _S.DRAINING, _S.DELIVERED, _S.CANCELLED}),
    _S.NOTICING: frozenset({_S.DRAINING, _S.DELIVERED, _S.CANCELLED}),
    _S.DRAINING: frozenset({_S.DELIVERED, _S.CANCELLED}),
    _S.DELIVERED: frozenset({_S.RETURNED}),
    _S.EXPIRED: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.RETURNED: frozenset(),
}
"""The one table of a recall's states; anything else is refused."""

LIVE = frozenset({_S.ACCEPTED, _S.NOTICING, _S.DRAINING, _S.DELIVERED})


class RowState(StrEnum):
    WAITING = "waiting"
    DELIVERED = "delivered"
    WITHDRAWN = "withdrawn"
    """The recall was cancelled before this row was delivered."""
    RETURNED = "returned"


@dataclass(frozen=True, slots=True, kw_only=True)
class Victim:
    """A workload that a row ends, with what that costs the owner."""

    claim_id: str
    workload_id: str
    organisation_id: str
    devices: int
    notice_at: datetime
    term_at: datetime
    lost_revenue_micros: int
    credit_micros: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallRow:
    """So many devices by that instant. `claim_id`: the first-party claim, once accepted."""

    number: int
    devices: int
    free_by: datetime
    victims: tuple[Victim, ...]
    claim_id: str | None = None
    state: RowState = RowState.WAITING
    delivered_at: datetime | None = None
    device_ids: tuple[str, ...] = ()

    @property
    def is_immediate(self) -> bool:
        """Counted from acceptance: its notice goes out as soon as the plan is accepted."""
        return bool(self.victims)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """What the owner asked back. `devices` × `count` in addition to what first-party holds."""

    id: str
    seq: int
    organisation_id: str
    pool_id: str
    devices: int
    count: int
    by: datetime | None
    until: datetime | None
    state: RecallState
    is_late: bool
    planned_at: datetime
    expires_at: datetime
    accepted_at: datetime | None
    delivered_at: datetime | None
    ended_at: datetime | None
    rows: tuple[RecallRow, ...]
    shortfall_devices: int
    shortfall_earliest_at: datetime | None
    buy_back_micros: int | None
    """What buying the missing devices back would cost, by the contracts in the way."""
    gap_micros: int
    """How far the plan's cost may lie above the best one: 0 where it is proven."""
    version: int

    @property
    def wanted(self) -> int:
        return self.devices * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortfall:
    """Devices that the owner needed and did not get by the date. It stands until met or ended."""

    id: str
    seq: int
    organisation_id: str
    pool_id: str
    devices: int
    recall_id: str | None
    claim_id: str | None
    needed_at: datetime
    earliest_at: datetime | None
    recorded_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class RecallChanged(Event):
    """A recall came into another state, or became late."""

    kind: ClassVar[str] = "owner.recall_changed"
    recall_id: str
    state: str
    is_late: bool


class RecallNotFound(NotFound):
    """There is no such recall: `sublet recall list` shows those there are."""

    code = "recall_not_found"


class PlanStale(Conflict):
    """The plan no longer holds: the new plan is in `details.plan`; accept that one instead."""

    code = "plan_stale"


class PlanExpired(Conflict):
    """A plan is valid for 60 seconds and this one is older: ask for a new plan."""

    code = "plan_expired"


class RecallStateWrong(Conflict):
    """The recall is in a state in which this cannot be done: read it again."""

    code = "recall_state"
