"""The market on a database: cards, spot prices, quotes, contracts, settlement, budgets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Connection

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.errors import Forbidden, Invalid
from sublet.base.kernel.ids import SeededIds
from sublet.base.kernel.money import Money
from sublet.base.store import Actor, Store, metadata, open_store
from sublet.base.store.work import Work
from sublet.capacity import fleet
from sublet.capacity.allocation import DisplacementRule, Party, Rank, Urgency
from sublet.capacity.engines.port import FENCES, Device, Fence, Inventory
from sublet.records import ledger, metering, tenancy
from sublet.rights import market
from sublet.rights.market.model import Closed, ContractState

START = datetime(2026, 3, 2, 10, 20, tzinfo=UTC)
SYSTEM = Actor.system("test")
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)


class World:
    """A cloud of one four-CPU machine, its owner, and one customer with credit."""

    def __init__(self, store: Store, clock: VirtualClock) -> None:
        self.store, self.clock = store, clock
        self._runs = 0
        with self.work() as work:
            self.node = fleet.enrol(work, an_inventory(), site_name="home", trusted_tenants=False)
            market.load_rate_card(work, market.seed_rate_card(), work.now)
            market.post_spot_prices(work, work.now)
            self.owner = an_identity(work, "owner", kind="owner")
            self.buyer = an_identity(work, "buyer")
            self.give(work, self.buyer, "100")

    def work(self) -> AbstractContextManager[Work]:
        return self.store.work(SYSTEM)

    def read(self) -> AbstractContextManager[Connection]:
        return self.store.read()

    def give(self, work: Work, identity: tenancy.Identity, amount: str) -> None:
        ledger.post(
            work,
            key=work.ids.new("gift"),
            debit=ledger.PAYMENTS,
            credit=ledger.customer_account(identity.organisation.id),
            amount=Money.parse(amount),
            kind="payment",
            organisation_id=identity.organisation.id,
        )

    def rent(
        self, offer_id: str, identity: tenancy.Identity | None = None, **terms: object
    ) -> market.Contract:
        """Quote and accept at once."""
        who = identity or self.buyer
        self._runs += 1
        with self.work() as work:
            quote = market.quote(work, who, offer_id=offer_id, **terms)  # type: ignore[arg-type]
            return market.accept(work, who, quote.id, subject=f"ins_{self._runs}")

    def open(self, contract: market.Contract, run_id: str = "run_1") -> str:
        with self.work() as work:
            metering.open_meter(
                work,
                run_id=run_id,
                workload_id=contract.subject,
                organisation_id=contract.organisation_id,
                project_id=contract.project_id,
                contract_id=contract.id,
                pool_id=contract.pool_id,
                node_id=self.node.id,
                devices=contract.units,
                party="first_party" if contract.is_first_party else "sale",
                opened_at=work.now,
            )
        return run_id

    def until(self, at: datetime) -> None:
        """The market's loop and the clock, to that instant."""
        while (due := market.step(self.store, self.clock.now())) < at:
            self.clock.advance_to(due)
        self.clock.advance_to(at)
        market.step(self.store, at)

    def settle(self, contract: market.Contract, run_id: str) -> Money:
        with self.work() as work:
            metering.advance(work, run_id, to=work.now)
            return market.settle(work, contract.id)

    def close(self, contract: market.Contract, run_id: str, **ended: object) -> tuple[Money, Money]:
        """Close the meter now and settle; usage and credit of the whole contract."""
        with self.work() as work:
            meter = metering.close_meter(work, run_id, at=work.now, reason=str(ended["reason"]))
            assert meter.closed_at is not None
            closed = Closed(
                opened_at=meter.opened_at,
                closed_at=meter.closed_at,
                **{"t0": None, **ended},  # type: ignore[arg-type]
            )
            market.settle(work, contract.id, closed=closed)
            before = ledger.trial_balance(work.tx), self.posted(work, contract)
            market.settle(work, contract.id, closed=closed)
            assert (ledger.trial_balance(work.tx), self.posted(work, contract)) == before
            return before[1]

    @staticmethod
    def posted(work: Work, contract: market.Contract) -> tuple[Money, Money]:
        usage = ledger.posted(work.tx, contract.id, market.USAGE)
        return usage, -ledger.posted(work.tx, contract.id, market.INTERRUPTION_CREDIT)


def an_inventory(*, weak: tuple[str, ...] = (), devices: int = 4) -> Inventory:
    return Inventory(
        node="here",
        devices=tuple(
            Device(name=f"cpu{n}", kind="cpu", model="EPYC", memory_bytes=8 << 30)
            for n in range(devices)
        ),
        disk_bytes=1 << 40,
        fences={
            name: Fence(
                strength="none" if name in weak else "enforced",
                by="probe",
                evidence="held",
                remedy="install bubblewrap" if name in weak else "",
            )
            for name in FENCES
        },
        outbound="pasta",
        boot_id="boot-1",
    )


