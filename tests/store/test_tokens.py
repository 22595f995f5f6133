"""Tokens on real rows: kept once, rated by line, paid for out of what was set aside for them."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from token_books import EPOCH, MODEL, PRICES, START, SYSTEM, Gateway, TokenBooks, open_books

from sublet.base.kernel.money import Money
from sublet.base.kernel.price import rate_quantity
from sublet.base.store import pending
from sublet.base.wire.gateway import PER_TOKENS, Outcome, UsageEvent
from sublet.money import billing
from sublet.money.billing import TOKEN_LOSS, TOKEN_USAGE
from sublet.records import ledger, metering, tenancy
from sublet.records.metering import EpochClosed, TokenCorrectionRefused, UsageInconsistent


@pytest.fixture
def books(tmp_path: Path) -> Iterator[TokenBooks]:
    made = open_books(tmp_path)
    yield made
    assert made.violations() == []
    made.store.close()


# Kept once.


def test_an_event_is_kept_once_however_often_it_comes(books: TokenBooks) -> None:
    books.ask(1_000_000)
    first, second = books.event(1000, output=500), books.event(2000, output=10)
    assert books.ingest([first, first], 100) == 1
    before = books.transfers()
    # The same batch, a position that was passed, and a new position with an old event.
    assert books.ingest([first], 100) == 0
    assert books.ingest([second], 50) == 0
    assert books.transfers() == before
    assert books.ingest([first, second], 200) == 1
    with books.store.read() as tx:
        rows = metering.list_token_usage(tx, organisation_id=books.org)
        assert [row.event_id for row in rows] == [first.id, second.id]
        assert metering.spool_position(tx, "gw-0", EPOCH) == (0, 200)
    assert books.line("input").quantity == 3000


def test_a_later_file_is_beyond_every_offset_of_an_earlier_one(books: TokenBooks) -> None:
    books.ask(1_000_000)
    assert books.ingest([books.event(1)], 900, file=0) == 1
    assert books.ingest([books.event(1)], 10, file=1) == 1
    assert books.ingest([books.event(1)], 901, file=0) == 0


def test_usage_is_listed_by_organisation_key_and_replica_in_pages(books: TokenBooks) -> None:
    books.ask(1_000_000)
    other = books.add_key()
    books.ask(1_000_000, key_id=other)
    events = [
        books.event(1),
        books.event(2, key_id=other),
        books.event(3, replica_id="ins_replica_2"),
    ]
    books.ingest(events, 10)
    with books.store.read() as tx:
        of = lambda **named: [  # noqa: E731
            row.input_uncached for row in metering.list_token_usage(tx, **named)
        ]
        assert of() == of(organisation_id=books.org) == [1, 2, 3]
        assert of(key_id=other) == [2]
        assert of(replica_id="ins_replica_2") == [3]
        [first] = metering.list_token_usage(tx, limit=1)
        assert of(after=first.seq, limit=1) == [2]


def test_usage_is_listed_by_project_and_newest_first(books: TokenBooks) -> None:
    """Each project's requests are those of a key of its own."""
    keys = {"prj_a": books.key, "prj_b": books.add_key(), None: books.add_key()}
    projects = list(keys)
    for key_id in keys.values():
        books.ask(1000, key_id=key_id)
    events = [
        dataclasses.replace(
            books.event(n, key_id=keys[projects[n % 3]]), project_id=projects[n % 3]
        )
        for n in range(10)
    ]
    books.ingest(events, 10)

    def pages(size: int, **named: Any) -> list[int]:
        found: list[metering.TokenUsage] = []
        with books.store.read() as tx:
            while part := metering.list_token_usage(
                tx, after=found[-1].seq if found else None, limit=size, **named
            ):
                found += part
        return [row.input_uncached for row in found]

    for size in (1, 3, 10):
        assert pages(size) == list(range(10))
        assert pages(size, is_newest_first=True) == list(range(9, -1, -1))
        assert pages(size, project_id="prj_a") == [0, 3, 6, 9]
        of_b = {"project_id": "prj_b", "organisation_id": books.org}
        assert pages(size, is_newest_first=True, **of_b) == [7, 4, 1]
    assert pages(3, project_id="prj_none") == []


