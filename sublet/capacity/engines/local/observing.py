"""What can be said of a run from its files and its lock, without asking anybody.

    lock held, state there     what the state says, as fresh as its evidence
    lock free, state final     what the state says
    lock free, state not final its supervisor is gone: looked into, then written down
    no state                   held: it is being started; free: it never was

A run whose supervisor died is over when nothing of it is left: no process in its cgroup, none
that carries its id. Until then it is silent, and what is left is killed, as the kernel should have
done already. A run of another boot is over. It is billed to its last evidence in either case.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from datetime import datetime
from pathlib import Path

from sublet.base.kernel.clock import Clock
from sublet.base.kernel.interval import from_micros
from sublet.capacity.engines.local.supervise import cgroups, records, usage
from sublet.capacity.engines.port import Observation, Phase

KILLED = 137
STALE_NS = 15_000_000_000
"""A supervisor writes evidence every second; this is no longer a busy machine."""


def observe(folder: Path, clock: Clock) -> Observation | None:
    """One run; None where there is no trace of one. Never raises for what it finds."""
    path = str(folder)
    try:
        plan = records.read_plan(path)
    except records.Damaged as damage:
        return _unreadable(folder, None, damage)
    if plan is None:
        return None
    held = _is_held(path)  # before the state: a final state is written before the lock is let go
    try:
        state = records.read_state(path)
    except records.Damaged as damage:
        return _unreadable(folder, plan, damage)
    if state is None:
        if not held:
            return None
        return Observation(run_id=plan.run_id, workload_id=plan.workload_id, phase=Phase.STARTING)
    found = _observation(path, plan, state, clock)
    if state.v > records.PROTOCOL:
        return _silent(found, f"its records speak protocol {state.v}")
    if state.is_over:
        return found
    if held:
        age_ns = clock.boot_ns() - _last_evidence_ns(path, state)
        return _silent(found, "its supervisor is stuck") if age_ns > STALE_NS else found
    concluded = conclude(path, plan, clock)
    if concluded is None or not concluded.is_over:
        return _silent(found, "its supervisor is gone and something of it may be left")
    return _observation(path, plan, concluded, clock)


def conclude(path: str, plan: records.Plan, clock: Clock) -> records.State | None:
    """Write down the end of a run whose supervisor is gone; None where it is not over for sure."""
    try:
        lock = records.open_lock(path)
    except OSError:
        return None
    try:
        if not records.take_lock(lock):
            return None
        state = records.read_state(path)
        if state is None or state.is_over:
            return state
        rebooted = state.boot_id != clock.boot_id()
        if not rebooted and kill_what_is_left(plan, state):
            return None
        last = _last_evidence_ns(path, state)
        state.exited_ns = last
        if state.started_ns is None:
            state.phase = "failed"
            state.failure = (
                "the machine restarted before it ran"
                if rebooted
                else "its supervisor ended before it ran"
            )
        else:
            state.phase = "exited"
            state.exit_code = KILLED
        records.write_state(path, state)
        return state
    except (OSError, records.Damaged):
        return None
    finally:
        os.close(lock)


def kill_what_is_left(plan: records.Plan, state: records.State | None) -> bool:
    """SIGKILL to every process of the run that is found; True where there was one."""
    left = what_is_left(plan, state)
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        except PermissionError:
            return True
    return bool(left)


def what_is_left(plan: records.Plan, state: records.State | None) -> set[int]:
    """Processes in its cgroups, with its mark, and below its init (whose mark may be hidden)."""
    left = cgroups.processes(plan.cgroups) | set(usage.carrying(plan.mark))
    if state is not None and state.init_pid is not None:
        ticks = usage.started_ticks(state.init_pid)
        if ticks is not None and ticks == state.init_ticks:
            left |= {process.pid for process in usage.tree(state.init_pid)}
    return left


def _is_held(path: str) -> bool:
    """Where it cannot be told, somebody may hold it."""
    try:
        return records.is_locked(path)
    except OSError:
        return True


def _last_evidence_ns(path: str, state: records.State) -> int:
    """A final state's own changes (its end, its scrub) are no sign of life."""
    evidence = records.read_evidence(path)
    instants = [state.started_ns, state.term_ns, evidence.at_ns if evidence else None]
    if not state.is_over:
        instants.append(state.changed_ns)
    return max((instant for instant in instants if instant is not None), default=state.changed_ns)


def _unreadable(folder: Path, plan: records.Plan | None, damage: records.Damaged) -> Observation:
    """Files that are not what they should be. With nobody alive and nothing left it has failed."""
    workload = plan.workload_id if plan is not None else ""
    silent = _is_held(str(folder)) or plan is None or kill_what_is_left(plan, None)
    return Observation(
        run_id=folder.name,
        workload_id=workload,
        phase=Phase.SILENT if silent else Phase.FAILED,
        failure=f"its records are damaged: {damage}",
    )


def _silent(found: Observation, why: str) -> Observation:
    return dataclasses.replace(found, phase=Phase.SILENT, failure=why)


def _observation(path: str, plan: records.Plan, state: records.State, clock: Clock) -> Observation:
    def at(instant: int | None) -> datetime | None:
        return None if instant is None else _instant(plan, instant, clock)

    evidence = records.read_evidence(path)
    last = state.exited_ns if state.is_over else _last_evidence_ns(path, state)
    return Observation(
        run_id=plan.run_id,
        workload_id=plan.workload_id,
        phase=Phase(state.phase),
        started_at=at(state.started_ns),
        term_at=at(state.term_ns),
        term_reason=state.term_reason,
        exited_at=at(state.exited_ns),
        exit_code=state.exit_code,
        last_evidence_at=at(last),
        deadline_at=at(state.deadline_ns),
        runway_until=at(state.runway_ns),
        cpu_ms=max(state.cpu_ms, evidence.cpu_ms if evidence else 0),
        memory_bytes=0 if state.is_over else (evidence.memory_bytes if evidence else 0),
        disk_bytes=max(state.disk_bytes, evidence.disk_bytes if evidence else 0),
        failure=state.failure,
        scrubbed=state.scrubbed_ns is not None,
    )


def _instant(plan: records.Plan, boot_ns: int, clock: Clock) -> datetime:
    """An instant of another boot is told from what its clock said when the run was planned."""
    if plan.boot_id == clock.boot_id():
        return clock.from_boot_ns(boot_ns)
    return from_micros(plan.planned_us + (boot_ns - plan.planned_ns) // 1000)
