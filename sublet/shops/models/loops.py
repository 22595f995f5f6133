"""The loop of the models shop: replicas as many as are wanted, ready ones known, leaving ones empty.

Drain: publish without the replica → every gateway that lives acts by such a snapshot → nothing in
flight → stop. A replica that was given notice drains at once; its notice is how long that may take.

Whatever asks a model server or reads a file lies outside every Work, in threads of its own
(`starts`), so that a slow start keeps nobody else waiting.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import replace
from datetime import datetime, timedelta

import structlog
from sqlalchemy import Connection

from sublet.base.kernel.errors import Conflict, Invalid, NoCapacity, NotFound, SubletError
from sublet.base.store import Store, Work
from sublet.capacity.engines.port import Engine
from sublet.records import metering, tenancy
from sublet.shops import compute
from sublet.shops.compute import Location, Reason
from sublet.shops.compute.states import State
from sublet.shops.models import scaling, service, store
from sublet.shops.models.liveness import Liveness
from sublet.shops.models.model import (
    Deployment,
    DeploymentState,
    Lifecycle,
    Model,
    Replica,
    ReplicaChanged,
    ReplicaState,
)
from sublet.shops.models.readings import Readings
from sublet.shops.models.servers import MODEL_SOCKET, SERVERS, ModelServer
from sublet.shops.models.starts import ACTOR, Hopeless, KeyOf, Ready, Starts, facts_of

log = structlog.get_logger()

QUIET = timedelta(seconds=30)
"""Nothing is deployed."""
CALM = timedelta(seconds=1)
BUSY = timedelta(milliseconds=150)
"""Something starts or leaves."""
START_LIMIT = timedelta(minutes=10)
"""A replica that does not answer for so long has failed."""
STEADY = timedelta(minutes=1)
"""One that served for so long has started well; one that ended sooner has not."""
LEAVE_LIMIT = timedelta(minutes=10)
"""How long the last requests of a replica that nobody needs may take: its devices are not waited
for, and a client that reads for ever must not hold them for ever."""
REVOKED_LIMIT = timedelta(seconds=45)
"""The same where it may serve no more: with snapshot and grace it is gone within a minute."""
SILENT_LIMIT = timedelta(seconds=5)
"""And where its server answers nobody: what it has in hand waits in vain."""
LIVE = (ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING)
LEAVING = frozenset({State.INTERRUPTING, State.STOPPING})

RETIRED = "retired"
ENDED = "model_ended"
REVOKED = "grant_revoked"
SILENT = "not_answering"
OUR_REASONS = frozenset({RETIRED, ENDED, REVOKED, SILENT, str(Reason.SCALED_IN)})
"""Why we let one leave; all others are its notice's."""


