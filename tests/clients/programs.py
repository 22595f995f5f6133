"""Programs that are started as a user starts them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from .conftest import ROOT

OTHERS = ROOT / ".venv-clients" / "bin"
SECONDS = 120.0


def other_python() -> Path:
    """Of the environment of clients whose dependencies are not ours."""
    if not (OTHERS / "python").exists():
        pytest.skip(".venv-clients is not installed: make .venv-clients/.done")
    return OTHERS / "python"


def run(
    *argv: str | Path, home: Path, env: Mapping[str, str] | None = None, stdin: str = ""
) -> str:
    """What it prints; it must end well. Nothing of our own environment's settings reaches it."""
    done = subprocess.run(
        [os.fspath(word) for word in argv],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        cwd=home,
        env={"PATH": os.defpath, "HOME": os.fspath(home), "NO_COLOR": "1", **(env or {})},
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout
