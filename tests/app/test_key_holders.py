"""Processes that hold the key that seals models."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from sublet.app import sealing
from sublet.app.settings import Settings
from sublet.app.wiring import App
from sublet.base.kernel.clock import SystemClock
from sublet.base.kernel.ids import SystemIds
from sublet.base.store import metadata, open_store

KEY = bytes(range(32))


@pytest.fixture(autouse=True)
def cores() -> Iterator[int]:
    """Core files as large as they may be, as where somebody looks for a fault."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    if before[1] == 0:
        pytest.skip("core files are forbidden here anyway")
    resource.setrlimit(resource.RLIMIT_CORE, (before[1], before[1]))
    yield before[1]
    resource.setrlimit(resource.RLIMIT_CORE, before)


def test_the_parent_leaves_no_core(tmp_path: Path, cores: int) -> None:
    settings = Settings(data=tmp_path / "data", key_file=tmp_path / "key")
    store = open_store(f"sqlite:///{tmp_path}/x.db", SystemClock.unanchored(), SystemIds())
    metadata.create_all(store.engine)
    said: list[Any] = []
    made = sealing.key_at_start(settings, store, None, said.append)
    store.close()
    assert made is not None, said
    assert resource.getrlimit(resource.RLIMIT_CORE) == (0, cores)


def test_a_child_leaves_no_core(cores: int) -> None:
    out, into = os.pipe()
    os.write(into, KEY)
    os.close(into)
    found = sealing.key_of_child(cast(App, None), out)()
    assert found is not None
    assert found.secret == KEY
    assert KEY.hex() not in repr(found)
    assert resource.getrlimit(resource.RLIMIT_CORE) == (0, cores)
