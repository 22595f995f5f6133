"""`sublet setup`: the programs that a cloud takes from this machine, found or installed.

Sublet runs without any of them, on a lesser rung: what is missing is named with what it costs. As
root on a machine with apt-get the missing ones are installed; anyone else is told the line.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass

Say = Callable[[str], None]

LIMIT_SECONDS = 600
"""A package manager that takes longer is stuck on something that only a person can answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Something that one of these programs does for a cloud."""

    programs: tuple[str, ...]
    package: str
    gives: str
    without: str

    def find(self) -> str | None:
        return next((found for name in self.programs if (found := shutil.which(name))), None)


NEEDS = (
    Need(
        programs=("bwrap",),
        package="bubblewrap",
        gives="a sandbox around each workload",
        without="only tenants whom you trust can be served",
    ),
    Need(
        programs=("pasta", "slirp4netns"),
        package="passt",
        gives="outbound network inside a sandbox",
        without="workloads reach no network",
    ),
    Need(
        programs=("ssh",),
        package="openssh-client",
        gives="`sublet ssh`",
        without="log in with an SSH client of your own",
    ),
)


def main(*, is_root: bool | None = None, say: Say = print) -> int:
    """Say what is here, install what is missing where this user may. Always 0: nothing is fatal.

    A second run finds everything and calls nothing.
    """
    missing = [need for need in NEEDS if not _tell(need, say)]
    if not missing:
        return 0
    if shutil.which("apt-get") is None:
        names = ", ".join(need.package for need in missing)
        say(f"To add what is missing, install with this system's own package manager: {names}")
    elif not (os.geteuid() == 0 if is_root is None else is_root):
        names = " ".join(need.package for need in missing)
        say(f"To add what is missing:  sudo apt-get install {names}")
    else:
        for need in missing:
            _install(need, say)
    return 0


def _tell(need: Need, say: Say) -> bool:
    found = need.find()
    names = " or ".join(need.programs)
    say(
        f"  {'missing' if found is None else 'found  '}  {found or names}: {need.gives}"
        + (f"; without it {need.without}" if found is None else "")
    )
    return found is not None


def _install(need: Need, say: Say) -> None:
    say(f"Installing {need.package} (apt-get, up to a minute) ...")
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", need.package]
    # The lists of a fresh machine are empty and those of an old one stale: only then are they read.
    trouble = _run(install)
    if trouble:
        _run(["apt-get", "update", "-qq"])
        trouble = _run(install)
    if trouble or need.find() is None:
        why = trouble or f"it came without {' or '.join(need.programs)}"
        say(f"{need.package} was not installed ({why}): Sublet works, but {need.without}.")
    else:
        say(f"  found    {need.find()}: {need.gives}")


def _run(command: list[str]) -> str:
    """Empty when it worked, else why not."""
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"apt-get took longer than {LIMIT_SECONDS} s"
    except OSError as error:
        return f"apt-get cannot be run: {error.strerror}"
    if done.returncode == 0:
        return ""
    said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    return said[-1].removeprefix("E: ") if said else f"apt-get ended with {done.returncode}"
