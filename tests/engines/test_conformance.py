"""What every engine promises, whatever it is made of. The port's docstrings, one by one."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from sublet.capacity.engines.port import (
    FENCES,
    EngineError,
    Notice,
    Phase,
    RunNotFound,
    StartRefused,
    follow_logs,
)

STUBBORN = "trap '' TERM; while :; do sleep 0.05; done"
LATE = timedelta(seconds=0.6)
"""How late something may happen that happens by the clock. Early is never allowed."""


def in_seconds(harness: Any, seconds: float) -> Any:
    return harness.now() + timedelta(seconds=seconds)


def recall(harness: Any, seconds: float, reason: str = "owner_recall") -> Notice:
    return Notice(term_at=in_seconds(harness, seconds), action="stop", reason=reason)


# -- what there is


def test_the_inventory_names_every_device_once_and_every_fence(harness: Any) -> None:
    found = harness.engine.inventory()
    assert len({device.name for device in found.devices}) == len(found.devices) > 0
    assert set(found.fences) == set(FENCES)
    assert found.boot_id
    assert all(row.by and row.evidence for row in found.fences.values())
    assert all(row.remedy for row in found.fences.values() if row.strength == "none")


# -- a life


def test_a_job_runs_says_what_it_says_and_ends_with_its_own_code(harness: Any) -> None:
    run = harness.start("echo hello; sleep 0.3; exit 7")
    assert harness.see(run).workload_id.startswith("wl_")
    seen = harness.until_over(run)
    assert (seen.phase, seen.exit_code, seen.term_reason) == (Phase.EXITED, 7, None)
    assert seen.started_at <= seen.exited_at <= harness.now()
    assert seen.exited_at - seen.started_at >= timedelta(seconds=0.3)
    assert seen.last_evidence_at >= seen.exited_at
    assert harness.text(run) == "hello\n"


def test_an_instance_lives_until_it_is_stopped(harness: Any) -> None:
    run = harness.start()
    started_at = harness.see(run).started_at
    later = started_at + timedelta(seconds=1.2)
    seen = harness.run_until(
        lambda: (found := harness.see(run)).last_evidence_at >= later and found, 5
    )
    assert (seen.phase, seen.started_at, seen.exit_code) == (Phase.RUNNING, started_at, None)
    harness.engine.stop(run, grace_seconds=1, reason="user")
    seen = harness.until_over(run)
    assert (seen.phase, seen.term_reason) == (Phase.EXITED, "stop:user")
    assert seen.started_at == started_at


def test_starting_twice_is_starting_once(harness: Any) -> None:
    spec = harness.spec(command=("sh", "-c", "echo once; exit 3"))
    harness.engine.start(spec)
    harness.engine.start(spec)
    first = harness.until_over(spec.run_id)
    harness.engine.start(spec)
    assert harness.see(spec.run_id) == first
    assert harness.text(spec.run_id) == "once\n"


def test_a_device_has_one_holder_and_the_next_comes_when_it_is_gone(harness: Any) -> None:
    first = harness.start(STUBBORN)
    second = harness.spec()
    with pytest.raises(StartRefused):
        harness.engine.start(second)
    harness.engine.stop(first, grace_seconds=1, reason="user")
    harness.until_phase(first, Phase.STOPPING)
    with pytest.raises(StartRefused):
        harness.engine.start(second)
    gone_at = harness.until_over(first).exited_at
    assert second.run_id not in harness.engine.observe()
    harness.engine.start(second)
    assert harness.until_phase(second.run_id, Phase.RUNNING).started_at >= gone_at


def test_what_cannot_be_started_is_refused_and_leaves_no_trace(harness: Any) -> None:
    for devices in ((), ("no-such-device",)):
        spec = harness.spec(devices=devices)
        with pytest.raises(StartRefused):
            harness.engine.start(spec)
        assert spec.run_id not in harness.engine.observe()


def test_a_run_that_is_not_known_is_not_found(harness: Any) -> None:
    engine = harness.engine
    for call in (
        lambda: engine.notice("run_x", recall(harness, 5)),
        lambda: engine.withdraw("run_x"),
        lambda: engine.extend("run_x", harness.now()),
        lambda: engine.publish_metadata("run_x", {}),
        lambda: engine.signal("run_x", "SIGUSR1"),
        lambda: engine.stop("run_x", grace_seconds=1, reason="user"),
        lambda: engine.logs("run_x"),
        lambda: engine.scrub("run_x"),
    ):
        with pytest.raises(RunNotFound):
            call()
    engine.forget("run_x")
    engine.erase_home("home_x")


# -- a replica


def test_a_replica_lives_until_it_is_stopped_and_is_announced_like_others(harness: Any) -> None:
    run = harness.start("sleep 600", kind="replica")
    fixed = harness.engine.notice(run, recall(harness, 0.8))
    seen = harness.until_over(run)
    assert (seen.phase, seen.term_reason, seen.exit_code) == (Phase.EXITED, "notice", 143)
    assert fixed <= seen.term_at <= fixed + LATE
    assert harness.engine.scrub(run).clean


def test_a_replica_that_ends_by_itself_has_its_own_code(harness: Any) -> None:
    # The simulated one is told by its environment what the script says.
    env = {"SIM_SECONDS": "0.3", "SIM_EXIT_CODE": "7"}
    run = harness.start("sleep 0.3; exit 7", kind="replica", env=env)
    seen = harness.until_over(run)
    assert (seen.phase, seen.exit_code, seen.term_reason) == (Phase.EXITED, 7, None)


def test_a_replica_needs_a_command(harness: Any) -> None:
    with pytest.raises(StartRefused):
        harness.engine.start(harness.spec(kind="replica", command=()))


def test_the_door_is_a_path_in_the_home_of_the_run(harness: Any) -> None:
    run = harness.start("sleep 600", kind="replica", home="a_home")
    door = harness.engine.door(run, "model.sock")
    assert door.startswith("/")
    assert door.endswith("/a_home/model.sock")
    harness.engine = harness.reopened()
    assert harness.engine.door(run, "model.sock") == door
    with pytest.raises(RunNotFound):
        harness.engine.door("run_x", "model.sock")


# -- the end, announced


def test_sigterm_comes_when_the_notice_said_and_not_before(harness: Any) -> None:
    run = harness.start("sleep 600")
    fixed = harness.engine.notice(run, recall(harness, 1.0))
    seen = harness.see(run)
    assert (seen.phase, seen.deadline_at, seen.term_at) == (Phase.RUNNING, fixed, None)
    seen = harness.until_over(run)
    assert (seen.term_reason, seen.exit_code) == ("notice", 143)
    assert fixed <= seen.term_at <= fixed + LATE
    assert seen.exited_at <= seen.term_at + LATE


def test_a_repeated_notice_never_moves_it_earlier(harness: Any) -> None:
    run = harness.start("sleep 600")
    fixed = harness.engine.notice(run, recall(harness, 1.2))
    assert harness.engine.notice(run, recall(harness, 0.2)) == fixed
    assert harness.see(run).deadline_at == fixed
    later = harness.engine.notice(run, recall(harness, 1.6, "maintenance"))
    assert later > fixed
    seen = harness.until_over(run)
    assert later <= seen.term_at <= later + LATE


def test_a_notice_withdrawn_ends_nothing(harness: Any) -> None:
    run = harness.start("sleep 600")
    fixed = harness.engine.notice(run, recall(harness, 0.5))
    harness.engine.withdraw(run)
    assert harness.see(run).deadline_at is None
    past = fixed + timedelta(seconds=0.7)
    harness.run_until(lambda: harness.now() > past, 5)
    seen = harness.see(run)
    assert (seen.phase, seen.term_at) == (Phase.RUNNING, None)


def test_after_sigterm_there_is_the_grace_and_then_nothing(harness: Any) -> None:
    run = harness.start(STUBBORN, stop_grace_seconds=1)
    fixed = harness.engine.notice(run, recall(harness, 0.5))
    seen = harness.until_over(run)
    assert seen.exit_code == 137
    assert seen.term_at >= fixed
    grace = timedelta(seconds=1)
    assert seen.term_at + grace <= seen.exited_at <= seen.term_at + grace + LATE


def test_a_notice_for_what_is_over_is_no_error(harness: Any) -> None:
    run = harness.start("exit 0")
    harness.until_over(run)
    harness.engine.notice(run, recall(harness, 5))
    harness.engine.withdraw(run)
    harness.engine.extend(run, in_seconds(harness, 5))
    harness.engine.stop(run, grace_seconds=0, reason="user")
    assert harness.see(run).deadline_at is None
    assert harness.see(run).term_reason is None


# -- the end, at once


def test_stop_gives_the_grace_asked_for(harness: Any) -> None:
    run = harness.start(STUBBORN, stop_grace_seconds=60)
    asked_at = harness.now()
    harness.engine.stop(run, grace_seconds=1, reason="shutdown")
    seen = harness.until_over(run)
    assert (seen.term_reason, seen.exit_code) == ("stop:shutdown", 137)
    assert asked_at <= seen.term_at <= asked_at + LATE
    assert seen.exited_at - seen.term_at >= timedelta(seconds=1)


def test_a_second_stop_shortens_the_grace_and_keeps_the_reason(harness: Any) -> None:
    run = harness.start(STUBBORN)
    harness.engine.stop(run, grace_seconds=60, reason="shutdown")
    term_at = harness.until_phase(run, Phase.STOPPING).term_at
    harness.engine.stop(run, grace_seconds=0, reason="user")
    seen = harness.until_over(run, seconds=5)
    assert (seen.term_reason, seen.term_at) == ("stop:shutdown", term_at)


# -- the runway


def test_without_an_extension_the_runway_ends_the_run(harness: Any) -> None:
    until = in_seconds(harness, 1.5)
    run = harness.start("sleep 600", runway_until=until)
    seen = harness.until_over(run)
    assert seen.term_reason == "control_lost"
    assert until - timedelta(milliseconds=1) <= seen.term_at <= until + LATE


def test_an_extended_runway_carries_on(harness: Any) -> None:
    until = in_seconds(harness, 1.2)
    run = harness.start("sleep 600", runway_until=until)
    harness.engine.extend(run, until + timedelta(seconds=30))
    harness.run_until(lambda: harness.now() > until + LATE, 5)
    assert harness.see(run).phase is Phase.RUNNING


def test_a_published_deadline_is_never_undercut_by_the_runway(harness: Any) -> None:
    run = harness.start("sleep 600", runway_until=in_seconds(harness, 1.2))
    fixed = harness.engine.notice(run, recall(harness, 1.6))
    harness.engine.extend(run, in_seconds(harness, 0.2))
    seen = harness.until_over(run)
    assert seen.term_reason == "notice"
    assert seen.term_at >= fixed


# -- afterwards


def test_logs_are_read_from_an_offset_and_followed_to_the_end(harness: Any) -> None:
    run = harness.start("echo first; echo second")
    harness.until_over(run)
    data, offset = harness.engine.logs(run, limit=6)
    assert (data, offset) == (b"first\n", 6)
    assert harness.engine.logs(run, offset=6) == (b"second\n", 13)
    assert harness.engine.logs(run, offset=13) == (b"", 13)
    assert b"".join(follow_logs(harness.engine, run)) == b"first\nsecond\n"


def test_scrub_says_clean_only_after_the_end_and_only_then_is_it_forgotten(harness: Any) -> None:
    run = harness.start("sleep 600")
    assert not harness.engine.scrub(run).clean
    harness.engine.forget(run)
    assert harness.see(run).phase is Phase.RUNNING
    harness.engine.stop(run, grace_seconds=0, reason="user")
    harness.until_over(run)
    harness.engine.forget(run)
    assert not harness.see(run).scrubbed
    report = harness.engine.scrub(run)
    assert report.clean, report.findings
    assert harness.engine.scrub(run).clean
    assert harness.see(run).scrubbed
    harness.engine.forget(run)
    harness.engine.forget(run)
    assert run not in harness.engine.observe()
    with pytest.raises(RunNotFound):
        harness.engine.logs(run)


def test_a_control_plane_that_comes_back_finds_what_it_left(harness: Any) -> None:
    run = harness.start("sleep 600")
    fixed = harness.engine.notice(run, recall(harness, 1.2))
    before = harness.see(run)
    harness.engine = harness.reopened()
    seen = harness.see(run)
    assert (seen.phase, seen.started_at, seen.deadline_at) == (
        Phase.RUNNING,
        before.started_at,
        fixed,
    )
    seen = harness.until_over(run)
    assert seen.term_reason == "notice"
    assert seen.term_at >= fixed


def test_an_error_of_the_port_is_one_that_may_be_tried_again() -> None:
    assert EngineError.status == 503