def an_identity(
    work: Work, name: str, *, kind: str = "consumer", standing: str = "good", max_devices: int | None = None
) -> tenancy.Identity:  # fmt: skip
    organisation = tenancy.create_organisation(work, name=name, kind=kind, standing=standing)
    project = tenancy.create_project(work, organisation.id, "main")
    person = tenancy.create_principal(
        work, organisation.id, kind="user", name=name, email=f"{name}@example.org", role="admin"
    )
    _, secret = tenancy.create_key(
        work,
        person.id,
        name="first",
        project_id=project.id if kind == "consumer" else None,
        limits=tenancy.Limits(max_devices=max_devices),
    )
    return tenancy.authenticate(work.tx, secret, work.now)


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(START)


@pytest.fixture
def world(tmp_path: Path, clock: VirtualClock) -> Iterator[World]:
    opened = open_store(f"sqlite:///{tmp_path}/sublet.db", clock, SeededIds(1))
    metadata.create_all(opened.engine)
    yield World(opened, clock)
    opened.close()


def dearer(text: str, factor: int) -> str:
    """The seed card with the CPU prices times `factor`."""
    return text.replace("= 0.016", f"= {0.016 * factor:.6f}").replace(
        "= 0.048", f"= {0.048 * factor:.6f}"
    )


# Rate cards and offers


def test_offers_of_the_machine(world: World) -> None:
    with world.read() as tx:
        offers = {o.id: o for o in market.list_offers(tx, START)}
        assert list(offers) == [
            f"cpu-{product}{shape}"
            for product in ("spot", "on-demand")
            for shape in ("", "-2", "-4", "-node")
        ]
        assert offers["cpu-spot"].price_micros_per_device_hour(30) == 16_000
        assert offers["cpu-spot-node"].devices == 4
        assert market.dearest_one_device_hour(tx, START) == Money(48_000)
        with pytest.raises(market.OfferNotFound) as error:
            market.get_offer(tx, "tpu", START)
        assert "cpu-spot" in error.value.details["offers"]


def test_a_card_holds_from_its_instant_and_the_same_text_is_the_same_card(world: World) -> None:
    seed = market.seed_rate_card()
    with world.work() as work:
        assert market.load_rate_card(work, seed, work.now) == 1
        assert market.load_rate_card(work, dearer(seed, 2), START + HOUR) == 2
        assert [c.version for c in market.list_rate_cards(work.tx)] == [1, 2]
        for at, micros in ((START + HOUR - MINUTE, 48_000), (START + HOUR, 96_000)):
            offer = market.get_offer(work.tx, "cpu-on-demand", at)
            assert offer.price_micros_per_device_hour() == micros
        with pytest.raises(Invalid, match="the past keeps its prices"):
            market.load_rate_card(work, dearer(seed, 3), START - MINUTE)
        with pytest.raises(Invalid) as error:
            market.load_rate_card(work, seed.replace("0.016", "-1"), work.now)
        assert error.value.param == "offer[0].price_usd_per_device_hour"


# Posted prices


def test_spot_goes_to_a_new_card_by_steps_told_in_time(world: World) -> None:
    with world.work() as work:
        market.load_rate_card(work, dearer(market.seed_rate_card(), 2), work.now)
    world.until(START + 12 * HOUR)
    with world.read() as tx:
        rows = market.list_spot_prices(tx, world.node.pool_id, START - HOUR)
        assert {b.hour - a.hour for a, b in itertools.pairwise(rows)} == {HOUR}
        assert [r.micros for r in rows][:6] == [16_000, 16_000, 19_200, 23_040, 27_648, 32_000]
        assert all(r.micros >= r.floor_micros > 0 for r in rows)
        assert all(
            after.posted_at <= after.hour - timedelta(seconds=4200)
            for before, after in itertools.pairwise(rows)
            if before.micros != after.micros
        )


def test_a_cloud_that_was_down_raises_no_price_without_telling(world: World) -> None:
    with world.work() as work:
        market.load_rate_card(work, dearer(market.seed_rate_card(), 2), work.now)
    world.clock.advance_to(START + 30 * HOUR)
    market.step(world.store, world.clock.now())
    with world.read() as tx:
        rows = market.list_spot_prices(tx, world.node.pool_id, world.clock.now() - HOUR)
        assert [r.micros for r in rows[:2]] == [16_000, 16_000]


# Quotes


def test_a_quote_states_every_term(world: World) -> None:
    with world.work() as work:
        quote = market.quote(
            work,
            world.buyer,
            offer_id="cpu-spot-2",
            count=1,
            duration_seconds=1800,
            notice_seconds=30,
            max_price=Money(20_000),
        )
        assert market.get_quote(work.tx, quote.id, world.buyer) == quote
    assert quote.expires_at == START + 5 * MINUTE
    assert quote.total == Money(16_000)  # 2 devices × half an hour × 0.016
    assert sum(line.amount.micros for line in quote.lines) == quote.total_micros
    assert quote.is_exact
    assert quote.exact_until == START.replace(minute=0) + 2 * HOUR
    assert (quote.notice_seconds, quote.firm_seconds) == (30, 0)
    assert quote.hold == Money(8_000)  # 15 minutes of two devices
    assert "first 10 minutes" in quote.credit_rule
    assert (quote.outbound, quote.missing_fences) == ("pasta", ())
    assert quote.project_id == world.buyer.project_id


