"""Control groups, both generations, as far as this process may write them.

`find` looks for places where a folder may be made, per controller; `create`, `join`, `usage`,
`processes` and `remove` act on the folders of one run. Generation 1 mounts each controller by
itself; generation 2 has one tree, in which a group holds either processes or children with
controllers, so a delegated group first moves its own processes into a leaf.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

CONTROLLERS = ("cpu", "cpuacct", "cpuset", "memory", "pids")
UNIFIED = "unified"
"""The key that marks a set of folders as one of generation 2."""
LEAF = "sublet-control"
PERIOD_US = 100_000


@dataclass(frozen=True)
class Mount:
    point: str
    root: str
    controllers: frozenset[str]
    unified: bool


def mounts(mountinfo: str) -> list[Mount]:
    found = []
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        words, tail = before.split(), after.split()
        if len(words) < 5 or len(tail) < 3 or not tail[0].startswith("cgroup"):
            continue
        names = frozenset(tail[2].split(",")) & frozenset(CONTROLLERS)
        found.append(Mount(words[4], words[3], names, tail[0] == "cgroup2"))
    return found


def own_paths(self_cgroup: str) -> dict[str, str]:
    """Controller (or `unified`) → this process's group."""
    paths = {}
    for line in self_cgroup.splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        for name in names.split(",") if names else [UNIFIED]:
            paths[name] = path
    return paths


def find(name: str) -> dict[str, str]:
    """A folder `name` per controller, made if need be, in which runs get theirs."""
    try:
        with open("/proc/self/mountinfo") as source:
            seen = mounts(source.read())
        with open("/proc/self/cgroup") as source:
            own = own_paths(source.read())
    except OSError:
        return {}
    bases: dict[str, str] = {}
    for mount in seen:
        if not mount.unified:
            for controller in sorted(mount.controllers - bases.keys()):
                parent = _folder(mount, own.get(controller, "/"))
                base = os.path.join(parent, name)
                if _make(base, unified=False):
                    bases[controller] = base
    if bases:
        return bases
    for mount in seen:
        if mount.unified:
            for parent in _unified_parents(mount, own.get(UNIFIED, "/")):
                base = os.path.join(parent, name)
                if _make(base, unified=True):
                    return {UNIFIED: base, **dict.fromkeys(_available(base), base)}
    return {}


def _folder(mount: Mount, path: str) -> str:
    """Where our own group lies under a mount; the mount itself if it is not visible there."""
    relative = os.path.relpath(path, mount.root)
    folder = os.path.normpath(os.path.join(mount.point, relative))
    inside = os.path.commonpath([folder, mount.point]) == mount.point
    return folder if inside and os.path.isdir(folder) else mount.point


def _unified_parents(mount: Mount, own: str) -> Iterable[str]:
    """Groups of generation 2 that may get children, the best first.

    The root of the tree may hold processes and children both, but takes root to write. Else our
    own group, if it was delegated: then its processes are ours to move into a leaf.
    """
    if os.access(mount.point, os.W_OK) and not _has_processes_in_the_way(mount.point):
        yield mount.point
    folder = _folder(mount, own)
    if os.path.basename(folder) == LEAF:
        folder = os.path.dirname(folder)
    if os.access(os.path.join(folder, "cgroup.subtree_control"), os.W_OK):
        yield folder


def _has_processes_in_the_way(folder: str) -> bool:
    """The real root has no `cgroup.type`; every other group has."""
    return os.path.exists(os.path.join(folder, "cgroup.type")) and bool(_pids(folder))


def _available(base: str) -> list[str]:
    return [name for name in _read(base, "cgroup.controllers").split() if name in CONTROLLERS]


def _make(base: str, *, unified: bool) -> bool:
    parent = os.path.dirname(base)
    try:
        if unified:
            _enable(parent)
        os.makedirs(base, exist_ok=True)
        if unified:
            _enable(base)
            return bool(_available(base))
        _inherit_cpuset(base)
    except OSError:
        return False
    return os.access(os.path.join(base, "cgroup.procs"), os.W_OK)


def _enable(folder: str) -> None:
    """Hand the controllers down to the children of a group of generation 2."""
    for name in _available(folder):
        if name in _read(folder, "cgroup.subtree_control").split():
            continue
        try:
            _write(folder, "cgroup.subtree_control", f"+{name}")
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            leaf = os.path.join(folder, LEAF)
            os.makedirs(leaf, exist_ok=True)
            for pid in _pids(folder):
                _write(leaf, "cgroup.procs", str(pid))
            _write(folder, "cgroup.subtree_control", f"+{name}")


