"""Rate cards, offers and posted spot prices, as the shell has them."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.resources import files

from sqlalchemy import Connection

from sublet.base.kernel.errors import Invalid
from sublet.base.kernel.money import Money
from sublet.base.kernel.price import DEVICE_HOUR_MS, PricePoint, Terms
from sublet.base.store import Work
from sublet.capacity import fleet
from sublet.rights.market import spotprice, store
from sublet.rights.market.model import (
    CURRENCY,
    NoRateCard,
    Offer,
    OfferNotFound,
    Product,
    RateCardLoaded,
    SpotPrice,
)
from sublet.rights.market.ratecard import (
    CardOffer,
    RateCard,
    Stall,
    check_effective_from,
    dearest_hour_micros,
    in_force,
    offers_of,
    parse_rate_card,
)


def seed_rate_card() -> str:
    """The rate card that comes with Sublet, as TOML to edit."""
    return files("sublet.rights.market").joinpath("rate_card.toml").read_text(encoding="utf-8")


def load_rate_card(work: Work, toml_text: str, effective_from: datetime) -> int:
    """Take a new version of the card, in force from `effective_from` on; returns its number.

    The past, quotes, contracts and posted hours keep their prices. The text of the newest version
    again is that version. Invalid names the field and says what would be right.
    """
    if effective_from.tzinfo is None:
        raise Invalid("`effective_from` needs a time zone, such as Z.", param="effective_from")
    cards = store.list_rate_cards(work.tx)
    offers = parse_rate_card(toml_text)
    if cards and cards[-1].text == toml_text and effective_from >= cards[-1].effective_from:
        return cards[-1].version
    check_effective_from(cards, effective_from, work.now)
    card = RateCard(
        version=len(cards) + 1,
        effective_from=effective_from.astimezone(UTC),
        text=toml_text,
        offers=offers,
    )
    store.insert_rate_card(work.tx, card, at=work.now, by=work.actor.id)
    work.emit(RateCardLoaded(card.version, card.effective_from))
    return card.version


def list_rate_cards(tx: Connection) -> list[RateCard]:
    """Every version, oldest first; those that begin later are among them."""
    return store.list_rate_cards(tx)


def get_rate_card(tx: Connection, now: datetime) -> RateCard:
    """The card in force. NoRateCard: none has begun."""
    card = in_force(store.list_rate_cards(tx), now)
    if card is None:
        raise NoRateCard()
    return card


def list_offers(tx: Connection, now: datetime) -> list[Offer]:
    """What is for sale now, at which price, by pool and product; none before a card is loaded."""
    card = in_force(store.list_rate_cards(tx), now)
    if card is None:
        return []
    stalls = _stalls(tx)
    posted = {s.pool.id: store.spot_price_at(tx, s.pool.id, now) for s in stalls}
    spot = {pool_id: row.micros for pool_id, row in posted.items() if row is not None}
    return offers_of(card, stalls, spot)


def get_offer(tx: Connection, offer_id: str, now: datetime) -> Offer:
    """OfferNotFound names what there is."""
    offers = list_offers(tx, now)
    for offer in offers:
        if offer.id == offer_id:
            return offer
    raise OfferNotFound(
        f"There is no offer {offer_id!r} now: list the offers to see which there are.",
        param="offer_id",
        offers=[offer.id for offer in offers],
    )


def dearest_one_device_hour(tx: Connection, now: datetime) -> Money:
    """An on-demand hour, at its default notice, of the dearest offer of a single device.

    Of what this fleet sells; where it sells nothing yet, of all that is on the card. Zero: no card.
    """
    card = in_force(store.list_rate_cards(tx), now)
    if card is None:
        return Money(0, CURRENCY)
    on_demand = [o for o in card.offers if o.product is Product.ON_DEMAND]
    pools = fleet.list_pools(tx)
    sold = [e for p in pools if (e := card.find(Product.ON_DEMAND, p)) and 1 in e.shapes]
    return Money(dearest_hour_micros(sold or on_demand), CURRENCY)


def post_spot_prices(work: Work, now: datetime) -> datetime:
    """Post every hour that is due, for each pool that sells spot; returns when to come again.

    Posted hours never change. Doing it twice is doing it once.
    """
    cards = store.list_rate_cards(work.tx)
    for pool in fleet.list_pools(work.tx):
        last = store.last_spot_price(work.tx, pool.id)
        floor = _floor(work.tx, pool)

        def market(
            hour: datetime, pool: fleet.Pool = pool, floor: int = floor
        ) -> spotprice.Market | None:
            entry = _spot_entry(cards, pool, max(hour, now))
            if entry is None:
                return None
            return spotprice.Market(bid=entry.price_micros_per_device_hour, floor=floor)

        store.insert_spot_prices(work.tx, spotprice.post(pool.id, last, now, market))
    return spotprice.next_posting_at(now)


def is_posted(tx: Connection, pool_id: str, now: datetime) -> bool:
    """Whether the hour that runs has a row of its own."""
    last = store.last_spot_price(tx, pool_id)
    return last is not None and now < last.hour + spotprice.HOUR


def list_spot_prices(
    tx: Connection, pool_id: str, start: datetime, end: datetime | None = None
) -> list[SpotPrice]:
    """Posted hours that begin in `[start, end)`; `end` None is all that is posted."""
    return store.list_spot_prices(tx, pool_id, start, end)


def spot_points(
    tx: Connection,
    pool_id: str,
    start: datetime,
    until: datetime | None,
    factor_permille: int = 1000,
    at_most: int | None = None,
) -> tuple[PricePoint, ...]:
    """Price points of a stretch: what was posted for its first hour, then each change.

    Empty where nothing was ever posted for the pool.
    """
    rows = store.list_spot_prices_from(tx, pool_id, start)
    if not rows:
        return ()
    wanted = [row for row in rows if until is None or row.hour < until]
    return spotprice.points_of(wanted or rows[:1], factor_permille, at_most)


def spot_terms(
    tx: Connection,
    pool_id: str,
    start: datetime,
    until: datetime | None = None,
    *,
    product: str = Product.FIRST_PARTY,
) -> Terms:
    """The posted price of a pool as terms, for use that has no contract. NoRateCard: none posted."""
    points = spot_points(tx, pool_id, start, until)
    if not points:
        raise NoRateCard("No spot price is posted for this pool yet: the owner loads a rate card.")
    return Terms(product=product, currency=CURRENCY, per=DEVICE_HOUR_MS, points=points)


def _spot_entry(cards: Sequence[RateCard], pool: fleet.Pool, hour: datetime) -> CardOffer | None:
    card = in_force(cards, hour)
    return None if card is None else card.find(Product.SPOT, pool)


def _floor(tx: Connection, pool: fleet.Pool) -> int:
    """Power × PUE + wear of the pool's devices; zero where the owner states no costs."""
    try:
        cost = fleet.get_cost(tx, pool.id)
    except fleet.CostFactsMissing:
        return 0
    return fleet.floor_micros_per_device_hour(cost, fleet.get_site(tx, pool.site_id))


def _stalls(tx: Connection) -> list[Stall]:
    """Pools that have devices, oldest first."""
    stalls = []
    for roster in fleet.list_rosters(tx):
        if not roster.devices:
            continue
        stalls.append(
            Stall(
                pool=roster.pool,
                node_devices=roster.largest_node,
                trusted_tenants=all(node.trusted_tenants for node in roster.nodes),
                missing_fences=roster.missing_fences,
            )
        )
    return stalls