def test_a_long_spot_quote_says_where_it_stops_being_exact(world: World) -> None:
    with world.work() as work:
        spot = market.quote(work, world.buyer, offer_id="cpu-spot", duration_seconds=86_400)
        firm = market.quote(work, world.buyer, offer_id="cpu-on-demand", duration_seconds=86_400)
    assert not spot.is_exact
    assert firm.is_exact
    assert firm.exact_until is None
    assert firm.total == Money(24 * 48_000)
    # notice 3600 + grace 30 + scrub 2 seconds of 0.048
    assert firm.hold == Money(48_427)
    assert firm.hold_seconds == 3632


@pytest.mark.parametrize(
    ("terms", "param"),
    [
        ({"count": 0}, "count"),
        ({"count": 1001}, "count"),
        ({"duration_seconds": 0}, "duration_seconds"),
        ({"notice_seconds": 5}, "notice_seconds"),
        ({"notice_seconds": 7200}, "notice_seconds"),
        ({"stop_grace_seconds": 601}, "stop_grace_seconds"),
        ({"stop_grace_seconds": -1}, "stop_grace_seconds"),
        ({"max_price": Money(15_000)}, "max_price"),
        ({"max_price": Money(99_000, "EUR")}, "max_price"),
        ({"offer_id": "cpu-on-demand", "max_price": Money(99_000)}, "max_price"),
    ],
)
def test_a_wrong_wish_is_named(world: World, terms: dict[str, object], param: str) -> None:
    with world.work() as work, pytest.raises(Invalid) as error:
        market.quote(work, world.buyer, **{"offer_id": "cpu-spot", **terms})  # type: ignore[arg-type]
    assert error.value.param == param
    assert f"`{param}`" in error.value.message


def test_strangers_are_refused_where_they_are_not_fenced_off(world: World) -> None:
    weak = an_inventory(weak=("network",))
    with world.work() as work:
        fleet.enrol(work, weak, site_name="home", trusted_tenants=False)
        with pytest.raises(market.FencesMissing, match="install bubblewrap"):
            market.quote(work, world.buyer, offer_id="cpu-spot")
        assert market.quote(work, world.owner, offer_id="cpu-spot").missing_fences == ("network",)
        fleet.enrol(work, weak, site_name="home", trusted_tenants=True)
        trusted = market.quote(work, world.buyer, offer_id="cpu-spot", notice_seconds=5)
        assert (trusted.trusted_tenants, trusted.missing_fences) == (True, ("network",))


def test_another_organisations_quote_does_not_exist(world: World) -> None:
    with world.work() as work:
        other = an_identity(work, "other")
        quote = market.quote(work, world.buyer, offer_id="cpu-spot")
        with pytest.raises(market.QuoteNotFound):
            market.get_quote(work.tx, quote.id, other)
        with pytest.raises(market.QuoteNotFound):
            market.accept(work, other, quote.id, subject="ins_x")
        with pytest.raises(tenancy.ProjectNotFound):
            market.quote(work, world.buyer, offer_id="cpu-spot", project_id=other.project_id)
        with pytest.raises(tenancy.ProjectNotFound):
            market.quote(work, world.owner, offer_id="cpu-spot", project_id=other.project_id)


# F13


def test_a_quote_keeps_its_price_for_five_minutes(world: World) -> None:
    with world.work() as work:
        quotes = [
            market.quote(work, world.buyer, offer_id="cpu-on-demand", duration_seconds=600)
            for _ in range(2)
        ]
    world.clock.advance_to(START + 3 * MINUTE)
    with world.work() as work:
        market.load_rate_card(work, dearer(market.seed_rate_card(), 3), work.now)
        fresh = market.quote(work, world.buyer, offer_id="cpu-on-demand")
        assert fresh.points[0].micros == 144_000
    world.clock.advance_to(START + timedelta(minutes=4, seconds=59))
    with world.work() as work:
        contract = market.accept(work, world.buyer, quotes[0].id, subject="ins_1")
        assert market.terms_of(work.tx, contract, None).points[0].micros == 48_000
        assert market.accept(work, world.buyer, quotes[0].id, subject="ins_1") == contract
        with pytest.raises(market.QuoteAccepted) as taken:
            market.accept(work, world.buyer, quotes[0].id, subject="ins_2")
        assert taken.value.code == "quote_accepted"
    world.clock.advance_to(START + timedelta(minutes=5, seconds=1))
    with world.work() as work:
        # The retry of the same workload is the same contract; anything else is too late.
        assert market.accept(work, world.buyer, quotes[0].id, subject="ins_1") == contract
        for quote_id in (quotes[0].id, quotes[1].id):
            with pytest.raises(market.QuoteExpired) as late:
                market.accept(work, world.buyer, quote_id, subject="ins_2")
            assert late.value.code == "quote_expired"


