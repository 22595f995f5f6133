"""The posted spot price: on the hour, at most 20 % a step, known one longest notice ahead. Pure.

    target = max(floor, bid)
    price(hour) = target, brought within ± 20 % of the hour before

Rows are immutable. An hour is posted `POSTING_LEAD` or more before it begins; one that was missed
(the cloud was down) repeats the price before it, so that nobody pays a rise that was not told in
time. An hour without a row has the price of the last row before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sublet.base.kernel.price import PricePoint
from sublet.rights.market.model import SpotPrice, priced
from sublet.rights.market.ratecard import SPOT_NOTICE_SECONDS

HOUR = timedelta(hours=1)
MAX_STOP_GRACE_SECONDS = 600
POSTING_LEAD = timedelta(seconds=SPOT_NOTICE_SECONDS[1] + MAX_STOP_GRACE_SECONDS)
"""The longest spot notice and the longest grace: whoever's price limit is passed gets both."""
POSTING_MARGIN = timedelta(minutes=10)
"""Posted this much earlier still: a loop that is late by less breaks no promise."""
STEP_PERCENT = 20


def hour_of(at: datetime) -> datetime:
    at = at.astimezone(UTC)
    return at.replace(minute=0, second=0, microsecond=0)


def step(previous: int | None, *, bid: int, floor: int) -> int:
    """The next hour's price. Without one before it, the target itself."""
    target = max(floor, bid)
    if previous is None:
        return target
    lowest = -(-previous * (100 - STEP_PERCENT) // 100)
    highest = previous * (100 + STEP_PERCENT) // 100
    return min(max(target, lowest), highest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Market:
    """What drives the price of one hour."""

    bid: int
    floor: int


def hours_due(last: datetime | None, now: datetime) -> list[datetime]:
    """The hours to post now, in order. Hours wholly past are left out: they repeat."""
    hour = hour_of(now) if last is None else max(last + HOUR, hour_of(now))
    due = []
    while hour <= now + POSTING_LEAD + POSTING_MARGIN:
        due.append(hour)
        hour += HOUR
    return due


def post(
    pool_id: str,
    last: SpotPrice | None,
    now: datetime,
    market: Callable[[datetime], Market | None],
) -> list[SpotPrice]:
    """The rows to add. `market(hour)` says what drives that hour; None: spot is not sold then."""
    rows: list[SpotPrice] = []
    previous = last
    for hour in hours_due(last.hour if last else None, now):
        drive = market(hour)
        if drive is None:
            continue
        is_late = previous is not None and now > hour - POSTING_LEAD
        if is_late:
            assert previous is not None
            micros = previous.micros
        else:
            before = previous.micros if previous else None
            micros = step(before, bid=drive.bid, floor=drive.floor)
        previous = SpotPrice(
            pool_id=pool_id,
            hour=hour,
            micros=micros,
            floor_micros=drive.floor,
            bid_micros=drive.bid,
            posted_at=now,
        )
        rows.append(previous)
    return rows


def next_posting_at(now: datetime) -> datetime:
    """When the next hour falls due."""
    reach = hour_of(now + POSTING_LEAD + POSTING_MARGIN) + HOUR
    return reach - POSTING_LEAD - POSTING_MARGIN


def points_of(
    rows: Sequence[SpotPrice], factor_permille: int, at_most: int | None = None
) -> tuple[PricePoint, ...]:
    """Price points of a run whose first row covers its start; equal neighbours are one point.

    Appending rows never changes an earlier point, so a line once rated keeps its key. A run is
    never billed above its limit: if it is ended late, that is not the consumer's fault.
    """
    points: list[PricePoint] = []
    for row in rows:
        micros = priced(row.micros, factor_permille)
        if at_most is not None:
            micros = min(micros, at_most)
        if points and points[-1].micros == micros:
            continue
        version = f"spot {row.hour:%Y-%m-%dT%HZ}"
        points.append(PricePoint(starts_at=row.hour, micros=micros, version=version))
    return tuple(points)
