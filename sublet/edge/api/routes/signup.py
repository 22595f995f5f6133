"""How strangers come in: `/v1/signup`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header
from starlette.requests import Request
from starlette.responses import Response

from sublet.base.kernel.errors import SubletError
from sublet.base.store import Actor, Work
from sublet.base.wire import rest
from sublet.edge.api.call import Asked, once
from sublet.edge.api.deps import Deps
from sublet.edge.api.errors import declared
from sublet.edge.api.show import people as show
from sublet.money import billing
from sublet.records import tenancy

router = APIRouter(prefix="/v1", tags=["people"])


@router.post("/signup", status_code=201, response_model=rest.SignUp, responses=declared(409))
def sign_up(
    request: Request,
    body: rest.SignUpCreate,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """A new organisation with its first user, key and trial credit. Needs no key."""
    deps: Deps = request.app.state.deps
    asked = Asked.of(request, idempotency_key)
    actor = Actor(id="anonymous", address=asked.address)

    def do(work: Work) -> rest.SignUp:
        made = billing.sign_up(
            work,
            email=body.email,
            organisation_name=body.organisation_name,
            trial=deps.trial_credit,
        )
        tenancy.audit(
            work,
            action="sign_up",
            target=made.organisation.id,
            result="ok",
            organisation_id=made.organisation.id,
        )
        return rest.SignUp(
            organisation=show.organisation(made.organisation),
            project=show.project(made.project),
            principal=show.principal(made.principal),
            key=show.key(made.key),
            secret=made.secret,
            trial_credit=rest.Money.of(made.trial),
        )

    try:
        with deps.store.work(actor) as work:
            # The answer is kept without its secret: a key's own holder makes a new one instead.
            response = once(
                work,
                asked,
                "signup",
                201,
                lambda: do(work),
                keep=lambda made: made.model_copy(update={"secret": None}),
            )
    except SubletError as refusal:
        with deps.store.work(actor) as work:
            tenancy.audit(work, action="sign_up", target="", result=refusal.code)
        raise
    deps.nudge()
    return response
