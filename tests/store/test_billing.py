"""Accounts, credit and invoices on real rows, with the market settling real meters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from templates import Template

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.errors import Invalid, PaymentRequired
from sublet.base.kernel.interval import month_of, next_month
from sublet.base.kernel.money import Money
from sublet.base.kernel.price import Window, rate
from sublet.base.store import Actor, Store, pending
from sublet.capacity import fleet
from sublet.capacity.engines.port import FENCES, Device, Fence, Inventory
from sublet.money import billing
from sublet.money.billing import ChargeClass, Invoice
from sublet.records import ledger, metering, tenancy
from sublet.records.tenancy import Standing
from sublet.rights import market
from sublet.shops.compute import store as compute_rows
from sublet.shops.compute.model import (
    Desired,
    Run,
    RunState,
    Transition,
    Workload,
    WorkloadSpec,
)
from sublet.shops.compute.states import State

START = datetime(2026, 10, 31, 22, tzinfo=UTC)
OCTOBER = datetime(2026, 10, 1, tzinfo=UTC)
NOVEMBER = datetime(2026, 11, 1, tzinfo=UTC)
SYSTEM = Actor.system("test")
CARD = """
currency = "USD"
[[offer]]
id = "cpu-spot"
product = "spot"
device_kind = "cpu"
price_usd_per_device_hour = 1.20
shapes = [1, 2, 4]
default_notice_seconds = 30
notices = [{ seconds = 30, factor_permille = 1000 }]
[[offer]]
id = "cpu-on-demand"
product = "on_demand"
device_kind = "cpu"
price_usd_per_device_hour = 3.60
shapes = [1, 2, 4]
default_notice_seconds = 3600
notices = [{ seconds = 3600, factor_permille = 1000 }]
"""


@dataclass
class Books:
    """A cloud's books with one node and one customer; meters are driven by hand."""

    store: Store
    clock: VirtualClock
    customer: billing.SignedUp
    opened: dict[str, market.Contract] = field(default_factory=dict)

    @property
    def org(self) -> str:
        return self.customer.organisation.id

    def rent(self, subject: str = "ins_1", *, product: str = "on-demand") -> market.Contract:
        """A contract for one device with an open meter, from now on."""
        with self.store.work(SYSTEM) as work:
            who = tenancy.authenticate(work.tx, self.customer.secret, work.now)
            offers = market.list_offers(work.tx, work.now)
            offer = next(o for o in offers if product in o.id and o.devices == 1)
            quote = market.quote(work, who, offer_id=offer.id)
            contract = market.accept(work, who, quote.id, subject=subject)
            metering.open_meter(
                work,
                run_id=f"run_{subject}",
                workload_id=subject,
                organisation_id=contract.organisation_id,
                project_id=contract.project_id,
                contract_id=contract.id,
                pool_id=contract.pool_id,
                node_id="nod_1",
                devices=contract.units,
                party="sale",
                opened_at=work.now,
            )
        self.opened[subject] = contract
        return contract

    def run_on(self, seconds: float, subject: str = "ins_1") -> None:
        """Time passes, the meter goes on with it, and what was used is settled."""
        self.clock.advance_to(self.clock.now() + timedelta(seconds=seconds))
        with self.store.work(SYSTEM) as work:
            metering.advance(work, f"run_{subject}", to=work.now)
            market.settle(work, self.opened[subject].id)

    def close(
        self, subject: str = "ins_1", *, reason: str = "user", at: datetime | None = None
    ) -> None:
        with self.store.work(SYSTEM) as work:
            meter = metering.close_meter(work, f"run_{subject}", at=at or work.now, reason=reason)
            assert meter.closed_at is not None
            closed = market.Closed(
                t0=None if reason == "user" else meter.closed_at,
                opened_at=meter.opened_at,
                closed_at=meter.closed_at,
                reason=reason,
            )
            market.settle(work, self.opened[subject].id, closed=closed)

    def pay(self, micros: int, reference: str = "wire 1") -> ledger.Transfer:
        with self.store.work(SYSTEM) as work:
            return billing.record_payment(work, self.org, Money(micros), reference=reference)

    def balance(self) -> int:
        with self.store.read() as tx:
            return ledger.balance(tx, ledger.customer_account(self.org)).micros

    def so_far(self) -> Invoice:
        with self.store.read() as tx:
            return billing.invoice_so_far(tx, self.org, self.clock.now())

    def invoice(self, month: datetime) -> Invoice:
        with self.store.read() as tx:
            return billing.invoice_of(tx, self.org, month)


