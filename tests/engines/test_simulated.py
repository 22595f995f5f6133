from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.ids import seeded_rng
from sublet.capacity.engines.port import (
    Engine,
    EngineError,
    Notice,
    Observation,
    Phase,
    RunNotFound,
    StartRefused,
    StartSpec,
)
from sublet.capacity.engines.simulated import (
    FaultKind,
    SimulatedEngine,
    behaviour_of,
    seeded_faults,
)

T0 = datetime(2026, 11, 2, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


class World:
    """An engine, and a clock to move it by."""

    def __init__(self, **options: Any) -> None:
        self.clock = VirtualClock(T0)
        self.engine = SimulatedEngine(self.clock, **options)

    def to(self, seconds: float) -> None:
        self.clock.advance_to(at(seconds))

    def start(self, run_id: str = "run_1", **fields: Any) -> None:
        self.engine.start(a_spec(run_id, **fields))

    def see(self, run_id: str = "run_1") -> Observation:
        return self.engine.observe()[run_id]


def a_spec(run_id: str = "run_1", **fields: Any) -> StartSpec:
    values: dict[str, Any] = {
        "run_id": run_id,
        "workload_id": "job_1",
        "organisation_id": "org_1",
        "kind": "job",
        "devices": ("n0001.gpu0",),
        "memory_bytes": 1 << 30,
        "disk_bytes": 1 << 30,
        "command": ("sleep", "600"),
        "script": "",
        "env": {},
        "home": "job_1",
        "hostname": "job-1",
        "outbound": False,
        "stop_grace_seconds": 30,
        "notice_signal": None,
        "metadata": {},
        "runway_until": at(100_000),
    }
    return StartSpec(**{**values, **fields})


def test_it_is_an_engine() -> None:
    assert isinstance(World().engine, Engine)


def test_devices_are_named_once_in_the_whole_fleet() -> None:
    found = World(nodes=12, devices=8).engine.inventories()
    names = [device.name for inventory in found for device in inventory.devices]
    assert len(names) == len(set(names)) == 96
    assert names[0] == "n0001.gpu0"
    assert all(not inventory.missing_for_strangers() for inventory in found)


def test_a_job_starts_runs_and_completes_at_its_own_times() -> None:
    world = World(start_seconds=2)
    world.start()
    assert world.see().phase is Phase.STARTING
    world.to(2)
    seen = world.see()
    assert (seen.phase, seen.started_at, seen.last_evidence_at) == (Phase.RUNNING, at(2), at(2))
    world.to(5000)
    seen = world.see()
    assert (seen.phase, seen.exited_at, seen.exit_code) == (Phase.EXITED, at(602), 0)
    assert seen.term_reason is None
    assert seen.cpu_ms == 600_000


def test_starting_twice_is_starting_once() -> None:
    world = World()
    world.start()
    world.to(10)
    world.start(command=("sleep", "1"))
    assert world.see().phase is Phase.RUNNING
    assert len(world.engine.live_runs()) == 1


def test_a_device_carries_one_live_run() -> None:
    world = World()
    world.start()
    with pytest.raises(StartRefused):
        world.start("run_2")
    world.start("run_3", devices=("n0001.gpu1",))
    world.to(1000)
    world.start("run_2")


def test_a_notice_gives_sigterm_at_its_deadline_and_never_earlier() -> None:
    world = World()
    world.start(env={"SIM_SECONDS": "inf", "SIM_TERM_SECONDS": "7"})
    world.to(10)
    notice = Notice(term_at=at(130), action="stop", reason="owner_recall")
    assert world.engine.notice("run_1", notice) == at(130)
    earlier = Notice(term_at=at(20), action="stop", reason="owner_recall")
    assert world.engine.notice("run_1", earlier) == at(130)
    world.to(129.999)
    assert world.see().phase is Phase.RUNNING
    assert world.see().deadline_at == at(130)
    world.to(131)
    seen = world.see()
    assert (seen.phase, seen.term_at, seen.term_reason) == (Phase.STOPPING, at(130), "notice")
    world.to(200)
    assert (world.see().exited_at, world.see().exit_code) == (at(137), 143)


def test_who_ignores_sigterm_is_killed_after_the_grace() -> None:
    world = World()
    world.start(command=("sh", "-c", "trap '' TERM; while true; do sleep 1; done"))
    world.to(10)
    world.engine.stop("run_1", grace_seconds=30, reason="user")
    world.to(39)
    assert world.see().phase is Phase.STOPPING
    world.to(60)
    seen = world.see()
    assert (seen.exited_at, seen.exit_code, seen.term_reason) == (at(40), 137, "stop:user")


def test_a_withdrawn_notice_ends_nothing() -> None:
    world = World()
    world.start(env={"SIM_SECONDS": "inf"}, runway_until=at(50))
    world.to(10)
    world.engine.notice("run_1", Notice(term_at=at(130), action="stop", reason="owner_recall"))
    world.to(100)
    assert world.see().phase is Phase.RUNNING, "a deadline carries a run past its runway"
    world.engine.extend("run_1", at(1000))
    world.engine.withdraw("run_1")
    world.to(500)
    assert world.see().phase is Phase.RUNNING
    assert world.see().deadline_at is None


def test_the_end_of_the_runway_is_control_lost_unless_it_is_extended() -> None:
    world = World()
    world.start(env={"SIM_SECONDS": "inf"}, runway_until=at(100))
    world.to(90)
    world.engine.extend("run_1", at(200))
    world.to(150)
    assert world.see().phase is Phase.RUNNING
    world.to(300)
    assert (world.see().term_at, world.see().term_reason) == (at(200), "control_lost")


def test_a_silent_node_shows_its_last_evidence_and_goes_on() -> None:
    world = World(nodes=2)
    world.start(command=("sleep", "100"))
    world.to(50)
    world.engine.silence("n0001", 200)
    world.to(200)
    seen = world.see()
    assert (seen.phase, seen.last_evidence_at) == (Phase.SILENT, at(50))
    assert seen.exited_at is None
    assert [i.node for i in world.engine.inventories()] == ["n0002"]
    with pytest.raises(EngineError):
        world.engine.stop("run_1", grace_seconds=1, reason="user")
    world.to(251)
    assert (world.see().phase, world.see().exited_at) == (Phase.EXITED, at(101))


def test_a_start_may_fail_be_unreachable_or_fail_and_run() -> None:
    world = World(devices=3)
    world.engine.fail_next_start("n0001", FaultKind.START_FAILS)
    world.engine.fail_next_start("n0001", FaultKind.START_UNREACHABLE)
    world.engine.fail_next_start("n0001", FaultKind.START_ANSWER_LOST)
    world.start("run_1")
    with pytest.raises(EngineError):
        world.start("run_2", devices=("n0001.gpu1",))
    with pytest.raises(EngineError):
        world.start("run_3", devices=("n0001.gpu2",))
    world.to(5)
    seen = world.engine.observe()
    assert seen["run_1"].phase is Phase.FAILED
    assert seen["run_1"].failure
    assert "run_2" not in seen
    assert seen["run_3"].phase is Phase.RUNNING


def test_what_is_stopped_before_it_runs_has_never_run() -> None:
    world = World(start_seconds=20)
    world.start()
    world.to(5)
    world.engine.stop("run_1", grace_seconds=30, reason="user")
    world.to(100)
    seen = world.see()
    assert (seen.phase, seen.started_at, seen.exited_at) == (Phase.FAILED, None, None)


def test_a_scrub_is_clean_only_when_the_device_is() -> None:
    world = World()
    world.start(command=("true",))
    world.engine.dirty("n0001.gpu0", 600)
    world.to(10)
    report = world.engine.scrub("run_1")
    assert not report.clean
    assert "12 GiB" in report.findings[0]
    world.engine.forget("run_1")
    assert "run_1" in world.engine.observe()
    world.to(700)
    assert world.engine.scrub("run_1").clean
    assert world.see().scrubbed
    world.engine.forget("run_1")
    with pytest.raises(RunNotFound):
        world.engine.scrub("run_1")


def test_a_lost_device_is_missing_and_takes_no_start() -> None:
    world = World()
    world.engine.lose_device("n0001.gpu0", 60)
    assert [d.name for d in world.engine.inventory().devices] == ["n0001.gpu1"]
    with pytest.raises(StartRefused):
        world.start()
    world.to(61)
    assert len(world.engine.inventory().devices) == 2


def test_after_a_reboot_nobody_saw_how_it_ended() -> None:
    world = World()
    boot_id = world.engine.inventory().boot_id
    world.start(env={"SIM_SECONDS": "inf"})
    world.to(77)
    world.engine.reboot("n0001")
    world.to(100)
    seen = world.see()
    assert (seen.phase, seen.exited_at, seen.exit_code) == (Phase.EXITED, at(77), None)
    assert world.engine.inventory().boot_id != boot_id


def test_a_full_disk_ends_the_run() -> None:
    world = World(start_seconds=0)
    world.start(env={"SIM_DISK_FULL_AFTER": "40"})
    world.to(60)
    assert (world.see().term_at, world.see().term_reason) == (at(40), "disk")


def test_logs_are_read_from_an_offset() -> None:
    world = World()
    world.start(command=("sh", "-c", "echo one; echo two; sleep 5"), notice_signal="SIGUSR1")
    world.to(2)
    data, offset = world.engine.logs("run_1")
    assert data == b"one\ntwo\n"
    world.engine.notice("run_1", Notice(term_at=at(100), action="stop", reason="price"))
    assert world.engine.logs("run_1", offset=offset)[0] == b"SIGUSR1\n"


@pytest.mark.parametrize(
    ("command", "seconds", "code"),
    [
        (("sleep", "3"), 3, 0),
        (("false",), 0, 1),
        (("sh", "-c", "sleep 2; sleep 3; exit 4"), 5, 4),
        (("sh", "-c", "sleep 2 && exec sleep 9"), 11, 0),
        (("python3", "train.py"), 0, 0),
        (("sleep", "infinity"), None, 0),
    ],
)
def test_a_command_says_how_long_it_lasts(
    command: tuple[str, ...], seconds: float | None, code: int
) -> None:
    found = behaviour_of("job", command, {})
    assert found.lasts == (None if seconds is None else timedelta(seconds=seconds))
    assert found.exit_code == code


def test_a_seed_gives_the_same_history() -> None:
    def history(seed: int) -> list[Any]:
        plain = World(nodes=3)
        nodes = {i.node: [d.name for d in i.devices] for i in plain.engine.inventories()}
        faults = seeded_faults(
            seeded_rng(seed), nodes=nodes, start=T0, end=at(86_400), per_node_day=20
        )
        assert len(faults) == 60
        world = World(nodes=3, faults=faults, rng=seeded_rng(seed), start_jitter=2.0)
        found: list[Any] = []
        for step in range(1, 200):
            world.to(step * 400)
            try:
                world.start(f"run_{step}", devices=(f"n000{step % 3 + 1}.gpu{step % 2}",))
            except (EngineError, StartRefused) as refused:
                found.append(str(refused))
            found.append(dict(world.engine.observe()))
        return found

    assert history(7) == history(7)
    assert history(7) != history(8)


@settings(max_examples=60, deadline=None)
@given(
    looks=st.lists(st.floats(0, 400), max_size=12),
    term=st.integers(5, 200),
    leaves=st.integers(0, 60),
    lasts=st.integers(1, 300),
)
def test_how_often_one_looks_changes_nothing(
    looks: list[float], term: int, leaves: int, lasts: int
) -> None:
    ends = []
    for chosen in ([], sorted(looks)):
        world = World()
        world.start(env={"SIM_SECONDS": str(lasts), "SIM_TERM_SECONDS": str(leaves)})
        world.engine.notice("run_1", Notice(term_at=at(term), action="stop", reason="price"))
        for seconds in chosen:
            world.to(seconds)
            seen = world.see()
            assert seen.term_at is None or seen.term_at >= at(term)
            assert world.engine.next_event_at() is None or world.engine.next_event_at() >= at(
                seconds
            )
        world.to(1000)
        seen = world.see()
        ends.append((seen.exited_at, seen.exit_code, seen.term_at))
        assert world.engine.next_event_at() is None
    assert ends[0] == ends[1]
