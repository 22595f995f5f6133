"""Requests become lines: whatever they are cut into, and whatever order they come in."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.price import cover_quantity, rate_quantity
from sublet.base.wire.gateway import PER_TOKENS, Outcome, Price, UsageEvent
from sublet.gateway.purse import cost
from sublet.money.billing.token_lines import (
    CLASSES,
    TOKEN_LOSS,
    TOKEN_USAGE,
    Book,
    LineKey,
    TokenLine,
    step,
    tally,
)

PRICES = {
    "v1": Price(version="v1", input_micros=100_000, cached_micros=25_000, output_micros=400_000),
    "half": Price(version="half", input_micros=500_000, cached_micros=0, output_micros=1_500_000),
}
COUNT = st.integers(0, 2000)


def an_event(
    number: int,
    counts: tuple[int, int, int],
    *,
    made: int | None = None,
    version: str = "v1",
    outcome: Outcome = Outcome.OK,
    micros: int | None = None,
) -> UsageEvent:
    return UsageEvent(
        id=f"req_{number}",
        key_id="key_1",
        organisation_id="org_1",
        project_id=None,
        is_first_party=False,
        model="m",
        deployment_id="dep_1",
        replica_id="ins_1",
        surface="chat",
        tier="default",
        price_version=version,
        outcome=outcome,
        started_us=0,
        ended_us=1,
        first_us=None,
        input_uncached=counts[0],
        cache_read=counts[1],
        output=counts[2],
        made=counts[2] if made is None else made,
        micros=cost(PRICES[version], *counts) if micros is None else micros,
    )


def a_line(kind: str = TOKEN_USAGE, **values: int | bool) -> TokenLine:
    key = LineKey(
        kind=kind,
        organisation_id="org_1",
        project_id=None,
        key_id="key_1",
        replica_id="",
        is_first_party=bool(values.pop("is_first_party", False)),
        model="m",
        tier="default",
        version="v1",
        day=0,
        token_class="output",
    )
    return TokenLine(seq=1, key=key, **({"price_micros": 400_000} | values))  # type: ignore[arg-type]


def posted(line: TokenLine, purse: int) -> TokenLine:
    """The line as it stands after a step."""
    taken = step(line, purse)
    return dataclasses.replace(
        line,
        posted_micros=line.posted_micros + taken.pay_micros,
        lost_micros=line.lost_micros + taken.lose_micros,
        posted_quantity=line.posted_quantity + taken.pay_quantity,
        lost_quantity=line.lost_quantity + taken.lose_quantity,
    )


def book_of(*events: UsageEvent) -> Book:
    return tally(events, PRICES.__getitem__)


@given(
    requests=st.lists(st.tuples(COUNT, COUNT, COUNT), min_size=1, max_size=20),
    version=st.sampled_from(sorted(PRICES)),
)
def test_quote_hold_gateway_and_invoice_agree_to_the_micro(
    requests: list[tuple[int, int, int]], version: str
) -> None:
    price = PRICES[version]
    events = [an_event(n, counts, version=version) for n, counts in enumerate(requests)]
    book = book_of(*events)
    for token_class, place in zip(CLASSES, range(3), strict=True):
        total = sum(counts[place] for counts in requests)
        found = [t for key, t in book.lines.items() if key.token_class == token_class]
        assert [t.quantity for t in found] == ([total] if total else [])
        micros = (price.input_micros, price.cached_micros, price.output_micros)[place]
        rated = rate_quantity(total, micros, PER_TOKENS)
        assert abs(rated - Fraction(total * micros, PER_TOKENS)) <= Fraction(1, 2)
        # What the requests were taken for suffices for what they are rated at together.
        assert rated <= sum(t.spent_micros for t in found)
        assert rated <= cover_quantity(total, micros, PER_TOKENS)
    spent = sum(t.spent_micros for t in book.lines.values())
    assert spent == book.spending["key_1"].micros == sum(event.micros for event in events)


@given(counts=st.tuples(COUNT, COUNT, COUNT), short=st.integers(0, 3000))
def test_a_bill_that_was_cut_is_short_in_its_last_classes(
    counts: tuple[int, int, int], short: int
) -> None:
    whole = cost(PRICES["v1"], *counts)
    event = an_event(1, counts, micros=max(whole - short, 0))
    book = book_of(event)
    assert sum(t.spent_micros for t in book.lines.values()) == event.micros
    assert {key.token_class: t.quantity for key, t in book.lines.items()} == {
        name: count for name, count in zip(CLASSES, counts, strict=True) if count
    }


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.LOST])
def test_what_failed_or_was_lost_is_a_loss_and_no_usage(outcome: Outcome) -> None:
    book = book_of(an_event(1, (5, 5, 5), made=30, outcome=outcome))
    [(key, found)] = book.lines.items()
    assert (key.kind, key.token_class, found.quantity, found.spent_micros) == (
        TOKEN_LOSS,
        "output",
        30,
        0,
    )
    assert book.spending == {}


@given(
    parts=st.lists(st.tuples(COUNT, st.integers(0, 900), st.integers(0, 900)), max_size=12),
    is_first_party=st.booleans(),
)
def test_posted_and_lost_are_the_rate_and_posted_is_never_above_spent(
    parts: list[tuple[int, int, int]], is_first_party: bool
) -> None:
    line = a_line(is_first_party=is_first_party)
    lost = 0
    for quantity, spent, purse in parts:
        line = dataclasses.replace(
            line, quantity=line.quantity + quantity, spent_micros=line.spent_micros + spent
        )
        line = posted(line, line.due_micros if is_first_party else purse)
        assert line.posted_micros + line.lost_micros == line.rated_micros
        assert line.posted_quantity + line.lost_quantity == line.quantity
        assert line.lost_micros >= lost, "what is lost stays lost"
        lost = line.lost_micros
        if is_first_party:
            assert lost == 0
        else:
            assert line.posted_micros <= line.spent_micros


@given(quantity=COUNT, spent=st.integers(0, 900), fewer=COUNT)
def test_a_correction_undoes_a_loss_before_it_gives_back(
    quantity: int, spent: int, fewer: int
) -> None:
    line = posted(a_line(quantity=quantity, spent_micros=spent), 10**6)
    less = posted(dataclasses.replace(line, quantity=max(quantity - fewer, 0)), 10**6)
    assert less.posted_micros + less.lost_micros == less.rated_micros
    assert less.posted_micros == min(line.posted_micros, less.rated_micros)


def test_a_loss_that_turns_out_none_is_taken_back() -> None:
    line = posted(a_line(TOKEN_LOSS, quantity=100), 10**6)
    assert line.posted_micros == 40
    below = dataclasses.replace(line, quantity=-5)
    assert posted(below, below.due_micros).posted_micros == -2
    back = dataclasses.replace(posted(below, below.due_micros), quantity=0)
    assert posted(back, back.due_micros).posted_micros == 0
