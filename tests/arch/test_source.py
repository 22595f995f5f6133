"""The source obeys its own rules: format, lint, strict types, layers, owned tables, clean words."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SOURCES = sorted((ROOT / "sublet").rglob("*.py"))


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(["ruff", "format", "--check", "."], id="format"),
        pytest.param(["ruff", "check", "."], id="lint"),
        pytest.param(["mypy"], id="types"),
        pytest.param(["lint-imports"], id="layers"),
    ],
)
def test_tool_finds_nothing(command: list[str]) -> None:
    program = str(BIN / command[0])
    done = subprocess.run([program, *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _package_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "sublet").parts
    return parts[1] if len(parts) > 2 else parts[0]


def _tables() -> dict[str, str]:
    """Table name → the package whose source declares it."""
    found: dict[str, str] = {}
    for path in SOURCES:
        for match in re.finditer(r'sa\.Table\(\s*"(\w+)"', path.read_text()):
            found[match.group(1)] = _package_of(path)
    return found


def test_a_table_is_named_for_the_package_that_declares_it() -> None:
    tables = _tables()
    assert len(tables) > 20
    strange = {
        name: package
        for name, package in tables.items()
        if not name.startswith("base_" if package == "store" else f"{package}_")
    }
    assert strange == {}


def test_a_package_writes_only_its_own_tables() -> None:
    """No insert, update or delete on a table object imported from another package."""
    strange = []
    for path in SOURCES:
        tree = ast.parse(path.read_text())
        foreign: set[str] = set()
        for node in ast.walk(tree):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            is_store = module is not None and module.endswith(".store")
            if is_store and f".{_package_of(path)}." not in f"{module}.":
                foreign |= {alias.asname or alias.name for alias in node.names}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or node.attr not in (
                "insert",
                "update",
                "delete",
            ):
                continue
            owner = node.value
            while isinstance(owner, ast.Attribute):
                owner = owner.value
            if isinstance(owner, ast.Name) and owner.id in foreign and not path.match("*/audit/*"):
                strange.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert strange == []


FORBIDDEN = re.compile(
    r"/work/(main|shared)|files\.pythonhosted|pypi\.org/simple|registry\.npmjs"
    r"|\b(TODO|FIXME|XXX)\b|NotImplementedError"
)


def test_no_words_that_must_not_land() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    strange = []
    for name in filter(None, listed):
        path = ROOT / name
        if path == Path(__file__) or not path.is_file():
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        strange += [f"{name}: {m.group(0)}" for m in FORBIDDEN.finditer(text)]
    assert strange == []


def test_locks_name_no_host_and_hash_everything() -> None:
    for lock in (ROOT / "requirements").glob("*.txt"):
        text = lock.read_text()
        assert "//" not in text
        pinned = re.findall(r"^[\w.-]+(?:\[[\w,-]+\])?==", text, re.M)
        assert pinned, lock.name
        entries = re.split(r"\n(?=[\w])", text.strip())
        assert all("--hash=sha256:" in entry for entry in entries)
