"""Money: exact micros, one currency, shown so that it sums (M2)."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.money import Money, apportion, round_half_even

micros = st.integers(-(10**15), 10**15)


def test_m2_lines_are_shown_so_that_they_sum() -> None:
    """M2: three lines of 0.334000 make 1.00 = 0.34 + 0.33 + 0.33."""
    lines = [334_000] * 3
    assert Money(sum(lines)).minor() == 100
    assert apportion(lines) == [34, 33, 33]


def test_m2_a_named_credit_is_exact() -> None:
    assert apportion([100_000_000, -100_000_000]) == [10_000, -10_000]
    assert Money.parse("100.00").minor() == 10_000


@given(st.lists(micros, max_size=30), st.integers(0, 6))
def test_shown_lines_sum_to_the_rounded_total_and_none_is_off_by_a_unit(
    lines: list[int], digits: int
) -> None:
    unit = 10 ** (6 - digits)
    shown = apportion(lines, digits)
    assert sum(shown) == round_half_even(Fraction(sum(lines), unit))
    assert all(abs(got * unit - line) < unit for got, line in zip(shown, lines, strict=True))


@given(st.lists(micros, min_size=2, max_size=10))
def test_ties_go_to_the_first_line(lines: list[int]) -> None:
    twice = [lines[0], *lines[1:], lines[0]]
    shown = apportion(twice)
    assert shown[0] >= shown[-1]


@given(micros, micros)
def test_adding_and_taking_away_are_exact(left: int, right: int) -> None:
    assert Money(left) + Money(right) - Money(right) == Money(left)
    assert -Money(left) + Money(left) == Money(0)
    assert bool(Money(left)) == (left != 0)


@given(micros)
def test_an_amount_reads_as_it_is_written(amount: int) -> None:
    text = str(Money(amount))
    assert text.endswith(" USD")
    assert Money.parse(text.removesuffix(" USD")) == Money(amount)


def test_a_half_goes_to_the_even_neighbour() -> None:
    assert [Money(value).minor() for value in (5_000, 15_000, 25_000, -5_000, -15_000)] == [
        0,
        2,
        2,
        0,
        -2,
    ]


def test_two_currencies_never_add() -> None:
    for act in (lambda: Money(1) + Money(1, "EUR"), lambda: Money(1) - Money(1, "EUR")):
        with pytest.raises(ValueError, match="do not add"):
            act()


@pytest.mark.parametrize("wrong", [1.0, True, "1"])
def test_micros_are_an_integer(wrong: object) -> None:
    with pytest.raises(TypeError, match="integer"):
        Money(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "x", "1.0000001", "NaN", "Infinity", "1,5"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="amount"):
        Money.parse(text)
