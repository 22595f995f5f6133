"""Steps loops under a virtual clock, in the order of their due times.

The same rules as the real runner: a loop sleeps until it is due or nudged. Nothing waits.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sublet.app.runner import LONGEST_SLEEP_SECONDS, Loop
from sublet.base.kernel.clock import VirtualClock

TICK = timedelta(milliseconds=1)
"""A step that asks to be called again at once is called a tick later: virtual time goes on."""
MOST_STEPS_AN_INSTANT = 1000


class Schedule:
    """When each loop is due next. `nudge` makes those due that read events."""

    def __init__(self, loops: list[Loop], clock: VirtualClock) -> None:
        self._loops = loops
        self._clock = clock
        self._due = dict.fromkeys((loop.name for loop in loops), clock.now())
        self.steps = 0

    def nudge(self) -> None:
        now = self._clock.now()
        for loop in self._loops:
            if loop.nudged:
                self._due[loop.name] = min(self._due[loop.name], now)

    def next_due(self) -> datetime:
        return min(self._due.values())

    def step(self) -> str:
        """Step the loop that is due first, moving the clock to its instant; returns its name."""
        loop = min(self._loops, key=lambda item: self._due[item.name])
        at = max(self._due[loop.name], self._clock.now())
        self._clock.advance_to(at)
        # Set before the step, so that a nudge from inside it is not lost.
        latest = at + timedelta(seconds=LONGEST_SLEEP_SECONDS)
        self._due[loop.name] = latest
        due = loop.step(at)
        self._due[loop.name] = max(min(self._due[loop.name], due, latest), at + TICK)
        self.steps += 1
        return loop.name
