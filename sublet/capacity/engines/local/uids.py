"""Host uids for tenants: one per home, never given twice.

Only as root. A home's files carry its uid for as long as the home lives, so the allocation is
kept beside the homes. Uids that the machine uses or hands to containers are stepped over.
"""

from __future__ import annotations

import fcntl
import json
import pwd
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sublet.capacity.engines.local.supervise import records

FIRST = 200_000


@dataclass
class _Allocations:
    next: int = FIRST
    homes: dict[str, int] = field(default_factory=dict)


def allocate(root: Path, home: str) -> int:
    """The uid of a home, a new one on first sight. Raises OSError, ValueError."""
    with (root / "uids.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = _read(root)
        if home not in known.homes:
            uid = _next_free(known.next)
            known.homes[home] = uid
            known.next = uid + 1
            _write(root, known)
        return known.homes[home]


def release(root: Path, home: str) -> None:
    """The home is gone. Its uid is not given again."""
    with (root / "uids.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = _read(root)
        if known.homes.pop(home, None) is not None:
            _write(root, known)


def _read(root: Path) -> _Allocations:
    try:
        return _Allocations(**json.loads((root / "uids.json").read_bytes()))
    except FileNotFoundError:
        return _Allocations()


def _write(root: Path, known: _Allocations) -> None:
    records.write_whole(str(root), "uids.json", json.dumps(asdict(known)).encode())


def _next_free(uid: int) -> int:
    for low, high in sorted(_subordinate()):
        if low <= uid < high:
            uid = high
    while _has_account(uid):
        uid += 1
    return uid


def _subordinate() -> list[tuple[int, int]]:
    """The ranges that containers of this machine's users may take."""
    try:
        lines = Path("/etc/subuid").read_text().splitlines()
    except OSError:
        return []
    ranges = []
    for line in lines:
        words = line.split(":")
        if len(words) == 3 and words[1].isdigit() and words[2].isdigit():
            ranges.append((int(words[1]), int(words[1]) + int(words[2])))
    return ranges


def _has_account(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True