@pytest.mark.parametrize("after", [None, 7])
@pytest.mark.parametrize("is_newest_first", [False, True])
@pytest.mark.parametrize("narrowest", ["organisation_id", "project_id", "key_id"])
def test_a_page_of_usage_is_read_by_an_index(
    books: TokenBooks, narrowest: str, is_newest_first: bool, after: int | None
) -> None:
    """However much was used before: no page is sorted, and none reads what is not on it."""
    asked: list[tuple[str, Any]] = []

    def note(*call: Any) -> None:
        asked.append((call[2], call[3]))

    columns = ["organisation_id", "project_id", "key_id"]
    named = dict.fromkeys(columns[: columns.index(narrowest) + 1], "x")
    sa.event.listen(books.store.engine, "before_cursor_execute", note)
    with books.store.work(SYSTEM) as work:
        metering.list_token_usage(
            work.tx, **named, is_newest_first=is_newest_first, after=after, limit=2
        )
        statement, values = asked[-1]
        plan = work.tx.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values).all()
    sa.event.remove(books.store.engine, "before_cursor_execute", note)
    way = "" if after is None else f" AND seq{'<' if is_newest_first else '>'}?"
    assert [row.detail for row in plan] == [
        f"SEARCH metering_token USING INDEX ix_metering_token_{narrowest}_seq ({narrowest}=?{way})"
    ]


def test_faults_of_spools_are_kept_whole_and_replaced(books: TokenBooks) -> None:
    faults = [
        metering.SpoolFault(gateway=name, epoch=epoch, why=f"of {epoch}")
        for name, epoch in (("gw-0", 9), ("gw-0", 10), ("gw-1", 3))
    ]
    for kept in (faults, faults[1:], []):
        with books.store.work(SYSTEM) as work:
            metering.keep_spool_faults(work, kept[::-1])
        with books.store.read() as tx:
            assert metering.list_spool_faults(tx) == kept


def test_contradicting_counters_are_kept_and_told_with_the_replica(books: TokenBooks) -> None:
    books.ask(1_000_000)
    odd = dataclasses.replace(books.event(10, output=5), is_inconsistent=True)
    # More delivered than made: what was delivered was made.
    impossible = dataclasses.replace(books.event(10, output=5), made=1)
    books.ingest([odd, impossible], 10)
    with books.store.read() as tx:
        told = [e.read(UsageInconsistent) for e in pending(tx, "test", [UsageInconsistent])]
        kept = metering.find_token_usage(tx, impossible.id)
    assert [(event.replica_id, event.event_id) for event in told] == [
        ("ins_replica_1", odd.id),
        ("ins_replica_1", impossible.id),
    ]
    assert kept is not None
    assert (kept.made, kept.is_inconsistent) == (5, True)


# Rated and posted.


def test_a_batch_is_one_transfer_a_line_and_explains_itself(books: TokenBooks) -> None:
    books.ask(1_000_000)
    events = [books.event(700, 300, 50) for _ in range(20)]
    books.ingest(events, 10)
    posted = books.transfers(TOKEN_USAGE)
    assert {t.detail["class"]: t.amount_micros for t in posted} == {
        "input": 1400,  # 20 × 700 × 0.1
        "cached": 150,
        "output": 400,
    }
    [output] = [t for t in posted if t.detail["class"] == "output"]
    assert (output.debit, output.credit) == (ledger.customer_account(books.org), "revenue:tokens")
    assert (output.subject, output.key_id) == (MODEL, books.key)
    assert output.detail == {
        "product": "tokens:output:default",
        "model": MODEL,
        "class": "output",
        "tier": "default",
        "quantity": 1000,
        "price_micros": 400_000,
        "per": 1_000_000,
        "version": "v1",
    }
    day = datetime(2026, 11, 2, tzinfo=UTC)
    assert (output.starts_at, output.ends_at) == (day, day + timedelta(days=1))


