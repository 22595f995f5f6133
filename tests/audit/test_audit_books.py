"""`sublet audit-books --data`: the auditor on a folder, its words and its exit code."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sublet.audit import INVARIANTS
from sublet.cli.main import app

mutants = sys.modules["audit_mutants"]


def audit(folder: Path, *more: str) -> Any:
    return CliRunner().invoke(app, ["audit-books", "--data", str(folder), *more])


@pytest.fixture
def folder(books: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("SUBLET_")]:
        monkeypatch.delenv(name)
    return Path(books.store.url.database).parent


def test_sound_books_are_exit_code_0(folder: Path) -> None:
    done = audit(folder)
    assert done.exit_code == 0
    assert f"{len(INVARIANTS)} invariants hold" in done.stdout


def test_a_broken_invariant_is_exit_code_1_and_named(folder: Path, books: Any) -> None:
    books.change(mutants.credit_is_promised_twice)
    done = audit(folder)
    assert done.exit_code == 1
    assert "BROKEN  credit_is_never_negative" in done.stdout
    said = json.loads(audit(folder, "--json").stdout)
    assert said["sound"] is False
    assert [violation["name"] for violation in said["violations"]] == ["credit_is_never_negative"]


def test_a_closed_cloud_is_judged_at_its_last_moment(folder: Path, books: Any) -> None:
    """A recall that was under way when the cloud closed is not late for the time it was closed."""
    said = json.loads(audit(folder, "--json").stdout)
    assert said["sound"] is True
    assert said["at"].startswith(books.now.strftime("%Y-%m-%dT%H:%M:%S"))


def test_a_folder_without_books_is_a_sentence(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["audit-books", "--data", str(tmp_path)])
    assert done.exit_code == 1
    assert not (tmp_path / "sublet.db").exists()