def open_books(path: Path, start: datetime = START) -> Books:
    clock, template = VirtualClock(start), prepared(start)
    return Books(store=template.open(path, clock), clock=clock, customer=template.found)


@cache
def prepared(start: datetime) -> Template[billing.SignedUp]:
    return Template(_prepare, start)


def _prepare(store: Store, clock: VirtualClock) -> billing.SignedUp:
    with store.work(SYSTEM) as work:
        billing.open_owner(work, name="Owner")
        fences = {name: Fence(strength="enforced", by="probe", evidence="held") for name in FENCES}
        inventory = Inventory(
            node="here",
            devices=tuple(
                Device(name=f"cpu{n}", kind="cpu", model="EPYC", memory_bytes=1 << 30)
                for n in range(4)
            ),
            disk_bytes=1 << 40,
            fences=fences,
            outbound="none",
            boot_id="boot",
        )
        fleet.enrol(work, inventory, site_name="home", trusted_tenants=False)
        market.load_rate_card(work, CARD, work.now)
    with store.work(SYSTEM) as work:
        market.post_spot_prices(work, work.now)
        return billing.sign_up(work, email="ada@example.org", organisation_name="Ada")


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    made = open_books(tmp_path)
    yield made
    made.store.close()


# ---- accounts ---------------------------------------------------------------------------------


def test_a_newcomer_gets_all_it_needs_and_trial_credit(books: Books) -> None:
    got = books.customer
    # two on-demand hours of one device, at 3.60
    assert got.trial == Money(7_200_000)
    assert got.organisation.standing is Standing.GOOD
    assert got.principal.role is tenancy.Role.ADMIN
    with books.store.read() as tx:
        who = tenancy.authenticate(tx, got.secret, books.clock.now())
        assert who.organisation.id == books.org
        assert [p.name for p in tenancy.list_projects(tx, books.org)] == ["default"]
        assert ledger.available(tx, books.org) == Money(7_200_000)
        assert ledger.balance(tx, ledger.TRIAL) == Money(-7_200_000)
        assert ledger.trial_balance(tx).micros == 0


def test_without_trial_credit_the_standing_stays_unverified_until_it_pays(books: Books) -> None:
    with books.store.work(SYSTEM) as work:
        got = billing.sign_up(
            work, email="bob@example.org", organisation_name="Bob", trial=Money(0)
        )
        assert got.organisation.standing is Standing.UNVERIFIED
        billing.record_payment(work, got.organisation.id, Money(1_000_000), reference="w")
        now = tenancy.get_organisation(work.tx, got.organisation.id)
    assert now.standing is Standing.GOOD


def test_one_account_an_address(books: Books) -> None:
    with books.store.work(SYSTEM) as work, pytest.raises(billing.AlreadySignedUp):
        billing.sign_up(work, email=" ADA@example.org ", organisation_name="Again")


def test_the_owner_is_opened_once(books: Books) -> None:
    with books.store.work(SYSTEM) as work:
        assert billing.open_owner(work, name="Second") is None


def test_a_payment_is_recorded_once_a_reference(books: Books) -> None:
    first = books.pay(10_000_000)
    assert books.pay(10_000_000) == first
    assert books.balance() == 17_200_000
    with pytest.raises(billing.ReferenceReused):
        books.pay(20_000_000)
    assert books.pay(10_000_000, "wire 2") != first
    assert books.balance() == 27_200_000


def test_an_amount_that_is_none_is_refused(books: Books) -> None:
    with pytest.raises(Invalid):
        books.pay(0)


# ---- invoices ---------------------------------------------------------------------------------