def test_a_line_is_rounded_once_whatever_it_was_cut_into(books: TokenBooks) -> None:
    books.ask(1_000_000)
    for number in range(7):
        books.ingest([books.event(3)], number + 1)  # 0.3 micros each: 2.1
    line = books.line("input")
    assert (line.quantity, line.posted_micros, line.spent_micros) == (21, 2, 7)
    assert sum(t.amount_micros for t in books.transfers(TOKEN_USAGE)) == 2
    # What each request was rounded up by is free again.
    assert books.allowance().settled_micros == 7
    assert books.balance() == 10_000_000 - 2
    assert books.available() == 10_000_000 - 2 - (1_000_000 - 7)


def test_days_price_versions_and_keys_have_lines_of_their_own(books: TokenBooks) -> None:
    other = books.add_key()
    for key_id in (books.key, other):
        books.ask(1_000_000, key_id=key_id)
    books.ingest(
        [
            books.event(1000),
            books.event(1000, version="v2"),
            books.event(1000, started=START - timedelta(days=1)),
            books.event(1000, key_id=other),
        ],
        10,
    )
    found = Counter(
        (line.key.key_id, line.key.version, line.posted_micros) for line in books.lines()
    )
    assert found == {(books.key, "v1", 100): 2, (books.key, "v2", 200): 1, (other, "v1", 100): 1}


def test_the_owners_own_use_is_priced_and_credited_and_no_revenue(books: TokenBooks) -> None:
    answer = books.ask(5000, key_id=books.owner.key.id, spent=10, held=20)
    assert (answer.granted_micros, answer.denied, answer.answers) == (5030, None, 1)
    books.ingest([books.event(10_000, output=500, made=510, key_id=books.owner.key.id)], 10)
    own = ledger.first_party_account(books.owner.organisation.id)
    with books.store.read() as tx:
        assert ledger.balance(tx, own).micros == 0
        assert ledger.balance(tx, "revenue:first_party").micros == 1204
        assert ledger.balance(tx, "revenue:tokens").micros == 0
    assert {(t.kind, t.debit, t.amount_micros) for t in books.transfers()} >= {
        (TOKEN_USAGE, own, 1000),
        ("first_party_credit", "credits", 1000),
        (TOKEN_LOSS, "losses", 4),
    }


def test_what_is_made_and_not_billed_is_the_owners_loss(books: TokenBooks) -> None:
    books.ask(1_000_000)
    books.ingest(
        [
            books.event(100, output=10, made=35, outcome=Outcome.CLIENT_GONE),
            books.event(made=50, outcome=Outcome.FAILED),
        ],
        10,
    )
    assert books.line("output", TOKEN_LOSS).quantity == 75
    [lost] = books.transfers(TOKEN_LOSS)
    assert (lost.debit, lost.credit, lost.amount_micros) == ("losses", "revenue:tokens", 30)
    assert books.balance() == 10_000_000 - 10 - 4


def test_a_bill_that_was_cut_is_charged_as_it_was_cut(books: TokenBooks) -> None:
    """The gateway held less than its engine counted: the rest is lost, and never charged."""
    books.ask(1_000_000)
    books.ingest([books.event(1000, output=1000, micros=150)], 10)
    assert books.line("input").posted_micros == 100
    output = books.line("output")
    assert (output.posted_micros, output.lost_micros) == (50, 350)
    assert (output.posted_quantity, output.lost_quantity) == (125, 875)
    assert books.balance() == 10_000_000 - 150
    # It stays lost, though the next request is paid in full.
    books.ingest([books.event(output=1000)], 20)
    output = books.line("output")
    assert (output.posted_micros, output.lost_micros) == (450, 350)


def test_a_half_made_good_is_paid_from_credit_and_lost_where_there_is_none(tmp_path: Path) -> None:
    """0.5 rounds to 0 and 1.5 to 2: the second request costs one more than it was taken for."""
    for credit, posted, lost in (("0.000003", 2, 0), ("0.000002", 1, 1)):
        folder = tmp_path / credit
        folder.mkdir()
        books = open_books(folder, credit)
        books.ask(1)
        books.ingest([books.event(1, version="half")], 1)
        assert books.balance() == Money.parse(credit).micros
        books.ask(1, serial=2, spent=1)
        if lost:
            # All that is free is in another gateway's hand.
            books.ask(1, gateway="gw-1")
            assert books.available() == 0
        books.ingest([books.event(2, version="half")], 2)
        line = books.line("input")
        assert (line.quantity, line.posted_micros, line.lost_micros) == (3, posted, lost)
        assert books.violations() == []
        books.store.close()