def test_a_quote_expires_at_its_fifth_minute_and_not_before(world: World) -> None:
    with world.work() as work:
        quotes = [market.quote(work, world.buyer, offer_id="cpu-spot") for _ in range(2)]
    world.clock.advance_to(START + 5 * MINUTE - timedelta(microseconds=1))
    with world.work() as work:
        market.accept(work, world.buyer, quotes[0].id, subject="ins_1")
    world.clock.advance_to(START + 5 * MINUTE)
    with world.work() as work, pytest.raises(market.QuoteExpired):
        market.accept(work, world.buyer, quotes[1].id, subject="ins_2")


@pytest.mark.parametrize("rounds", [1, 7])
@pytest.mark.parametrize("offer_id", ["cpu-on-demand", "cpu-on-demand-node"])
def test_what_was_quoted_is_what_is_posted_across_a_months_end(
    world: World, rounds: int, offer_id: str
) -> None:
    begin = datetime(2026, 3, 31, 23, 17, 3, 123_000, tzinfo=UTC)
    seconds = 7_777
    world.until(begin)
    with world.work() as work:
        quote = market.quote(work, world.buyer, offer_id=offer_id, duration_seconds=seconds)
        contract = market.accept(work, world.buyer, quote.id, subject="ins_1")
    run = world.open(contract)
    posted = 0
    for number in range(1, rounds):
        world.until(begin + timedelta(seconds=number * seconds / rounds))
        posted += world.settle(contract, run).micros
    world.clock.advance_to(begin + timedelta(seconds=seconds))
    usage, credited = world.close(contract, run, reason="user")
    assert usage == quote.total
    assert credited == Money(0)
    assert posted <= usage.micros
    assert len(quote.lines) == 2
    with world.read() as tx:
        transfers = ledger.list_transfers(
            tx, contract.organisation_id, begin, world.clock.now() + MINUTE
        )
        april = datetime(2026, 4, 1, tzinfo=UTC)
        assert len(transfers) >= 2
        for transfer in transfers:
            assert transfer.kind == market.USAGE
            assert transfer.starts_at < transfer.ends_at  # type: ignore[operator]
            assert not transfer.starts_at < april < transfer.ends_at  # type: ignore[operator]
        for line in quote.lines:
            mine = [t for t in transfers if (t.starts_at >= april) == (line.start >= april)]  # type: ignore[operator]
            assert sum(t.amount_micros for t in mine) == line.amount.micros
            assert sum(t.detail["quantity"] for t in mine) == line.quantity


def test_spot_for_posted_hours_is_what_was_quoted(world: World) -> None:
    with world.work() as work:
        market.load_rate_card(work, dearer(market.seed_rate_card(), 2), work.now)
    world.until(START + 3 * HOUR)
    with world.work() as work:
        quote = market.quote(work, world.buyer, offer_id="cpu-spot", duration_seconds=4_000)
        contract = market.accept(work, world.buyer, quote.id, subject="ins_1")
    assert quote.is_exact
    assert len({line.price_micros for line in quote.lines}) == 2
    run = world.open(contract)
    world.until(world.clock.now() + timedelta(seconds=4_000))
    assert world.close(contract, run, reason="user") == (quote.total, Money(0))


# M4


def test_the_price_in_force_at_use_is_posted_and_corrections_follow_it(world: World) -> None:
    """Field case M4, with spot's steps: two lines across the change; −600 s at the first's price."""
    with world.work() as work:
        market.load_rate_card(work, dearer(market.seed_rate_card(), 2), work.now)
    world.until(START.replace(hour=11, minute=30))
    contract = world.rent("cpu-spot", notice_seconds=30)
    run = world.open(contract)
    world.until(START.replace(hour=12, minute=30))
    assert world.settle(contract, run) == Money(8_000 + 9_600)
    world.clock.advance_to(START + timedelta(days=1))
    with world.work() as work:
        # 11:40–11:50 was wrong, found a day later: −600 s at 0.016, not at the day's price.
        [usage] = metering.list_usage(work.tx, run)
        metering.correct(
            work,
            run_id=run,
            starts_at=START.replace(hour=11, minute=40),
            ends_at=START.replace(hour=11, minute=50),
            devices=-1,
            corrects=usage.event_id,
            event_id="fix-1",
        )
        assert market.settle(work, contract.id) == Money(-2_667)
        assert market.settle(work, contract.id) == Money(0)
        last = ledger.list_transfers(work.tx, contract.organisation_id, START, work.now + HOUR)[-1]
        assert (last.debit, last.kind) == ("revenue:spot", market.USAGE)
        assert last.detail["quantity"] == -600_000
        assert last.detail["price_micros"] == 16_000
        assert last.ends_at == START.replace(hour=12, minute=0)


# Holds and budgets


