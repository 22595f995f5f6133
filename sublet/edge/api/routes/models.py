"""What may be called, for how much, by whom: `/v1/catalogue`."""

from __future__ import annotations

import base64
import re
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Path as InPath
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from sublet.base.kernel.errors import SubletError
from sublet.base.store import Work
from sublet.base.wire import rest
from sublet.edge.api.call import Call, Caller, Poster, versioned
from sublet.edge.api.errors import declared
from sublet.edge.api.paging import After, Id, Limit, by_place, by_seq
from sublet.edge.api.show import models as show
from sublet.edge.api.versions import Expected, demand, show_version
from sublet.records import tenancy
from sublet.records.tenancy import Action
from sublet.shops import models

router = APIRouter(prefix="/v1/catalogue", tags=["models"], responses=declared())

Grantee = Annotated[str, InPath(pattern=rest.GRANTEE)]
_RANGE = re.compile(r"bytes=(\d{1,18})-(\d{0,18})")
FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string"}}}},
    206: {"description": "The range that was asked for."},
    **declared(409),
}


@router.get("")
def list_models(
    call: Caller, after: After = None, limit: Limit = 100
) -> rest.Page[rest.CatalogueModel]:
    """Every model with its terms and prices; those that can be called now name what serves them."""
    call.require(Action.READ)
    with call.read() as tx:
        found = models.list_models(tx, after=after, limit=limit + 1)
        shelf = _Shelf(call, tx)
        return by_seq(found, limit, shelf.show)


@router.post("", status_code=201, response_model=rest.CatalogueModel, responses=declared(409))
def add_model(call: Poster, body: rest.ModelCreate) -> Response:
    """Put a file of this machine on the catalogue; the answer comes when it was read through.

    It can be called once it has a price and a deployment, a sealed one once it is granted, too.
    """
    try:
        call.require(Action.MANAGE_MODELS)
        prepared = _prepared(call, body)
    except SubletError as refusal:
        call.note_refusal("add_model", body.name, refusal)
        raise

    def do(work: Work) -> rest.CatalogueModel:
        if prepared is None:
            raise models.ModelExists(f"{body.name} is on the catalogue already.")
        return _Shelf(call, work.tx).show(models.add_prepared(work, prepared))

    try:
        response = call.act(
            "add_model",
            do,
            needs=Action.MANAGE_MODELS,
            target=body.name,
            status=201,
            detail={"access": body.access, "path": body.path},
            headers=versioned,
        )
    except BaseException:
        # Of a commit whose answer was lost nobody knows yet whether it happened.
        with suppress(SubletError):
            _discard(call, prepared)
        raise
    if "idempotent-replayed" in response.headers:
        _discard(call, prepared)
    return response


def _discard(call: Call, prepared: models.Prepared | None) -> None:
    """What was sealed for nothing goes. What the catalogue names, or may name, stays: without it
    that model could never be served, nor be added again."""
    if prepared is None:
        return
    with call.read() as tx:
        if all(found.path != prepared.new.path for found in models.list_models(tx)):
            prepared.discard()


def _prepared(call: Call, body: rest.ModelCreate) -> models.Prepared | None:
    """The file looked through, and sealed. Slow, and before any Work. None: the name is taken, and
    perhaps by this very request, sent again."""
    with call.read() as tx:
        if any(found.name == body.name for found in models.list_models(tx)):
            return None
    return models.prepare(
        models.NewModel(
            name=body.name,
            provider=body.provider,
            is_third_party=body.is_third_party,
            access=models.Access(body.access),
            kind=body.kind,
            licence=body.licence,
            licence_allows_download=body.licence_allows_download,
            source=body.source,
            path=body.path,
            sha256=body.sha256 or "",
            size_bytes=0,
            quantization=body.quantization,
            context=body.context,
            max_output=body.max_output or body.context,
            server=body.server,
            template=body.template,
        ),
        folder=call.deps.models_folder,
        key=call.deps.sealing_key(),
        key_id=call.deps.store.ids.new("mky"),
    )


@router.get("/{name}")
def get_model(call: Caller, name: Id, response: Response) -> rest.CatalogueModel:
    call.require(Action.READ)
    with call.read() as tx:
        found = _Shelf(call, tx).show(models.get_model(tx, name))
    show_version(response, found.version)
    return found


@router.patch("/{name}", response_model=rest.CatalogueModel, responses=declared(409, 412, 428))
def change_model(call: Caller, name: Id, body: rest.ModelPatch, expected: Expected) -> Response:
    """Its lifecycle with the dates that are announced, and what a device was measured to make."""

    def do(work: Work) -> rest.CatalogueModel:
        call.require(Action.MANAGE_MODELS)
        before = models.get_model(work.tx, name)
        demand(expected, before.version)
        changes = body.model_dump(exclude_unset=True)
        made = changes.pop("tokens_per_device_hour", None)
        found = before
        if made is not None:
            found = models.note_throughput(work, name, made)
        if changes:
            found = models.set_lifecycle(
                work,
                name,
                models.Lifecycle(changes.get("lifecycle", before.lifecycle)),
                legacy_on=changes.get("legacy_on", before.legacy_on),
                end_of_life_on=changes.get("end_of_life_on", before.end_of_life_on),
            )
        return _Shelf(call, work.tx).show(found)

    detail = body.model_dump(mode="json", exclude_unset=True)
    return call.act("change_model", do, target=name, detail=detail, headers=versioned)


