"""The link: the one process between the gateways and the books.

It publishes snapshots, grants allowances, reads spools, closes the lives of gateways that ended, and
keeps what they say of themselves. Each of these is a loop with a thread of its own; none waits for
another, but for the database. It may be killed at any point: what it did not commit did not happen,
gateways ask again, and spools are read on from their marks.
"""

from __future__ import annotations

import queue
import threading
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import structlog

from sublet.app.control import ControlServer, Heard
from sublet.app.publish import Publisher
from sublet.app.runner import LINK, Loop, Runner
from sublet.app.spools import Spools
from sublet.base.kernel.errors import SubletError
from sublet.base.store import Actor, Store, StoreUnavailable, Work
from sublet.base.wire.gateway import AllowanceRequest, Gauge
from sublet.money import billing
from sublet.shops import models

log = structlog.get_logger()

ACTOR = Actor.system("link")
ASKS_AT_MOST = 10_000
"""Questions that wait for the database; those beyond are asked again by their gateways."""
ASKS_A_WORK = 64
GAUGES_EVERY = timedelta(seconds=1)
QUIET = timedelta(seconds=30)
LAST_READS = 100
LAST_PAUSE_SECONDS = 0.2

Ask = tuple[str, AllowanceRequest]


class Link:
    """All of it, on one folder. `start` returns once gateways can connect."""

    def __init__(
        self, store: Store, folder: Path, *, gateways: int, stale: timedelta, installation_id: str
    ) -> None:
        self._store = store
        self._spools = Spools(store, folder)
        self._publisher = Publisher(
            store, folder, gateways=gateways, stale=stale, tell=self._published
        )
        self._gauges = _Gauges(store, self._spools)
        self._asks: queue.Queue[Ask] = queue.Queue(ASKS_AT_MOST)
        self._server = ControlServer(
            folder,
            Heard(hello=self._gauges.came, gauge=self._gauge_came, ask=self._ask_came),
            lambda: self._publisher.number,
        )
        self.runner = Runner(
            [
                Loop("snapshot", self._publisher.step),
                Loop("asks", self._answer, nudged=False),
                Loop("spools", self._spools.step, nudged=False),
                Loop("gauges", self._gauges.step, nudged=False),
            ],
            store.clock,
            installation_id,
            LINK,
        )

    def start(self) -> None:
        """Publish, then listen. A first snapshot that cannot be written is tried again meanwhile."""
        try:
            self._publisher.step(self._store.clock.now())
        except SubletError as error:
            log.error("first_snapshot_not_published", why=error.message)
        self.runner.start()
        self._server.start()

    def stop(self) -> bool:
        """Read the last of the spools, and end. False: something is left for the next start.

        Call it when the gateways have ended; one that has not is left to the next start, too.
        """
        self._server.stop()
        self.runner.stop()
        pause = threading.Event()
        for _ in range(LAST_READS):
            try:
                if self._spools.finish(self._store.clock.now()):
                    return True
                break
            except StoreUnavailable as error:
                log.warning("last_spools_not_read", why=error.message)
                pause.wait(LAST_PAUSE_SECONDS)
        for life in self._spools.lives():
            log.warning("spool_left", gateway=life.gateway, epoch=life.epoch)
        return False

    # ---- what the control socket says, in its thread -------------------------------------------

    def _published(self, number: int) -> None:
        self._server.tell_snapshot(number)

    def _gauge_came(self, gauge: Gauge) -> None:
        if self._gauges.hear(gauge):
            self.runner.wake("gauges")
        self.runner.wake("spools")

    def _ask_came(self, gateway: str, request: AllowanceRequest) -> None:
        with suppress(queue.Full):
            self._asks.put_nowait((gateway, request))
        self.runner.wake("asks")

    # ---- allowances ----------------------------------------------------------------------------

    def _answer(self, now: datetime) -> datetime:
        """Answer what was asked, some in one Work. What the database does not take is dropped:
        gateways ask again."""
        while asks := self._next_asks():
            try:
                self._answer_all(asks)
            except StoreUnavailable as error:
                log.error("allowances_not_granted", asked=len(asks), why=error.message)
        return now + QUIET

    def _next_asks(self) -> list[Ask]:
        asks: list[Ask] = []
        with suppress(queue.Empty):
            while len(asks) < ASKS_A_WORK:
                asks.append(self._asks.get_nowait())
        return asks

    def _answer_all(self, asks: list[Ask]) -> None:
        try:
            with self._store.work(ACTOR) as work:
                answers = [_grant(work, ask) for ask in asks]
        except StoreUnavailable:
            raise
        except Exception:
            # One of them cannot be answered. The others are, each by itself.
            answers = [answer for ask in asks if (answer := self._answer_one(ask)) is not None]
        for gateway, epoch, allowance in answers:
            self._server.answer(gateway, epoch, allowance)

    def _answer_one(self, ask: Ask) -> tuple[str, int, bytes] | None:
        gateway, request = ask
        try:
            with self._store.work(ACTOR) as work:
                return _grant(work, ask)
        except StoreUnavailable:
            raise
        except SubletError as error:
            log.warning("not_granted", gateway=gateway, key_id=request.key_id, why=error.message)
        except Exception:
            log.exception("not_granted", gateway=gateway, key_id=request.key_id)
        return None


