"""The fence table, from probes that try to break out.

A word in a table is worth what was tried: sandboxes are really started with `intruder` inside
(see `party`), and each row says what it reached. That takes a few seconds, so the table is kept
for this boot, this code and these powers.

    enforced   the attempt failed, and the kernel is what held it
    watched    a limit by rlimit or by the supervisor's watch: it holds late, or process by process
    none       the attempt succeeded, or nothing could be started
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sublet.base.kernel.clock import Clock
from sublet.capacity.engines.local import party
from sublet.capacity.engines.local.party import MEMORY, PIDS, Outcome
from sublet.capacity.engines.local.planning import BUBBLEWRAP_REMEDY, Rules
from sublet.capacity.engines.local.supervise import records
from sublet.capacity.engines.local.wipe import wipe
from sublet.capacity.engines.port import FENCES, Engine, Fence, Strength

_CACHE = "fences.json"
_FOLDER = "probe"
_CPU_SLACK = 1.05
_MEMORY_SLACK = 1.1
_SHOWN = 4
_CGROUP_REMEDY = (
    "run as root, or with a delegated cgroup: systemd-run --user --scope -p Delegate=yes"
)
_NAMESPACE_REMEDY = (
    "bubblewrap 0.8 or newer, and unprivileged user namespaces allowed (sysctl, AppArmor)"
)
_FILTER_REMEDY = "a kernel and processor on which the system-call filter works"


@dataclass(frozen=True)
class Probed:
    fences: Mapping[str, Fence]
    is_outbound_shut: bool
    """A way out was opened by trying, and the host was not reached through it."""


MakeEngine = Callable[[Path], Engine]


def probe(
    root: Path,
    clock: Clock,
    rules: Rules,
    devices: Sequence[str],
    make: MakeEngine,
    *,
    cpus_each: float,
    fresh: bool,
) -> Probed:
    """The table of this boot; `fresh` tries everything again. `cpus_each`: of one device."""
    kept = None if fresh else find_kept(root, clock, rules)
    if kept is not None:
        return kept
    if rules.bubblewrap is None and not rules.trusted:
        probed = _nothing("bubblewrap is not installed: nothing is started", BUBBLEWRAP_REMEDY)
    else:
        folder = root / _FOLDER
        wipe(str(folder))
        try:
            outcomes = party.attempts(make(folder), clock, folder, devices, rules.outbound)
        finally:
            wipe(str(folder))
        probed = judge(outcomes, rules, cpus_each)
    _keep(root, _key(clock, rules), probed)
    return probed


def find_kept(root: Path, clock: Clock, rules: Rules) -> Probed | None:
    """The table if it has been made, without trying anything."""
    try:
        found = json.loads((root / _CACHE).read_bytes())
        if found["key"] != _key(clock, rules):
            return None
        fences = {name: Fence(**row) for name, row in found["fences"].items()}
        return Probed(fences, bool(found["is_outbound_shut"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _keep(root: Path, key: str, probed: Probed) -> None:
    with contextlib.suppress(OSError):  # a full disk costs a probe at the next look, no more
        found = {"key": key, **dataclasses.asdict(probed)}
        records.write_whole(str(root), _CACHE, json.dumps(found).encode())


def _key(clock: Clock, rules: Rules) -> str:
    """Boot, code and powers: what the table depends on."""
    status = Path("/proc/self/status").read_text().splitlines()
    about = {
        "boot": clock.boot_id(),
        "code": _code(),
        "uid": os.geteuid(),
        "powers": [line for line in status if line.startswith(("CapEff", "CapBnd"))],
        "bubblewrap": os.stat(rules.bubblewrap).st_mtime_ns if rules.bubblewrap else 0,
        "rules": rules.shown(),
        "cpus": sorted(os.sched_getaffinity(0)),
    }
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _code() -> str:
    """This engine's version, as exact as can be."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        code.update(path.read_bytes())
    return code.hexdigest()


# -- the verdict


def judge(outcomes: Mapping[str, Outcome], rules: Rules, cpus_each: float) -> Probed:
    """What the attempts say about each fence."""
    walls = outcomes["walls"].answer
    if walls is None:
        why = outcomes["walls"].failure or "it did not answer"
        return _nothing(f"no sandbox could be started: {why}", _NAMESPACE_REMEDY)
    out = outcomes.get("outbound")
    out_reached = _reached(out, "network")
    inside = f"user namespaces inside: {walls['namespaces']}"
    wall_remedy = BUBBLEWRAP_REMEDY if rules.bubblewrap is None else _NAMESPACE_REMEDY
    network = [*walls["network"], *out_reached]
    network_remedy = wall_remedy
    if network and all("vsock" in way for way in network):
        network_remedy = _FILTER_REMEDY
    fences = {
        "cpu": _cpu(outcomes["cpu"], rules, cpus_each),
        "memory": _memory(outcomes["memory"], rules),
        "files": _wall(walls["files"], "mount namespace", inside, wall_remedy),
        "disk": _disk(outcomes["disk"]),
        "network": _wall(network, "network namespace", _way_out(rules, out), network_remedy),
        "processes": _processes(walls["processes"], outcomes["bomb"], rules, wall_remedy),
        "devices": _wall(walls["devices"], "minimal /dev", "no node opened or made", wall_remedy),
    }
    shut = out is not None and out.answer is not None and not out_reached
    return Probed({name: fences[name] for name in FENCES}, shut)


