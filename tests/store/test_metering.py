"""Metering: contiguous usage, corrections, and device time that partitions exactly."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.ids import SeededIds
from sublet.base.kernel.interval import floor_ms, millis, millis_between
from sublet.base.kernel.price import PricePoint, Terms, Window, rate
from sublet.base.store import Actor, Store, Work, metadata, open_store
from sublet.records import metering
from sublet.records.metering import store as rows

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
SECOND = timedelta(seconds=1)
MS = timedelta(milliseconds=1)
ACTOR = Actor.system("test")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path}/metering.db", VirtualClock(NOON), SeededIds(1))
    metadata.create_all(opened.engine, tables=[rows.meters, rows.usage, rows.spans])
    yield opened
    opened.close()


def open_one(work: Work, run_id: str = "run_1", **more: Any) -> metering.Meter:
    fields: dict[str, Any] = {
        "workload_id": "ins_1",
        "organisation_id": "org_a",
        "project_id": "prj_1",
        "contract_id": "con_1",
        "pool_id": "pol_1",
        "node_id": "nod_1",
        "devices": 2,
        "party": "sale",
        "opened_at": NOON,
        **more,
    }
    return metering.open_meter(work, run_id=run_id, **fields)


def device_ms(windows: list[Window]) -> int:
    return sum(w.units * millis_between(w.start, w.end) for w in windows)


def test_usage_is_recorded_in_pieces_that_touch(store: Store) -> None:
    with store.work(ACTOR) as work:
        open_one(work, opened_at=NOON + timedelta(microseconds=700))
        metering.advance(work, "run_1", to=NOON + 10 * SECOND, cpu_ms=900)
        metering.advance(work, "run_1", to=NOON + 25 * SECOND + timedelta(microseconds=1999))
        meter = metering.close_meter(
            work, "run_1", at=NOON + 30 * SECOND, reason="user", cpu_ms=2900
        )
    assert meter.opened_at == NOON, "cut down to the millisecond"
    assert (meter.metered_to, meter.closed_at, meter.close_reason, meter.cpu_ms) == (
        NOON + 30 * SECOND,
        NOON + 30 * SECOND,
        "user",
        2900,
    )
    with store.read() as tx:
        for kind in metering.UsageKind:
            usage = metering.list_usage(tx, "run_1", kind)
            edges = [NOON, NOON + 10 * SECOND, NOON + 25 * SECOND + MS, NOON + 30 * SECOND]
            assert [(u.starts_at, u.ends_at) for u in usage] == list(itertools.pairwise(edges))
            assert {u.devices for u in usage} == {2}
        assert metering.windows(tx, "con_1") == [
            Window(start=NOON, end=NOON + 30 * SECOND, units=2)
        ]
        assert metering.windows(tx, "con_1", "ran") == metering.windows(tx, "con_1", "held")
        assert metering.windows_of_run(tx, "run_1") == metering.windows(tx, "con_1")
        assert metering.windows(tx, "con_2") == []


def test_a_meter_opens_and_closes_once_and_never_runs_backwards(store: Store) -> None:
    with store.work(ACTOR) as work:
        first = open_one(work)
        assert open_one(work, opened_at=NOON + SECOND, devices=5) == first
        metering.advance(work, "run_1", to=NOON + 9 * SECOND, cpu_ms=50)
        assert metering.list_open_meters(work.tx) == [metering.get_meter(work.tx, "run_1")]
        again = metering.advance(work, "run_1", to=NOON + 3 * SECOND, cpu_ms=40)
        assert (again.metered_to, again.cpu_ms) == (NOON + 9 * SECOND, 50)
        closed = metering.close_meter(work, "run_1", at=NOON + 9 * SECOND, reason="user")
        late = metering.close_meter(work, "run_1", at=NOON + 20 * SECOND, reason="abuse")
        assert late == closed
        with pytest.raises(metering.MeterClosed):
            metering.advance(work, "run_1", to=NOON + 20 * SECOND)
    with store.read() as tx:
        assert metering.list_open_meters(tx) == []
        assert metering.list_meters(tx, contract_id="con_1") == [closed]
        assert device_ms(metering.windows(tx, "con_1")) == 2 * 9000


def test_a_run_without_a_meter_is_said(store: Store) -> None:
    with store.work(ACTOR) as work:
        assert metering.find_meter(work.tx, "run_9") is None
        with pytest.raises(metering.MeterNotFound):
            metering.get_meter(work.tx, "run_9")
        with pytest.raises(metering.MeterNotFound):
            metering.advance(work, "run_9", to=NOON)
        with pytest.raises(metering.MeterNotFound):
            metering.close_meter(work, "run_9", at=NOON, reason="user")
        with pytest.raises(ValueError, match="at least one"):
            open_one(work, devices=0)


def test_closing_before_what_was_metered_takes_it_back_as_a_new_record(store: Store) -> None:
    with store.work(ACTOR) as work:
        open_one(work)
        metering.advance(work, "run_1", to=NOON + 10 * SECOND)
        metering.advance(work, "run_1", to=NOON + 20 * SECOND)
    with store.read() as tx:
        before = metering.list_usage(tx, "run_1")
    with store.work(ACTOR) as work:
        meter = metering.close_meter(work, "run_1", at=NOON + 4 * SECOND, reason="control_lost")
    assert (meter.metered_to, meter.closed_at) == (NOON + 4 * SECOND, NOON + 4 * SECOND)
    with store.read() as tx:
        after = metering.list_usage(tx, "run_1")
        assert after[:2] == before, "usage is immutable"
        assert [(c.starts_at, c.ends_at, c.devices, c.corrects) for c in after[2:]] == [
            (NOON + 4 * SECOND, NOON + 10 * SECOND, -2, before[0].event_id),
            (NOON + 10 * SECOND, NOON + 20 * SECOND, -2, before[1].event_id),
        ]
        for kind in metering.UsageKind:
            assert device_ms(metering.windows(tx, "con_1", kind)) == 2 * 4000


def test_closing_before_the_opening_leaves_nothing(store: Store) -> None:
    with store.work(ACTOR) as work:
        open_one(work)
        metering.advance(work, "run_1", to=NOON + SECOND)
        meter = metering.close_meter(work, "run_1", at=NOON - SECOND, reason="node_fault")
        assert meter.closed_at == NOON
        assert device_ms(metering.windows(work.tx, "con_1")) == 0


def test_a_correction_takes_back_part_of_what_it_names_once(store: Store) -> None:
    with store.work(ACTOR) as work:
        open_one(work)
        metering.advance(work, "run_1", to=NOON + 10 * SECOND)
        [event] = metering.list_usage(work.tx, "run_1")

        def correct(event_id: str, start: int, end: int, devices: int, **more: str) -> None:
            fields = {"corrects": event.event_id, "run_id": "run_1", **more}
            metering.correct(
                work,
                starts_at=NOON + start * SECOND,
                ends_at=NOON + end * SECOND,
                devices=devices,
                event_id=event_id,
                **fields,
            )

        correct("fix_1", 2, 6, -1)
        correct("fix_1", 2, 6, -1)
        correct("fix_2", 4, 8, -1)
        for wrong, param in (
            ((3, 5, -1), "devices"),  # 4–6 has none left
            ((0, 2, -3), "devices"),
            ((0, 2, 1), "devices"),
            ((-1, 2, -1), "starts_at"),
            ((9, 11, -1), "starts_at"),
            ((5, 5, -1), "starts_at"),
        ):
            with pytest.raises(metering.CorrectionRefused) as refused:
                correct("fix_9", *wrong)
            assert refused.value.param == param
        for named in ({"corrects": "fix_1"}, {"corrects": "nothing"}):
            with pytest.raises(metering.CorrectionRefused):
                correct("fix_9", 0, 1, -1, **named)
        correct("fix_3", 0, 1, -2)
        # 2 × 10 s − 1 × 4 s − 1 × 4 s − 2 × 1 s
        assert device_ms(metering.windows(work.tx, "con_1")) == 10_000
        assert device_ms(metering.windows(work.tx, "con_1", "ran")) == 20_000
        # Closing early takes back only what the corrections have left: 2 s of 2, 2 s of 1.
        metering.close_meter(work, "run_1", at=NOON + 2 * SECOND, reason="user")
        assert device_ms(metering.windows(work.tx, "con_1")) == 2_000
        cuts = [(u.starts_at, u.ends_at, u.devices) for u in metering.list_usage(work.tx, "run_1")]
    assert cuts[4:] == [
        (NOON + 2 * SECOND, NOON + 4 * SECOND, -1),
        (NOON + 6 * SECOND, NOON + 8 * SECOND, -1),
        (NOON + 8 * SECOND, NOON + 10 * SECOND, -2),
    ]


def test_m4_a_correction_is_priced_by_the_original_version(store: Store) -> None:
    """M4: 2.00/h to 12:00Z, then 3.00; later 600 s of 11:40–11:50 are taken back."""
    start = NOON - timedelta(minutes=30)
    terms = Terms(
        product="spot",
        currency="USD",
        per=3_600_000,
        points=(
            PricePoint(starts_at=start, micros=2_000_000, version="v1"),
            PricePoint(starts_at=NOON, micros=3_000_000, version="v2"),
        ),
    )
    with store.work(ACTOR) as work:
        open_one(work, opened_at=start, devices=1)
        metering.close_meter(work, "run_1", at=NOON + timedelta(minutes=30), reason="user")
        first = rate(terms, metering.windows(work.tx, "con_1"))
        assert [line.amount.micros for line in first.lines] == [1_000_000, 1_500_000]
        [event] = metering.list_usage(work.tx, "run_1")
        metering.correct(
            work,
            run_id="run_1",
            starts_at=NOON - timedelta(minutes=20),
            ends_at=NOON - timedelta(minutes=10),
            devices=-1,
            corrects=event.event_id,
            event_id="fix_1",
        )
        second = rate(terms, metering.windows(work.tx, "con_1"))
    # 1800 s − 600 s = 1200 s at 2.00/h = 0.666667; what is posted is −0.333333.
    assert second.amount.micros - first.amount.micros == -333_333


def test_a_requeued_job_has_one_window_a_run(store: Store) -> None:
    with store.work(ACTOR) as work:
        for number, run_id in enumerate(("run_1", "run_2")):
            begin = NOON + number * timedelta(minutes=10)
            open_one(work, run_id, opened_at=begin)
            for minute in (1, 2, 3):
                metering.advance(work, run_id, to=begin + timedelta(minutes=minute))
        assert metering.windows(work.tx, "con_1") == [
            Window(start=NOON, end=NOON + timedelta(minutes=3), units=2),
            Window(start=NOON + timedelta(minutes=10), end=NOON + timedelta(minutes=13), units=2),
        ]


def test_usage_with_a_gap_is_a_broken_invariant_and_not_a_price(store: Store) -> None:
    with store.work(ACTOR) as work:
        open_one(work)
        for second in (1, 2, 3):
            metering.advance(work, "run_1", to=NOON + second * SECOND)
        middle = metering.list_usage(work.tx, "run_1")[1]
        work.tx.execute(rows.usage.delete().where(rows.usage.c.event_id == middle.event_id))
        with pytest.raises(AssertionError, match="gaps"):
            metering.windows(work.tx, "con_1")


def test_the_database_keeps_usage_positive_and_events_unique(store: Store) -> None:
    with store.work(ACTOR) as work:
        open_one(work)
        metering.advance(work, "run_1", to=NOON + SECOND)
        [event] = metering.list_usage(work.tx, "run_1")
    good = {
        "event_id": "other",
        "run_id": "run_1",
        "organisation_id": "org_a",
        "contract_id": None,
        "kind": "held",
        "starts_at": NOON,
        "ends_at": NOON + SECOND,
        "devices": 1,
        "corrects": None,
        "recorded_at": NOON,
    }
    for wrong in (
        {"event_id": event.event_id},
        {"ends_at": NOON},
        {"devices": -1},
        {"corrects": event.event_id},
        {"corrects": event.event_id, "devices": 0},
    ):
        with pytest.raises(sa.exc.IntegrityError), store.work(ACTOR) as work:
            rows.insert_usage(work.tx, [{**good, **wrong}])
    with store.work(ACTOR) as work:
        rows.insert_usage(work.tx, [good])


def test_device_time_partitions_to_the_millisecond(store: Store) -> None:
    end = NOON + 60 * SECOND
    with store.work(ACTOR) as work:
        for device in ("dev_1", "dev_2"):
            metering.begin_device(work, device, "idle", NOON)
        metering.begin_device(work, "dev_1", "down", NOON + SECOND)  # has begun: no effect
        metering.switch_device(work, "dev_1", "overhead", NOON + 10 * SECOND, "run_1")
        metering.switch_device(
            work, "dev_1", "sold_used", NOON + 12 * SECOND + timedelta(microseconds=345_678), "c"
        )
        metering.switch_device(work, "dev_1", "idle", NOON + 40 * SECOND)
    with store.read() as tx:
        assert metering.partition(tx, start=NOON, end=end) == {
            "down": 0,
            "overhead": 2_345,
            "first_party": 0,
            "sold_used": 27_655,
            "sold_unused": 0,
            "serving": 0,
            "idle": 90_000,
        }
        part = metering.partition(
            tx, device_ids=["dev_1"], start=NOON + 11 * SECOND, end=NOON + 13 * SECOND
        )
        assert (part["overhead"], part["sold_used"], part["idle"]) == (1_345, 655, 0)
        assert sum(metering.partition(tx, device_ids=[], start=NOON, end=end).values()) == 0
        before = metering.partition(tx, start=NOON - 60 * SECOND, end=NOON)
        assert sum(before.values()) == 0


def test_switching_into_the_past_is_raised_to_the_open_span(store: Store) -> None:
    with store.work(ACTOR) as work:
        metering.begin_device(work, "dev_1", "idle", NOON)
        metering.switch_device(work, "dev_1", "sold_used", NOON + 9 * SECOND, "clm_1")
        metering.switch_device(work, "dev_1", "sold_used", NOON + 10 * SECOND, "clm_1")
        metering.switch_device(work, "dev_1", "down", NOON + 5 * SECOND)
        spans = metering.list_spans(work.tx, "dev_1")
    assert [(s.seq, s.use, s.starts_at, s.ends_at, s.ref) for s in spans] == [
        (1, "idle", NOON, NOON + 9 * SECOND, ""),
        (2, "down", NOON + 9 * SECOND, None, ""),
    ]


def test_a_device_that_never_began_is_not_switched(store: Store) -> None:
    with store.work(ACTOR) as work, pytest.raises(AssertionError, match="never begun"):
        metering.switch_device(work, "dev_9", "idle", NOON)


instants = st.integers(-3_000_000, 30_000_000).map(lambda us: NOON + timedelta(microseconds=us))


@settings(max_examples=60, deadline=None)
@given(
    switches=st.lists(
        st.tuples(
            st.sampled_from(["dev_1", "dev_2"]), st.sampled_from(list(metering.Use)), instants
        ),
        max_size=20,
    ),
    start=instants,
    length=st.timedeltas(timedelta(0), timedelta(seconds=40)),
)
def test_any_switches_partition_any_window(
    switches: list[Any], start: datetime, length: timedelta
) -> None:
    store = open_store("sqlite://", VirtualClock(NOON), SeededIds(1))
    metadata.create_all(store.engine, tables=[rows.spans])
    begun = NOON - timedelta(seconds=3)
    end = start + length
    with store.work(ACTOR) as work:
        for device in ("dev_1", "dev_2"):
            metering.begin_device(work, device, "idle", begun)
        for number, (device, use, at) in enumerate(switches):
            metering.switch_device(work, device, use, at, str(number))
        for device in ("dev_1", "dev_2"):
            spans = metering.list_spans(work.tx, device)
            assert spans[0].starts_at == begun
            assert [s.ends_at for s in spans[:-1]] == [s.starts_at for s in spans[1:]]
            assert all(s.ends_at is not None and s.starts_at < s.ends_at for s in spans[:-1])
            assert spans[-1].ends_at is None
        total = metering.partition(work.tx, start=start, end=end)
        assert sum(total.values()) == 2 * (millis(end) - millis(start))
        middle = start + length / 2
        halves = [
            metering.partition(work.tx, start=start, end=middle),
            metering.partition(work.tx, start=middle, end=end),
        ]
        assert {use: halves[0][use] + halves[1][use] for use in total} == total
    store.close()


@settings(max_examples=60, deadline=None)
@given(
    opened=instants,
    evidence=st.lists(instants, max_size=12),
    closed=st.one_of(st.none(), instants),
)
def test_any_evidence_gives_contiguous_usage_that_sums_to_the_metered_time(
    opened: datetime, evidence: list[datetime], closed: datetime | None
) -> None:
    store = open_store("sqlite://", VirtualClock(NOON), SeededIds(1))
    metadata.create_all(store.engine, tables=[rows.meters, rows.usage])
    with store.work(ACTOR) as work:
        open_one(work, opened_at=opened, devices=3)
        for at in evidence:
            metering.advance(work, "run_1", to=at)
        if closed is not None:
            metering.close_meter(work, "run_1", at=closed, reason="user")
        meter = metering.get_meter(work.tx, "run_1")
        plain = [u for u in metering.list_usage(work.tx, "run_1") if u.corrects is None]
        windows = metering.windows(work.tx, "con_1")
    seen = [floor_ms(opened), *map(floor_ms, evidence)]
    latest = max(seen)
    expected = latest if closed is None else max(floor_ms(closed), floor_ms(opened))
    assert meter.metered_to == expected
    assert meter.metered_to <= meter.last_evidence_at
    edges = [meter.opened_at, *(u.ends_at for u in plain)]
    assert [u.starts_at for u in plain] == edges[:-1]
    assert device_ms(windows) == 3 * millis_between(meter.opened_at, meter.metered_to)
    store.close()
