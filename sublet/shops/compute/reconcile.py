"""What to do about one run, given what the books say and what the engine sees: pure.

The books hold the intent; the engine holds the truth about processes. `decide` names the engine
calls and the records that bring them together, in order. It is asked anew after every change, so
whatever was interrupted between a call and its record is found again: an engine knows a run by
its id, and a record is made only from evidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sublet.capacity.engines.port import Observation, Phase
from sublet.shops.compute.model import (
    INTERRUPTIONS,
    Desired,
    Kind,
    Reason,
    Run,
    RunState,
    Workload,
    WorkloadSpec,
)
from sublet.shops.compute.states import Step

EVIDENCE_EVERY = timedelta(seconds=60)
"""How often a running meter is carried forward in the books."""
FAULTS = frozenset({Reason.NODE_FAULT, Reason.CONTROL_LOST, Reason.ABUSE})
"""Ends of a replica that nobody meant."""
MAX_START_FAILURES = 3
"""Places that a workload tries in a row before it is given up."""


# ---- engine calls -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Begin:
    """Start the run: its intent is written."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Let the workload see its notice; SIGTERM no earlier than `term_at`."""

    term_at: datetime


@dataclass(frozen=True, slots=True)
class Withdraw:
    """Take a published notice back."""


@dataclass(frozen=True, slots=True)
class Stop:
    """SIGTERM now. `reason` None: it is nobody's run."""

    reason: Reason | None
    grace_seconds: int


@dataclass(frozen=True, slots=True)
class Extend:
    """Tell the engine how far the run is paid."""

    until: datetime


@dataclass(frozen=True, slots=True)
class Scrub:
    """Wipe and check the devices, then give them back."""


# ---- records ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Adopt:
    """The engine has it: the start needs no repeating."""


@dataclass(frozen=True, slots=True)
class Published:
    """The notice is out already, with this SIGTERM: the record of it was lost."""

    term_at: datetime


@dataclass(frozen=True, slots=True)
class Unpublished:
    """A notice that was called off is off the engine as well."""


@dataclass(frozen=True, slots=True)
class Open:
    """Handed over at that instant: the meter opens."""

    at: datetime


@dataclass(frozen=True, slots=True)
class Advance:
    """Seen alive at that instant."""

    to: datetime
    cpu_ms: int


@dataclass(frozen=True, slots=True)
class Terminating:
    """SIGTERM was sent. `closes_at`: the meter closes there; None: at the exit."""

    term_at: datetime
    reason: Reason
    closes_at: datetime | None


@dataclass(frozen=True, slots=True)
class End:
    """Seen gone. `by_itself`: no SIGTERM of ours was involved."""

    reason: Reason
    by_itself: bool
    closes_at: datetime | None
    """Where the meter closes if it is open; None: at its last evidence."""
    exited_at: datetime | None
    exit_code: int | None
    cpu_ms: int
    term_at: datetime | None = None
    failure: str | None = None
    """Why it never started; None if it started or was ended before."""


@dataclass(frozen=True, slots=True)
class Abandon:
    """Nothing is left to scrub, or nobody there to do it: the run is over."""


