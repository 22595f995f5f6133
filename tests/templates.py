"""Databases that are made once and copied: a test begins where their preparation ended."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Generic, TypeVar

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.ids import SeededIds
from sublet.base.store import Store, metadata, open_store

T = TypeVar("T")


class Template(Generic[T]):
    """A database after `prepare`, with the chance that was drawn for it; `found`: its answer."""

    def __init__(self, prepare: Callable[[Store, VirtualClock], T], start: datetime) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sublet-template-")
        self._path = Path(self._folder.name) / "made.db"
        self._ids = SeededIds(1)
        clock = VirtualClock(start)
        store = open_store(f"sqlite:///{self._path}", clock, self._ids)
        metadata.create_all(store.engine)
        self.found = prepare(store, clock)
        store.close()

    def open(self, folder: Path, clock: VirtualClock) -> Store:
        """A copy in that folder, for one test alone."""
        path = folder / "sublet.db"
        shutil.copyfile(self._path, path)
        return open_store(f"sqlite:///{path}", clock, copy.deepcopy(self._ids))
