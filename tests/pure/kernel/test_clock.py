"""Time: it never runs backwards, and a step of the wall clock is slewed away, never jumped."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.clock import (
    SETTLED_US,
    SLEW_PPM,
    STEP_TOLERANCE_US,
    Anchor,
    SystemClock,
    VirtualClock,
    discipline,
    first_anchor,
    read_boot_id,
    read_boot_ns,
)
from sublet.base.kernel.interval import from_micros, micros_since_epoch

BOOT = read_boot_id()
START_US = micros_since_epoch(datetime(2026, 3, 2, 12, tzinfo=UTC))
SECOND_NS = 1_000_000_000


def an_anchor(boot_ns: int = 0, utc_us: int = START_US, rate_ppm: int = 0) -> Anchor:
    return Anchor(boot_id=BOOT, boot_ns=boot_ns, utc_us=utc_us, rate_ppm=rate_ppm)


def test_f4_a_wall_clock_that_jumps_ten_minutes_moves_no_deadline() -> None:
    """F4: a deadline fixed on the boot clock stays; what is shown of it moves by the slew alone."""
    anchors = [an_anchor()]
    clock = SystemClock(anchors)
    noticed = 50 * SECOND_NS
    term_at = clock.from_boot_ns(noticed) + timedelta(seconds=120)
    deadline = clock.to_boot_ns(term_at)
    assert deadline - noticed == 120 * SECOND_NS
    jumped = an_anchor().utc_us_at(60 * SECOND_NS) + 600 * 10**6
    added = discipline(anchors, 60 * SECOND_NS, jumped)
    assert added is not None
    clock.adopt([*anchors, added])
    # 110 s remain at the jump; 110 s × 500 ppm = 55 ms.
    assert clock.from_boot_ns(deadline) - term_at == timedelta(milliseconds=55)


def test_steps_up_to_a_second_are_left_alone() -> None:
    anchors = [an_anchor()]
    for step in (0, STEP_TOLERANCE_US, -STEP_TOLERANCE_US):
        assert discipline(anchors, SECOND_NS, START_US + 10**6 + step) is None
    for step, rate in ((STEP_TOLERANCE_US + 1, SLEW_PPM), (-STEP_TOLERANCE_US - 1, -SLEW_PPM)):
        added = discipline(anchors, SECOND_NS, START_US + 10**6 + step)
        assert added == an_anchor(SECOND_NS, START_US + 10**6, rate)


@pytest.mark.parametrize("step_s", [2, 30, -2, -30])
def test_a_step_is_slewed_away_and_then_the_clock_runs_true(step_s: int) -> None:
    anchors = [an_anchor()]
    offset = step_s * 10**6
    looks = 0
    # 500 ppm: 2000 s a second of step; a look every 10 s.
    for looks in range(1, abs(step_s) * 200 + 10):
        boot_ns = looks * 10 * SECOND_NS
        added = discipline(anchors, boot_ns, START_US + boot_ns // 1000 + offset)
        if added is not None:
            anchors.append(added)
        if len(anchors) == 3:
            break
    assert [a.rate_ppm for a in anchors] == [0, SLEW_PPM * (1 if step_s > 0 else -1), 0]
    wall_us = START_US + looks * 10 * 10**6 + offset
    assert abs(anchors[-1].utc_us_at(looks * 10 * SECOND_NS) - wall_us) <= SETTLED_US


steps = st.lists(
    st.tuples(
        st.integers(0, 3600 * SECOND_NS),  # until the next look
        st.one_of(st.just(0), st.integers(-(10**10), 10**10)),  # the wall steps by, µs
    ),
    max_size=20,
)


def disciplined(walk: list[tuple[int, int]]) -> tuple[list[Anchor], list[int]]:
    """Anchors made by looking at a wall that steps, and when it was looked at."""
    anchors, looks, boot_ns, offset = [an_anchor()], [0], 0, 0
    for wait_ns, step_us in walk:
        boot_ns += wait_ns
        offset += step_us
        looks.append(boot_ns)
        added = discipline(anchors, boot_ns, START_US + boot_ns // 1000 + offset)
        if added is not None:
            anchors.append(added)
    return anchors, looks


@given(steps, st.lists(st.integers(0, 20 * 3600 * SECOND_NS), max_size=10))
def test_now_never_runs_backwards_nor_faster_than_the_slew(
    walk: list[tuple[int, int]], readings: list[int]
) -> None:
    anchors, looks = disciplined(walk)
    clock = SystemClock(anchors)
    edges = [edge for look in looks for edge in (look - 1, look, look + 1) if edge >= 0]
    at = sorted({*edges, *readings})
    shown = [micros_since_epoch(clock.from_boot_ns(boot_ns)) for boot_ns in at]
    for (left_ns, left_us), (right_ns, right_us) in zip(
        zip(at, shown, strict=True), zip(at[1:], shown[1:], strict=True), strict=False
    ):
        elapsed_ns = right_ns - left_ns
        assert right_us >= left_us
        # 500 ppm either way, and a microsecond of cutting down for each anchor between.
        off = abs((right_us - left_us) * 1000 - elapsed_ns)
        assert off <= elapsed_ns * SLEW_PPM // 10**6 + 1000 * (len(anchors) + 1)


@given(steps, st.integers(0, 10**13))
def test_anchors_made_later_change_nothing_that_was_shown_before(
    walk: list[tuple[int, int]], boot_ns: int
) -> None:
    anchors, _ = disciplined(walk)
    for kept in range(1, len(anchors)):
        if boot_ns <= anchors[kept].boot_ns:
            before = SystemClock(anchors[:kept]).from_boot_ns(boot_ns)
            assert SystemClock(anchors).from_boot_ns(boot_ns) == before


@given(steps, st.integers(0, 20 * 3600 * 10**6))
def test_an_instant_and_its_boot_clock_reading_name_each_other(
    walk: list[tuple[int, int]], later_us: int
) -> None:
    clock = SystemClock(disciplined(walk)[0])
    at = from_micros(START_US + later_us)
    boot_ns = clock.to_boot_ns(at)
    assert clock.from_boot_ns(boot_ns) == at
    assert clock.from_boot_ns(boot_ns - 1) < at, "the first reading that shows it"


@given(st.integers(0, 2**53), st.one_of(st.none(), st.integers(0, 2**53)))
def test_a_new_boot_begins_where_time_was_last_seen(wall_us: int, seen: int | None) -> None:
    anchor = first_anchor(BOOT, 7, wall_us, seen)
    assert anchor.utc_us_at(7) == max(wall_us, seen or 0)
    assert anchor.rate_ppm == 0


def test_a_clock_demands_anchors_of_this_boot() -> None:
    other = Anchor(boot_id="another boot", boot_ns=0, utc_us=0)
    for anchors in ([], [other], [an_anchor(), other]):
        with pytest.raises(ValueError, match="this boot"):
            SystemClock(anchors)
    clock = SystemClock([an_anchor()])
    clock.adopt([other])
    assert clock.from_boot_ns(0) == from_micros(START_US), "nothing of this boot to adopt"


def test_the_system_clock_reads_the_boot_clock() -> None:
    clock = SystemClock.unanchored()
    assert clock.boot_id() == BOOT
    before = read_boot_ns()
    now = clock.now()
    after = read_boot_ns()
    assert clock.from_boot_ns(before) <= now <= clock.from_boot_ns(after)
    assert before <= clock.boot_ns()
    assert now.tzinfo is UTC


def test_a_virtual_clock_moves_when_told_and_never_back() -> None:
    start = datetime(2026, 3, 2, 12, tzinfo=UTC)
    clock = VirtualClock(start)
    assert (clock.now(), clock.boot_ns(), clock.boot_id()) == (start, 0, "virtual")
    clock.advance_to(start + timedelta(seconds=1))
    assert clock.boot_ns() == SECOND_NS
    assert clock.from_boot_ns(clock.to_boot_ns(start)) == start
    with pytest.raises(ValueError, match="backwards"):
        clock.advance_to(start)
