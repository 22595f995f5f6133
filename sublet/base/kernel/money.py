"""Money: integer micros of one currency. No floats, and two currencies never add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction

MICROS = 1_000_000


def round_half_even(value: Fraction) -> int:
    """The nearest integer; a half goes to the even neighbour."""
    return round(value)


@dataclass(frozen=True, slots=True, order=True)
class Money:
    micros: int
    currency: str = "USD"

    def __post_init__(self) -> None:
        if type(self.micros) is not int:
            raise TypeError(f"micros are an integer, not {self.micros!r}")

    @classmethod
    def parse(cls, text: str, currency: str = "USD") -> Money:
        """`"12.345678"` → exact micros. Raises ValueError past six decimals or on no number."""
        try:
            value = Decimal(text) * MICROS
        except InvalidOperation:
            raise ValueError(f"not an amount of money: {text!r}") from None
        if not value.is_finite() or value != value.to_integral_value():
            raise ValueError(f"an amount has at most six decimals: {text!r}")
        return cls(int(value), currency)

    def _same(self, other: Money) -> None:
        if self.currency != other.currency:
            raise ValueError(f"{self.currency} and {other.currency} do not add")

    def __add__(self, other: Money) -> Money:
        self._same(other)
        return Money(self.micros + other.micros, self.currency)

    def __sub__(self, other: Money) -> Money:
        self._same(other)
        return Money(self.micros - other.micros, self.currency)

    def __neg__(self) -> Money:
        return Money(-self.micros, self.currency)

    def __bool__(self) -> bool:
        return self.micros != 0

    def __str__(self) -> str:
        sign = "-" if self.micros < 0 else ""
        whole, part = divmod(abs(self.micros), MICROS)
        return f"{sign}{whole}.{part:06d} {self.currency}"

    def minor(self, digits: int = 2) -> int:
        """The amount in the currency's minor unit, rounded once, half-even."""
        return round_half_even(Fraction(self.micros, 10 ** (6 - digits)))


def apportion(micros: Sequence[int], digits: int = 2) -> list[int]:
    """Show lines in minor units so that they sum to the rounded total.

    Largest remainder: each line is rounded down, the units missing go to the lines whose
    cut-off part is largest, ties to the first line. Three lines of 0.334000 → 34, 33, 33.
    """
    unit: int = 10 ** (6 - digits)
    total = round_half_even(Fraction(sum(micros), unit))
    shown = [value // unit for value in micros]
    by_remainder = sorted(range(len(micros)), key=lambda i: (-(micros[i] % unit), i))
    for i in by_remainder[: total - sum(shown)]:
        shown[i] += 1
    return shown
