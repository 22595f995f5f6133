"""What a simulated workload does, read from its command: pure.

Understood are `sleep N`, `true`, `false`, `exit N`, `echo TEXT`, `trap '' TERM` and lists of them
for `sh -c`; a `while` or `for` goes on for ever. What else a command says takes no time. The
environment overrides: `SIM_SECONDS` (`inf`: for ever), `SIM_EXIT_CODE`, `SIM_IGNORE_TERM`,
`SIM_TERM_SECONDS` (how long it takes to leave after SIGTERM), `SIM_DISK_FULL_AFTER`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta

_SEPARATOR = re.compile(r"(?:;|\n|&&)")
_SHELLS = frozenset({"sh", "bash", "/bin/sh", "/bin/bash", "/usr/bin/sh", "/usr/bin/bash"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """`lasts` None: until it is ended. The exit code is that of its own end."""

    lasts: timedelta | None
    exit_code: int = 0
    ignores_term: bool = False
    leaves_after: timedelta = timedelta(0)
    disk_full_after: timedelta | None = None
    output: str = ""


def behaviour_of(kind: str, command: Sequence[str], env: Mapping[str, str]) -> Behaviour:
    """Instances and replicas last until they are ended; a job as long as its command says."""
    if kind in ("instance", "replica"):
        found = Behaviour(lasts=None)
    elif len(command) >= 3 and command[0] in _SHELLS and command[1].startswith("-"):
        found = _script(command[2])
    else:
        found = _words(list(command), Behaviour(lasts=timedelta(0)))[0]
    return _overridden(found, env)


def _script(text: str) -> Behaviour:
    found = Behaviour(lasts=timedelta(0))
    for part in _SEPARATOR.split(text):
        try:
            words = shlex.split(part)
        except ValueError:
            words = part.split()
        found, ends = _words(words, found)
        if ends:
            break
    return found


def _words(words: list[str], so_far: Behaviour) -> tuple[Behaviour, bool]:
    """The behaviour with one simple command more, and whether it ends there."""
    if words[:1] == ["exec"]:
        return _words(words[1:], so_far)[0], True
    match words:
        case ["sleep", "infinity"] | ["while" | "for" | "until", *_]:
            return replace(so_far, lasts=None), True
        case ["sleep", seconds]:
            assert so_far.lasts is not None
            return replace(so_far, lasts=so_far.lasts + timedelta(seconds=float(seconds))), False
        case ["exit", code]:
            return replace(so_far, exit_code=int(code)), True
        case ["true"]:
            return replace(so_far, exit_code=0), False
        case ["false"]:
            return replace(so_far, exit_code=1), False
        case ["echo", *said]:
            return replace(so_far, output=so_far.output + " ".join(said) + "\n"), False
        case ["trap", "", *_]:
            return replace(so_far, ignores_term=True), False
        case _:
            return so_far, False


def _overridden(found: Behaviour, env: Mapping[str, str]) -> Behaviour:
    if (seconds := env.get("SIM_SECONDS")) is not None:
        lasts = None if seconds == "inf" else timedelta(seconds=float(seconds))
        found = replace(found, lasts=lasts)
    if (code := env.get("SIM_EXIT_CODE")) is not None:
        found = replace(found, exit_code=int(code))
    if env.get("SIM_IGNORE_TERM"):
        found = replace(found, ignores_term=True)
    if (leaves := env.get("SIM_TERM_SECONDS")) is not None:
        found = replace(found, leaves_after=timedelta(seconds=float(leaves)))
    if (full := env.get("SIM_DISK_FULL_AFTER")) is not None:
        found = replace(found, disk_full_after=timedelta(seconds=float(full)))
    return found
