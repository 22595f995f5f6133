"""Thousands of mixed requests through crashes of every part: what clients saw, what mocks made, what
spools hold and what the ledger took agree."""

from __future__ import annotations

import asyncio
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from sublet.base.wire.gateway import Outcome

from .crowd import CONNECTIONS, Crowd, Seen
from .judge import Evidence, disagreements, posted, unattributed
from .stage import ODD, PLAIN, Stage, a_stage

SOME, MANY = 4_000, 200_000
SHOWN = 40


def test_four_thousand_requests(tmp_path: Path) -> None:
    _run(tmp_path, SOME, mock_kills=3)


@pytest.mark.soak
@pytest.mark.timeout(3 * 3600)
def test_two_hundred_thousand_requests(tmp_path: Path) -> None:
    _run(tmp_path, MANY, mock_kills=16)


def _run(tmp_path: Path, count: int, *, mock_kills: int) -> None:
    with a_stage(tmp_path) as stage:
        crowd = Crowd(stage.gateway.port, stage.keys, stage.poor, (PLAIN, ODD), seed=count)
        at = {
            count // 3: stage.kill_gateway,
            count // 2: stage.kill_link,
            2 * count // 3: stage.kill_gateway,
        }
        names = list(stage.mocks)
        for number in range(mock_kills):
            place = count * (2 * number + 1) // (2 * mock_kills) + 7
            at[place] = partial(stage.kill_mock, names[number % len(names)])
        asyncio.run(crowd.ask(count, at))
        stage.settle()
        _judge(stage, crowd.seen, count)


def _judge(stage: Stage, seen: list[Seen], count: int) -> None:
    assert len(seen) == count
    booked = stage.booked()
    found = Evidence(
        seen=seen,
        made=stage.made(),
        spooled=stage.copies.events(),
        open_at_death=stage.open_at_death,
        booked=booked,
        killed=stage.killed,
        prices=stage.prices,
    )
    wrong = list(disagreements(found))
    assert not wrong, f"{len(wrong)} disagreements\n" + "\n".join(wrong[:SHOWN])
    _all_of_it_happened(stage, seen, found)

    # The ledger: each line's tokens by its price, rounded once; and no account below zero.
    for organisation in (stage.books.org, stage.poor_organisation):
        mine = [event for event in booked if event.organisation_id == organisation]
        assert stage.taken(organisation) == posted(mine, stage.prices)
    assert stage.books.balance() >= 0
    assert stage.books.open_allowances() == []
    assert stage.books.available() == stage.books.balance(), "a hold was left behind"
    assert stage.books.violations() == []

    # The mocks' own count: what nobody has a row for is booked as lost, to the token.
    made_by = {name: sum(row.made for row in mock.rows()) for name, mock in stage.mocks.items()}
    missing = unattributed(found, made_by)
    assert all(tokens >= 0 for tokens in missing.values()), missing
    gaps = stage.reconcile()
    assert {name: gaps.get(name, 0) for name in missing} == missing
    billed = sum(event.output for event in booked)
    assert billed + stage.lost_tokens() == sum(made_by.values())
    assert stage.books.violations() == []


def _all_of_it_happened(stage: Stage, seen: list[Seen], found: Evidence) -> None:
    """The test has met what it is for."""
    assert len(stage.killed) == 2
    outcomes = Counter(event.outcome for event in found.booked)
    ends = Counter(one.end for one in seen)
    codes = Counter(one.code for one in seen if one.code)
    print(f"{len(seen)} requests: {dict(ends)}; rows: {dict(outcomes)}; refusals: {dict(codes)}")
    for outcome in (Outcome.OK, Outcome.CLIENT_GONE, Outcome.INTERRUPTED, Outcome.FAILED):
        assert outcomes[outcome] > 10, outcomes
    assert outcomes[Outcome.LOST] > 0, "streams were open when gateways were killed"
    assert codes["insufficient_quota"] > 0, codes
    unknown = sum(one.end == "cut" and not one.rid for one in seen)
    assert unknown <= 2 * CONNECTIONS * len(stage.killed), "connections ended without a kill"