class ModelsLoop:
    """Steps the shop on one engine. `executor`: where servers are asked; None: a few threads, and a
    few of their own to ask whether they live."""

    def __init__(
        self,
        books: Store,
        engine: Engine,
        *,
        servers: Mapping[str, ModelServer] = SERVERS,
        key: KeyOf = lambda: None,
        executor: Executor | None = None,
    ) -> None:
        self._books = books
        self._engine = engine
        self._servers = servers
        self._starts = Starts(books, engine, servers, key, executor)
        self._liveness = Liveness(executor)
        self._readings = Readings(books, engine, servers, self._starts.submit)
        self._is_busy = False

    def close(self) -> None:
        self._starts.close()
        self._liveness.close()

    def step(self, now: datetime) -> datetime:
        """One look at every deployment and replica, and what follows; when to look again."""
        self._readings.step(now)
        with self._books.read() as tx:
            deployments = store.list_deployments(tx)
            replicas = store.list_replicas(tx, states=LIVE)
            where = {r.id: compute.location(tx, r.id) for r in replicas}
        if not deployments and not replicas:
            return now + QUIET
        self._is_busy = False
        by_id = {deployment.id: deployment for deployment in deployments}
        for replica in replicas:
            try:
                self._look_after(replica, by_id[replica.deployment_id], where[replica.id], now)
            except SubletError as error:
                log.warning("replica_not_stepped", replica_id=replica.id, why=error.message)
        for deployment in deployments:
            try:
                self._scale(deployment, now)
            except SubletError as error:
                log.warning("deployment_not_scaled", deployment_id=deployment.id, why=error.message)
        return now + (BUSY if self._is_busy else CALM)

    # ---- one replica -----------------------------------------------------------------------

    def _look_after(
        self, replica: Replica, deployment: Deployment, at: Location, now: datetime
    ) -> None:
        workload = at.workload
        if workload.is_over:
            self._gone(replica, at)
        elif replica.state is ReplicaState.DRAINING:
            self._is_busy = True
            if workload.state is State.RUNNING and replica.reason not in OUR_REASONS:
                self._stay(replica)
            else:
                self._try_to_leave(replica, deployment, at, now)
        elif replica.reason is not None:
            self._is_busy = True  # It was given up: its end is awaited.
        elif workload.state in LEAVING:
            self._drain(replica, str(workload.reason or workload.state))
        elif replica.state is ReplicaState.STARTING:
            self._is_busy = True
            self._try_to_serve(replica, at, now)
        elif self._is_silent(replica, at, now):
            log.warning("replica_silent", replica_id=replica.id, model=replica.model)
            self._drain(replica, SILENT)
        else:
            self._readings.look(replica, at, now)

    def _is_silent(self, replica: Replica, at: Location, now: datetime) -> bool:
        if at.run_id is None:
            return False
        with self._books.read() as tx:
            server = self._servers[store.get_model(tx, replica.model).server]
        door = self._engine.door(at.run_id, MODEL_SOCKET)
        return self._liveness.is_silent(replica.id, server, door, now)

    def _drain(self, replica: Replica, reason: str) -> None:
        """It gets no new call from the next snapshot on."""
        self._is_busy = True
        self._liveness.forget(replica.id)
        with self._books.work(ACTOR) as work:
            found = store.find_replica(work.tx, replica.id)
            if found is None or found.state not in (ReplicaState.STARTING, ReplicaState.READY):
                return
            store.update_replica(
                work.tx, found, state=ReplicaState.DRAINING, draining_at=work.now, reason=reason
            )
            _tell(work, found, ReplicaState.DRAINING)

    def _stay(self, replica: Replica) -> None:
        """Its notice was withdrawn: it goes on where it was. Nobody has asked it meanwhile."""
        self._liveness.forget(replica.id)
        with self._books.work(ACTOR) as work:
            state = ReplicaState.STARTING if replica.ready_at is None else ReplicaState.READY
            store.update_replica(work.tx, replica, state=state, draining_at=None, reason=None)
            _tell(work, replica, state)

    def _try_to_leave(
        self, replica: Replica, deployment: Deployment, at: Location, now: datetime
    ) -> None:
        if at.workload.state is State.STOPPING:
            return
        with self._books.read() as tx:
            is_empty = service.is_dropped(tx, replica.id) and not service.in_flight(tx, replica.id)
        if is_empty:
            self._readings.take_last(replica, at, now)
        elif not _is_late(replica, deployment, now):
            return
        with self._books.work(ACTOR) as work:
            compute.stop_for(work, replica.id, Reason.DRAINED if is_empty else Reason.SCALED_IN)

    def _gone(self, replica: Replica, at: Location) -> None:
        workload = at.workload
        why = replica.reason or workload.failure or _end_of(workload)
        story = self._story(at, why)
        with self._books.work(ACTOR) as work:
            found = store.find_replica(work.tx, replica.id)
            if found is None or found.state is ReplicaState.GONE:
                return
            store.update_replica(
                work.tx, found, state=ReplicaState.GONE, gone_at=work.now, reason=why
            )
            _tell(work, found, ReplicaState.GONE)
            steady_at = None if found.ready_at is None else found.ready_at + STEADY
            is_early = steady_at is None or work.now < steady_at
            if is_early and found.state is not ReplicaState.DRAINING:
                _note_failure(work, found.deployment_id, story)
        self._starts.forget(replica.id)
        self._liveness.forget(replica.id)
        self._readings.forget(replica.id)

    def _story(self, at: Location, why: str) -> str:
        """Why it did not start, with the line that it wrote of an error: the first, since others
        follow from it; where there is none, the last."""
        if at.run_id is None:
            return why
        try:
            said, _ = self._engine.logs(at.run_id)
        except SubletError:
            return why
        lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
        told = [line for line in lines if "error" in line.lower()] or lines[-1:]
        return f"{why}: {told[0].strip()[:300]}" if told else why

    def _try_to_serve(self, replica: Replica, at: Location, now: datetime) -> None:
        if now - replica.created_at > START_LIMIT:
            self._end(replica, f"it did not answer within {START_LIMIT}")
            return
        found = self._starts.poll(replica, at, now)
        if isinstance(found, Ready):
            self._ready(replica, at, found, now)
        elif isinstance(found, Hopeless):
            self._end(replica, found.why)

    def _end(self, replica: Replica, why: str) -> None:
        """It failed to start; the deployment will say why."""
        with self._books.work(ACTOR) as work:
            store.update_replica(work.tx, replica, reason=why)
            compute.stop_for(work, replica.id, Reason.SCALED_IN)

    def _ready(self, replica: Replica, at: Location, ready: Ready, now: datetime) -> None:
        assert at.run_id is not None
        door = self._engine.door(at.run_id, MODEL_SOCKET)
        with self._books.work(ACTOR) as work:
            found = store.find_replica(work.tx, replica.id)
            if found is None or found.state is not ReplicaState.STARTING:
                return
            store.update_replica(
                work.tx, found, state=ReplicaState.READY, door=door, ready_at=work.now
            )
            if ready.counts is not None:
                metering.begin_readings(
                    work,
                    replica.id,
                    prompt=ready.counts.prompt_total,
                    cached=ready.counts.cached_total,
                    predicted=ready.counts.predicted_total,
                )
            deployment = store.get_deployment(work.tx, found.deployment_id)
            store.note_deployment(work.tx, deployment, failure=None, retry_at=None)
            _tell(work, found, ReplicaState.READY)
        self._readings.begin(replica.id, now)
        log.info("replica_ready", replica_id=replica.id, model=replica.model)

    # ---- one deployment --------------------------------------------------------------------

    def _scale(self, deployment: Deployment, now: datetime) -> None:
        with self._books.read() as tx:
            # Its replicas were just looked after: what failed of them is known by now.
            deployment = store.get_deployment(tx, deployment.id)
            live = store.list_replicas(tx, deployment_id=deployment.id, states=LIVE)
            model = store.get_model(tx, deployment.model)
            staying = [r for r in live if r.state is not ReplicaState.DRAINING]
            load = _load(tx, deployment, staying)
            forbidden = _why_not(tx, deployment, model, now)
        fresh = replace(deployment, last_asked_at=_idle_since(deployment, staying, now))
        scaled = scaling.decide(fresh, load, now=now)
        self._remember(deployment, scaled, load)
        self._forgive(deployment, staying, now)
        if deployment.state is DeploymentState.RETIRING and not live:
            with self._books.work(ACTOR) as work:
                found = store.get_deployment(work.tx, deployment.id)
                store.update_deployment(work.tx, found, state=DeploymentState.RETIRED)
            return
        wanted = 0 if forbidden else scaled.wanted
        leaving = scaling.surplus(staying, wanted, deployment.min_replicas)
        for replica in leaving:
            self._drain(replica, forbidden or str(Reason.SCALED_IN))
        if not leaving and (deployment.retry_at is None or now >= deployment.retry_at):
            self._grow(deployment, model, staying, wanted, load)

    def _grow(
        self,
        deployment: Deployment,
        model: Model,
        staying: list[Replica],
        wanted: int,
        load: scaling.Load,
    ) -> None:
        is_filler = scaling.next_is_filler(staying, wanted, deployment)
        blocking = scaling.blocks_firm(staying, wanted, deployment)
        if is_filler is not None:
            self._is_busy = True
            self._add(deployment, model, is_filler, len(staying) + 1, load)
        elif blocking is not None:
            self._drain(blocking, str(Reason.SCALED_IN))

    def _remember(self, deployment: Deployment, scaled: scaling.Scaled, load: scaling.Load) -> None:
        asked_long_ago = scaled.last_asked_at - deployment.last_asked_at > timedelta(seconds=5)
        if (scaled.wanted, scaled.lower_since) == (deployment.wanted, deployment.lower_since) and (
            not load.total or not asked_long_ago
        ):
            return
        with self._books.work(ACTOR) as work:
            found = store.get_deployment(work.tx, deployment.id)
            store.note_deployment(
                work.tx,
                found,
                wanted=scaled.wanted,
                lower_since=scaled.lower_since,
                last_asked_at=scaled.last_asked_at,
            )

    def _forgive(self, deployment: Deployment, staying: list[Replica], now: datetime) -> None:
        """One serves steadily: the next failure is a first one again."""
        if deployment.failures and any(
            one.ready_at is not None and now - one.ready_at >= STEADY for one in staying
        ):
            with self._books.work(ACTOR) as work:
                found = store.get_deployment(work.tx, deployment.id)
                store.note_deployment(work.tx, found, failures=0)

    def _add(
        self,
        deployment: Deployment,
        model: Model,
        is_filler: bool,
        number: int,
        load: scaling.Load,
    ) -> None:
        """One replica more. What refuses it is kept, and it is tried again later and later."""
        try:
            if not self._starts.is_file_right(model):
                return
            server = self._servers[model.server].spawn(
                facts_of(model), devices=deployment.devices, slots=deployment.slots
            )
            with self._books.work(ACTOR) as work:
                self._rent(work, deployment, model, server, is_filler, number, load)
        except NoCapacity as refused:
            with self._books.work(ACTOR) as work:
                _note_no_room(work, deployment.id, refused.message)
        except (Conflict, Invalid, NotFound) as refused:
            with self._books.work(ACTOR) as work:
                _note_failure(work, deployment.id, refused.message)

    def _rent(
        self,
        work: Work,
        deployment: Deployment,
        model: Model,
        server: compute.ServerSpec,
        is_filler: bool,
        number: int,
        load: scaling.Load,
    ) -> None:
        owner = tenancy.find_owner(work.tx)
        assert owner is not None, "a cloud has its owner"
        price = store.prices_in_force(work.tx, work.now).get((model.name, "default"))
        workload = compute.rent_replica(
            work,
            deployment_id=deployment.id,
            pool_id=deployment.pool_id,
            devices=deployment.devices,
            memory_bytes=None,
            is_filler=is_filler,
            drain_seconds=deployment.drain_seconds,
            value_micros=scaling.worth_micros(
                model, price, scaling.expected_permille(load, deployment.target, number)
            ),
            server=server,
            organisation_id=owner.id,
            is_sealed=model.is_sealed,
        )
        replica = Replica(
            id=workload.id,
            deployment_id=deployment.id,
            model=model.name,
            is_filler=is_filler,
            state=ReplicaState.STARTING,
            door="",
            has_key=False,
            created_at=work.now,
            ready_at=None,
            draining_at=None,
            gone_at=None,
            reason=None,
        )
        store.insert_replica(work.tx, replica)
        _tell(work, replica, ReplicaState.STARTING)