# Allowances.


def test_an_allowance_is_a_hold_and_usage_shrinks_it_by_what_was_spent(books: TokenBooks) -> None:
    answer = books.ask(500_000)
    assert (answer.granted_micros, answer.granted_tokens, answer.answers) == (500_000, None, 1)
    assert answer.expires_us == books.now_us() + 60_000_000
    assert books.available() == 9_500_000
    books.ingest([books.event(1_000_000)], 10)
    row = books.allowance()
    assert (row.granted_micros, row.settled_micros, row.unsettled_micros) == (
        500_000,
        100_000,
        400_000,
    )
    assert books.available() == 9_500_000
    with books.store.read() as tx:
        hold = ledger.find_hold(tx, f"allowance:gw-0:{EPOCH}:{books.key}")
    assert hold is not None
    assert (hold.amount_micros, hold.key_id) == (400_000, books.key)


def test_a_serial_counts_once_and_a_late_one_not_at_all(books: TokenBooks) -> None:
    first = books.ask(100, serial=1)
    assert books.ask(100, serial=1) == first
    assert books.ask(300, serial=3).granted_micros == 300
    assert books.ask(9000, serial=2).granted_micros == 300
    assert books.ask(50, serial=4).granted_micros == 300
    back = books.ask(0, serial=5, spent=20, held=30)
    assert (back.granted_micros, back.answers) == (50, 5)
    assert books.available() == 10_000_000 - 50
    assert books.ask(100, serial=6, spent=20, held=30).granted_micros == 150


def test_little_credit_is_given_whole_and_more_is_denied(tmp_path: Path) -> None:
    books = open_books(tmp_path, "0.005")
    answer = books.ask(8000)
    assert (answer.granted_micros, answer.denied) == (5000, "insufficient_quota")
    again = books.ask(8000, serial=2, held=5000)
    assert (again.granted_micros, again.denied, again.resets_us) == (
        5000,
        "insufficient_quota",
        None,
    )
    books.pay("1")
    assert books.ask(8000, serial=3, held=5000).granted_micros == 13_000
    books.store.close()


def test_without_any_credit_nothing_is_granted(tmp_path: Path) -> None:
    books = open_books(tmp_path, None)
    answer = books.ask(1000)
    assert (answer.granted_micros, answer.denied) == (0, "insufficient_quota")
    assert books.violations() == []
    books.store.close()


def test_several_gateways_share_what_is_left(books: TokenBooks) -> None:
    for name in ("gw-0", "gw-1", "gw-2"):
        books.ask(1, gateway=name)
    answers = [books.ask(10_000_000, gateway=name, serial=2) for name in ("gw-0", "gw-1", "gw-2")]
    granted = [answer.granted_micros for answer in answers]
    # gw-0 stood alone with its first ask; each later one leaves half.
    assert granted == [4_999_999, 2_500_000, 1_250_001]
    assert [answer.denied for answer in answers] == [None, None, None]
    serial = 2
    for _ in range(30):
        serial += 1
        last = books.ask(10_000_000, gateway="gw-2", serial=serial)
    assert last.denied == "insufficient_quota"
    assert books.available() == 0


@pytest.mark.parametrize("kind", ["organisation", "key"])
def test_a_budget_bounds_all_gateways_and_names_its_window(books: TokenBooks, kind: str) -> None:
    books.set_budget(kind, {"organisation": books.org, "key": books.key}[kind], "day", "0.001")
    books.ask(1, gateway="gw-1")
    books.ask(0, gateway="gw-1", serial=2)
    assert books.ask(700).granted_micros == 700
    answer = books.ask(700, gateway="gw-1", serial=3)
    midnight = datetime(2026, 11, 3, tzinfo=UTC)
    assert (answer.granted_micros, answer.denied) == (300, "budget_exceeded")
    assert answer.resets_us == books.now_us() + (midnight - START) // timedelta(microseconds=1)
    assert "day budget" in answer.denied_why
    books.ingest([books.event(7000)], 10)  # 700 spent
    assert books.ask(100, serial=2, spent=700).denied == "budget_exceeded"
    # An allowance never reaches into the next window; there it is asked for, and held, anew.
    books.clock.advance_to(midnight - timedelta(seconds=10))
    late = books.ask(1, serial=3, spent=700)
    assert late.expires_us == books.now_us() + 10_000_000
    books.clock.advance_to(midnight)
    assert books.ask(400, serial=4, spent=700).granted_micros == 1100
    assert books.ask(5000, gateway="gw-1", serial=4).granted_micros == 600


