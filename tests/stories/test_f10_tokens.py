"""F10, wrong tokens, on the side of the money: what was billed, at which price, and what puts it
right. What engines and clients do wrong is played by the gateway's own tests."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from token_books import EPOCH, PRICES, SYSTEM, Gateway, TokenBooks, open_books

from sublet.base.store import pending
from sublet.base.wire.gateway import Outcome
from sublet.gateway.purse import cost
from sublet.money import billing
from sublet.money.billing import TOKEN_LOSS, TOKEN_USAGE
from sublet.records import metering

NOVEMBER = datetime(2026, 11, 1, tzinfo=UTC)
DECEMBER = datetime(2026, 12, 1, tzinfo=UTC)


@pytest.fixture
def books(tmp_path: Path) -> Iterator[TokenBooks]:
    made = open_books(tmp_path)
    yield made
    assert made.violations() == []
    made.store.close()


def test_billed_is_the_last_counter_within_what_was_held_at_every_cut(books: TokenBooks) -> None:
    """A stream that is held for 20 tokens, cut after each of 40: the rest is the owner's loss."""
    price, prompt = PRICES["v1"], 100
    gateway = Gateway(books, "gw-0")
    billed = lost = 0
    for counted in range(41):
        output = min(counted, 20)
        assert gateway.begin(cost(price, prompt, 0, 20))
        gateway.end(books.event(prompt, output=output, made=counted, outcome=Outcome.CLIENT_GONE))
        billed, lost = billed + output, lost + counted - output
        gateway.flush()
        assert books.line("input").quantity == prompt * (counted + 1)
        lines = {(line.key.kind, line.key.token_class): line.quantity for line in books.lines()}
        assert lines.get((TOKEN_USAGE, "output"), 0) == billed
        assert lines.get((TOKEN_LOSS, "output"), 0) == lost
    gateway.die()
    assert books.available() == books.balance() == 10_000_000 - 410 - 244  # 610 × 0.4
    assert sum(t.amount_micros for t in books.transfers(TOKEN_LOSS)) == 84  # 210 × 0.4


def test_a_price_that_changes_mid_stream_is_that_of_the_start(books: TokenBooks) -> None:
    gateway = Gateway(books, "gw-0")
    assert gateway.begin(1000)
    began = books.clock.now()
    books.wait(minutes=1)  # From here on v2 is in force.
    assert gateway.begin(1000)
    gateway.end(books.event(output=100, version="v1", started=began))
    gateway.end(books.event(output=100, version="v2"))
    gateway.flush()
    assert {line.key.version: line.posted_micros for line in books.lines()} == {"v1": 40, "v2": 80}


def test_usage_of_nothing_and_no_usage_at_all_cost_nothing(books: TokenBooks) -> None:
    books.ask(1000)
    books.ingest([books.event(), books.event(made=0, outcome=Outcome.FAILED)], 10)
    assert books.lines() == []
    assert books.balance() == 10_000_000
    with books.store.read() as tx:
        assert len(metering.list_token_usage(tx, organisation_id=books.org)) == 2


@pytest.mark.parametrize("planted", [1, -1])
def test_the_night_finds_a_planted_token_and_names_the_replica(
    books: TokenBooks, planted: int
) -> None:
    """One replica of three counted a token more, or less, than the books have."""
    books.ask(1_000_000)
    replicas = ["ins_a", "ins_b", "ins_c"]
    books.ingest(
        [
            books.event(1000 * n, 10 * n, 100 * n, replica_id=replica)
            for n, replica in enumerate(replicas, start=1)
        ],
        10,
    )
    billing.step(books.store, books.clock.now())  # The first night, with nothing to say.
    books.wait(hours=1)
    with books.store.work(SYSTEM) as work:
        for n, replica in enumerate(replicas, start=1):
            predicted = 100 * n + (planted if replica == "ins_b" else 0)
            metering.keep_reading(
                work, replica, prompt=1000 * n, cached=10 * n, predicted=predicted
            )
    books.clock.advance_to(datetime(2026, 11, 3, tzinfo=UTC))
    billing.step(books.store, books.clock.now())
    with books.store.read() as tx:
        [found] = [
            envelope.read(billing.TokenGapFound)
            for envelope in pending(tx, "test", [billing.TokenGapFound])
        ]
        odd = [
            envelope.read(metering.UsageInconsistent)
            for envelope in pending(tx, "test", [metering.UsageInconsistent])
        ]
    assert found == billing.TokenGapFound(
        replica_id="ins_b", input_tokens=0, cached_tokens=0, output_tokens=planted
    )
    # Too much is somebody's bill; too little is the owner's loss, of 0.4 here: nothing to post.
    assert [event.replica_id for event in odd] == (["ins_b"] if planted < 0 else [])
    unattributed = [line for line in books.lines() if line.key.replica_id]
    assert [(line.key.replica_id, line.quantity) for line in unattributed] == (
        [("ins_b", 1)] if planted > 0 else []
    )


