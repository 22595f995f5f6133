"""The life of a workload, in one table: pure.

    pending → awaiting_capacity → provisioning → running → interrupting → stopping → stopped
    and the ends: terminated, completed (jobs, with exit code), failed. A requeue goes
    stopping → awaiting_capacity.

What is not in the table does not happen: `next_state` raises.
"""

from __future__ import annotations

from enum import StrEnum

from sublet.base.kernel.errors import Conflict


class State(StrEnum):
    PENDING = "pending"
    AWAITING_CAPACITY = "awaiting_capacity"
    """Holds nothing; admitted when its turn comes."""
    PROVISIONING = "provisioning"
    """Has its claim; its devices are awaited or being made ready. Not billed."""
    RUNNING = "running"
    INTERRUPTING = "interrupting"
    """Under notice and running all the same."""
    STOPPING = "stopping"
    """SIGTERM is sent or on its way."""
    STOPPED = "stopped"
    """Holds neither device nor claim; only its files remain."""
    TERMINATED = "terminated"
    COMPLETED = "completed"
    FAILED = "failed"


class Step(StrEnum):
    """What can happen to a workload."""

    WAITED = "waited"
    ADMITTED = "admitted"
    STARTED = "started"
    NOTICED = "noticed"
    WITHDRAWN = "withdrawn"
    ENDING = "ending"
    RESTED = "rested"
    REQUEUED = "requeued"
    RETRIED = "retried"
    COMPLETED = "completed"
    TERMINATED = "terminated"
    FAILED = "failed"


class WrongState(Conflict):
    """The workload's state does not allow this: read it again."""

    code = "wrong_state"


TERMINAL = frozenset({State.TERMINATED, State.COMPLETED, State.FAILED})
LIVE = frozenset({State.PROVISIONING, State.RUNNING, State.INTERRUPTING, State.STOPPING})
"""States in which a workload has a claim, and may have a run."""

TABLE: dict[tuple[State, Step], State] = {
    (State.PENDING, Step.WAITED): State.AWAITING_CAPACITY,
    (State.PENDING, Step.ADMITTED): State.PROVISIONING,
    (State.AWAITING_CAPACITY, Step.ADMITTED): State.PROVISIONING,
    (State.AWAITING_CAPACITY, Step.RESTED): State.STOPPED,
    (State.AWAITING_CAPACITY, Step.TERMINATED): State.TERMINATED,
    (State.AWAITING_CAPACITY, Step.FAILED): State.FAILED,
    (State.PROVISIONING, Step.STARTED): State.RUNNING,
    (State.PROVISIONING, Step.ENDING): State.STOPPING,
    # A start that failed: the devices are given back and another place is asked for.
    (State.PROVISIONING, Step.REQUEUED): State.AWAITING_CAPACITY,
    (State.PROVISIONING, Step.FAILED): State.FAILED,
    (State.RUNNING, Step.NOTICED): State.INTERRUPTING,
    (State.INTERRUPTING, Step.WITHDRAWN): State.RUNNING,
    (State.RUNNING, Step.ENDING): State.STOPPING,
    (State.INTERRUPTING, Step.ENDING): State.STOPPING,
    (State.STOPPING, Step.REQUEUED): State.AWAITING_CAPACITY,
    (State.STOPPING, Step.RETRIED): State.AWAITING_CAPACITY,
    (State.STOPPING, Step.RESTED): State.STOPPED,
    (State.STOPPING, Step.TERMINATED): State.TERMINATED,
    (State.STOPPING, Step.COMPLETED): State.COMPLETED,
    (State.STOPPING, Step.FAILED): State.FAILED,
    (State.STOPPED, Step.ADMITTED): State.PROVISIONING,
    (State.STOPPED, Step.WAITED): State.AWAITING_CAPACITY,
    (State.STOPPED, Step.TERMINATED): State.TERMINATED,
}
# What ends by itself, or with its node, ends from where it is, without a SIGTERM of ours.
TABLE |= {
    (state, step): TABLE[State.STOPPING, step]
    for state in (State.RUNNING, State.INTERRUPTING)
    for step in (
        Step.REQUEUED,
        Step.RETRIED,
        Step.RESTED,
        Step.TERMINATED,
        Step.COMPLETED,
        Step.FAILED,
    )
}


def next_state(state: State, step: Step) -> State:
    """Where the step leads. Raises WrongState where it cannot happen."""
    found = TABLE.get((state, step))
    if found is None:
        raise WrongState(f"A workload that is {state} cannot be {step}.", state=str(state))
    return found