def test_tokens_a_day_are_shared_by_all_gateways_and_scopes(books: TokenBooks) -> None:
    key = books.add_key(tenancy.Limits(tokens_per_day=5000))
    books.ask(1, gateway="gw-1")
    first = books.ask(10, key_id=key, wanted_tokens=4500)
    # Half of it: another gateway is at work.
    assert (first.granted_tokens, first.denied) == (2500, None)
    first = books.ask(10, key_id=key, wanted_tokens=4500, serial=2)
    assert first.granted_tokens == 3750
    with books.store.work(SYSTEM) as work:
        tenancy.set_limits(work, "organisation", books.org, tenancy.Limits(tokens_per_day=4000))
    second = books.ask(10, key_id=key, gateway="gw-1", wanted_tokens=1000)
    assert (second.granted_tokens, second.denied) == (250, "quota_exceeded")
    assert second.resets_us is not None
    books.ingest([books.event(3000, key_id=key, micros=0)], 10)
    back = books.ask(0, key_id=key, serial=3, spent_tokens=3000)
    assert back.granted_tokens == 3000
    assert (
        books.ask(10, key_id=key, gateway="gw-1", wanted_tokens=900, serial=2).granted_tokens == 900
    )
    books.clock.advance_to(datetime(2026, 11, 3, tzinfo=UTC))
    again = books.ask(10, key_id=key, serial=4, spent_tokens=3000, wanted_tokens=1000)
    assert again.granted_tokens == 4000
    # With the limit gone none binds.
    rest = books.ask(10, wanted_tokens=10**9)
    assert (rest.granted_tokens, rest.denied) == (1050, None)
    with books.store.work(SYSTEM) as work:
        tenancy.set_limits(work, "organisation", books.org, tenancy.NO_LIMITS)
    assert books.ask(10, serial=3, gateway="gw-1").granted_tokens is None


def test_who_may_not_call_is_granted_nothing_new(books: TokenBooks) -> None:
    key = books.add_key()
    books.ask(100, key_id=key)
    with books.store.work(SYSTEM) as work:
        tenancy.set_standing(work, books.org, "suspended", "test")
    held = books.ask(100, key_id=key, held=100, serial=2)
    assert (held.granted_micros, held.denied) == (100, "standing_forbids")
    assert held.expires_us == books.now_us()
    with books.store.work(SYSTEM) as work:
        tenancy.set_standing(work, books.org, "good", "test")
        tenancy.revoke_key(work, key)
    assert books.ask(100, key_id=key, held=100, serial=3).denied == "standing_forbids"
    assert books.ask(100).denied is None


def test_no_clock_ends_an_allowance(books: TokenBooks) -> None:
    books.ask(1000)
    books.wait(hours=5)
    billing.step(books.store, books.clock.now())
    assert books.available() == 10_000_000 - 1000
    books.close()
    assert books.available() == 10_000_000


def test_a_life_is_closed_once_and_its_unfinished_streams_are_free(books: TokenBooks) -> None:
    books.ask(1000)
    ended = books.event(1000, output=10)
    books.ingest([ended], 10)
    lost = [
        books.event(output=40, made=40, outcome=Outcome.LOST),
        dataclasses.replace(ended, outcome=Outcome.LOST, made=99),  # It was settled after all.
    ]
    books.close(lost=lost)
    after = books.transfers()
    books.close(lost=[books.event(made=1000, outcome=Outcome.LOST)])
    assert books.transfers() == after
    assert books.balance() == 10_000_000 - 104
    assert books.available() == books.balance()
    assert [t.amount_micros for t in books.transfers(TOKEN_LOSS)] == [16]
    assert books.ingest([ended], 10) == 0
    with pytest.raises(EpochClosed):
        books.ingest([books.event(1)], 20)
    with pytest.raises(EpochClosed):
        books.ask(1, serial=9)


