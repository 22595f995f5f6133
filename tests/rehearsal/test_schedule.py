"""The schedule keeps the runner's rules under a virtual clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from sublet.app.runner import Loop
from sublet.base.kernel.clock import VirtualClock
from sublet.capacity.engines.port import EngineError
from sublet.rehearsal.schedule import MOST_STEPS_AN_INSTANT, TICK, Schedule

START = datetime(2026, 11, 2, tzinfo=UTC)


def s(n: float) -> timedelta:
    return timedelta(seconds=n)


def stepped(schedule: Schedule, clock: VirtualClock, steps: int) -> list[tuple[float, str]]:
    found = []
    for _ in range(steps):
        name = schedule.step()
        found.append(((clock.now() - START).total_seconds(), name))
    return found


def test_loops_step_when_due_and_never_sleep_longer_than_the_runner_lets_them() -> None:
    clock = VirtualClock(START)
    loops = [Loop("a", lambda now: now + s(20)), Loop("b", lambda now: now + s(3600))]
    assert stepped(Schedule(loops, clock), clock, 6) == [
        (0, "a"),
        (0, "b"),
        (20, "a"),
        (30, "b"),
        (40, "a"),
        (60, "a"),
    ]


def test_a_nudge_wakes_those_that_read_events_even_from_inside_a_step() -> None:
    clock = VirtualClock(START)
    told: list[str] = []
    schedule: Schedule

    def tells(now: datetime) -> datetime:
        if not told:
            told.append("once")
            schedule.nudge()
        return now + s(10)

    loops = [Loop("tells", tells), Loop("deaf", lambda now: now + s(25), nudged=False)]
    schedule = Schedule(loops, clock)
    assert stepped(schedule, clock, 4) == [
        (0, "tells"),
        (0, "deaf"),
        (TICK.total_seconds(), "tells"),
        (10.001, "tells"),
    ]


def test_an_engine_that_does_not_answer_is_asked_again_after_growing_pauses() -> None:
    clock = VirtualClock(START)
    calls: list[float] = []

    def step(now: datetime) -> datetime:
        calls.append((now - START).total_seconds())
        if len(calls) < 5:
            raise EngineError
        return now + s(1)

    stepped(Schedule([Loop("a", step)], clock), clock, 6)
    assert calls == pytest.approx([0, 0.4, 1.2, 2.8, 6.0, 7.0])


def test_any_other_error_is_the_rehearsals_business() -> None:
    def step(now: datetime) -> datetime:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        Schedule([Loop("a", step)], VirtualClock(START)).step()


def test_loops_that_wake_each_other_for_ever_are_found_out() -> None:
    clock = VirtualClock(START)
    schedule: Schedule

    def step(now: datetime) -> datetime:
        schedule.nudge()
        return now

    schedule = Schedule([Loop("a", step), Loop("b", step)], clock)

    def spin() -> None:
        for _ in range(10 * MOST_STEPS_AN_INSTANT):
            schedule.step()
            schedule.wake("a", clock.now())
            schedule.wake("b", clock.now())

    with pytest.raises(AssertionError, match="spin"):
        spin()
