"""The database: SQLite in WAL mode by default, PostgreSQL when one machine is outgrown."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.exc import DBAPIError

from sublet.base.kernel.clock import Clock
from sublet.base.kernel.errors import Unavailable
from sublet.base.kernel.ids import Ids
from sublet.base.store.work import Actor, Work

BUSY_TIMEOUT_MS = 10_000
SYNCHRONOUS = "full"
"""What is committed outlives a power cut. The tests set it to `off`: theirs need not."""
EMIT_LOCK = 0x5B1E7
"""Advisory lock under which PostgreSQL gives out outbox numbers in the order of commits."""


class StoreUnavailable(Unavailable):
    """The database cannot be read or written now: look at the disk and the log of Sublet."""

    code = "database_unavailable"


class Store:
    """Opens Works (write) and reads. One per process.

    `on_commit` is called after each Work that emitted something, outside the transaction.
    """

    def __init__(self, url: str, clock: Clock, ids: Ids) -> None:
        self.url = sa.engine.make_url(url)
        self.clock = clock
        self.ids = ids
        self.on_commit: Callable[[], None] | None = None
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = _engine(self.url, writes=True)
        in_memory = self.is_sqlite and self.url.database in (None, "", ":memory:")
        self._reader = self.engine if in_memory else _engine(self.url, writes=False)

    @contextlib.contextmanager
    def work(self, actor: Actor) -> Iterator[Work]:
        """One transaction. Commits when the block ends, rolls back on any exception."""
        with _translated(), self.engine.begin() as tx:
            if not self.is_sqlite:
                tx.execute(sa.select(sa.func.pg_advisory_xact_lock(EMIT_LOCK)))
            work = Work(tx=tx, now=self.clock.now(), ids=self.ids, actor=actor)
            yield work
        if work.emitted and self.on_commit is not None:
            self.on_commit()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view that waits for no writer and can change nothing."""
        with _translated(), self._reader.connect() as tx:
            yield tx

    def close(self) -> None:
        self.engine.dispose()
        self._reader.dispose()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        if isinstance(error, (sa.exc.IntegrityError, sa.exc.ProgrammingError)):
            raise
        raise StoreUnavailable(
            f"The database cannot be used now ({error.orig}): nothing was lost; "
            "look at the disk and at Sublet's log, then try again."
        ) from error


def bare_engine(url: str) -> Engine:
    """Connections with the settings of a Store and nothing more: for what comes before it, the
    migration and the clock's anchor. A block of `begin()` is one transaction, tables included."""
    return _engine(sa.engine.make_url(url), writes=True)


def open_store(url: str, clock: Clock, ids: Ids) -> Store:
    """`sqlite:////abs/path/sublet.db` or `postgresql+psycopg://…`."""
    return Store(url, clock, ids)


def _engine(url: sa.URL, *, writes: bool) -> Engine:
    if url.get_backend_name() != "sqlite":
        options: dict[str, Any] = {"pool_size": 10, "max_overflow": 20}
        if not writes:
            options["execution_options"] = {"postgresql_readonly": True}
        return sa.create_engine(
            url, isolation_level="REPEATABLE READ" if not writes else "READ COMMITTED", **options
        )
    memory = url.database in (None, "", ":memory:")
    engine = sa.create_engine(
        url,
        connect_args={"check_same_thread": False},
        **({"poolclass": sa.pool.StaticPool} if memory else {"pool_size": 20, "max_overflow": 40}),
    )

    @event.listens_for(engine, "connect")
    def _connect(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        if writes:
            cursor.execute("PRAGMA journal_mode=wal")
            cursor.execute(f"PRAGMA synchronous={SYNCHRONOUS}")
        elif not memory:
            cursor.execute("PRAGMA query_only=on")
        cursor.execute("PRAGMA foreign_keys=on")
        cursor.close()

    def _begin(connection: Any) -> None:
        connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN DEFERRED")

    # Not by a listener: with one on the engine, every statement asks for listeners of its own.
    engine.dialect.do_begin = _begin  # type: ignore[method-assign, assignment]
    return engine
