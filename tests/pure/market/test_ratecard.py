"""The rate card: every wrong value is named, and entries become offers on the pools they fit."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from sublet.base.kernel.errors import Invalid
from sublet.capacity.fleet import Pool
from sublet.rights.market.model import Product
from sublet.rights.market.prices import seed_rate_card
from sublet.rights.market.ratecard import (
    RateCard,
    Stall,
    check_effective_from,
    dearest_hour_micros,
    in_force,
    offers_of,
    parse_rate_card,
)

START = datetime(2026, 3, 2, 10, tzinfo=UTC)

CARD = """
[[offer]]
id = "cpu-spot"
product = "spot"
device_kind = "cpu"
price_usd_per_device_hour = 0.016
shapes = [1, 2, "node"]
default_notice_seconds = 120
notices = [
    { seconds = 5, factor_permille = 1000, trusted_only = true },
    { seconds = 30, factor_permille = 1000 },
    { seconds = 120, factor_permille = 1050 },
]
[[offer]]
id = "cpu-od"
product = "on_demand"
device_kind = "cpu"
price_usd_per_device_hour = 0.048
shapes = [1]
default_notice_seconds = 3600
notices = [
    { seconds = 1800, factor_permille = 950 },
    { seconds = 3600, factor_permille = 1000 },
]
"""


def a_pool(**fields: object) -> Pool:
    base = Pool(
        id="pol_1",
        site_id="sit_1",
        name="cpu",
        device_kind="cpu",
        device_model="EPYC",
        memory_bytes=8 << 30,
        head_room_percent=2,
        scrub_seconds=2,
        return_promise_seconds=152,
        outbound="none",
    )
    return replace(base, **fields)  # type: ignore[arg-type]


def a_stall(pool: Pool | None = None, *, devices: int = 4, trusted: bool = False) -> Stall:
    return Stall(
        pool=pool or a_pool(), node_devices=devices, trusted_tenants=trusted, missing_fences=()
    )


def a_card(text: str = CARD, version: int = 1, effective_from: datetime = START) -> RateCard:
    return RateCard(
        version=version,
        effective_from=effective_from,
        text=text,
        offers=parse_rate_card(text),
    )


@pytest.mark.parametrize(
    ("old", "new", "param"),
    [
        ('id = "cpu-spot"', "", "offer[0].id"),
        ('id = "cpu-spot"', 'id = "1st"', "offer[0].id"),
        ('id = "cpu-spot"', 'id = "a b"', "offer[0].id"),
        ('id = "cpu-od"', 'id = "cpu-spot"', "offer[1].id"),
        ('product = "spot"', 'product = "block"', "offer[0].product"),
        ('device_kind = "cpu"', 'device_kind = "tpu"', "offer[0].device_kind"),
        ("= 0.016", "= 0", "offer[0].price_usd_per_device_hour"),
        ("= 0.016", "= -1", "offer[0].price_usd_per_device_hour"),
        ("= 0.016", "= 0.0000001", "offer[0].price_usd_per_device_hour"),
        ("= 0.016", '= "cheap"', "offer[0].price_usd_per_device_hour"),
        ("= 0.016", "= inf", "offer[0].price_usd_per_device_hour"),
        ('[1, 2, "node"]', "[]", "offer[0].shapes"),
        ('[1, 2, "node"]', "4", "offer[0].shapes"),
        ('[1, 2, "node"]', "[1, 0]", "offer[0].shapes[1]"),
        ('[1, 2, "node"]', "[1, true]", "offer[0].shapes[1]"),
        ('[1, 2, "node"]', '["all"]', "offer[0].shapes[0]"),
        ('[1, 2, "node"]', "[2, 2]", "offer[0].shapes[1]"),
        ("default_notice_seconds = 120", "default_notice_seconds = 60", "offer[0].default_notice_seconds"),
        ("default_notice_seconds = 120", "default_notice_seconds = 5", "offer[0].default_notice_seconds"),
        ("seconds = 30,", "seconds = 10,", "offer[0].notices[1].seconds"),
        ("seconds = 5,", "seconds = 4,", "offer[0].notices[0].seconds"),
        ("seconds = 30,", "seconds = 150,", "offer[0].notices[2].seconds"),
        ("seconds = 1800,", "seconds = 600,", "offer[1].notices[0].seconds"),
        ("seconds = 1800,", "seconds = 90000,", "offer[1].notices[0].seconds"),
        ("factor_permille = 1050", "factor_permille = 990", "offer[0].notices[2].factor_permille"),
        ("factor_permille = 950", "factor_permille = 1100", "offer[1].notices[1].factor_permille"),
        ("factor_permille = 950", "factor_permille = 9.5", "offer[1].notices[0].factor_permille"),
        ("factor_permille = 950", "factor_permille = 950, trusted_only = true", "offer[1].notices[0].trusted_only"),
        ("trusted_only = true", 'trusted_only = "yes"', "offer[0].notices[0].trusted_only"),
        ("shapes = [1]", "shapes = [1]\nfirm_seconds = 60", "offer[1].firm_seconds"),
        ("shapes = [1]", "shapes = [1]\ncolour = 1", "offer[1].colour"),
        ("[[offer]]", 'currency = "EUR"\n[[offer]]', "currency"),
        ("[[offer]]", 'owner = "me"\n[[offer]]', "owner"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(old: str, new: str, param: str) -> None:
    assert old in CARD
    parse_rate_card(CARD)
    with pytest.raises(Invalid) as error:
        parse_rate_card(CARD.replace(old, new, 1))
    assert error.value.param == param
    assert f"`{param}`" in error.value.message


def test_what_is_no_card_is_refused() -> None:
    with pytest.raises(Invalid, match="not TOML"):
        parse_rate_card("[[offer")
    with pytest.raises(Invalid, match="at least one table"):
        parse_rate_card("")
    twin = CARD + CARD[: CARD.index('[[offer]]\nid = "cpu-od"')].replace("cpu-spot", "other")
    with pytest.raises(Invalid) as error:
        parse_rate_card(twin)
    assert error.value.param == "offer[2].device_model"


def test_shapes_that_a_node_does_not_have_are_not_offered() -> None:
    def ids(devices: int) -> list[str]:
        return [o.id for o in offers_of(a_card(), [a_stall(devices=devices)], {})]

    assert ids(4) == ["cpu-spot", "cpu-spot-2", "cpu-spot-node", "cpu-od"]
    assert ids(1) == ["cpu-spot", "cpu-od"]


def test_short_notice_is_sold_under_trusted_tenants_only() -> None:
    for trusted, seconds in ((False, [30, 120]), (True, [5, 30, 120])):
        spot = offers_of(a_card(), [a_stall(trusted=trusted)], {})[0]
        assert [n.seconds for n in spot.notices] == seconds


def test_price_follows_notice_and_the_posted_hour() -> None:
    spot, *_, on_demand = offers_of(a_card(), [a_stall()], {"pol_1": 20_000})
    assert spot.price_micros_per_device_hour() == 21_000
    assert spot.price_micros_per_device_hour(30) == 20_000
    assert on_demand.price_micros_per_device_hour(1800) == 45_600
    assert (spot.firm_seconds, on_demand.firm_seconds) == (0, 3600)


def test_an_offers_id_keeps_its_meaning_when_pools_are_added() -> None:
    far = a_pool(id="pol_2", site_id="sit_2", name="cpu-2")
    one = offers_of(a_card(), [a_stall()], {})
    two = offers_of(a_card(), [a_stall(), a_stall(far)], {})
    assert two[: len(one)] == one
    assert {o.id for o in two[len(one) :]} == {
        "cpu-spot@cpu-2", "cpu-spot-2@cpu-2", "cpu-spot-node@cpu-2", "cpu-od@cpu-2",
    }  # fmt: skip


def test_the_longest_model_wins() -> None:
    special = CARD.replace("cpu-", "epyc-").replace(
        'device_kind = "cpu"', 'device_kind = "cpu"\ndevice_model = "epyc"'
    )
    card = a_card(CARD + special)
    assert {o.id.split("-")[0] for o in offers_of(card, [a_stall()], {})} == {"epyc"}
    other = a_stall(a_pool(device_model="Xeon"))
    assert {o.id.split("-")[0] for o in offers_of(card, [other], {})} == {"cpu"}


def test_the_seed_offers_every_kind_with_the_promised_notices() -> None:
    card = a_card(seed_rate_card())
    for pool, devices in (
        (a_pool(), 8),
        (a_pool(device_kind="gpu", device_model="NVIDIA H100 80GB HBM3"), 8),
        (a_pool(device_kind="gpu", device_model="Unheard Of"), 2),
    ):
        offers = offers_of(card, [a_stall(pool, devices=devices, trusted=True)], {})
        by_product = {p: [o for o in offers if o.product is p] for p in Product}
        assert {o.devices for o in by_product[Product.SPOT]} >= {1, devices}
        spot, on_demand = by_product[Product.SPOT][0], by_product[Product.ON_DEMAND][0]
        assert [n.seconds for n in spot.notices] == [5, 30, 120, 600, 3600]
        assert [n.seconds for n in on_demand.notices] == [1800, 3600, 14_400, 86_400]
        assert spot.base_micros_per_device_hour < on_demand.base_micros_per_device_hour
        assert any(o.whole_node for o in offers)
    assert dearest_hour_micros(card.offers) == 3_590_000


def test_cards_follow_each_other_and_never_reach_back() -> None:
    later = a_card(version=2, effective_from=START + timedelta(hours=1))
    cards = [a_card(), later]
    assert in_force(cards, START - timedelta(seconds=1)) is None
    assert in_force(cards, START) is cards[0]
    assert in_force(cards, later.effective_from - timedelta(microseconds=1)) is cards[0]
    assert in_force(cards, later.effective_from) is later
    same = a_card(version=3, effective_from=START)
    assert in_force([*cards, same], START) is same
    now = START + timedelta(minutes=1)
    check_effective_from(cards, now, now)
    check_effective_from([], START, now)
    with pytest.raises(Invalid) as error:
        check_effective_from(cards, now - timedelta(microseconds=1), now)
    assert error.value.param == "effective_from"
