"""What engines count themselves, set against our records: one token too many or too few shows.

A comparison is true only of a moment at which nothing is in hand and all that ended is recorded.
So counts are taken from a replica that is idle and kept `SETTLE` later, when the spools have been
read, and only if it has counted nothing and nothing of it was recorded since. Of a replica that
leaves, the last counts are taken after its drain: nothing can come any more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

import structlog

from sublet.base.store import Actor, Store
from sublet.capacity.engines.port import Engine
from sublet.records import metering
from sublet.shops.compute import Location
from sublet.shops.models import service, store
from sublet.shops.models.model import Replica
from sublet.shops.models.servers import MODEL_SOCKET, Gauges, ModelServer

log = structlog.get_logger()

ACTOR = Actor.system("models")
EVERY = timedelta(minutes=10)
AGAIN = timedelta(minutes=1)
"""After a look that found it busy, or that a request has spoilt."""
SETTLE = timedelta(seconds=5)
"""From the end of a request to its row: gateways sync at once, and their spools are read at once."""

Ask = Callable[[Callable[[], Gauges | None]], "Future[Gauges | None]"]


@dataclass(frozen=True, slots=True)
class _Look:
    """A comparison on its way. `second` None: its counts settle; else they are asked for again."""

    counts: Gauges
    at: datetime
    totals: metering.ReplicaTotals | None = None
    second: Future[Gauges | None] | None = None


class Readings:
    """Held in memory alone: what a crash loses is read again, but for a last look."""

    def __init__(
        self, books: Store, engine: Engine, servers: Mapping[str, ModelServer], ask: Ask
    ) -> None:
        self._books = books
        self._engine = engine
        self._servers = servers
        self._ask = ask
        self._due: dict[str, datetime] = {}
        self._asked: dict[str, Future[Gauges | None]] = {}
        self._looks: dict[str, _Look] = {}
        self._last: dict[str, tuple[Gauges, datetime]] = {}

    def begin(self, replica_id: str, now: datetime) -> None:
        """It serves from now on."""
        self._due[replica_id] = now + EVERY

    def look(self, replica: Replica, at: Location, now: datetime) -> None:
        """One step towards the next comparison of a replica that serves."""
        if now < self._due.setdefault(replica.id, now + AGAIN):
            return
        with self._books.read() as tx:
            is_busy = service.in_flight(tx, replica.id) > 0
        if is_busy:
            self._put_off(replica.id, now + AGAIN)
        elif replica.id in self._looks:
            self._settle(replica, at, now)
        else:
            self._begin(replica, at, now)

    def take_last(self, replica: Replica, at: Location, now: datetime) -> None:
        """The counts of one that is empty and is about to be stopped. It may take two seconds."""
        self._put_off(replica.id, now)
        counts = self._counts(replica, at)
        if counts is not None and replica.ready_at is not None:
            self._last[replica.id] = counts, now

    def step(self, now: datetime) -> None:
        """Keep the last counts of those that are gone, once their spools have been read."""
        for replica_id, (counts, taken_at) in list(self._last.items()):
            if now - taken_at >= SETTLE:
                del self._last[replica_id]
                self._keep(replica_id, counts, None)

    def forget(self, replica_id: str) -> None:
        """It is gone; its last counts are kept all the same."""
        self._put_off(replica_id, None)

    # ---- two looks at one that serves -------------------------------------------------------

    def _begin(self, replica: Replica, at: Location, now: datetime) -> None:
        asked = self._asked.pop(replica.id, None)
        if asked is None or not asked.done():
            ask = self._ask
            self._asked[replica.id] = asked or ask(lambda: self._counts(replica, at))
            return
        counts = _result(asked)
        if counts is None or counts.processing or counts.deferred:
            self._put_off(replica.id, now + AGAIN)
        else:
            self._looks[replica.id] = _Look(counts, now)

    def _settle(self, replica: Replica, at: Location, now: datetime) -> None:
        look = self._looks[replica.id]
        if now - look.at < SETTLE:
            return
        if look.second is None:
            with self._books.read() as tx:
                totals = metering.replica_totals(tx, replica.id)
            second = self._ask(lambda: self._counts(replica, at))
            self._looks[replica.id] = replace(look, totals=totals, second=second)
        elif look.second.done():
            is_quiet = _result(look.second) == look.counts
            is_kept = is_quiet and self._keep(replica.id, look.counts, look.totals)
            self._put_off(replica.id, now + (EVERY if is_kept else AGAIN))

    def _keep(self, replica_id: str, counts: Gauges, totals: metering.ReplicaTotals | None) -> bool:
        """False: something of it was recorded meanwhile."""
        with self._books.work(ACTOR) as work:
            if totals is not None and metering.replica_totals(work.tx, replica_id) != totals:
                return False
            gap = metering.keep_reading(
                work,
                replica_id,
                prompt=counts.prompt_total,
                cached=counts.cached_total,
                predicted=counts.predicted_total,
            )
        if not gap.is_none:
            log.warning(
                "replica_counts_differ",
                replica_id=replica_id,
                input_uncached=gap.input_uncached,
                cache_read=gap.cache_read,
                output=gap.output,
            )
        return True

    def _counts(self, replica: Replica, at: Location) -> Gauges | None:
        if at.run_id is None:
            return None
        with self._books.read() as tx:
            server = self._servers[store.get_model(tx, replica.model).server]
        return server.gauges(self._engine.door(at.run_id, MODEL_SOCKET))

    def _put_off(self, replica_id: str, until: datetime | None) -> None:
        self._asked.pop(replica_id, None)
        self._looks.pop(replica_id, None)
        if until is None:
            self._due.pop(replica_id, None)
        else:
            self._due[replica_id] = until


def _result(asked: Future[Gauges | None]) -> Gauges | None:
    """None also where asking failed."""
    return None if asked.exception() is not None else asked.result()
