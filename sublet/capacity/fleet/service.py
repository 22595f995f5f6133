"""What others call: enrol, look, move a node, read cost facts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files

from sqlalchemy import Connection

from sublet.base.kernel.errors import Invalid
from sublet.base.store import Work
from sublet.capacity.engines.port import Device as FoundDevice
from sublet.capacity.engines.port import Inventory
from sublet.capacity.fleet import store
from sublet.capacity.fleet.costs import matching, parse_costs
from sublet.capacity.fleet.model import (
    Cost,
    CostFactsMissing,
    Device,
    DeviceDown,
    DeviceUp,
    Node,
    NodeEnrolled,
    NodeStateChanged,
    NodeStateRefused,
    Pool,
    Site,
)
from sublet.capacity.fleet.states import (
    START_FAILURES_TO_TRIAGE,
    NodeState,
    RestingUse,
    Sight,
    judge,
    reachable_states,
    use_at_rest,
)
from sublet.records import metering

UNHELD_USES = frozenset({metering.Use.IDLE, metering.Use.OVERHEAD, metering.Use.DOWN})
SCRUB_SECONDS = {"cpu": 2, "gpu": 60}
HEAD_ROOM_PERCENT = 2
ORDINARY_RETURN_SECONDS = 150
"""Spot's ordinary notice (120 s) and grace (30 s): with the scrub, what the owner is promised."""


def enrol(
    work: Work,
    inventory: Inventory,
    *,
    site_name: str,
    trusted_tenants: bool,
    engine: str = "local",
) -> Node:
    """Take a node in as the engine finds it; again after each restart, with the same effect.

    Site, pool, node and devices are matched by name and made where missing; new devices begin
    their time here. A node that was enrolled before keeps its state. Devices of a second model on
    the same node stay the owner's: a pool is of one model. Invalid: the node has no device.
    """
    found = _of_one_model(inventory)
    site = _site(work, site_name)
    node = store.find_node_named(work.tx, inventory.node)
    fences = {name: asdict(fence) for name, fence in inventory.fences.items()}
    if node is None:
        pool = _pool(work, site, found, inventory)
        node = Node(
            id=work.ids.new("nod"),
            pool_id=pool.id,
            name=inventory.node,
            engine=engine,
            boot_id=inventory.boot_id,
            state=NodeState.ONBOARD,
            fences=fences,
            trusted_tenants=trusted_tenants,
            start_failures=0,
            version=1,
        )
        store.insert_node(work, node)
        _begin_devices(work, node, found)
        # The engine's own probes are this machine's burn-in: it has just run them.
        set_node_state(work, node.id, NodeState.BURN_IN, "enrolled")
        node = set_node_state(work, node.id, NodeState.PRODUCTION, "devices and fences probed")
    else:
        _refresh_pool(work, node, found, inventory)
        known = {device.name for device in store.devices_of_node(work.tx, node.id)}
        _begin_devices(work, node, [d for d in found if d.name not in known])
        node = store.update_node(
            work,
            node,
            boot_id=inventory.boot_id,
            fences=fences,
            trusted_tenants=trusted_tenants,
        )
    look(work, node.id, inventory)
    work.emit(NodeEnrolled(node.id, node.pool_id))
    return store.get_node(work.tx, node.id)


def look(work: Work, node_id: str, inventory: Inventory) -> None:
    """Compare what the engine sees now with what is known.

    A device that is absent or unhealthy in three looks that span a minute is down (`DeviceDown`);
    one good look brings it back (`DeviceUp`). A device that is new waits for the next `enrol`.
    """
    node = store.get_node(work.tx, node_id)
    well = {device.name for device in inventory.devices if device.healthy}
    for device in store.devices_of_node(work.tx, node_id):
        before = Sight(
            healthy=device.healthy, misses=device.misses, missed_since=device.missed_since
        )
        after = judge(before, seen_well=device.name in well, now=work.now)
        if after == before:
            continue
        store.keep_sight(work, device, after)
        if after.healthy == before.healthy:
            continue
        event = DeviceUp if after.healthy else DeviceDown
        _switch_unheld(work, device.id, use_at_rest(node.state, healthy=after.healthy))
        work.emit(event(device.id, node.id, node.pool_id))


