"""After a run: make sure that nothing of it is left, and say so only after looking.

Processes, scratch, shared memory, cgroups, the devices' memory. What is found is ended or deleted
first and reported only if it stays. Doing it again does it again: a clean report is always fresh.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from sublet.base.kernel.clock import Clock
from sublet.capacity.engines.local import hardware, observing
from sublet.capacity.engines.local.supervise import cgroups, records
from sublet.capacity.engines.local.wipe import wipe
from sublet.capacity.engines.port import EngineError, Observation, Phase, ScrubReport

_ROUNDS = 50
_PAUSE_SECONDS = 0.02


def scrub_run(folder: Path, clock: Clock, seen: Observation) -> ScrubReport:
    """Nothing is touched, and nothing is clean, before EXITED or FAILED."""
    if seen.phase not in (Phase.EXITED, Phase.FAILED):
        finding = f"the run is {seen.phase}, not over"
        return ScrubReport(clean=False, at=clock.now(), findings=(finding,))
    try:
        plan = records.read_plan(str(folder))
        state = records.read_state(str(folder))
    except records.Damaged as damage:
        return ScrubReport(clean=False, at=clock.now(), findings=(str(damage),))
    assert plan is not None
    if state is not None and state.boot_id != clock.boot_id():
        state = None  # its process numbers mean nothing any more
    findings = [
        *_end_processes(plan, state),
        *_empty_shared_memory(plan),
        *wipe(plan.scratch),
        *(f"the cgroup {left} is busy" for left in cgroups.remove(plan.cgroups)),
        *hardware.gpu_findings(plan.gpu_ids),
    ]
    if not findings:
        _mark(folder)
    return ScrubReport(clean=not findings, at=clock.now(), findings=tuple(findings))


def _end_processes(plan: records.Plan, state: records.State | None) -> list[str]:
    for _ in range(_ROUNDS):
        if not observing.kill_what_is_left(plan, state):
            return []
        time.sleep(_PAUSE_SECONDS)
    left = sorted(observing.what_is_left(plan, state))
    return [f"process {pid} does not end" for pid in left]


def _empty_shared_memory(plan: records.Plan) -> list[str]:
    """A sandbox's own went with its last process. A bare run's is the host's, told by its uid."""
    if plan.rung == "sandbox" or plan.uid is None:
        return []
    findings = []
    with os.scandir("/dev/shm") as entries:  # noqa: S108
        for entry in entries:
            if entry.stat(follow_symlinks=False).st_uid == plan.uid:
                try:
                    os.unlink(entry.path)
                except OSError as error:
                    findings.append(f"{entry.path}: {error.strerror}")
    return findings


def _mark(folder: Path) -> None:
    """The supervisor is gone for good, so the state is ours to write."""
    try:
        state = records.read_state(str(folder))
        if state is not None:
            state.scrubbed_ns = records.boot_ns()
            records.write_state(str(folder), state)
    except (OSError, records.Damaged) as error:
        raise EngineError(f"the scrub could not be written down: {error}") from error
