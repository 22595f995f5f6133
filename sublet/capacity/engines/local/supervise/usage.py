"""What a run uses: CPU time, memory and disk, counted from outside.

Where a cgroup counts, it is asked. Else the tree of processes below the run's first one is summed
from /proc: living processes carry what they and their waited-for children used, and the figure
never goes down, so only a child whose parent refuses to wait for it is lost. Disk is counted by
walking home and scratch a few hundred entries at a time, between everything else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from . import cgroups
from .records import Plan, boot_ns

_TICK_MS = 1000 // os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_BATCH = 256
_DEEPEST = 200
"""Levels of folders that are counted; each takes two descriptors while it is looked at."""
_LEAST_FILES = 100_000
_EVERY_NS = 1_000_000_000
_SLICE_NS = 20_000_000
_BETWEEN_SLICES_NS = 9 * _SLICE_NS
_REST = 20
"""Times as long as a count took is the rest before the next."""
_MOST_LINKED = 100_000


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


class DiskSweep:
    """Counts what lies in some folders, in slices, over and over.

    The folders belong to a tenant who may change them meanwhile, so every step goes by
    descriptor and follows no link.
    """

    def __init__(self, folders: list[str]) -> None:
        self._folders = folders
        self._walk: Iterator[None] | None = None
        self._bytes = self._entries = 0
        self._linked: set[tuple[int, int]] = set()
        self._is_deep = False
        self.disk_bytes = 0
        self.entries = 0
        self.is_too_deep = False
        """Something lies deeper than is counted."""

    def slice(self) -> bool:
        """Do a bounded piece of work; True when a count is complete and the figures are new."""
        if self._walk is None:
            self._bytes = self._entries = 0
            self._linked = set()
            self._is_deep = False
            self._walk = self._all()
        for _ in self._walk:
            return False
        self._walk = None
        self.disk_bytes, self.entries = self._bytes, self._entries
        self.is_too_deep = self._is_deep
        return True

    def _all(self) -> Iterator[None]:
        for folder in self._folders:
            try:
                fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue
            yield from self._below(fd, 0)

    def _below(self, fd: int, depth: int) -> Iterator[None]:
        try:
            with os.scandir(fd) as entries:
                for entry in entries:
                    self._entries += 1
                    if self._entries % _BATCH == 0:
                        yield
                    try:
                        found = os.stat(entry.name, dir_fd=fd, follow_symlinks=False)
                    except OSError:
                        continue
                    self._count(found)
                    if stat.S_ISDIR(found.st_mode):
                        if depth >= _DEEPEST:
                            self._is_deep = True
                            continue
                        try:
                            child = os.open(
                                entry.name,
                                os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC,
                                dir_fd=fd,
                            )
                        except OSError:
                            continue
                        yield from self._below(child, depth + 1)
        except OSError:
            return
        finally:
            os.close(fd)

    def _count(self, found: os.stat_result) -> None:
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            key = (found.st_dev, found.st_ino)
            if key in self._linked:
                return
            if len(self._linked) < _MOST_LINKED:
                self._linked.add(key)
        self._bytes += found.st_blocks * 512


class DiskWatch:
    """Holds a run's home and scratch to its limit, with a tenth of one CPU at most."""

    def __init__(self, plan: Plan, folder: str) -> None:
        self._plan = plan
        self._folder = folder
        self._sweep = DiskSweep([plan.home, plan.scratch])
        self._began_ns: int | None = None
        self._is_warned = False
        self.next_ns = 0
        self.excess: str | None = None
        """What is over the limit, if anything is."""

    @property
    def disk_bytes(self) -> int:
        return self._sweep.disk_bytes

    def step(self) -> str | None:
        """Count on for a moment; returns what the tenant should be warned of, once."""
        now = boot_ns()
        self.next_ns = now + _EVERY_NS
        if self._began_ns is None:
            self._began_ns = now
        stop = now + _SLICE_NS
        while not self._sweep.slice():
            now = boot_ns()
            if now >= stop:
                self.next_ns = now + _BETWEEN_SLICES_NS
                return None
        now = boot_ns()
        self.next_ns = now + max(_EVERY_NS, _REST * (now - self._began_ns))
        self._began_ns = None
        self._compare()
        return self._warning()

    def _compare(self) -> None:
        """Files count as well as bytes: they take the volume's inodes."""
        plan, used, entries = self._plan, self._sweep.disk_bytes, self._sweep.entries
        files = max(_LEAST_FILES, plan.disk_bytes // 4096)
        if used > plan.disk_bytes:
            self.excess = f"{used} bytes on disk, {plan.disk_bytes} are allowed"
        elif entries > files:
            self.excess = f"{entries} files, {files} are allowed"
        elif self._sweep.is_too_deep:
            self.excess = f"folders in folders, {_DEEPEST} levels are allowed"
        else:
            self.excess = None

    def _warning(self) -> str | None:
        try:
            volume = os.statvfs(self._folder)
        except OSError:
            return None
        is_short = volume.f_bavail * volume.f_frsize < self._plan.disk_reserve_bytes
        is_over = self._sweep.disk_bytes > self._plan.disk_share_bytes
        was_warned, self._is_warned = self._is_warned, is_short and is_over
        if not self._is_warned or was_warned:
            return None
        return (
            f"the disk is nearly full, and {self._sweep.disk_bytes} bytes are more than "
            f"this run's share of it, {self._plan.disk_share_bytes}: delete what is not needed"
        )