Call = Begin | Publish | Withdraw | Stop | Extend | Scrub
Record = Adopt | Published | Unpublished | Open | Terminating | End | Abandon
Action = Call | Record | Advance


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is known of a run outside the books."""

    observation: Observation | None
    is_gone: bool = False
    """Absent from the engine, in look after look: no trace will come."""
    is_fenced: bool = False
    """Its node was taken out by hand: whatever ran there cannot come back to these devices."""
    start_failure: str | None = None
    """Starting it was refused for good."""
    metered_to: datetime | None = None


def decide(run: Run, seen: Seen, *, now: datetime) -> tuple[Action, ...]:
    """The calls and records due now, in order."""
    if run.is_over:
        return stray(seen.observation)
    if run.state is RunState.GONE:
        return _gone(seen)
    observation = seen.observation
    if observation is None:
        return _absent(run, seen)
    if observation.phase is Phase.SILENT:
        return (_lost(observation),) if seen.is_fenced else ()
    if run.state in (RunState.INTENDED, RunState.STARTING):
        return _starting(run, observation)
    return _running(run, seen, observation, now)


def _absent(run: Run, seen: Seen) -> tuple[Action, ...]:
    if run.state is RunState.INTENDED:
        if run.stop_reason is not None:
            return (_never(run.stop_reason, None),)
        if seen.start_failure is not None or seen.is_fenced:
            return (_never(Reason.NODE_FAULT, seen.start_failure or "its node was taken out"),)
        return (Begin(),)
    if not (seen.is_gone or seen.is_fenced):
        return ()
    if run.state is RunState.STARTING:
        why = None if run.stop_reason else "the engine lost it before it ran"
        return (_never(run.stop_reason or Reason.NODE_FAULT, why),)
    return (_lost(None),)


def _starting(run: Run, seen: Observation) -> tuple[Action, ...]:
    """Until it is handed over it is not billed; what is to end before that, ends unbilled."""
    adopt: tuple[Action, ...] = (Adopt(),) if run.state is RunState.INTENDED else ()
    if seen.phase is Phase.FAILED:
        if run.stop_reason is not None:
            return (_never(run.stop_reason, None),)
        return (_never(Reason.NODE_FAULT, seen.failure or "it did not start"),)
    if run.stop_reason is not None:
        if seen.phase is Phase.EXITED:
            return (_never(run.stop_reason, None),)
        if seen.term_at is None:
            return (*adopt, Stop(run.stop_reason, run.stop_grace_seconds))
        return adopt
    if seen.started_at is None:
        return adopt
    return (*adopt, Open(seen.started_at))


def _running(run: Run, seen: Seen, observation: Observation, now: datetime) -> tuple[Action, ...]:
    if observation.phase in (Phase.EXITED, Phase.FAILED):
        return (_exited(run, observation),)
    if observation.term_at is not None:
        if run.state is RunState.STOPPING:
            return ()
        reason = ended_by(run, observation)
        closes_at = None if reason is Reason.USER else observation.term_at
        return (Terminating(observation.term_at, reason, closes_at),)
    if run.stop_reason is not None:
        return (Stop(run.stop_reason, run.stop_grace_seconds),)
    if run.ends_at is not None and now >= run.ends_at:
        return (Stop(Reason.BLOCK_END, run.stop_grace_seconds),)
    return (
        *_notice(run, observation, now),
        *_evidence(run, seen, observation),
    )


def _notice(run: Run, observation: Observation, now: datetime) -> tuple[Action, ...]:
    if run.term_at is None:
        if observation.deadline_at is not None:
            return (Withdraw(),)
        return (Unpublished(),) if run.is_called_off or run.published_at is not None else ()
    if run.published_at is not None:
        return ()
    # One that is earlier was called off before this notice: the engine moves it.
    if observation.deadline_at is not None and observation.deadline_at >= run.term_at:
        return (Published(observation.deadline_at),)
    # The clock of a notice starts when the workload can see it, however late that is.
    return (Publish(max(run.term_at, now + timedelta(seconds=run.notice_seconds))),)


def _evidence(run: Run, seen: Seen, observation: Observation) -> tuple[Action, ...]:
    actions: list[Action] = []
    if run.runway_until > run.runway_sent:
        actions.append(Extend(run.runway_until))
    alive_at = observation.last_evidence_at
    if alive_at and seen.metered_to and alive_at - seen.metered_to >= EVIDENCE_EVERY:
        actions.append(Advance(alive_at, observation.cpu_ms))
    return tuple(actions)


def _gone(seen: Seen) -> tuple[Action, ...]:
    observation = seen.observation
    if observation is None or (observation.phase is Phase.SILENT and seen.is_fenced):
        return (Abandon(),)
    if observation.phase is Phase.SILENT:
        return ()
    if observation.phase in (Phase.EXITED, Phase.FAILED):
        return (Scrub(),)
    # It was taken for gone and lives: its devices go to nobody before it is ended.
    return (Stop(None, 0),) if observation.term_at is None else ()


def stray(observation: Observation | None) -> tuple[Stop | Scrub, ...]:
    """What to do about a run that the books have closed, or never knew."""
    if observation is None or observation.scrubbed or observation.phase is Phase.SILENT:
        return ()
    if observation.phase in (Phase.EXITED, Phase.FAILED):
        return (Scrub(),)
    return (Stop(None, 0),) if observation.term_at is None else ()


def _never(reason: Reason, failure: str | None) -> End:
    return End(
        reason=reason,
        by_itself=False,
        closes_at=None,
        exited_at=None,
        exit_code=None,
        cpu_ms=0,
        failure=failure,
    )


def _lost(observation: Observation | None) -> End:
    """Nobody saw its end: it is billed to the last evidence and no further."""
    return End(
        reason=Reason.NODE_FAULT,
        by_itself=False,
        closes_at=observation.last_evidence_at if observation else None,
        exited_at=None,
        exit_code=None,
        cpu_ms=observation.cpu_ms if observation else 0,
    )


def _exited(run: Run, seen: Observation) -> End:
    by_itself = seen.term_reason is None and seen.exit_code is not None
    if seen.term_reason is None and seen.exit_code is None:
        # It ended and nobody saw how, as at a power cut.
        reason = Reason.NODE_FAULT
    else:
        reason = ended_by(run, seen)
    is_ours = seen.term_at is not None and reason is not Reason.USER
    return End(
        reason=reason,
        by_itself=by_itself,
        closes_at=seen.term_at if is_ours else seen.exited_at or seen.last_evidence_at,
        exited_at=seen.exited_at or seen.last_evidence_at,
        exit_code=seen.exit_code,
        cpu_ms=seen.cpu_ms,
        term_at=seen.term_at,
    )


def ended_by(run: Run, seen: Observation) -> Reason:
    """Who ended it, as the engine's own words about its SIGTERM have it."""
    said = seen.term_reason
    if said is None:
        return Reason.USER
    if said == "notice":
        return run.notice_reason or Reason.OWNER_RECALL
    if said.startswith("stop:"):
        try:
            return Reason(said.removeprefix("stop:"))
        except ValueError:
            return run.stop_reason or Reason.NODE_FAULT
    if said == "disk":
        return Reason.ABUSE
    return Reason.CONTROL_LOST


