"""Files that somebody holds and that no folder names any more: deleted while open or mapped.

They take room as others do, and no walk of folders finds them. What a process holds can be read
off /proc by root and by the process's own user, but not all of it: descriptors under way in a
socket are nowhere, and a process that is not dumpable shows nothing to an ordinary user. Such
places are told too, as `Unseen`, so that somebody can draw a conclusion.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_BATCH = 64
_KCMP = {"x86_64": 312, "aarch64": 272, "riscv64": 272}.get(os.uname().machine)
_KCMP_FILES = 2

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Unseen:
    """A place where files may be held that cannot be counted; it keeps its name while it lasts."""

    name: str


Found = os.stat_result | Unseen | None


def by_processes(pids: Iterable[int], devices: Container[int]) -> Iterator[Found]:
    """Every nameless file of these volumes, as often as it is held; None is a place to pause."""
    for pid in pids:
        yield None
        try:
            for found in _open(pid):
                if isinstance(found, os.stat_result) and not _is_nameless(found, devices):
                    continue
                yield found
            yield from _mapped(pid, devices)
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended
        except PermissionError:
            yield Unseen(process(pid))


def _is_nameless(found: os.stat_result, devices: Container[int]) -> bool:
    return found.st_nlink == 0 and found.st_dev in devices


def open_in(pids: Iterable[int]) -> Iterator[os.stat_result | None]:
    """Every file that these have open, whatever its names; None is a place to pause."""
    for pid in pids:
        yield None
        try:
            for found in _open(pid):
                if not isinstance(found, Unseen):
                    yield found
        except OSError:
            continue


def _open(pid: int) -> Iterator[Found]:
    """Threads may have a table of descriptors of their own, and outlive the first of them."""
    for tid in map(int, os.listdir(f"/proc/{pid}/task")):
        if tid != pid and _shares_files(pid, tid):
            continue
        yield None
        try:
            folder = os.open(f"/proc/{pid}/task/{tid}/fd", _FOLDER)
        except (FileNotFoundError, ProcessLookupError):
            continue
        try:
            with os.scandir(folder) as entries:
                for number, entry in enumerate(entries, 1):
                    if number % _BATCH == 0:
                        yield None
                    try:
                        found = os.stat(entry.name, dir_fd=folder)
                    except PermissionError:
                        raise
                    except OSError:
                        continue  # it was closed
                    if stat.S_ISSOCK(found.st_mode):
                        if _has_descriptors_under_way(f"/proc/{pid}/task/{tid}", entry.name):
                            yield Unseen(f"socket {found.st_ino}")
                    else:
                        yield found
        finally:
            os.close(folder)


def _shares_files(pid: int, tid: int) -> bool:
    """Only to save work: where it cannot be told, both tables are read."""
    return _KCMP is not None and _libc.syscall(_KCMP, pid, tid, _KCMP_FILES, 0, 0) == 0


def _has_descriptors_under_way(task: str, name: str) -> bool:
    try:
        with open(f"{task}/fdinfo/{name}", "rb") as source:
            words = [line.split() for line in source]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(len(row) == 2 and row[0] == b"scm_fds:" and row[1] != b"0" for row in words)


def _mapped(pid: int, devices: Container[int]) -> Iterator[Found]:
    """Only root may look behind a mapping; others are told which file it is, not how large."""
    told = set()
    for tid in map(int, os.listdir(f"/proc/{pid}/task")):
        with open(f"/proc/{pid}/task/{tid}/maps", "rb") as source:
            for number, line in enumerate(source, 1):
                if number % _BATCH == 0:
                    yield None
                if not line.endswith(b" (deleted)\n"):
                    continue
                where, _, _, device, inode, _ = line.split(None, 5)
                major, minor = (int(part, 16) for part in device.split(b":"))
                key = (os.makedev(major, minor), int(inode))
                if key[0] not in devices or key in told:
                    continue
                told.add(key)
                first, last = (int(part, 16) for part in where.split(b"-"))
                try:
                    found = os.stat(f"/proc/{pid}/map_files/{first:x}-{last:x}")
                except OSError:
                    yield Unseen(mapping(*key))
                else:
                    if found.st_nlink == 0:
                        yield found
            if source.tell():  # all threads but a first one that ended have the same
                return


def process(pid: int) -> str:
    """What a process that may not be looked at is called."""
    return f"process {pid}"


def mapping(device: int, inode: int) -> str:
    """What a mapped file that cannot be looked at is called."""
    return f"mapping {device} {inode}"