def test_a_correction_is_a_new_record_on_the_next_invoice(books: TokenBooks) -> None:
    books.ask(5_000_000)
    event = books.event(output=1_000_000)
    books.ingest([event], 10)
    books.close()
    books.clock.advance_to(DECEMBER + timedelta(hours=72))
    billing.step(books.store, books.clock.now())
    with books.store.read() as tx:
        issued = billing.invoice_of(tx, books.org, NOVEMBER)
    assert issued.issued_at is not None
    books.wait(days=1)
    with books.store.work(SYSTEM) as work:
        fixed = metering.correct_tokens(work, event_id="fix_1", corrects=event.id, output=-250_000)
        billing.post_correction(work, fixed)
    with books.store.read() as tx:
        assert billing.invoice_of(tx, books.org, NOVEMBER) == issued
        later = billing.invoice_of(tx, books.org, DECEMBER)
        rows = metering.list_token_usage(tx, organisation_id=books.org)
    assert [(row.event_id, row.corrects, row.output) for row in rows] == [
        (event.id, None, 1_000_000),
        ("fix_1", event.id, -250_000),
    ]
    [line] = later.lines
    assert (line.charge_class, line.kind, line.version) == ("correction", TOKEN_USAGE, "v1")
    assert (line.quantity, line.amount_micros) == (-250_000, -100_000)
    assert line.starts_at == datetime(2026, 11, 2, tzinfo=UTC)
    assert issued.total_micros + later.total_micros == 300_000
    assert books.balance() == 10_000_000 - 300_000


def test_an_invoice_has_a_line_for_each_model_class_tier_and_price(books: TokenBooks) -> None:
    """Days, requests and keys are added up; two projects' stand apart."""
    other = books.add_key()
    for key_id in (books.key, other):
        books.ask(1_000_000, key_id=key_id)
    for day in range(3):
        books.ingest(
            [
                books.event(3330, 400, 70, key_id=key_id, version=version)
                for key_id in (books.key, other)
                for version in ("v1", "v2")
            ],
            day + 1,
        )
        books.wait(days=1)
    with books.store.read() as tx:
        invoice = billing.invoice_so_far(tx, books.org, books.clock.now())
    assert [
        (line.subject, line.product, line.version, line.quantity) for line in invoice.lines
    ] == [
        ("smollm2-135m-instruct", f"tokens:{token_class}:default", version, 6 * count)
        for token_class, count in (("cached", 400), ("input", 3330), ("output", 70))
        for version in ("v1", "v2")
    ]
    assert invoice.total_micros == 10_000_000 - books.balance()
    text = invoice.lines[2].text
    assert text.startswith("smollm2-135m-instruct, input tokens, tier default, 2026-11-02T")
    assert text.endswith("19980 tokens × 0.100000 USD per 1000000 tokens (price v1) = 0.001998 USD")


def test_a_cap_under_fire_is_spent_to_the_last_slice_and_not_beyond(books: TokenBooks) -> None:
    """F6 on the books' side: a key with 1.00 left, three gateways, 200 streams; one gateway is cut
    off, one is killed."""
    books.set_budget("key", books.key, "lifetime", "1")
    gateways = [Gateway(books, f"gw-{n}") for n in range(3)]
    price = PRICES["v1"]
    need = cost(price, 500, 0, 15_000)  # 0.006050
    served = [0, 0, 0]
    for n in range(200):
        at = n % 3
        if gateways[at].begin(need):
            served[at] += 1
    assert all(count > 20 for count in served)
    cut_off, killed, sound = gateways
    for gateway in (cut_off, killed, sound):
        while len(gateway.running) > (5 if gateway is killed else 0):
            gateway.end(books.event(500, output=15_000))
    lost = [books.event(made=700, outcome=Outcome.LOST) for _ in killed.running]
    # Before its spool is read nothing of its slice comes back.
    books.ingest([], 1, gateway=killed.name)
    held = books.allowance(killed.name).unsettled_micros
    assert held >= len(killed.running) * need
    killed.read = 1
    books.ingest([killed.spool[0]], 2, gateway=killed.name)
    killed.die(lost)
    sound.flush()
    # What the dead one had not spent serves others.
    while sound.begin(need):
        sound.end(books.event(500, output=15_000))
    sound.flush()
    cut_off.flush()
    spent = sum(t.charge_micros for t in books.transfers(TOKEN_USAGE))
    assert 950_000 < spent <= 1_000_000
    assert books.balance() == 10_000_000 - spent
    assert [t.amount_micros for t in books.transfers(TOKEN_LOSS)] == [5 * 280]
    with books.store.read() as tx:
        [epoch] = metering.list_epochs(tx, "closed")
    assert (epoch.gateway, epoch.epoch) == ("gw-1", EPOCH)
