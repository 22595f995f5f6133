"""How strangers come in: `/v1/signup`."""

from __future__ import annotations

import ipaddress
from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Header
from starlette.requests import Request
from starlette.responses import Response

from sublet.base.kernel.errors import SubletError
from sublet.base.kernel.money import Money
from sublet.base.store import Actor, Work
from sublet.base.wire import rest
from sublet.edge.api.call import Asked, once
from sublet.edge.api.deps import Deps
from sublet.edge.api.errors import declared
from sublet.edge.api.pace import Pace
from sublet.edge.api.show import people as show
from sublet.money import billing
from sublet.records import tenancy

router = APIRouter(prefix="/v1", tags=["people"])

SIGN_UPS_PER_MINUTE = 30
"""Of one address; many people may share one."""
TRIALS_WINDOW = timedelta(hours=24)
NO_TRIAL = (
    "No trial credit is left for these 24 hours: this organisation has none and stays unverified. "
    "Ask the owner of this cloud for credit, or pay."
)


@router.post("/signup", status_code=201, response_model=rest.SignUp, responses=declared(409))
def sign_up(
    request: Request,
    body: rest.SignUpCreate,
    idempotency_key: Annotated[str | None, Header()] = None,
) -> Response:
    """A new organisation with its first user, key and trial credit. Needs no key."""
    deps: Deps = request.app.state.deps
    pace: Pace = request.app.state.pace
    asked = Asked.of(request, idempotency_key)
    actor = Actor(id="anonymous", address=asked.address)
    pace.take(
        f"sign-ups of {_network(asked.address)}",
        SIGN_UPS_PER_MINUTE,
        "{} sign-ups a minute come from one address",
    )

    def do(work: Work) -> rest.SignUp:
        is_given_out = _trials_given_out(work, deps)
        made = billing.sign_up(
            work,
            email=body.email,
            organisation_name=body.organisation_name,
            trial=Money(0, deps.currency) if is_given_out else deps.trial_credit,
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
            note=NO_TRIAL if is_given_out else None,
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


def _trials_given_out(work: Work, deps: Deps) -> bool:
    """Whether as many as get trial credit have come already. Sign-ups count, not credits: so it
    holds whatever the rate card says.
    """
    if deps.trial_credit is not None and deps.trial_credit.micros == 0:
        return False
    if deps.trials_per_day == 0:
        return True
    first = tenancy.find_nth_last_consumer(work.tx, deps.trials_per_day)
    return first is not None and first.created_at > work.now - TRIALS_WINDOW


def _network(address: str) -> str:
    """Whose address it is: of IPv6, a household has 2**64."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if found.version == 4:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False))
