"""Tokens and the spools they come from, as values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import ClassVar

from sublet.base.kernel.errors import Conflict, Invalid, NotFound
from sublet.base.store import Event
from sublet.base.wire.gateway import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenUsage:
    """One request as it ended, kept for ever. A correction names the one it `corrects` and holds
    differences: what is true is the sum of both."""

    seq: int
    event_id: str
    organisation_id: str
    project_id: str | None
    key_id: str
    is_first_party: bool
    model: str
    deployment_id: str
    replica_id: str
    surface: str
    tier: str
    price_version: str
    outcome: Outcome
    started_us: int
    ended_us: int
    first_us: int | None
    input_uncached: int
    cache_read: int
    output: int
    made: int
    micros: int
    """What the gateway took from the key's allowance."""
    is_inconsistent: bool
    gateway: str
    epoch: int
    corrects: str | None
    recorded_at: datetime


@dataclass(frozen=True, slots=True)
class Sums:
    """Of some rows: billed tokens by class, and output that was made and is billed to nobody."""

    input_uncached: int
    cache_read: int
    output: int
    lost: int


class EpochState(StrEnum):
    OPEN = "open"
    CLOSED = "closed"
    """Read to its end; nothing more comes of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Epoch:
    """One life of a gateway, and how far its spool is kept."""

    gateway: str
    epoch: int
    file: int
    offset: int
    state: EpochState
    opened_at: datetime
    closed_at: datetime | None

    @property
    def position(self) -> tuple[int, int]:
        return self.file, self.offset


@dataclass(frozen=True, slots=True, kw_only=True)
class SpoolFault:
    """Why a life's spool is not read on: what it held stays held, what is behind is not billed."""

    gateway: str
    epoch: int
    why: str

    @property
    def life(self) -> str:
        """Its folder, below that of all gateways."""
        return f"{self.gateway}/{self.epoch}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A replica's own totals as it last said them; beside them ours: what it had counted when it
    became ready, and then its rows to `counted_seq`."""

    replica_id: str
    prompt: int
    cached: int | None
    predicted: int
    input_uncached: int
    cache_read: int
    made: int
    counted_seq: int
    read_at: datetime

    @property
    def gap(self) -> Gap:
        return Gap(
            replica_id=self.replica_id,
            input_uncached=self.prompt - self.input_uncached,
            cache_read=0 if self.cached is None else self.cached - self.cache_read,
            output=self.predicted - self.made,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """By how much an engine counted more than we have records of; below zero: we have more."""

    replica_id: str
    input_uncached: int
    cache_read: int
    output: int

    @property
    def is_none(self) -> bool:
        return not (self.input_uncached or self.cache_read or self.output)

    @property
    def is_excess(self) -> bool:
        """Records of tokens that the engine never counted: somebody may have been billed."""
        return min(self.input_uncached, self.cache_read, self.output) < 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaTotals:
    """What we have records of for one replica."""

    input_uncached: int
    cache_read: int
    output: int
    made: int


@dataclass(frozen=True, slots=True)
class UsageInconsistent(Event):
    """An engine's counters contradict each other or our records; the replica is named.

    `event_id`: the request, where it shows in one.
    """

    kind: ClassVar[str] = "metering.usage_inconsistent"

    replica_id: str
    event_id: str | None
    why: str


class TokenUsageNotFound(NotFound):
    """There is no record of such a request."""

    code = "token_usage_not_found"


class TokenCorrectionRefused(Invalid):
    """A correction leaves no class below zero, and no more billed than was made."""

    code = "token_correction_refused"


class EpochClosed(Conflict):
    """This life of the gateway is over and its spool read to the end: nothing can come of it."""

    code = "epoch_closed"
