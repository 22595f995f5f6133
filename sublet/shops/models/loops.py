"""The loop of the models shop: replicas as many as are wanted, ready ones known, leaving ones empty.

Drain: publish without the replica → every gateway that lives acts by such a snapshot → nothing in
flight → stop. A replica that was given notice drains at once; its notice is how long that may take.

Whatever asks a model server or an engine lies outside every Work, in a few threads of its own, so
that a slow start keeps nobody else waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path

import structlog
from sqlalchemy import Connection

from sublet.base.kernel.errors import Conflict, Invalid, NoCapacity, NotFound, SubletError
from sublet.base.store import Actor, Store, Work
from sublet.capacity.engines.port import Engine
from sublet.records import metering, tenancy
from sublet.shops import compute
from sublet.shops.compute import Location, Reason
from sublet.shops.compute.states import State
from sublet.shops.models import keys, scaling, service, store
from sublet.shops.models.model import (
    Deployment,
    DeploymentState,
    Lifecycle,
    Model,
    Replica,
    ReplicaChanged,
    ReplicaState,
)
from sublet.shops.models.servers import KEY_SOCKET, MODEL_SOCKET, SERVERS, ModelFacts, ModelServer

log = structlog.get_logger()

ACTOR = Actor.system("models")
QUIET = timedelta(seconds=30)
"""Nothing is deployed."""
CALM = timedelta(seconds=1)
BUSY = timedelta(milliseconds=150)
"""Something starts or leaves."""
START_LIMIT = timedelta(minutes=10)
"""A replica that does not answer for so long has failed."""
LIVE = (ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING)
LEAVING = frozenset({State.INTERRUPTING, State.STOPPING})
THREADS = 4

KeyOf = Callable[[], "keys.KeyEncryptionKey | None"]


class ModelsLoop:
    """Steps the shop on one engine."""

    def __init__(
        self,
        books: Store,
        engine: Engine,
        *,
        servers: Mapping[str, ModelServer] = SERVERS,
        key: KeyOf = lambda: None,
    ) -> None:
        self._books = books
        self._engine = engine
        self._servers = servers
        self._key = key
        self._pool: ThreadPoolExecutor | None = None
        self._asked: dict[str, Future[bool]] = {}
        self._checked: dict[str, tuple[str, float]] = {}
        self._is_busy = False

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def step(self, now: datetime) -> datetime:
        """One look at every deployment and replica, and what follows; when to look again."""
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
                self._look_after(replica, by_id.get(replica.deployment_id), where[replica.id], now)
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
        self, replica: Replica, deployment: Deployment | None, at: Location, now: datetime
    ) -> None:
        workload = at.workload
        if workload.is_over:
            self._gone(replica, at)
        elif replica.state is ReplicaState.DRAINING:
            self._is_busy = True
            self._try_to_leave(replica, at)
        elif workload.state in LEAVING:
            reason = "notice" if workload.reason is None else str(workload.reason)
            self._drain(replica, reason)
        elif replica.state is ReplicaState.STARTING:
            self._is_busy = True
            self._try_to_serve(replica, at, now)

    def _drain(self, replica: Replica, reason: str) -> None:
        """It gets no new call from the next snapshot on."""
        self._is_busy = True
        with self._books.work(ACTOR) as work:
            found = store.find_replica(work.tx, replica.id)
            if found is None or found.state not in (ReplicaState.STARTING, ReplicaState.READY):
                return
            store.update_replica(
                work.tx, found, state=ReplicaState.DRAINING, draining_at=work.now, reason=reason
            )
            _tell(work, found, ReplicaState.DRAINING)

    def _try_to_leave(self, replica: Replica, at: Location) -> None:
        with self._books.read() as tx:
            is_free = service.is_dropped(tx, replica.id) and not service.in_flight(tx, replica.id)
        if not is_free or at.workload.state is State.STOPPING:
            return
        self._read_counts(replica, at)
        with self._books.work(ACTOR) as work:
            compute.stop_for(work, replica.id, Reason.DRAINED)

    def _gone(self, replica: Replica, at: Location) -> None:
        workload = at.workload
        why = replica.reason or workload.failure or str(workload.reason or workload.state)
        with self._books.work(ACTOR) as work:
            found = store.find_replica(work.tx, replica.id)
            if found is None or found.state is ReplicaState.GONE:
                return
            store.update_replica(
                work.tx, found, state=ReplicaState.GONE, gone_at=work.now, reason=why
            )
            _tell(work, found, ReplicaState.GONE)
            if found.ready_at is None and found.state is ReplicaState.STARTING:
                _note_failure(work, found.deployment_id, self._story(at, why))
        self._asked.pop(replica.id, None)

    def _story(self, at: Location, why: str) -> str:
        """Why it did not start, with the last line that it wrote."""
        if at.run_id is None:
            return why
        try:
            said, _ = self._engine.logs(at.run_id)
        except SubletError:
            return why
        lines = [line for line in said.decode(errors="replace").splitlines() if line.strip()]
        return f"{why}: {lines[-1][:300]}" if lines else why

    def _try_to_serve(self, replica: Replica, at: Location, now: datetime) -> None:
        if now - replica.created_at > START_LIMIT:
            with self._books.work(ACTOR) as work:
                compute.stop_for(work, replica.id, Reason.NODE_FAULT)
            return
        if at.run_id is None or not at.is_running:
            return
        asked = self._asked.get(replica.id)
        if asked is None:
            self._asked[replica.id] = self._threads().submit(self._is_serving, replica, at)
            return
        if not asked.done():
            return
        del self._asked[replica.id]
        if asked.exception() is not None:
            log.warning("replica_not_asked", replica_id=replica.id, why=str(asked.exception()))
        elif asked.result():
            self._ready(replica, at)

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="models")
        return self._pool

    def _is_serving(self, replica: Replica, at: Location) -> bool:
        """In a thread: bring a sealed one its key, then ask for one real token."""
        assert at.run_id is not None
        with self._books.read() as tx:
            model = store.get_model(tx, replica.model)
        if model.is_sealed and not replica.has_key:
            return self._bring_key(replica, model, at)
        door = self._engine.door(at.run_id, MODEL_SOCKET)
        return self._servers[model.server].ready(door, facts_of(model))

    def _bring_key(self, replica: Replica, model: Model, at: Location) -> bool:
        """Written down first, sent after; never twice to one replica."""
        assert at.run_id is not None
        try:
            with keys.knock(self._engine.door(at.run_id, KEY_SOCKET)) as caller:
                asked: keys.Asked | None = None
                try:
                    with self._books.work(ACTOR) as work:
                        asked = self._asking(work, replica, model, at)
                        data_key = keys.release(work, self._key(), asked, peer=caller.peer)
                        found = store.find_replica(work.tx, replica.id)
                        assert found is not None
                        store.update_replica(work.tx, found, has_key=True)
                except SubletError as refused:
                    if asked is not None:
                        with self._books.work(ACTOR) as work:
                            keys.note_refusal(work, asked, refused)
                            _note_failure(work, replica.deployment_id, refused.message)
                            compute.stop_for(work, replica.id, Reason.SCALED_IN)
                    return False
                caller.deliver(data_key)
        except OSError:
            return False  # Nobody listens there yet.
        return False  # It has the key: whether it serves, the next look asks.

    def _asking(self, work: Work, replica: Replica, model: Model, at: Location) -> keys.Asked:
        found = store.find_replica(work.tx, replica.id)
        return keys.Asked(
            replica_id=replica.id,
            model=model.name,
            node_id=at.node_id or "",
            is_starting=found is not None
            and found.state is ReplicaState.STARTING
            and not found.has_key,
            is_granted=service.is_granted(work.tx, model.name),
            is_third_party=model.is_third_party,
            is_own_site=True,
        )

    def _ready(self, replica: Replica, at: Location) -> None:
        assert at.run_id is not None
        door = self._engine.door(at.run_id, MODEL_SOCKET)
        with self._books.work(ACTOR) as work:
            found = store.find_replica(work.tx, replica.id)
            if found is None or found.state is not ReplicaState.STARTING:
                return
            store.update_replica(
                work.tx, found, state=ReplicaState.READY, door=door, ready_at=work.now
            )
            deployment = store.get_deployment(work.tx, found.deployment_id)
            store.note_deployment(work.tx, deployment, failure=None, failures=0, retry_at=None)
            _tell(work, found, ReplicaState.READY)
        log.info("replica_ready", replica_id=replica.id, model=replica.model)

    def _read_counts(self, replica: Replica, at: Location) -> None:
        """The engine's own totals beside ours, before it goes: what differs is named."""
        if at.run_id is None or replica.ready_at is None:
            return
        with self._books.read() as tx:
            server = self._servers[store.get_model(tx, replica.model).server]
        counts = server.gauges(self._engine.door(at.run_id, MODEL_SOCKET))
        if counts is None:
            return
        with self._books.work(ACTOR) as work:
            metering.keep_reading(
                work,
                replica.id,
                prompt=counts.prompt_total,
                cached=counts.cached_total,
                predicted=counts.predicted_total,
            )

    # ---- one deployment --------------------------------------------------------------------

    def _scale(self, deployment: Deployment, now: datetime) -> None:
        with self._books.read() as tx:
            live = store.list_replicas(tx, deployment_id=deployment.id, states=LIVE)
            model = store.get_model(tx, deployment.model)
            load = _load(tx, deployment, live)
            may_serve = self._may_serve(tx, model, now)
        staying = [r for r in live if r.state is not ReplicaState.DRAINING]
        scaled = scaling.decide(deployment, load, now=now)
        wanted = scaled.wanted if may_serve else 0
        self._remember(deployment, scaled, load)
        if deployment.state is DeploymentState.RETIRING and not live:
            with self._books.work(ACTOR) as work:
                found = store.get_deployment(work.tx, deployment.id)
                store.update_deployment(work.tx, found, state=DeploymentState.RETIRED)
            return
        if wanted < len(staying):
            # The newest first, and filler before what is firm.
            order = sorted(staying, key=lambda r: (not r.is_filler, -r.created_at.timestamp()))
            for replica in order[: len(staying) - wanted]:
                self._drain(replica, str(Reason.SCALED_IN))
        elif wanted > len(staying) and (deployment.retry_at is None or now >= deployment.retry_at):
            self._is_busy = True
            self._add(deployment, model, staying, load)

    def _may_serve(self, tx: Connection, model: Model, now: datetime) -> bool:
        is_ended = service.stage_on(model, now.date()) is Lifecycle.END_OF_LIFE
        return not is_ended and (not model.is_sealed or service.is_granted(tx, model.name))

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

    def _add(
        self,
        deployment: Deployment,
        model: Model,
        staying: list[Replica],
        load: scaling.Load,
    ) -> None:
        """One replica more: firm up to the minimum, filler above it."""
        try:
            server = self._spec(deployment, model)
            with self._books.work(ACTOR) as work:
                firm = sum(not replica.is_filler for replica in staying)
                is_filler = firm >= deployment.min_replicas
                self._rent(work, deployment, model, server, is_filler, len(staying) + 1, load)
        except (NoCapacity, Conflict, Invalid, NotFound) as refused:
            with self._books.work(ACTOR) as work:
                _note_failure(work, deployment.id, refused.message)

    def _spec(self, deployment: Deployment, model: Model) -> compute.ServerSpec:
        """What to run. The file is what was added, by its digest; of a sealed one the format says."""
        path = Path(model.path)
        if not model.path or not path.is_file():
            raise Conflict(f"The weights of {model.name} are not at {path}: `make setup`.")
        if not model.is_sealed:
            mark = (str(path), path.stat().st_mtime)
            if self._checked.get(model.name) != mark:
                found, _ = service.digest(path)
                if found != model.sha256:
                    raise Conflict(
                        f"{path} is not the file that was added as {model.name}: its sha256 differs."
                    )
                self._checked[model.name] = mark
        server = self._servers[model.server]
        return server.spawn(facts_of(model), devices=deployment.devices, slots=deployment.slots)

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
                model.tokens_per_device_hour,
                0 if price is None else price.output_micros,
                scaling.expected_permille(load, deployment.target, number),
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


def facts_of(model: Model) -> ModelFacts:
    return ModelFacts(
        name=model.name,
        path=model.path,
        kind=model.kind,
        context=model.context,
        is_sealed=model.is_sealed,
        template=model.template,
    )


def _load(tx: Connection, deployment: Deployment, live: list[Replica]) -> scaling.Load:
    """Running and waiting, by all gateways that live."""
    names = {replica.id for replica in live}
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
