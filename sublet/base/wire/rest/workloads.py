"""Raw compute: instances and jobs, their transitions, logs and commands."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints, field_validator, model_validator

from sublet.base.wire.rest.common import (
    ENV_NAME,
    SSH_KEY,
    Body,
    Count,
    Flag,
    Identifier,
    Instant,
    Money,
    Name,
    PositiveMicros,
    Seconds,
    Shape,
    Text,
    Whole,
    storable,
    wrong_field,
)
from sublet.base.wire.rest.market import DurationSeconds, GraceSeconds, NoticeSeconds

Kind = Literal["instance", "job"]
WorkloadState = Literal[
    "pending",
    "awaiting_capacity",
    "provisioning",
    "running",
    "interrupting",
    "stopping",
    "stopped",
    "terminated",
    "completed",
    "failed",
]
Signal = Literal["SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGCONT"]
EnvName = Annotated[str, StringConstraints(pattern=ENV_NAME)]
EnvValue = Annotated[str, BeforeValidator(storable), StringConstraints(max_length=32_768)]
Env = Annotated[dict[EnvName, EnvValue], Field(max_length=256)]
Argument = Annotated[str, BeforeValidator(storable), StringConstraints(max_length=65_536)]
Command = Annotated[list[Argument], Field(min_length=1, max_length=1024)]
SshKey = Annotated[
    str,
    StringConstraints(
        strip_whitespace=True,
        max_length=4096,
        pattern=SSH_KEY,
    ),
]


class _Rent(Body):
    """What instance and job share: either a quote, or an offer with the terms of one."""

    name: Name | None = None
    quote_id: Identifier | None = None
    offer_id: Identifier | None = None
    count: Count = 1
    notice_seconds: NoticeSeconds | None = None
    max_price_micros_per_device_hour: PositiveMicros | None = None
    stop_grace_seconds: GraceSeconds = 30
    project_id: Identifier | None = None
    env: Env = Field(default_factory=dict)
    notice_signal: Signal | None = None
    """Sent at the notice, at t0; the default is none, so that nothing stops early."""
    outbound: Flag = False
    wait: Flag = False
    """True: no room now is no error; the workload waits and starts when there is."""

    @model_validator(mode="after")
    def _one_price(self) -> _Rent:
        if (self.quote_id is None) == (self.offer_id is None):
            raise wrong_field(
                "quote_id", "send either quote_id, or offer_id with its terms, and not both"
            )
        if self.quote_id is not None:
            terms = {
                "count",
                "notice_seconds",
                "max_price_micros_per_device_hour",
                "stop_grace_seconds",
                "project_id",
            }
            given = sorted(terms & self.model_fields_set)
            if given:
                raise wrong_field(
                    given[0], "fixed by the quote: leave it out, or send offer_id instead"
                )
        return self


class InstanceCreate(_Rent):
    """A machine to log in to, until it is stopped."""

    ssh_keys: Annotated[list[SshKey], Field(max_length=16)] = Field(default_factory=list)
    script: Text = ""
    """Start-up script, run by /bin/sh inside."""
    auto_resume: Flag = False
    """After an interruption, start again when there is room."""


class JobCreate(_Rent):
    """A command to run to its end."""

    command: Command
    max_retries: Annotated[Whole, Field(ge=0, le=100)] = 0
    """Of failures; interruptions never count."""
    requeue: Flag = True
    """After an interruption, queue again."""
    max_run_seconds: DurationSeconds | None = None
    """The longest that it runs. What has an end finds room where what is open-ended does not."""

    @field_validator("command")
    @classmethod
    def _has_program(cls, command: list[str]) -> list[str]:
        if not command[0].strip():
            raise ValueError("the first word of a command names a program")
        return command


class WorkloadPatch(Body):
    """What may change while it lives. A field left out stays as it is; null is no value."""

    name: Name = ""
    auto_resume: Flag = False
    requeue: Flag = True
    max_retries: Annotated[Whole, Field(ge=0, le=100)] = 0
    ssh_keys: Annotated[list[SshKey], Field(max_length=16)] = Field(default_factory=list)


class StartCreate(Body):
    wait: Flag = False
    """True: no room now is no error; it waits and starts when there is."""


class Run(Shape):
    """One life of a workload on devices of one node."""

    id: str
    seq: int
    number: int
    state: str
    node_id: str
    devices: list[str]
    """By the engine's names."""
    device_ids: list[str]
    intended_at: Instant
    started_at: Instant | None
    """Where the meter opened."""
    t0: Instant | None
    """When its notice was given."""
    notice_reason: str | None
    term_at: Instant | None
    exited_at: Instant | None
    exit_code: int | None
    reason: str | None
    failure: str | None


class Interruption(Shape):
    """A notice that stands: what happens, when and why."""

    action: Literal["stop", "requeue"]
    at: Instant
    reason: str


class Ssh(Shape):
    """How to log in: the user is the workload's id."""

    host: str
    port: int
    user: str
    command: str


class Workload(Shape):
    """An instance or a job."""

    id: str
    seq: int
    kind: Kind
    name: str
    organisation_id: str
    project_id: str | None
    state: WorkloadState
    desired: Literal["running", "stopped", "terminated"]
    reason: str | None
    failure: str | None
    product: Literal["spot", "on_demand", "first_party"]
    offer_id: str | None
    pool_id: str
    devices: int
    """In all."""
    notice_seconds: int | None
    """Of warning before the owner's side ends it; null: first-party, at once."""
    contract_id: str | None
    claim_id: str | None
    """What it holds now; null: nothing."""
    party: Literal["sale", "first_party"]
    spec: dict[str, Any]
    created_at: Instant
    starts_at: Instant | None
    """When its devices are its own, while that lies ahead: what holds them leaves first."""
    waiting_since: Instant | None
    retries: int
    exit_code: int | None
    version: int
    run: Run | None
    """The latest."""
    interruption: Interruption | None
    ssh: Ssh | None
    price_micros_per_device_hour: int | None
    """In this hour."""
    burn_micros_per_hour: int
    """What it costs now; zero while nothing is metered."""
    cost: Money
    """Posted so far, less credits."""
    stopped_costs_per_hour: Money
    """What it would cost from when it is stopped on."""


class Stopped(Shape):
    """A workload that is told to stop, and what it still costs once it is stopped."""

    workload: Workload
    still_costs_per_hour: Money
    explanation: str


class Transition(Shape):
    seq: int
    at: Instant
    from_state: str | None
    event: str
    to_state: str
    actor: str
    reason: str | None


class ExecCreate(Body):
    """A command inside a running workload, with bounds on its time and its output."""

    argv: Command
    stdin: Text = ""
    env: Env = Field(default_factory=dict)
    timeout_seconds: Annotated[Seconds, Field(ge=1, le=300)] = 30


class ExecResult(Shape):
    exit_code: int | None
    """None: it was still going at the timeout and was ended."""
    stdout: str
    stderr: str
    truncated: bool
    """Output past 256 KiB a stream was dropped."""
    timed_out: bool
