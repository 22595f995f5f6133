"""The same promises as an ordinary user: the suite again, under another uid.

Root's own Python and its packages may lie where others cannot read, so the sources, the suite and
the few packages it needs (all plain Python) are copied to a folder that everyone can read, and
the system's Python runs them there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
UID = 54_321
PACKAGES = ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pynvml")
PLUGINS = ("pytest_timeout", "py")
SUITES = {
    "test_conformance.py": "not simulated and not local-bare",
    "test_local_inside.py": "",
    "test_local_shown.py": "",
    "test_local_faults.py": (
        "supervisor_killed or killed_before or another_boot or many_starts or in_the_middle "
        "or left_of"
    ),
    "test_local_disk.py": "is_open or held_many or somebody_outside or under_way or hides",
}
"""Suite and choice: one rung, and of the faults those that depend on who may look at whom."""


def _as_user(*argv: str) -> list[str]:
    return ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", *argv]


def _python() -> str | None:
    """A Python that is new enough, and that the user may execute by itself.

    setpriv still has root's powers when it executes the first one, so that one starts another.
    """
    check = (
        "import subprocess, sys; assert sys.version_info >= (3, 11); "
        "subprocess.run([sys.executable, '-c', ''], check=True)"
    )
    for program in (getattr(sys, "_base_executable", sys.executable), "/usr/bin/python3"):
        try:
            done = subprocess.run(_as_user(program, "-I", "-c", check), capture_output=True)
        except FileNotFoundError:
            return None
        if done.returncode == 0:
            return program
    return None


@pytest.fixture(scope="module")
def copied() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="sublet-test-user-"))
    folder.chmod(0o755)
    shutil.copytree(ROOT / "sublet" / "base", folder / "sublet" / "base")
    shutil.copy(ROOT / "sublet" / "__init__.py", folder / "sublet")
    shutil.copytree(ROOT / "sublet" / "capacity" / "engines", folder / "sublet/capacity/engines")
    shutil.copy(ROOT / "sublet" / "capacity" / "__init__.py", folder / "sublet/capacity")
    shutil.copytree(ROOT / "tests" / "engines", folder / "tests" / "engines")
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in (*PACKAGES, *PLUGINS):
        found = importlib.util.find_spec(name)
        assert found is not None
        assert found.origin is not None
        origin = Path(found.origin)
        if origin.name == "__init__.py":
            shutil.copytree(origin.parent, folder / name)
        else:
            shutil.copy(origin, folder)
    subprocess.run(["chmod", "-R", "a+rX", str(folder)], check=True)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.root
@pytest.mark.parametrize("suite", SUITES)
def test_an_ordinary_user_gets_the_same_promises(copied: Path, suite: str) -> None:
    python = _python()
    if python is None:
        pytest.skip("no Python 3.11 or setpriv that an ordinary user may execute")
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    argv = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    argv += ["-k", SUITES[suite], f"tests/engines/{suite}"]
    done = subprocess.run(
        _as_user(*argv),
        cwd=copied,
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(copied),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
