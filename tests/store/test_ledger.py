"""The ledger: transfers, holds, budgets' sums, and books that always balance."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.ids import SeededIds
from sublet.base.kernel.money import Money
from sublet.base.store import Actor, Store, Work, metadata, open_store
from sublet.records import ledger
from sublet.records.ledger import store as rows
from sublet.records.ledger.model import charge_of

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
ACTOR = Actor.system("test")
ORG = "org_a"
CREDIT = ledger.customer_account(ORG)
SPOT = ledger.revenue_account("spot")


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(NOON)


@pytest.fixture
def store(tmp_path: Path, clock: VirtualClock) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path}/ledger.db", clock, SeededIds(1))
    metadata.create_all(opened.engine, tables=[rows.accounts, rows.transfers, rows.holds])
    yield opened
    opened.close()


def usd(text: str) -> Money:
    return Money.parse(text)


def grant(work: Work, amount: Money, key: str = "trial:org_a") -> ledger.Transfer:
    return ledger.post(
        work,
        key=key,
        debit=ledger.TRIAL,
        credit=CREDIT,
        amount=amount,
        kind="trial",
        organisation_id=ORG,
    )


def charge(work: Work, amount: Money, key: str, **more: Any) -> ledger.Transfer:
    more = {"contract_id": "con_1", "kind": "use", **more}
    return ledger.post(
        work, key=key, debit=CREDIT, credit=SPOT, amount=amount, organisation_id=ORG, **more
    )


def set_aside(work: Work, amount: Money, subject: str = "ins_1", **more: Any) -> ledger.Hold:
    more = {"project_id": None, "key_id": None, "expires_at": work.now + HOUR, **more}
    return ledger.hold(
        work, organisation_id=ORG, account=CREDIT, amount=amount, subject=subject, **more
    )


def assert_sound(store: Store) -> None:
    with store.read() as tx:
        assert ledger.trial_balance(tx) == Money(0)
        assert ledger.recount(tx) == []


def test_a_transfer_credits_what_it_debits(store: Store) -> None:
    with store.work(ACTOR) as work:
        granted = grant(work, usd("5"))
        used = charge(work, usd("1.25"), "use:1", starts_at=NOON - HOUR, ends_at=NOON)
    with store.read() as tx:
        assert ledger.balance(tx, CREDIT) == usd("3.75")
        assert ledger.balance(tx, SPOT) == usd("1.25")
        assert ledger.balance(tx, ledger.TRIAL) == usd("-5")
        assert ledger.balance(tx, "revenue:nothing") == Money(0)
        assert ledger.list_transfers(tx, ORG, NOON, NOON + HOUR) == [granted, used]
        assert ledger.list_transfers(tx, None, NOON, NOON + HOUR, after=granted.seq) == [used]
        assert ledger.list_transfers(tx, ORG, NOON - HOUR, NOON) == []
    assert used.charge_micros == 1_250_000
    assert_sound(store)


def test_what_others_bore_is_not_among_an_organisations_own_transfers(store: Store) -> None:
    with store.work(ACTOR) as work:
        granted = grant(work, usd("5"))
        lost = ledger.post(
            work,
            key="loss:1",
            debit=ledger.LOSSES,
            credit=SPOT,
            amount=usd("0.50"),
            kind="loss",
            organisation_id=ORG,
        )
        used = charge(work, usd("1.25"), "use:1")
        back = ledger.post(
            work,
            key="back:1",
            debit=ledger.CREDITS,
            credit=CREDIT,
            amount=usd("0.25"),
            kind="credit",
            organisation_id=ORG,
        )
    with store.read() as tx:
        window = (ORG, NOON, NOON + HOUR)
        assert ledger.list_transfers(tx, *window) == [granted, lost, used, back]
        assert ledger.list_own_transfers(tx, *window) == [granted, used, back]
        # A page is as long as it may be, whatever is left out of it.
        assert ledger.list_own_transfers(tx, *window, limit=2) == [granted, used]
        assert ledger.list_own_transfers(tx, *window, after=granted.seq, limit=1) == [used]
        moved = sum(
            t.amount_micros if t.credit == CREDIT else -t.amount_micros
            for t in ledger.list_own_transfers(tx, *window)
        )
        assert moved == ledger.balance(tx, CREDIT).micros
    assert_sound(store)


def test_a_key_posts_once(store: Store) -> None:
    with store.work(ACTOR) as work:
        first = grant(work, usd("5"))
    with store.work(ACTOR) as work:
        assert grant(work, usd("5")) == first
        with pytest.raises(ledger.TransferKeyReused):
            grant(work, usd("6"))
    with store.read() as tx:
        assert ledger.balance(tx, CREDIT) == usd("5")


def test_m1_a_transfer_that_failed_half_way_is_posted_by_the_retry(store: Store) -> None:
    """M1: mark and effect in one transaction; three deliveries, the first insert fails."""
    failures = [OSError("the disk is full")]

    def fail_once(*call: Any) -> None:
        if failures and call[2].startswith("INSERT INTO ledger_transfer"):
            raise failures.pop()

    def deliver() -> None:
        with store.work(ACTOR) as work:
            grant(work, usd("10"), key="evt_1")

    sa.event.listen(store.engine, "before_cursor_execute", fail_once)
    with pytest.raises(OSError, match="disk"):
        deliver()
    with store.read() as tx:
        assert ledger.balance(tx, CREDIT) == Money(0)
    deliver()
    deliver()
    with store.read() as tx:
        assert ledger.balance(tx, CREDIT) == usd("10")
        assert len(ledger.list_transfers(tx, ORG, NOON, NOON + HOUR)) == 1
    assert_sound(store)


def test_a_customer_is_never_overdrawn_even_where_the_refusal_is_caught(store: Store) -> None:
    with store.work(ACTOR) as work:
        grant(work, usd("1"))
        with pytest.raises(ledger.InsufficientCredit) as refused:
            charge(work, usd("1.000001"), "use:1")
        with pytest.raises(ledger.InsufficientCredit):
            # A reversal of a credit: our account sorts before the customer's here.
            ledger.post(
                work,
                key="use:2",
                debit=CREDIT,
                credit=ledger.CREDITS,
                amount=usd("2"),
                kind="credit",
                organisation_id=ORG,
            )
    assert refused.value.code == "insufficient_credit"
    assert refused.value.details["needed_micros"] == 1_000_001
    assert refused.value.details["available_micros"] == 1_000_000
    with store.read() as tx:
        assert ledger.balance(tx, CREDIT) == usd("1")
        assert ledger.balance(tx, ledger.CREDITS) == Money(0)
    assert_sound(store)


def test_the_first_charge_of_a_customer_without_credit_is_refused(store: Store) -> None:
    with store.work(ACTOR) as work, pytest.raises(ledger.InsufficientCredit):
        charge(work, usd("0.000001"), "use:1")
    assert_sound(store)


def test_the_owners_own_use_nets_to_nothing(store: Store) -> None:
    own = ledger.first_party_account("org_owner")
    with store.work(ACTOR) as work:
        for key, debit, credit in (("use", own, SPOT), ("back", ledger.CREDITS, own)):
            ledger.post(
                work,
                key=key,
                debit=debit,
                credit=credit,
                amount=usd("3"),
                kind="first_party",
                organisation_id="org_owner",
            )
    with store.read() as tx:
        assert ledger.balance(tx, own) == Money(0)
        assert ledger.spent(tx, organisation_id="org_owner", start=NOON, end=None) == Money(0)
    assert_sound(store)


def test_amounts_are_positive_and_of_the_accounts_currency(store: Store) -> None:
    with store.work(ACTOR) as work:
        with pytest.raises(ValueError, match="positive"):
            grant(work, Money(0))
        grant(work, usd("1"))
        with pytest.raises(ValueError, match="USD"):
            charge(work, Money(1, "EUR"), "use:1")


def test_a_hold_takes_the_last_micro_and_not_one_more(store: Store) -> None:
    with store.work(ACTOR) as work:
        grant(work, usd("1"))
        made = set_aside(work, usd("0.4"), "ins_1")
        set_aside(work, usd("0.6"), "ins_2")
        with pytest.raises(ledger.InsufficientCredit) as refused:
            set_aside(work, usd("0.000001"), "ins_3")
        with pytest.raises(ledger.HoldExists):
            set_aside(work, usd("0"), "ins_1")
    assert refused.value.details["available_micros"] == 0
    with store.read() as tx:
        assert ledger.available(tx, ORG) == Money(0)
        assert ledger.balance(tx, CREDIT) == usd("1")
        assert ledger.find_hold(tx, "ins_1") == made
        assert [h.subject for h in ledger.list_holds(tx, ORG)] == ["ins_1", "ins_2"]
    assert_sound(store)


def test_a_hold_without_any_credit_is_refused(store: Store) -> None:
    with store.work(ACTOR) as work, pytest.raises(ledger.InsufficientCredit):
        set_aside(work, usd("0.01"))
    with store.read() as tx:
        assert ledger.available(tx, "org_unheard_of") == Money(0)


def test_settling_against_a_hold_and_renewing_it(store: Store) -> None:
    with store.work(ACTOR) as work:
        grant(work, usd("1"))
        made = set_aside(work, usd("1"))
    with store.work(ACTOR) as work:
        charge(work, usd("0.3"), "use:1")
        # 1 − 0.3 = 0.7 is left: renewing to the full size has no cover, shrinking has.
        with pytest.raises(ledger.InsufficientCredit):
            ledger.resize_hold(work, made.id, amount=usd("1"), expires_at=NOON + 2 * HOUR)
        kept = ledger.resize_hold(work, made.id, amount=usd("0.7"), expires_at=NOON + 2 * HOUR)
    assert (kept.amount, kept.expires_at, kept.version) == (usd("0.7"), NOON + 2 * HOUR, 2)
    with store.read() as tx:
        assert ledger.available(tx, ORG) == Money(0)
        assert ledger.find_hold(tx, "ins_1") == kept
    assert_sound(store)


def test_releasing_twice_frees_once(store: Store) -> None:
    with store.work(ACTOR) as work:
        grant(work, usd("1"))
        made = set_aside(work, usd("0.5"))
        ledger.release_hold(work, made.id)
        again = ledger.release_hold(work, made.id)
        assert again.state is ledger.HoldState.RELEASED
        with pytest.raises(ledger.HoldReleased):
            ledger.resize_hold(work, made.id, amount=usd("0"), expires_at=NOON)
        with pytest.raises(ledger.HoldNotFound):
            ledger.release_hold(work, "hld_none")
        with pytest.raises(ledger.HoldNotFound):
            ledger.resize_hold(work, "hld_none", amount=usd("0"), expires_at=NOON)
        set_aside(work, usd("1"))  # the subject may hold anew
    assert_sound(store)


def test_holds_lapse_but_not_under_an_open_meter(store: Store, clock: VirtualClock) -> None:
    with store.work(ACTOR) as work:
        grant(work, usd("1"))
        for subject in ("gone", "metered", "later"):
            ends = NOON + (2 * HOUR if subject == "later" else HOUR)
            set_aside(work, usd("0.1"), subject, expires_at=ends)
    clock.advance_to(NOON + HOUR - timedelta(microseconds=1))
    with store.work(ACTOR) as work:
        assert ledger.lapse(work, work.now, keep={"metered"}) == []
    clock.advance_to(NOON + HOUR)
    with store.work(ACTOR) as work:
        assert [h.subject for h in ledger.lapse(work, work.now, keep={"metered"})] == ["gone"]
    with store.read() as tx:
        assert ledger.find_hold(tx, "gone") is None
        assert ledger.find_hold(tx, "metered") is not None
        assert ledger.available(tx, ORG) == usd("0.8")
    assert_sound(store)


def test_what_is_posted_for_a_contract_nets_reversals_by_kind(store: Store) -> None:
    with store.work(ACTOR) as work:
        grant(work, usd("9"))
        charge(work, usd("2"), "use:1")
        charge(work, usd("4"), "use:other", contract_id="con_2")
        back = {"organisation_id": ORG, "contract_id": "con_1", "credit": CREDIT}
        ledger.post(work, key="rev", debit=SPOT, amount=usd("0.5"), kind="use", **back)
        ledger.post(work, key="cr", debit=ledger.CREDITS, amount=usd("1"), kind="credit", **back)
    with store.read() as tx:
        assert ledger.posted(tx, "con_1", "use") == usd("1.5")
        assert ledger.posted(tx, "con_1", "credit") == usd("-1")
        assert ledger.posted(tx, "con_none", "use") == Money(0)
        changed = ledger.changes(tx, NOON, NOON + HOUR, organisation_id=ORG)
        assert changed == {
            CREDIT: usd("4.5"),
            SPOT: usd("5.5"),
            ledger.CREDITS: usd("-1"),
            ledger.TRIAL: usd("-9"),
        }
        assert ledger.changes(tx, NOON + HOUR, NOON + 2 * HOUR) == {}


@pytest.mark.parametrize(
    ("debit", "credit", "expected"),
    [
        (CREDIT, SPOT, 7),
        (SPOT, CREDIT, -7),
        (ledger.CREDITS, CREDIT, -7),
        (CREDIT, ledger.CREDITS, 7),
        (ledger.TRIAL, CREDIT, 0),
        (ledger.PAYMENTS, CREDIT, 0),
        (CREDIT, ledger.PAYMENTS, 0),
    ],
)
def test_only_use_counts_as_a_charge(debit: str, credit: str, expected: int) -> None:
    assert charge_of(debit, credit, 7) == expected


def test_budgets_count_what_was_posted_and_what_was_admitted_in_the_window(
    store: Store, clock: VirtualClock
) -> None:
    """M3: half-open windows; a hold counts where it was admitted, a renewal is a new admission."""
    midnight = datetime(2026, 3, 3, tzinfo=UTC)
    next_midnight = midnight + timedelta(days=1)

    def spent(start: datetime, end: datetime | None, **more: Any) -> Money:
        with store.read() as tx:
            return ledger.spent(tx, key_id="key_1", start=start, end=end, **more)

    with store.work(ACTOR) as work:
        grant(work, usd("9"))
        charge(work, usd("1"), "use:1", key_id="key_1", project_id="prj_1")
        charge(work, usd("2"), "use:2", key_id="key_2", project_id="prj_1")
    clock.advance_to(midnight - timedelta(microseconds=1))
    with store.work(ACTOR) as work:
        made = set_aside(work, usd("0.5"), key_id="key_1")
    assert spent(NOON, midnight) == usd("1.5")
    assert spent(midnight, next_midnight) == Money(0)
    assert spent(NOON, midnight, without_hold=made.id) == usd("1")

    clock.advance_to(midnight)
    with store.work(ACTOR) as work:
        charge(work, usd("0.2"), "use:3", key_id="key_1")
        ledger.resize_hold(work, made.id, amount=usd("0.3"), expires_at=made.expires_at)
    assert spent(NOON, midnight) == usd("1.3"), "a shrunk hold stays where it was admitted"
    assert spent(midnight, next_midnight) == usd("0.2")
    with store.work(ACTOR) as work:
        ledger.resize_hold(work, made.id, amount=usd("0.5"), expires_at=midnight + 3 * HOUR)
    assert spent(NOON, midnight) == usd("1")
    assert spent(midnight, next_midnight) == usd("0.7")
    with store.work(ACTOR) as work:
        ledger.release_hold(work, made.id)
    assert spent(midnight, next_midnight) == usd("0.2")
    assert spent(NOON, None) == usd("1.2")
    with store.read() as tx:
        assert ledger.spent(tx, project_id="prj_1", start=NOON, end=None) == usd("3")
        assert ledger.spent(tx, organisation_id=ORG, start=NOON, end=None) == usd("3.2")


def test_a_hold_costs_the_same_however_long_the_ledger_is(store: Store) -> None:
    seen: list[str] = []

    def statements_of_a_hold(subject: str) -> list[str]:
        with store.work(ACTOR) as work:
            seen.clear()
            made = set_aside(work, usd("0.01"), subject)
            found = list(seen)
            ledger.release_hold(work, made.id)
        return found

    sa.event.listen(
        store.engine, "before_cursor_execute", lambda *call: seen.append(" ".join(call[2].split()))
    )
    with store.work(ACTOR) as work:
        grant(work, usd("9"))
    young = statements_of_a_hold("a")
    with store.work(ACTOR) as work:
        for n in range(50):
            charge(work, Money(1), f"use:{n}")
    assert statements_of_a_hold("b") == young
    assert len(young) == 3
    assert not any("ledger_transfer" in statement for statement in young)


def test_holds_asked_for_at_once_never_exceed_the_credit(store: Store) -> None:
    with store.work(ACTOR) as work:
        grant(work, usd("1"))
    barrier, outcomes = threading.Barrier(8), []

    def buy(number: int) -> None:
        barrier.wait()
        try:
            with store.work(ACTOR) as work:
                set_aside(work, usd("0.3"), f"ins_{number}")
            outcomes.append("held")
        except ledger.InsufficientCredit:
            outcomes.append("refused")

    threads = [threading.Thread(target=buy, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["held"] * 3 + ["refused"] * 5
    assert_sound(store)


def test_a_recount_finds_books_that_were_tampered_with(store: Store) -> None:
    with store.work(ACTOR) as work:
        grant(work, usd("1"))
        set_aside(work, usd("0.5"))
    with store.work(ACTOR) as work:
        assert rows.move(work.tx, CREDIT, Money(1))
        assert rows.untie(work.tx, CREDIT, Money(2))
    with store.read() as tx:
        assert ledger.trial_balance(tx) == Money(1)
        assert ledger.recount(tx) == [
            ledger.Drift(
                account=CREDIT,
                balance_kept=1_000_001,
                balance_counted=1_000_000,
                held_kept=499_998,
                held_counted=500_000,
            )
        ]


amounts = st.integers(1, 60).map(Money)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("grant"), amounts),
        st.tuples(st.just("charge"), amounts),
        st.tuples(st.just("settle"), st.sampled_from("abc"), amounts),
        st.tuples(st.just("hold"), st.sampled_from("abc"), amounts),
        st.tuples(st.just("resize"), st.sampled_from("abc"), amounts),
        st.tuples(st.just("release"), st.sampled_from("abc")),
        st.tuples(st.just("lapse"), st.sampled_from("abc")),
    ),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(steps)
def test_books_balance_and_holds_are_covered_after_any_steps(steps: list[Any]) -> None:
    """Any mixture of acts, refusals caught and gone on from: sums hold, cover holds."""
    store = open_store("sqlite://", VirtualClock(NOON), SeededIds(1))
    metadata.create_all(store.engine, tables=[rows.accounts, rows.transfers, rows.holds])
    with store.work(ACTOR) as work:
        for number, (act, *more) in enumerate(steps):
            before = ledger.available(work.tx, ORG)
            try:
                _act(work, number, act, more)
            except ledger.InsufficientCredit:
                assert ledger.available(work.tx, ORG) == before
            assert ledger.balance(work.tx, CREDIT).micros >= 0
            assert ledger.trial_balance(work.tx) == Money(0)
            assert ledger.recount(work.tx) == []
            if act in ("hold", "resize", "settle", "release", "lapse") and before.micros >= 0:
                assert ledger.available(work.tx, ORG).micros >= 0
    store.close()


def _act(work: Work, number: int, act: str, more: list[Any]) -> None:
    if act == "grant":
        grant(work, more[0], key=f"grant:{number}")
        return
    if act == "charge":
        free = ledger.available(work.tx, ORG)
        charge(work, min(more[0], free) if free.micros > 0 else more[0], f"use:{number}")
        return
    subject = more[0]
    known = ledger.find_hold(work.tx, subject)
    if act == "hold" and known is None:
        set_aside(work, more[1], subject)
    elif act == "resize" and known is not None:
        ledger.resize_hold(work, known.id, amount=more[1], expires_at=known.expires_at)
    elif act == "settle" and known is not None and known.amount_micros > 0:
        used = min(more[1], known.amount)
        # Two steps that stand or fall together: where other charges have eaten into what was held,
        # the second is refused, and its Work with it.
        with work.tx.begin_nested():
            charge(work, used, f"use:{number}")
            left = known.amount - used
            ledger.resize_hold(work, known.id, amount=left, expires_at=known.expires_at)
    elif act == "release" and known is not None:
        ledger.release_hold(work, known.id)
    elif act == "lapse":
        ledger.lapse(work, NOON + HOUR, keep={subject})
