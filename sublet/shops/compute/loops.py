"""The loop that makes it so.

One pass: what happened → devices for the admitted → the engine → whoever waits. Passes are
repeated while they change something, so that a start, or an end with its scrub and the next
tenant's start, needs no second tick.
"""

from __future__ import annotations

from datetime import datetime, timedelta

import structlog

from sublet.base.kernel.errors import Conflict, Forbidden, NoCapacity, PaymentRequired, SubletError
from sublet.base.store import Envelope, Store, Work, advance, pending
from sublet.capacity import allocation, fleet
from sublet.capacity.engines.port import Engine
from sublet.rights import market
from sublet.shops.compute import admission, life, store
from sublet.shops.compute.driver import ACTOR, LOOK, Driver
from sublet.shops.compute.model import Reason, ShutdownBegun, Workload
from sublet.shops.compute.orders import home_of
from sublet.shops.compute.states import State

log = structlog.get_logger()

CONSUMER = "compute"
EVENTS = (
    allocation.ClaimNoticed,
    allocation.NoticeWithdrawn,
    allocation.ClaimReleased,
    fleet.NodeStateChanged,
    fleet.NodeEnrolled,
    fleet.DeviceDown,
    fleet.DeviceUp,
    ShutdownBegun,
)
MAX_PASSES = 8
IDLE = timedelta(seconds=30)
RETRY_WAITERS = timedelta(seconds=5)
MAX_WAITERS = 200
PRICES_EVERY = timedelta(seconds=60)
LOGS_KEPT = timedelta(days=7)
FORGET_EVERY = timedelta(minutes=10)
MAX_FORGOTTEN = 500


