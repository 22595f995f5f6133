"""What of the host a run may read besides the system: whether it can be shown, and locked."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Sequence
from pathlib import Path

from sublet.capacity.engines.port import StartRefused

_NEVER_UNDER = ("/proc", "/dev", "/sys")
_CAP_SYS_RESOURCE = 24

Shown = Sequence[tuple[str, str]]


def checked_paths(shown: Shown, *, has_sandbox: bool) -> list[list[str]]:
    """The pairs, ready for a plan. Raises StartRefused, naming the path in the way."""
    return [[_checked(source, target, has_sandbox), target] for source, target in shown]


def _checked(source: str, target: str, has_sandbox: bool) -> str:
    is_plain = os.path.isabs(target) and os.path.normpath(target) == target != "/"
    if not is_plain or any(f"{target}/".startswith(f"{top}/") for top in _NEVER_UNDER):
        raise StartRefused(f"{target!r} is no place to show something at")
    if not has_sandbox and source != target:
        raise StartRefused(
            f"{source} cannot be shown as {target} without bubblewrap: apt-get install bubblewrap"
        )
    try:
        mode = os.stat(source).st_mode
    except OSError as error:
        raise StartRefused(f"{source} cannot be shown: {error.strerror}") from error
    needed = 0o005 if stat.S_ISDIR(mode) else 0o004
    if os.geteuid() == 0 and mode & needed != needed:
        raise StartRefused(f"{source} cannot be read by the run's own uid: chmod -R o+rX {source}")
    return source


def check_lockable(shown: Shown, *, most: int | None, swaps: bool) -> None:
    """What is to be kept in locked memory must fit in there, unless nothing is ever swapped out.

    `most`: bytes that may be locked; None: as many as we like. Raises StartRefused.
    """
    needed = sum(os.stat(source).st_size for source, _ in shown if os.path.isfile(source))
    if most is not None and needed > most and swaps:
        raise StartRefused(
            f"{needed} bytes are to be locked in memory, {most} may be, and this machine swaps: "
            "run as root, raise the limit (ulimit -l, LimitMEMLOCK=), or swapoff -a"
        )


def most_locked() -> int | None:
    """Bytes that a run of ours may lock; None: as many as we like."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if hard == resource.RLIM_INFINITY or _has_power(_CAP_SYS_RESOURCE):
        return None
    return hard


def _has_power(number: int) -> bool:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def swaps() -> bool:
    """This machine may write memory to a disk."""
    return len(Path("/proc/swaps").read_text().splitlines()) > 1