def test_accepting_takes_the_hold_and_settling_shrinks_it(world: World) -> None:
    contract = world.rent("cpu-on-demand")
    org = contract.organisation_id
    with world.read() as tx:
        hold = ledger.find_hold(tx, contract.subject)
        assert hold is not None
        assert hold.amount == Money(48_427)
        assert hold.expires_at == START + timedelta(seconds=3632)
        assert ledger.available(tx, org) == Money.parse("100") - hold.amount
    run = world.open(contract)
    world.clock.advance_to(START + 15 * MINUTE)
    assert world.settle(contract, run) == Money(12_000)
    with world.work() as work:
        left = ledger.find_hold(work.tx, contract.subject)
        assert left is not None
        assert (left.amount, left.expires_at) == (Money(36_427), hold.expires_at)
        assert ledger.available(work.tx, org) == Money.parse("100") - hold.amount
        until = START + 3 * HOUR
        assert market.cover(work, contract.id, until)
        wide = ledger.find_hold(work.tx, contract.subject)
        assert wide is not None
        # From 10:35 to 13:20 at 0.048, and a micro.
        assert (wide.amount, wide.expires_at) == (Money(132_001), until)
        ended = market.end_contract(work, contract.id)
        assert ended.state is ContractState.ENDED
        assert market.end_contract(work, contract.id) == ended
        assert ledger.find_hold(work.tx, contract.subject) is None
        with pytest.raises(market.ContractOver):
            market.rehold(work, contract.id)


def test_cover_says_no_when_credit_is_missing_and_changes_nothing(world: World) -> None:
    contract = world.rent("cpu-on-demand")
    world.open(contract)
    with world.work() as work:
        before = ledger.find_hold(work.tx, contract.subject)
        assert not market.cover(work, contract.id, START + timedelta(days=365))
        assert ledger.find_hold(work.tx, contract.subject) == before


def test_a_hold_covers_what_a_run_costs_to_the_last_micro(world: World) -> None:
    """All the credit there is is one hold: running it out in odd pieces never overdraws."""
    with world.work() as work:
        poor = an_identity(work, "poor")
        quote = market.quote(work, poor, offer_id="cpu-spot", notice_seconds=3600)
        world.give(work, poor, str(quote.hold).split()[0])
        contract = market.accept(work, poor, quote.id, subject="ins_p")
        assert ledger.available(work.tx, poor.organisation.id) == Money(0)
    run = world.open(contract)
    for second in (1, 7, 1234, 2399, 2400, 2401, 3632):
        world.until(START + timedelta(seconds=second))
        world.settle(contract, run)
    usage, _ = world.close(contract, run, reason="credit_exhausted")
    assert Money(0) <= quote.hold - usage <= Money(2)


def test_without_credit_nothing_is_agreed(world: World) -> None:
    with world.work() as work:
        poor = an_identity(work, "poor")
        quote = market.quote(work, poor, offer_id="cpu-spot")
    with pytest.raises(ledger.InsufficientCredit), world.work() as work:
        market.accept(work, poor, quote.id, subject="ins_p")
    with world.work() as work:
        assert market.find_contract_of(work.tx, "ins_p") is None
        assert market.get_quote(work.tx, quote.id).contract_id is None


def test_a_new_run_under_the_contract_takes_a_new_hold(world: World) -> None:
    contract = world.rent("cpu-spot")
    run = world.open(contract)
    world.clock.advance_to(START + 5 * MINUTE)
    world.close(contract, run, reason="owner_recall", t0=START + MINUTE)
    with world.work() as work:
        assert ledger.find_hold(work.tx, contract.subject) is None
        market.rehold(work, contract.id)
        hold = ledger.find_hold(work.tx, contract.subject)
        assert hold is not None
        market.rehold(work, contract.id)
        assert ledger.find_hold(work.tx, contract.subject) == hold


@pytest.mark.parametrize("scope", ["organisation", "project", "key"])
def test_a_daily_budget_opens_at_midnight_utc(world: World, scope: str) -> None:
    """Field case M3: refused up to the last microsecond of the window, and not after it."""
    ids = {
        "organisation": world.buyer.organisation.id,
        "project": world.buyer.project_id,
        "key": world.buyer.key.id,
    }
    with world.work() as work:
        limit = market.quote(work, world.buyer, offer_id="cpu-on-demand").hold
        tenancy.set_budget(
            work,
            tenancy.Budget(
                scope_kind=tenancy.ScopeKind(scope),
                scope_id=str(ids[scope]),
                period="day",
                limit_micros=limit.micros,
            ),
        )
    contract = world.rent("cpu-on-demand")
    run = world.open(contract)
    world.clock.advance_to(START + HOUR)
    world.close(contract, run, reason="user")
    midnight = datetime(2026, 3, 3, tzinfo=UTC)
    world.clock.advance_to(midnight - timedelta(microseconds=1))
    with pytest.raises(market.BudgetExceeded) as error:
        world.rent("cpu-on-demand")
    assert isinstance(error.value, Forbidden)
    assert error.value.details["resets_at"] == midnight.isoformat()
    assert (error.value.details["scope"], error.value.details["period"]) == (scope, "day")
    world.clock.advance_to(midnight)
    world.rent("cpu-on-demand")


