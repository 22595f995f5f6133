"""Random players in a world: what a cloud's life may bring, repeated by its seed.

Consumers come, rent, stop and run out of credit; the owner recalls, gives back, works itself,
changes prices, takes nodes out; nodes fail, fall silent and lie; the control plane is killed in the
middle of a call. Every act is one that the product offers, and a refusal must be one it states.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NoReturn, TypeVar

from sublet.base.kernel.clock import read_boot_ns
from sublet.base.kernel.errors import (
    Conflict,
    Forbidden,
    NoCapacity,
    PaymentRequired,
    SubletError,
    TooMany,
)
from sublet.base.kernel.ids import seeded_rng
from sublet.base.kernel.interval import millis_between, month_of, months_between
from sublet.base.kernel.money import Money
from sublet.capacity import fleet
from sublet.capacity.engines.simulated import seeded_faults
from sublet.capacity.fleet import NodeState
from sublet.money import economics
from sublet.records import ledger, metering, tenancy
from sublet.rehearsal.people import Consumer
from sublet.rehearsal.world import START, World
from sublet.rights import market, owner
from sublet.rights.owner import RecallState
from sublet.shops import compute
from sublet.shops.compute import LIVE, State, Workload

T = TypeVar("T")

REFUSALS = (NoCapacity, PaymentRequired, Forbidden, Conflict, TooMany)
"""What a sound request may be answered; anything else breaks the rehearsal."""
MOST_CONSUMERS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a rehearsal came to. Two plays of one seed differ in `real_seconds` alone."""

    seed: int
    virtual_ms: int
    real_seconds: float = field(compare=False)
    nodes: int
    devices: int
    acts: Mapping[str, int]
    refusals: Mapping[str, int]
    workloads: int
    runs: int
    ends: Mapping[str, int]
    """Ended runs by reason."""
    recalls: Mapping[str, int]
    """By state, and `late`."""
    shortfalls: int
    revenue: Money
    credits: Money
    first_party: Money
    device_ms: Mapping[str, int]
    steps: int
    audits: int
    restarts: int

    @property
    def idle_permille(self) -> int:
        whole = sum(self.device_ms.values())
        return 1000 * self.device_ms.get("idle", 0) // whole if whole else 0

    @property
    def speed(self) -> float:
        """Virtual seconds a real second."""
        return self.virtual_ms / 1000 / self.real_seconds


def play(
    seed: int,
    *,
    days: float = 1.0,
    nodes: int = 4,
    devices_per_node: int = 2,
    acts_an_hour: float = 12.0,
    faults_per_node_day: float = 4.0,
    crashes_a_day: float = 6.0,
    audit_every: int = 25,
    start: datetime = START,
) -> Report:
    """Let random players loose for so many virtual days, then end all and look at the books.

    The auditor looks after every `audit_every`-th commit that changed something, after every
    restart, and at the end. Raises Broken.
    """
    return _Play(
        seed,
        days=days,
        nodes=nodes,
        devices_per_node=devices_per_node,
        acts_an_hour=acts_an_hour,
        faults_per_node_day=faults_per_node_day,
        crashes_a_day=crashes_a_day,
        audit_every=audit_every,
        start=start,
    ).played()


