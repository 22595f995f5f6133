"""The Engine port over simulated nodes."""

from __future__ import annotations

import heapq
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

from sublet.base.kernel.clock import Clock
from sublet.base.kernel.ids import seeded_rng
from sublet.capacity.engines.port import (
    FENCES,
    Device,
    EngineError,
    Fence,
    Inventory,
    NotAttachable,
    Notice,
    Observation,
    RunNotFound,
    ScrubReport,
    StartRefused,
    StartSpec,
    Strength,
)
from sublet.capacity.engines.simulated.behaviour import behaviour_of
from sublet.capacity.engines.simulated.faults import Fault, FaultKind, Rng
from sublet.capacity.engines.simulated.run import SimulatedRun

GIB = 1 << 30


@dataclass(slots=True)
class _Node:
    name: str
    devices: tuple[Device, ...]
    boots: int = 1
    silent_from: datetime | None = None
    silent_until: datetime | None = None
    next_starts: list[FaultKind] = field(default_factory=list)


class SimulatedEngine:
    """Nodes `n0001…`, devices `n0001.gpu0…`. State is a function of the clock, seen when asked.

    `start_seconds` is what a start takes; with `start_jitter` up to that share more, drawn from
    `rng`. `faults` happen at their times; the methods below put the same troubles at once.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        nodes: int = 1,
        devices: int = 2,
        kind: Literal["cpu", "gpu"] = "gpu",
        model: str = "SIM-80G",
        memory_bytes: int = 80 * GIB,
        rng: Rng | None = None,
        start_seconds: float = 1.0,
        start_jitter: float = 0.0,
        fences: Mapping[str, Strength] | None = None,
        faults: Iterable[Fault] = (),
    ) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._rng = rng or seeded_rng(0)
        self._start = timedelta(seconds=start_seconds)
        self._jitter = start_jitter
        self._nodes: dict[str, _Node] = {}
        self._node_of: dict[str, str] = {}
        for number in range(1, nodes + 1):
            name = f"n{number:04d}"
            made = tuple(
                Device(name=f"{name}.{kind}{i}", kind=kind, model=model, memory_bytes=memory_bytes)
                for i in range(devices)
            )
            self._nodes[name] = _Node(name, made)
            self._node_of.update({device.name: name for device in made})
        self._fences = {f: _fence((fences or {}).get(f, "enforced")) for f in FENCES}
        self._faults = sorted(faults, key=lambda fault: fault.at, reverse=True)
        self._runs: dict[str, SimulatedRun] = {}
        self._holder: dict[str, str] = {}
        self._due: list[tuple[datetime, str]] = []
        self._expected: dict[str, datetime] = {}
        self._lost_until: dict[str, datetime | None] = {}
        self._dirty_until: dict[str, datetime | None] = {}
        self.erased_homes: list[str] = []

    # ---- the port -------------------------------------------------------------------------

    def inventory(self) -> Inventory:
        """The first node: what an engine of one machine would say."""
        with self._lock:
            now = self._evolve()
            return self._inventory(next(iter(self._nodes.values())), now)

    def inventories(self) -> list[Inventory]:
        """Every node that answers; a silent one is left out, which is not the same as empty."""
        with self._lock:
            now = self._evolve()
            return [
                self._inventory(node, now)
                for node in self._nodes.values()
                if self._silent_since(node, now) is None
            ]

    def _inventory(self, node: _Node, now: datetime) -> Inventory:
        self._answering(node, now)
        present = tuple(
            device for device in node.devices if not _in_force(self._lost_until, device.name, now)
        )
        return Inventory(
            node=node.name,
            devices=present,
            disk_bytes=1000 * GIB,
            fences=self._fences,
            outbound="none",
            boot_id=f"{self._clock.boot_id()}-{node.name}-{node.boots}",
        )

    def start(self, spec: StartSpec) -> None:
        with self._lock:
            now = self._evolve()
            if spec.run_id in self._runs:
                return
            node = self._node_for(spec.devices)
            if spec.kind != "instance" and not spec.command:
                raise StartRefused(f"a {spec.kind} needs a command")
            self._answering(node, now)
            fault = node.next_starts.pop(0) if node.next_starts else None
            if fault is FaultKind.START_UNREACHABLE:
                raise EngineError(f"node {node.name} did not answer")
            self._refuse_held(spec, now)
            delay = self._start * (1 + self._jitter * self._rng.random())
            run = SimulatedRun(
                spec=spec,
                node=node.name,
                behaviour=behaviour_of(spec.kind, spec.command, spec.env),
                ready_at=now + delay,
                fails="the sandbox did not come up" if fault is FaultKind.START_FAILS else None,
                runway_until=max(spec.runway_until, now),
                metadata=dict(spec.metadata),
            )
            self._runs[spec.run_id] = run
            self._holder.update(dict.fromkeys(spec.devices, spec.run_id))
            self._expect(run)
            if fault is FaultKind.START_ANSWER_LOST:
                raise EngineError(f"node {node.name} broke off before it answered")

    def _refuse_held(self, spec: StartSpec, now: datetime) -> None:
        for name in spec.devices:
            if _in_force(self._lost_until, name, now):
                raise StartRefused(f"device {name} is missing")
            holder = self._runs.get(self._holder.get(name, ""))
            if holder is not None and holder.is_live:
                raise StartRefused(f"device {name} is held by {holder.spec.run_id}")

    def observe(self) -> Mapping[str, Observation]:
        with self._lock:
            now = self._evolve()
            silent = {n.name: self._silent_since(n, now) for n in self._nodes.values()}
            return {
                run_id: run.observed(now, silent[run.node]) for run_id, run in self._runs.items()
            }

    def notice(self, run_id: str, notice: Notice) -> datetime:
        with self._lock:
            run, now = self._reach(run_id)
            if run.term_at is not None or not run.is_live:
                return run.term_at or now
            published = run.notice is None
            run.notice = notice
            fixed = max(notice.term_at, run.deadline_at or now, now)
            run.deadline_at = fixed
            if published and run.spec.notice_signal and run.started_at is not None:
                run.write(f"{run.spec.notice_signal}\n")
            self._expect(run)
            return fixed

    def withdraw(self, run_id: str) -> None:
        with self._lock:
            run, now = self._reach(run_id)
            if run.term_at is None and run.is_live:
                # The runway may have passed under the notice: it must not end the run at once.
                run.runway_until = max(run.runway_until, run.deadline_at or now)
                run.notice = run.deadline_at = None
                self._expect(run)

    def extend(self, run_id: str, until: datetime) -> None:
        with self._lock:
            run, now = self._reach(run_id)
            run.runway_until = max(until, now)
            self._expect(run)

    def publish_metadata(self, run_id: str, document: Mapping[str, Any]) -> None:
        with self._lock:
            self._reach(run_id)[0].metadata = dict(document)

    def signal(self, run_id: str, name: str) -> None:
        with self._lock:
            run, _ = self._reach(run_id)
            if not run.is_live or run.started_at is None:
                raise NotAttachable
            run.write(f"{name}\n")

    def stop(self, run_id: str, *, grace_seconds: int, reason: str) -> None:
        with self._lock:
            run, now = self._reach(run_id)
            if run.is_live:
                run.send_term(now, f"stop:{reason}", grace_seconds)
                run.evolve(now)
                self._expect(run)

    def logs(self, run_id: str, *, offset: int = 0, limit: int = 1 << 16) -> tuple[bytes, int]:
        with self._lock:
            run, _ = self._reach(run_id)
            data = bytes(run.log[offset : offset + limit])
            return data, offset + len(data)

    def door(self, run_id: str, name: str) -> str:
        with self._lock:
            run, _ = self._reach(run_id)
            return f"/simulated/{run.node}/homes/{run.spec.home}/{name}"

    def scrub(self, run_id: str) -> ScrubReport:
        with self._lock:
            run, now = self._reach(run_id)
            if run.is_live:
                return ScrubReport(clean=False, at=now, findings=("the run is alive",))
            findings = tuple(
                f"{name}: 12 GiB in use by a process of {run.spec.workload_id}"
                for name in run.spec.devices
                if _in_force(self._dirty_until, name, now)
            )
            run.scrubbed = not findings
            return ScrubReport(clean=not findings, at=now, findings=findings)

    def forget(self, run_id: str) -> None:
        with self._lock:
            run = self._runs.get(run_id)
            if run is None or not run.scrubbed:
                return
            del self._runs[run_id]
            for name in run.spec.devices:
                if self._holder.get(name) == run_id:
                    del self._holder[name]

    def erase_home(self, home: str) -> None:
        with self._lock:
            self.erased_homes.append(home)

    # ---- troubles -------------------------------------------------------------------------

    def inject(self, fault: Fault) -> None:
        """Let it happen now, whatever its time says."""
        with self._lock:
            self._strike(fault, self._evolve())

    def fail_next_start(self, node: str, kind: FaultKind = FaultKind.START_FAILS) -> None:
        self._nodes[node].next_starts.append(kind)

    def silence(self, node: str, seconds: float) -> None:
        self.inject(
            Fault(at=self._clock.now(), kind=FaultKind.SILENCE, target=node, seconds=seconds)
        )

    def end_silence(self, node: str) -> None:
        with self._lock:
            self._evolve()
            self._nodes[node].silent_from = self._nodes[node].silent_until = None

    def lose_device(self, name: str, seconds: float | None = None) -> None:
        """For a while, or until `restore_device`."""
        with self._lock:
            self._lost_until[name] = _until(self._evolve(), seconds)

    def restore_device(self, name: str) -> None:
        self._lost_until.pop(name, None)

    def dirty(self, device: str, seconds: float | None = None) -> None:
        """For a while, or until `clean`."""
        with self._lock:
            self._dirty_until[device] = _until(self._evolve(), seconds)

    def clean(self, device: str) -> None:
        self._dirty_until.pop(device, None)

    def reboot(self, node: str) -> None:
        self.inject(Fault(at=self._clock.now(), kind=FaultKind.REBOOT, target=node))

    # ---- what a test may look at ----------------------------------------------------------

    def run(self, run_id: str) -> SimulatedRun:
        """The run as it stands now, behind any silence."""
        with self._lock:
            self._evolve()
            return self._runs[run_id]

    def live_runs(self) -> list[SimulatedRun]:
        with self._lock:
            self._evolve()
            return [run for run in self._runs.values() if run.is_live]

    def next_event_at(self) -> datetime | None:
        """When something will happen by itself: how far a rehearsal may jump."""
        with self._lock:
            self._evolve()
            coming = [self._due[0][0]] if self._due else []
            coming += [self._faults[-1].at] if self._faults else []
            return min(coming, default=None)

    # ---- inside ---------------------------------------------------------------------------

    def _evolve(self) -> datetime:
        now = self._clock.now()
        while self._faults and self._faults[-1].at <= now:
            fault = self._faults.pop()
            self._evolve_runs(fault.at)
            self._strike(fault, fault.at)
        self._evolve_runs(now)
        return now

    def _evolve_runs(self, now: datetime) -> None:
        while self._due and self._due[0][0] <= now:
            _, run_id = heapq.heappop(self._due)
            expected = self._expected.get(run_id)
            if expected is not None and expected <= now:
                run = self._runs[run_id]
                run.evolve(now)
                self._expect(run)
        while self._due and self._expected.get(self._due[0][1]) != self._due[0][0]:
            heapq.heappop(self._due)

    def _expect(self, run: SimulatedRun) -> None:
        """One entry a run counts, the one in `_expected`: others in the heap are of an older mind."""
        run_id, at = run.spec.run_id, run.next_change_at()
        if at is None:
            self._expected.pop(run_id, None)
        elif self._expected.get(run_id) != at:
            self._expected[run_id] = at
            heapq.heappush(self._due, (at, run_id))

    def _strike(self, fault: Fault, now: datetime) -> None:
        until = _until(now, fault.seconds)
        match fault.kind:
            case FaultKind.DEVICE_LOST:
                self._lost_until[fault.target] = until
            case FaultKind.DIRTY:
                self._dirty_until[fault.target] = until
            case FaultKind.SILENCE:
                node = self._nodes[fault.target]
                node.silent_from, node.silent_until = self._silent_since(node, now) or now, until
            case FaultKind.REBOOT:
                node = self._nodes[fault.target]
                node.boots += 1
                for run in self._runs.values():
                    if run.node == node.name:
                        run.vanish(now)
            case FaultKind.START_FAILS | FaultKind.START_UNREACHABLE | FaultKind.START_ANSWER_LOST:
                self._nodes[fault.target].next_starts.append(fault.kind)

    def _silent_since(self, node: _Node, now: datetime) -> datetime | None:
        if node.silent_from is None or node.silent_until is None or now >= node.silent_until:
            return None
        return node.silent_from

    def _answering(self, node: _Node, now: datetime) -> None:
        if self._silent_since(node, now) is not None:
            raise EngineError(f"node {node.name} does not answer")

    def _reach(self, run_id: str) -> tuple[SimulatedRun, datetime]:
        now = self._evolve()
        run = self._runs.get(run_id)
        if run is None:
            raise RunNotFound
        self._answering(self._nodes[run.node], now)
        return run, now

    def _node_for(self, devices: Sequence[str]) -> _Node:
        unknown = [name for name in devices if name not in self._node_of]
        if unknown or not devices:
            raise StartRefused(f"no such devices here: {', '.join(unknown) or 'none named'}")
        nodes = {self._node_of[name] for name in devices}
        if len(nodes) != 1:
            raise StartRefused("a run's devices lie on one node")
        return self._nodes[nodes.pop()]


def _fence(strength: Strength) -> Fence:
    return Fence(strength=strength, by="simulation", evidence="as the world was set up")


def _until(now: datetime, seconds: float | None) -> datetime | None:
    return None if seconds is None else now + timedelta(seconds=seconds)


def _in_force(troubles: Mapping[str, datetime | None], name: str, now: datetime) -> bool:
    if name not in troubles:
        return False
    until = troubles[name]
    return until is None or now < until
