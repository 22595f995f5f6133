"""The words for durations, instants and prices: typed ones read, values shown."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from sublet.base.kernel.clock import SystemClock
from sublet.base.kernel.money import MICROS, Money
from sublet.cli.errors import UsageError

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_DURATION = re.compile(r"(\d+)([smhdw]?)")


def now() -> datetime:
    return SystemClock.unanchored().now()


def seconds(text: str, option: str) -> int:
    """`90`, `90s`, `10m`, `1h30m`, `2d` → seconds."""
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise UsageError(f"{option} is a duration such as 90s, 10m, 1h30m or 2d, not {text!r}.")
    return sum(int(number) * _UNITS[unit or "s"] for number, unit in parts)


def instant(text: str, option: str, *, ago: bool = False) -> datetime:
    """`2026-11-25T10:00Z`, `2026-11-25`, or a duration from now (or ago) such as `10m`."""
    if _DURATION.match(text) and not re.match(r"\d{4}-", text):
        distance = timedelta(seconds=seconds(text, option))
        return now() - distance if ago else now() + distance
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{option} is a time such as 2026-11-25T10:00Z, or a distance such as 10m, not {text!r}."
        ) from None
    return found.replace(tzinfo=found.tzinfo or UTC).astimezone(UTC)


def micros(text: str, option: str) -> int:
    """`0.05` → micros of the cloud's currency."""
    try:
        amount = Money.parse(text).micros
    except ValueError as error:
        raise UsageError(f"{option}: {error}.") from None
    if amount <= 0:
        raise UsageError(f"{option} is an amount above zero, not {text!r}.")
    return amount


def environment(words: list[str]) -> dict[str, str]:
    """`NAME=value` words → variables."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise UsageError(f"--env is NAME=value, not {word!r}.")
        found[name] = value
    return found


def money(amount_micros: int, currency: str = "USD") -> str:
    """At least two decimals, as many of the six as say something: `0.0042 USD`."""
    sign = "-" if amount_micros < 0 else ""
    whole, part = divmod(abs(amount_micros), MICROS)
    decimals = f"{part:06d}".rstrip("0").ljust(2, "0")
    return f"{sign}{whole}.{decimals} {currency}"


def an_hour(amount_micros: int, currency: str = "USD") -> str:
    return f"{money(amount_micros, currency)}/h"


def length(count: int | None) -> str:
    """Seconds as a person says them: `30 s`, `2 min`, `1 h 30 min`."""
    if count is None:
        return "-"
    if count < 120:
        return f"{count} s"
    days, rest = divmod(count, 86_400)
    hours, rest = divmod(rest, 3600)
    minutes, odd = divmod(rest, 60)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (odd, "s")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


def when(at: datetime | None) -> str:
    return "-" if at is None else f"{at:%Y-%m-%d %H:%M:%S}Z"


def device_hours(device_ms: int) -> str:
    return f"{device_ms / 3_600_000:.4f}"


def devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