# Corrections and engines' own counts.


def correct(books: TokenBooks, event: UsageEvent, name: str, **change: int) -> metering.TokenUsage:
    with books.store.work(SYSTEM) as work:
        usage = metering.correct_tokens(work, event_id=name, corrects=event.id, **change)
        billing.post_correction(work, usage)
        billing.post_correction(work, usage)
    return usage


def test_a_correction_is_a_new_record_under_the_old_price(books: TokenBooks) -> None:
    books.ask(1_000_000)
    event = books.event(1000, output=1000)
    books.ingest([event], 10)
    books.wait(days=1)
    usage = correct(books, event, "fix-1", output=-100)
    assert (usage.corrects, usage.output, usage.price_version) == (event.id, -100, "v1")
    assert books.line("output").posted_micros == 360
    # The engine made them all the same: they are the owner's.
    assert books.line("output", TOKEN_LOSS).posted_micros == 40
    assert correct(books, event, "fix-1", output=-100).seq == usage.seq
    correct(books, event, "fix-2", input_uncached=50, made=0)
    assert books.line("input").posted_micros == 105
    with books.store.read() as tx:
        totals = metering.replica_totals(tx, "ins_replica_1")
        kept = metering.find_token_usage(tx, event.id)
    assert (totals.input_uncached, totals.output, totals.made) == (1050, 900, 1000)
    assert kept is not None
    assert kept.output == 1000


@pytest.mark.parametrize(
    ("param", "change"),
    [
        ("output", {"output": -1001}),
        ("input_uncached", {"input_uncached": -1}),
        ("made", {"output": 1}),
        ("made", {"made": -1}),
    ],
)
def test_a_correction_leaves_nothing_impossible(
    books: TokenBooks, param: str, change: dict[str, int]
) -> None:
    books.ask(1_000_000)
    event = books.event(output=1000)
    failed = books.event(made=5, outcome=Outcome.FAILED)
    books.ingest([event, failed], 10)
    with pytest.raises(TokenCorrectionRefused) as refused:
        correct(books, event, "fix", **change)
    assert refused.value.param == param
    with pytest.raises(TokenCorrectionRefused, match="free"):
        correct(books, failed, "fix", output=5)
    with pytest.raises(metering.TokenUsageNotFound):
        correct(books, books.event(1), "fix", output=1)
    first = correct(books, event, "fix", output=-1)
    with (
        pytest.raises(TokenCorrectionRefused, match="names a correction"),
        books.store.work(SYSTEM) as work,
    ):
        metering.correct_tokens(work, event_id="of-fix", corrects=first.event_id, output=1)


def test_what_an_engine_made_for_nobody_is_booked_and_follows_its_readings(
    books: TokenBooks,
) -> None:
    books.ask(1_000_000)
    books.ingest([books.event(1000, 200, 500)], 10)

    def read(prompt: int, cached: int | None, predicted: int) -> metering.Gap:
        with books.store.work(SYSTEM) as work:
            gap = metering.keep_reading(
                work, "ins_replica_1", prompt=prompt, cached=cached, predicted=predicted
            )
            found = billing.reconcile_tokens(work, work.now)
        assert found == ([] if gap.is_none else [gap])
        books.wait(seconds=1)
        return gap

    assert read(1000, 200, 500).is_none
    assert read(1000, None, 500).is_none
    gap = read(1100, 200, 600)
    assert (gap.replica_id, gap.input_uncached, gap.output) == ("ins_replica_1", 100, 100)
    lost = books.transfers(TOKEN_LOSS)
    assert {t.detail["class"]: t.amount_micros for t in lost} == {"input": 10, "output": 40}
    assert {t.detail["why"] for t in lost} == {"unattributed"}
    assert {t.organisation_id for t in lost} == {books.owner.organisation.id}
    # The events were only late.
    books.ingest([books.event(100, 0, 100)], 20)
    assert read(1100, 200, 600).is_none
    assert (
        sum(
            t.amount_micros * (1 if t.debit == "losses" else -1)
            for t in books.transfers(TOKEN_LOSS)
        )
        == 0
    )


