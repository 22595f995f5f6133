"""The model that Sublet carries is what its recipe says, and the recipe says what it needs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import sealed_models

ROOT = Path(__file__).resolve().parents[2]


def recipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "tools.muse_tiny", *arguments]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_carried_file_is_a_muse_tiny() -> None:
    done = recipe("check", str(sealed_models.MUSE))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(" goes on with ") == 3


def test_what_is_no_muse_tiny_is_told_apart(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    data = sealed_models.MUSE.read_bytes()
    assert data.count(b"PSF-2.0") == 1
    other.write_bytes(data.replace(b"PSF-2.0", b"GPL-3.0"))
    done = recipe("check", str(other))
    assert done.returncode == 1
    assert "general.license is 'GPL-3.0', not 'PSF-2.0'" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed")
def test_training_without_its_tools_is_refused_in_one_sentence(tmp_path: Path) -> None:
    done = recipe("train", "--folder", str(tmp_path / "made"))
    assert done.returncode == 2
    assert "train needs torch" in done.stderr
    assert "pip install torch" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "made").exists()
