"""One cloud under a virtual clock: the real services and loops over simulated nodes.

`World` moves time and watches; `people` act in it. Time jumps from one due step to the next, and
to whatever the simulated nodes do by themselves. After every step that committed something, or
every `audit_every`-th of them, the auditor looks at the whole database.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Concatenate, Literal, NoReturn, ParamSpec, TypeVar

from sqlalchemy import Connection, event

from sublet.app.loops import cloud_loops
from sublet.app.migrate import metadata  # it knows every table
from sublet.audit import Violation, check
from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.ids import SeededIds, seeded_rng
from sublet.base.kernel.money import Money
from sublet.base.store import Actor, Store, Work, open_store
from sublet.capacity import allocation, fleet
from sublet.capacity.engines.simulated import Fault, SimulatedEngine
from sublet.money import billing
from sublet.rehearsal.line import ControlPlaneDied, Line
from sublet.rehearsal.people import Consumer, Owner
from sublet.rehearsal.schedule import Schedule
from sublet.rights import market

P = ParamSpec("P")
R = TypeVar("R")

START = datetime(2026, 11, 2, 10, tzinfo=UTC)
SETUP = Actor.system("rehearsal")
LOOK = timedelta(seconds=30)
"""How often running workloads are looked at besides the instants at which something happens."""
EVENTS_KEPT = 60


class Broken(AssertionError):
    """An invariant does not hold, or a loop failed: the seed, when, and what came before."""

    def __init__(
        self, seed: int, at: datetime, violations: Sequence[Violation], events: Sequence[str]
    ) -> None:
        self.seed = seed
        self.at = at
        self.violations = tuple(violations)
        self.events = tuple(events)
        said = "\n".join(f"  {v.name}: {v.detail}\n    ({v.statement})" for v in violations)
        before = "\n".join(f"  {line}" for line in events)
        super().__init__(f"seed {seed}, {at.isoformat()}:\n{said}\nwhat came before:\n{before}")


class World:
    """The cloud, its clock and its metal. Close it, or use it as a context manager.

    `path`: a folder for the database file; None: a temporary one. `lag_seconds`: how late the
    control plane notices, at most, what a workload did by itself; drawn from the seed.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        nodes: int = 1,
        devices_per_node: int = 2,
        kind: Literal["cpu", "gpu"] = "gpu",
        model: str = "SIM-80G",
        start: datetime = START,
        clock: VirtualClock | None = None,
        path: Path | None = None,
        head_room_percent: int | None = None,
        scrub_seconds: int | None = None,
        rate_card: str | None = None,
        start_seconds: float = 1.0,
        start_jitter: float = 0.0,
        lag_seconds: float = 0.0,
        look: timedelta = LOOK,
        audit_every: int = 1,
        faults: Sequence[Fault] = (),
    ) -> None:
        self.seed = seed
        self.start = start
        self.clock = VirtualClock(start) if clock is None else clock
        self.rng = seeded_rng(seed)
        self.ids = SeededIds(seed)
        self.engine = SimulatedEngine(
            self.clock,
            nodes=nodes,
            devices=devices_per_node,
            kind=kind,
            model=model,
            rng=seeded_rng(seed + 1),
            start_seconds=start_seconds,
            start_jitter=start_jitter,
            faults=faults,
        )
        self.line = Line(self.engine)
        self.events: deque[str] = deque(maxlen=EVENTS_KEPT)
        self.restarts = 0
        self.audits = 0
        self.steps = 0
        self._kind = kind
        self._look = look
        self._lag = lag_seconds
        self._audit_every = audit_every
        self.commits = 0
        self._audited_at_commit = 0
        self._path = path or Path(tempfile.mkdtemp(prefix="sublet-rehearsal-"))
        self._is_temporary = path is None
        self.store = self._open()
        metadata.create_all(self.store.engine)
        owner_secret = self._set_up(rate_card, head_room_percent, scrub_seconds)
        self.owner = Owner(self, owner_secret)
        self.schedule = self._wire()

    # ---- wiring -----------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"sqlite:///{self._path / 'sublet.db'}"

    def _open(self) -> Store:
        store = open_store(self.url, self.clock, self.ids)
        event.listen(store.engine, "connect", _without_fsync)
        event.listen(store.engine, "begin", self._begun)
        event.listen(store.engine, "commit", self._committed)
        return store

    def _begun(self, connection: Connection) -> None:
        connection.info["changes_before"] = _changes(connection)

    def _committed(self, connection: Connection) -> None:
        """Count commits that changed a row; the auditor need not look after the others."""
        if _changes(connection) != connection.info["changes_before"]:
            self.commits += 1

    def _set_up(
        self, rate_card: str | None, head_room_percent: int | None, scrub_seconds: int | None
    ) -> str:
        with self.store.work(SETUP) as work:
            fleet.load_costs(work, fleet.seed_costs())
            market.load_rate_card(work, rate_card or market.seed_rate_card(), work.now)
            opened = billing.open_owner(work, name="Owner", email="owner@example.org")
            assert opened is not None
            found = [
                fleet.enrol(
                    work, inventory, site_name="home", trusted_tenants=False, engine="simulated"
                )
                for inventory in self.engine.inventories()
            ]
            self.pool_id = found[0].pool_id
            self.node_ids = {node.name: node.id for node in found}
            fleet.set_pool(
                work,
                self.pool_id,
                head_room_percent=head_room_percent,
                scrub_seconds=scrub_seconds,
            )
            size = len(fleet.list_devices(work.tx, self.pool_id))
            allocation.set_firm_shelf(work, self.pool_id, size, until=None)
            market.post_spot_prices(work, work.now)
        return opened.secret

    def _wire(self) -> Schedule:
        loops = cloud_loops(
            self.store, self.line.engine, look=self._look, inventories=self.line.inventories
        )
        schedule = Schedule(loops, self.clock)
        self.store.on_commit = schedule.nudge
        return schedule

    def restart(self) -> None:
        """A new control plane over the same database and the same machines."""
        self.restarts += 1
        self.note("the control plane starts again")
        self.store.close()
        self.store = self._open()
        self.schedule = self._wire()

    def close(self) -> None:
        self.store.close()
        if self._is_temporary:
            shutil.rmtree(self._path)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- time -------------------------------------------------------------------------------

    @property
    def now(self) -> datetime:
        return self.clock.now()

    def run_for(self, seconds: float) -> None:
        self.run_until(self.now + timedelta(seconds=seconds))

    def run_until(self, at: datetime) -> None:
        """Let everything happen that is due up to that instant, and stand there."""
        while self.step(at):
            pass

    def sleep_until(self, at: datetime) -> None:
        """The control plane is down until then; the metal goes on. It starts again at that instant."""
        self.note(f"the control plane is down until {at.isoformat()}")
        self.clock.advance_to(at)
        self.restart()

    def step(self, limit: datetime) -> bool:
        """The next thing that is due by `limit`; False: nothing, and the clock stands there."""
        happens_at = self.engine.next_event_at()
        due = self.schedule.next_due()
        if happens_at is not None and happens_at <= min(due, limit):
            self.clock.advance_to(max(happens_at, self.now))
            lag = timedelta(seconds=self._lag * self.rng.random() if self._lag else 0.0)
            self.schedule.wake("compute", self.now + lag)
            return True
        if due > limit:
            self.clock.advance_to(max(limit, self.now))
            return False
        self._step_loop()
        return True

    def _step_loop(self) -> None:
        before = self.commits
        self.steps += 1
        try:
            name = self.schedule.step()
        except ControlPlaneDied as death:
            self.note(f"the control plane dies: {death}")
            self.restart()
        except Exception as error:
            self.fail(
                "loops_do_not_fail",
                "A loop's step meets no error but the engine's.",
                f"{type(error).__name__}: {error}",
                error,
            )
        else:
            if self.commits > before:
                self.note(f"{name} ({self.commits - before} commits)")
        if self.commits - self._audited_at_commit >= self._audit_every:
            self.audit()

    # ---- watching ---------------------------------------------------------------------------

    def note(self, text: str) -> None:
        """Keep a line for what a failure will show."""
        self.events.append(f"{self.now.isoformat(timespec='milliseconds')} {text}")

    def fail(
        self, name: str, statement: str, detail: str, cause: BaseException | None = None
    ) -> NoReturn:
        """Break off, as the auditor does, for something that it cannot see."""
        found = Violation(name=name, statement=statement, detail=detail)
        raise Broken(self.seed, self.now, [found], list(self.events)) from cause

    def audit(self) -> None:
        """Raise Broken unless every invariant holds now."""
        self._audited_at_commit = self.commits
        self.audits += 1
        with self.store.read() as tx:
            found = check(tx, self.now)
        if found:
            raise Broken(self.seed, self.now, found, list(self.events))

    # ---- acting -----------------------------------------------------------------------------

    @contextmanager
    def work(self, actor: Actor = SETUP) -> Iterator[Work]:
        """A Work as an edge opens one, with the auditor's look after it."""
        with self.store.work(actor) as work:
            yield work
        if self._audit_every == 1:
            self.audit()

    def read(
        self, query: Callable[Concatenate[Connection, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        with self.store.read() as tx:
            return query(tx, *args, **kwargs)

    def sign_up(self, name: str = "Acme", credit: str | None = "1000") -> Consumer:
        """A newcomer with so much credit; None: the trial credit of the rate card."""
        trial = None if credit is None else Money.parse(credit)
        with self.work() as work:
            made = billing.sign_up(
                work,
                email=f"{name.lower()}@example.org",
                organisation_name=name,
                trial=trial,
            )
        self.note(f"{name} signs up with {made.trial}")
        return Consumer(self, made.secret)

    def device_names(self) -> list[str]:
        with self.store.read() as tx:
            return [device.name for device in fleet.list_devices(tx, self.pool_id)]

    @property
    def offers(self) -> dict[str, market.Offer]:
        return {offer.id: offer for offer in self.read(market.list_offers, self.now)}


def _without_fsync(connection: Any, _record: object) -> None:
    """What a rehearsal writes need not outlive its machine."""
    connection.execute("PRAGMA synchronous=off")


def _changes(connection: Connection) -> int:
    """Rows that this connection has changed so far, as SQLite counts them."""
    found = connection.connection.dbapi_connection
    assert found is not None
    return int(found.total_changes)
