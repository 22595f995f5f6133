"""Depreciation by day, straight line, to the micro. Pure.

    booked to a moment = (cost − residual) × time in service ÷ time of life, rounded down to micros

Time is real days: in service from 00:00Z of its day, for a life of whole calendar months. What
belongs to a day, a month or any other window is the difference of two such values, so windows
that meet sum without a rest, and all of them to cost − residual. At midnights this is the value
"booked to day d" of field case M6; inside a day it runs on by the millisecond.
"""

from __future__ import annotations

import calendar
from dataclasses import dataclass
from datetime import UTC, date, datetime

from sublet.base.kernel.interval import millis_between


@dataclass(frozen=True, slots=True, kw_only=True)
class Asset:
    """Something bought, in micros of the installation's currency."""

    cost_micros: int
    residual_micros: int
    in_service_on: date
    life_months: int

    def __post_init__(self) -> None:
        if self.life_months <= 0 or not 0 <= self.residual_micros <= self.cost_micros:
            raise ValueError("an asset needs a life, and 0 ≤ residual ≤ cost")


def add_months(day: date, months: int) -> date:
    """The same day of a later month, or that month's last where it is shorter."""
    index = day.year * 12 + day.month - 1 + months
    year, month = divmod(index, 12)
    return date(year, month + 1, min(day.day, calendar.monthrange(year, month + 1)[1]))


def life(asset: Asset) -> tuple[datetime, datetime]:
    """The first instant in service and the first after the life."""
    end = add_months(asset.in_service_on, asset.life_months)
    return _midnight(asset.in_service_on), _midnight(end)


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def booked_to(asset: Asset, at: datetime) -> int:
    """What has been booked up to an instant; 0 before service, cost − residual after the life."""
    start, end = life(asset)
    whole = millis_between(start, end)
    served = min(max(millis_between(start, at), 0), whole)
    return (asset.cost_micros - asset.residual_micros) * served // whole


def booked(asset: Asset, start: datetime, end: datetime) -> int:
    """What belongs to the window `[start, end)`."""
    if end < start:
        raise ValueError("a window ends before it starts")
    return booked_to(asset, end) - booked_to(asset, start)


def book_value(asset: Asset, at: datetime) -> int:
    return asset.cost_micros - booked_to(asset, at)
