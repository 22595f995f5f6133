"""The loop that makes it so.

One pass: what happened → devices for the admitted → the engine → whoever waits. Passes are
repeated while they change something, so that a start, or an end with its scrub and the next
tenant's start, needs no second tick.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

import structlog

from sublet.base.kernel.errors import Conflict, Forbidden, NoCapacity, PaymentRequired, SubletError
from sublet.base.store import Envelope, Store, Work, advance, pending
from sublet.capacity import allocation, fleet
from sublet.capacity.engines.port import Engine
from sublet.capacity.fleet import NodeState
from sublet.rights import market
from sublet.shops.compute import admission, life, sealed, store
from sublet.shops.compute.admission import Ground, Kinship
from sublet.shops.compute.driver import ACTOR, LOOK, Driver
from sublet.shops.compute.model import Reason, SealedNode, ShutdownBegun, Workload
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
    market.DemandUnmet,
    ShutdownBegun,
)
MAX_REFUSALS = 3
"""How often an event is tried that is refused: what changed under it has settled by then."""
MAX_FAILURES = 10
MAX_PASSES = 8
IDLE = timedelta(seconds=30)
RETRY_WAITERS = timedelta(seconds=5)
WAITERS_A_PAGE = 200
MAX_PAGES = 50
PRICES_EVERY = timedelta(seconds=60)
DRAINS_EVERY = timedelta(seconds=10)
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
        self._unplaced_due: datetime | None = None
        """When somebody who is admitted and has no devices yet may have them."""
        self._prices_due: datetime | None = None
        self._forget_due: datetime | None = None
        self._drains_due: datetime | None = None
        self._failures: dict[int, int] = {}

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
        self._drain(now)
        self._forget(now)
        return self._next_due(now)

    def _next_due(self, now: datetime) -> datetime:
        coming = [now + IDLE]
        looks = self._driver.next_due(now)
        if looks is not None:
            coming.append(looks)
        if self._is_anyone_waiting and self._waiters_due is not None:
            coming.append(self._waiters_due)
        if self._unplaced_due is not None:
            coming.append(self._unplaced_due)
        return max(min(coming), now)

    # ---- what happened --------------------------------------------------------------------------

    def _events(self) -> bool:
        with self._books.read() as tx:
            found = pending(tx, CONSUMER, EVENTS)
        for envelope in found:
            if not self._deal_with(envelope):
                return False
        return bool(found)

    def _deal_with(self, envelope: Envelope) -> bool:
        """Handle one in a Work of its own, and pass it. False: it failed, and is tried again.

        One that fails again and again is passed over: it must not keep all others waiting.
        """
        try:
            with self._books.work(ACTOR) as work:
                self._handle(work, envelope)
                advance(work, CONSUMER, envelope.seq)
        except Exception as error:
            self._failures[envelope.seq] = self._failures.get(envelope.seq, 0) + 1
            log.exception("event_not_handled", seq=envelope.seq, kind=envelope.kind)
            most = MAX_REFUSALS if isinstance(error, SubletError) else MAX_FAILURES
            if self._failures[envelope.seq] < most:
                return False
            log.error("event_passed_over", seq=envelope.seq, kind=envelope.kind)
            with self._books.work(ACTOR) as work:
                advance(work, CONSUMER, envelope.seq)
        self._failures.pop(envelope.seq, None)
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
            case market.DemandUnmet.kind:
                demand = envelope.read(market.DemandUnmet)
                if demand.reason == SealedNode.code and demand.pool_id is not None:
                    sealed.make_room(work, demand.pool_id)
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
            ids = [workload.claim_id for workload in unplaced if workload.claim_id is not None]
            starts = [allocation.get_claim(tx, claim_id).starts_at for claim_id in ids]
        now = self._books.clock.now()
        moments = [now + RETRY_WAITERS, *(at for at in starts if at > now)]
        self._unplaced_due = min(moments) if unplaced else None
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
        self._waiters_due = now + RETRY_WAITERS
        self._is_anyone_waiting = served = False
        refused: set[Kinship] = set()
        last: Workload | None = None
        for _ in range(MAX_PAGES):
            with self._books.read() as tx:
                waiting = store.list_waiting(tx, WAITERS_A_PAGE, after=last)
                contracts = market.get_contracts(tx, [w.contract_id for w in waiting])
            for workload in waiting:
                kinships = admission.kinships(workload, contracts[workload.contract_id])
                # One that is alike was just refused: nobody younger of that kind passes either.
                if refused.isdisjoint(kinships.values()):
                    served = self._serve(workload, refused, kinships) or served
            self._is_anyone_waiting = self._is_anyone_waiting or bool(waiting)
            if len(waiting) < WAITERS_A_PAGE:
                break
            last = waiting[-1]
        return served

    def _serve(
        self, workload: Workload, refused: set[Kinship], kinships: Mapping[Ground, Kinship]
    ) -> bool:
        try:
            with self._books.work(ACTOR) as work:
                current = store.get_workload(work.tx, workload.id)
                if current.state is not State.AWAITING_CAPACITY:
                    return False
                admission.serve(work, current)
        except (NoCapacity, PaymentRequired, Forbidden) as refusal:
            ground = admission.ground_of(refusal)
            refused.add(kinships[ground])
            if isinstance(refusal, SealedNode):
                with self._books.work(ACTOR) as work:
                    sealed.make_room(work, workload.pool_id)
            if ground is not Ground.ROOM:
                log.info("waiter_not_served", workload_id=workload.id, code=refusal.code)
            return False
        except Conflict as refusal:
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

    def _drain(self, now: datetime) -> None:
        """Notice to what runs on a draining node without one: it could not be given before."""
        if self._drains_due is not None and now < self._drains_due:
            return
        self._drains_due = now + DRAINS_EVERY
        with self._books.read() as tx:
            draining = [n.id for n in fleet.list_nodes(tx) if n.state is NodeState.DRAINING]
            runs = [run for node_id in draining for run in store.list_live_runs_on(tx, node_id)]
            claims = {run.id: allocation.get_claim(tx, run.claim_id) for run in runs}
        for run in runs:
            if claims[run.id].noticed_at is None and claims[run.id].release.notice_seconds:
                try:
                    with self._books.work(ACTOR) as work:
                        life.drain(work, run.id)
                except Conflict as conflict:
                    log.info("drain_not_noticed", run_id=run.id, code=conflict.code)

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
