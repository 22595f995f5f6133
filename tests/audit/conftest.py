"""A small cloud in the middle of its life, made by the real services, sound in every respect.

Four devices. `done` is a job that ended; `firm` was stopped and started again; `train` was
interrupted by a recall, which was delivered; the owner's own `mine` runs inside that; `box` has its
notice from a second recall; and what the owner needs beyond is a recorded Shortfall. Meanwhile two
gateways sold tokens: one lives, one was killed with a stream open.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from token_books import PRICES, seed_prices

from sublet.audit import Violation, check
from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.ids import SeededIds
from sublet.base.kernel.interval import micros_since_epoch
from sublet.base.kernel.money import Money
from sublet.base.store import Actor, Store, metadata, open_store
from sublet.base.store.installation import keep_fact
from sublet.base.wire.gateway import AllowanceRequest, Outcome, UsageEvent
from sublet.capacity import allocation, fleet
from sublet.capacity.allocation import Urgency
from sublet.capacity.allocation import loops as allocation_loops
from sublet.capacity.engines.simulated import SimulatedEngine
from sublet.gateway.purse import cost
from sublet.money import billing
from sublet.records import metering, tenancy
from sublet.rights import market, owner
from sublet.shops import compute


def _load_mutants() -> None:
    """Tests run without packages: the module is found by its place."""
    spec = importlib.util.spec_from_file_location(
        "audit_mutants", Path(__file__).parent / "mutants.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["audit_mutants"] = module
    spec.loader.exec_module(module)


_load_mutants()
START = datetime(2026, 11, 2, 12, 7, tzinfo=UTC)
TESTER = Actor.system("test")
DEVICES = 4


TOKEN_EPOCH = 1_793_000_000_000_000


class Usage:
    """Requests of one key, each with another id."""

    def __init__(self, buyer: tenancy.Identity, clock: VirtualClock) -> None:
        self.buyer = buyer
        self.at = micros_since_epoch(clock.now())
        self.number = 0

    def event(self, output: int, *, made: int = 0, micros: int | None = None) -> UsageEvent:
        self.number += 1
        return UsageEvent(
            id=f"req_{self.number}",
            key_id=self.buyer.key.id,
            organisation_id=self.buyer.organisation.id,
            project_id=self.buyer.project_id,
            is_first_party=False,
            model="smollm2-135m-instruct",
            deployment_id="dep_1",
            replica_id="ins_replica",
            surface="chat",
            tier="default",
            price_version="v1",
            outcome=Outcome.OK if output else Outcome.LOST,
            started_us=self.at,
            ended_us=self.at + 1,
            first_us=None,
            input_uncached=10,
            cache_read=0,
            output=output,
            made=max(output, made),
            micros=cost(PRICES["v1"], 10, 0, output) if micros is None else micros,
        )


class Cloud:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.clock = VirtualClock(START)
        self.books = open_store(f"sqlite:///{path}", self.clock, SeededIds(7))
        metadata.create_all(self.books.engine)
        self.engine = SimulatedEngine(self.clock, devices=DEVICES)
        self.compute = compute.ComputeLoop(self.books, self.engine)
        with self.books.work(TESTER) as work:
            fleet.load_costs(work, fleet.seed_costs())
            market.load_rate_card(work, market.seed_rate_card(), work.now)
            node = fleet.enrol(
                work, self.engine.inventory(), site_name="home", trusted_tenants=False
            )
            self.pool_id = node.pool_id
            fleet.set_pool(work, self.pool_id, head_room_percent=0, scrub_seconds=2)
            allocation.set_firm_shelf(work, self.pool_id, DEVICES, None)
            market.post_spot_prices(work, work.now)
            opened = billing.open_owner(work, name="Owner")
            assert opened is not None
            self.owner = tenancy.authenticate(work.tx, opened.secret, work.now)
            came = billing.sign_up(work, email="a@example.org", organisation_name="Acme")
            self.buyer = tenancy.authenticate(work.tx, came.secret, work.now)
            billing.record_payment(
                work, self.buyer.organisation.id, Money.parse("1000"), reference="bank-1"
            )

    def step(self) -> None:
        owner.step(self.books, self.clock.now())
        allocation_loops.step(self.books, self.clock.now())
        self.compute.step(self.clock.now())
        billing.step(self.books, self.clock.now())

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.step()
            self.clock.advance_to(self.clock.now() + timedelta(seconds=1))
        self.step()

    def rent(self, kind: Any, offer: str, notice: int | None, **spec: Any) -> compute.Workload:
        who = self.owner if spec.pop("is_own", False) else self.buyer
        with self.books.work(who.actor()) as work:
            quote = market.quote(work, who, offer_id=offer, notice_seconds=notice)
            return compute.rent(
                work, who, kind=kind, quote_id=quote.id, spec=compute.WorkloadSpec(**spec)
            )

    def recall(self) -> None:
        with self.books.work(self.owner.actor()) as work:
            plan = owner.plan_recall(
                work, self.owner, pool_id=self.pool_id, devices=1, count=1, by=None, until=None
            )
            owner.accept_recall(work, plan.id)

    def sell_tokens(self) -> None:
        """Bills that round, one that was cut to what was held, a correction, a stream lost."""
        usage = Usage(self.buyer, self.clock)
        spools = {
            "gw-0": [usage.event(n) for n in range(3, 9)] + [usage.event(700, micros=40)],
            "gw-1": [usage.event(50)],
        }
        with self.books.work(TESTER) as work:
            seed_prices(work)
            for name, events in spools.items():
                request = AllowanceRequest(
                    key_id=self.buyer.key.id,
                    epoch=TOKEN_EPOCH,
                    wanted_micros=100_000,
                    wanted_tokens=0,
                    spent_micros=0,
                    held_micros=0,
                    spent_tokens=0,
                    held_tokens=0,
                    serial=1,
                )
                billing.grant_allowance(work, gateway=name, epoch=TOKEN_EPOCH, request=request)
                billing.ingest_usage(
                    work, gateway=name, epoch=TOKEN_EPOCH, events=events, file=0, offset=900
                )
            lost = [usage.event(0, made=90)]
            billing.close_epoch(work, gateway="gw-1", epoch=TOKEN_EPOCH, lost=lost)
            billing.post_correction(
                work,
                metering.correct_tokens(
                    work, event_id="fix_1", corrects=spools["gw-1"][0].id, output=-1
                ),
            )

    def live(self) -> None:
        """The story that the module tells."""
        self.rent("job", "gpu-spot", 30, name="done", command=("sleep", "20"))
        self.rent("instance", "gpu-spot", 120, name="box")
        self.rent("job", "gpu-spot", 30, name="train", command=("sleep", "900"))
        self.run(60)
        firm = self.rent("instance", "gpu-on-demand", None, name="firm")
        self.rent("instance", "gpu-on-demand", None, name="also-firm")
        self.run(20)
        with self.books.work(self.buyer.actor()) as work:
            compute.stop(work, self.buyer, firm.id)
        self.run(10)
        with self.books.work(self.buyer.actor()) as work:
            compute.start(work, self.buyer, firm.id)
        self.run(20)
        self.recall()
        self.run(60)
        self.rent("job", "gpu-spot", None, name="mine", command=("sleep", "900"), is_own=True)
        self.recall()
        self.run(10)
        with self.books.work(self.owner.actor()) as work:
            owner.first_party_claim(
                work,
                pool_id=self.pool_id,
                organisation_id=self.owner.organisation.id,
                devices=1,
                count=2,
                urgency=Urgency.URGENT,
                holder="ned_research",
            )
        self.run(30)
        self.sell_tokens()
        with self.books.work(TESTER) as work:
            keep_fact(work, "alive", "loops")


@dataclass(frozen=True)
class Sound:
    """The database file of the story, and the instant at which it ended."""

    path: Path
    now: datetime


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    cloud = Cloud(tmp_path_factory.mktemp("audit") / "sublet.db")
    cloud.live()
    cloud.books.close()
    return Sound(cloud.path, cloud.clock.now())


class Books:
    """A copy of the sound database, to be broken."""

    def __init__(self, store: Store, now: datetime) -> None:
        self.store = store
        self.now = now

    def change(self, mutate: Callable[[sa.Connection], None]) -> None:
        with self.store.engine.connect() as tx:
            mutate(tx)
            tx.commit()

    def violations(self) -> list[Violation]:
        with self.store.read() as tx:
            return check(tx, self.now)


@pytest.fixture
def books(sound: Sound, tmp_path: Path) -> Iterator[Books]:
    copy = tmp_path / "sublet.db"
    shutil.copy(sound.path, copy)
    store = open_store(f"sqlite:///{copy}", VirtualClock(sound.now), SeededIds(8))
    yield Books(store, sound.now)
    store.close()
