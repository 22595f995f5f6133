"""A key's slice: never more than granted, whatever happens to the messages."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sublet.base.wire.gateway import PER_TOKENS, Allowance, AllowanceRequest, Price
from sublet.gateway.purse import Purse, cost

EPOCH = 1_790_000_000_000_000
SECOND = 1_000_000_000
START_NS = 50 * SECOND
NOW_US = EPOCH + 1
MINUTE_US = 60_000_000

tokens = st.integers(0, 10_000_000)
micros = st.integers(0, 500_000_000)


def an_allowance(granted: int, answers: int, **changes: object) -> Allowance:
    plain = Allowance(
        key_id="key_a",
        epoch=EPOCH,
        granted_micros=granted,
        granted_tokens=None,
        expires_us=NOW_US + MINUTE_US,
        answers=answers,
    )
    return dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


def a_purse(granted: int = 0, tokens: int | None = None) -> Purse:
    """One that has asked once and been given so much."""
    purse = Purse("key_a", EPOCH)
    assert purse.want(max(granted, 1), 0, START_NS) is not None
    assert purse.grant(an_allowance(granted, 1, granted_tokens=tokens), START_NS, NOW_US)
    return purse


# ---- cost ----------------------------------------------------------------------------------------


@given(micros, micros, micros, tokens, tokens, tokens)
def test_each_class_is_rounded_up_by_itself(
    a: int, b: int, c: int, uncached: int, cached: int, output: int
) -> None:
    price = Price(version="p", input_micros=a, cached_micros=b, output_micros=c)
    exact = [Fraction(n * p, PER_TOKENS) for n, p in ((uncached, a), (cached, b), (output, c))]
    assert cost(price, uncached, cached, output) == sum(ceil(part) for part in exact)


def test_one_token_costs_at_least_one_micro() -> None:
    price = Price(version="p", input_micros=20_000, cached_micros=1, output_micros=0)
    assert cost(price, 1, 0, 0) == 1
    assert cost(price, 1, 1, 1000) == 2
    assert cost(price, 100, 0, 0) == 2  # 100 × 0.02
    assert cost(price, 0, 0, 0) == 0


# ---- holds ---------------------------------------------------------------------------------------


def test_nothing_is_held_before_the_first_allowance_not_even_nothing() -> None:
    purse = Purse("key_a", EPOCH)
    assert not purse.take(0, 10)
    assert purse.want(0, 10, START_NS) is not None


def test_a_hold_is_taken_or_nothing_changes() -> None:
    purse = a_purse(100, tokens=50)
    assert purse.take(60, 20)
    assert not purse.take(41, 1)
    assert not purse.take(1, 31)
    assert (purse.held, purse.held_tokens, purse.left, purse.left_tokens) == (60, 20, 40, 30)
    purse.settle(60, 20, 25, 8)
    assert (purse.spent, purse.held, purse.left, purse.left_tokens) == (25, 0, 75, 42)


def test_a_bill_beyond_its_hold_is_a_broken_invariant() -> None:
    purse = a_purse(100)
    assert purse.take(10, 1)
    with pytest.raises(AssertionError, match="beyond its hold"):
        purse.settle(10, 1, 11, 1)


def test_more_tokens_than_held_are_counted_and_stop_what_follows() -> None:
    purse = a_purse(100, tokens=10)
    assert purse.take(1, 5)
    purse.settle(1, 5, 1, 12)
    assert purse.left_tokens == 0
    assert not purse.take(1, 0)


def test_the_owners_own_key_is_never_out_of_credit_and_counted_all_the_same() -> None:
    purse = Purse("key_o", EPOCH)
    purse.is_first_party = purse.is_free = True
    assert purse.take(1_000_000, 5000)
    assert purse.want(0, 0, START_NS) is None
    assert purse.sweep(START_NS) is None
    purse.settle(1_000_000, 5000, 2_000_000, 9000)
    assert (purse.spent, purse.spent_tokens, purse.held) == (2_000_000, 9000, 0)


# ---- asking --------------------------------------------------------------------------------------


def test_one_request_at_a_time_and_anew_after_a_second() -> None:
    purse = Purse("key_a", EPOCH)
    first = purse.want(10, 5, START_NS)
    assert first is not None
    assert first.serial == 1
    assert first.wanted_micros >= 10
    assert first.wanted_tokens >= 5
    assert purse.want(10, 5, START_NS + SECOND - 1) is None
    second = purse.want(10, 5, START_NS + SECOND)
    assert second is not None
    assert second.serial == 2
    assert second.wanted_micros >= 30  # What others needed meanwhile is in it.


def test_a_free_model_asks_for_more_than_nothing() -> None:
    """Wanted 0 would be a give-back."""
    request = Purse("key_a", EPOCH).want(0, 0, START_NS)
    assert request is not None
    assert request.wanted_micros > 0


def test_a_denial_is_believed_for_a_second_and_not_asked_again_until_then() -> None:
    purse = Purse("key_a", EPOCH)
    assert purse.want(10, 0, START_NS) is not None
    denied = an_allowance(0, 1, denied="insufficient_quota", denied_why="Add credit.")
    assert purse.grant(denied, START_NS, NOW_US)
    assert purse.refusal(START_NS + SECOND - 1) == "insufficient_quota"
    assert purse.want(10, 0, START_NS + SECOND - 1) is None
    assert purse.refusal(START_NS + SECOND) is None
    assert purse.want(10, 0, START_NS + SECOND) is not None
    assert purse.grant(an_allowance(40, 2), START_NS + SECOND, NOW_US)
    assert purse.denied is None
    assert purse.take(10, 0)


def test_an_allowance_of_another_epoch_or_an_older_one_changes_nothing() -> None:
    purse = a_purse(100)
    assert not purse.grant(an_allowance(900, 1, epoch=EPOCH - 1), START_NS, NOW_US)
    assert purse.granted == 100
    assert not purse.grant(an_allowance(900, 0), START_NS, NOW_US)
    assert purse.granted == 100
    assert purse.grant(an_allowance(60, 1), START_NS, NOW_US)
    assert purse.granted == 100


def spend(purse: Purse, each: int, requests_a_second: int, seconds: int) -> tuple[int, int]:
    """Requests that found nothing in hand, and asks; each answered in full after 20 ms."""
    waited = asked = 0
    due: list[tuple[int, AllowanceRequest]] = []
    now = START_NS
    step = SECOND // requests_a_second
    for _ in range(seconds * requests_a_second):
        now += step
        while due and due[0][0] <= now:
            _, r = due.pop(0)
            total = r.spent_micros + r.held_micros + r.wanted_micros
            assert purse.grant(an_allowance(total, r.serial), now, NOW_US)
        if purse.take(each, 0):
            purse.settle(each, 0, each, 0)
            request = purse.want(0, 0, now)
        else:
            waited += 1
            request = purse.want(each, 0, now)
        if request is not None:
            asked += 1
            due.append((now + 20_000_000, request))
    return waited, asked


def test_a_busy_key_soon_never_waits_and_asks_a_few_times_a_second_at_most() -> None:
    purse = Purse("key_a", EPOCH)
    spend(purse, 20, 1000, 2)
    waited, asked = spend(purse, 20, 1000, 20)
    assert waited == 0
    assert asked <= 60
    assert purse.left <= 20 * 1000 * 10  # Some seconds' worth, not the whole balance.


def test_a_slice_that_comes_smaller_is_what_the_next_is_measured_by() -> None:
    purse = Purse("key_a", EPOCH)
    now, wanted = START_NS, 0
    for serial in range(1, 30):
        request = purse.want(10, 0, now)
        assert request is not None
        assert request.serial == serial
        wanted = request.wanted_micros
        now += SECOND // 10
        assert purse.grant(an_allowance(5, serial), now, NOW_US)
    assert wanted <= 80  # Not doubled thirty times.


# ---- giving back ---------------------------------------------------------------------------------


def sweep_idle(purse: Purse, now_ns: int) -> tuple[AllowanceRequest, int]:
    for second in range(1, 9):
        request = purse.sweep(now_ns + second * SECOND)
        if request is not None:
            return request, now_ns + second * SECOND
    raise AssertionError("nothing was given back")


def test_five_idle_seconds_give_back_what_is_neither_spent_nor_held() -> None:
    purse = a_purse(100, tokens=500)
    assert purse.take(30, 70)
    purse.settle(30, 70, 20, 50)
    assert purse.take(10, 5)
    request, now = sweep_idle(purse, START_NS)
    assert now - START_NS == 6 * SECOND  # The first sweep still saw it used.
    assert (request.wanted_micros, request.spent_micros, request.held_micros) == (0, 20, 10)
    assert (request.spent_tokens, request.held_tokens) == (50, 5)
    assert (purse.left, purse.left_tokens) == (0, 0)
    assert not purse.take(1, 0)


def test_an_answer_that_crossed_with_the_give_back_does_not_bring_it_back() -> None:
    purse = a_purse(100)
    crossing = an_allowance(100, 1)
    request, now = sweep_idle(purse, START_NS)
    assert not purse.grant(crossing, now, NOW_US)
    assert purse.left == 0
    assert purse.grant(an_allowance(0, request.serial), now, NOW_US)
    assert purse.left == 0
    wanted = purse.want(10, 0, now)
    assert wanted is not None
    assert purse.grant(an_allowance(50, wanted.serial), now, NOW_US)
    assert purse.left == 50


def test_a_give_back_without_an_answer_is_repeated_but_holds_up_nobody() -> None:
    purse = a_purse(100)
    first, now = sweep_idle(purse, START_NS)
    again = purse.sweep(now + SECOND)
    assert again is not None
    assert (again.wanted_micros, again.serial) == (0, first.serial + 1)
    assert purse.want(10, 0, now + SECOND + 1) is not None


def test_what_an_expired_allowance_left_is_given_back_too() -> None:
    purse = a_purse(100)
    late = START_NS + 61 * SECOND
    assert not purse.take(1, 0, late)
    assert purse.take(1, 0)  # What runs goes on, until the next sweep.
    purse.sweep(late)
    assert purse.left == 0
    request, _ = sweep_idle(purse, late)
    assert request.wanted_micros == 0


def test_an_allowance_is_renewed_in_time() -> None:
    purse = a_purse(1_000_000)
    assert purse.take(1, 0, START_NS + 29 * SECOND)
    assert purse.want(0, 0, START_NS + 29 * SECOND) is None
    assert purse.want(0, 0, START_NS + 30 * SECOND) is not None


def test_a_purse_at_rest_needs_no_sweep() -> None:
    purse = a_purse(100)
    assert purse.is_awake
    request, now = sweep_idle(purse, START_NS)
    assert purse.grant(an_allowance(0, request.serial), now, NOW_US)
    assert purse.sweep(now + SECOND) is None
    assert not purse.is_awake


# ---- no message order overspends -----------------------------------------------------------------


@dataclasses.dataclass
class Book:
    """The control plane's row of one gateway's life and key."""

    granted: int = 0
    tokens: int = 0
    serial: int = 0


class Messages(RuleBasedStateMachine):
    """Gateways and keys on one balance; messages are lost, repeated, late and out of order.

    The control plane is a model by the rules of decision 0002, the purses are the real ones.
    """

    GATEWAYS = (0, 1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.balance = 1000
        self.day = 5000
        self.now = START_NS
        self.purses = {g: Purse("key_a", EPOCH) for g in self.GATEWAYS}
        self.books = {g: Book() for g in self.GATEWAYS}
        self.holds: list[tuple[int, int, int]] = []
        self.up: list[tuple[int, AllowanceRequest]] = []
        self.down: list[tuple[int, Allowance]] = []

    def act(self, g: int, r: AllowanceRequest) -> Allowance:
        book = self.books[g]
        denied = None
        if r.serial > book.serial:
            book.serial = r.serial
            begun, begun_tokens = r.spent_micros + r.held_micros, r.spent_tokens + r.held_tokens
            if r.wanted_micros == 0:
                book.granted = min(book.granted, begun)
                book.tokens = min(book.tokens, begun_tokens)
            else:
                free = self.balance - sum(b.granted for b in self.books.values())
                target = begun + r.wanted_micros
                book.granted = max(book.granted, min(target, book.granted + free))
                free = self.day - sum(b.tokens for b in self.books.values())
                wanted = begun_tokens + r.wanted_tokens
                book.tokens = max(book.tokens, min(wanted, book.tokens + free))
                if book.granted < target:
                    denied = "insufficient_quota"
        return an_allowance(
            book.granted, book.serial, granted_tokens=book.tokens, denied=denied,
            expires_us=NOW_US + 8_000_000,
        )  # fmt: skip

    @rule(g=st.sampled_from(GATEWAYS), needed=st.integers(0, 400), count=st.integers(0, 900))
    def request(self, g: int, needed: int, count: int) -> None:
        purse = self.purses[g]
        if purse.take(needed, count, self.now):
            self.holds.append((g, needed, count))
            wanted = purse.want(0, 0, self.now)
        else:
            wanted = purse.want(needed, count, self.now)
        if wanted is not None:
            self.up.append((g, wanted))

    @precondition(lambda self: self.holds)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        g, held, count = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
        spent = data.draw(st.integers(0, held))
        used = data.draw(st.integers(0, count))
        self.purses[g].settle(held, count, spent, used)

    @rule(seconds=st.integers(1, 7))
    def wait(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += SECOND
            for g, purse in self.purses.items():
                request = purse.sweep(self.now)
                if request is not None:
                    self.up.append((g, request))

    @precondition(lambda self: self.up)
    @rule(data=st.data(), keep=st.booleans())
    def reach_control_plane(self, data: st.DataObject, keep: bool) -> None:
        """Any of them, in any order; kept: it will come once more."""
        index = data.draw(st.integers(0, len(self.up) - 1))
        g, request = self.up[index] if keep else self.up.pop(index)
        self.down.append((g, self.act(g, request)))

    @precondition(lambda self: self.down)
    @rule(data=st.data(), keep=st.booleans())
    def reach_gateway(self, data: st.DataObject, keep: bool) -> None:
        index = data.draw(st.integers(0, len(self.down) - 1))
        g, allowance = self.down[index] if keep else self.down.pop(index)
        self.purses[g].grant(allowance, self.now, NOW_US)

    @rule()
    def lose_all(self) -> None:
        self.up.clear()
        self.down.clear()

    @rule(more=st.integers(1, 500))
    def pay_in(self, more: int) -> None:
        self.balance += more

    @invariant()
    def nobody_spends_what_is_not_set_aside(self) -> None:
        for g, purse in self.purses.items():
            book = self.books[g]
            assert purse.granted <= book.granted
            assert purse.spent + purse.held <= max(purse.granted, 0)
            assert purse.spent_tokens + purse.held_tokens <= book.tokens
            if purse.granted_tokens is not None:
                assert purse.granted_tokens <= book.tokens
        assert sum(p.spent + p.held for p in self.purses.values()) <= self.balance
        assert sum(b.granted for b in self.books.values()) <= self.balance

    def teardown(self) -> None:
        """Once messages arrive again, all that is not spent comes back."""
        for g, held, count in self.holds:
            self.purses[g].settle(held, count, held, count)
        for _ in range(20):
            self.wait(1)
            for g, request in self.up[-len(self.purses) * 2 :]:
                self.purses[g].grant(self.act(g, request), self.now, NOW_US)
            self.up.clear()
        for g, purse in self.purses.items():
            assert self.books[g].granted == purse.spent
            assert self.books[g].tokens == purse.spent_tokens
            assert not purse.is_awake


TestMessages = Messages.TestCase
TestMessages.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
