"""Field cases of tokens on the books' side: M1, M3, M5, A2, G4."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from token_books import EPOCH, SYSTEM, TokenBooks, open_books

from sublet.base.wire.gateway import normalise
from sublet.money import billing
from sublet.money.billing import TOKEN_USAGE, allowances, tokens
from sublet.records import ledger, metering, tenancy


@pytest.fixture
def books(tmp_path: Path) -> Iterator[TokenBooks]:
    made = open_books(tmp_path)
    yield made
    assert made.violations() == []
    made.store.close()


class _PulledError(Exception):
    """The plug."""


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (metering.tokens.token_store, "insert_events"),
        (metering.tokens.token_store, "update_epoch"),
        (tokens.token_store, "update_lines"),
        (allowances.ledger, "resize_hold"),
        (tokens.ledger, "post"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_m1_mark_and_effect_are_one_transaction(
    books: TokenBooks, monkeypatch: pytest.MonkeyPatch, place: object, name: str
) -> None:
    """Whatever the crash point, right before the effect or right after it: one record, one
    charge."""
    books.ask(1_000_000)
    events = [books.event(1000, output=20), books.event(2000)]
    before = books.transfers()
    real = getattr(place, name)

    def never(*_: object, **__: object) -> None:
        raise _PulledError

    def too_late(*args: object, **named: object) -> None:
        real(*args, **named)
        raise _PulledError

    for crash in (never, too_late):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, crash)
            with pytest.raises(_PulledError):
                books.ingest(events, 500)
        assert books.transfers() == before
        with books.store.read() as tx:
            assert metering.list_token_usage(tx) == []
            assert metering.spool_position(tx, "gw-0", EPOCH) == (0, 0)
    assert books.ingest(events, 500) == 2
    assert books.ingest(events, 500) == 0
    assert sum(t.amount_micros for t in books.transfers(TOKEN_USAGE)) == 308


def test_m3_a_days_budget_reopens_at_midnight_and_not_before(books: TokenBooks) -> None:
    books.set_budget("key", books.key, "day", "1")
    books.clock.advance_to(datetime(2026, 11, 2, 23, tzinfo=UTC))
    books.ask(1_000_000)
    books.ingest([books.event(10_000_000)], 10)
    midnight = datetime(2026, 11, 3, tzinfo=UTC)
    books.clock.advance_to(midnight - timedelta(microseconds=1))
    late = books.ask(100, serial=2, spent=1_000_000)
    assert (late.granted_micros, late.denied) == (1_000_000, "budget_exceeded")
    assert late.resets_us == books.now_us() + 1
    books.clock.advance_to(midnight)
    early = books.ask(100, serial=3, spent=1_000_000)
    assert (early.granted_micros, early.denied) == (1_000_100, None)


def test_m3_a_hold_counts_in_the_window_of_its_admission(books: TokenBooks) -> None:
    books.set_budget("key", books.key, "day", "1")
    midnight = datetime(2026, 11, 3, tzinfo=UTC)
    books.clock.advance_to(midnight - timedelta(seconds=1))
    books.ask(600_000)
    books.ask(1, gateway="gw-1")
    books.clock.advance_to(midnight)
    # What gw-0 holds was admitted yesterday, so half of a whole day's budget is there.
    assert books.ask(900_000, gateway="gw-1", serial=2).granted_micros == 500_000
    # Renewed it is today's, as far as today's budget goes: what is idle of it is let go at once.
    over = books.ask(1, held=100_000, serial=2)
    assert (over.granted_micros, over.denied) == (500_000, None)
    assert over.expires_us == books.now_us()
    over = books.ask(450_000, held=100_000, serial=3)
    assert (over.granted_micros, over.denied) == (500_000, "budget_exceeded")
    assert books.ask(0, held=100_000, serial=4).granted_micros == 100_000
    assert books.ask(600_000, gateway="gw-1", serial=3).granted_micros == 600_000


def test_m5_late_usage_stands_on_its_own_month_until_that_is_closed(books: TokenBooks) -> None:
    november, december = datetime(2026, 11, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)
    used = datetime(2026, 11, 30, 23, 59, tzinfo=UTC)
    books.clock.advance_to(used)
    books.ask(1_000_000)
    first, second = books.event(10_000, started=used), books.event(20_000, started=used)
    books.clock.advance_to(december + timedelta(hours=71))
    books.ingest([first], 10)
    books.clock.advance_to(december + timedelta(hours=72))
    billing.step(books.store, books.clock.now())
    with books.store.read() as tx:
        issued = billing.invoice_of(tx, books.org, november)
    books.ingest([second], 20)
    with books.store.read() as tx:
        assert billing.invoice_of(tx, books.org, november) == issued
        later = billing.invoice_of(tx, books.org, december)
    assert issued.total_micros == 1000
    [line] = later.lines
    assert (line.charge_class, line.amount_micros) == ("correction", 2000)
    assert (line.starts_at, line.ends_at) == (datetime(2026, 11, 30, tzinfo=UTC), december)
    assert line.text.startswith(
        "Correction: smollm2-135m-instruct, input tokens, tier default, 2026-11-30T00:00:00.000Z"
    )
    assert "20000 tokens × 0.100000 USD per 1000000 tokens (price v1)" in line.text


def test_a2_a_dead_key_is_in_no_later_snapshot_and_is_granted_nothing(books: TokenBooks) -> None:
    key = books.add_key()
    books.ask(1000, key_id=key)

    def is_valid() -> bool:
        with books.store.read() as tx:
            found = tenancy.list_valid_keys(tx, books.clock.now())
        return key in {valid.key_id for valid in found}

    assert is_valid()
    with books.store.work(SYSTEM) as work:
        tenancy.revoke_key(work, key)
    assert not is_valid()
    refused = books.ask(1000, key_id=key, spent=400, held=600, serial=2)
    assert (refused.granted_micros, refused.denied) == (1000, "standing_forbids")
    # Streams that run end normally, and are charged.
    books.ingest([books.event(10_000, key_id=key)], 10)
    assert books.line("input").posted_micros == 1000
    with books.store.read() as tx:
        hold = ledger.find_hold(tx, f"allowance:gw-0:{EPOCH}:{key}")
    assert hold is not None
    assert hold.amount_micros == 0


def test_g4_cached_tokens_are_counted_once_and_never_below_zero(books: TokenBooks) -> None:
    books.ask(1_000_000)
    usage = {"prompt_tokens": 5000, "completion_tokens": 47}
    sound = normalise("vllm", {**usage, "prompt_tokens_details": {"cached_tokens": 4000}})
    odd = normalise("vllm", {**usage, "prompt_tokens_details": {"cached_tokens": 9000}})
    assert (odd.input_uncached, odd.cache_read, odd.is_inconsistent) == (0, 5000, True)
    books.ingest([books.event(c.input_uncached, c.cache_read, c.output) for c in (sound, odd)], 10)
    charged = {line.key.token_class: line.quantity for line in books.lines()}
    assert charged == {"input": 1000, "cached": 9000, "output": 94}