def test_what_an_engine_counted_before_it_was_ready_is_nobodys(books: TokenBooks) -> None:
    books.ask(1_000_000)

    def begin(predicted: int) -> None:
        with books.store.work(SYSTEM) as work:
            metering.begin_readings(work, "ins_replica_1", prompt=9, cached=2, predicted=predicted)

    def read(prompt: int, cached: int, predicted: int) -> metering.Gap:
        with books.store.work(SYSTEM) as work:
            return metering.keep_reading(
                work, "ins_replica_1", prompt=prompt, cached=cached, predicted=predicted
            )

    begin(1)
    books.ingest([books.event(100, 20, 50)], 10)
    begin(77)  # Once it has begun, it has.
    assert read(109, 22, 51).is_none
    gap = read(109, 22, 50)
    assert (gap.output, gap.is_excess) == (-1, True)


def test_a_step_reconciles_once_a_day(books: TokenBooks) -> None:
    books.ask(1_000_000)
    books.ingest([books.event(output=500)], 10)
    billing.step(books.store, books.clock.now())

    def keep(predicted: int) -> None:
        with books.store.work(SYSTEM) as work:
            metering.keep_reading(work, "ins_replica_1", prompt=0, cached=0, predicted=predicted)

    def told() -> list[int]:
        with books.store.read() as tx:
            found = pending(tx, "test", [billing.TokenGapFound])
        return [envelope.read(billing.TokenGapFound).output_tokens for envelope in found]

    books.wait(hours=1)
    keep(510)
    billing.step(books.store, books.clock.now())
    assert told() == []
    books.clock.advance_to(datetime(2026, 11, 3, tzinfo=UTC))
    billing.step(books.store, books.clock.now())
    billing.step(books.store, books.clock.now())
    assert told() == [10]


# Whatever happens.


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.integers(0, 2), st.integers(0, 1), st.integers(1, 400)),
        st.tuples(st.just("end"), st.integers(0, 2), st.integers(0, 9), st.integers(0, 1000)),
        st.tuples(st.just("flush"), st.integers(0, 2), st.integers(0, 4), st.integers(0, 3)),
        st.tuples(st.just("sweep"), st.integers(0, 2), st.just(0), st.integers(0, 8)),
        st.tuples(st.just("line"), st.integers(0, 2), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("deliver"), st.integers(0, 2), st.integers(0, 5), st.just(0)),
        st.tuples(st.just("crash"), st.integers(0, 2), st.just(0), st.just(0)),
        st.tuples(st.just("die"), st.integers(0, 2), st.just(0), st.integers(0, 50)),
    ),
    max_size=40,
)


TOKENS_A_DAY = 500


class _CrashError(Exception):
    pass


