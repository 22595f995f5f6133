"""The pages and the generator, as the tests of docs use them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


pages = load("docs_pages", Path(__file__).parent / "pages.py")


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The generator of docs/reference."""
    return load("docs_reference", ROOT / "tools" / "reference.py")
