"""Workloads and their runs, in values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import ClassVar, Literal

from sublet.base.kernel.errors import Conflict, NoCapacity, NotFound
from sublet.base.kernel.money import Money
from sublet.base.store import Event
from sublet.shops.compute.states import LIVE, TERMINAL, State

Kind = Literal["instance", "job", "replica"]


class Desired(StrEnum):
    RUNNING = "running"
    STOPPED = "stopped"
    TERMINATED = "terminated"


class Reason(StrEnum):
    """Why a run ended, or why a workload is where it is."""

    USER = "user"
    SPOT_INTERRUPTION = "spot_interruption"
    OWNER_RECALL = "owner_recall"
    PRICE = "price"
    BLOCK_END = "block_end"
    NODE_FAULT = "node_fault"
    MAINTENANCE = "maintenance"
    CREDIT_EXHAUSTED = "credit_exhausted"
    BUDGET = "budget"
    QUOTA = "quota"
    ABUSE = "abuse"
    LEGAL_ORDER = "legal_order"
    SHUTDOWN = "shutdown"
    CONTROL_LOST = "control_lost"
    DRAINED = "drained"
    """A replica that left after its drain, with nothing in hand."""
    SCALED_IN = "scaled_in"
    """A replica that is not needed any more."""


INTERRUPTIONS = frozenset(
    {
        Reason.SPOT_INTERRUPTION,
        Reason.OWNER_RECALL,
        Reason.PRICE,
        Reason.MAINTENANCE,
        Reason.NODE_FAULT,
        Reason.CONTROL_LOST,
        Reason.SHUTDOWN,
    }
)
"""After these a job is queued again and an `auto_resume` instance comes back; no retry is spent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """What a replica runs, as its model server's adapter says. No secret is in it: it is kept."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    read_only: tuple[tuple[str, str], ...] = ()
    """(path on the host, path inside): weights, and what it takes to run the server."""
    lock_memory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadSpec:
    """What to run. Which fields mean something depends on the kind; `spec.checked` says."""

    name: str = ""
    command: tuple[str, ...] = ()
    script: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    ssh_keys: tuple[str, ...] = ()
    image: str = ""
    outbound: bool = False
    notice_signal: str | None = None
    stop_grace_seconds: int | None = None
    """None: as the contract has it. The contract's is what the capacity was sold with."""
    max_run_seconds: int | None = None
    """The end of a job's claim, counted from its admission."""
    max_retries: int = 0
    requeue: bool = True
    auto_resume: bool = False
    server: ServerSpec | None = None
    """A replica's."""
    memory_bytes: int | None = None
    """A replica's; None, and for all others: what its devices bring."""
    is_sealed: bool = False
    """A replica whose weights nobody may see: no stranger's workload stands on its node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    id: str
    seq: int
    organisation_id: str
    project_id: str | None
    key_id: str | None
    kind: Kind
    spec: WorkloadSpec
    contract_id: str
    party: Literal["sale", "first_party"]
    pool_id: str
    devices: int
    rank: int
    state: State
    desired: Desired
    reason: Reason | None
    claim_id: str | None
    """The claim that it has now; None where it holds nothing."""
    waiting_since: datetime | None
    retries: int
    start_failures: int
    """Starts in a row that failed; not the workload's fault, and no retry."""
    failure: str | None
    exit_code: int | None
    created_at: datetime
    ended_at: datetime | None
    """When it came to its end; None while it may still run."""
    has_home: bool
    """Its files are still there."""
    version: int

    @property
    def name(self) -> str:
        return self.spec.name or self.id

    @property
    def is_live(self) -> bool:
        return self.state in LIVE

    @property
    def is_over(self) -> bool:
        return self.state in TERMINAL


