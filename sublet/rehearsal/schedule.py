"""Steps loops under a virtual clock, in the order of their due times.

The same rules as the real runner: a loop sleeps until it is due or nudged, and one whose engine
does not answer is tried again after a growing pause. Nothing waits.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sublet.app.runner import (
    FIRST_PAUSE_SECONDS,
    LONGEST_PAUSE_SECONDS,
    LONGEST_SLEEP_SECONDS,
    Loop,
)
from sublet.base.kernel.clock import VirtualClock
from sublet.capacity.engines.port import EngineError

TICK = timedelta(milliseconds=1)
"""A step that asks to be called again at once is called a tick later: virtual time goes on."""
MOST_STEPS_AN_INSTANT = 1000


class Schedule:
    """When each loop is due next. `nudge` makes those due that read events."""

    def __init__(self, loops: list[Loop], clock: VirtualClock) -> None:
        self._loops = loops
        self._clock = clock
        self._due = dict.fromkeys((loop.name for loop in loops), clock.now())
        self._failures = dict.fromkeys((loop.name for loop in loops), 0)
        self._instant = clock.now()
        self._steps_of_instant = 0
        self.steps = 0

    def nudge(self) -> None:
        """Something was committed that a loop may have to act on."""
        for loop in self._loops:
            if loop.nudged:
                self._advance(loop.name, self._clock.now())

    def wake(self, name: str, at: datetime) -> None:
        """Let that loop step by then."""
        self._advance(name, max(at, self._clock.now()))

    def _advance(self, name: str, at: datetime) -> None:
        self._due[name] = min(self._due[name], at)

    def next_due(self) -> datetime:
        return max(min(self._due.values()), self._clock.now())

    def step(self) -> str:
        """Step the loop that is due first, moving the clock to its instant; returns its name."""
        loop = min(self._loops, key=lambda item: self._due[item.name])
        at = max(self._due[loop.name], self._clock.now())
        self._clock.advance_to(at)
        self._count(at)
        # Set before the step, so that a nudge from inside it is not lost.
        latest = at + timedelta(seconds=LONGEST_SLEEP_SECONDS)
        self._due[loop.name] = latest
        try:
            due = loop.step(at)
        except EngineError:
            due = at + self._pause(loop.name)
        else:
            self._failures[loop.name] = 0
        self._due[loop.name] = max(min(self._due[loop.name], due, latest), at + TICK)
        return loop.name

    def _pause(self, name: str) -> timedelta:
        self._failures[name] += 1
        pause = FIRST_PAUSE_SECONDS * 2.0 ** min(self._failures[name], 10)
        return timedelta(seconds=min(pause, LONGEST_PAUSE_SECONDS))

    def _count(self, at: datetime) -> None:
        self._steps_of_instant = self._steps_of_instant + 1 if at == self._instant else 1
        self._instant = at
        self.steps += 1
        assert self._steps_of_instant <= MOST_STEPS_AN_INSTANT, f"the loops spin at {at}"
