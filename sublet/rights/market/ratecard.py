"""The rate card: TOML in, offers out. Pure.

An entry of the card prices a device-hour of a product on devices of a kind and model; it becomes
one offer for each of its shapes on each pool it matches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from functools import lru_cache
from typing import Literal

from sublet.base.kernel.errors import Invalid
from sublet.base.kernel.money import MICROS
from sublet.capacity.fleet import Pool
from sublet.capacity.fleet.facts import FactTable, read_facts
from sublet.rights.market.model import NoticeChoice, Offer, Product, priced

WHOLE_NODE = "node"
MAX_SHAPE = 1024
LEAST_PRICE = Decimal("0.00001")
"""Ten micros a device-hour: below it a step of 20 % would round to no step at all."""

SPOT_NOTICE_SECONDS = (30, 3600)
TRUSTED_NOTICE_SECONDS = 5
"""The shortest spot notice under trusted tenants."""
ON_DEMAND_NOTICE_SECONDS = (1800, 86_400)
FIRM_SECONDS = {Product.SPOT: 0, Product.ON_DEMAND: 3600}
FACTOR_PERMILLE = (100, 10_000)

Shape = int | Literal["node"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CardNotice:
    seconds: int
    factor_permille: int
    trusted_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CardOffer:
    """One entry of the card."""

    id: str
    product: Product
    device_kind: str
    device_model: str
    price_micros_per_device_hour: int
    shapes: tuple[Shape, ...]
    notices: tuple[CardNotice, ...]
    default_notice_seconds: int
    firm_seconds: int

    def matches(self, pool: Pool) -> bool:
        return (
            self.device_kind == pool.device_kind
            and self.device_model.lower() in pool.device_model.lower()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCard:
    version: int
    effective_from: datetime
    text: str
    offers: tuple[CardOffer, ...]

    def find(self, product: Product, pool: Pool) -> CardOffer | None:
        """The entry for a pool: the one with the longest model text that matches."""
        found = [o for o in self.offers if o.product is product and o.matches(pool)]
        return max(found, key=lambda o: len(o.device_model), default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stall:
    """A pool as the market sees it: how big its nodes are, who is fenced off from whom."""

    pool: Pool
    node_devices: int
    trusted_tenants: bool
    missing_fences: tuple[str, ...]


def offers_of(
    card: RateCard, stalls: Sequence[Stall], spot_micros: Mapping[str, int]
) -> list[Offer]:
    """All offers of a card on these pools; `spot_micros` are prices in force, by pool.

    The oldest pool that an entry fits has the plain id; the same entry on another pool carries
    that pool's name, so that an id never changes its meaning when pools are added.
    """
    offers: list[Offer] = []
    seen: set[str] = set()
    for stall in stalls:
        for product in (Product.SPOT, Product.ON_DEMAND):
            entry = card.find(product, stall.pool)
            if entry is None:
                continue
            suffix = f"@{stall.pool.name}" if entry.id in seen else ""
            seen.add(entry.id)
            base = entry.price_micros_per_device_hour
            if product is Product.SPOT:
                base = spot_micros.get(stall.pool.id, base)
            offers += _shaped(card, entry, stall, base, suffix)
    return offers


def _shaped(
    card: RateCard, entry: CardOffer, stall: Stall, base: int, suffix: str
) -> Iterable[Offer]:
    notices = tuple(
        NoticeChoice(seconds=n.seconds, factor_permille=n.factor_permille)
        for n in entry.notices
        if stall.trusted_tenants or not n.trusted_only
    )
    for shape in entry.shapes:
        is_whole = not isinstance(shape, int)
        devices = shape if isinstance(shape, int) else stall.node_devices
        if devices > stall.node_devices or (is_whole and stall.node_devices < 2):
            continue
        tail = "" if shape == 1 else f"-{shape}"
        yield Offer(
            id=f"{entry.id}{tail}{suffix}",
            product=entry.product,
            pool_id=stall.pool.id,
            site_id=stall.pool.site_id,
            device_kind=stall.pool.device_kind,
            device_model=stall.pool.device_model,
            memory_bytes=stall.pool.memory_bytes,
            devices=devices,
            whole_node=is_whole,
            base_micros_per_device_hour=base,
            notices=notices,
            default_notice_seconds=entry.default_notice_seconds,
            firm_seconds=entry.firm_seconds,
            card_version=card.version,
            outbound=stall.pool.outbound,
            scrub_seconds=stall.pool.scrub_seconds,
            trusted_tenants=stall.trusted_tenants,
            missing_fences=stall.missing_fences,
        )


def dearest_hour_micros(entries: Iterable[CardOffer]) -> int:
    """The dearest device-hour among entries that are sold by the single device, default notice."""
    prices = []
    for entry in entries:
        if 1 in entry.shapes:
            factor = next(
                n.factor_permille
                for n in entry.notices
                if n.seconds == entry.default_notice_seconds
            )
            prices.append(priced(entry.price_micros_per_device_hour, factor))
    return max(prices, default=0)


@lru_cache(maxsize=64)
def parse_rate_card(text: str) -> tuple[CardOffer, ...]:
    """Read a card. Raises Invalid that names the field and says what would be right.

    Every quote reads the card; a text read before is not read again.
    """
    root = read_facts(text, "rate card")
    root.only("currency", "offer")
    if root.text("currency", default="USD") != "USD":
        raise root.wrong("currency", "is USD")
    tables = root.tables("offer")
    entries = tuple(_entry(table) for table in tables)
    ids: set[str] = set()
    matches: set[tuple[Product, str, str]] = set()
    for table, entry in zip(tables, entries, strict=True):
        if entry.id in ids:
            raise table.wrong("id", f"is there twice: {entry.id!r}; ids are unique")
        match = (entry.product, entry.device_kind, entry.device_model.lower())
        if match in matches:
            raise table.wrong(
                "device_model",
                f"is priced already for {entry.product} on these devices: one entry for each",
            )
        ids.add(entry.id)
        matches.add(match)
    return entries


def _entry(table: FactTable) -> CardOffer:
    table.only(
        "id",
        "product",
        "device_kind",
        "device_model",
        "price_usd_per_device_hour",
        "shapes",
        "notices",
        "default_notice_seconds",
        "firm_seconds",
    )
    name = table.text("id", longest=60)
    if not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name) or not name[0].isalpha():
        raise table.wrong("id", "begins with a letter, then letters, digits, - _ and .")
    products = {str(p): p for p in FIRM_SECONDS}
    product = products.get(table.text("product"))
    if product is None:
        raise table.wrong("product", f"is one of {', '.join(products)}")
    kind = table.text("device_kind")
    if kind not in ("cpu", "gpu"):
        raise table.wrong("device_kind", 'is "cpu" or "gpu"')
    price = table.decimal(
        "price_usd_per_device_hour", low=LEAST_PRICE, high=Decimal(1_000_000), places=6
    )
    notices = _notices(table, product)
    default = table.whole("default_notice_seconds", low=1, high=ON_DEMAND_NOTICE_SECONDS[1])
    open_to_all = [n.seconds for n in notices if not n.trusted_only]
    if default not in open_to_all:
        raise table.wrong(
            "default_notice_seconds",
            "is one of the notices that are not `trusted_only`: "
            + (", ".join(map(str, open_to_all)) or "add one"),
        )
    firm = FIRM_SECONDS[product]
    if table.whole("firm_seconds", low=0, high=86_400, default=firm) != firm:
        raise table.wrong("firm_seconds", f"is {firm} for {product}: the product says so")
    return CardOffer(
        id=name,
        product=product,
        device_kind=kind,
        device_model=table.text("device_model", default=""),
        price_micros_per_device_hour=int(price * MICROS),
        shapes=_shapes(table),
        notices=notices,
        default_notice_seconds=default,
        firm_seconds=firm,
    )


def _shapes(table: FactTable) -> tuple[Shape, ...]:
    found: list[Shape] = []
    for index, value in enumerate(table.values("shapes")):
        if value != WHOLE_NODE and not (type(value) is int and 1 <= value <= MAX_SHAPE):
            raise table.wrong(
                f"shapes[{index}]", f'is a whole number from 1 to {MAX_SHAPE}, or "{WHOLE_NODE}"'
            )
        if value in found:
            raise table.wrong(f"shapes[{index}]", "is there twice")
        found.append(value)
    if not found:
        raise table.wrong("shapes", f'is a list such as [1, 2, 4, "{WHOLE_NODE}"]')
    return tuple(found)


def _notices(table: FactTable, product: Product) -> tuple[CardNotice, ...]:
    low, high = SPOT_NOTICE_SECONDS if product is Product.SPOT else ON_DEMAND_NOTICE_SECONDS
    found: list[CardNotice] = []
    for row in table.tables("notices"):
        row.only("seconds", "factor_permille", "trusted_only")
        trusted_only = row.flag("trusted_only")
        if trusted_only and product is not Product.SPOT:
            raise row.wrong("trusted_only", "is for spot")
        seconds = row.whole(
            "seconds", low=TRUSTED_NOTICE_SECONDS if trusted_only else low, high=high
        )
        if found and seconds <= found[-1].seconds:
            raise row.wrong("seconds", "rises from one notice to the next")
        factor = row.whole("factor_permille", low=FACTOR_PERMILLE[0], high=FACTOR_PERMILLE[1])
        if found and factor < found[-1].factor_permille:
            raise row.wrong("factor_permille", "does not fall: a longer notice is worth more")
        if product is Product.SPOT and factor < 1000:
            # The posted price is never below the floor, so neither may a factor take it there.
            raise row.wrong("factor_permille", "is at least 1000 for spot")
        found.append(CardNotice(seconds=seconds, factor_permille=factor, trusted_only=trusted_only))
    return tuple(found)


def in_force(cards: Sequence[RateCard], at: datetime) -> RateCard | None:
    """The card of an instant: of those that have begun, the one that began last, newest first."""
    begun = [card for card in cards if card.effective_from <= at]
    return max(begun, key=lambda card: (card.effective_from, card.version), default=None)


def check_effective_from(
    cards: Sequence[RateCard], effective_from: datetime, now: datetime
) -> None:
    """A card never changes a price of the past; only the very first may begin whenever it says."""
    if cards and effective_from < now:
        raise Invalid(
            f"`effective_from` is {now.isoformat()} or later: the past keeps its prices.",
            param="effective_from",
        )
