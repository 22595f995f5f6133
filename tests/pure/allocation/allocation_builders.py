"""Claims and books for tests: only the field that matters is shown."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import count as counter

from hypothesis import HealthCheck, settings

from sublet.capacity.allocation.book import PoolBook
from sublet.capacity.allocation.model import (
    Claim,
    Displacement,
    Party,
    Rank,
    Release,
    Urgency,
)

NOW = datetime(2026, 3, 2, 10, 0, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
_numbers = counter(1)


def examples(number: int) -> settings:
    """So many examples, however slow the machine is today."""
    return settings(
        max_examples=number, deadline=None, suppress_health_check=[HealthCheck.too_slow]
    )


def seconds(n: float) -> timedelta:
    return timedelta(seconds=n)


def a_book(
    supply: int, *, shelf: int | None = None, percent: int = 0, now: datetime = NOW
) -> PoolBook:
    """A pool of one node with all of it on the firm shelf unless said."""
    return PoolBook.empty(
        "pol_1",
        now=now,
        supply=supply,
        head_room_percent=percent,
        firm_shelf=supply if shelf is None else shelf,
    )


def a_sale(
    devices: int = 1,
    *,
    id: str | None = None,
    rank: Rank = Rank.SPOT,
    notice: int | None = 120,
    stop: int = 32,
    firm: int = 0,
    start: datetime = NOW,
    lasting: timedelta | None = None,
    organisation: str = "org_a",
    value: int = 1_000_000,
    displacement: Displacement | None = None,
    count: int = 1,
    whole_node: bool = False,
    opened: bool = False,
) -> Claim:
    """A sale; `opened`: its meter opened at its start."""
    name = id or f"clm_{next(_numbers):06d}"
    claim = Claim(
        id=name,
        holder=f"ins_{name}",
        organisation_id=organisation,
        pool_id="pol_1",
        party=Party.SALE,
        rank=rank,
        devices=devices,
        count=count,
        whole_node=whole_node,
        starts_at=start,
        release=Release(
            ends_at=None if lasting is None else start + lasting,
            notice_seconds=notice,
            firm_seconds=firm,
            stop_seconds=stop,
            displacement=displacement or Displacement(),
        ),
        value_micros_per_device_hour=value,
    )
    return replace(claim, opened_at=start) if opened else claim


def on_demand(devices: int = 1, **options: object) -> Claim:
    return a_sale(devices, rank=Rank.ON_DEMAND, notice=3600, firm=3600, **options)  # type: ignore[arg-type]


def a_block(devices: int, lasting: timedelta, **options: object) -> Claim:
    return a_sale(devices, rank=Rank.BLOCK, notice=None, lasting=lasting, **options)  # type: ignore[arg-type]


def a_need(
    devices: int,
    *,
    urgency: Urgency = Urgency.COMMITTED,
    start: datetime = NOW,
    lasting: timedelta | None = None,
    parent: str | None = None,
) -> Claim:
    name = f"clm_own_{next(_numbers):06d}"
    return Claim(
        id=name,
        holder=f"ned_{name}",
        organisation_id="org_owner",
        pool_id="pol_1",
        party=Party.FIRST_PARTY,
        urgency=urgency,
        rank=Rank.LEASE,
        devices=devices,
        starts_at=start,
        release=Release(ends_at=None if lasting is None else start + lasting, notice_seconds=0),
        parent_claim_id=parent,
    )
