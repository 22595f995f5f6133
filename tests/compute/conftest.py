"""A small cloud on SQLite under a virtual clock: the real services, the simulated engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from templates import Template

from sublet.audit import check
from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.money import Money
from sublet.base.store import Actor, Store, Work
from sublet.capacity import allocation, fleet
from sublet.capacity.allocation import loops as allocation_loops
from sublet.capacity.engines.simulated import SimulatedEngine
from sublet.money import billing
from sublet.records import ledger, metering, tenancy
from sublet.rights import market, owner
from sublet.shops import compute

START = datetime(2026, 11, 2, 12, 7, tzinfo=UTC)
TICK = timedelta(milliseconds=250)
TESTER = Actor.system("test")


@cache
def prepared(
    nodes: int, devices: int, head_room: int, fences: tuple[tuple[str, Any], ...]
) -> Template[tuple[str, list[tenancy.Identity]]]:
    """A cloud with nodes, prices and three who have money; gives its pool and those three."""

    def prepare(books: Store, clock: VirtualClock) -> tuple[str, list[tenancy.Identity]]:
        engine = SimulatedEngine(clock, nodes=nodes, devices=devices, fences=dict(fences))
        with books.work(TESTER) as work:
            for inventory in engine.inventories():
                node = fleet.enrol(
                    work,
                    inventory,
                    site_name="home",
                    trusted_tenants=False,
                    engine="simulated",
                )
            fleet.set_pool(work, node.pool_id, head_room_percent=head_room, scrub_seconds=2)
            market.load_rate_card(work, market.seed_rate_card(), work.now)
            market.post_spot_prices(work, work.now)
            allocation.set_firm_shelf(work, node.pool_id, nodes * devices, None)
            people = [
                _identity(work, name, kind)
                for name, kind in (("owner", "owner"), ("buyer", "consumer"), ("other", "consumer"))
            ]
            for who in people[1:]:
                ledger.post(
                    work,
                    key=f"gift {who.organisation.id}",
                    debit=ledger.PAYMENTS,
                    credit=ledger.customer_account(who.organisation.id),
                    amount=Money.parse("10000"),
                    kind="payment",
                    organisation_id=who.organisation.id,
                )
        return node.pool_id, people

    return Template(prepare, START)


def _identity(work: Work, name: str, kind: str) -> tenancy.Identity:
    organisation = tenancy.create_organisation(work, name=name, kind=kind, standing="good")
    principal = tenancy.create_principal(
        work, organisation.id, kind="user", name=name, role="admin"
    )
    key, _ = tenancy.create_key(work, principal.id, name="key")
    return tenancy.Identity(organisation=organisation, principal=principal, key=key)


class World:
    """One owner, one consumer with credit, a pool of simulated nodes, every loop."""

    def __init__(
        self,
        path: Path,
        *,
        nodes: int = 1,
        devices: int = 2,
        head_room: int = 0,
        look: float = 10,
        **engine: Any,
    ) -> None:
        self.clock = VirtualClock(START)
        self.look = timedelta(seconds=look)
        fences = tuple(sorted(engine.get("fences", {}).items()))
        template = prepared(nodes, devices, head_room, fences)
        self.books = template.open(path, self.clock)
        self.engine = SimulatedEngine(self.clock, nodes=nodes, devices=devices, **engine)
        self.loop = compute.ComputeLoop(self.books, self.engine, look=self.look)
        self.pool_id, (self.owner, self.buyer, self.other) = template.found
        self.nodes = {node.name: node.id for node in self._read(fleet.list_nodes)}

    def _read(self, query: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self.books.read() as tx:
            return query(tx, *args, **kwargs)

    # ---- time -------------------------------------------------------------------------------

    @property
    def now(self) -> datetime:
        return self.clock.now()

    def at(self, seconds: float) -> datetime:
        return START + timedelta(seconds=seconds)

    def step(self) -> datetime:
        """Every loop once, as the runner would after a nudge."""
        allocation_loops.step(self.books, self.now)
        owner.step(self.books, self.now)
        due = self.loop.step(self.now)
        return min(due, billing.step(self.books, self.now))

    def run(self, seconds: float) -> None:
        """Let that much time pass; loops step when they ask to, and where something happens."""
        end = self.now + timedelta(seconds=seconds)
        self.step()
        while self.now < end:
            due = self.step()
            event = self.engine.next_event_at() or end
            soon = min(due, max(event, self.now), end)
            self.clock.advance_to(min(max(soon, self.now + TICK), end))
        self.step()

    def until(self, seconds: float) -> None:
        """Run up to that many seconds after the world began."""
        self.run((self.at(seconds) - self.now) / timedelta(seconds=1))

    def restart(self) -> None:
        """A new control plane over the same database and the same machines."""
        self.loop = compute.ComputeLoop(self.books, self.engine, look=self.look)

    # ---- acting -----------------------------------------------------------------------------

    def rent(
        self,
        *,
        kind: Any = "instance",
        offer: str = "gpu-spot",
        who: tenancy.Identity | None = None,
        notice: int | None = None,
        max_price: Money | None = None,
        grace: int = 30,
        wait: bool = False,
        **spec: Any,
    ) -> compute.Workload:
        identity = who or self.buyer
        if kind == "job":
            spec.setdefault("command", ("sleep", "600"))
        with self.books.work(identity.actor()) as work:
            quote = market.quote(
                work,
                identity,
                offer_id=offer,
                notice_seconds=notice,
                max_price=max_price,
                stop_grace_seconds=grace,
            )
            return compute.rent(
                work,
                identity,
                kind=kind,
                quote_id=quote.id,
                spec=compute.WorkloadSpec(**spec),
                wait=wait,
            )

    def job(self, *command: str, **options: Any) -> compute.Workload:
        if command:
            options["command"] = command
        return self.rent(kind="job", **options)

    def act(self, deed: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """In a Work, in the consumer's name where the deed asks for one."""
        with self.books.work(self.buyer.actor()) as work:
            return deed(work, *args, **kwargs)

    def stop(self, workload: compute.Workload) -> compute.StopAnswer:
        found: compute.StopAnswer = self.act(compute.stop, self.buyer, workload.id)
        return found

    def interrupt(self, workload: compute.Workload, reason: str = "spot_interruption") -> None:
        """As a sale of higher rank does it: with all the notice that was sold."""
        with self.books.work(self.owner.actor()) as work:
            claim_id = self.see(workload).claim_id
            assert claim_id is not None
            claim = allocation.get_claim(work.tx, claim_id)
            term_at = allocation.earliest_term_at(claim, work.now)
            allocation.give_notice(work, claim_id, reason=reason, term_at=term_at)

    # ---- seeing -----------------------------------------------------------------------------

    def see(self, workload: compute.Workload) -> compute.Workload:
        with self.books.read() as tx:
            return compute.get_workload(tx, self._who(workload), workload.id)

    def _who(self, workload: compute.Workload) -> tenancy.Identity:
        people = (self.owner, self.buyer, self.other)
        return next(p for p in people if p.organisation.id == workload.organisation_id)

    def state(self, workload: compute.Workload) -> str:
        return str(self.see(workload).state)

    def runs(self, workload: compute.Workload) -> list[compute.Run]:
        found: list[compute.Run] = self._read(compute.list_runs, workload.id)
        return found

    def last(self, workload: compute.Workload) -> compute.Run:
        return self.runs(workload)[-1]

    def meter(self, run: compute.Run) -> metering.Meter:
        found: metering.Meter = self._read(metering.get_meter, run.id)
        return found

    def find_meter(self, run: compute.Run) -> metering.Meter | None:
        found: metering.Meter | None = self._read(metering.find_meter, run.id)
        return found

    def posted(self, workload: compute.Workload, kind: str = "usage") -> int:
        found: Money = self._read(ledger.posted, workload.contract_id, kind)
        return found.micros

    def contract(self, workload: compute.Workload) -> market.Contract:
        found: market.Contract = self._read(market.get_contract, workload.contract_id)
        return found

    def hold(self, workload: compute.Workload) -> ledger.Hold | None:
        found: ledger.Hold | None = self._read(ledger.find_hold, workload.id)
        return found

    def path(self, workload: compute.Workload) -> list[str]:
        found = self._read(compute.list_transitions, workload.id)
        return [str(row.to_state) for row in found]

    def free(self) -> int:
        with self.books.read() as tx:
            held = {p.device_id for p in allocation.list_placements(tx, self.pool_id)}
            return len(fleet.sellable_devices(tx, self.pool_id)) - len(held)

    def uses(self, start: datetime, end: datetime) -> dict[str, int]:
        found: dict[str, int] = self._read(metering.partition, start=start, end=end)
        return {use: ms for use, ms in found.items() if ms}

    def audit(self) -> None:
        assert self._read(check, self.now) == []


@pytest.fixture
def make_world(tmp_path: Path) -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def make(**options: Any) -> World:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(World(folder, **options))
        return made[-1]

    yield make
    for world in made:
        world.audit()
        world.books.close()


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    return make_world()
