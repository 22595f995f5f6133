"""Whether the server of a ready replica still answers anybody.

One that died is seen by its supervisor. One that hangs is not: it keeps its socket, takes calls and
answers none. So each is asked whether it lives, which costs no token and waits behind none.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from datetime import datetime, timedelta

from sublet.shops.models.servers import ModelServer

EVERY = timedelta(seconds=15)
SILENCE = timedelta(minutes=2)
"""A server that has been silent for so long is given up. Not sooner: on a machine without a free core
a sound one may be slow to answer, and giving it up ends what it has in hand."""

Ask = Callable[[Callable[[], bool]], "Future[bool]"]


class Liveness:
    """Held in memory alone: after a restart silence counts anew."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._heard: dict[str, datetime] = {}
        self._due: dict[str, datetime] = {}
        self._asked: dict[str, Future[bool]] = {}

    def is_silent(self, replica_id: str, server: ModelServer, door: str, now: datetime) -> bool:
        """One look: take the last answer, ask again when it is time. True: give it up."""
        heard_at = self._heard.setdefault(replica_id, now)
        asked = self._asked.get(replica_id)
        if asked is not None:
            if not asked.done():
                return now - heard_at >= SILENCE
            del self._asked[replica_id]
            if asked.exception() is None and asked.result():
                heard_at = self._heard[replica_id] = now
        if now >= self._due.get(replica_id, now):
            self._due[replica_id] = now + EVERY
            self._asked[replica_id] = self._ask(lambda: server.lives(door))
        return now - heard_at >= SILENCE

    def forget(self, replica_id: str) -> None:
        """It is gone."""
        self._heard.pop(replica_id, None)
        self._due.pop(replica_id, None)
        self._asked.pop(replica_id, None)
