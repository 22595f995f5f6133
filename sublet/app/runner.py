"""Runs loops: each in a thread of its own, asleep until its due time or a nudge.

A loop is `step(now) -> next_due`. A step that fails is logged and tried again with a growing
pause; nothing it did not commit has happened. Only this module sleeps.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

import structlog

from sublet.base.kernel.clock import Clock

log = structlog.get_logger()

LONGEST_SLEEP_SECONDS = 30.0
FIRST_PAUSE_SECONDS = 0.2
LONGEST_PAUSE_SECONDS = 10.0
LOOPS = "loops"
LINK = "link"
LISTENERS = (LOOPS, LINK)
"""Who is nudged when something was committed."""


@dataclass(frozen=True, slots=True)
class Loop:
    """`nudged`: an event in the outbox may be for it."""

    name: str
    step: Callable[[datetime], datetime]
    nudged: bool = True


@dataclass(slots=True)
class _State:
    loop: Loop
    wake: threading.Event = field(default_factory=threading.Event)
    failures: int = 0


class Runner:
    """Threads for loops, and the socket on which other processes nudge them.

    `listener`: which process of the installation this is, for there are several runners.
    """

    def __init__(
        self, loops: list[Loop], clock: Clock, installation_id: str, listener: str = LOOPS
    ) -> None:
        self._states = [_State(loop) for loop in loops]
        self._clock = clock
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(nudge_address(installation_id, listener))
        self._socket.settimeout(0.5)

    def start(self) -> None:
        for state in self._states:
            thread = threading.Thread(target=self._run, args=(state,), name=state.loop.name)
            thread.start()
            self._threads.append(thread)
        listener = threading.Thread(target=self._listen, name="nudge")
        listener.start()
        self._threads.append(listener)

    def nudge(self) -> None:
        for state in self._states:
            if state.loop.nudged:
                state.wake.set()

    def wake(self, name: str) -> None:
        """Have one loop step now, nudged or not."""
        for state in self._states:
            if state.loop.name == name:
                state.wake.set()

    def stop(self) -> None:
        """Let every step that has begun end, then return."""
        self._stopping.set()
        for state in self._states:
            state.wake.set()
        for thread in self._threads:
            thread.join()
        self._socket.close()

    def _listen(self) -> None:
        while not self._stopping.is_set():
            with suppress(TimeoutError):
                self._socket.recv(16)
                self.nudge()

    def _run(self, state: _State) -> None:
        while not self._stopping.is_set():
            state.wake.clear()
            pause = self._step(state)
            state.wake.wait(pause)

    def _step(self, state: _State) -> float:
        now = self._clock.now()
        try:
            due = state.loop.step(now)
        except Exception:
            state.failures += 1
            log.exception("loop_failed", loop=state.loop.name, failures=state.failures)
            return min(FIRST_PAUSE_SECONDS * 2.0 ** min(state.failures, 10), LONGEST_PAUSE_SECONDS)
        state.failures = 0
        wait = (due - self._clock.now()).total_seconds()
        return min(max(wait, 0.0), LONGEST_SLEEP_SECONDS)


def nudge_address(installation_id: str, listener: str) -> str:
    """An abstract socket: it needs no file and ends with its process."""
    return f"\0sublet-nudge-{installation_id}-{listener}"


class Nudger:
    """Wakes runners of this installation from any process; never blocks, never fails."""

    def __init__(self, installation_id: str, listeners: Sequence[str] = LISTENERS) -> None:
        self._addresses = [nudge_address(installation_id, listener) for listener in listeners]
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def __call__(self) -> None:
        for address in self._addresses:
            with suppress(OSError):
                self._socket.sendto(b"1", address)

    def close(self) -> None:
        self._socket.close()
