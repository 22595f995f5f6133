"""The whole at a glance: status, the auditor, health, metrics."""

from __future__ import annotations

from fastapi import APIRouter
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import Response

from sublet import audit
from sublet.base.wire import rest
from sublet.capacity import fleet
from sublet.edge.api.call import Call, Caller
from sublet.edge.api.deps import Deps
from sublet.edge.api.errors import declared
from sublet.edge.api.show import earnings
from sublet.edge.api.show import fleet as show_fleet
from sublet.edge.api.show import recalls as show_recalls
from sublet.edge.api.show import workloads as show_workloads
from sublet.money import billing
from sublet.records import ledger
from sublet.records.tenancy import Action
from sublet.rights import owner
from sublet.shops import compute
from sublet.shops.compute.states import TERMINAL

router = APIRouter(tags=["system"])

MOST_SHOWN = 500
NOT_OVER = [state for state in compute.State if state not in TERMINAL]
UNDER_WAY = frozenset(
    {
        owner.RecallState.PLANNED,
        owner.RecallState.ACCEPTED,
        owner.RecallState.NOTICING,
        owner.RecallState.DRAINING,
        owner.RecallState.DELIVERED,
    }
)


@router.get("/v1/status", responses=declared())
def get_status(call: Caller) -> rest.Status:
    """What runs, what it costs now and how long the credit lasts; for the owner the whole."""
    call.require(Action.READ)
    now = call.deps.store.clock.now()
    with call.read() as tx:
        found = compute.list_workloads(
            tx,
            organisation_id=call.organisation_id,
            project_id=call.identity.project_id,
            states=NOT_OVER,
            limit=MOST_SHOWN,
        )
        shown = [show_workloads.workload(tx, one, call.deps, now) for one in found]
        runway = billing.runway(tx, call.organisation_id, now)
        return rest.Status(
            now=now,
            version=call.deps.version,
            trusted_tenants=call.deps.trusted_tenants,
            gateway_url=call.deps.gateway_url(),
            workloads=shown,
            burn_micros_per_hour=runway.burn_micros_per_hour,
            available=rest.Money.of(ledger.available(tx, call.organisation_id)),
            runs_out_at=runway.ends_at,
            owner=_whole(call, tx) if Action.READ_FLEET in call.identity.actions else None,
        )


def _whole(call: Call, tx: Connection) -> rest.OwnerStatus:
    now = call.deps.store.clock.now()
    pools = [show_fleet.pool_status(tx, pool, now) for pool in fleet.list_pools(tx)]
    recalls = [r for r in owner.list_recalls(tx, limit=MOST_SHOWN) if r.state in UNDER_WAY]
    return rest.OwnerStatus(
        pools=pools,
        earning_micros_per_hour=earnings.earning_micros_per_hour(tx, now),
        cost_micros_per_hour=earnings.cost_micros_per_hour(tx, now),
        recalls=[show_recalls.recall(found, call.deps.currency) for found in recalls],
        trusted_tenants=call.deps.trusted_tenants,
    )


@router.get("/v1/audit-books", tags=["system"], responses=declared())
def get_audit_books(call: Caller) -> rest.AuditBooks:
    """Run the auditor on live state: every invariant by name, and where it is broken."""
    call.require(Action.READ_BOOKS)
    with call.read() as tx:
        now = call.deps.store.clock.now()
        found = audit.check(tx, now)
    return rest.AuditBooks(
        at=now,
        sound=not found,
        invariants=sorted(audit.INVARIANTS),
        violations=[
            rest.Violation(name=one.name, statement=one.statement, detail=one.detail)
            for one in found
        ],
    )


@router.get("/healthz", responses=declared())
def get_health(request: Request) -> rest.Health:
    """Whether this process can read the store. Needs no key."""
    deps: Deps = request.app.state.deps
    now = deps.store.clock.now()
    with deps.store.read() as tx:
        ledger.trial_balance(tx)
    return rest.Health(ok=True, version=deps.version, now=now, detail="")


@router.get(
    "/metrics",
    response_class=Response,
    responses={
        **declared(),
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
    },
)
def get_metrics(request: Request) -> Response:
    """For Prometheus. Needs no key and names no organisation."""
    return Response(request.app.state.metrics.page(), media_type="text/plain; version=0.0.4")
