"""What the book of capacity is made of: claims, their releases, decisions, events, errors."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import IntEnum, StrEnum
from typing import ClassVar

from sublet.base.kernel.errors import Conflict, NotFound
from sublet.base.kernel.interval import Interval
from sublet.base.store import Event

HOUR = timedelta(hours=1)
WITHDRAWN_REST = timedelta(minutes=10)
"""A withdrawn notice is not given again for this long."""
NOTICE_SLACK = timedelta(seconds=2)
"""A pinned claim is told this much before its last moment, so that its end need not move."""
LATE_CHECK = timedelta(seconds=120)
"""What is past its free-by and not released yet is expected within the limit of the check."""


class Rank(IntEnum):
    """Who displaces whom among sales: only a lower rank, and equals never."""

    FILLER = 0
    SPOT = 1
    ON_DEMAND = 2
    RESERVATION = 3
    BLOCK = 4
    LEASE = 5


class Party(StrEnum):
    SALE = "sale"
    FIRST_PARTY = "first_party"


class Urgency(StrEnum):
    COMMITTED = "committed"
    URGENT = "urgent"
    PATIENT = "patient"
    """Waits for what frees by itself: it triggers no recall."""


class RefusalReason(StrEnum):
    SOLD = "sold"
    """Sales of equal or higher rank hold it."""
    OWNER_NEED = "owner_need"
    """The owner needs it, or keeps it as head-room."""
    FIRM_SHELF = "firm_shelf"
    """The owner has not decided to sell this much for so long."""
    NODES = "nodes"
    """Enough devices are free, but not together on one node, or not as whole nodes."""
    OUT_OF_SERVICE = "out_of_service"
    """The pool has this much, but too much of it is out of service now: a node taken out of
    production, a device that is down."""
    TOO_LARGE = "too_large"
    """The pool never has this much."""


class DisplacementRule(StrEnum):
    NONE = "none"
    YOUNG_RUN = "young_run"
    RUNNING_HOUR = "running_hour"


@dataclass(frozen=True, slots=True, kw_only=True)
class Displacement:
    """Which part of a run is free when the owner's side ends it. The market writes it.

    `young_run`: all of it, if t0 falls less than `younger_than_seconds` after the opening.
    `running_hour`: the hour running at t0, counted from the meter's opening.
    """

    rule: DisplacementRule = DisplacementRule.NONE
    younger_than_seconds: int = 0
    micros_per_device_hour: int = 0

    def free_windows(
        self, opened_at: datetime, t0: datetime, closed_at: datetime
    ) -> tuple[Interval, ...]:
        """The windows of `[opened_at, closed_at)` that become free by an end noticed at `t0`."""
        if closed_at <= opened_at or self.rule is DisplacementRule.NONE:
            return ()
        if self.rule is DisplacementRule.YOUNG_RUN:
            is_young = t0 < opened_at + timedelta(seconds=self.younger_than_seconds)
            return (Interval(opened_at, closed_at),) if is_young else ()
        running = max((t0 - opened_at) // HOUR, 0)
        start = opened_at + running * HOUR
        end = min(start + HOUR, closed_at)
        return (Interval(start, end),) if start < end else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """When the devices can be had back: an end, or a notice, or both; never neither."""

    ends_at: datetime | None = None
    notice_seconds: int | None = None
    firm_seconds: int = 0
    """Not ended by notice before the meter's opening + this."""
    stop_seconds: int = 0
    """From SIGTERM to a clean device: the grace and the pool's scrub."""
    displacement: Displacement = field(default_factory=Displacement)

    def __post_init__(self) -> None:
        if self.ends_at is None and self.notice_seconds is None:
            raise ValueError("a claim needs a release: an end, or a notice, or both")
        if (self.notice_seconds or 0) < 0 or self.firm_seconds < 0 or self.stop_seconds < 0:
            raise ValueError("a release counts forward in time")


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Somebody's right to `count` units of `devices` devices, from `starts_at` to its release.

    `noticed_at` is t0. A claim with `term_at` and no `noticed_at` is pinned: it ends then at the
    latest, and gets its notice at the last responsible moment. `opened_at` is the opening of
    its meter: firm time counts from there, and before it the run ends unbilled, without notice.
    """

    id: str
    holder: str
    organisation_id: str
    pool_id: str
    party: Party
    urgency: Urgency | None = None
    rank: Rank
    devices: int
    count: int = 1
    whole_node: bool = False
    starts_at: datetime
    asked_at: datetime | None = None
    """The start that was asked for, where it was moved to when lower ranks are gone. None: it starts
    as it was asked to."""
    release: Release
    value_micros_per_device_hour: int = 0
    parent_claim_id: str | None = None
    opened_at: datetime | None = None
    noticed_at: datetime | None = None
    notice_reason: str | None = None
    term_at: datetime | None = None
    free_by: datetime | None = None
    withdrawn_at: datetime | None = None
    displaced_by: str | None = None
    """The claim of higher rank for which this one was pinned."""
    released_at: datetime | None = None
    generation: int = 0

    def __post_init__(self) -> None:
        if self.devices < 1 or self.count < 1:
            raise ValueError("a claim is for one device or more")
        if (self.party is Party.FIRST_PARTY) != (self.urgency is not None):
            raise ValueError("first-party claims, and only those, have an urgency")
        if (self.term_at is None) != (self.free_by is None):
            raise ValueError("term_at and free_by are fixed together")
        if self.release.ends_at is not None and self.release.ends_at <= self.starts_at:
            raise ValueError("a claim ends after it starts")

    @property
    def size(self) -> int:
        """Devices in all."""
        return self.devices * self.count

    @property
    def is_sale(self) -> bool:
        return self.party is Party.SALE

    @property
    def is_fixed(self) -> bool:
        """Its holder was told when it ends: that stands, and it is never chosen again.

        A pinned claim is not fixed: it may still be told to leave earlier, never to stay longer.
        """
        return self.noticed_at is not None

    @property
    def rung(self) -> tuple[int, int]:
        """Claims of one rung can leave together: rank, then how quickly they go."""
        notice = self.release.notice_seconds
        return int(self.rank), -1 if notice is None else notice

    def held_until(self) -> datetime | None:
        """When its devices are free if nobody ends it: its fixed free-by, its end, or never."""
        if self.free_by is not None:
            return self.free_by
        if self.release.ends_at is None:
            return None
        return self.release.ends_at + timedelta(seconds=self.release.stop_seconds)


def earliest_term_at(claim: Claim, now: datetime) -> datetime:
    """The first instant at which it may get SIGTERM if notice is given at `now`.

    A claim without a notice ends at its end and not before. While its meter has not opened,
    a run has promised nobody anything yet.
    """
    release = claim.release
    if claim.noticed_at is not None:
        assert claim.term_at is not None
        return claim.term_at
    if release.notice_seconds is None:
        assert release.ends_at is not None
        return release.ends_at
    if claim.opened_at is None:
        return now
    firm = claim.opened_at + timedelta(seconds=release.firm_seconds)
    term = max(now + timedelta(seconds=release.notice_seconds), firm)
    return term if release.ends_at is None else max(now, min(term, release.ends_at))


def not_ended_before(claim: Claim) -> datetime:
    """An instant before which no notice ends it, whenever it is given.

    Its start, or the end of its firm time; and a withdrawn notice is not repeated at once.
    """
    release = claim.release
    firm = timedelta(seconds=release.firm_seconds)
    floor = claim.starts_at + firm if claim.opened_at is None else claim.opened_at + firm
    if claim.withdrawn_at is not None:
        rested = claim.withdrawn_at + WITHDRAWN_REST
        floor = max(floor, rested + timedelta(seconds=release.notice_seconds or 0))
    return floor


def lock_term_at(claim: Claim, now: datetime) -> datetime:
    """Until when the book must count it even if it is noticed at `now`.

    Like `earliest_term_at`, but for a claim whose meter has not opened: that may open at any
    moment from its start on, and its firm time counts from there.
    """
    release = claim.release
    if claim.noticed_at is not None or release.notice_seconds is None:
        return earliest_term_at(claim, now)
    term = max(now + timedelta(seconds=release.notice_seconds), not_ended_before(claim))
    if claim.opened_at is None:
        term = max(term, now + timedelta(seconds=release.firm_seconds))
    ends = [at for at in (release.ends_at, claim.term_at) if at is not None]
    return max(now, min([term, *ends])) if ends else term


def lock_free_by(claim: Claim, now: datetime) -> datetime:
    """The end of its lock: rolling until its holder is told."""
    return lock_term_at(claim, now) + timedelta(seconds=claim.release.stop_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pinned:
    """A claim whose end is fixed: who, when it gets notice, SIGTERM, and is free."""

    claim_id: str
    notice_at: datetime
    term_at: datetime
    free_by: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """The claim as it stands in the book now.

    `claim.starts_at` is later than asked where claims of lower rank have to leave first, and its
    end then moves by as much. Those are `displaced`, pinned in the same decision.
    """

    claim: Claim
    displaced: tuple[Pinned, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Not now. Asked again at `earliest_at`, all else unchanged, it is admitted.

    `earliest_at` is None where only what has no end stands in the way: offer to wait.
    `smaller_count` is the most units of this shape that would be admitted now, or None.
    """

    reason: RefusalReason
    earliest_at: datetime | None
    offer_to_wait: bool
    smaller_count: int | None