def would_requeue(workload: Workload, reason: Reason) -> bool:
    """Whether it is queued again if it ends now for that reason: what its notice says."""
    if workload.desired is not Desired.RUNNING or reason not in INTERRUPTIONS:
        return False
    return workload.spec.auto_resume if workload.kind == "instance" else workload.spec.requeue


def outcome(
    *, kind: Kind, spec: WorkloadSpec, desired: Desired, retries: int, start_failures: int, end: End
) -> Step:
    """What becomes of a workload whose run was seen gone."""
    if desired is Desired.TERMINATED:
        return Step.TERMINATED
    if kind == "replica":
        # Whoever wants one makes another: it is never queued again.
        went_wrong = end.by_itself or end.failure is not None or end.reason in FAULTS
        return Step.FAILED if went_wrong else Step.TERMINATED
    if end.failure is not None:
        if desired is Desired.STOPPED:
            return Step.RESTED if kind == "instance" else Step.TERMINATED
        return Step.REQUEUED if start_failures + 1 < MAX_START_FAILURES else Step.FAILED
    if kind == "instance":
        comes_back = spec.auto_resume and desired is Desired.RUNNING
        return Step.REQUEUED if comes_back and end.reason in INTERRUPTIONS else Step.RESTED
    if end.by_itself:
        if end.exit_code == 0:
            return Step.COMPLETED
        return Step.RETRIED if retries < spec.max_retries else Step.FAILED
    if desired is Desired.STOPPED or end.reason is Reason.USER:
        return Step.TERMINATED
    return Step.REQUEUED if spec.requeue and end.reason in INTERRUPTIONS else Step.FAILED