@pytest.mark.parametrize(
    ("period", "opens"),
    [
        ("week", datetime(2026, 3, 9, tzinfo=UTC)),
        ("month", datetime(2026, 4, 1, tzinfo=UTC)),
        ("lifetime", None),
    ],
)
def test_weeks_begin_on_monday_and_a_lifetime_never_ends(
    world: World, period: str, opens: datetime | None
) -> None:
    with world.work() as work:
        tenancy.set_budget(
            work,
            tenancy.Budget(
                scope_kind=tenancy.ScopeKind.ORGANISATION,
                scope_id=world.buyer.organisation.id,
                period=period,  # type: ignore[arg-type]
                limit_micros=1,
            ),
        )
    with pytest.raises(market.BudgetExceeded) as error:
        world.rent("cpu-spot")
    assert error.value.details["resets_at"] == (opens.isoformat() if opens else None)


def test_limits_of_key_and_standing_hold_at_acceptance(world: World) -> None:
    with world.work() as work:
        small = an_identity(work, "small", max_devices=2)
        fresh = an_identity(work, "fresh", standing="unverified")
        shut = an_identity(work, "shut", standing="suspended")
        for who in (small, fresh):
            world.give(work, who, "10")
    first = world.rent("cpu-spot-2", small)
    with pytest.raises(tenancy.QuotaExceeded):
        world.rent("cpu-spot", small)
    with world.work() as work:
        market.end_contract(work, first.id)
    world.rent("cpu-spot", small)
    with pytest.raises(tenancy.QuotaExceeded):
        world.rent("cpu-on-demand", fresh)
    world.rent("cpu-spot", fresh)
    with pytest.raises(tenancy.QuotaExceeded):
        world.rent("cpu-spot", fresh)
    with pytest.raises(tenancy.StandingForbids):
        world.rent("cpu-spot", shut)


# Claims


def test_a_contract_claims_what_its_terms_say(world: World) -> None:
    spot, firm = world.rent("cpu-spot-2", stop_grace_seconds=10), world.rent("cpu-on-demand")
    own = world.rent("cpu-on-demand-2", world.owner)
    claims = [
        market.claim_of(c, claim_id=f"clm_{n}", holder=c.subject, now=START)
        for n, c in enumerate((spot, firm, own))
    ]
    assert [c.rank for c in claims[:2]] == [Rank.SPOT, Rank.ON_DEMAND]
    assert [c.party for c in claims] == [Party.SALE, Party.SALE, Party.FIRST_PARTY]
    assert [c.urgency for c in claims] == [None, None, Urgency.URGENT]
    assert [c.release.notice_seconds for c in claims] == [120, 3600, 0]
    assert [c.release.firm_seconds for c in claims] == [0, 3600, 0]
    assert [c.release.stop_seconds for c in claims] == [12, 32, 32]
    assert [c.devices for c in claims] == [2, 1, 2]
    rules = [c.release.displacement.rule for c in claims]
    assert rules == [
        DisplacementRule.YOUNG_RUN, DisplacementRule.RUNNING_HOUR, DisplacementRule.NONE,
    ]  # fmt: skip
    assert claims[0].release.displacement.younger_than_seconds == 600
    assert [c.value_micros_per_device_hour for c in claims] == [16_800, 48_000, 16_000]


# Credits


def test_a_young_spot_run_ended_by_the_owner_is_free(world: World) -> None:
    contract = world.rent("cpu-spot-2")
    run = world.open(contract)
    world.clock.advance_to(START + 20 * MINUTE)
    usage, credited = world.close(
        contract, run, reason="owner_recall", t0=START + 10 * MINUTE - timedelta(milliseconds=1)
    )
    assert usage == credited == Money(11_200)  # 2 × 20 min × 0.0168
    with world.read() as tx:
        assert ledger.balance(tx, ledger.customer_account(contract.organisation_id)) == Money.parse(
            "100"
        )
        assert ledger.balance(tx, ledger.CREDITS) == -credited
        [transfer] = [
            t
            for t in ledger.list_transfers(
                tx, contract.organisation_id, START, world.clock.now() + MINUTE
            )
            if t.kind == market.INTERRUPTION_CREDIT
        ]
        assert (transfer.debit, transfer.subject) == (ledger.CREDITS, contract.subject)
        assert (transfer.starts_at, transfer.ends_at) == (START, START + 20 * MINUTE)


@pytest.mark.parametrize(
    ("ended", "is_free"),
    [
        ({"reason": "owner_recall", "t0": START + 10 * MINUTE}, False),
        ({"reason": "price", "t0": START + MINUTE}, False),
        ({"reason": "user", "t0": START + MINUTE, "notice_reason": "price"}, False),
        ({"reason": "user", "t0": START + MINUTE, "notice_reason": "spot_interruption"}, True),
        ({"reason": "user"}, False),
        ({"reason": "node_fault"}, False),
        ({"reason": "shutdown", "t0": START + MINUTE}, True),
    ],
)
def test_why_a_spot_run_ended_decides(
    world: World, ended: dict[str, object], is_free: bool
) -> None:
    contract = world.rent("cpu-spot")
    run = world.open(contract)
    world.clock.advance_to(START + 30 * MINUTE)
    usage, credited = world.close(contract, run, **ended)
    assert usage == Money(8_400)
    assert credited == (usage if is_free else Money(0))


