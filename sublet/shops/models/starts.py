"""From a process that runs to a replica that serves: its key, and one real answer.

All of it waits for others (a socket, a file of many gigabytes), so it happens in a few threads, and
the loop only looks whether it has happened. No more than `THREADS` servers are asked at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import structlog

from sublet.base.kernel.errors import SubletError
from sublet.base.store import Actor, Store, Work
from sublet.capacity.engines.port import Engine
from sublet.shops.compute import Location
from sublet.shops.models import keys, service, store
from sublet.shops.models.model import Model, Replica, ReplicaState, WeightsChanged, WeightsMissing
from sublet.shops.models.servers import (
    KEY_SOCKET,
    MODEL_SOCKET,
    Gauges,
    ModelFacts,
    ModelServer,
)

log = structlog.get_logger()

ACTOR = Actor.system("models")
THREADS = 4
UNLOCKED_LIMIT = timedelta(minutes=2)
"""A replica whose key another life of this process was to bring, and that does not serve after so
long, never got it: nobody brings it twice."""

KeyOf = Callable[[], "keys.KeyEncryptionKey | None"]
Mark = tuple[object, ...]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ready:
    """It answered. `counts`: what it had counted just then; None: it does not say."""

    counts: Gauges | None


@dataclass(frozen=True, slots=True)
class Hopeless:
    """It will not serve: it is to be ended."""

    why: str


class Starts:
    """Asks model servers. Nothing here changes a replica's state."""

    def __init__(
        self,
        books: Store,
        engine: Engine,
        servers: Mapping[str, ModelServer],
        key: KeyOf,
        executor: Executor | None,
    ) -> None:
        self._books = books
        self._engine = engine
        self._servers = servers
        self._key = key
        self._executor = executor
        self._asked: dict[str, Future[Ready | Hopeless | None]] = {}
        self._digests: dict[str, Future[tuple[Mark, str]]] = {}
        self._right: dict[str, tuple[str, Mark]] = {}
        self._unlocked: set[str] = set()
        self._met_at: dict[str, datetime] = {}

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def submit(self, do: Callable[[], T]) -> Future[T]:
        """In one of the threads."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(THREADS, thread_name_prefix="models")
        return self._executor.submit(do)

    # ---- is it up? --------------------------------------------------------------------------

    def poll(self, replica: Replica, at: Location, now: datetime) -> Ready | Hopeless | None:
        """Whether a starting replica serves; None: not yet, ask again."""
        if at.run_id is None or not at.is_running:
            return None
        asked = self._asked.pop(replica.id, None)
        if asked is None:
            self._asked[replica.id] = self.submit(lambda: self._ask(replica, at))
            return None
        if not asked.done():
            self._asked[replica.id] = asked
            return None
        error = asked.exception()
        if error is not None:
            log.warning("replica_not_asked", replica_id=replica.id, why=repr(error))
            return None
        return asked.result() or self._given_up(replica, now)

    def forget(self, replica_id: str) -> None:
        """It is gone."""
        self._asked.pop(replica_id, None)
        self._unlocked.discard(replica_id)
        self._met_at.pop(replica_id, None)

    def _given_up(self, replica: Replica, now: datetime) -> Hopeless | None:
        if not replica.has_key or replica.id in self._unlocked:
            return None
        met_at = self._met_at.setdefault(replica.id, now)
        return Hopeless("its key was lost on the way") if now - met_at > UNLOCKED_LIMIT else None

    def _ask(self, replica: Replica, at: Location) -> Ready | Hopeless | None:
        """In a thread: bring a sealed one its key; ask the others for one real token."""
        assert at.run_id is not None
        with self._books.read() as tx:
            model = store.get_model(tx, replica.model)
        if model.is_sealed and not replica.has_key:
            return self._bring_key(replica, model, at)
        door = self._engine.door(at.run_id, MODEL_SOCKET)
        server = self._servers[model.server]
        return Ready(server.gauges(door)) if server.ready(door, facts_of(model)) else None

    # ---- its key ----------------------------------------------------------------------------

    def _bring_key(self, replica: Replica, model: Model, at: Location) -> Hopeless | None:
        """Written down first, sent after; never twice to one replica."""
        assert at.run_id is not None
        try:
            with keys.knock(self._engine.door(at.run_id, KEY_SOCKET)) as caller:
                found = self._release(replica, model, at, caller.peer)
                if isinstance(found, Hopeless):
                    return found
                try:
                    caller.deliver(found)
                except OSError as error:
                    return Hopeless(f"its key did not reach it ({error.strerror or error})")
        except OSError:
            return None  # Nobody listens there yet.
        self._unlocked.add(replica.id)
        return None  # It has the key: whether it serves, the next look asks.

    def _release(
        self, replica: Replica, model: Model, at: Location, peer: keys.Peer
    ) -> bytearray | Hopeless:
        asked: keys.Asked | None = None
        try:
            with self._books.work(ACTOR) as work:
                asked = _asking(work, replica, model, at)
                data_key = keys.release(work, self._key(), asked, peer=peer)
                store.update_replica(work.tx, replica, has_key=True)
                return data_key
        except SubletError as refused:
            if asked is not None:
                with self._books.work(ACTOR) as work:
                    keys.note_refusal(work, asked, refused)
            return Hopeless(refused.message)

    # ---- its file ---------------------------------------------------------------------------

    def is_file_right(self, model: Model) -> bool:
        """The file is the one that was added, by its digest; of a sealed one its own format says so
        as it is opened. False: it is being read. Raises WeightsMissing, WeightsChanged.

        It is read again only when the file system says that it is another one.
        """
        if not service.are_here(model):
            raise WeightsMissing(f"The weights of {model.name} are not at {model.path}.")
        if model.is_sealed:
            return True
        path = Path(model.path)
        try:
            mark = _mark(path)
            if self._right.get(model.name) == (model.sha256, mark):
                return True
            reading = self._digests.pop(model.name, None)
            if reading is None or not reading.done():
                self._digests[model.name] = reading or self.submit(lambda: _read_through(path))
                return False
            read, found = reading.result()
        except OSError as error:
            raise WeightsMissing(f"{path} cannot be read: {error.strerror}.") from error
        if found != model.sha256:
            raise WeightsChanged(
                f"{path} is not the file that was added as {model.name}: its sha256 differs."
            )
        self._right[model.name] = (model.sha256, read)
        return read == mark


def _read_through(path: Path) -> tuple[Mark, str]:
    return _mark(path), service.digest(path)[0]


def _mark(path: Path) -> Mark:
    """By what the file system tells another file, or a changed one."""
    seen = path.stat()
    return str(path), seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns


def _asking(work: Work, replica: Replica, model: Model, at: Location) -> keys.Asked:
    """As the rows stand in this Work. All nodes are the owner's: none is leased yet."""
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


def facts_of(model: Model) -> ModelFacts:
    """What a server has to know of it."""
    return ModelFacts(
        name=model.name,
        path=model.path,
        kind=model.kind,
        context=model.context,
        is_sealed=model.is_sealed,
        template=model.template,
    )
