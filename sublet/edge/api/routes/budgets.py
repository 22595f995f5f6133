"""Caps on spending, and the audit trail: `/v1/budgets`, `/v1/audit`."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from sublet.base.kernel.interval import period_end, period_start
from sublet.base.store import Work
from sublet.base.wire import rest
from sublet.edge.api.call import Call, Caller
from sublet.edge.api.errors import declared
from sublet.edge.api.paging import After, Limit, OrganisationQuery, by_place, by_seq
from sublet.edge.api.show import people as show
from sublet.records import ledger, tenancy
from sublet.records.tenancy import Action, ScopeKind

router = APIRouter(prefix="/v1", tags=["people"], responses=declared())

ScopeQuery = Annotated[str | None, Query(pattern=rest.OWN_ID)]


@router.get("/budgets")
def list_budgets(
    call: Caller,
    project_id: ScopeQuery = None,
    key_id: ScopeQuery = None,
    after: After = None,
    limit: Limit = 100,
) -> rest.Page[rest.Budget]:
    """Those of the organisation, and of the project and key named or the caller's own."""
    project_id = project_id or call.identity.project_id
    tenancy.require(call.identity, Action.READ_MONEY, call.organisation_id, project_id)
    with call.read() as tx:
        if project_id is not None:
            _scope(call, tx, ScopeKind.PROJECT, project_id)
        if key_id is not None:
            _scope(call, tx, ScopeKind.KEY, key_id)
        found = tenancy.list_budgets(
            tx,
            organisation_id=call.organisation_id,
            project_id=project_id,
            key_id=key_id or call.identity.key.id,
        )
        now = call.deps.store.clock.now()
        shown = [_shown(tx, budget, now) for budget in found]
    return by_place(shown, after, limit, lambda budget: budget)


@router.put("/budgets", response_model=rest.Budget)
def set_budget(call: Caller, body: rest.BudgetPut) -> Response:
    """A cap for one scope and period; the cap before it is replaced."""

    def do(work: Work) -> rest.Budget:
        call.require(Action.MANAGE_BUDGETS)
        kind = ScopeKind(body.scope_kind)
        _scope(call, work.tx, kind, body.scope_id)
        budget = tenancy.Budget(
            scope_kind=kind,
            scope_id=body.scope_id,
            period=body.period,
            limit_micros=body.limit_micros,
        )
        return _shown(work.tx, tenancy.set_budget(work, budget), work.now)

    detail = {"period": body.period, "limit_micros": body.limit_micros}
    return call.act("set_budget", do, target=body.scope_id, detail=detail)


@router.delete("/budgets", status_code=204)
def clear_budget(
    call: Caller,
    scope_kind: Annotated[Literal["organisation", "project", "key"], Query()],
    scope_id: Annotated[str, Query(pattern=rest.OWN_ID)],
    period: Annotated[Literal["day", "week", "month", "lifetime"], Query()],
) -> Response:
    """No cap any more for that scope and period."""

    def do(work: Work) -> rest.Budget:
        call.require(Action.MANAGE_BUDGETS)
        kind = ScopeKind(scope_kind)
        _scope(call, work.tx, kind, scope_id)
        budget = tenancy.Budget(scope_kind=kind, scope_id=scope_id, period=period, limit_micros=0)
        tenancy.clear_budget(work, budget)
        return _shown(work.tx, budget, work.now)

    call.act("clear_budget", do, target=scope_id, detail={"period": period})
    return Response(status_code=204)


def _scope(call: Call, tx: Connection, kind: ScopeKind, scope_id: str) -> None:
    """The scope is the caller's own, or not found."""
    if kind is ScopeKind.ORGANISATION:
        if scope_id != call.organisation_id:
            raise tenancy.OrganisationNotFound()
    elif kind is ScopeKind.PROJECT:
        project = tenancy.get_project(tx, scope_id)
        if project.organisation_id != call.organisation_id:
            raise tenancy.ProjectNotFound()
    elif tenancy.get_key(tx, scope_id).organisation_id != call.organisation_id:
        raise tenancy.KeyNotFound()


def _shown(tx: Connection, budget: tenancy.Budget, now: datetime) -> rest.Budget:
    spent = ledger.spent(
        tx,
        organisation_id=budget.scope_id if budget.scope_kind is ScopeKind.ORGANISATION else None,
        project_id=budget.scope_id if budget.scope_kind is ScopeKind.PROJECT else None,
        key_id=budget.scope_id if budget.scope_kind is ScopeKind.KEY else None,
        start=period_start(now, budget.period),
        end=period_end(now, budget.period),
    )
    return show.budget(budget, spent, now)


@router.get("/audit")
def list_audit(
    call: Caller,
    organisation_id: OrganisationQuery = None,
    after: After = None,
    limit: Limit = 100,
) -> rest.Page[rest.AuditEntry]:
    """Every act, refused ones too, oldest first. The owner sees all of the cloud."""
    tenancy.require(call.identity, Action.READ_AUDIT, organisation_id)
    whole = call.identity.is_owner and organisation_id is None
    with call.read() as tx:
        found = tenancy.list_audit(
            tx,
            None if whole else organisation_id or call.organisation_id,
            after=after,
            limit=limit + 1,
        )
    return by_seq(found, limit, show.audit_entry)