class ComputeLoop:
    """`step(now) -> next_due`. One an installation. A shutdown that begins while it lives closes it
    for good: what was started meanwhile is ended, and nobody is admitted any more.

    `look`: how often running workloads are looked at when nothing is due.
    """

    def __init__(self, books: Store, engine: Engine, look: timedelta = LOOK) -> None:
        self._books = books
        self._engine = engine
        self._driver = Driver(books, engine, look)
        self._born_at = books.clock.now()
        self._is_closing = False
        self._waiters_due: datetime | None = None
        self._is_anyone_waiting = False
        self._is_anyone_unplaced = False
        self._prices_due: datetime | None = None
        self._forget_due: datetime | None = None

    def step(self, now: datetime) -> datetime:
        """Bring books and engine together; returns when to look again if nothing wakes us."""
        self._driver.begin_step()
        for _ in range(MAX_PASSES):
            changed = self._events()
            changed = (self._end_all() if self._is_closing else self._devices()) or changed
            changed = self._driver.reconcile() or changed
            changed = (not self._is_closing and self._waiters()) or changed
            if not changed:
                break
        now = self._books.clock.now()
        self._price_victims(now)
        self._forget(now)
        return self._next_due(now)

    def _next_due(self, now: datetime) -> datetime:
        coming = [now + IDLE]
        looks = self._driver.next_due(now)
        if looks is not None:
            coming.append(looks)
        if self._is_anyone_waiting and self._waiters_due is not None:
            coming.append(self._waiters_due)
        if self._is_anyone_unplaced:
            coming.append(now + RETRY_WAITERS)
        return max(min(coming), now)

    # ---- what happened --------------------------------------------------------------------------

    def _events(self) -> bool:
        with self._books.read() as tx:
            found = pending(tx, CONSUMER, EVENTS)
        if not found:
            return False
        with self._books.work(ACTOR) as work:
            for envelope in found:
                self._handle(work, envelope)
            advance(work, CONSUMER, found[-1].seq)
        return True

    def _handle(self, work: Work, envelope: Envelope) -> None:
        match envelope.kind:
            case allocation.ClaimNoticed.kind:
                life.noticed(work, envelope.read(allocation.ClaimNoticed))
            case allocation.NoticeWithdrawn.kind:
                life.withdrawn(work, envelope.read(allocation.NoticeWithdrawn))
            case fleet.DeviceDown.kind:
                life.device_lost(work, envelope.read(fleet.DeviceDown).device_id)
            case fleet.DeviceUp.kind:
                life.keep_neighbours(work, envelope.read(fleet.DeviceUp).node_id)
            case fleet.NodeStateChanged.kind:
                life.keep_neighbours(work, envelope.read(fleet.NodeStateChanged).node_id)
            case ShutdownBegun.kind:
                # One from before this loop was made has done its work: the cloud is open again.
                self._is_closing = self._is_closing or envelope.at >= self._born_at
            case _:
                pass
        # Each of them may have made room, a notice too: what it freed is known only to the book.
        self._waiters_due = None

    def _end_all(self) -> bool:
        """What was admitted while the cloud was closing goes the way of the rest."""
        with self._books.read() as tx:
            if not store.list_unending(tx):
                return False
        with self._books.work(ACTOR) as work:
            return life.end_all(work, Reason.SHUTDOWN) > 0

    # ---- admission ------------------------------------------------------------------------------

    def _devices(self) -> bool:
        """Devices for those that were admitted before theirs were free."""
        with self._books.read() as tx:
            unplaced = store.list_unplaced(tx)
        self._is_anyone_unplaced = bool(unplaced)
        placed = False
        for workload in unplaced:
            with self._books.work(ACTOR) as work:
                current = store.get_workload(work.tx, workload.id)
                if current.version == workload.version:
                    placed = admission.place(work, current) or placed
        return placed

    def _waiters(self) -> bool:
        """Serve who waits, by rank, then age. True: somebody was admitted."""
        now = self._books.clock.now()
        if self._driver.has_released:
            self._driver.has_released = False
            self._waiters_due = None
        if self._waiters_due is not None and now < self._waiters_due:
            return False
        with self._books.read() as tx:
            waiting = store.list_waiting(tx, MAX_WAITERS)
        self._is_anyone_waiting = bool(waiting)
        self._waiters_due = now + RETRY_WAITERS
        refused: set[tuple[str, int, int]] = set()
        served = False
        for workload in waiting:
            like = (workload.pool_id, workload.rank, workload.devices)
            # One that is alike was just refused: nobody younger of that kind passes either.
            if like not in refused:
                served = self._serve(workload, refused, like) or served
        return served

    def _serve(
        self, workload: Workload, refused: set[tuple[str, int, int]], like: tuple[str, int, int]
    ) -> bool:
        try:
            with self._books.work(ACTOR) as work:
                current = store.get_workload(work.tx, workload.id)
                if current.state is not State.AWAITING_CAPACITY:
                    return False
                admission.serve(work, current)
        except NoCapacity as refusal:
            if refusal.details.get("reason") != "price":
                refused.add(like)
            return False
        except (PaymentRequired, Forbidden, Conflict) as refusal:
            log.info("waiter_not_served", workload_id=workload.id, code=refusal.code)
            return False
        return True

    # ---- housekeeping ---------------------------------------------------------------------------

    def _price_victims(self, now: datetime) -> None:
        """Notice, in time, to those whose limit a posted price passes."""
        if self._prices_due is not None and now < self._prices_due:
            return
        self._prices_due = now + PRICES_EVERY
        with self._books.read() as tx:
            victims = market.price_victims(tx, now + PRICES_EVERY)
        for victim in victims:
            if victim.notice_by <= now + PRICES_EVERY:
                self._give_price_notice(victim)

    def _give_price_notice(self, victim: market.PriceVictim) -> None:
        try:
            with self._books.work(ACTOR) as work:
                workload = store.get_workload(work.tx, victim.contract.subject)
                life.give_notice(work, workload, Reason.PRICE, at_earliest=victim.term_at)
        except Conflict as conflict:
            log.info("price_notice_not_given", code=conflict.code, why=conflict.message)

    def _forget(self, now: datetime) -> None:
        """Logs, and the files of a job that is over, are kept a week; an instance's files go when
        it is terminated."""
        if self._forget_due is not None and now < self._forget_due:
            return
        self._forget_due = now + FORGET_EVERY
        with self._books.read() as tx:
            runs = store.list_forgettable(tx, now - LOGS_KEPT, MAX_FORGOTTEN)
            homes = store.list_homes_to_erase(tx, now - LOGS_KEPT, MAX_FORGOTTEN)
        try:
            for run in runs:
                self._engine.forget(run.id)
            for workload in homes:
                self._engine.erase_home(home_of(workload))
        except SubletError as error:
            log.warning("not_forgotten", why=error.message)
            return
        if runs or homes:
            with self._books.work(ACTOR) as work:
                store.keep_forgotten(work, [run.id for run in runs], [w.id for w in homes])
