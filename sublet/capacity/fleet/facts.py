"""Facts that an owner writes in TOML, read so that every error names its field. Pure.

Numbers are exact: decimals are read as decimals, never as binary fractions.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

from sublet.base.kernel.errors import Invalid
from sublet.base.kernel.money import MICROS

MAX_AMOUNT = 10**15
"""A thousand million dollars in micros: no figure here is above it."""


def read_facts(text: str, what: str) -> FactTable:
    """The root table of a document. Invalid: it is not TOML."""
    try:
        return FactTable("", tomllib.loads(text, parse_float=Decimal))
    except tomllib.TOMLDecodeError as error:
        raise Invalid(f"The {what} are not TOML: {error}.", param="text") from None


class FactTable:
    """One TOML table with its path, so that an error can name the field."""

    def __init__(self, path: str, values: Mapping[str, Any]) -> None:
        self._path = path
        self._values = values

    def field(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def wrong(self, name: str, rule: str) -> Invalid:
        field = self.field(name)
        return Invalid(f"`{field}` {rule}.", param=field)

    def only(self, *names: str) -> None:
        for name in self._values:
            if name not in names:
                raise self.wrong(name, f"is not a field here: use one of {', '.join(names)}")

    def tables(self, name: str) -> list[FactTable]:
        found = self.values(name)
        if not found or not all(isinstance(value, dict) for value in found):
            raise self.wrong(name, "is a list of at least one table")
        path = self.field(name)
        return [FactTable(f"{path}[{index}]", value) for index, value in enumerate(found)]

    def values(self, name: str) -> list[Any]:
        """A list as it stands; nothing is an empty one."""
        found = self._values.get(name, [])
        if not isinstance(found, list):
            raise self.wrong(name, "is a list")
        return found

    def text(self, name: str, default: str | None = None, longest: int = 200) -> str:
        value = self._values.get(name, default)
        if not isinstance(value, str) or (default is None and not value) or len(value) > longest:
            raise self.wrong(name, f"is a text of 1 to {longest} characters")
        return value

    def flag(self, name: str) -> bool:
        """True or false; left out is false."""
        value = self._values.get(name, False)
        if not isinstance(value, bool):
            raise self.wrong(name, "is true or false")
        return value

    def whole(self, name: str, *, low: int, high: int, default: int | None = None) -> int:
        value = self._values.get(name, default)
        if type(value) is not int or not low <= value <= high:
            raise self.wrong(name, f"is a whole number from {low} to {high}")
        return value

    def decimal(self, name: str, *, low: Decimal, high: Decimal, places: int) -> Decimal:
        rule = f"is a number from {low} to {high} with at most {places} decimals"
        value = self._values.get(name)
        # A truth value is a whole number to Python.
        if isinstance(value, bool) or not isinstance(value, (int, str, Decimal)):
            raise self.wrong(name, rule)
        try:
            number = Decimal(value)
            if number.is_finite() and low <= number <= high and number == round(number, places):
                return number
        except InvalidOperation:
            # No number, or more digits than any figure here has.
            pass
        raise self.wrong(name, rule)

    def micros(self, name: str) -> int:
        """An amount in dollars, exact to a millionth."""
        high = Decimal(MAX_AMOUNT // MICROS)
        return int(self.decimal(name, low=Decimal(0), high=high, places=6) * MICROS)

    def day(self, name: str) -> date:
        value = self._values.get(name)
        # A datetime is a date to Python; here it would hide a time of day.
        if not isinstance(value, date) or isinstance(value, datetime):
            raise self.wrong(name, "is a date such as 2026-01-31, without quotes")
        return value
