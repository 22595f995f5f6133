"""Who: `/v1/me`, organisations, projects, principals, keys."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from sublet.base.kernel.errors import Invalid
from sublet.base.store import Work
from sublet.base.wire import rest
from sublet.edge.api.call import Call, Caller, Poster, versioned
from sublet.edge.api.errors import declared
from sublet.edge.api.paging import After, Id, Limit, by_seq
from sublet.edge.api.show import people as show
from sublet.edge.api.versions import Expected, demand, show_version
from sublet.records import ledger, tenancy
from sublet.records.tenancy import Action
from sublet.shops import compute

router = APIRouter(prefix="/v1", tags=["people"], responses=declared())

CHANGES = declared(409, 412, 428)
PAGE = 500
PAGES = 200


@router.get("/me")
def get_me(call: Caller) -> rest.Me:
    """Who the key speaks for, and what it may spend."""
    identity = call.identity
    with call.read() as tx:
        available = ledger.available(tx, call.organisation_id)
    return rest.Me(
        organisation=show.organisation(identity.organisation),
        principal=show.principal(identity.principal),
        key=show.key(identity.key),
        role=identity.role.value,
        is_owner=identity.is_owner,
        actions=sorted(action.value for action in identity.actions),
        available=rest.Money.of(available),
    )


@router.get("/organisations")
def list_organisations(
    call: Caller, after: After = None, limit: Limit = 100
) -> rest.Page[rest.Organisation]:
    """All of them, for the owner."""
    call.require(Action.ADMINISTER_ORGANISATIONS)
    with call.read() as tx:
        found = tenancy.list_organisations(tx, after=after, limit=limit + 1)
    return by_seq(found, limit, show.organisation)


@router.get("/organisations/{organisation_id}")
def get_organisation(call: Caller, organisation_id: Id, response: Response) -> rest.Organisation:
    """One's own; for the owner any."""
    if organisation_id != call.organisation_id and not call.identity.is_owner:
        raise tenancy.OrganisationNotFound()
    own = organisation_id == call.organisation_id
    call.require(Action.READ if own else Action.ADMINISTER_ORGANISATIONS)
    with call.read() as tx:
        found = tenancy.get_organisation(tx, organisation_id)
    show_version(response, found.version)
    return show.organisation(found)


@router.put(
    "/organisations/{organisation_id}/standing",
    response_model=rest.Organisation,
    responses=CHANGES,
)
def set_standing(
    call: Caller, organisation_id: Id, body: rest.StandingPut, expected: Expected
) -> Response:
    """The owner's word on an organisation. What it may start follows at once."""

    def do(work: Work) -> rest.Organisation:
        call.require(Action.ADMINISTER_ORGANISATIONS)
        demand(expected, tenancy.get_organisation(work.tx, organisation_id).version)
        return show.organisation(
            tenancy.set_standing(work, organisation_id, body.standing, body.why)
        )

    return call.act(
        "set_standing",
        do,
        target=organisation_id,
        about=organisation_id,
        is_audited=False,
        headers=versioned,
    )


@router.post(
    "/organisations/{organisation_id}/stop-workloads",
    response_model=rest.StoppedWorkloads,
)
def stop_workloads(call: Poster, organisation_id: Id, body: rest.StopWorkloads) -> Response:
    """The owner ends at once all that runs for a consumer. Suspend it first, or it starts anew."""

    def do(work: Work) -> rest.StoppedWorkloads:
        if tenancy.get_organisation(work.tx, organisation_id).id == call.organisation_id:
            raise Invalid("Your own workloads are stopped one by one.", param="organisation_id")
        ended = [
            compute.stop_for(work, one.id, body.reason).id for one in _live(work, organisation_id)
        ]
        return rest.StoppedWorkloads(
            organisation_id=organisation_id, reason=body.reason, workload_ids=ended
        )

    return call.act(
        "stop_workloads",
        do,
        needs=Action.ADMINISTER_ORGANISATIONS,
        target=organisation_id,
        about=organisation_id,
        detail={"reason": body.reason},
    )


def _live(work: Work, organisation_id: str) -> list[compute.Workload]:
    """All that holds devices. Read whole before any is ended: ending one moves it on."""
    found: list[compute.Workload] = []
    after: int | None = None
    for _ in range(PAGES):
        part = compute.list_workloads(
            work.tx, organisation_id=organisation_id, states=compute.LIVE, after=after, limit=PAGE
        )
        found += part
        if len(part) < PAGE:
            break
        after = part[-1].seq
    return found


@router.post("/projects", status_code=201, response_model=rest.Project, responses=declared(409))
def create_project(call: Poster, body: rest.ProjectCreate) -> Response:
    def do(work: Work) -> rest.Project:
        return show.project(tenancy.create_project(work, call.organisation_id, body.name))

    return call.act("create_project", do, needs=Action.MANAGE_PROJECTS, status=201)


@router.get("/projects")
def list_projects(call: Caller, after: After = None, limit: Limit = 100) -> rest.Page[rest.Project]:
    """Those of the organisation; of a key bound to a project, that one."""
    call.require(Action.READ)
    with call.read() as tx:
        bound = call.identity.project_id
        if bound is not None:
            found = [] if after else [tenancy.get_project(tx, bound)]
        else:
            found = tenancy.list_projects(tx, call.organisation_id, after=after, limit=limit + 1)
    return by_seq(found, limit, show.project)


@router.get("/projects/{project_id}")
def get_project(call: Caller, project_id: Id) -> rest.Project:
    with call.read() as tx:
        found = tenancy.get_project(tx, project_id)
    call.require(Action.READ, of=found, missing=tenancy.ProjectNotFound)
    if call.identity.project_id not in (None, found.id):
        raise tenancy.ProjectNotFound()
    return show.project(found)


