"""Buckets of requests and tokens a minute, and durations as OpenAI writes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.gateway.limits import MINUTE_NS, Bucket, duration

SECOND = 1_000_000_000
LONG_AFTER = 10 * MINUTE_NS


def test_a_minutes_worth_at_once_and_then_as_it_refills() -> None:
    bucket = Bucket(60, 1)
    assert all(bucket.take(1, LONG_AFTER) for _ in range(60))
    assert not bucket.take(1, LONG_AFTER)
    assert bucket.remaining(LONG_AFTER) == 0
    assert bucket.wait_ns(1, LONG_AFTER) == SECOND
    assert not bucket.take(1, LONG_AFTER + SECOND - 1)
    assert bucket.take(1, LONG_AFTER + SECOND)
    assert bucket.told(LONG_AFTER + SECOND) == (0, b"1m0s")


def test_what_another_limit_refused_is_given_back() -> None:
    bucket = Bucket(10, 1)
    assert bucket.take(10, LONG_AFTER)
    bucket.give_back(10)
    assert bucket.remaining(LONG_AFTER) == 10
    assert bucket.told(LONG_AFTER) == (10, b"0s")


def test_nothing_piles_up_beyond_a_minutes_worth() -> None:
    bucket = Bucket(10, 1)
    bucket.settle(-500)
    assert bucket.remaining(LONG_AFTER) == 10
    assert bucket.take(10, LONG_AFTER)
    assert not bucket.take(1, LONG_AFTER)


def test_an_estimate_is_put_right_and_a_debt_is_paid_before_more_is_granted() -> None:
    bucket = Bucket(600, 1)
    assert bucket.take(100, LONG_AFTER)
    bucket.settle(-60)
    assert bucket.remaining(LONG_AFTER) == 560
    bucket.settle(1160)  # Far more came than was estimated: 600 are owed.
    assert bucket.remaining(LONG_AFTER) == 0
    assert bucket.wait_ns(1, LONG_AFTER) == 60 * SECOND + SECOND // 10
    assert not bucket.take(1, LONG_AFTER + 60 * SECOND)
    assert bucket.take(1, LONG_AFTER + 60 * SECOND + SECOND // 10)


def test_gateways_share_a_limit_rounded_up_and_each_has_at_least_one() -> None:
    assert [Bucket(10, n).share for n in (1, 2, 3, 4, 20)] == [10, 5, 4, 3, 1]


def test_a_request_between_share_and_limit_is_granted_from_a_full_bucket_and_owed() -> None:
    bucket = Bucket(1000, 4)
    assert bucket.wait_ns(800, LONG_AFTER) == 0
    assert bucket.take(800, LONG_AFTER)
    assert not bucket.take(1, LONG_AFTER + 2 * MINUTE_NS)
    assert bucket.take(1, LONG_AFTER + 3 * MINUTE_NS)


def test_more_than_the_whole_limit_is_never_granted() -> None:
    bucket = Bucket(1000, 4)
    assert not bucket.take(1001, LONG_AFTER)
    assert bucket.wait_ns(1001, LONG_AFTER) is None


def test_a_new_limit_neither_forgets_nor_punishes_what_was_used() -> None:
    bucket = Bucket(100, 1)
    assert bucket.take(70, LONG_AFTER)
    bucket.resize(200, 1)
    assert bucket.remaining(LONG_AFTER) == 130
    bucket.resize(10, 1)
    assert bucket.remaining(LONG_AFTER) == 10


@given(
    st.integers(1, 100_000),
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 20 * SECOND), st.integers(1, 100_000)), max_size=60),
)
def test_never_more_than_a_full_bucket_and_what_refilled(
    limit: int, gateways: int, asks: list[tuple[int, int]]
) -> None:
    bucket = Bucket(limit, gateways)
    now, granted, start = LONG_AFTER, 0, LONG_AFTER
    for later, n in asks:
        now += later
        if bucket.take(n, now):
            granted += n
            # One request may go beyond the share; after it the debt is paid first.
            refilled = bucket.share + (now - start) * bucket.share // MINUTE_NS
            assert granted <= refilled + max(n - bucket.share, 0)
        else:
            wait_ns = bucket.wait_ns(n, now)
            assert wait_ns is None or wait_ns > 0
            assert (wait_ns is None) == (n > limit)


@given(st.integers(1, 100_000), st.integers(1, 100_000), st.integers(0, MINUTE_NS))
def test_a_refused_request_is_granted_exactly_when_it_was_told(
    limit: int, used: int, after_ns: int
) -> None:
    bucket = Bucket(limit, 1)
    used = min(used, limit)
    assert bucket.take(used, LONG_AFTER)
    now = LONG_AFTER + after_ns
    wait_ns = bucket.wait_ns(limit, now)
    assert wait_ns is not None
    if wait_ns:
        assert not bucket.take(limit, now + wait_ns - 1)
    assert bucket.take(limit, now + wait_ns)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, b"0s"),
        (1, b"1ms"),
        (20_000_000, b"20ms"),
        (999_000_001, b"1s"),
        (SECOND, b"1s"),
        (8_640_000_000, b"8.64s"),
        (59_999_999_999, b"1m0s"),
        (360 * SECOND, b"6m0s"),
        (432 * SECOND + 5_000_000, b"7m12.005s"),
        (3600 * SECOND, b"1h0m0s"),
        (90_061_500_000_000, b"25h1m1.5s"),
    ],
)
def test_durations_as_openai_writes_them(ns: int, text: bytes) -> None:
    assert duration(ns) == text
