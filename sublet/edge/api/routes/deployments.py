"""How models are served: `/v1/deployments`, `/v1/gateways`."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from sqlalchemy import Connection
from starlette.responses import Response

from sublet.base.store import Work
from sublet.base.wire import rest
from sublet.edge.api.call import Caller, Poster, versioned
from sublet.edge.api.errors import declared
from sublet.edge.api.paging import After, Id, Limit, by_place, by_seq
from sublet.edge.api.show import models as show
from sublet.edge.api.versions import Expected, show_version
from sublet.records import metering
from sublet.records.tenancy import Action
from sublet.shops import models

router = APIRouter(prefix="/v1", tags=["models"], responses=declared())


@router.post(
    "/deployments", status_code=201, response_model=rest.Deployment, responses=declared(409)
)
def create_deployment(call: Poster, body: rest.DeploymentCreate) -> Response:
    """Serve a model: replicas start at once, those of the minimum firm, those above it filler."""

    def do(work: Work) -> rest.Deployment:
        made = models.deploy(work, call.identity, **body.model_dump())
        return _shower(work.tx)(made)

    return call.act(
        "deploy_model",
        do,
        needs=Action.DEPLOY,
        status=201,
        detail={"model": body.model},
        headers=versioned,
    )


@router.get("/deployments")
def list_deployments(
    call: Caller, after: After = None, limit: Limit = 100
) -> rest.Page[rest.Deployment]:
    """Oldest first, without those that are retired."""
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        found = models.list_deployments(tx, after=after, limit=limit + 1)
        return by_seq(found, limit, _shower(tx))


@router.get("/deployments/{deployment_id}")
def get_deployment(call: Caller, deployment_id: Id, response: Response) -> rest.Deployment:
    """Its replicas, what waits for one, and why the last did not start."""
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        found = _shower(tx)(models.get_deployment(tx, deployment_id))
    show_version(response, found.version)
    return found


@router.patch(
    "/deployments/{deployment_id}",
    response_model=rest.Deployment,
    responses=declared(409, 412, 428),
)
def change_deployment(
    call: Caller, deployment_id: Id, body: rest.DeploymentPatch, expected: Expected
) -> Response:
    """How it scales. What is shut down by a lower maximum leaves by drain."""

    def do(work: Work) -> rest.Deployment:
        call.require(Action.DEPLOY)
        changes = body.model_dump(exclude_unset=True)
        made = models.scale(work, call.identity, deployment_id, version=expected, **changes)
        return _shower(work.tx)(made)

    detail = body.model_dump(exclude_unset=True)
    return call.act("change_deployment", do, target=deployment_id, detail=detail, headers=versioned)


@router.delete("/deployments/{deployment_id}", status_code=204, responses=declared(409))
def retire_deployment(call: Caller, deployment_id: Id) -> Response:
    """No new request from the next snapshot on; its replicas drain, and it is gone."""

    def do(work: Work) -> rest.Deployment:
        call.require(Action.DEPLOY)
        return _shower(work.tx)(models.retire(work, call.identity, deployment_id))

    call.act("retire_deployment", do, target=deployment_id)
    return Response(status_code=204)


@router.get("/deployments/{deployment_id}/replicas")
def list_replicas(
    call: Caller, deployment_id: Id, after: After = None, limit: Limit = 100
) -> rest.Page[rest.Replica]:
    """All that it ever had, oldest first; those that are gone say why."""
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        models.get_deployment(tx, deployment_id)
        found = models.list_replicas(tx, deployment_id=deployment_id)
        counts = [gateway.in_flight for gateway in models.list_gateways(tx) if gateway.is_alive]
    return by_place(found, after, limit, lambda one: show.replica(one, counts))


@router.get("/gateways")
def list_gateways(call: Caller, after: After = None, limit: Limit = 100) -> rest.Page[rest.Gateway]:
    """How each gateway stands, as it last said of itself, and what of its usage is not booked."""
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        found = models.list_gateways(tx)
        newest = models.last_snapshot(tx)
        faults = metering.list_spool_faults(tx)
    return by_place(show.gateways(found, newest, faults), after, limit, lambda one: one)


def _shower(tx: Connection) -> Callable[[models.Deployment], rest.Deployment]:
    """Shows deployments with their live replicas, read once."""
    gateways = models.list_gateways(tx)
    replicas: dict[str, list[models.Replica]] = {}
    for one in models.list_replicas(tx, states=models.LIVE):
        replicas.setdefault(one.deployment_id, []).append(one)
    return lambda found: show.deployment(found, replicas.get(found.id, []), gateways)
