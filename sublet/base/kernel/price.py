"""The only sum that turns usage into money.

`rate(terms, windows)` is pure. It cuts each window at month ends (UTC) and at price changes, sums
the quantity of all pieces that share month, price version and reason, multiplies that sum by an
exact rational and rounds once per line, half-even, to micros. What is posted to the ledger is
always `rate(everything so far) − what was posted`, so no path of posting can drift from it.

Source of the conventions: product page, "Conventions"; field cases M2, M4, M5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from fractions import Fraction

from sublet.base.kernel.interval import (
    cut,
    millis,
    month_of,
    months_between,
)
from sublet.base.kernel.money import Money, round_half_even

DEVICE_HOUR_MS = 3_600_000
"""Device-milliseconds in one device-hour: the `per` of compute prices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PricePoint:
    """From `starts_at` on, `micros` per `Terms.per` units, under a version's name."""

    starts_at: datetime
    micros: int
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a contract says about price: a step function of time.

    `points` are ordered by `starts_at`; the first one also covers whatever lies before it.
    """

    product: str
    currency: str
    per: int
    points: tuple[PricePoint, ...]

    def __post_init__(self) -> None:
        if not self.points or self.per <= 0:
            raise ValueError("terms need a price point and a positive unit")
        starts = [point.starts_at for point in self.points]
        if starts != sorted(set(starts)):
            raise ValueError("price points must rise strictly in time")

    def point_at(self, at: datetime) -> PricePoint:
        found = self.points[0]
        for point in self.points:
            if point.starts_at <= at:
                found = point
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """`units` held over `[start, end)`: quantity = units × whole milliseconds.

    A negative `units` takes back usage that was recorded wrongly.
    """

    start: datetime
    end: datetime
    units: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One explained amount: `quantity` × `price_micros` / `per`, rounded once."""

    product: str
    month: datetime
    start: datetime
    end: datetime
    quantity: int
    price_micros: int
    per: int
    version: str
    amount: Money


@dataclass(frozen=True, slots=True)
class Rated:
    amount: Money
    lines: tuple[Line, ...]


def rate_quantity(quantity: int, micros: int, per: int) -> int:
    """What a quantity comes to: exact, then rounded once, half-even, to micros."""
    return round_half_even(Fraction(quantity * micros, per))


def cover_quantity(quantity: int, micros: int, per: int) -> int:
    """What must be set aside for a quantity: rounded up. However a quantity is cut, what its parts
    set aside suffices for what the whole of it is rated at."""
    return -(-quantity * micros // per)


def rate(terms: Terms, windows: Iterable[Window]) -> Rated:
    """Price usage. Lines come ordered by month, then by when their price began."""
    pieces: dict[tuple[datetime, datetime, str], list[tuple[datetime, datetime, int]]] = {}
    changes = [point.starts_at for point in terms.points[1:]]
    for window in windows:
        if window.end < window.start:
            raise ValueError("a window ends before it starts")
        edges = [*changes, *months_between(window.start, window.end)]
        for piece in cut(window.start, window.end, edges):
            assert piece.end is not None
            point = terms.point_at(piece.start)
            quantity = window.units * (millis(piece.end) - millis(piece.start))
            key = (month_of(piece.start), point.starts_at, point.version)
            pieces.setdefault(key, []).append((piece.start, piece.end, quantity))
    lines = tuple(_line(terms, key, pieces[key]) for key in sorted(pieces))
    total = sum(line.amount.micros for line in lines)
    return Rated(Money(total, terms.currency), lines)


def _line(
    terms: Terms,
    key: tuple[datetime, datetime, str],
    pieces: Sequence[tuple[datetime, datetime, int]],
) -> Line:
    month, price_from, version = key
    price = terms.point_at(price_from)
    quantity = sum(piece[2] for piece in pieces)
    return Line(
        product=terms.product,
        month=month,
        start=min(piece[0] for piece in pieces),
        end=max(piece[1] for piece in pieces),
        quantity=quantity,
        price_micros=price.micros,
        per=terms.per,
        version=version,
        amount=Money(rate_quantity(quantity, price.micros, terms.per), terms.currency),
    )
