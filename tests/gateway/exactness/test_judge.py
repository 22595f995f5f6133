"""The judge is not blind: each way in which books, spools, mocks and clients may differ is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from sublet.base.wire.gateway import Outcome, Price, UsageEvent

from .counting import Made
from .crowd import Seen
from .judge import Evidence, disagreements, posted, unattributed

KILLED = 0xABC
PRICE = Price(version="v", input_micros=333_333, cached_micros=10**6, output_micros=1_500_000)
LATER_US = 1_000_000_000


def event(number: int, **changes: Any) -> UsageEvent:
    """Ten tokens in, five out; epoch 1 unless it says another id."""
    values: dict[str, Any] = {
        "id": f"req_1gw0{number:08x}", "key_id": "key_1", "organisation_id": "org_1",
        "project_id": None, "is_first_party": False, "model": "mock", "deployment_id": "dep_1",
        "replica_id": "rep_1", "surface": "chat", "tier": "default", "price_version": "v",
        "outcome": Outcome.OK, "started_us": 1, "ended_us": 3, "first_us": 2, "input_uncached": 10,
        "cache_read": 0, "output": 5, "made": 5, "micros": 4 + 8,
    }  # fmt: skip
    return UsageEvent(**{**values, **changes})


def seen(of: UsageEvent, **changes: Any) -> Seen:
    values: dict[str, Any] = {
        "kind": "stream", "key": "key_1", "model": "mock", "is_stream": True, "rid": of.id,
        "status": 200, "tokens": 5, "end": "whole", "usage": (10, 5),
    }  # fmt: skip
    return Seen(**{**values, **changes})


def made(of: UsageEvent, **changes: Any) -> Made:
    values: dict[str, Any] = {"id": of.id, "begun_us": 1, "prompt": 10, "made": 5, "end": "whole"}
    return Made(**{**values, **changes})


WHOLE = event(1)
LEFT = event(2, outcome=Outcome.CLIENT_GONE, output=3, made=3, micros=4 + 5)
BROKEN = event(3, outcome=Outcome.INTERRUPTED, output=2, made=2, micros=4 + 3)
FAILED = event(4, outcome=Outcome.FAILED, input_uncached=0, output=0, made=0, micros=0)
LOST = event(
    5,
    id=f"req_{KILLED:x}gw000000005",
    outcome=Outcome.LOST,
    input_uncached=0,
    output=0,
    made=4,
    micros=0,
)
UNKNOWN = f"req_{KILLED:x}gw000000006"
"""Of a life that was killed, and in no file."""
SOUND = Evidence(
    seen=[
        seen(WHOLE),
        seen(LEFT, tokens=2, end="left", usage=None),
        seen(BROKEN, tokens=2, end="error", code="stream_interrupted", usage=None),
        seen(FAILED, status=503, tokens=0, end="error", code="no_replica", usage=None),
        seen(LOST, tokens=3, end="cut", usage=None),
    ],
    made={
        WHOLE.id: [made(WHOLE)],
        LEFT.id: [made(LEFT, made=9, end="gone")],
        BROKEN.id: [made(BROKEN, made=2, end="died")],
        FAILED.id: [made(FAILED, made=0, end="error")],
        LOST.id: [made(LOST, made=6, end="gone")],
        UNKNOWN: [made(LOST, id=UNKNOWN, begun_us=LATER_US - 10, made=2, end="gone")],
    },
    spooled=[WHOLE, LEFT, BROKEN, FAILED],
    open_at_death=[LOST],
    booked=[WHOLE, LEFT, BROKEN, FAILED, LOST],
    killed={KILLED: LATER_US},
    prices={"v": PRICE},
)


def booked(*changed: UsageEvent, without: str = "") -> dict[str, Any]:
    """The books and the spools with another row in place of the one of its id."""
    other = {found.id: found for found in changed}
    return {
        name: [other.get(row.id, row) for row in rows if row.id != without]
        for name, rows in (("booked", SOUND.booked), ("spooled", SOUND.spooled))
    }


def watched(of: UsageEvent, **changes: Any) -> dict[str, Any]:
    """A client that saw something else."""
    return {"seen": [replace(one, **changes) if one.rid == of.id else one for one in SOUND.seen]}


def counted(of: UsageEvent, **changes: Any) -> dict[str, Any]:
    """A mock that counted something else."""
    return {"made": {**SOUND.made, of.id: [replace(SOUND.made[of.id][0], **changes)]}}


def test_what_agrees_is_not_found_wrong() -> None:
    assert list(disagreements(SOUND)) == []


WRONG: dict[str, Callable[[], dict[str, Any]]] = {
    "an answer without a bill": lambda: booked(without=WHOLE.id),
    "a spooled row that is not in the books": lambda: {"booked": SOUND.booked[1:]},
    "a row in the books alone": lambda: {"spooled": SOUND.spooled[1:]},
    "a row twice in the spool": lambda: {"spooled": [*SOUND.spooled, WHOLE]},
    "a row twice in the books": lambda: {"booked": [*SOUND.booked, WHOLE]},
    "a row that the books changed": lambda: {"booked": [event(1, output=6), *SOUND.booked[1:]]},
    "what was open at death forgotten": lambda: {"booked": SOUND.booked[:-1]},
    "what was open at death billed": lambda: {
        "booked": [*SOUND.booked[:-1], replace(LOST, outcome=Outcome.OK, output=4, micros=6)]
    },
    "an answer billed for less": lambda: booked(event(1, output=4, micros=4 + 6)),
    "an answer billed for more": lambda: booked(event(1, output=6, micros=4 + 9)),
    "an answer whose input is not what was read": lambda: counted(WHOLE, prompt=11),
    "an answer that told other counts": lambda: watched(WHOLE, usage=(10, 6)),
    "tokens that came and are not billed": lambda: watched(WHOLE, tokens=6),
    "an answer billed as interrupted": lambda: booked(event(1, outcome=Outcome.INTERRUPTED)),
    "an answer that no mock made": lambda: counted(WHOLE, made=0),
    "one who left billed for less than came": lambda: watched(LEFT, tokens=4),
    "one who left billed for more than was made": lambda: counted(LEFT, made=2),
    "a broken stream billed for more than came": lambda: watched(BROKEN, tokens=1),
    "a broken stream without a bill": lambda: booked(without=BROKEN.id),
    "a failure that costs": lambda: booked(replace(FAILED, input_uncached=1, micros=1)),
    "a refusal billed as whole": lambda: watched(WHOLE, end="error", status=503),
    "a connection that ended without a kill": lambda: watched(WHOLE, end="cut"),
    "a wrong amount": lambda: booked(event(1, micros=13)),
    "work without a row": lambda: {"made": {**SOUND.made, "req_1gw000000099": [made(WHOLE)]}},
    "work without a row, long before a kill": lambda: {
        "made": {**SOUND.made, UNKNOWN: [made(LOST, id=UNKNOWN, begun_us=1)]}
    },
    "work without an id": lambda: {"made": {**SOUND.made, "": [made(WHOLE, id="")]}},
    "two requests with one id": lambda: {"seen": [*SOUND.seen, seen(WHOLE)]},
}


@pytest.mark.parametrize("name", WRONG)
def test_what_disagrees_is_found(name: str) -> None:
    assert list(disagreements(replace(SOUND, **WRONG[name]())))


def test_money_is_each_lines_sum_rounded_once() -> None:
    # 20 tokens in: 6.66666, 10 out: 15, of one line each; not 4 + 8 for each request.
    assert posted([event(1), event(2)], SOUND.prices) == 7 + 15
    # A tie goes to the even micro: 1 out is 1.5, 3 out are 4.5.
    none = {"input_uncached": 0, "micros": 0}
    assert posted([event(1, output=1, **none)], SOUND.prices) == 2
    assert posted([event(1, output=3, **none)], SOUND.prices) == 4
    assert posted([event(1), event(2, key_id="key_2")], SOUND.prices) == 2 * (3 + 8)


def test_what_a_mock_made_beyond_the_books() -> None:
    assert unattributed(SOUND, {"rep_1": 20}) == {"rep_1": 20 - (5 + 3 + 2 + 0 + 4)}