def test_on_demand_gets_the_hour_that_ran_at_the_notice(world: World) -> None:
    contract = world.rent("cpu-on-demand")
    run = world.open(contract)
    for minutes in (20, 70, 100, 135):
        world.until(START + minutes * MINUTE)
        world.settle(contract, run)
        with world.work() as work:
            assert market.cover(work, contract.id, work.now + HOUR)
    usage, credited = world.close(contract, run, reason="owner_recall", t0=START + 70 * MINUTE)
    assert (usage, credited) == (Money(108_000), Money(48_000))


def test_two_interrupted_runs_of_a_contract_are_credited_together_exactly(world: World) -> None:
    contract = world.rent("cpu-spot")
    for number in range(3):
        run = world.open(contract, f"run_{number}")
        t0 = world.clock.now()
        world.clock.advance_to(t0 + timedelta(milliseconds=100_001))
        usage, credited = world.close(contract, run, reason="spot_interruption", t0=t0)
        assert usage == credited
        with world.work() as work:
            market.rehold(work, contract.id)


# First-party use


def test_the_owners_use_is_priced_at_the_posted_price_and_credited_in_full(world: World) -> None:
    with world.work() as work:
        market.load_rate_card(work, dearer(market.seed_rate_card(), 2), work.now)
    contract = world.rent("cpu-on-demand-2", world.owner)
    assert contract.is_first_party
    run = world.open(contract)
    world.until(START + 2 * HOUR)
    world.settle(contract, run)
    usage, credited = world.close(contract, run, reason="owner_recall", t0=START)
    # Two devices from 10:20 to 12:20: 100 minutes at 0.016 and 20 at 0.0192.
    assert usage == Money(53_333 + 12_800)
    assert credited == Money(0)
    with world.read() as tx:
        org = contract.organisation_id
        assert ledger.posted(tx, contract.id, market.FIRST_PARTY_CREDIT) == -usage
        assert ledger.balance(tx, ledger.first_party_account(org)) == Money(0)
        assert ledger.balance(tx, "revenue:first_party") == usage
        assert ledger.list_holds(tx, org) == []
        terms = market.spot_terms(tx, contract.pool_id, START)
        assert [p.micros for p in terms.points] == [16_000, 19_200, 23_040]
        assert ledger.recount(tx) == []


# Price limits and unmet demand


def test_who_set_a_limit_is_told_in_time_and_never_billed_above_it(world: World) -> None:
    with world.work() as work:
        market.load_rate_card(work, dearer(market.seed_rate_card(), 2), work.now)
    contract = world.rent("cpu-spot", max_price=Money(21_000), notice_seconds=3600)
    world.rent("cpu-spot", max_price=Money(99_000))
    world.rent("cpu-spot")
    with world.read() as tx:
        assert market.price_victims(tx, START) == []
    noon = START.replace(hour=12, minute=0)
    world.until(START + 21 * MINUTE)
    with world.read() as tx:
        [victim] = market.price_victims(tx, world.clock.now())
    assert (victim.contract, victim.hour, victim.price_micros) == (contract, noon, 24_960)
    assert victim.term_at == noon - timedelta(seconds=30)
    assert world.clock.now() <= victim.notice_by == victim.term_at - HOUR
    run = world.open(contract)
    begun = world.clock.now()
    world.until(noon + 30 * MINUTE)
    with world.read() as tx:
        # The notice was missed: it is due at once, and the limit stands meanwhile.
        [late] = market.price_victims(tx, world.clock.now())
        assert (late.hour, late.contract) == (noon, contract)
    usage, _ = world.close(contract, run, reason="price", t0=world.clock.now())
    with world.work() as work, pytest.raises(market.PriceAboveLimit) as above:
        market.rehold(work, contract.id)
    assert above.value.details["limit_micros"] == 21_000
    minutes = (noon - begun) // MINUTE
    assert usage == Money(round(20_800 * minutes / 60) + 10_500)


def test_a_refusal_is_kept_as_unmet_demand(world: World) -> None:
    with world.work() as work:
        for reason in ("sold", "nodes"):
            market.note_unmet(
                work,
                organisation_id=world.buyer.organisation.id,
                reason=reason,
                offer_id="cpu-spot",
                pool_id=world.node.pool_id,
                devices=1,
                count=9,
                price_micros=16_000,
            )
        first, second = market.list_unmet(work.tx, None, 10)
        assert (first.reason, first.count, first.starts_at) == ("sold", 9, START)
        assert market.list_unmet(work.tx, first.seq, 10) == [second]


