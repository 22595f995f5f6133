"""One simulated run: its whole life follows from the clock and from what it was told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from sublet.base.kernel.interval import millis_between
from sublet.capacity.engines.port import Notice, Observation, Phase, StartSpec
from sublet.capacity.engines.simulated.behaviour import Behaviour

KILLED = 137
TERMINATED = 143


@dataclass(slots=True)
class SimulatedRun:
    """State as of `seen_to`; `evolve` carries it on. Later calls change what is still to come."""

    spec: StartSpec
    node: str
    behaviour: Behaviour
    ready_at: datetime
    fails: str | None
    runway_until: datetime
    metadata: Mapping[str, Any]
    started_at: datetime | None = None
    own_end_at: datetime | None = None
    notice: Notice | None = None
    deadline_at: datetime | None = None
    term_at: datetime | None = None
    term_reason: str | None = None
    leaves_at: datetime | None = None
    leaves_with: int = TERMINATED
    ended_at: datetime | None = None
    exit_code: int | None = None
    failure: str | None = None
    last_evidence_at: datetime | None = None
    """Fixed once it has ended; while it lives the evidence is as fresh as the look."""
    scrubbed: bool = False
    log: bytearray = field(default_factory=bytearray)
    ended: Observation | None = None
    """The final observation, made once."""

    @property
    def is_live(self) -> bool:
        return self.ended_at is None

    def next_change_at(self) -> datetime | None:
        """When something happens to it by itself."""
        if self.ended_at is not None:
            return None
        if self.term_at is not None:
            coming = [self.leaves_at, self.own_end_at]
        else:
            waits_for = self.ready_at if self.started_at is None else self.own_end_at
            coming = [self._term_due()[0], waits_for]
        return min(at for at in coming if at is not None)

    def evolve(self, now: datetime) -> None:
        """Let everything happen that happens up to `now`, in its order."""
        for _ in range(8):
            at = self.next_change_at()
            if at is None or at > now:
                return
            self._happen(at)
        raise AssertionError("a run's life has fewer turns")

    def _happen(self, at: datetime) -> None:
        if self.started_at is None and self.term_at is None and at == self.ready_at:
            self._become_ready()
        elif self.own_end_at is not None and at == self.own_end_at:
            self._end(at, self.behaviour.exit_code)
        elif self.term_at is not None:
            self._end(at, self.leaves_with)
        else:
            self.send_term(at, self._term_due()[1], self.spec.stop_grace_seconds)

    def _become_ready(self) -> None:
        if self.fails is not None:
            self.failure = self.fails
            self._end(self.ready_at, None)
            return
        self.started_at = self.ready_at
        self.write(self.behaviour.output)
        if self.behaviour.lasts is not None:
            self.own_end_at = self.ready_at + self.behaviour.lasts

    def _term_due(self) -> tuple[datetime, str]:
        """A published deadline stands whatever the runway says; a full disk waits for neither."""
        due, reason = self.runway_until, "control_lost"
        if self.deadline_at is not None:
            due, reason = self.deadline_at, "notice"
        full_after = self.behaviour.disk_full_after
        if full_after is not None and self.started_at is not None:
            due, reason = min((due, reason), (self.started_at + full_after, "disk"))
        return due, reason

    def send_term(self, at: datetime, reason: str, grace_seconds: int) -> None:
        """SIGTERM now, SIGKILL after the grace; a second one may only shorten the grace."""
        kill_at = at + timedelta(seconds=grace_seconds)
        if self.term_at is not None:
            if self.leaves_at is not None and kill_at < self.leaves_at:
                self.leaves_at, self.leaves_with = kill_at, KILLED
            return
        self.term_at, self.term_reason = at, reason
        leaves_at = at + self.behaviour.leaves_after
        stubborn = self.behaviour.ignores_term or leaves_at > kill_at
        self.leaves_at = kill_at if stubborn else leaves_at
        self.leaves_with = KILLED if stubborn else TERMINATED

    def _end(self, at: datetime, exit_code: int | None) -> None:
        self.ended_at = self.last_evidence_at = at
        self.exit_code = exit_code
        if self.started_at is None and self.failure is None:
            self.failure = "ended before it ran"

    def vanish(self, at: datetime) -> None:
        """It ends unseen, as at a power cut: nobody saw an exit code."""
        if self.is_live:
            self._end(at, None)
            self.own_end_at = None

    def write(self, text: str) -> None:
        self.log += text.encode()

    def observed(self, now: datetime, silent_since: datetime | None) -> Observation:
        """What an engine shows of it. On a silent node: what was last seen, and since when."""
        if silent_since is not None:
            return self._observation(Phase.SILENT, silent_since)
        if self.ended_at is None:
            phase = Phase.RUNNING if self.started_at is not None else Phase.STARTING
            return self._observation(phase if self.term_at is None else Phase.STOPPING, now)
        if self.ended is None or self.ended.scrubbed != self.scrubbed:
            phase = Phase.EXITED if self.started_at is not None else Phase.FAILED
            self.ended = self._observation(phase, self.ended_at)
        return self.ended

    def _observation(self, phase: Phase, seen_at: datetime) -> Observation:
        """Nothing that happened after `seen_at` is in it."""

        def seen(at: datetime | None) -> datetime | None:
            return at if at is not None and at <= seen_at else None

        started_at, term_at = seen(self.started_at), seen(self.term_at)
        exited_at = seen(self.ended_at) if self.started_at is not None else None
        ran_ms = 0 if started_at is None else millis_between(started_at, exited_at or seen_at)
        return Observation(
            run_id=self.spec.run_id,
            workload_id=self.spec.workload_id,
            phase=phase,
            started_at=started_at,
            term_at=term_at,
            term_reason=self.term_reason if term_at is not None else None,
            exited_at=exited_at,
            exit_code=self.exit_code if exited_at is not None else None,
            last_evidence_at=seen_at,
            deadline_at=self.deadline_at,
            cpu_ms=ran_ms * len(self.spec.devices),
            memory_bytes=0 if self.ended_at is not None else self.spec.memory_bytes // 8,
            disk_bytes=0,
            failure=self.failure if phase is Phase.FAILED else None,
            scrubbed=self.scrubbed,
        )
