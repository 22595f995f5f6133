"""The life of one run: phases, deadlines, and the orders that change them.

Pure of sockets: `main` brings events, this decides and says what to do. All instants are boot
clock nanoseconds. What is decided is written down (`save`) before anybody is told of it.

    starting ──started──▶ running ──terminate──▶ stopping ──gone──▶ exited
        └──────gone─────▶ failed       └─────────gone──────────────────▲
"""

from __future__ import annotations

from typing import Any

from .loop import SECOND
from .records import Plan, State

CONTROL_LOST = "control_lost"


class Refused(Exception):
    """An order cannot be followed in this phase; the word says why."""


class Run:
    """State and rules. The methods change `state`; the caller saves it and acts."""

    def __init__(self, plan: Plan, state: State) -> None:
        self.plan = plan
        self.state = state

    # -- orders

    def notice(self, at_ns: int, notice: dict[str, Any], now_ns: int) -> int:
        """Fix the SIGTERM of an interruption, never earlier than it was; returns it."""
        state = self.state
        if state.is_over or state.phase == "stopping":
            return next(
                instant
                for instant in (state.term_ns, state.deadline_ns, state.exited_ns, now_ns)
                if instant is not None
            )
        if state.deadline_ns is None or at_ns > state.deadline_ns:
            state.deadline_ns = max(at_ns, now_ns)
            state.notice = notice
        elif state.notice is not None:
            state.notice = {**notice, "time": state.notice["time"]}
        self._cover_deadline()
        return state.deadline_ns

    def withdraw(self) -> None:
        if self.state.phase in ("starting", "running"):
            self.state.deadline_ns = None
            self.state.notice = None

    def extend(self, until_ns: int) -> None:
        self.state.runway_ns = until_ns
        self._cover_deadline()

    def _cover_deadline(self) -> None:
        state = self.state
        if state.deadline_ns is not None:
            covered = state.deadline_ns + self.plan.stop_grace_seconds * SECOND
            state.runway_ns = max(state.runway_ns, covered)

    # -- time

    def due(self, now_ns: int) -> tuple[str, int] | None:
        """The reason and grace of a SIGTERM that is due now."""
        state = self.state
        if state.phase not in ("starting", "running"):
            return None
        if state.deadline_ns is not None and now_ns >= state.deadline_ns:
            return "notice", self.plan.stop_grace_seconds
        if now_ns >= state.runway_ns:
            return CONTROL_LOST, self.plan.stop_grace_seconds
        return None

    def next_due_ns(self) -> int | None:
        state = self.state
        if state.phase in ("starting", "running"):
            instants = [state.runway_ns, state.deadline_ns]
        elif state.phase == "stopping":
            instants = [state.kill_ns]
        else:
            instants = []
        return min((instant for instant in instants if instant is not None), default=None)

    def terminate(self, reason: str, grace_seconds: int, now_ns: int) -> bool:
        """SIGTERM is sent now. False where it was sent before: then only the grace may shrink."""
        state = self.state
        kill_ns = now_ns + grace_seconds * SECOND
        if state.phase == "stopping":
            state.kill_ns = min(state.kill_ns or kill_ns, kill_ns)
            return False
        state.kill_ns = kill_ns
        state.term_ns = now_ns
        state.term_reason = reason
        if state.phase == "running":
            state.phase = "stopping"
        return True

    def must_kill(self, now_ns: int) -> bool:
        state = self.state
        return state.phase == "stopping" and state.kill_ns is not None and now_ns >= state.kill_ns

    # -- what was seen

    def started(self, now_ns: int) -> None:
        self.state.phase = "running"
        self.state.started_ns = now_ns

    def gone(self, now_ns: int, exit_code: int | None, failure: str | None) -> None:
        """Every process was seen gone."""
        state = self.state
        if state.started_ns is None:
            state.phase = "failed"
            reason = f"ended before it ran ({state.term_reason})" if state.term_reason else None
            state.failure = reason or failure or "the sandbox ended before it ran"
        else:
            state.phase = "exited"
            state.exit_code = exit_code
            state.failure = failure
        state.exited_ns = now_ns

    def interruption(self, now_ns: int) -> dict[str, Any] | None:
        """As the metadata endpoint shows it."""
        state = self.state
        if state.notice is None or state.deadline_ns is None:
            return None
        return {
            **state.notice,
            "seconds_left": max(0, (state.deadline_ns - now_ns) // SECOND),
        }