def set_node_state(work: Work, node_id: str, state: NodeState | str, why: str) -> Node:
    """Move a node along the table; the state it has already is no change.

    The time of its devices follows where the state decides it: preparing is overhead, from triage
    on they are down. Invalid: no such state. NodeStateRefused: not from here.
    """
    try:
        target = NodeState(state)
    except ValueError:
        raise Invalid(
            f"`state` is one of {', '.join(NodeState)}, not {state!r}.", param="state"
        ) from None
    node = store.get_node_locked(work.tx, node_id)
    if node.state == target:
        return node
    allowed = reachable_states(node.state)
    if target not in allowed:
        raise NodeStateRefused(
            f"A node goes from {node.state} to {' or '.join(allowed)}, not to {target}.",
            state=str(node.state),
            allowed=[str(s) for s in allowed],
        )
    failures = 0 if target == NodeState.PRODUCTION else node.start_failures
    changed = store.update_node(work, node, state=target, start_failures=failures)
    _switch_devices(work, node.state, changed)
    work.emit(NodeStateChanged(node.id, node.pool_id, str(node.state), str(target), why))
    return changed


def note_start_failure(work: Work, node_id: str) -> Node:
    """A run did not start here. The third in a row takes the node out: triage."""
    node = store.get_node_locked(work.tx, node_id)
    node = store.update_node(work, node, start_failures=node.start_failures + 1)
    is_too_many = node.start_failures >= START_FAILURES_TO_TRIAGE
    if is_too_many and NodeState.TRIAGE in reachable_states(node.state):
        why = f"{node.start_failures} starts in a row failed"
        return set_node_state(work, node_id, NodeState.TRIAGE, why)
    return node


def note_start_success(work: Work, node_id: str) -> Node:
    """A run started here: earlier failures no longer count."""
    node = store.get_node_locked(work.tx, node_id)
    return store.update_node(work, node, start_failures=0) if node.start_failures else node


def resting_use(tx: Connection, device_id: str) -> RestingUse:
    """What a device's time is once its holder is gone: idle, or what its node's state makes it."""
    device = store.get_device(tx, device_id)
    return use_at_rest(store.get_node(tx, device.node_id).state, healthy=device.healthy)


def set_pool(
    work: Work,
    pool_id: str,
    *,
    head_room_percent: int | None = None,
    scrub_seconds: int | None = None,
    return_promise_seconds: int | None = None,
) -> Pool:
    """Change a pool's settings; None leaves one as it is. Claims made before keep theirs."""
    store.get_pool(work.tx, pool_id)
    given = {
        "head_room_percent": (head_room_percent, 0, 100),
        "scrub_seconds": (scrub_seconds, 0, 3600),
        "return_promise_seconds": (return_promise_seconds, 1, 86_400),
    }
    for name, (value, low, high) in given.items():
        if value is not None and not low <= value <= high:
            raise Invalid(f"`{name}` is a whole number from {low} to {high}.", param=name)
    values = {name: value for name, (value, _, _) in given.items() if value is not None}
    if values:
        store.update_pool(work, pool_id, **values)
    return store.get_pool(work.tx, pool_id)


def seed_costs() -> str:
    """The cost facts that come with Sublet, as TOML to edit."""
    return files("sublet.capacity.fleet").joinpath("costs.toml").read_text(encoding="utf-8")


def load_costs(work: Work, toml_text: str) -> None:
    """Replace all cost facts. They hold for the past as well: a fact corrected is corrected.

    Invalid names the field and says what would be right; nothing changes then.
    """
    sheet = parse_costs(toml_text)
    store.replace_facts(work.tx, sheet.devices)
    known = store.list_sites(work.tx)
    for site in known:
        store.update_site_facts(work.tx, site.id, sheet.site(site.name))
    names = {site.name for site in known}
    for facts in sheet.sites:
        if facts.name not in names:
            store.insert_site(work.tx, Site(id=work.ids.new("sit"), **asdict(facts)))


def get_cost(tx: Connection, pool_id: str) -> Cost:
    """The cost facts of a pool's devices. CostFactsMissing: none match."""
    pool = store.get_pool(tx, pool_id)
    facts = matching(store.list_facts(tx), pool)
    if facts is None:
        raise CostFactsMissing(
            f"No cost facts match {pool.device_kind} {pool.device_model!r}: "
            "load some that name this kind or model.",
            pool_id=pool_id,
        )
    return facts.cost_of(pool)