@router.post("/principals", status_code=201, response_model=rest.Principal, responses=declared(409))
def create_principal(call: Poster, body: rest.PrincipalCreate) -> Response:
    """A user or a service account of the caller's organisation."""

    def do(work: Work) -> rest.Principal:
        return show.principal(
            tenancy.create_principal(
                work,
                call.organisation_id,
                kind=body.kind,
                name=body.name,
                email=body.email,
                role=body.role,
            )
        )

    return call.act(
        "create_principal", do, needs=Action.MANAGE_MEMBERS, status=201, headers=versioned
    )


@router.get("/principals")
def list_principals(
    call: Caller, after: After = None, limit: Limit = 100
) -> rest.Page[rest.Principal]:
    call.require(Action.READ)
    with call.read() as tx:
        found = tenancy.list_principals(tx, call.organisation_id, after=after, limit=limit + 1)
    return by_seq(found, limit, show.principal)


@router.get("/principals/{principal_id}")
def get_principal(call: Caller, principal_id: Id, response: Response) -> rest.Principal:
    with call.read() as tx:
        found = tenancy.get_principal(tx, principal_id)
    call.require(Action.READ, of=found, missing=tenancy.PrincipalNotFound)
    show_version(response, found.version)
    return show.principal(found)


@router.patch("/principals/{principal_id}", response_model=rest.Principal, responses=CHANGES)
def change_principal(
    call: Caller, principal_id: Id, body: rest.PrincipalPatch, expected: Expected
) -> Response:
    """Another role. It holds from the next request on."""

    def do(work: Work) -> rest.Principal:
        found = tenancy.get_principal(work.tx, principal_id)
        call.require(Action.MANAGE_MEMBERS, of=found, missing=tenancy.PrincipalNotFound)
        demand(expected, found.version)
        return show.principal(tenancy.change_role(work, principal_id, body.role))

    answer = call.act(
        "change_role",
        do,
        target=principal_id,
        detail={"role": body.role},
        headers=versioned,
    )
    _await_gateways(call)
    return answer


@router.delete("/principals/{principal_id}", status_code=204, responses=declared(409))
def remove_principal(call: Caller, principal_id: Id) -> Response:
    """Its keys are revoked with it."""

    def do(work: Work) -> rest.Principal:
        found = tenancy.get_principal(work.tx, principal_id)
        call.require(Action.MANAGE_MEMBERS, of=found, missing=tenancy.PrincipalNotFound)
        return show.principal(tenancy.remove_principal(work, principal_id))

    call.act("remove_principal", do, target=principal_id)
    _await_gateways(call)
    return Response(status_code=204)


@router.post("/keys", status_code=201, response_model=rest.KeyCreated, responses=declared(409))
def create_key(call: Poster, body: rest.KeyCreate) -> Response:
    """A new key, which may do at most what the key that makes it may do: it has that one's limits,
    end and project where the body names none. Its secret is shown in this answer and never again.
    """

    def do(work: Work) -> rest.KeyCreated:
        principal_id = body.principal_id or call.identity.principal.id
        principal = tenancy.get_principal(work.tx, principal_id)
        call.require(Action.MANAGE_KEYS, of=principal, missing=tenancy.PrincipalNotFound)
        terms = tenancy.inherited(
            call.identity,
            principal,
            tenancy.KeyTerms(
                project_id=body.project_id,
                role=None if body.role is None else tenancy.Role(body.role),
                expires_at=body.expires_at,
                limits=show.limits_of(body.limits),
            ),
        )
        key, secret = tenancy.create_key(
            work,
            principal_id,
            name=body.name,
            project_id=terms.project_id,
            role=terms.role,
            expires_at=terms.expires_at,
            limits=terms.limits,
        )
        return rest.KeyCreated(id=key.id, key=show.key(key), secret=secret)

    return call.act(
        "create_key",
        do,
        needs=Action.MANAGE_KEYS,
        status=201,
        keep=lambda made: made.model_copy(update={"secret": None}),
    )


@router.get("/keys")
def list_keys(call: Caller, after: After = None, limit: Limit = 100) -> rest.Page[rest.Key]:
    """All of the organisation, revoked ones too."""
    call.require(Action.MANAGE_KEYS)
    with call.read() as tx:
        found = tenancy.list_keys(tx, call.organisation_id, after=after, limit=limit + 1)
    return by_seq(found, limit, show.key)


@router.get("/keys/{key_id}")
def get_key(call: Caller, key_id: Id) -> rest.Key:
    with call.read() as tx:
        found = tenancy.get_key(tx, key_id)
    if found.id != call.identity.key.id:
        _key_of_mine(call, found)
    return show.key(found)


@router.delete("/keys/{key_id}", status_code=204)
def revoke_key(call: Caller, key_id: Id) -> Response:
    """Refused from the next request on, by gateways two seconds later; a key may revoke itself."""

    def do(work: Work) -> rest.Key:
        found = tenancy.get_key(work.tx, key_id)
        if found.id != call.identity.key.id:
            _key_of_mine(call, found)
        return show.key(tenancy.revoke_key(work, key_id))

    call.act("revoke_key", do, target=key_id)
    _await_gateways(call)
    return Response(status_code=204)


def _await_gateways(call: Call) -> None:
    """What was taken away is gone at the gateways, too, when this is answered."""
    call.deps.await_snapshot(call.deps.store.clock.now())


def _key_of_mine(call: Caller, key: tenancy.Key) -> None:
    if key.organisation_id != call.organisation_id:
        raise tenancy.KeyNotFound()
    call.require(Action.MANAGE_KEYS)