def _nothing(evidence: str, remedy: str) -> Probed:
    row = Fence(strength="none", by="nothing", evidence=evidence, remedy=remedy)
    return Probed(dict.fromkeys(FENCES, row), False)


def _reached(outcome: Outcome | None, what: str) -> list[Any]:
    if outcome is None or outcome.answer is None:
        return []
    return list(outcome.answer[what])


def _fence(strength: Strength, by: str, evidence: str, remedy: str = "") -> Fence:
    return Fence(
        strength=strength, by=by, evidence=evidence, remedy="" if strength == "enforced" else remedy
    )


def _wall(reached: Sequence[str], by: str, evidence: str, remedy: str) -> Fence:
    """A fence that holds or does not."""
    if reached:
        shown = ", ".join(map(str, reached[:_SHOWN]))
        return _fence("none", by, f"{len(reached)} reached: {shown}", remedy)
    return _fence("enforced", by, f"nothing reached; {evidence}")


def _way_out(rules: Rules, out: Outcome | None) -> str:
    if out is None:
        return "its own loopback only"
    if out.answer is None:
        return f"{rules.outbound} opened no way out: {out.failure}"
    return (
        f"outbound is the public internet only: neither the host's addresses nor private networks "
        f"are reached through {rules.outbound}"
    )


def _cpu(outcome: Outcome, rules: Rules, cpus_each: float) -> Fence:
    found = outcome.answer
    if found is None:
        return _fence("none", "nothing", outcome.failure, _CGROUP_REMEDY)
    groups = [name for name in ("cpuset", "cpu") if name in rules.cgroup_bases]
    by = f"cgroup ({', '.join(groups)})" if groups else "affinity"
    if not groups and rules.has_seccomp and rules.bubblewrap is not None:
        by = "affinity, which the system-call filter keeps"
    evidence = (
        f"four spinning processes burnt {found['rate']} CPU-seconds a second on "
        f"{found['allowed']} CPUs of {cpus_each:g} allowed; widening: {found['widened']}"
    )
    escaped = found["rate"] > cpus_each * _CPU_SLACK
    widened = found["allowed"] > max(cpus_each, 1) and "cpu" not in rules.cgroup_bases
    return _fence("none" if escaped or widened else "enforced", by, evidence, _CGROUP_REMEDY)


def _memory(outcome: Outcome, rules: Rules) -> Fence:
    touched = max((int(word.get("touched", 0)) for word in outcome.said), default=0)
    evidence = f"{MEMORY >> 20} MiB allowed, {touched >> 20} MiB were written to"
    by_cgroup = "memory" in rules.cgroup_bases
    by = "cgroup (memory)" if by_cgroup else "RLIMIT_DATA and the supervisor's watch"
    held = 0 < touched <= MEMORY * _MEMORY_SLACK
    ended = outcome.seen is not None and outcome.seen.term_reason == "memory"
    if by_cgroup and held:
        return _fence("enforced", by, evidence)
    if held or ended:
        return _fence("watched", by, f"{evidence}, then it was ended", _CGROUP_REMEDY)
    return _fence("none", by, evidence + outcome.failure, _CGROUP_REMEDY)


def _disk(outcome: Outcome) -> Fence:
    """Watched at best: no file system quota is used."""
    if outcome.seen is not None and outcome.seen.term_reason == "disk":
        return _fence(
            "watched",
            "the supervisor's count of home, scratch and deleted files held open, and a reserve",
            "ended after writing past its limit, most of it into deleted files",
            "a volume of its own for the data folder",
        )
    return _fence("none", "nothing", "wrote past its limit and was not ended", "see the log")


def _processes(reached: Sequence[str], outcome: Outcome, rules: Rules, wall_remedy: str) -> Fence:
    if reached:
        return _wall(reached, "process namespace", "", wall_remedy)
    found = outcome.answer or {"forked": 2 * PIDS, "refused": None}
    evidence = (
        f"no process of others seen or signalled; {found['forked']} forks of {PIDS} allowed, "
        f"then {found['refused']}"
    )
    by_cgroup = "pids" in rules.cgroup_bases
    by = f"process namespace, {'cgroup (pids)' if by_cgroup else 'RLIMIT_NPROC'}"
    if found["refused"] is None or int(found["forked"]) > PIDS:
        return _fence("none", by, evidence, _CGROUP_REMEDY)
    return _fence("enforced" if by_cgroup else "watched", by, evidence, _CGROUP_REMEDY)