def _idle_since(deployment: Deployment, staying: list[Replica], now: datetime) -> datetime:
    """Nobody can have asked what did not serve yet: one that starts is not idle, however long it
    takes, and its time counts from when it was ready."""
    return max([deployment.last_asked_at, *(one.ready_at or now for one in staying)])


def _end_of(workload: compute.Workload) -> str:
    """How one ended that nobody ended."""
    if workload.reason is not Reason.USER:
        return str(workload.reason or workload.state)
    code = workload.exit_code
    return "it ended by itself" + ("" if code is None else f" with exit code {code}")


def _is_late(replica: Replica, deployment: Deployment, now: datetime) -> bool:
    """What it still has in hand is given up. Under a notice that is the engine's to do, at its
    end."""
    assert replica.draining_at is not None
    if replica.reason not in OUR_REASONS:
        return False
    if replica.reason == str(Reason.SCALED_IN):
        limit = LEAVE_LIMIT
    elif replica.reason == SILENT:
        limit = SILENT_LIMIT
    else:
        limit = min(timedelta(seconds=deployment.drain_seconds), REVOKED_LIMIT)
    return now - replica.draining_at >= limit


def _why_not(tx: Connection, deployment: Deployment, model: Model, now: datetime) -> str | None:
    """Why it serves no more, if so."""
    if deployment.state is not DeploymentState.ACTIVE:
        return RETIRED
    if service.stage_on(model, now.date()) is Lifecycle.END_OF_LIFE:
        return ENDED
    return REVOKED if model.is_sealed and not service.is_granted(tx, model.name) else None


