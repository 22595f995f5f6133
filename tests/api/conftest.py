"""A cloud behind its REST edge: simulated node, virtual clock, real services and loops."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient
from templates import Template

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.money import Money
from sublet.base.store import Actor, Store
from sublet.base.wire import rest
from sublet.capacity import allocation, fleet
from sublet.capacity.allocation import loops as allocation_loops
from sublet.capacity.engines.simulated import SimulatedEngine
from sublet.edge.api import Deps, create_api
from sublet.money import billing
from sublet.rights import market, owner
from sublet.sdk import Client
from sublet.shops.compute import ComputeLoop

START = datetime(2026, 11, 24, 10, tzinfo=UTC)
SYSTEM = Actor.system("test")
CARD = """
currency = "USD"
[[offer]]
id = "gpu-spot"
product = "spot"
device_kind = "gpu"
price_usd_per_device_hour = 1.20
shapes = [1, 2]
default_notice_seconds = 120
notices = [{ seconds = 30, factor_permille = 1000 }, { seconds = 120, factor_permille = 1100 }]
[[offer]]
id = "gpu-on-demand"
product = "on_demand"
device_kind = "gpu"
price_usd_per_device_hour = 3.60
shapes = [1, 2]
default_notice_seconds = 3600
notices = [{ seconds = 3600, factor_permille = 1000 }]
"""


@dataclass
class World:
    """What a test moves: the clock, the loops, and callers with their keys."""

    store: Store
    clock: VirtualClock
    engine: SimulatedEngine
    http: TestClient
    owner_secret: str
    pool_id: str
    loop: ComputeLoop
    nudges: list[int] = field(default_factory=list)

    def caller(self, secret: str | None) -> Client:
        http = httpx2.Client(transport=self.http._transport)
        return Client("http://testserver", secret, http=http, sleep=lambda _: None)

    @property
    def owner(self) -> Client:
        return self.caller(self.owner_secret)

    def newcomer(self, name: str = "Acme") -> tuple[Client, rest.SignUp]:
        made = self.caller(None).sign_up(
            rest.SignUpCreate(email=f"{name.lower()}@example.org", organisation_name=name)
        )
        assert made.secret is not None
        return self.caller(made.secret), made

    def ask(
        self,
        method: str,
        path: str,
        secret: str | None = None,
        body: Any = None,
        **headers: str,
    ) -> httpx2.Response:
        """A bare request, as any program would send it."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if secret is not None:
            sent["authorization"] = f"Bearer {secret}"
        content = None
        if body is not None:
            # Escaped, so that what has no UTF-8 can be asked for as well.
            content = json.dumps(body).encode()
            sent["content-type"] = "application/json"
        return self.http.request(method, path, content=content, headers=sent)

    def tick(self) -> None:
        """Every loop once, as the runner would after a nudge."""
        now = self.clock.now()
        market.step(self.store, now)
        owner.step(self.store, now)
        allocation_loops.step(self.store, now)
        self.loop.step(self.clock.now())
        billing.step(self.store, self.clock.now())

    def advance(self, seconds: float, *, step: float = 10) -> None:
        """Let time pass with the loops running."""
        end = self.clock.now() + timedelta(seconds=seconds)
        while self.clock.now() < end:
            self.clock.advance_to(min(end, self.clock.now() + timedelta(seconds=step)))
            self.tick()

    def settle(
        self, client: Client, workload_id: str, state: str, *, tries: int = 40
    ) -> rest.Workload:
        """Tick until a workload is in a state."""
        kind = client.instances if workload_id.startswith("ins") else client.jobs
        for _ in range(tries):
            found = kind.get(workload_id)
            if found.state == state:
                return found
            self.advance(2, step=2)
        raise AssertionError(f"{workload_id} is {found.state}, not {state}: {found}")


@cache
def prepared(devices: int, trusted_tenants: bool) -> Template[tuple[str, str]]:
    """A cloud that has just been opened; gives its pool and the owner's secret."""

    def prepare(store: Store, clock: VirtualClock) -> tuple[str, str]:
        engine = SimulatedEngine(clock, devices=devices)
        with store.work(SYSTEM) as work:
            fleet.load_costs(work, fleet.seed_costs())
            market.load_rate_card(work, CARD, work.now)
            node = fleet.enrol(
                work, engine.inventory(), site_name="home", trusted_tenants=trusted_tenants
            )
            allocation.set_firm_shelf(work, node.pool_id, devices, None)
            market.post_spot_prices(work, work.now)
            opened = billing.open_owner(work, name="Owner", email="owner@example.org")
            assert opened is not None
        return node.pool_id, opened.secret

    return Template(prepare, START)


def make_world(
    folder: Path,
    *,
    devices: int = 2,
    trial: str | None = "20.00",
    trusted_tenants: bool = False,
    trials_per_day: int = 20,
) -> World:
    clock = VirtualClock(START)
    template = prepared(devices, trusted_tenants)
    store = template.open(folder, clock)
    pool_id, owner_secret = template.found
    engine = SimulatedEngine(clock, devices=devices)
    nudges: list[int] = []
    deps = Deps(
        store=store,
        engine=engine,
        version="0.1.0",
        nudge=lambda: nudges.append(1),
        trial_credit=None if trial is None else Money.parse(trial),
        trials_per_day=trials_per_day,
        trusted_tenants=trusted_tenants,
        ssh_host="127.0.0.1",
        ssh_port=2222,
        body_seconds=0.5,
        follow_poll_seconds=0.01,
        follow_polls=200,
    )
    return World(
        store=store,
        clock=clock,
        engine=engine,
        http=TestClient(create_api(deps), raise_server_exceptions=True),
        owner_secret=owner_secret,
        pool_id=pool_id,
        loop=ComputeLoop(store, engine),
        nudges=nudges,
    )


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = make_world(tmp_path)
    yield made
    made.store.close()


@pytest.fixture(scope="module")
def one_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world that all tests of a module share: for what does not depend on what came before."""
    made = make_world(tmp_path_factory.mktemp("world"))
    yield made
    made.store.close()


@pytest.fixture
def worlds(tmp_path: Path) -> Iterator[Callable[..., World]]:
    """Worlds that differ: `worlds(devices=4, trial="0.10")`."""
    made: list[World] = []

    def make(**differs: Any) -> World:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(make_world(folder, **differs))
        return made[-1]

    yield make
    for world in made:
        world.store.close()
