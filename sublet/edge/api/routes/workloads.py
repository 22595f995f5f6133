"""Raw compute: `/v1/instances` and `/v1/jobs`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response, StreamingResponse

from sublet.base.kernel.errors import (
    Invalid,
    NoCapacity,
    PaymentRequired,
    SubletError,
    TooMany,
)
from sublet.base.store import Work
from sublet.base.wire import rest
from sublet.capacity.engines.port import Attachable, NotAttachable, SpawnSpec
from sublet.edge.api import inside
from sublet.edge.api.call import Call, Caller, Poster, versioned
from sublet.edge.api.errors import declared
from sublet.edge.api.paging import After, Id, Limit, ProjectQuery, by_seq
from sublet.edge.api.routes.market import quoted
from sublet.edge.api.show import workloads as show
from sublet.edge.api.versions import Expected, show_version
from sublet.edge.api.ways import alternatives
from sublet.records import tenancy
from sublet.records.tenancy import Action
from sublet.rights import market
from sublet.shops import compute
from sublet.shops.compute.model import Kind

StateQuery = Annotated[rest.WorkloadState | None, Query(description="In this state only.")]
Offset = Annotated[int, Query(ge=0, le=2**62, description="Where to begin, in bytes.")]
Follow = Annotated[bool, Query(description="Go on until the workload is over.")]

DEMAND = (NoCapacity, PaymentRequired, tenancy.QuotaExceeded, market.BudgetExceeded)
"""Refusals that leave unmet demand behind."""
COMMANDS_AT_A_TIME = 16
"""Each keeps a thread of this process busy, of which there are forty."""
ACTS = declared(402, 409)
MADE: dict[int | str, dict[str, Any]] = {
    **ACTS,
    202: {
        "model": rest.Workload,
        "description": "There is no room now; it waits (`awaiting_capacity`) and starts by itself.",
    },
}
LOG: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
}


def _router(kind: Kind) -> APIRouter:
    """The routes that instances and jobs share. Operations are named for the kind."""
    router = APIRouter(prefix=f"/v1/{kind}s", tags=[f"{kind}s"], responses=declared())

    @router.get("", name=f"list_{kind}s")
    def list_workloads(
        call: Caller,
        state: StateQuery = None,
        project_id: ProjectQuery = None,
        after: After = None,
        limit: Limit = 100,
    ) -> rest.Page[rest.Workload]:
        """Oldest first."""
        tenancy.require(call.identity, Action.READ, project_id=project_id)
        with call.read() as tx:
            found = compute.list_workloads(
                tx,
                organisation_id=call.organisation_id,
                project_id=project_id or call.identity.project_id,
                kind=kind,
                states=None if state is None else [compute.State(state)],
                after=after,
                limit=limit + 1,
            )
            return by_seq(found, limit, lambda one: _shown(call, tx, one))

    @router.get("/{workload_id}", name=f"get_{kind}")
    def get_workload(call: Caller, workload_id: Id, response: Response) -> rest.Workload:
        """What it does, what it costs now, what interrupts it."""
        with call.read() as tx:
            found = _shown(call, tx, mine(call, tx, kind, workload_id, Action.READ))
        show_version(response, found.version)
        return found

    @router.patch(
        "/{workload_id}",
        name=f"change_{kind}",
        response_model=rest.Workload,
        responses=declared(409, 412, 428),
    )
    def change_workload(
        call: Caller, workload_id: Id, body: rest.WorkloadPatch, expected: Expected
    ) -> Response:
        """What may change while it lives; a field left out stays as it is."""

        def do(work: Work) -> rest.Workload:
            mine(call, work.tx, kind, workload_id, Action.RENT)
            changes = body.model_dump(exclude_unset=True)
            made = compute.change(work, call.identity, workload_id, version=expected, **changes)
            return _shown(call, work.tx, made)

        detail = {"fields": sorted(body.model_fields_set)}
        return call.act(f"change_{kind}", do, target=workload_id, detail=detail, headers=versioned)

    @router.get("/{workload_id}/transitions", name=f"list_{kind}_transitions")
    def list_transitions(
        call: Caller, workload_id: Id, after: After = None, limit: Limit = 100
    ) -> rest.Page[rest.Transition]:
        """Every change of its state: when, by whom and why."""
        with call.read() as tx:
            mine(call, tx, kind, workload_id, Action.READ)
            found = compute.list_transitions(tx, workload_id, after=after, limit=limit + 1)
        return by_seq(found, limit, show.transition)

    @router.get("/{workload_id}/runs", name=f"list_{kind}_runs")
    def list_runs(
        call: Caller, workload_id: Id, after: After = None, limit: Limit = 100
    ) -> rest.Page[rest.Run]:
        """Each of its lives on devices, oldest first."""
        with call.read() as tx:
            mine(call, tx, kind, workload_id, Action.READ)
            found = compute.list_runs(tx, workload_id)
        later = [run for run in found if run.seq > (after or 0)]
        return by_seq(later[: limit + 1], limit, show.run)

    @router.get(
        "/{workload_id}/logs",
        name=f"read_{kind}_logs",
        response_class=StreamingResponse,
        responses=LOG,
    )
    def read_logs(
        call: Caller, workload_id: Id, offset: Offset = 0, follow: Follow = False
    ) -> StreamingResponse:
        """Its output from a byte offset: of the latest run, and followed, of those after it."""

        def look() -> inside.Look:
            with call.read() as tx:
                found = mine(call, tx, kind, workload_id, Action.READ)
                last = compute.find_last_run(tx, workload_id)
            return inside.Look(run_id=None if last is None else last.id, is_over=found.is_over)

        look()  # What is refused, is refused before the first byte.
        log = inside.follow(
            call.deps.engine,
            look,
            offset=offset,
            is_followed=follow,
            poll_seconds=call.deps.follow_poll_seconds,
            polls=call.deps.follow_polls,
        )
        return StreamingResponse(log, media_type="text/plain")

    @router.post(
        "/{workload_id}/exec",
        name=f"exec_in_{kind}",
        response_model=rest.ExecResult,
        responses=declared(409),
    )
    def exec_inside(call: Caller, workload_id: Id, body: rest.ExecCreate) -> rest.ExecResult:
        """A command inside, with bounds on its time and output. Not repeated by any key."""
        return _exec(call, kind, workload_id, body)

    return router


instances = _router("instance")
jobs = _router("job")


@instances.post("", status_code=201, response_model=rest.Workload, responses=MADE)
def create_instance(call: Poster, body: rest.InstanceCreate) -> Response:
    """A machine to log in to. Without room: 409 with the ways on, or with `wait` 202."""
    spec = compute.WorkloadSpec(
        name=body.name or "",
        script=body.script,
        env=body.env,
        ssh_keys=tuple(body.ssh_keys),
        outbound=body.outbound,
        notice_signal=body.notice_signal,
        auto_resume=body.auto_resume,
    )
    return _rent(call, "instance", body, spec)


@jobs.post("", status_code=201, response_model=rest.Workload, responses=MADE)
def create_job(call: Poster, body: rest.JobCreate) -> Response:
    """A command to run to its end. Without room: 409 with the ways on, or with `wait` 202."""
    spec = compute.WorkloadSpec(
        name=body.name or "",
        command=tuple(body.command),
        env=body.env,
        outbound=body.outbound,
        notice_signal=body.notice_signal,
        max_run_seconds=body.max_run_seconds,
        max_retries=body.max_retries,
        requeue=body.requeue,
    )
    return _rent(call, "job", body, spec)


def _rent(
    call: Call,
    kind: Kind,
    body: rest.InstanceCreate | rest.JobCreate,
    spec: compute.WorkloadSpec,
) -> Response:
    terms = _terms(body)

    def do(work: Work) -> rest.Workload:
        quote_id = body.quote_id if terms is None else quoted(call, work, terms).id
        assert quote_id is not None, "the shape holds either a quote or an offer"
        made = compute.rent(
            work, call.identity, kind=kind, quote_id=quote_id, spec=spec, wait=body.wait
        )
        return _shown(call, work.tx, made)

    try:
        return call.act(
            f"create_{kind}",
            do,
            needs=Action.RENT,
            status=lambda made: 202 if made.state == "awaiting_capacity" else 201,
            headers=versioned,
            unmet=lambda work, refusal: _note_unmet(call, work, body, refusal),
        )
    except NoCapacity as refusal:
        raise _with_ways_on(call, body, refusal) from None


def _with_ways_on(
    call: Call, body: rest.InstanceCreate | rest.JobCreate, refusal: NoCapacity
) -> NoCapacity:
    """The same refusal, with the other offers that have room now."""
    now = call.deps.store.clock.now()
    with call.read() as tx:
        offer_id, grace = body.offer_id, body.stop_grace_seconds
        if body.quote_id is not None:
            quote = market.get_quote(tx, body.quote_id, call.identity)
            offer_id, grace = quote.offer_id, quote.stop_grace_seconds
        assert offer_id is not None
        others = alternatives(
            tx,
            now,
            refused_offer_id=offer_id,
            grace_seconds=grace,
            max_run_seconds=_longest(body),
        )
    details = {**refusal.details, "alternatives": others}
    return type(refusal)(refusal.message, param=refusal.param, **details)


def _terms(body: rest.InstanceCreate | rest.JobCreate) -> rest.QuoteCreate | None:
    """The quote that is asked for on the way; None: it was asked for before."""
    if body.offer_id is None:
        return None
    return rest.QuoteCreate(
        offer_id=body.offer_id,
        count=body.count,
        duration_seconds=_longest(body),
        notice_seconds=body.notice_seconds,
        max_price_micros_per_device_hour=body.max_price_micros_per_device_hour,
        stop_grace_seconds=body.stop_grace_seconds,
        project_id=body.project_id,
    )


def _longest(body: rest.InstanceCreate | rest.JobCreate) -> int | None:
    return body.max_run_seconds if isinstance(body, rest.JobCreate) else None


def _note_unmet(
    call: Call,
    work: Work,
    body: rest.InstanceCreate | rest.JobCreate,
    refusal: SubletError,
) -> None:
    """Keep what was wanted and not had: shape, window, price seen, reason."""
    if not isinstance(refusal, DEMAND):
        return
    if body.quote_id is not None:
        wanted = market.get_quote(work.tx, body.quote_id)
        price, duration, count = wanted.points[0].micros, wanted.duration_seconds, wanted.count
        offer_id, pool_id, devices = wanted.offer_id, wanted.pool_id, wanted.devices
    else:
        assert body.offer_id is not None
        offer = market.get_offer(work.tx, body.offer_id, work.now)
        price = offer.price_micros_per_device_hour(body.notice_seconds)
        duration, count = _longest(body), body.count
        offer_id, pool_id, devices = offer.id, offer.pool_id, offer.devices
    market.note_unmet(
        work,
        organisation_id=call.organisation_id,
        reason=str(refusal.details.get("reason", refusal.code)),
        offer_id=offer_id,
        pool_id=pool_id,
        devices=devices,
        count=count,
        duration_seconds=duration,
        price_micros=price,
    )


# ---- what becomes of one ----------------------------------------------------------------------


@instances.post("/{workload_id}/start", response_model=rest.Workload, responses=MADE)
def start_instance(call: Poster, workload_id: Id, body: rest.StartCreate | None = None) -> Response:
    """A new admission, wherever there is room: like a new one, refused or waiting without."""

    def do(work: Work) -> rest.Workload:
        mine(call, work.tx, "instance", workload_id, Action.RENT)
        wait = body is not None and body.wait
        return _shown(call, work.tx, compute.start(work, call.identity, workload_id, wait=wait))

    return call.act(
        "start_instance",
        do,
        needs=Action.RENT,
        target=workload_id,
        status=lambda made: 202 if made.state == "awaiting_capacity" else 200,
        headers=versioned,
    )


@instances.post("/{workload_id}/stop", response_model=rest.Stopped, responses=declared(409))
def stop_instance(call: Poster, workload_id: Id) -> Response:
    """Gives its devices back; the answer says what it still costs once it is stopped."""

    def do(work: Work) -> rest.Stopped:
        mine(call, work.tx, "instance", workload_id, Action.STOP)
        told = compute.stop(work, call.identity, workload_id)
        return rest.Stopped(
            workload=_shown(call, work.tx, told.workload),
            still_costs_per_hour=rest.Money.of(told.still_costs_per_hour),
            explanation=told.explanation,
        )

    return call.act("stop_instance", do, needs=Action.STOP, target=workload_id)


@instances.post("/{workload_id}/terminate", response_model=rest.Workload, responses=declared(409))
def terminate_instance(call: Poster, workload_id: Id) -> Response:
    """Ends it for good, with its files."""
    return _ended(call, "instance", workload_id, compute.terminate, "terminate_instance")


@jobs.post("/{workload_id}/cancel", response_model=rest.Workload, responses=declared(409))
def cancel_job(call: Poster, workload_id: Id) -> Response:
    """Ends it for good: SIGTERM now, SIGKILL after its grace."""
    return _ended(call, "job", workload_id, compute.cancel, "cancel_job")


def _ended(
    call: Call,
    kind: Kind,
    workload_id: str,
    end: Callable[[Work, tenancy.Identity, str], compute.Workload],
    action: str,
) -> Response:
    def do(work: Work) -> rest.Workload:
        mine(call, work.tx, kind, workload_id, Action.STOP)
        return _shown(call, work.tx, end(work, call.identity, workload_id))

    return call.act(action, do, needs=Action.STOP, target=workload_id, headers=versioned)


class TooManyCommands(TooMany):
    """Too many commands run through the API at the moment: try again, or log in over SSH."""

    code = "too_many_commands"


_commands = threading.BoundedSemaphore(COMMANDS_AT_A_TIME)


def _exec(call: Call, kind: Kind, workload_id: str, body: rest.ExecCreate) -> rest.ExecResult:
    try:
        with call.deps.store.work(call.actor) as work:
            mine(call, work.tx, kind, workload_id, Action.ATTACH)
            run = compute.find_live_run(work.tx, workload_id)
            if run is None or run.state is not compute.RunState.RUNNING:
                raise NotAttachable()
            if not isinstance(call.deps.engine, Attachable):
                raise NotAttachable("This engine lets no commands in: read the logs instead.")
            detail = {"program": body.argv[0][:200]}
            tenancy.audit(work, action="exec", target=workload_id, result="ok", detail=detail)
        spec = SpawnSpec(argv=tuple(body.argv), env=body.env)
        if not _commands.acquire(blocking=False):
            raise TooManyCommands(retry_after_seconds=5)
        try:
            ran = inside.run_inside(
                call.deps.engine, run.id, spec, body.stdin.encode(), body.timeout_seconds
            )
        finally:
            _commands.release()
    except SubletError as refusal:
        call.note_refusal("exec", workload_id, refusal)
        raise
    except OSError as error:
        raise Invalid(
            f"argv: {body.argv[0]!r} cannot be run there ({error.strerror})", param="argv"
        ) from None
    return rest.ExecResult(
        exit_code=ran.exit_code,
        stdout=ran.stdout.text(),
        stderr=ran.stderr.text(),
        truncated=ran.stdout.is_truncated or ran.stderr.is_truncated,
        timed_out=ran.exit_code is None,
    )


def mine(
    call: Call, tx: Connection, kind: Kind, workload_id: str, action: Action
) -> compute.Workload:
    """A workload of the caller's. Another's, and one of the other kind, is not found."""
    found = compute.get_workload(tx, call.identity, workload_id, action)
    if found.kind != kind:
        raise compute.WorkloadNotFound()
    return found


def _shown(call: Call, tx: Connection, found: compute.Workload) -> rest.Workload:
    return show.workload(tx, found, call.deps, call.deps.store.clock.now())
