"""What a run uses: CPU time and memory, counted from outside.

Where a cgroup counts, it is asked. Else the tree of processes below the run's first one is summed
from /proc: living processes carry what they and their waited-for children used, and the figure
never goes down, so only a child whose parent refuses to wait for it is lost.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from . import cgroups
from .records import Plan

_TICK_MS = 1000 // os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    session: int
    cpu_ms: int
    resident_bytes: int


def processes() -> dict[int, Process]:
    """Every process that /proc shows."""
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as source:
                words = source.read().rpartition(b")")[2].split()
        except OSError:
            continue
        found[int(name)] = Process(
            pid=int(name),
            parent=int(words[1]),
            session=int(words[3]),
            cpu_ms=sum(int(word) for word in words[11:15]) * _TICK_MS,
            resident_bytes=int(words[21]) * _PAGE,
        )
    return found


def tree(root: int, seen: dict[int, Process] | None = None) -> list[Process]:
    """The process and all below it. Orphans inside fall to the run's first process."""
    seen = processes() if seen is None else seen
    below: dict[int, list[Process]] = {}
    for process in seen.values():
        below.setdefault(process.parent, []).append(process)
    found = [seen[root]] if root in seen else []
    queue = [root]
    while queue:
        children = below.get(queue.pop(), [])
        found.extend(children)
        queue.extend(child.pid for child in children)
    return found


def started_ticks(pid: int) -> int | None:
    """When a process was started, in ticks since boot; None where there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as source:
            return int(source.read().rpartition(b")")[2].split()[19])
    except OSError:
        return None


MARK = "SUBLET_RUN_MARK"


def carrying(mark_of_run: str) -> list[int]:
    """Processes whose environment names the run: what a lost supervisor may have left behind."""
    mark = f"{MARK}={mark_of_run}".encode()
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as source:
                if mark in source.read(1 << 20).split(b"\0"):
                    found.append(int(name))
        except OSError:
            continue
    return found


def _proportional_bytes(process: Process) -> int:
    """Memory that is the process's own, and its part of what it shares; files on disk are not."""
    try:
        with open(f"/proc/{process.pid}/smaps_rollup", "rb") as source:
            rows = [line.split() for line in source.read().splitlines()]
    except OSError:
        return process.resident_bytes
    found = {words[0]: int(words[1]) << 10 for words in rows if words[-1] == b"kB"}
    if b"Pss_Anon:" in found:
        return found[b"Pss_Anon:"] + found.get(b"Pss_Shmem:", 0)
    return found.get(b"Pss:", process.resident_bytes)


class Meter:
    """CPU and memory of one run. The figures of CPU time never go down."""

    def __init__(self, plan: Plan, volatile: list[int]) -> None:
        self._plan = plan
        self._volatile = volatile
        self.cpu_ms = 0
        self.memory_bytes = 0

    @property
    def is_enforced(self) -> bool:
        return "memory" in self._plan.cgroups

    def sample(self, root: int | None) -> None:
        cpu_ms = cgroups.cpu_ms(self._plan.cgroups)
        memory = cgroups.memory_bytes(self._plan.cgroups)
        if root is not None and (cpu_ms is None or memory is None):
            below = tree(root)
            if cpu_ms is None:
                cpu_ms = sum(process.cpu_ms for process in below)
            if memory is None:
                memory = self._count_memory(below)
        self._raise_cpu(cpu_ms or 0)
        self.memory_bytes = memory or 0

    def _count_memory(self, below: list[Process]) -> int:
        """Pages that processes share are counted once, but only where that could matter.

        Adding up what is resident is cheap and counts a page as often as it is mapped, so it
        never says too little; only what it says is too much is looked at closely.
        """
        files = self._in_memory_files()
        resident = sum(process.resident_bytes for process in below) + files
        if resident <= self._plan.memory_bytes:
            return resident
        return sum(_proportional_bytes(process) for process in below) + files

    def add_waited(self, cpu_ms: int) -> None:
        """What the kernel says of a whole tree when its root has been waited for."""
        if cgroups.cpu_ms(self._plan.cgroups) is None:
            self._raise_cpu(cpu_ms)

    def _raise_cpu(self, cpu_ms: int) -> None:
        self.cpu_ms = max(self.cpu_ms, cpu_ms)

    def _in_memory_files(self) -> int:
        used = 0
        for fd in self._volatile:
            try:
                found = os.fstatvfs(fd)
            except OSError:
                continue
            used += (found.f_blocks - found.f_bfree) * found.f_frsize
        return used