def test_a_run_across_a_months_end_is_cut_there(books: Books) -> None:
    books.clock.advance_to(START + timedelta(minutes=90))  # 23:30
    books.rent()
    for _ in range(6):
        books.run_on(600)
    books.close()
    for month in (OCTOBER, NOVEMBER):
        [line] = books.invoice(month).lines
        assert line.quantity == 1_800_000
        assert line.amount_micros == 1_800_000
        assert "1800000 device-ms × 3.600000 USD per device-hour" in line.text
    assert books.balance() == 7_200_000 - 3_600_000


def test_the_invoice_so_far_is_the_ledgers_change(books: Books) -> None:
    books.rent()
    books.pay(50_000_000)
    before = 57_200_000
    for seconds in (0.001, 1.5, 61.037, 599.999):
        books.run_on(seconds)
        found = books.so_far()
        assert found.total_micros == before - books.balance()
        assert found.issued_at is None
        assert sum(line.shown_minor for line in found.lines) == found.total_minor


def test_an_interruption_credit_is_a_line_of_its_own(books: Books) -> None:
    books.rent(product="spot")
    books.run_on(300)
    books.close(reason="owner_recall")
    found = books.so_far()
    usage, credit = sorted(found.lines, key=lambda line: -line.amount_micros)
    assert (usage.amount_micros, credit.amount_micros) == (100_000, -100_000)
    assert (usage.kind, credit.kind) == (market.USAGE, market.INTERRUPTION_CREDIT)
    assert found.total_micros == 0
    assert books.balance() == 7_200_000


def test_a_month_is_issued_72_hours_after_its_end_and_frozen(books: Books) -> None:
    books.rent()
    books.run_on(600)
    books.close()
    closing = NOVEMBER + timedelta(hours=72)
    books.clock.advance_to(closing - timedelta(microseconds=1))
    with books.store.work(SYSTEM) as work:
        assert billing.issue_due(work) == []
        with pytest.raises(billing.MonthNotClosed):
            billing.issue(work, books.org, OCTOBER)
    books.clock.advance_to(closing)
    with books.store.work(SYSTEM) as work:
        [issued] = billing.issue_due(work)
        assert billing.issue(work, books.org, OCTOBER) == issued
        assert billing.issue_due(work) == []
    assert issued.number == f"2026-10-{issued.seq:06d}"
    assert issued.total_micros == 600_000

    # Late: 60 s of October are taken back on the 4th. The closed invoice stays, byte for byte.
    contract = books.opened["ins_1"]
    with books.store.work(SYSTEM) as work:
        [row, *_] = metering.list_usage(work.tx, "run_ins_1")
        metering.correct(
            work,
            run_id="run_ins_1",
            starts_at=row.starts_at,
            ends_at=row.starts_at + timedelta(seconds=60),
            devices=-1,
            corrects=row.event_id,
            event_id="late",
        )
        market.settle(work, contract.id)
    with books.store.read() as tx:
        assert billing.get_invoice(tx, issued.id or "") == issued
        assert billing.list_invoices(tx, books.org) == [issued]
    [line] = books.invoice(NOVEMBER).lines
    assert line.charge_class is ChargeClass.CORRECTION
    assert month_of(line.starts_at) == OCTOBER
    assert line.amount_micros == -60_000
    assert books.balance() == 7_200_000 - 540_000


def test_a_month_without_charges_has_no_invoice_and_is_passed(books: Books) -> None:
    books.clock.advance_to(datetime(2027, 1, 10, tzinfo=UTC))
    with books.store.work(SYSTEM) as work:
        for _ in range(3):
            assert billing.issue_due(work) == []
        assert billing.list_invoices(work.tx, None) == []
    books.pay(90_000_000)
    books.rent()
    books.run_on(60)
    books.close()
    books.clock.advance_to(datetime(2027, 2, 4, tzinfo=UTC))
    with books.store.work(SYSTEM) as work:
        [issued] = billing.issue_due(work)
    assert issued.month == datetime(2027, 1, 1, tzinfo=UTC)