def list_costs(tx: Connection) -> list[Cost]:
    """The cost facts of every pool that has some."""
    facts = store.list_facts(tx)
    found = [(matching(facts, pool), pool) for pool in store.list_pools(tx)]
    return [match.cost_of(pool) for match, pool in found if match is not None]


def _of_one_model(inventory: Inventory) -> list[FoundDevice]:
    """The devices of the model that the node has most of."""
    if not inventory.devices:
        raise Invalid(
            f"Node {inventory.node} has no device to sell: look at the engine's inventory.",
            param="inventory.devices",
        )
    counts = Counter((device.kind, device.model) for device in inventory.devices)
    chosen = max(counts, key=lambda key: counts[key])
    return [device for device in inventory.devices if (device.kind, device.model) == chosen]


def _site(work: Work, name: str) -> Site:
    """The site by name; one that no cost facts name takes the first one's facts."""
    if not store.list_facts(work.tx):
        load_costs(work, seed_costs())
    site = store.find_site_named(work.tx, name)
    if site is None:
        like = store.list_sites(work.tx)[0]
        site = Site(
            id=work.ids.new("sit"),
            name=name,
            region=like.region,
            pue=like.pue,
            tariff_micros_per_kwh=like.tariff_micros_per_kwh,
        )
        store.insert_site(work.tx, site)
    return site


def _memory(found: Sequence[FoundDevice]) -> int:
    return min(device.memory_bytes for device in found)


def _pool(work: Work, site: Site, found: Sequence[FoundDevice], inventory: Inventory) -> Pool:
    """A pool at the site whose promise this node can keep, or a new one."""
    kind, model, memory = found[0].kind, found[0].model, _memory(found)
    pools = [p for p in store.list_pools(work.tx) if p.site_id == site.id]
    alike = [p for p in pools if (p.device_kind, p.device_model) == (kind, model)]
    for pool in alike:
        if memory >= pool.memory_bytes and pool.outbound == inventory.outbound:
            return pool
    scrub = SCRUB_SECONDS[kind]
    taken = {p.name for p in pools}
    names = [kind, *(f"{kind}-{number}" for number in range(2, len(taken) + 3))]
    pool = Pool(
        id=work.ids.new("pol"),
        site_id=site.id,
        name=next(name for name in names if name not in taken),
        device_kind=kind,
        device_model=model,
        memory_bytes=memory,
        head_room_percent=HEAD_ROOM_PERCENT,
        scrub_seconds=scrub,
        return_promise_seconds=ORDINARY_RETURN_SECONDS + scrub,
        outbound=inventory.outbound,
    )
    store.insert_pool(work, pool)
    return pool


def _refresh_pool(
    work: Work, node: Node, found: Sequence[FoundDevice], inventory: Inventory
) -> None:
    """After a restart a pool's promise follows its weakest node: memory, way out."""
    pool = store.get_pool(work.tx, node.pool_id)
    others = len(store.list_nodes(work.tx, pool.id)) - 1
    memory = min(_memory(found), pool.memory_bytes) if others else _memory(found)
    outbound = "none" if others and inventory.outbound == "none" else pool.outbound
    store.update_pool(
        work,
        pool.id,
        memory_bytes=memory,
        outbound=outbound if others else inventory.outbound,
    )


def _begin_devices(work: Work, node: Node, found: Sequence[FoundDevice]) -> None:
    new = [
        Device(
            id=work.ids.new("dev"),
            node_id=node.id,
            pool_id=node.pool_id,
            name=device.name,
            healthy=device.healthy,
            misses=0,
            missed_since=None,
        )
        for device in found
    ]
    store.insert_devices(work, new)
    for device in new:
        use = use_at_rest(node.state, healthy=device.healthy)
        metering.begin_device(work, device.id, use, work.now)


def _switch_devices(work: Work, before: NodeState, node: Node) -> None:
    for device in store.devices_of_node(work.tx, node.id):
        use = use_at_rest(node.state, healthy=device.healthy)
        if use != use_at_rest(before, healthy=device.healthy):
            _switch_unheld(work, device.id, use)


def _switch_unheld(work: Work, device_id: str, use: RestingUse) -> None:
    """A device in somebody's hands stays so until its holder's meter closes: else device time
    and usage would differ. Whoever lets it go asks `resting_use`."""
    last = metering.list_spans(work.tx, device_id)[-1]
    # Overhead that names somebody is the making ready or the scrub of their run.
    if last.use in UNHELD_USES and not last.ref:
        metering.switch_device(work, device_id, use, work.now)
