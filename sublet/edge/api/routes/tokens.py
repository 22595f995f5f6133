"""What was called, and how much may be: `/v1/token-usage`, `/v1/limits`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from sqlalchemy import Connection
from starlette.responses import Response

from sublet.base.store import Work
from sublet.base.wire import rest
from sublet.edge.api.call import Call, Caller
from sublet.edge.api.errors import declared
from sublet.edge.api.paging import After, Id, Limit, OrganisationQuery, ProjectQuery, by_seq
from sublet.edge.api.show import models as show
from sublet.edge.api.show import people
from sublet.records import metering, tenancy
from sublet.records.tenancy import Action, ScopeKind

router = APIRouter(prefix="/v1", tags=["models"], responses=declared())

KeyQuery = Annotated[str | None, Query(pattern=rest.OWN_ID, description="Of this key only.")]
Order = Annotated[rest.UsageOrder, Query(description="Which come first; `next` keeps to it.")]
Scope = Annotated[rest.ScopeKind, Path(description="Of what: organisation, project or key.")]


@router.get("/token-usage")
def list_token_usage(
    call: Caller,
    organisation_id: OrganisationQuery = None,
    project_id: ProjectQuery = None,
    key_id: KeyQuery = None,
    order: Order = "oldest",
    after: After = None,
    limit: Limit = 100,
) -> rest.Page[rest.TokenUsage]:
    """Request by request, as recorded. A key that is bound to a project sees its own requests."""
    bound = call.identity.project_id
    tenancy.require(call.identity, Action.READ_MONEY, organisation_id, project_id or bound)
    if bound is not None:
        if key_id not in (None, call.identity.key.id):
            raise tenancy.KeyNotFound()
        key_id = call.identity.key.id
    whose = organisation_id or call.organisation_id
    with call.read() as tx:
        if project_id is not None:
            _of(tx, project_id, whose)
        found = metering.list_token_usage(
            tx,
            organisation_id=whose,
            project_id=project_id,
            key_id=key_id,
            is_newest_first=order == "newest",
            after=after,
            limit=limit + 1,
        )
    return by_seq(found, limit, show.token_usage)


def _of(tx: Connection, project_id: str, organisation_id: str) -> None:
    """It is a project of that organisation, or not found."""
    if tenancy.get_project(tx, project_id).organisation_id != organisation_id:
        raise tenancy.ProjectNotFound()


@router.get("/limits/{scope_kind}/{scope_id}")
def get_limits(call: Caller, scope_kind: Scope, scope_id: Id) -> rest.ScopeLimits:
    """What is set on that scope itself; those above it bind besides."""
    kind = ScopeKind(scope_kind)
    with call.read() as tx:
        _may(call, tx, kind, scope_id, is_change=False)
        return people.scope_limits(kind, scope_id, tenancy.get_limits(tx, kind, scope_id))


@router.put("/limits/{scope_kind}/{scope_id}", response_model=rest.ScopeLimits)
def set_limits(call: Caller, scope_kind: Scope, scope_id: Id, body: rest.LimitsPut) -> Response:
    """Replaces the limits of a scope: a key's or a project's an admin's, an organisation's the
    owner's. Gateways go by them within two seconds."""
    kind = ScopeKind(scope_kind)

    def do(work: Work) -> rest.ScopeLimits:
        wanted = _may(call, work.tx, kind, scope_id, is_change=True, limits=people.limits_of(body))
        return people.scope_limits(kind, scope_id, tenancy.set_limits(work, kind, scope_id, wanted))

    return call.act(
        "set_limits",
        do,
        target=scope_id,
        about=scope_id if kind is ScopeKind.ORGANISATION else None,
        detail=body.model_dump(mode="json", exclude_none=True),
    )


def _may(
    call: Call,
    tx: Connection,
    kind: ScopeKind,
    scope_id: str,
    *,
    is_change: bool,
    limits: tenancy.Limits = tenancy.NO_LIMITS,
) -> tenancy.Limits:
    """Pass if the caller may see, or change, the limits of that scope; the limits that it may set."""
    if kind is ScopeKind.ORGANISATION:
        if is_change or scope_id != call.organisation_id:
            # Its own limits are the owner's word to an organisation, not its own to itself.
            if scope_id != call.organisation_id and not call.identity.is_owner:
                raise tenancy.OrganisationNotFound()
            call.require(Action.ADMINISTER_ORGANISATIONS)
        else:
            call.require(Action.READ)
        tenancy.get_organisation(tx, scope_id)
        return limits
    if kind is ScopeKind.PROJECT:
        _of(tx, scope_id, call.organisation_id)
        call.require(Action.MANAGE_BUDGETS if is_change else Action.READ)
        if call.identity.project_id not in (None, scope_id):
            raise tenancy.ProjectNotFound()
        return limits
    key = tenancy.get_key(tx, scope_id)
    if key.organisation_id != call.organisation_id:
        raise tenancy.KeyNotFound()
    if not is_change and key.id == call.identity.key.id:
        return limits
    call.require(Action.MANAGE_KEYS)
    if not is_change:
        return limits
    # As when a key is made: a limited key lets none do more than itself, nor itself.
    principal = tenancy.get_principal(tx, key.principal_id)
    terms = tenancy.KeyTerms(limits=limits)
    return tenancy.inherited(call.identity, principal, terms).limits
