"""Cost facts: read from TOML, matched to pools, turned into the floor of the price. Pure.

Figures are exact: TOML's decimals are read as decimals, never as binary fractions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from fractions import Fraction

from sublet.base.kernel.errors import Invalid
from sublet.capacity.fleet.facts import FactTable, read_facts
from sublet.capacity.fleet.model import Cost, DeviceKind, Pool, Site


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteFacts:
    name: str
    region: str
    pue: Decimal
    tariff_micros_per_kwh: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """Facts for devices of a kind whose model's name contains `model` (empty: any)."""

    name: str
    kind: DeviceKind
    model: str
    purchase_micros: int
    residual_micros: int
    in_service_on: date
    life_months: int
    idle_watts: int
    busy_watts: int
    wear_micros_per_device_hour: int
    source: str

    def cost_of(self, pool: Pool) -> Cost:
        return Cost(
            pool_id=pool.id,
            name=self.name,
            purchase_micros=self.purchase_micros,
            residual_micros=self.residual_micros,
            in_service_on=self.in_service_on,
            life_months=self.life_months,
            idle_watts=self.idle_watts,
            busy_watts=self.busy_watts,
            wear_micros_per_device_hour=self.wear_micros_per_device_hour,
            source=self.source,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostSheet:
    sites: tuple[SiteFacts, ...]
    devices: tuple[DeviceFacts, ...]

    def site(self, name: str) -> SiteFacts:
        """The facts of a site by name; a site that is not named takes the first one's."""
        return next((s for s in self.sites if s.name == name), self.sites[0])


def matching(facts: Iterable[DeviceFacts], pool: Pool) -> DeviceFacts | None:
    """The facts for a pool's devices: same kind, the longest model text its model contains."""
    found = [
        f
        for f in facts
        if f.kind == pool.device_kind and f.model.lower() in pool.device_model.lower()
    ]
    return max(found, key=lambda f: len(f.model), default=None)


def floor_micros_per_device_hour(cost: Cost, site: Site) -> int:
    """Power × PUE + wear of a busy device for an hour, rounded up: below it a sale loses money."""
    kwh = Fraction(cost.busy_watts, 1000) * Fraction(site.pue)
    exact = kwh * site.tariff_micros_per_kwh + cost.wear_micros_per_device_hour
    return -(-exact.numerator // exact.denominator)


def parse_costs(text: str) -> CostSheet:
    """Read cost facts. Raises Invalid that names the field and says what would be right."""
    root = read_facts(text, "cost facts")
    root.only("currency", "site", "device")
    if root.text("currency", default="USD") != "USD":
        raise root.wrong("currency", "is USD")
    sites = tuple(_site(table) for table in root.tables("site"))
    devices = tuple(_device(table) for table in root.tables("device"))
    _unique("site", [s.name for s in sites])
    _unique("device", [d.name for d in devices])
    matches = [f"{d.kind} {d.model.lower()!r}" for d in devices]
    for index, match in enumerate(matches):
        if match in matches[:index]:
            raise Invalid(
                f"`device[{index}].model`: two entries match the same devices ({match}): keep one.",
                param=f"device[{index}].model",
            )
    return CostSheet(sites=sites, devices=devices)


def _unique(what: str, names: list[str]) -> None:
    for index, name in enumerate(names):
        if name in names[:index]:
            param = f"{what}[{index}].name"
            raise Invalid(f"`{param}`: {name!r} is there twice: names are unique.", param=param)


def _site(table: FactTable) -> SiteFacts:
    table.only("name", "region", "pue", "tariff_usd_per_kwh")
    pue = table.decimal("pue", low=Decimal(1), high=Decimal(5), places=3)
    return SiteFacts(
        name=table.text("name"),
        region=table.text("region", default=""),
        pue=pue,
        tariff_micros_per_kwh=table.micros("tariff_usd_per_kwh"),
    )


def _device(table: FactTable) -> DeviceFacts:
    table.only(
        "name",
        "kind",
        "model",
        "purchase_usd",
        "residual_usd",
        "in_service_on",
        "life_months",
        "idle_watts",
        "busy_watts",
        "wear_usd_per_device_hour",
        "source",
    )
    kind = table.text("kind")
    if kind not in ("cpu", "gpu"):
        raise table.wrong("kind", f'is "cpu" or "gpu", not {kind!r}')
    purchase = table.micros("purchase_usd")
    residual = table.micros("residual_usd")
    if residual > purchase:
        raise table.wrong("residual_usd", "is at most the purchase price")
    idle = table.whole("idle_watts", low=0, high=100_000)
    busy = table.whole("busy_watts", low=0, high=100_000)
    if idle > busy:
        raise table.wrong("idle_watts", "is at most `busy_watts`")
    return DeviceFacts(
        name=table.text("name"),
        kind="cpu" if kind == "cpu" else "gpu",
        model=table.text("model", default=""),
        purchase_micros=purchase,
        residual_micros=residual,
        in_service_on=table.day("in_service_on"),
        life_months=table.whole("life_months", low=1, high=600),
        idle_watts=idle,
        busy_watts=busy,
        wear_micros_per_device_hour=table.micros("wear_usd_per_device_hour"),
        source=table.text("source", longest=1000),
    )