@dataclass(frozen=True, slots=True)
class ClaimNoticed(Event):
    """A claim's end is fixed and its holder is to be told: SIGTERM at `term_at`."""

    kind: ClassVar[str] = "allocation.claim_noticed"
    claim_id: str
    holder: str
    pool_id: str
    reason: str
    noticed_at: datetime
    term_at: datetime
    free_by: datetime


@dataclass(frozen=True, slots=True)
class NoticeWithdrawn(Event):
    """The notice is void: the claim goes on as if it had not been given."""

    kind: ClassVar[str] = "allocation.notice_withdrawn"
    claim_id: str
    holder: str
    pool_id: str


@dataclass(frozen=True, slots=True)
class ClaimReleased(Event):
    """The claim's devices are free."""

    kind: ClassVar[str] = "allocation.claim_released"
    claim_id: str
    holder: str
    pool_id: str


class ClaimNotFound(NotFound):
    """There is no such claim in the book of capacity."""

    code = "claim_not_found"


class NoticeRecentlyWithdrawn(Conflict):
    """This workload's notice was withdrawn less than 10 minutes ago: choose another, or wait."""

    code = "notice_recently_withdrawn"


class NoticeInForce(Conflict):
    """The notice has been acted on: the workload was already told to stop."""

    code = "notice_in_force"


class NotNoticeable(Conflict):
    """This claim ends at its end and not by notice: offer to buy it back, or wait."""

    code = "not_noticeable"


class ParentInUse(Conflict):
    """Work still runs inside this claim: end that first."""

    code = "claim_in_use"
