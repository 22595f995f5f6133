"""Where it runs: sites, pools, nodes, devices, device time."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from starlette.responses import Response

from sublet.base.store import Work
from sublet.base.wire import rest
from sublet.capacity import allocation, fleet
from sublet.edge.api.call import Call, Caller, Poster, versioned
from sublet.edge.api.errors import declared
from sublet.edge.api.paging import After, Id, Limit, by_place
from sublet.edge.api.routes.money import End, Start, window
from sublet.edge.api.show import fleet as show
from sublet.edge.api.versions import Expected, demand, show_version
from sublet.records import metering
from sublet.records.tenancy import Action
from sublet.shops import compute

router = APIRouter(prefix="/v1", tags=["capacity"], responses=declared())

PoolQuery = Annotated[str | None, Query(pattern=rest.OWN_ID, description="Of this pool only.")]
NodeQuery = Annotated[str | None, Query(pattern=rest.OWN_ID, description="On this node only.")]
DeviceQuery = Annotated[str | None, Query(pattern=rest.OWN_ID, description="This device only.")]


@router.get("/sites")
def list_sites(call: Caller, after: After = None, limit: Limit = 100) -> rest.Page[rest.Site]:
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        found = fleet.list_sites(tx)
    return by_place(found, after, limit, show.site)


@router.get("/pools")
def list_pools(call: Caller, after: After = None, limit: Limit = 100) -> rest.Page[rest.Pool]:
    """With what is free, held and sold now, and the excess curve."""
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        now = call.deps.store.clock.now()
        pools = [show.pool(tx, pool, now) for pool in fleet.list_pools(tx)]
    return by_place(pools, after, limit, lambda pool: pool)


@router.get("/pools/{pool_id}")
def get_pool(call: Caller, pool_id: Id, response: Response) -> rest.Pool:
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        found = show.pool(tx, fleet.get_pool(tx, pool_id), call.deps.store.clock.now())
    show_version(response, found.version)
    return found


@router.put("/pools/{pool_id}/firm-shelf", response_model=rest.Pool, responses=declared(412, 428))
def set_firm_shelf(
    call: Caller, pool_id: Id, body: rest.FirmShelfPut, expected: Expected
) -> Response:
    """What the owner decides to sell for longer than the forecast vouches for, and until when."""

    def do(work: Work) -> rest.Pool:
        call.require(Action.ADMINISTER_FLEET)
        pool = fleet.get_pool(work.tx, pool_id)
        demand(expected, show.pool(work, pool, work.now).version)
        allocation.set_firm_shelf(work, pool_id, body.devices, body.until)
        return show.pool(work, pool, work.now)

    detail = body.model_dump(mode="json")
    return call.act("set_firm_shelf", do, target=pool_id, detail=detail, headers=versioned)


@router.get("/nodes")
def list_nodes(call: Caller, after: After = None, limit: Limit = 100) -> rest.Page[rest.Node]:
    """Each with its fence table: how strong each fence is, shown by which probe."""
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        nodes = [show.node(tx, node) for node in fleet.list_nodes(tx)]
    return by_place(nodes, after, limit, lambda node: node)


@router.get("/nodes/{node_id}")
def get_node(call: Caller, node_id: Id, response: Response) -> rest.Node:
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        found = show.node(tx, fleet.get_node(tx, node_id))
    show_version(response, found.version)
    return found


@router.post("/nodes/{node_id}/cordon", response_model=rest.Node, responses=declared(409))
def cordon_node(call: Poster, node_id: Id, body: rest.CordonCreate | None = None) -> Response:
    """Nothing new starts there. `drain` also ends what runs, each by its own notice;
    `immediate` is refused unless `break_notice` accepts the penalty."""
    asked = body or rest.CordonCreate()
    return _cordon(call, node_id, asked.mode, break_notice=asked.break_notice)


@router.post("/nodes/{node_id}/drain", response_model=rest.Node, responses=declared(409))
def drain_node(call: Poster, node_id: Id) -> Response:
    """Nothing new starts there, and what runs ends by its own notice."""
    return _cordon(call, node_id, "drain", break_notice=False)


def _cordon(
    call: Call,
    node_id: str,
    mode: Literal["cordon", "drain", "immediate"],
    *,
    break_notice: bool,
) -> Response:
    def do(work: Work) -> rest.Node:
        compute.cordon(work, call.identity, node_id, mode, break_notice)
        return show.node(work.tx, fleet.get_node(work.tx, node_id))

    detail = {"mode": mode, "break_notice": break_notice}
    return call.act(
        "cordon_node",
        do,
        needs=Action.ADMINISTER_FLEET,
        target=node_id,
        detail=detail,
        headers=versioned,
    )


@router.post("/nodes/{node_id}/uncordon", response_model=rest.Node, responses=declared(409))
def uncordon_node(call: Poster, node_id: Id) -> Response:
    """Back to production; a drain is called off, and with it the notices not used up."""

    def do(work: Work) -> rest.Node:
        return show.node(work.tx, compute.uncordon(work, call.identity, node_id))

    return call.act(
        "uncordon_node", do, needs=Action.ADMINISTER_FLEET, target=node_id, headers=versioned
    )


@router.get("/devices")
def list_devices(
    call: Caller,
    pool_id: PoolQuery = None,
    node_id: NodeQuery = None,
    after: After = None,
    limit: Limit = 100,
) -> rest.Page[rest.Device]:
    """What each device is doing, and for whom."""
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        now = call.deps.store.clock.now()
        pools = [fleet.get_pool(tx, pool_id)] if pool_id else fleet.list_pools(tx)
        found = [
            (device, pool)
            for pool in pools
            for device in fleet.list_devices(tx, pool.id)
            if node_id in (None, device.node_id)
        ]
        return by_place(found, after, limit, lambda pair: show.device(tx, pair[0], pair[1], now))


@router.get("/device-time")
def get_device_time(
    call: Caller,
    start: Start = None,
    end: End = None,
    pool_id: PoolQuery = None,
    device_id: DeviceQuery = None,
) -> rest.DeviceTime:
    """How device time divided over a stretch: whole milliseconds that sum exactly."""
    call.require(Action.READ_FLEET)
    first, last = window(call, start, end)
    last = max(first, min(last, call.deps.store.clock.now()))
    with call.read() as tx:
        ids = None
        if pool_id is not None:
            ids = [device.id for device in fleet.list_devices(tx, fleet.get_pool(tx, pool_id).id)]
        if device_id is not None:
            ids = [fleet.get_device(tx, device_id).id]
        found = metering.partition(tx, device_ids=ids, start=first, end=last)
    return rest.DeviceTime(start=first, end=last, milliseconds_by_use=found)
