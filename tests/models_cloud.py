"""A cloud that serves models: real services and loops, simulated nodes, model servers that answer
as a test says, and gateways that are what they last said of themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from templates import Template

from sublet.audit import check
from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.money import Money
from sublet.base.store import Actor, Store, Work
from sublet.base.wire.gateway import Gauge, Snapshot
from sublet.capacity import allocation, fleet
from sublet.capacity.allocation import loops as allocation_loops
from sublet.capacity.engines.simulated import SimulatedEngine
from sublet.records import ledger, tenancy
from sublet.rights import market
from sublet.shops import compute, models
from sublet.shops.models.servers import Gauges, ModelFacts
from sublet.shops.models.servers.llama_cpp import LlamaCpp

START = datetime(2026, 11, 2, 12, 7, tzinfo=UTC)
TICK = timedelta(milliseconds=250)
SYSTEM = Actor.system("test")
WEIGHTS = b"GGUF, as far as this test goes"


class Inline(Executor):
    """Does at once what it is given: nothing here waits for a thread."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(fn(*args, **kwargs))
        except BaseException as error:
            done.set_exception(error)
        return done


@dataclass
class Server(LlamaCpp):
    """A model server that is up at once, unless told otherwise."""

    is_up: bool = True
    silent: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    counts: Gauges | None = None

    def spawn(self, model: ModelFacts, *, devices: int, slots: int) -> compute.ServerSpec:
        return compute.ServerSpec(argv=("serve", model.name), lock_memory=model.is_sealed)

    def ready(self, door: str, model: ModelFacts) -> bool:
        self.asked.append(door)
        return self.is_up

    def lives(self, door: str) -> bool:
        return door not in self.silent

    def gauges(self, door: str) -> Gauges | None:
        return self.counts


@dataclass
class Gateway:
    """Follows the snapshots at once, unless it is stuck."""

    snapshot: int = 0
    is_stuck: bool = False
    is_alive: bool = True
    in_flight: dict[str, int] = field(default_factory=dict)
    waiting: dict[str, int] = field(default_factory=dict)


@cache
def prepared(nodes: int, devices: int) -> Template[tuple[str, tenancy.Identity, tenancy.Identity]]:
    def prepare(
        books: Store, clock: VirtualClock
    ) -> tuple[str, tenancy.Identity, tenancy.Identity]:
        engine = SimulatedEngine(clock, nodes=nodes, devices=devices)
        with books.work(SYSTEM) as work:
            for inventory in engine.inventories():
                node = fleet.enrol(
                    work, inventory, site_name="home", trusted_tenants=False, engine="simulated"
                )
            fleet.set_pool(work, node.pool_id, head_room_percent=0, scrub_seconds=2)
            market.load_rate_card(work, market.seed_rate_card(), work.now)
            market.post_spot_prices(work, work.now)
            allocation.set_firm_shelf(work, node.pool_id, nodes * devices, None)
            owner, buyer = identity(work, "owner", "owner"), identity(work, "buyer")
            ledger.post(
                work,
                key="gift",
                debit=ledger.PAYMENTS,
                credit=ledger.customer_account(buyer.organisation.id),
                amount=Money.parse("10000"),
                kind="payment",
                organisation_id=buyer.organisation.id,
            )
        return node.pool_id, owner, buyer

    return Template(prepare, START)


def identity(work: Work, name: str, kind: str = "consumer", **key: Any) -> tenancy.Identity:
    organisation = tenancy.create_organisation(work, name=name, kind=kind, standing="good")
    principal = tenancy.create_principal(
        work, organisation.id, kind="user", name=name, role="admin"
    )
    made, _ = tenancy.create_key(work, principal.id, name="key", **key)
    return tenancy.Identity(organisation=organisation, principal=principal, key=made)