class Play:
    """Two keys, three gateways, little credit; every act leaves the books sound."""

    def __init__(self, folder: Path, version: str, credit: str, budget: str | None) -> None:
        self.books = open_books(folder, credit)
        self.version = version
        limit = None if budget is None else TOKENS_A_DAY
        self.keys = [self.books.key, self.books.add_key(tenancy.Limits(tokens_per_day=limit))]
        if budget is not None:
            self.books.set_budget("key", self.keys[1], "lifetime", budget)
        self.gateways = [Gateway(self.books, f"gw-{number}") for number in range(3)]
        self.dead: set[int] = set()

    def act(self, what: str, at: int, number: int, amount: int) -> None:
        if at in self.dead:
            return
        gateway = self.gateways[at]
        if what == "begin":
            gateway.begin(3 * amount, amount, self.keys[number])
        elif what == "end" and gateway.running:
            number %= len(gateway.running)
            key_id, held, tokens = gateway.running[number]
            gateway.end(self._event(key_id, held, min(amount, tokens)), number)
        elif what == "flush":
            gateway.flush(number, repeat=amount)
        elif what == "sweep":
            for _ in range(amount):
                self.books.wait(seconds=1)
                for purse in list(gateway.purses.values()):
                    gateway.carry(purse.sweep(self.books.now_us() * 1000))
        elif what == "line":
            gateway.line_is = ("up", "lost", "late")[number]
        elif what == "deliver" and gateway.late:
            gateway.deliver(number % len(gateway.late))
        elif what == "crash":
            self._crash(gateway)
        elif what == "die":
            self.dead.add(at)
            lost = [
                self.books.event(
                    made=amount, key_id=key_id, version=self.version, outcome=Outcome.LOST
                )
                for key_id, _, _ in gateway.running
            ]
            gateway.die(lost)

    def _event(self, key_id: str, held: int, amount: int) -> UsageEvent:
        """Three classes, cut to what is held if they cost more."""
        event = self.books.event(
            amount // 3, amount // 6, amount // 2, made=amount, key_id=key_id, version=self.version
        )
        return dataclasses.replace(event, micros=min(event.micros, held))

    def _crash(self, gateway: Gateway) -> None:
        batch = gateway.spool[gateway.read :]
        before = self.books.transfers()
        with contextlib.suppress(_CrashError), self.books.store.work(SYSTEM) as work:
            billing.ingest_usage(
                work,
                gateway=gateway.name,
                epoch=EPOCH,
                events=batch,
                file=0,
                offset=len(gateway.spool) + 1,
            )
            raise _CrashError
        assert self.books.transfers() == before

    def check(self) -> None:
        assert self.books.violations() == []
        for gateway in self.gateways:
            for key_id, purse in gateway.purses.items():
                row = self.books.find_allowance(gateway.name, key_id)
                if row is None:  # No request of its has come through yet.
                    assert (purse.spent, purse.held) == (0, 0)
                    continue
                # The gateway's ceiling is never above the one that is held for.
                assert purse.granted <= max(row.granted_micros, 0)
                assert purse.spent + purse.held <= row.granted_micros
                if purse.granted_tokens is not None and row.granted_tokens is not None:
                    assert purse.granted_tokens <= row.granted_tokens

    def finish(self) -> None:
        for at, gateway in enumerate(self.gateways):
            if at not in self.dead:
                gateway.die()
        self.check()
        assert self.books.available() == self.books.balance() >= 0
        events = {event.id: event for gateway in self.gateways for event in gateway.spool}
        price = PRICES[self.version]
        used = {
            "input": (sum(e.input_uncached for e in events.values()), price.input_micros),
            "cached": (sum(e.cache_read for e in events.values()), price.cached_micros),
            "output": (sum(e.output for e in events.values()), price.output_micros),
        }
        by_class: dict[str, list[billing.TokenLine]] = {name: [] for name in used}
        for line in self.books.lines():
            if line.key.kind == TOKEN_USAGE:
                by_class[line.key.token_class].append(line)
                rated = rate_quantity(line.quantity, line.price_micros, PER_TOKENS)
                assert line.posted_micros + line.lost_micros == rated
        for name, (quantity, _) in used.items():
            assert sum(line.quantity for line in by_class[name]) == quantity
        spent = sum(e.micros for e in events.values())
        posted = sum(t.charge_micros for t in self.books.transfers(TOKEN_USAGE))
        assert posted <= spent
        with self.books.store.read() as tx:
            for budget in tenancy.list_budgets(tx, key_id=self.keys[1]):
                used_up = ledger.spent(
                    tx, key_id=self.keys[1], start=datetime(1970, 1, 1, tzinfo=UTC), end=None
                )
                assert used_up.micros <= budget.limit_micros
                of_key = [e for e in events.values() if e.key_id == self.keys[1]]
                counted = sum(e.input_uncached + e.cache_read + e.output for e in of_key)
                assert counted <= TOKENS_A_DAY


@settings(max_examples=60, deadline=None)
@given(
    acts=ACTS,
    version=st.sampled_from(sorted(PRICES)),
    credit=st.sampled_from(["0.000500", "0.002001", "0.05"]),
    budget=st.sampled_from([None, "0.000101", "0.001"]),
)
def test_nothing_is_lost_nor_billed_twice_nor_spent_that_is_not_there(
    acts: list[tuple[str, int, int, int]], version: str, credit: str, budget: str | None
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        play = Play(Path(folder), version, credit, budget)
        for act in acts:
            play.act(*act)
            play.check()
        play.finish()
        play.books.store.close()