def _load(tx: Connection, deployment: Deployment, staying: list[Replica]) -> scaling.Load:
    """Running and waiting, by all gateways that live. What a leaving one has in hand it finishes."""
    names = {replica.id for replica in staying}
    running = waiting = 0
    for gateway in store.list_gateways(tx):
        if gateway.is_alive:
            running += sum(n for name, n in gateway.in_flight.items() if name in names)
            waiting += gateway.waiting.get(deployment.model, 0)
    return scaling.Load(running=running, waiting=waiting)


def _tell(work: Work, replica: Replica, state: ReplicaState) -> None:
    work.emit(
        ReplicaChanged(replica_id=replica.id, deployment_id=replica.deployment_id, state=str(state))
    )


def _note_no_room(work: Work, deployment_id: str, why: str) -> None:
    """Out of stock is no failed start: it is asked for again soon, so that a device which comes back
    is used while requests still wait for it."""
    deployment = store.get_deployment(work.tx, deployment_id)
    retry_at = work.now + scaling.NO_ROOM
    store.note_deployment(work.tx, deployment, failure=why, retry_at=retry_at)
    if deployment.failure != why:
        log.info("replica_awaits_room", deployment_id=deployment_id, why=why)


def _note_failure(work: Work, deployment_id: str, why: str) -> None:
    deployment = store.get_deployment(work.tx, deployment_id)
    failures = deployment.failures + 1
    store.note_deployment(
        work.tx,
        deployment,
        failure=why,
        failures=failures,
        retry_at=work.now + scaling.retry_after(failures),
    )
    log.warning("replica_not_started", deployment_id=deployment_id, why=why, failures=failures)