def test_there_is_no_such_invoice(books: Books) -> None:
    with books.store.read() as tx, pytest.raises(billing.InvoiceNotFound):
        billing.get_invoice(tx, "inv_none")


acts = st.lists(
    st.one_of(
        st.tuples(st.just("on"), st.integers(1, 7_200_000)),
        st.tuples(st.just("sleep"), st.integers(1, 5 * 86_400_000)),
        st.tuples(st.just("reprice"), st.integers(10, 9_000_000)),
        st.tuples(st.just("close"), st.sampled_from([0, 1])),
        st.tuples(st.just("correct"), st.integers(1, 30_000)),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=25, deadline=None)
@given(acts, st.sampled_from(["spot", "on-demand"]))
def test_whatever_happens_posted_is_rated_and_invoices_sum_to_the_ledger(
    tmp_path_factory: pytest.TempPathFactory, sequence: list[tuple[str, int]], product: str
) -> None:
    """Advances, settlements, price changes, closes, corrections and late ones, in any order."""
    books = open_books(tmp_path_factory.mktemp("books"))
    try:
        books.pay(10**12)
        credit = books.balance()
        number, is_open = 0, False
        for act, value in sequence:
            subject = f"ins_{number}"
            if act in ("on", "close") and not is_open:
                number, is_open = number + 1, True
                subject = f"ins_{number}"
                books.rent(subject, product=product)
            if act == "on":
                books.run_on(value / 1000, subject)
            elif act == "close":
                books.close(subject, reason=("user", "owner_recall")[value])
                is_open = False
            elif act == "sleep":
                books.clock.advance_to(books.clock.now() + timedelta(milliseconds=value))
            elif act == "reprice":
                reprice(books, value)
            elif act == "correct" and number:
                correct(books, f"ins_{number}", value)
            issue_all(books)
        check(books, credit)
    finally:
        books.store.close()


def reprice(books: Books, micros: int) -> None:
    card = CARD.replace("1.20", f"{Money(micros)}".split()[0])
    with books.store.work(SYSTEM) as work:
        market.load_rate_card(work, card, work.now)
        market.post_spot_prices(work, work.now)


def correct(books: Books, subject: str, ms: int) -> None:
    """Take back the first part of the first usage, if that was not done yet."""
    with books.store.work(SYSTEM) as work:
        usage = metering.list_usage(work.tx, f"run_{subject}")
        if not usage:
            return
        row = usage[0]
        metering.correct(
            work,
            run_id=f"run_{subject}",
            starts_at=row.starts_at,
            ends_at=min(row.ends_at, row.starts_at + timedelta(milliseconds=ms)),
            devices=-1,
            corrects=row.event_id,
            event_id=f"correct_{subject}",
        )
        market.settle(work, books.opened[subject].id)


def issue_all(books: Books) -> None:
    for _ in range(24):
        with books.store.work(SYSTEM) as work:
            billing.issue_due(work)


def check(books: Books, credit: int) -> None:
    with books.store.read() as tx:
        for contract in books.opened.values():
            windows = metering.windows(tx, contract.id)
            total = rate(market.terms_of(tx, contract, None), windows).amount
            assert ledger.posted(tx, contract.id, market.USAGE) == total
        issued = billing.list_invoices(tx, books.org)
        assert ledger.trial_balance(tx).micros == 0
    months, month = [], month_of(START)
    while month <= books.clock.now():
        months.append(books.invoice(month))
        month = next_month(month)
    for found in months:
        assert sum(line.amount_micros for line in found.lines) == found.total_micros
        assert sum(line.shown_minor for line in found.lines) == found.total_minor
    assert [found for found in months if found.issued_at] == issued
    assert sum(found.total_micros for found in months) == credit - books.balance()


# ---- keeping what runs paid for ---------------------------------------------------------------


class Shop(Books):
    """The same, with workloads and runs in the shop's own rows, and billing's loop stepping."""

    def start(self, subject: str = "ins_1", *, product: str = "spot") -> market.Contract:
        contract = self.rent(subject, product=product)
        with self.store.work(SYSTEM) as work:
            hold = ledger.find_hold(work.tx, subject)
            runway = work.now + timedelta(hours=1) if hold is None else hold.expires_at
            compute_rows.insert_workload(work, a_workload(contract))
            compute_rows.insert_run(work, a_run(contract, runway))
        return contract

    def live(self, seconds: float, *, every: float = 60) -> None:
        """Time passes: evidence each minute, and billing's loop whenever it asks to be called."""
        end = self.clock.now() + timedelta(seconds=seconds)
        evidence_at = self.clock.now() + timedelta(seconds=every)
        while self.clock.now() < end:
            due = billing.step(self.store, self.clock.now())
            self.check_solvent()
            self.clock.advance_to(max(self.clock.now(), min(due, evidence_at, end)))
            if self.clock.now() >= min(evidence_at, end):
                self.evidence()
                evidence_at = self.clock.now() + timedelta(seconds=every)
        billing.step(self.store, self.clock.now())
        self.check_solvent()

    def evidence(self) -> None:
        """What shop and engine do: meters go on; whoever was told to stop takes all of its grace,
        which is billed; whoever has no runway left is ended there."""
        for subject in self.opened:
            run, now = self.run_of(subject), self.clock.now()
            if not self.meter_of(subject).is_open:
                continue
            stopped = [t.at for t in self.transitions(subject) if t.to_state is State.STOPPING]
            grace = timedelta(seconds=run.stop_grace_seconds)
            gone_at = min([run.runway_until, *(at + grace for at in stopped)])
            if gone_at <= now:
                self.close(subject, reason=str(run.stop_reason or "control_lost"), at=gone_at)
            else:
                with self.store.work(SYSTEM) as work:
                    metering.advance(work, run.id, to=now)

    def end_stopped(self) -> None:
        """Long enough for whoever was told to stop to be gone."""
        self.clock.advance_to(self.clock.now() + timedelta(seconds=60))
        self.evidence()
        self.check_solvent()

    def check_solvent(self) -> None:
        """The balance covers every hold, and each hold covers its run to the end of its runway."""
        with self.store.read() as tx:
            assert ledger.available(tx, self.org).micros >= 0
            assert ledger.recount(tx) == []
            for meter in metering.list_open_meters(tx):
                contract = market.get_contract(tx, meter.contract_id or "")
                hold = ledger.find_hold(tx, meter.workload_id)
                run = compute_rows.find_run(tx, meter.run_id)
                assert run is not None
                if contract.is_first_party:
                    continue
                assert hold is not None
                windows = metering.windows(tx, contract.id)
                terms = market.terms_of(tx, contract, None)
                end = min(run.runway_until, hold.expires_at)
                more = Window(start=meter.metered_to, end=end, units=meter.devices)
                still = rate(terms, [*windows, more]).amount - ledger.posted(
                    tx, contract.id, market.USAGE
                )
                assert still.micros <= hold.amount_micros

    def run_of(self, subject: str) -> Run:
        with self.store.read() as tx:
            run = compute_rows.find_run(tx, f"run_{subject}")
        assert run is not None
        return run

    def meter_of(self, subject: str) -> metering.Meter:
        with self.store.read() as tx:
            return metering.get_meter(tx, f"run_{subject}")

    def hold_of(self, subject: str = "ins_1") -> ledger.Hold:
        with self.store.read() as tx:
            found = ledger.find_hold(tx, subject)
        assert found is not None
        return found

    def transitions(self, subject: str) -> list[Transition]:
        with self.store.read() as tx:
            return compute_rows.list_transitions(tx, subject)

    def warnings(self, subject: str = "ins_1") -> list[tuple[str, int]]:
        with self.store.read() as tx:
            return [(w.cause, w.threshold_seconds) for w in billing.list_warnings(tx, subject)]

    def pay_out_to(self, micros: int) -> None:
        """The customer has that much left: the rest was paid back."""
        with self.store.work(SYSTEM) as work:
            account = ledger.customer_account(self.org)
            rest = ledger.balance(work.tx, account).micros - micros
            if rest > 0:
                ledger.post(
                    work,
                    key=f"payout {work.now}",
                    debit=account,
                    credit=ledger.PAYMENTS,
                    amount=Money(rest),
                    kind="payout",
                    organisation_id=self.org,
                )


def a_workload(contract: market.Contract) -> Workload:
    return Workload(
        id=contract.subject,
        seq=0,
        organisation_id=contract.organisation_id,
        project_id=contract.project_id,
        key_id=contract.key_id,
        kind="instance",
        spec=WorkloadSpec(),
        contract_id=contract.id,
        party="sale",
        pool_id=contract.pool_id,
        devices=contract.units,
        rank=1,
        state=State.RUNNING,
        desired=Desired.RUNNING,
        reason=None,
        claim_id=f"clm_{contract.subject}",
        waiting_since=None,
        retries=0,
        start_failures=0,
        failure=None,
        exit_code=None,
        created_at=contract.started_at,
        ended_at=None,
        has_home=False,
        version=1,
    )


def a_run(contract: market.Contract, runway: datetime) -> Run:
    return Run(
        id=f"run_{contract.subject}",
        seq=0,
        workload_id=contract.subject,
        organisation_id=contract.organisation_id,
        number=1,
        claim_id=f"clm_{contract.subject}",
        contract_id=contract.id,
        pool_id=contract.pool_id,
        node_id="nod_1",
        devices=("cpu0",),
        device_ids=("dev_1",),
        state=RunState.RUNNING,
        intended_at=contract.started_at,
        ends_at=None,
        notice_seconds=contract.notice_seconds,
        started_at=contract.started_at,
        t0=None,
        notice_reason=None,
        term_at=None,
        published_at=None,
        stop_reason=None,
        stop_grace_seconds=contract.stop_grace_seconds,
        runway_until=runway,
        runway_sent=runway,
        exited_at=None,
        exit_code=None,
        reason=None,
        gone_at=None,
        failure=None,
        is_forgotten=False,
    )


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    made = open_books(tmp_path)
    yield Shop(store=made.store, clock=made.clock, customer=made.customer)
    made.store.close()


def test_hold_and_runway_are_renewed_before_five_minutes_are_left(shop: Shop) -> None:
    shop.start()
    for _ in range(12):
        shop.live(150)
        hold, run = shop.hold_of(), shop.run_of("ins_1")
        left = hold.expires_at - shop.clock.now()
        assert timedelta(seconds=300) <= left <= timedelta(seconds=900)
        # scrub is 2 s on CPUs: a SIGTERM that comes late is still paid for
        assert run.runway_until in (hold.expires_at, hold.expires_at - timedelta(seconds=2))
        assert run.runway_until >= shop.clock.now() + timedelta(seconds=298)
    # half an hour at 1.20, settled to within two minutes
    assert 560_000 <= 7_200_000 - shop.balance() <= 600_000
    assert shop.so_far().total_micros == 7_200_000 - shop.balance()


def test_a_long_notice_is_always_covered(shop: Shop) -> None:
    shop.pay(50_000_000)
    shop.start(product="on-demand")
    for _ in range(20):
        shop.live(97)
        left = shop.hold_of().expires_at - shop.clock.now()
        # notice 3600 + grace 30 + scrub 2
        assert left >= timedelta(seconds=3632)


def test_warnings_are_said_once_and_what_has_passed_at_the_start(shop: Shop) -> None:
    shop.pay_out_to(1_500_000)  # 75 minutes at 1.20
    shop.start()
    shop.live(60)
    assert shop.warnings() == [("credit_exhausted", 86_400)]
    shop.live(15 * 60)
    assert shop.warnings() == [("credit_exhausted", 86_400), ("credit_exhausted", 3_600)]
    shop.live(45 * 60)
    assert shop.warnings()[2:] == [("credit_exhausted", 900)]
    with shop.store.read() as tx:
        told = pending(tx, "test", [billing.RunwayWarned])
        assert [e.payload["threshold_seconds"] for e in told] == [86_400, 3_600, 900]
        found = billing.runway(tx, shop.org, shop.clock.now())
    assert found.burn_micros_per_hour == 1_200_000
    assert found.ends_at is not None


def test_after_a_top_up_it_is_warned_again(shop: Shop) -> None:
    shop.pay_out_to(1_200_000)
    shop.start()
    shop.live(60)
    assert len(shop.warnings()) == 2
    shop.pay(2_400_000)
    shop.live(1)
    shop.live(3 * 3600 - 2 * 60)
    assert shop.warnings()[2:] == [("credit_exhausted", 3_600), ("credit_exhausted", 900)]


def test_at_the_end_of_the_credit_it_is_stopped_while_its_grace_is_covered(shop: Shop) -> None:
    shop.pay_out_to(500_000)  # 25 minutes at 1.20: a third of a micro a millisecond
    shop.start()
    shop.live(24 * 60)
    assert shop.run_of("ins_1").stop_reason is None
    shop.live(60)
    run = shop.run_of("ins_1")
    assert run.stop_reason == "credit_exhausted"
    [stop] = [t for t in shop.transitions("ins_1") if t.to_state is State.STOPPING]
    # grace 30 + scrub 2 + one look of 10 before the credit ends
    assert START + timedelta(seconds=1500 - 42) <= stop.at <= START + timedelta(seconds=1500 - 32)
    shop.end_stopped()
    assert 0 <= shop.balance() <= 20_000
    assert shop.so_far().total_micros == 500_000 - shop.balance()


def test_two_workloads_share_what_is_left(shop: Shop) -> None:
    shop.pay_out_to(1_000_000)
    shop.start("ins_1")
    shop.start("ins_2")
    shop.live(26 * 60)
    assert {shop.run_of(s).stop_reason for s in shop.opened} <= {None, "credit_exhausted"}
    assert any(shop.run_of(s).stop_reason for s in shop.opened)
    shop.end_stopped()
    shop.live(120)
    shop.end_stopped()
    assert all(not shop.meter_of(s).is_open for s in shop.opened)
    assert shop.balance() >= 0


def test_a_budget_ends_it_by_its_own_name_and_warns_first(shop: Shop) -> None:
    contract = shop.start()
    with shop.store.work(SYSTEM) as work:
        tenancy.set_budget(
            work,
            tenancy.Budget(
                scope_kind=tenancy.ScopeKind.KEY,
                scope_id=contract.key_id or "",
                period="month",
                limit_micros=600_000,  # half an hour at 1.20
            ),
        )
    shop.live(29 * 60)
    assert ("budget", 900) in shop.warnings()
    assert shop.run_of("ins_1").stop_reason is None
    shop.live(60)
    assert shop.run_of("ins_1").stop_reason == "budget"
    shop.end_stopped()
    assert 580_000 <= shop.so_far().total_micros <= 600_000


def test_a_daily_budget_opens_again_at_midnight(shop: Shop) -> None:
    shop.clock.advance_to(START + timedelta(minutes=100))  # 23:40
    shop.start()
    with shop.store.work(SYSTEM) as work:
        tenancy.set_budget(
            work,
            tenancy.Budget(
                scope_kind=tenancy.ScopeKind.ORGANISATION,
                scope_id=shop.org,
                period="day",
                limit_micros=600_000,  # 30 minutes, and 20 are left of the day
            ),
        )
    shop.live(20 * 60 + 120)
    assert shop.run_of("ins_1").stop_reason is None
    shop.live(26 * 60)
    assert shop.run_of("ins_1").stop_reason is None
    shop.live(5 * 60)
    assert shop.run_of("ins_1").stop_reason == "budget"


def test_a_published_notice_is_kept_although_the_credit_ends_with_it(shop: Shop) -> None:
    contract = shop.start()
    shop.live(60)
    term_at = shop.clock.now() + timedelta(seconds=30)
    with shop.store.work(SYSTEM) as work:
        run = compute_rows.find_run(work.tx, "run_ins_1")
        assert run is not None
        assert market.cover(work, contract.id, term_at + timedelta(seconds=32))
        compute_rows.update_run(work, run, t0=work.now, term_at=term_at)
    # All that is not held goes elsewhere.
    shop.pay_out_to(shop.hold_of().amount_micros)
    shop.live(30)
    assert shop.run_of("ins_1").stop_reason is None


def test_a_hold_lapses_without_a_run_and_never_with_an_open_meter(shop: Shop) -> None:
    shop.start()
    with shop.store.work(SYSTEM) as work:
        ledger.hold(
            work,
            organisation_id=shop.org,
            account=ledger.customer_account(shop.org),
            amount=Money(1),
            subject="ins_gone",
            project_id=None,
            key_id=None,
            expires_at=work.now + timedelta(seconds=5),
        )
    shop.clock.advance_to(shop.clock.now() + timedelta(hours=2))
    billing.step(shop.store, shop.clock.now())
    with shop.store.read() as tx:
        assert ledger.find_hold(tx, "ins_gone") is None
        assert ledger.find_hold(tx, "ins_1") is not None


def test_the_owners_own_use_is_priced_and_credited_in_full(shop: Shop) -> None:
    with shop.store.work(SYSTEM) as work:
        owner = tenancy.find_owner(work.tx)
        assert owner is not None
        _, secret = tenancy.recover_owner(work)
    mine = Shop(
        store=shop.store,
        clock=shop.clock,
        customer=dataclasses.replace(shop.customer, organisation=owner, secret=secret),
    )
    mine.start("job_1")
    mine.live(600)
    found = mine.so_far()
    assert {line.kind: line.amount_micros for line in found.lines} == {
        market.USAGE: 200_000,
        market.FIRST_PARTY_CREDIT: -200_000,
    }
    assert found.total_micros == 0
    assert mine.run_of("job_1").stop_reason is None


def test_a_failure_at_one_organisation_keeps_none_of_the_others_waiting(shop: Shop) -> None:
    with shop.store.work(SYSTEM) as work:
        bob = billing.sign_up(work, email="bob@example.org", organisation_name="Bob")
    other = Shop(store=shop.store, clock=shop.clock, customer=bob)
    shop.start("ins_1")
    other.start("ins_2")
    with shop.store.work(SYSTEM) as work:
        work.tx.execute(compute_rows.runs.delete().where(compute_rows.runs.c.id == "run_ins_1"))
    shop.clock.advance_to(shop.clock.now() + timedelta(seconds=60))
    other.evidence()
    with pytest.raises(ExceptionGroup):
        billing.step(shop.store, shop.clock.now())
    assert other.balance() == 7_200_000 - 20_000


# Not shrunk: an example drives hours of a cloud, and the first failure says enough.
@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    st.integers(150_000, 4_000_000),
    st.lists(st.tuples(st.integers(1, 900_000), st.integers(10, 4_000_000)), max_size=4),
    st.sampled_from(["spot", "on-demand"]),
    st.integers(1, 2),
)
def test_the_balance_is_never_negative(
    tmp_path_factory: pytest.TempPathFactory,
    credit: int,
    changes: list[tuple[int, int]],
    product: str,
    count: int,
) -> None:
    """Whatever the credit, the price changes and the pace: every hold covers its run to the end."""
    made = open_books(tmp_path_factory.mktemp("shop"))
    shop = Shop(store=made.store, clock=made.clock, customer=made.customer)
    try:
        for number in range(count):
            try:
                shop.start(f"ins_{number}", product=product)
            except PaymentRequired:
                break
        with shop.store.read() as tx:
            held = sum(hold.amount_micros for hold in ledger.list_holds(tx, shop.org))
        shop.pay_out_to(max(credit, held))
        before = shop.balance()
        for ms, price in changes:
            shop.live(ms / 1000)
            reprice(shop, price)
        for _ in range(8):
            shop.live(1200)
            shop.end_stopped()
            if not any(shop.meter_of(subject).is_open for subject in shop.opened):
                break
        assert shop.balance() >= 0
        with shop.store.work(SYSTEM) as work:
            for contract in shop.opened.values():
                market.settle(work, contract.id)
        check(shop, before)
    finally:
        made.store.close()