@router.get("/{name}/weights", response_class=FileResponse, responses=FILE)
def download_weights(call: Caller, name: Id, request: Request) -> FileResponse:
    """The file of an open model whose licence allows it, or one `bytes` range of it. Sealed: 403
    `weights_sealed`, always."""
    call.require(Action.READ)
    try:
        with call.deps.store.work(call.actor) as work:
            path = models.open_weights(work.tx, name)
            found = models.get_model(work.tx, name)
            tenancy.audit(work, action="download_weights", target=name, result="ok")
    except SubletError as refusal:
        call.note_refusal("download_weights", name, refusal)
        raise
    _keep_range(request, found.size_bytes)
    digest = base64.b64encode(bytes.fromhex(found.sha256)).decode()
    return FileResponse(
        path,
        media_type="application/octet-stream",
        filename=f"{Path(name).name}.gguf",
        headers={"x-sha256": found.sha256, "repr-digest": f"sha-256=:{digest}:"},
    )


def _keep_range(request: Request, size: int) -> None:
    """A range that cannot be had, or is none, is not asked for: the answer is then the whole file,
    as HTTP has it, and no failure of another shape than ours."""
    asked = _RANGE.fullmatch(request.headers.get("range", ""))
    if asked is not None:
        start, end = int(asked[1]), int(asked[2] or size)
        if start <= end and start < size:
            return
    headers = [pair for pair in request.scope["headers"] if pair[0] != b"range"]
    request.scope["headers"] = headers


@router.get("/{name}/prices")
def list_model_prices(
    call: Caller, name: Id, after: After = None, limit: Limit = 100
) -> rest.Page[rest.TokenPrice]:
    """Every version, oldest first; those that begin later are among them."""
    call.require(Action.READ)
    with call.read() as tx:
        models.get_model(tx, name)
        found = models.list_prices(tx, name)
    return by_place(found, after, limit, show.price)


@router.post("/{name}/prices", status_code=201, response_model=rest.TokenPrice)
def set_model_price(call: Poster, name: Id, body: rest.TokenPriceCreate) -> Response:
    """A new version of a tier's price. A version never changes: what began under it is rated by
    it."""

    def do(work: Work) -> rest.TokenPrice:
        made = models.set_price(
            work,
            name,
            tier=body.tier,
            input_micros=body.input_micros,
            cached_micros=body.cached_micros,
            output_micros=body.output_micros,
            effective_from=body.effective_from,
        )
        return show.price(made)

    detail = body.model_dump(mode="json")
    return call.act(
        "set_model_price",
        do,
        needs=Action.MANAGE_MODELS,
        target=name,
        status=201,
        detail=detail,
    )


@router.get("/{name}/grants")
def list_model_grants(
    call: Caller, name: Id, after: After = None, limit: Limit = 100
) -> rest.Page[rest.ModelGrant]:
    """Who may call a sealed model, beside the owner."""
    call.require(Action.MANAGE_MODELS)
    with call.read() as tx:
        models.get_model(tx, name)
        found = models.list_grants(tx, name)
    return by_seq([one for one in found if one.seq > (after or 0)], limit, show.grant)


@router.post("/{name}/grants", status_code=201, response_model=rest.ModelGrant)
def grant_model(call: Poster, name: Id, body: rest.ModelGrantCreate) -> Response:
    """Let an organisation, or everyone, call a sealed model. Twice is once."""

    def do(work: Work) -> rest.ModelGrant:
        return show.grant(models.grant(work, name, body.organisation_id))

    return call.act(
        "grant_model",
        do,
        needs=Action.MANAGE_MODELS,
        target=name,
        status=201,
        detail={"organisation_id": body.organisation_id},
    )


@router.delete("/{name}/grants/{organisation_id}", status_code=204)
def revoke_model_grant(call: Caller, name: Id, organisation_id: Grantee) -> Response:
    """Calls are refused from the next snapshot on. With the last grant its replicas end as well."""

    def do(work: Work) -> rest.ModelGrantCreate:
        call.require(Action.MANAGE_MODELS)
        models.get_model(work.tx, name)
        models.revoke_grant(work, name, organisation_id)
        return rest.ModelGrantCreate(organisation_id=organisation_id)

    call.act("revoke_model_grant", do, target=name, detail={"organisation_id": organisation_id})
    return Response(status_code=204)


class _Shelf:
    """What a model's showing needs beside its row, read once a request."""

    def __init__(self, call: Call, tx: Connection) -> None:
        self._call = call
        self._now = call.deps.store.clock.now()
        self._deployed = {found.model: found.id for found in models.list_deployments(tx)}
        self._prices = models.prices_in_force(tx, self._now)
        self._granted = {
            grant.model
            for grant in models.list_grants(tx)
            if grant.organisation_id in (models.EVERYONE, call.organisation_id)
        }

    def show(self, found: models.Model) -> rest.CatalogueModel:
        in_force = [
            self._prices[found.name, tier]
            for tier in models.TIERS
            if (found.name, tier) in self._prices
        ]
        is_free_to_call = not found.is_sealed or self._call.identity.is_owner
        return show.model(
            found,
            in_force,
            deployment_id=self._deployed.get(found.name),
            may_be_called=is_free_to_call or found.name in self._granted,
            hint=models.why_not_deployable(found, self._now.date()),
            now=self._now,
        )