def _grant(work: Work, ask: Ask) -> tuple[str, int, bytes]:
    gateway, request = ask
    allowance = billing.grant_allowance(work, gateway=gateway, epoch=request.epoch, request=request)
    return gateway, request.epoch, allowance.to_json()


class _Gauges:
    """What gateways last said, written down once a second, and at once where it frees a replica."""

    def __init__(self, store: Store, spools: Spools) -> None:
        self._store = store
        self._spools = spools
        self._lock = threading.Lock()
        self._latest: dict[str, Gauge] = {}
        self._is_new: set[str] = set()
        self._kept: dict[str, int] = {}
        """By gateway the epoch that has a row."""
        self._alive: list[str] | None = None

    def came(self, gateway: str, epoch: int) -> None:
        """A life has said hello: nothing that another one said holds for it."""
        with self._lock:
            before = self._latest.get(gateway)
            if before is None or before.epoch != epoch:
                self._latest[gateway] = _unheard(gateway, epoch)
                self._is_new.add(gateway)

    def hear(self, gauge: Gauge) -> bool:
        """True: somebody may wait for what it says (another snapshot, a replica without calls)."""
        with self._lock:
            before = self._latest.get(gauge.gateway)
            self._latest[gauge.gateway] = gauge
            self._is_new.add(gauge.gateway)
        if before is None or before.snapshot != gauge.snapshot:
            return True
        return any(
            count and not gauge.in_flight.get(replica, 0)
            for replica, count in before.in_flight.items()
        )

    def step(self, now: datetime) -> datetime:
        """A life that was never heard counts as one that holds no snapshot that is known, so that
        nothing is taken from under it."""
        lives = self._spools.alive(now)
        with self._lock:
            found = [self._latest[name] for name in sorted(self._is_new)]
            self._is_new.clear()
        due = [gauge for gauge in found if gauge.epoch in lives.get(gauge.gateway, ())]
        heard = {gauge.gateway for gauge in due}
        due += [
            _unheard(name, epochs[-1])
            for name, epochs in sorted(lives.items())
            if name not in heard and self._kept.get(name) not in epochs
        ]
        alive = sorted(lives)
        if due or alive != self._alive:
            try:
                with self._store.work(ACTOR) as work:
                    for gauge in due:
                        models.keep_gauge(work, gauge)
                    models.set_gateways(work, alive)
            except StoreUnavailable:
                with self._lock:
                    self._is_new |= heard
                raise
        self._kept.update({gauge.gateway: gauge.epoch for gauge in due})
        self._alive = alive
        return now + GAUGES_EVERY


def _unheard(gateway: str, epoch: int) -> Gauge:
    return Gauge(
        gateway=gateway,
        epoch=epoch,
        snapshot=0,
        is_cut_off=True,
        in_flight={},
        waiting={},
        refusals={},
        requests=0,
        spool_file=0,
        spool_offset=0,
    )
