"""At which price: offers, posted prices, the rate card, cost facts, quotes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import Connection
from starlette.responses import Response

from sublet.base.kernel.errors import Invalid
from sublet.base.kernel.money import Money
from sublet.base.store import Work
from sublet.base.wire import rest
from sublet.capacity import fleet
from sublet.edge.api.call import Call, Caller, Poster
from sublet.edge.api.errors import declared
from sublet.edge.api.paging import After, Id, Limit, by_place
from sublet.edge.api.show import market as show
from sublet.edge.api.versions import Expected, demand, etag, show_version
from sublet.records.tenancy import Action
from sublet.rights import market

router = APIRouter(prefix="/v1", tags=["market"], responses=declared())

PoolQuery = Annotated[str | None, Query(pattern=rest.OWN_ID, description="Of this pool only.")]


@router.get("/offers")
def list_offers(call: Caller, after: After = None, limit: Limit = 100) -> rest.Page[rest.Offer]:
    """What is for sale now, at which price, with which notice."""
    call.require(Action.READ)
    with call.read() as tx:
        found = market.list_offers(tx, call.deps.store.clock.now())
    return by_place(found, after, limit, show.offer)


@router.get("/offers/{offer_id}")
def get_offer(call: Caller, offer_id: Id) -> rest.Offer:
    call.require(Action.READ)
    with call.read() as tx:
        return show.offer(market.get_offer(tx, offer_id, call.deps.store.clock.now()))


@router.get("/prices")
def list_prices(
    call: Caller, pool_id: PoolQuery = None, after: After = None, limit: Limit = 100
) -> rest.Page[rest.SpotPrice]:
    """Posted spot prices by the hour, from the hour that runs to the last one posted."""
    call.require(Action.READ)
    now = call.deps.store.clock.now()
    hour = now.replace(minute=0, second=0, microsecond=0)
    with call.read() as tx:
        pools = [fleet.get_pool(tx, pool_id)] if pool_id else fleet.list_pools(tx)
        found = [row for pool in pools for row in market.list_spot_prices(tx, pool.id, hour)]
    currency = call.deps.currency
    return by_place(found, after, limit, lambda row: show.spot_price(row, currency))


@router.get("/rate-card")
def get_rate_card(call: Caller, response: Response) -> rest.RateCard:
    """The version in force. The ETag is that of the newest version, which may begin later."""
    call.require(Action.READ)
    with call.read() as tx:
        found = market.get_rate_card(tx, call.deps.store.clock.now())
        newest = market.list_rate_cards(tx)[-1].version
    show_version(response, newest)
    return show.rate_card(found, newest)


@router.put("/rate-card", response_model=rest.RateCard, responses=declared(412, 428))
def put_rate_card(call: Caller, body: rest.RateCardPut, expected: Expected) -> Response:
    """A new version. What is posted, quoted or agreed keeps its price. The first: `"0"`."""

    def do(work: Work) -> rest.RateCard:
        call.require(Action.SET_PRICES)
        before = market.list_rate_cards(work.tx)
        demand(expected, before[-1].version if before else 0)
        version = market.load_rate_card(work, body.text, body.effective_from or work.now)
        cards = market.list_rate_cards(work.tx)
        [made] = [card for card in cards if card.version == version]
        return show.rate_card(made, cards[-1].version)

    return call.act(
        "load_rate_card",
        do,
        target="rate_card",
        headers=lambda made: {"etag": etag(made.newest_version)},
    )


@router.get("/rate-card/versions")
def list_rate_cards(
    call: Caller, after: After = None, limit: Limit = 100
) -> rest.Page[rest.RateCard]:
    """Every version, oldest first; those that begin later are among them."""
    call.require(Action.READ)
    with call.read() as tx:
        found = market.list_rate_cards(tx)
    newest = found[-1].version if found else 0
    return by_place(found, after, limit, lambda card: show.rate_card(card, newest))


@router.get("/cost-facts")
def list_cost_facts(
    call: Caller, after: After = None, limit: Limit = 100
) -> rest.Page[rest.CostFacts]:
    """What each pool's devices cost the owner, and where the figures come from."""
    call.require(Action.READ_BOOKS)
    with call.read() as tx:
        found = _cost_facts(call, tx)
    return by_place(found, after, limit, lambda facts: facts)


@router.put("/cost-facts", response_model=rest.Page[rest.CostFacts])
def put_cost_facts(call: Caller, body: rest.CostFactsPut) -> Response:
    """All cost facts anew, as TOML. They hold for the past as well."""

    def do(work: Work) -> rest.Page[rest.CostFacts]:
        call.require(Action.ADMINISTER_FLEET)
        fleet.load_costs(work, body.text)
        return rest.Page(data=_cost_facts(call, work.tx), next=None)

    return call.act("load_cost_facts", do, target="cost_facts")


def _cost_facts(call: Call, tx: Connection) -> list[rest.CostFacts]:
    found = []
    for cost in fleet.list_costs(tx):
        site = fleet.get_site(tx, fleet.get_pool(tx, cost.pool_id).site_id)
        found.append(show.cost_facts(cost, site, call.deps.currency))
    return found


@router.post("/quotes", status_code=201, response_model=rest.Quote, responses=declared(409))
def create_quote(call: Poster, body: rest.QuoteCreate) -> Response:
    """A price that stands for five minutes, with every term that goes with it."""

    def do(work: Work) -> rest.Quote:
        return show.quote(quoted(call, work, body))

    return call.act("create_quote", do, needs=Action.RENT, status=201)


def quoted(call: Call, work: Work, terms: rest.QuoteCreate) -> market.Quote:
    """The market's quote for these terms. Raises what it refuses, by the names of this API."""
    limit = terms.max_price_micros_per_device_hour
    try:
        return market.quote(
            work,
            call.identity,
            offer_id=terms.offer_id,
            count=terms.count,
            duration_seconds=terms.duration_seconds,
            notice_seconds=terms.notice_seconds,
            max_price=None if limit is None else Money(limit, call.deps.currency),
            stop_grace_seconds=terms.stop_grace_seconds,
            project_id=terms.project_id,
        )
    except Invalid as wrong:
        if wrong.param != "max_price":
            raise
        name = "max_price_micros_per_device_hour"
        message = wrong.message.replace("`max_price`", f"`{name}`")
        raise Invalid(message, param=name, **wrong.details) from None


@router.get("/quotes/{quote_id}")
def get_quote(call: Caller, quote_id: Id) -> rest.Quote:
    call.require(Action.READ)
    with call.read() as tx:
        return show.quote(market.get_quote(tx, quote_id, call.identity))