class Cloud:
    """`step` is every loop once, then the link: a new snapshot where there is one, and gauges."""

    def __init__(self, folder: Path, *, nodes: int = 1, devices: int = 4, **engine: Any) -> None:
        self.folder = folder
        self.clock = VirtualClock(START)
        template = prepared(nodes, devices)
        self.books = template.open(folder, self.clock)
        self.engine = SimulatedEngine(self.clock, nodes=nodes, devices=devices, **engine)
        self.pool_id, self.owner, self.buyer = template.found
        self.server = Server()
        self.gateways: dict[str, Gateway] = {"gw-0": Gateway()}
        self.snapshot = Snapshot(number=0, made_us=0, gateways=1, keys={}, limits={}, models={})
        self.has_books = True
        """False: rows of use were put in without their money."""
        self.published: dict[int, set[str]] = {}
        self._stopped: set[str] = set()
        self.compute = compute.ComputeLoop(self.books, self.engine, timedelta(seconds=10))
        self.models = self.loop()

    def loop(self, **options: Any) -> models.ModelsLoop:
        return models.ModelsLoop(
            self.books,
            self.engine,
            servers={"llama.cpp": self.server},
            executor=Inline(),
            **options,
        )

    def restart(self) -> None:
        """A new control plane over the same database and the same machines."""
        self.compute = compute.ComputeLoop(self.books, self.engine, timedelta(seconds=10))
        self.models = self.loop()

    # ---- time -----------------------------------------------------------------------------

    @property
    def now(self) -> datetime:
        return self.clock.now()

    def step(self) -> datetime:
        allocation_loops.step(self.books, self.now)
        due = self.compute.step(self.now)
        due = min(due, self.models.step(self.now))
        self._check_stopped()
        self.publish()
        self.gauge()
        return due

    def run(self, seconds: float) -> None:
        end = self.now + timedelta(seconds=seconds)
        self.step()
        while self.now < end:
            due = self.step()
            event = self.engine.next_event_at() or end
            soon = min(due, max(event, self.now), end)
            self.clock.advance_to(min(max(soon, self.now + TICK), end))
        self.step()

    def _check_stopped(self) -> None:
        """Who was stopped as drained had nothing in hand, and no gateway that lives may send to it."""
        for replica in self.replicas("draining"):
            workload = self.workload(replica)
            if replica.id in self._stopped or workload.reason is not compute.Reason.DRAINED:
                continue
            self._stopped.add(replica.id)
            for gateway in self.gateways.values():
                if gateway.is_alive:
                    assert not gateway.in_flight.get(replica.id), replica
                    named = self.published.get(gateway.snapshot, set())
                    assert replica.id not in named, (replica, gateway)

    def publish(self) -> None:
        """As the link does: what has not changed keeps its number."""
        with self.books.read() as tx:
            made = models.compose(tx, number=0, now=self.now, gateways=len(self.gateways))
        if _content(made) == _content(self.snapshot):
            return
        with self.books.work(SYSTEM) as work:
            number = models.last_snapshot(work.tx) + 1
            self.snapshot = Snapshot(**{**_fields(made), "number": number})
            models.keep_snapshot(work, self.snapshot)
        self.published[number] = self.named()

    def gauge(self) -> None:
        with self.books.work(SYSTEM) as work:
            for name, gateway in self.gateways.items():
                if not gateway.is_stuck:
                    gateway.snapshot = self.snapshot.number
                models.keep_gauge(work, a_gauge(name, gateway))
            models.set_gateways(work, [n for n, g in self.gateways.items() if g.is_alive])

    # ---- acting ---------------------------------------------------------------------------

    def act(self, deed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.books.work(SYSTEM) as work:
            return deed(work, *args, **kwargs)

    def see(self, query: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.books.read() as tx:
            return query(tx, *args, **kwargs)

    def add_model(self, name: str = "m", *, priced: bool = True, **differs: Any) -> models.Model:
        path = self.folder / f"{name}.gguf"
        path.write_bytes(WEIGHTS)
        new = models.NewModel(
            **{
                "name": name,
                "provider": "sublet",
                "licence": "Apache-2.0",
                "path": str(path),
                "sha256": hashlib.sha256(WEIGHTS).hexdigest(),
                "size_bytes": len(WEIGHTS),
                "quantization": "Q8_0",
                "context": 512,
                "max_output": 512,
                **differs,
            }
        )
        with self.books.work(SYSTEM) as work:
            made = models.add_model(work, new)
            if priced:
                for tier, divisor in (("default", 1), ("flex", 2)):
                    models.set_price(
                        work,
                        name,
                        tier=tier,
                        input_micros=40_000 // divisor,
                        cached_micros=20_000 // divisor,
                        output_micros=160_000 // divisor,
                    )
        return made

    def deploy(self, model: str = "m", **options: Any) -> models.Deployment:
        made: models.Deployment = self.act(models.deploy, self.owner, model=model, **options)
        return made

    def rent(self, devices: int = 1, **options: Any) -> compute.Workload:
        """A stranger's spot instance: it displaces filler."""
        offer = "gpu-spot" if devices == 1 else f"gpu-spot-{devices}"
        with self.books.work(self.buyer.actor()) as work:
            quote = market.quote(work, self.buyer, offer_id=offer)
            return compute.rent(
                work,
                self.buyer,
                kind="instance",
                quote_id=quote.id,
                spec=compute.WorkloadSpec(),
                **options,
            )

    def notice(self, replica: models.Replica, reason: str = "owner_recall") -> allocation.Claim:
        """As a recall gives it."""
        with self.books.work(SYSTEM) as work:
            claim = allocation.find_claim_of(work.tx, replica.id)
            assert claim is not None
            term_at = allocation.earliest_term_at(claim, work.now)
            return allocation.give_notice(work, claim.id, reason=reason, term_at=term_at)

    # ---- seeing ---------------------------------------------------------------------------

    def deployment(self, found: models.Deployment) -> models.Deployment:
        seen: models.Deployment = self.see(models.get_deployment, found.id)
        return seen

    def replicas(self, *states: str) -> list[models.Replica]:
        found: list[models.Replica] = self.see(models.list_replicas)
        return [one for one in found if one.state in (states or models.LIVE)]

    def ready(self) -> list[models.Replica]:
        return self.replicas("ready")

    def workload(self, replica: models.Replica) -> compute.Workload:
        found: compute.Workload = self.see(compute.location, replica.id).workload
        return found

    def named(self) -> set[str]:
        """The replicas that the snapshot names."""
        return {r.id for route in self.snapshot.models.values() for r in route.replicas}

    def audit(self) -> None:
        assert self.see(check, self.now) == []


def a_gauge(name: str, gateway: Gateway) -> Gauge:
    return Gauge(
        gateway=name,
        epoch=1,
        snapshot=gateway.snapshot,
        is_cut_off=False,
        in_flight={k: v for k, v in gateway.in_flight.items() if v},
        waiting={k: v for k, v in gateway.waiting.items() if v},
        refusals={},
        requests=0,
        spool_file=0,
        spool_offset=0,
    )


def _fields(snapshot: Snapshot) -> Mapping[str, Any]:
    return {name: getattr(snapshot, name) for name in Snapshot.__slots__}


def _content(snapshot: Snapshot) -> dict[str, Any]:
    return {k: v for k, v in _fields(snapshot).items() if k not in ("number", "made_us")}


def clouds(tmp_path: Path) -> Iterator[Callable[..., Cloud]]:
    """For a fixture: clouds that are audited and closed at the end."""
    made: list[Cloud] = []

    def make(**options: Any) -> Cloud:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Cloud(folder, **options))
        return made[-1]

    yield make
    for cloud in made:
        if cloud.has_books:
            cloud.audit()
        cloud.books.close()
