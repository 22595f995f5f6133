"""The owner takes devices back: plan, accept, progress, shortfall."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sublet.base.wire.rest.common import (
    Body,
    Count,
    Identifier,
    Instant,
    Money,
    Shape,
    Whole,
    wrong_field,
)

RecallState = Literal[
    "planned",
    "expired",
    "cancelled",
    "accepted",
    "noticing",
    "draining",
    "delivered",
    "returned",
]


class RecallCreate(Body):
    """`count` units of `devices` devices, by `by`, until `until` (null: until given back).

    `by` null: as soon as notices allow. It is in addition to what first-party work holds.
    Nothing happens until the plan is accepted.
    """

    pool_id: Identifier
    devices: Count = 1
    count: Count
    by: Instant | None = None
    until: Instant | None = None

    @model_validator(mode="after")
    def _in_order(self) -> RecallCreate:
        if self.until is not None and self.by is not None and self.until <= self.by:
            raise wrong_field("until", "must lie after `by`; leave it out: until given back")
        return self


class RecallAccept(Body):
    """`rows` left out: all of the plan."""

    rows: (
        Annotated[list[Annotated[Whole, Field(ge=0)]], Field(min_length=1, max_length=10_000)]
        | None
    ) = None


class RecallVictim(Shape):
    """A workload that a row ends, and what that costs the owner."""

    claim_id: str
    workload_id: str
    organisation_id: str
    devices: int
    notice_at: Instant
    term_at: Instant
    lost_revenue: Money
    credit: Money


class RecallRow(Shape):
    """So many devices by that instant. `claim_id`: the first-party claim, once accepted."""

    number: int
    state: str
    devices: int
    free_by: Instant
    delivered_at: Instant | None
    claim_id: str | None
    device_ids: list[str]
    victims: list[RecallVictim]


class Recall(Shape):
    id: str
    seq: int
    pool_id: str
    devices: int
    count: int
    by: Instant | None
    until: Instant | None
    state: RecallState
    late: bool
    """Against its own schedule."""
    planned_at: Instant
    expires_at: Instant
    accepted_at: Instant | None
    delivered_at: Instant | None
    ended_at: Instant | None
    rows: list[RecallRow]
    shortfall_devices: int
    """What the plan cannot deliver by `by`."""
    shortfall_earliest_at: Instant | None
    buy_back: Money | None
    """What buying the missing devices back would cost."""
    gap: Money
    """How far the plan's cost may lie above the best one."""
    lost_revenue: Money
    credits: Money
    version: int


class Shortfall(Shape):
    """Devices that the owner needed and did not get by the date."""

    id: str
    seq: int
    recall_id: str | None
    claim_id: str | None
    pool_id: str
    devices: int
    needed_at: Instant
    earliest_at: Instant | None
    recorded_at: Instant
    ended_at: Instant | None
