"""Worlds for the field cases: each ends with the auditor's look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from sublet.rehearsal import World

Worlds = Callable[..., World]


@pytest.fixture
def worlds() -> Iterator[Worlds]:
    made: list[World] = []

    def make(**options: Any) -> World:
        made.append(World(**options))
        return made[-1]

    yield make
    try:
        for world in made:
            world.audit()
    finally:
        for world in made:
            world.close()
