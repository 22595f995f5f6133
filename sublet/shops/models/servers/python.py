"""Our own Python, as a sandbox has to be shown it: interpreter, library, packages.

Shown under the host's own paths, so that what is compiled in holds, and a run without a sandbox
finds the same. What lies in /usr is in every sandbox.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path

CHILD = str((Path(__file__).parent / "child").resolve())
"""What of ours runs inside."""


def interpreter() -> str:
    """The program itself: a virtual environment's is a link to it."""
    return os.path.realpath(sys.executable)


def packages() -> tuple[str, ...]:
    """Where packages are installed, for the end of a child's module path."""
    paths = (sysconfig.get_path("platlib"), sysconfig.get_path("purelib"))
    return tuple(dict.fromkeys(os.path.realpath(path) for path in paths))


def shown(*others: str) -> tuple[tuple[str, str], ...]:
    """What a sandbox is shown, for a ServerSpec: our Python, and other paths as they are."""
    home = os.path.realpath(sys.base_prefix)
    paths = {home, interpreter(), *packages(), os.path.realpath(sysconfig.get_path("stdlib"))}
    return tuple((path, path) for path in outermost({*paths, *others}))


def outermost(paths: set[str]) -> list[str]:
    """Those that are neither in a sandbox already nor lie in another of them."""
    kept: list[str] = []
    for path in sorted(paths):
        if not any(f"{path}/".startswith(f"{outer}/") for outer in ("/usr", *kept)):
            kept.append(path)
    return kept