class RunState(StrEnum):
    INTENDED = "intended"
    """Written before the engine is called."""
    STARTING = "starting"
    RUNNING = "running"
    """Its meter is open."""
    STOPPING = "stopping"
    """SIGTERM was seen."""
    GONE = "gone"
    """Seen gone; its devices await their scrub."""
    SCRUBBED = "scrubbed"
    FAILED = "failed"
    """Over without ever having run: never billed."""


OVER = frozenset({RunState.SCRUBBED, RunState.FAILED})


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One life of a workload on devices of one node. At most one of a workload is not over."""

    id: str
    seq: int
    workload_id: str
    organisation_id: str
    number: int
    claim_id: str
    contract_id: str
    pool_id: str
    node_id: str
    devices: tuple[str, ...]
    """By the engine's names."""
    device_ids: tuple[str, ...]
    state: RunState
    intended_at: datetime
    ends_at: datetime | None
    """The end that was bought, if any."""
    notice_seconds: int
    """What was sold; 0: none."""
    started_at: datetime | None
    t0: datetime | None
    """When its notice was given; None again once the engine has taken a withdrawn one back."""
    notice_reason: Reason | None
    term_at: datetime | None
    """SIGTERM: as the notice fixed it (none if it is called off), then as it was sent."""
    published_at: datetime | None
    """When the workload could first see the notice."""
    stop_reason: Reason | None
    """Why we end it without, or ahead of, a notice's time."""
    stop_grace_seconds: int
    runway_until: datetime
    runway_sent: datetime
    exited_at: datetime | None
    exit_code: int | None
    reason: Reason | None
    gone_at: datetime | None
    """When it was seen gone: the scrub counts from here."""
    failure: str | None
    is_forgotten: bool

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    @property
    def is_called_off(self) -> bool:
        """Its notice is withdrawn, and the engine has not taken it back yet."""
        return self.state is RunState.RUNNING and self.t0 is not None and self.term_at is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    seq: int
    workload_id: str
    from_state: State | None
    event: str
    to_state: State
    at: datetime
    actor: str
    reason: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StopAnswer:
    """What a stop comes to: the workload, and what it still costs once it is stopped."""

    workload: Workload
    still_costs_per_hour: Money
    explanation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """Where to find a workload's latest run: for logs and for the bastion."""

    workload: Workload
    run_id: str | None
    """None: none was started yet."""
    node_id: str | None
    is_running: bool


@dataclass(frozen=True, slots=True)
class WorkloadChanged(Event):
    """A workload came into another state."""

    kind: ClassVar[str] = "compute.workload_changed"
    workload_id: str
    organisation_id: str
    from_state: str | None
    to_state: str
    reason: str | None


@dataclass(frozen=True, slots=True)
class MeterOpened(Event):
    """A run was handed over and is metered from `at`."""

    kind: ClassVar[str] = "compute.meter_opened"
    run_id: str
    workload_id: str
    organisation_id: str
    contract_id: str
    at: datetime


@dataclass(frozen=True, slots=True)
class MeterClosed(Event):
    """A run is metered no further."""

    kind: ClassVar[str] = "compute.meter_closed"
    run_id: str
    workload_id: str
    organisation_id: str
    contract_id: str
    at: datetime
    reason: str


@dataclass(frozen=True, slots=True)
class ShutdownBegun(Event):
    """The cloud closes: everything ends, and the loop that reads this starts nothing more."""

    kind: ClassVar[str] = "compute.shutdown_begun"


class WorkloadNotFound(NotFound):
    """There is no such workload, or this key may not see it: `sublet ls --all` shows yours."""

    code = "workload_not_found"


class SealedNode(NoCapacity):
    """A sealed model is served on the only node there: `details` say when it can be gone, or send
    `wait` to be served then."""

    code = "sealed_node"


class StrangersPresent(NoCapacity):
    """Strangers' workloads stand, or wait, where a sealed model would be served: not beside them."""

    code = "strangers_present"


class NoticeProtected(Conflict):
    """Workloads there are protected by their notice: drain instead, or break the notice at its price."""

    code = "notice_protected"
