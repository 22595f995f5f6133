"""The loops of a cloud, the same on a real machine and in a rehearsal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from sublet.app.runner import Loop
from sublet.app.wiring import App
from sublet.base.kernel.clock import SystemClock
from sublet.base.store import Actor, Store
from sublet.base.store.installation import list_anchors
from sublet.capacity import fleet
from sublet.capacity.allocation import loops as allocation_loops
from sublet.capacity.engines.port import Engine, Inventory
from sublet.money import billing
from sublet.rights import market, owner
from sublet.shops import compute, models
from sublet.shops.compute.driver import LOOK
from sublet.shops.models.keys import KeyEncryptionKey

LOOK_EVERY = timedelta(seconds=20)
QUIET = timedelta(seconds=30)


def cloud_loops(
    store: Store,
    engine: Engine,
    *,
    look: timedelta = LOOK,
    inventories: Callable[[], Sequence[Inventory]] | None = None,
    key: Callable[[], KeyEncryptionKey | None] = lambda: None,
) -> list[Loop]:
    """Every loop but the clock's. The order is the order of a rehearsal's ties.

    `look`: how often runs are looked at when nothing is due.
    `inventories`: the nodes of an engine that has several; None: the engine's one.
    `key`: opens sealed models; None: they stay closed.
    """
    work = compute.ComputeLoop(store, engine, look)
    fleet_loop = FleetLoop(store, inventories or (lambda: [engine.inventory()]))
    return [
        Loop("compute", work.step),
        Loop("models", models.ModelsLoop(store, engine, key=key).step),
        Loop("owner", lambda now: owner.step(store, now)),
        Loop("allocation", lambda now: allocation_loops.step(store, now) or now + QUIET),
        Loop("market", lambda now: market.step(store, now), nudged=False),
        Loop("billing", lambda now: billing.step(store, now)),
        Loop("fleet", fleet_loop.step, nudged=False),
    ]


class FleetLoop:
    """Looks at the nodes' devices: what is missing for a minute and three looks is down."""

    def __init__(self, store: Store, inventories: Callable[[], Sequence[Inventory]]) -> None:
        self._store = store
        self._inventories = inventories

    def step(self, now: datetime) -> datetime:
        found = {inventory.node: inventory for inventory in self._inventories()}
        with self._store.read() as tx:
            nodes = [node for node in fleet.list_nodes(tx) if node.name in found]
        for node in nodes:
            with self._store.work(Actor.system("fleet")) as work:
                fleet.look(work, node.id, found[node.name])
        return now + LOOK_EVERY


def adopt_anchors(app: App) -> None:
    """Take over what the loop process has found about the wall clock."""
    assert isinstance(app.clock, SystemClock)
    with app.store.read() as tx:
        app.clock.adopt(list_anchors(tx, app.clock.boot_id()))


def begin_shutdown(app: App) -> None:
    """End every workload as if the owner had ended it."""
    with app.store.work(Actor.system("shutdown")) as work:
        compute.begin_shutdown(work)


def count_live(app: App) -> int:
    with app.store.read() as tx:
        return compute.count_live(tx)


def last_books(app: App) -> None:
    """Bring the books up to the last end, so that the next start finds nothing open."""
    billing.step(app.store, app.clock.now())
