"""A run's disk: counted in slices between everything else, held to its limit, and to its share.

Counted is what lies in home and scratch and what its processes, or whoever was handed a file of
it, keep open of deleted files. Nothing stops a tenant from taking all the room at once between two
counts; so while room is short, below the reserve, counts follow without a rest, and while it goes
on falling below half of it, whoever holds more than a fair share is ended at once.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator

from . import cgroups, held, usage
from .records import Plan, boot_ns

_BATCH = 256
_DEEPEST = 200
"""Levels of folders that are counted; each takes two descriptors while it is looked at."""
_LEAST_FILES = 100_000
_EVERY_NS = 1_000_000_000
_SLICE_NS = 20_000_000
_BETWEEN_SLICES_NS = 9 * _SLICE_NS
_REST = 20
"""Times as long as a count took is the rest before the next."""
_MOST_REMEMBERED = 100_000
_MOST_HANDED = 10_000

File = tuple[int, int]
"""Device and inode."""


class Handed:
    """Files of the run that the supervisor handed to processes outside, until they are let go."""

    def __init__(self) -> None:
        self._files: dict[File, tuple[int, int]] = {}
        """File → pid of who has it, and how often it was missed there; the latest ones."""

    def add(self, fd: int, pid: int) -> None:
        found = os.fstat(fd)
        key = (found.st_dev, found.st_ino)
        self._files.pop(key, None)
        self._files[key] = (pid, 0)
        if len(self._files) > _MOST_HANDED:
            del self._files[next(iter(self._files))]

    def nameless(self) -> Iterator[os.stat_result | None]:
        """Those that are held and deleted; None is a place to pause."""
        asked = dict(self._files)
        met = set()
        for found in held.open_in(sorted({pid for pid, _ in asked.values()})):
            if found is None:
                yield None
                continue
            key = (found.st_dev, found.st_ino)
            if key in asked:
                met.add(key)
                if found.st_nlink == 0:
                    yield found
        for key, (pid, missed) in asked.items():
            if key in met or self._files.get(key) != (pid, missed):
                continue
            if missed:  # once may be on the way
                del self._files[key]
            else:
                self._files[key] = (pid, 1)


def nobody() -> set[int]:
    return set()


class DiskSweep:
    """Counts what lies in some folders and is held of their volumes, in slices, over and over.

    The folders belong to a tenant who may change them meanwhile, so every step goes by
    descriptor and follows no link.
    """

    def __init__(self, folders: list[str], processes: Callable[[], set[int]] = nobody) -> None:
        self._folders = folders
        self._processes = processes
        self.handed = Handed()
        self._walk: Iterator[None] | None = None
        self._bytes = self._entries = 0
        self._seen: set[File] = set()
        self._nameless: set[File] = set()
        self._unseen: set[str] = set()
        self._is_deep = False
        self.disk_bytes = 0
        self.entries = 0
        self.is_too_deep = False
        """Something lies deeper than is counted."""
        self.unseen: frozenset[str] = frozenset()
        """Places that could not be counted."""

    @property
    def least_bytes(self) -> int:
        """What the count under way has found so far, if it is more than the last one in all."""
        return max(self.disk_bytes, self._bytes)

    def slice(self) -> bool:
        """Do a bounded piece of work; True when a count is complete and the figures are new."""
        if self._walk is None:
            self._bytes = self._entries = 0
            self._seen, self._nameless, self._unseen = set(), set(), set()
            self._is_deep = False
            self._walk = self._all()
        for _ in self._walk:
            return False
        self._walk = None
        self.disk_bytes, self.entries = self._bytes, self._entries
        self.is_too_deep, self.unseen = self._is_deep, frozenset(self._unseen)
        return True

    def _all(self) -> Iterator[None]:
        folders = []
        try:
            for folder in self._folders:
                try:
                    fd = os.open(
                        folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                    )
                except OSError:
                    continue
                folders.append(fd)
            # Before the folders: what is deleted after it was counted there is not counted twice.
            yield from self._held({os.fstat(fd).st_dev for fd in folders})
            while folders:
                yield from self._below(folders.pop(0), 0)
        finally:
            for fd in folders:
                os.close(fd)

    def _held(self, devices: set[int]) -> Iterator[None]:
        for found in held.by_processes(sorted(self._processes()), devices):
            if isinstance(found, os.stat_result):
                self._count_nameless(found)
            elif found is not None:
                self._unseen.add(found.name)
            else:
                yield
        for handed in self.handed.nameless():
            if handed is None:
                yield
            elif handed.st_dev in devices:
                self._count_nameless(handed)
        # A mapping that cannot be looked at is no matter if the file is open as well.
        self._unseen -= {held.mapping(*key) for key in self._nameless}

    def _count_nameless(self, found: os.stat_result) -> None:
        key = (found.st_dev, found.st_ino)
        if key in self._nameless:
            return
        if len(self._nameless) >= _MOST_REMEMBERED:
            self._unseen.add("more deleted files")
            return
        self._nameless.add(key)
        self._entries += 1
        self._bytes += found.st_blocks * 512

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
                        except PermissionError:
                            self._unseen.add(f"folder {found.st_dev} {found.st_ino}")
                            continue
                        except OSError:
                            continue
                        yield from self._below(child, depth + 1)
        except OSError:
            return
        finally:
            os.close(fd)

    def _count(self, found: os.stat_result) -> None:
        key = (found.st_dev, found.st_ino)
        if key in self._nameless:  # it was given a name meanwhile
            return
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            if key in self._seen:
                return
            if len(self._seen) < _MOST_REMEMBERED:
                self._seen.add(key)
        self._bytes += found.st_blocks * 512


def free_bytes(folder: str) -> int:
    """Raises OSError."""
    volume = os.statvfs(folder)
    return volume.f_bavail * volume.f_frsize


class DiskWatch:
    """Holds a run to its limit and its share, with a tenth of one CPU at most."""

    def __init__(
        self,
        plan: Plan,
        folder: str,
        *,
        clock_ns: Callable[[], int] = boot_ns,
        find_free: Callable[[str], int] = free_bytes,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._clock_ns = clock_ns
        self._find_free = find_free
        self._root: int | None = None
        self._sweep = DiskSweep([plan.home, plan.scratch], self._processes)
        self._began_ns: int | None = None
        self._rest_until_ns = 0
        self._is_warned = False
        self._free_bytes: int | None = None
        """At the last look, where it was under half of the reserve."""
        self._looked_ns = 0
        self._unseen: frozenset[str] = frozenset()
        self._hidden: frozenset[str] = frozenset()
        """What could not be counted twice in a row: not just a moment's traffic."""
        self.handed = self._sweep.handed
        self.next_ns = 0
        self.excess: str | None = None
        """What is over the limit, if anything is."""
        self.emergency: str | None = None
        """Why the run has to make room now."""

    @property
    def disk_bytes(self) -> int:
        return self._sweep.disk_bytes

    def _processes(self) -> set[int]:
        pids = cgroups.processes(self._plan.cgroups)
        if self._root is not None:
            pids |= {process.pid for process in usage.tree(self._root)}
        return pids

    def step(self, root: int | None = None) -> str | None:
        """Count on for a moment; returns what the tenant should be warned of, once.

        `root` is the run's first process.
        """
        self._root = root
        now = self._clock_ns()
        self.next_ns = now + _EVERY_NS
        try:
            free = self._find_free(self._folder)
        except OSError:
            free = None
        is_short = free is not None and free < self._plan.disk_reserve_bytes
        if self._began_ns is None:
            if now < self._rest_until_ns and not is_short:
                return None
            self._began_ns = now
        is_new = self._count(now)
        self._look_for_emergency(free, now)
        return self._warning(is_short) if is_new else None

    def _count(self, now: int) -> bool:
        stop = now + _SLICE_NS
        while not self._sweep.slice():
            now = self._clock_ns()
            if now >= stop:
                self.next_ns = now + _BETWEEN_SLICES_NS
                return False
        now = self._clock_ns()
        assert self._began_ns is not None
        self._rest_until_ns = now + _REST * (now - self._began_ns)
        self.next_ns = now + _EVERY_NS
        self._began_ns = None
        self._compare()
        return True

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
        # The init inside is ours, and not dumpable: an ordinary user never sees into it.
        unseen = self._sweep.unseen - {held.process(self._root or 0)}
        self._hidden = unseen & self._unseen
        self._unseen = unseen

    def _look_for_emergency(self, free: int | None, now: int) -> None:
        """Half of the reserve is what meters are closed with, whatever tenants do.

        Room that stays as it is, is enough for that; what counts is that it falls from one look
        to the next, or has nothing left to fall by.
        """
        half = self._plan.disk_reserve_bytes // 2
        self.emergency = None
        if free is None or free >= half:
            self._free_bytes = None
            return
        before = self._free_bytes
        if before is not None and now < self._looked_ns + _EVERY_NS:
            return
        self._free_bytes, self._looked_ns = free, now
        if before is None or (free >= before and free >= half // 4):
            return
        used, share = self._sweep.least_bytes, self._plan.disk_share_bytes
        if used > share:
            what = f"this run holds {used} bytes, and its share is {share}"
        elif self._hidden:
            what = "this run may hold deleted files where they cannot be counted"
        else:
            return
        self.emergency = f"the disk is full but for {free} bytes and goes on filling, and {what}"

    def _warning(self, is_short: bool) -> str | None:
        is_over = self._sweep.disk_bytes > self._plan.disk_share_bytes
        was_warned, self._is_warned = self._is_warned, is_short and is_over
        if not self._is_warned or was_warned:
            return None
        return (
            f"the disk is nearly full, and {self._sweep.disk_bytes} bytes are more than "
            f"this run's share of it, {self._plan.disk_share_bytes}: delete what is not needed, "
            "or the run is ended when the room goes on falling"
        )