def test_contracts_are_listed_and_found_by_subject(world: World) -> None:
    one, two = world.rent("cpu-spot"), world.rent("cpu-spot")
    with world.work() as work:
        market.end_contract(work, one.id)
        org = one.organisation_id
        assert [c.id for c in market.list_contracts(work.tx, org, None, 10)] == [one.id, two.id]
        assert market.list_contracts(work.tx, org, one.seq, 10) == [two]
        assert market.list_active_contracts(work.tx) == [two]
        assert market.find_contract_of(work.tx, two.subject) == two
        assert market.get_contract(work.tx, two.id) == two
        with pytest.raises(market.ContractNotFound):
            market.settle(work, "con_none")


def drained(world: World, leave: int = 0) -> None:
    """Pay out the buyer's free credit, but for that many micros."""
    organisation_id = world.buyer.organisation.id
    with world.work() as work:
        ledger.post(
            work,
            key=f"payout {work.now}",
            debit=ledger.customer_account(organisation_id),
            credit=ledger.PAYMENTS,
            amount=ledger.available(work.tx, organisation_id) - Money(leave),
            kind="payout",
            organisation_id=organisation_id,
        )


def test_use_past_the_credit_waits_for_credit_and_is_lost_at_the_close(world: World) -> None:
    contract = world.rent("cpu-spot")
    run = world.open(contract)
    with world.store.read() as tx:
        held = ledger.find_hold(tx, contract.subject)
        assert held is not None
    drained(world)
    world.until(START + 10 * HOUR)
    assert world.settle(contract, run) == held.amount
    assert world.settle(contract, run) == Money(0)
    with world.store.read() as tx:
        assert ledger.lost(tx, contract.id) == Money(0), "it may still be paid"
        rated = market.rate_so_far(tx, contract).amount
    with world.work() as work:
        world.give(work, world.buyer, "0.1")
    assert world.settle(contract, run) == Money(100_000)
    usage, given_back = world.close(contract, run, reason="credit_exhausted")
    with world.store.read() as tx:
        assert usage == held.amount + Money(100_000)
        assert usage + ledger.lost(tx, contract.id) == rated
        assert given_back == Money(0)
        assert ledger.balance(tx, ledger.LOSSES) == usage - rated
        assert ledger.trial_balance(tx) == Money(0)
        assert ledger.recount(tx) == []
    with world.work() as work:
        world.give(work, world.buyer, "5")
        assert market.settle(work, contract.id) == Money(0), "what is lost is not charged later"
        # A correction takes the loss back before it gives anything back.
        [record] = metering.list_usage(work.tx, run)[:1]
        before = ledger.lost(work.tx, contract.id)
        metering.correct(
            work,
            run_id=run,
            event_id="half",
            corrects=record.event_id,
            starts_at=record.starts_at,
            ends_at=record.ends_at,
            devices=-record.devices,
        )
        taken_back = rated - market.rate_so_far(work.tx, contract).amount
        again = market.settle(work, contract.id)
        assert ledger.lost(work.tx, contract.id) == max(before - taken_back, Money(0))
        assert -again == max(taken_back - before, Money(0))


def test_what_is_free_is_neither_lost_nor_given_to_whom_it_was_not_charged(world: World) -> None:
    contract = world.rent("cpu-spot")
    run = world.open(contract)
    drained(world)
    world.until(START + 10 * HOUR)
    told = START + 5 * MINUTE
    ended = {"reason": "owner_recall", "t0": told, "notice_reason": "owner_recall"}
    usage, given_back = world.close(contract, run, **ended)
    with world.store.read() as tx:
        assert usage == given_back == market.rate_so_far(tx, contract).amount
        assert ledger.lost(tx, contract.id) == Money(0)


def test_what_others_hold_pays_for_nothing_else(world: World) -> None:
    contract, other = world.rent("cpu-spot"), world.rent("cpu-spot")
    run = world.open(contract)
    drained(world)
    world.until(START + 10 * HOUR)
    usage, _ = world.close(contract, run, reason="node_fault")
    with world.store.read() as tx:
        kept = ledger.find_hold(tx, other.subject)
        assert kept is not None
        account = ledger.customer_account(world.buyer.organisation.id)
        assert ledger.balance(tx, account) == kept.amount
        assert usage > Money(0)
        assert ledger.lost(tx, contract.id) > Money(0)


def test_without_an_identity_the_keys_limits_hold(world: World) -> None:
    with world.work() as work:
        limits = tenancy.Limits(max_devices=1)
        key, _ = tenancy.create_key(work, world.buyer.principal.id, name="one", limits=limits)
    small = dataclasses.replace(world.buyer, key=key)
    first = world.rent("cpu-spot", small)
    with world.work() as work:
        hold = ledger.find_hold(work.tx, first.subject)
        assert hold is not None
        ledger.release_hold(work, hold.id)
    second = world.rent("cpu-spot", small)
    with pytest.raises(tenancy.QuotaExceeded), world.work() as work:
        market.rehold(work, first.id)
    with world.work() as work:
        market.end_contract(work, second.id)
        market.rehold(work, first.id)
        assert ledger.find_hold(work.tx, first.subject) is not None
