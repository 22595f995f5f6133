"""Opening a data folder: migrate, seed on the first start, enrol this machine as it is today."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files

from sublet.app.clockwork import anchored
from sublet.app.folder import Folder, keep_private
from sublet.app.migrate import migrate
from sublet.app.sealing import key_at_start
from sublet.app.settings import Settings
from sublet.app.wiring import local_engine
from sublet.base.kernel.clock import Clock
from sublet.base.kernel.ids import SystemIds
from sublet.base.store import Actor, Store, Work, bare_engine, open_store
from sublet.base.store.installation import find_fact, keep_fact
from sublet.capacity import allocation, fleet
from sublet.capacity.engines.port import Engine, Inventory, Phase
from sublet.money import billing
from sublet.records import tenancy
from sublet.rights import market
from sublet.shops import models

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    settings: Settings
    owner_key: str | None
    """Only on the first start of the folder."""


def open_folder(
    settings: Settings, folder: Folder, *, tour: bool, say: Say, key: bytes | None = None
) -> Opened:
    """Make the folder's cloud ready to serve. Doing it again changes only what the machine changed.

    `key`: what seals models, where it came by stdin; None: it is in its file.
    Errors: DatabaseUnreadable, DatabaseTooNew, SettingsInvalid; nothing is lost then.
    """
    store, clock = _open_store(settings)
    try:
        with store.read() as tx:
            is_first = find_fact(tx, "installation_id") is None
            was_trusting = find_fact(tx, "trusted_tenants") == "yes"
        say("Looking at this machine and trying its fences (a few seconds) ...")
        engine: Engine = local_engine(settings, folder, clock)
        inventory = engine.inventory()
        settings = _trusting(settings, inventory, tour=tour, was=was_trusting, say=say)
        with store.work(Actor.system("up")) as work:
            owner_key = _seed(work, settings) if is_first else None
            keep_fact(work, "trusted_tenants", "yes" if settings.trusted_tenants else "no")
            _enrol(work, inventory, settings, is_first=is_first)
            market.post_spot_prices(work, work.now)
        _describe(inventory, settings, say)
        models.seed(
            store,
            weights=settings.weights_folder,
            folder=folder.models,
            key=key_at_start(settings, store, key, say),
            say=say,
        )
        return Opened(settings=settings, owner_key=owner_key)
    finally:
        store.close()


def _open_store(settings: Settings) -> tuple[Store, Clock]:
    bare = bare_engine(settings.database)
    if settings.database_url is None:
        # SQLite gives the files beside it the mode that it has. Another user is told by `migrate`.
        with suppress(OSError):
            keep_private(settings.data.resolve() / "sublet.db")
    try:
        migrate(bare)
        clock = anchored(bare)
    finally:
        bare.dispose()
    return open_store(settings.database, clock, SystemIds()), clock


def _trusting(
    settings: Settings, inventory: Inventory, *, tour: bool, was: bool, say: Say
) -> Settings:
    """On the way of `make run`, serve trusted tenants where strangers would be refused."""
    missing = inventory.missing_for_strangers()
    if settings.trusted_tenants or not missing or not tour:
        return settings
    if not was:
        remedy = next(
            (inventory.fences[f].remedy for f in missing if inventory.fences[f].remedy), ""
        )
        say(
            f"Strangers' workloads need {', '.join(missing)} fenced, which this machine does not do "
            f"now{': ' + remedy if remedy else ''}. Going on with --trusted-tenants: let in only "
            "whom you trust."
        )
    return settings.model_copy(update={"trusted_tenants": True})


def _seed(work: Work, settings: Settings) -> str:
    """The first start: identity, owner, rate card, cost facts. Returns the owner's key."""
    keep_fact(work, "installation_id", work.ids.new("cloud"))
    fleet.load_costs(work, fleet.seed_costs())
    card = (files("sublet") / "rights" / "market" / "rate_card.toml").read_text()
    market.load_rate_card(work, card, effective_from=work.now)
    opened = billing.open_owner(work, name=settings.site_name)
    assert opened is not None, "a new folder has no owner yet"
    return opened.secret


def _enrol(work: Work, inventory: Inventory, settings: Settings, *, is_first: bool) -> None:
    node = fleet.enrol(
        work,
        inventory,
        site_name=settings.site_name,
        trusted_tenants=settings.trusted_tenants,
    )
    if is_first:
        size = len(fleet.list_devices(work.tx, node.pool_id))
        allocation.set_firm_shelf(work, node.pool_id, size, until=None)


def _describe(inventory: Inventory, settings: Settings, say: Say) -> None:
    devices = inventory.devices
    memory = devices[0].memory_bytes / 2**30 if devices else 0.0
    model = devices[0].model if devices else "none"
    say(f"Node {inventory.node}: {len(devices)} devices ({model}), {memory:.1f} GiB each.")
    for name, fence in inventory.fences.items():
        say(f"  fence {name:<10} {fence.strength:<9} {fence.by}")
    say(f"  outbound network: {inventory.outbound}")
    say(
        "  the whole machine stands on the firm shelf: firm terms may be sold (`sublet firm-shelf`)"
    )
    if settings.trusted_tenants:
        say("  trusted tenants: yes; every answer says so")


def recover_owner(settings: Settings) -> str:
    """A new owner's key; the old ones die. Run by the user of the data folder."""
    store, _ = _open_store(settings)
    try:
        with store.work(Actor.system("recover-owner")) as work:
            _, secret = tenancy.recover_owner(work)
            return secret
    finally:
        store.close()


def kill_everything(settings: Settings, folder: Folder) -> None:
    """End every workload at once, without grace."""
    store, clock = _open_store(settings)
    try:
        engine = local_engine(settings, folder, clock)
        for run_id, seen in engine.observe().items():
            if seen.phase in (Phase.STARTING, Phase.RUNNING, Phase.STOPPING):
                engine.stop(run_id, grace_seconds=0, reason="shutdown")
    finally:
        store.close()


def left_running(settings: Settings, folder: Folder) -> Iterator[str]:
    """A line for each supervisor that goes on without the control plane, with its deadline."""
    store, clock = _open_store(settings)
    try:
        engine = local_engine(settings, folder, clock)
        running = [
            seen
            for seen in engine.observe().values()
            if seen.phase in (Phase.STARTING, Phase.RUNNING, Phase.STOPPING)
        ]
        yield f"Control plane stopped; {len(running)} workloads go on under their supervisors."
        for seen in running:
            until = seen.deadline_at or seen.runway_until
            shown = until.strftime("%Y-%m-%dT%H:%M:%SZ") if until else "unknown"
            yield f"  {seen.workload_id}  ends at {shown} unless `sublet up` is back before"
    finally:
        store.close()
