"""A process inside has the descriptors it was given, and no other."""

from __future__ import annotations

import os
from typing import Any

from sublet.capacity.engines.port import SpawnSpec


def said_by(local: Any, run: str, *argv: str) -> str:
    """All that is said until the last writer is gone, as a session of the bastion reads it."""
    reading, writing = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    spawned = local.engine.spawn(run, SpawnSpec(argv=argv), (null, writing, writing))
    os.close(null)
    os.close(writing)
    with os.fdopen(reading, "rb") as source:
        said = source.read().decode()
    assert spawned.wait() == 0, said
    return said


def test_nothing_is_inherited_beside_the_three(local: Any) -> None:
    run = local.start()
    listed = said_by(local, run, "python3", "-c", "import os; print(*os.listdir('/proc/self/fd'))")
    # The listing itself is a descriptor, the first that is free.
    assert sorted(listed.split(), key=int) == ["0", "1", "2", "3"]


def test_what_goes_on_in_the_background_does_not_hold_the_session(local: Any) -> None:
    run = local.start()
    before = local.now()
    said = said_by(local, run, "sh", "-c", "sleep 60 >/dev/null 2>&1 & echo gone on")
    assert said == "gone on\n"
    assert (local.now() - before).total_seconds() < 30