def _inherit_cpuset(folder: str) -> None:
    """A new cpuset of generation 1 is empty and takes no process until it is filled."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        if os.path.exists(os.path.join(folder, name)) and not _read(folder, name).strip():
            _write(folder, name, _read(os.path.dirname(folder), name).strip())


# -- one run


def folders(bases: Mapping[str, str], run_id: str) -> dict[str, str]:
    return {controller: os.path.join(base, run_id) for controller, base in bases.items()}


def create(
    run: Mapping[str, str],
    *,
    cpus: list[int],
    cpu_percent: int,
    memory_bytes: int,
    pids: int,
) -> None:
    """Make the groups of a run and set their limits. Raises OSError."""
    unified = UNIFIED in run
    for folder in dict.fromkeys(run.values()):
        for _ in range(3):  # another engine may be removing the empty base at this moment
            if not _make(os.path.dirname(folder), unified=unified):
                raise OSError(errno.EACCES, f"no group can be made in {folder}")
            try:
                os.mkdir(folder)
            except FileNotFoundError:
                continue
            except FileExistsError:
                pass
            break
        if not unified:
            _inherit_cpuset(folder)
    if "cpuset" in run and cpus:
        _write(run["cpuset"], "cpuset.cpus", ",".join(str(cpu) for cpu in cpus))
    if "cpu" in run and cpu_percent:
        quota = PERIOD_US * cpu_percent // 100
        if unified:
            _write(run["cpu"], "cpu.max", f"{quota} {PERIOD_US}")
        else:
            _write(run["cpu"], "cpu.cfs_period_us", str(PERIOD_US))
            _write(run["cpu"], "cpu.cfs_quota_us", str(quota))
    if "memory" in run:
        if unified:
            _write(run["memory"], "memory.max", str(memory_bytes))
            _write_if_there(run["memory"], "memory.swap.max", "0")
        else:
            _write(run["memory"], "memory.limit_in_bytes", str(memory_bytes))
            _write_if_there(run["memory"], "memory.memsw.limit_in_bytes", str(memory_bytes))
    if "pids" in run:
        _write(run["pids"], "pids.max", str(pids))


def join(run: Mapping[str, str]) -> None:
    """Move the calling process in. Raises OSError."""
    for folder in dict.fromkeys(run.values()):
        _write(folder, "cgroup.procs", "0")


def cpu_ms(run: Mapping[str, str]) -> int | None:
    """CPU time of all that ever ran in the run's group, or None where nobody counts."""
    try:
        if "cpuacct" in run:
            return int(_read(run["cpuacct"], "cpuacct.usage")) // 1_000_000
        if UNIFIED in run:
            usage = dict(line.split() for line in _read(run[UNIFIED], "cpu.stat").splitlines())
            return int(usage["usage_usec"]) // 1000
    except (OSError, ValueError, KeyError):
        pass
    return None


def memory_bytes(run: Mapping[str, str]) -> int | None:
    if "memory" not in run:
        return None
    name = "memory.current" if UNIFIED in run else "memory.usage_in_bytes"
    try:
        return int(_read(run["memory"], name))
    except (OSError, ValueError):
        return None


def oom_kills(run: Mapping[str, str]) -> int:
    if "memory" not in run:
        return 0
    name = "memory.events" if UNIFIED in run else "memory.oom_control"
    try:
        events = dict(line.split() for line in _read(run["memory"], name).splitlines())
        return int(events.get("oom_kill", 0))
    except (OSError, ValueError):
        return 0


def processes(run: Mapping[str, str]) -> set[int]:
    found: set[int] = set()
    for folder in dict.fromkeys(run.values()):
        found.update(_pids(folder))
    return found


def remove(run: Mapping[str, str]) -> list[str]:
    """Remove the groups of a run; what is left (busy) comes back. The base goes with the last."""
    left = []
    for folder in dict.fromkeys(run.values()):
        for attempt in range(10):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                break
            except OSError:
                if attempt == 9:
                    left.append(folder)
                time.sleep(0.01)  # the kernel lets go of a group shortly after its last process
            else:
                break
        try:
            os.rmdir(os.path.dirname(folder))
        except OSError:
            continue  # other runs are in it
    return left


def _pids(folder: str) -> list[int]:
    try:
        return [int(word) for word in _read(folder, "cgroup.procs").split()]
    except (OSError, ValueError):
        return []


def _read(folder: str, name: str) -> str:
    with open(os.path.join(folder, name)) as source:
        return source.read()


def _write(folder: str, name: str, value: str) -> None:
    fd = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _write_if_there(folder: str, name: str, value: str) -> None:
    if os.path.exists(os.path.join(folder, name)):
        _write(folder, name, value)
