"""Whether the server of a ready replica still answers anybody.

One that died is seen by its supervisor. One that hangs is not: it keeps its socket, takes calls and
answers none. So each is asked whether it lives, which costs no token. Only answers count: while
nobody asks, as in a loop that stands still or in a drain, nobody falls silent.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future, ThreadPoolExecutor
from datetime import datetime, timedelta

from sublet.shops.models.servers import ModelServer

EVERY = timedelta(seconds=15)
SILENCE = timedelta(minutes=2)
"""From the first ask that failed to the one that gives it up, with none between them that went well.
Not sooner: on a machine without a free core a sound one may be slow to answer, and giving it up ends
what it has in hand."""
THREADS = 4
"""Of their own: a file of many gigabytes that is read, or servers that start, must not keep these
asks waiting. A server that hangs takes one for as long as `lives` gives it."""


class Liveness:
    """Held in memory alone: after a restart silence counts anew. `executor`: where servers are asked;
    None: a few threads."""

    def __init__(self, executor: Executor | None = None) -> None:
        self._executor = executor
        self._silent_since: dict[str, datetime] = {}
        self._due: dict[str, datetime] = {}
        self._asked: dict[str, tuple[Future[bool], datetime]] = {}

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def is_silent(self, replica_id: str, server: ModelServer, door: str, now: datetime) -> bool:
        """One look: take the last answer, ask again when it is time. True: give it up."""
        asked = self._asked.get(replica_id)
        if asked is not None:
            answer, asked_at = asked
            if not answer.done():
                return False  # That is no answer yet, and `lives` has a limit of its own.
            del self._asked[replica_id]
            # By when it was asked: the answer may have lain here for as long as the loop stood still.
            if self._is_long(replica_id, answer, asked_at):
                return True
        if now >= self._due.get(replica_id, now):
            self._due[replica_id] = now + EVERY
            self._asked[replica_id] = self._ask(server, door), now
        return False

    def forget(self, replica_id: str) -> None:
        """It is not asked for now: when it is again, silence counts anew."""
        self._silent_since.pop(replica_id, None)
        self._due.pop(replica_id, None)
        self._asked.pop(replica_id, None)

    def _is_long(self, replica_id: str, answer: Future[bool], asked_at: datetime) -> bool:
        if answer.exception() is None and answer.result():
            self._silent_since.pop(replica_id, None)
            return False
        return asked_at - self._silent_since.setdefault(replica_id, asked_at) >= SILENCE

    def _ask(self, server: ModelServer, door: str) -> Future[bool]:
        if self._executor is None:
            self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="liveness")
        return self._executor.submit(server.lives, door)
