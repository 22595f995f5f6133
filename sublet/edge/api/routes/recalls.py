"""The owner takes devices back: `/v1/recalls`, `/v1/shortfalls`."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter
from starlette.responses import Response

from sublet.base.store import Work
from sublet.base.wire import rest
from sublet.edge.api.call import Call, Caller, Poster, versioned
from sublet.edge.api.errors import declared
from sublet.edge.api.paging import After, Id, Limit, by_seq
from sublet.edge.api.show import recalls as show
from sublet.edge.api.versions import show_version
from sublet.records.tenancy import Action
from sublet.rights import owner

router = APIRouter(prefix="/v1", tags=["recalls"], responses=declared(409))


@router.post("/recalls", status_code=201, response_model=rest.Recall)
def plan_recall(call: Poster, body: rest.RecallCreate) -> Response:
    """A plan, before anything happens: which rows, whose notices, at what cost, what is short."""

    def do(work: Work) -> rest.Recall:
        found = owner.plan_recall(
            work,
            call.identity,
            pool_id=body.pool_id,
            devices=body.devices,
            count=body.count,
            by=body.by,
            until=body.until,
        )
        return show.recall(found, call.deps.currency)

    return call.act("plan_recall", do, needs=Action.RECALL, status=201, headers=versioned)


@router.get("/recalls")
def list_recalls(call: Caller, after: After = None, limit: Limit = 100) -> rest.Page[rest.Recall]:
    """Oldest first."""
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        found = owner.list_recalls(tx, after=after, limit=limit + 1)
    return by_seq(found, limit, lambda recall: show.recall(recall, call.deps.currency))


@router.get("/recalls/{recall_id}")
def get_recall(call: Caller, recall_id: Id, response: Response) -> rest.Recall:
    """Its rows as they stand."""
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        found = owner.get_recall(tx, recall_id)
    show_version(response, found.version)
    return show.recall(found, call.deps.currency)


@router.post("/recalls/{recall_id}/accept", response_model=rest.Recall)
def accept_recall(call: Poster, recall_id: Id, body: rest.RecallAccept | None = None) -> Response:
    """All rows, or those named. `plan_stale` carries the new plan in `details.plan`."""
    rows = None if body is None else body.rows
    try:
        return _recall_act(
            call,
            "accept_recall",
            recall_id,
            lambda work: owner.accept_recall(work, recall_id, rows),
        )
    except owner.PlanStale as stale:
        with call.deps.store.work(call.actor) as work:
            anew = show.recall(owner.plan_again(work, recall_id), call.deps.currency)
        raise owner.PlanStale(stale.message, plan=anew, **stale.details) from None


@router.post("/recalls/{recall_id}/cancel", response_model=rest.Recall)
def cancel_recall(call: Poster, recall_id: Id) -> Response:
    """Withdraws the notices that are not used up; what is freed goes back to sale."""
    return _recall_act(
        call, "cancel_recall", recall_id, lambda work: owner.cancel_recall(work, recall_id)
    )


@router.post("/recalls/{recall_id}/return", response_model=rest.Recall)
def return_recall(call: Poster, recall_id: Id) -> Response:
    """Gives the devices back to sale."""
    return _recall_act(
        call, "return_recall", recall_id, lambda work: owner.return_recall(work, recall_id)
    )


def _recall_act(
    call: Call, action: str, recall_id: str, do: Callable[[Work], owner.Recall]
) -> Response:
    def done(work: Work) -> rest.Recall:
        return show.recall(do(work), call.deps.currency)

    return call.act(action, done, needs=Action.RECALL, target=recall_id, headers=versioned)


@router.get("/shortfalls")
def list_shortfalls(
    call: Caller, after: After = None, limit: Limit = 100
) -> rest.Page[rest.Shortfall]:
    """What the owner needed and did not get by the date, oldest first."""
    call.require(Action.READ_FLEET)
    with call.read() as tx:
        found = owner.list_shortfalls(tx, after=after, limit=limit + 1)
    return by_seq(found, limit, show.shortfall)
