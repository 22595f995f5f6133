"""The supervisor's one loop: descriptors, callbacks, and rest for those who shout.

A callback that fails ends neither the others nor the deadline. A descriptor can be put to rest
for a while: whoever floods it then waits on a full buffer, and pays for that himself.
"""

from __future__ import annotations

import selectors
import traceback
from collections.abc import Callable
from typing import Protocol

from .records import boot_ns

SECOND = 1_000_000_000
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE

Callback = Callable[[int], None]


class Budget:
    """How much of the supervisor's time one stranger may take: a third of a CPU over time."""

    _SHARE = 3
    _BURST_NS = 20_000_000

    def __init__(self) -> None:
        self._debt_ns = 0
        self._last_ns = 0

    def rest_after(self, began_ns: int) -> int:
        """Work for them began then and is done now: how long they have to wait for more."""
        now = boot_ns()
        earned = max(0, began_ns - self._last_ns) // self._SHARE
        self._debt_ns = max(0, self._debt_ns - earned) + now - began_ns
        self._last_ns = now
        return self._SHARE * self._debt_ns if self._debt_ns > self._BURST_NS else 0


class HasFileno(Protocol):
    def fileno(self) -> int: ...


Watched = int | HasFileno


class Loop:
    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._resting: dict[Watched, tuple[int, Callback]] = {}
        self.faults = 0

    def watch(self, watched: Watched, callback: Callback, events: int = READ) -> None:
        """Call back when it can be read (or written); anew: with other events."""
        self._resting.pop(watched, None)
        try:
            self._selector.register(watched, events, callback)
        except KeyError:
            self._selector.modify(watched, events, callback)

    def forget(self, watched: Watched) -> None:
        """Call this before closing it."""
        if self._resting.pop(watched, None) is None:
            self._selector.unregister(watched)

    def rest(self, watched: Watched, duration_ns: int) -> None:
        """Do not read it for a while; at rest already: for longer."""
        until = boot_ns() + duration_ns
        if watched in self._resting:
            callback = self._resting[watched][1]
        else:
            callback = self._selector.unregister(watched).data
        self._resting[watched] = (until, callback)

    def guard(self, work: Callable[..., object], *args: object) -> None:
        """Do it; a fault is written down and counted, and goes no further."""
        try:
            work(*args)
        except Exception:
            self.faults += 1
            traceback.print_exc()

    def turn(self, until_ns: int) -> None:
        """Wait for something to happen, at most until that instant, and handle it."""
        soonest = min([until_ns, *(until for until, _ in self._resting.values())])
        pause = max(0.0, (soonest - boot_ns()) / SECOND)
        for key, events in self._selector.select(pause):
            self.guard(key.data, events)
        if self._resting:
            now = boot_ns()
            for watched, (until, callback) in list(self._resting.items()):
                if until <= now:
                    self.watch(watched, callback)