class _Play:
    def __init__(
        self,
        seed: int,
        *,
        days: float,
        nodes: int,
        devices_per_node: int,
        acts_an_hour: float,
        faults_per_node_day: float,
        crashes_a_day: float,
        audit_every: int,
        start: datetime,
    ) -> None:
        self.began_ns = read_boot_ns()
        self.start = start
        self.end = start + timedelta(days=days)
        names = {
            node: [f"{node}.gpu{number}" for number in range(devices_per_node)]
            for node in (f"n{number:04d}" for number in range(1, nodes + 1))
        }
        self.world = World(
            seed,
            nodes=nodes,
            devices_per_node=devices_per_node,
            start=start,
            start_seconds=3.0,
            start_jitter=1.0,
            lag_seconds=1.0,
            audit_every=audit_every,
            faults=seeded_faults(
                seeded_rng(seed + 2),
                nodes=names,
                start=start,
                end=self.end,
                per_node_day=faults_per_node_day,
            ),
        )
        self.rng = self.world.rng
        self.consumers: list[Consumer] = []
        self.own: list[Workload] = []
        self.acts: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.pause = 3600.0 / acts_an_hour
        self.crash_chance = crashes_a_day / (24 * acts_an_hour)

    def played(self) -> Report:
        with self.world:
            while self.world.now < self.end:
                self.world.run_for(self.rng.expovariate(1 / self.pause))
                self._act()
            self._wind_down()
            return self._report()

    # ---- acting -----------------------------------------------------------------------------

    def _act(self) -> None:
        if self.rng.random() < self.crash_chance:
            self.acts["crash"] += 1
            self.world.line.cut("*", "after" if self.rng.random() < 0.7 else "before")
        deeds: list[tuple[int, Callable[[], object]]] = [
            (6 if len(self.consumers) < 3 else 1, self._come),
            (16, self._rent),
            (16, self._run_job),
            (5, self._stop),
            (4, self._start),
            (5, self._end),
            (3, self._top_up),
            (2, self._budget),
            (5, self._recall),
            (3, self._let_recall_go),
            (4, self._own_job),
            (2, self._end_own),
            (1, self._price),
            (2, self._take_node_out),
            (4, self._bring_node_back),
        ]
        deed = self.rng.choices([d for _, d in deeds], [weight for weight, _ in deeds])[0]
        name = deed.__name__.removeprefix("_")
        try:
            deed()
        except REFUSALS as refusal:
            self.refusals[refusal.code] += 1
            self.world.note(f"{name} is refused: {refusal.code}")
        except SubletError as error:
            self._break(f"{name} was answered {error.code}: {error.message}")
        else:
            self.acts[name] += 1

    def _break(self, detail: str) -> NoReturn:
        self.world.fail(
            "play_ends_well", "Players meet stated refusals only, and all ends.", detail
        )

    def _one_of(self, found: list[T]) -> T | None:
        return self.rng.choice(found) if found else None

    def _come(self) -> None:
        if len(self.consumers) < MOST_CONSUMERS:
            credit = self.rng.choice([None, "2", "10", "500", "500"])
            self.consumers.append(self.world.sign_up(f"c{len(self.consumers)}", credit))

    def _terms(self) -> tuple[str, dict[str, Any]]:
        """An offer and what to ask of it."""
        offer = self.rng.choice(list(self.world.offers.values()))
        notices = [notice.seconds for notice in offer.notices]
        terms: dict[str, Any] = {
            "notice": self.rng.choice([None, *notices]),
            "grace": self.rng.choice([0, 5, 30, 120]),
            "wait": self.rng.random() < 0.4,
        }
        if offer.product is market.Product.SPOT and self.rng.random() < 0.3:
            factor = self.rng.choice([1.4, 1.7])
            price = int(offer.base_micros_per_device_hour * factor)
            terms["max_price"] = Money(price, offer.currency)
        return offer.id, terms

    def _rent(self) -> None:
        consumer = self._one_of(self.consumers)
        if consumer is not None:
            offer, terms = self._terms()
            consumer.rent(offer, auto_resume=self.rng.random() < 0.5, env=self._nature(), **terms)

    def _run_job(self) -> None:
        consumer = self._one_of(self.consumers)
        if consumer is not None:
            offer, terms = self._terms()
            longest = self.rng.choice([None, None, 600, 7200])
            consumer.job(
                *self._command(),
                offer=offer,
                max_retries=self.rng.choice([0, 1, 3]),
                requeue=self.rng.random() < 0.8,
                max_run_seconds=longest,
                env=self._nature(),
                **terms,
            )

    def _command(self) -> tuple[str, ...]:
        lasts = self.rng.choice([0, 20, 600, 4000, 20_000])
        return ("sh", "-c", f"sleep {lasts}; exit {self.rng.choice([0, 0, 0, 1])}")

    def _nature(self) -> dict[str, str]:
        if self.rng.random() < 0.2:
            return {"SIM_IGNORE_TERM": "1"}
        return {"SIM_TERM_SECONDS": str(self.rng.choice([0, 3, 40]))}

    def _mine(self, kind: str | None, *states: State) -> tuple[Consumer, Workload] | None:
        consumer = self._one_of(self.consumers)
        if consumer is None:
            return None
        found = [w for w in consumer.workloads(*states) if kind in (None, w.kind)]
        chosen = self._one_of(found)
        return None if chosen is None else (consumer, chosen)

    def _stop(self) -> None:
        if (found := self._mine("instance", *LIVE, State.AWAITING_CAPACITY)) is not None:
            found[0].stop(found[1])

    def _start(self) -> None:
        if (found := self._mine("instance", State.STOPPED)) is not None:
            found[0].start(found[1], wait=self.rng.random() < 0.5)

    def _end(self) -> None:
        if (found := self._mine(None, *LIVE, State.AWAITING_CAPACITY, State.STOPPED)) is not None:
            found[0].end(found[1])

    def _top_up(self) -> None:
        if (consumer := self._one_of(self.consumers)) is not None:
            consumer.top_up(self.rng.choice(["1", "5", "40"]), f"top-up {self.acts.total()}")

    def _budget(self) -> None:
        consumer = self._one_of(self.consumers)
        if consumer is None:
            return
        budget = tenancy.Budget(
            scope_kind=tenancy.ScopeKind.ORGANISATION,
            scope_id=consumer.organisation_id,
            period="day",
            limit_micros=self.rng.choice([1_000_000, 10_000_000, 100_000_000]),
        )
        deed = tenancy.clear_budget if self.rng.random() < 0.5 else tenancy.set_budget
        with self.world.work() as work:
            deed(work, budget)

    def _recall(self) -> None:
        size = len(self.world.device_names())
        by = self.rng.choice([None, 200, 400, 1800, 7200])
        until = self.rng.choice([None, 1800, 10_000])
        now = self.world.now
        recall = self.world.owner.plan(
            self.rng.randrange(1, size // 2 + 1),
            by=None if by is None else now + timedelta(seconds=by),
            until=None if until is None else now + timedelta(seconds=(by or 0) + until),
        )
        if not recall.rows or self.rng.random() < 0.1:
            return
        self.world.run_for(self.rng.choice([0.0, 0.5, 5.0, 30.0, 70.0]))
        numbers = [row.number for row in recall.rows]
        chosen = numbers[: self.rng.randrange(1, len(numbers) + 1)]
        self.world.owner.accept(recall, chosen)

    def _let_recall_go(self) -> None:
        live = [r for r in self._recalls() if r.state in (*_CANCELLABLE, RecallState.DELIVERED)]
        recall = self._one_of(live)
        if recall is None:
            return
        if recall.state is RecallState.DELIVERED:
            self.world.owner.give_back(recall)
        else:
            self.world.owner.cancel(recall)

    def _recalls(self) -> list[owner.Recall]:
        return self.world.read(owner.list_recalls, limit=10_000)

    def _own_job(self) -> None:
        offer = self.rng.choice(list(self.world.offers))
        command = self._command()
        self.own.append(self.world.owner.job(*command, offer=offer, env=self._nature()))

    def _end_own(self) -> None:
        live = [w for w in self.own if not self.world.owner.see(w).is_over]
        if (chosen := self._one_of(live)) is not None:
            self.world.owner.end(chosen)

    def _price(self) -> None:
        """A new card: the same one with every price scaled."""
        factor = self.rng.choice([0.5, 0.8, 1.25, 2.0])
        name = "price_usd_per_device_hour = "
        lines = [
            f"{name}{float(line.removeprefix(name)) * factor:.4f}"
            if line.startswith(name)
            else line
            for line in market.seed_rate_card().splitlines()
        ]
        effective = self.world.now + timedelta(seconds=self.rng.choice([1, 3600, 9000]))
        self.world.owner.load_card("\n".join(lines), effective)

    def _take_node_out(self) -> None:
        node = self.rng.choice(list(self.world.node_ids))
        mode = self.rng.choice(["cordon", "drain", "immediate"])
        self.world.owner.cordon(node, mode, break_notice=self.rng.random() < 0.5)

    def _bring_node_back(self) -> None:
        """Whoever is out goes one step on its way back; from repair all the way."""
        nodes = [n for n in self.world.read(fleet.list_nodes) if n.state is not _PRODUCTION]
        node = self._one_of(nodes)
        if node is not None:
            with self.world.work() as work:
                for state in _WAY_BACK[node.state]:
                    fleet.set_node_state(work, node.id, state, "brought back")

    # ---- the end ----------------------------------------------------------------------------

    def _wind_down(self) -> None:
        """Everybody ends everything; then nothing may be held and every bill be right."""
        for consumer in self.consumers:
            for workload in consumer.workloads():
                if not workload.is_over:
                    consumer.end(workload)
        for workload in self.own:
            if not self.world.owner.see(workload).is_over:
                self.world.owner.end(workload)
        for recall in self._recalls():
            if recall.state is RecallState.DELIVERED:
                self.world.owner.give_back(recall)
            elif recall.state in _CANCELLABLE:
                self.world.owner.cancel(recall)
        self.world.run_for(3600)
        self.world.audit()
        self._check_nothing_left()
        self._check_bills()

    def _check_nothing_left(self) -> None:
        world = self.world
        if world.read(compute.count_live):
            self._break("something lives on after everything was ended")
        if world.engine.live_runs():
            self._break("the metal still carries runs")
        for consumer in self.consumers:
            if consumer.available != consumer.balance:
                self._break(f"{consumer.organisation_id} has credit on hold and nothing runs")

    def _check_bills(self) -> None:
        """What is on invoices is what the ledger moved."""
        months = [month_of(self.start), *months_between(self.start, self.world.now)]
        for consumer in self.consumers:
            billed = sum(consumer.invoice(month).total_micros for month in months)
            paid_in = sum(
                transfer.amount_micros
                for transfer in self.world.read(
                    ledger.list_transfers,
                    consumer.organisation_id,
                    self.start,
                    self.world.now + timedelta(seconds=1),
                )
                if transfer.kind in ("grant", "payment")
            )
            if paid_in - billed != consumer.balance:
                self._break(
                    f"{consumer.organisation_id}: paid in {paid_in}, billed {billed}, "
                    f"left {consumer.balance} micros"
                )

    def _report(self) -> Report:
        world = self.world
        books = world.read(economics.statement, self.start, world.now, world.now)
        workloads = world.read(compute.list_workloads, limit=100_000)
        runs = [run for w in workloads for run in world.read(compute.list_runs, w.id)]
        recalls = self._recalls()
        states = Counter(str(recall.state) for recall in recalls)
        states["late"] = sum(recall.is_late for recall in recalls)
        return Report(
            seed=world.seed,
            virtual_ms=millis_between(self.start, world.now),
            real_seconds=(read_boot_ns() - self.began_ns) / 1e9,
            nodes=len(world.node_ids),
            devices=len(world.device_names()),
            acts=dict(sorted(self.acts.items())),
            refusals=dict(sorted(self.refusals.items())),
            workloads=len(workloads),
            runs=len(runs),
            ends=dict(sorted(Counter(str(run.reason or run.stop_reason) for run in runs).items())),
            recalls=dict(sorted(states.items())),
            shortfalls=len(world.owner.shortfalls()),
            revenue=books.revenue,
            credits=books.credits,
            first_party=books.first_party,
            device_ms=world.read(metering.partition, start=self.start, end=world.now),
            steps=world.steps,
            audits=world.audits,
            restarts=world.restarts,
        )


_CANCELLABLE = (
    RecallState.PLANNED,
    RecallState.ACCEPTED,
    RecallState.NOTICING,
    RecallState.DRAINING,
)
_PRODUCTION = NodeState.PRODUCTION
_AFTER_REPAIR = (NodeState.ONBOARD, NodeState.BURN_IN, NodeState.PRODUCTION)
_WAY_BACK: Mapping[NodeState, tuple[NodeState, ...]] = {
    NodeState.CORDONED: (NodeState.PRODUCTION,),
    NodeState.DRAINING: (NodeState.CORDONED,),
    NodeState.SCRUBBING: (NodeState.TRIAGE,),
    NodeState.TRIAGE: (NodeState.REPAIR,),
    NodeState.REPAIR: _AFTER_REPAIR,
    NodeState.ONBOARD: (NodeState.BURN_IN, NodeState.PRODUCTION),
    NodeState.BURN_IN: (NodeState.PRODUCTION,),
}
