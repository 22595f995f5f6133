"""Meters, usage and device spans as values. All instants here are whole milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from sublet.base.kernel.errors import Conflict, Invalid, NotFound


class MeterParty(StrEnum):
    """Whose use it is: sold, or the owner's own."""

    SALE = "sale"
    FIRST_PARTY = "first_party"


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """One run's meter: `devices` held from `opened_at`, recorded up to `metered_to`."""

    run_id: str
    workload_id: str
    organisation_id: str
    project_id: str | None
    contract_id: str | None
    pool_id: str
    node_id: str
    devices: int
    party: MeterParty
    opened_at: datetime
    metered_to: datetime
    closed_at: datetime | None
    close_reason: str | None
    cpu_ms: int
    last_evidence_at: datetime

    @property
    def is_open(self) -> bool:
        return self.closed_at is None


class UsageKind(StrEnum):
    """`held`: the devices were taken. `ran`: the work was not suspended meanwhile."""

    HELD = "held"
    RAN = "ran"


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """`devices` over `[starts_at, ends_at)`. Negative devices take back part of `corrects`."""

    seq: int
    event_id: str
    run_id: str
    organisation_id: str
    contract_id: str | None
    kind: UsageKind
    starts_at: datetime
    ends_at: datetime
    devices: int
    corrects: str | None
    recorded_at: datetime


class Use(StrEnum):
    """What a device is doing, to the millisecond: one of these and no other."""

    DOWN = "down"
    OVERHEAD = "overhead"
    """Burn-in, provisioning, draining, scrub."""
    FIRST_PARTY = "first_party"
    SOLD_USED = "sold_used"
    SOLD_UNUSED = "sold_unused"
    SERVING = "serving"
    IDLE = "idle"


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A device's use over `[starts_at, ends_at)`; the last one is open. `ref`: what for."""

    device_id: str
    seq: int
    use: Use
    starts_at: datetime
    ends_at: datetime | None
    ref: str


class MeterNotFound(NotFound):
    """No meter was opened for this run."""

    code = "meter_not_found"


class MeterClosed(Conflict):
    """This run's meter is closed: what was metered wrongly is changed by a correction."""

    code = "meter_closed"


class CorrectionRefused(Invalid):
    """A correction takes back, within the usage it names, no more than was recorded there."""

    code = "correction_refused"
