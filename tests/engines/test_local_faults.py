"""What may happen to a supervisor, its files and its control plane, and what is said then."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from sublet.capacity.engines.local.supervise import disk, records, usage
from sublet.capacity.engines.port import EngineError, Notice, Phase, StartRefused

ROOT = Path(__file__).resolve().parents[2]


def supervisor_of(local: Any, run_id: str) -> int:
    """The pid of the supervisor: the process with this run's folder among its arguments."""
    folder = os.fsencode(local.folder(run_id))
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if folder in words:
                return int(name)
    raise AssertionError("no supervisor")


def processes_of(local: Any, run_id: str) -> list[int]:
    plan = records.read_plan(str(local.folder(run_id)))
    assert plan is not None
    return usage.carrying(plan.mark)


@pytest.mark.parametrize("without", [(), ("bubblewrap",), ("bubblewrap", "cgroup")])
def test_with_its_supervisor_killed_the_workload_goes_and_the_bill_ends_at_the_last_evidence(
    make_local: Any, without: tuple[str, ...]
) -> None:
    local = make_local(trusted=True, without=frozenset(without))
    run = local.start("sleep 600 & setsid sleep 600 & wait", outbound=True)
    local.run_until(lambda: len(processes_of(local, run)) >= 3, 5)  # the shell, both sleepers
    init = records.read_state(str(local.folder(run))).init_pid
    os.kill(supervisor_of(local, run), signal.SIGKILL)
    killed_at = local.now()
    seen = local.until_over(run, seconds=3)
    assert (seen.phase, seen.exit_code, seen.term_reason) == (Phase.EXITED, 137, None)
    assert seen.started_at <= seen.exited_at == seen.last_evidence_at <= killed_at
    assert processes_of(local, run) == []
    with pytest.raises(ProcessLookupError):
        os.kill(init, 0)
    assert local.engine.scrub(run).clean
    assert not any(Path(f"/sys/fs/cgroup/pids/{local.engine._rules.name}").glob("*"))


def test_killed_before_it_ran_is_failed(local: Any) -> None:
    spec = local.spec(outbound=True)
    local.engine.start(spec)
    os.kill(supervisor_of(local, spec.run_id), signal.SIGKILL)
    seen = local.until_over(spec.run_id, seconds=3)
    assert seen.phase in (Phase.FAILED, Phase.EXITED)  # it may just have begun to run
    assert (seen.phase is Phase.FAILED) == (seen.started_at is None)
    assert processes_of(local, spec.run_id) == []


def test_a_stuck_supervisor_is_silence_not_an_end(local: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("sublet.capacity.engines.local.observing.STALE_NS", 1_500_000_000)
    run = local.start("sleep 600")
    pid = supervisor_of(local, run)
    os.kill(pid, signal.SIGSTOP)
    try:
        seen = local.until_phase(run, Phase.SILENT, seconds=5)
        assert seen.started_at is not None
        assert local.now() - seen.last_evidence_at > timedelta(seconds=1)
        assert not local.engine.scrub(run).clean
        with pytest.raises(StartRefused):
            local.engine.start(local.spec())
    finally:
        os.kill(pid, signal.SIGCONT)
    assert local.until_phase(run, Phase.RUNNING, seconds=5).failure is None


def test_after_another_boot_nothing_lives(local: Any) -> None:
    """The same files, as they are found after the machine has restarted."""
    run = local.start("sleep 600")
    folder = str(local.folder(run))
    os.kill(supervisor_of(local, run), signal.SIGKILL)
    for name in (records.PLAN, records.STATE):
        path = Path(folder) / name
        path.write_text(path.read_text().replace(local.clock.boot_id(), "an-earlier-boot"))
    before = local.now()
    seen = local.until_over(run, seconds=3)
    assert (seen.phase, seen.exit_code) == (Phase.EXITED, 137)
    assert seen.started_at <= seen.exited_at <= before
    assert local.engine.scrub(run).clean


def test_torn_files_are_told_not_thrown(local: Any) -> None:
    run = local.start("exit 0")
    local.until_over(run)
    for name in (records.PLAN, records.STATE, records.EVIDENCE):
        path = local.folder(run) / name
        whole = path.read_bytes()
        for damage in (b"", b"{", b'{"v": 1}', b"[]", b"\xff\x00\xfe", whole[: len(whole) // 2]):
            path.write_bytes(damage)
            seen = local.see(run)
            assert seen.run_id == run
            if name == records.EVIDENCE:
                assert seen.phase is Phase.EXITED
            else:
                assert seen.phase in (Phase.FAILED, Phase.SILENT)
                assert seen.failure
        path.write_bytes(whole)
    assert local.see(run).phase is Phase.EXITED


def test_a_state_of_another_protocol_is_left_alone(local: Any) -> None:
    run = local.start("exit 0")
    local.until_over(run)
    path = local.folder(run) / records.STATE
    whole = path.read_text()
    path.write_text(json.dumps({**json.loads(whole), "v": records.PROTOCOL + 1}))
    assert local.see(run).phase is Phase.SILENT
    path.write_text(whole)


def test_many_starts_at_once_are_one_life(local: Any) -> None:
    spec = local.spec(command=("sh", "-c", "echo life; sleep 600"))
    engines = [local.reopened() for _ in range(6)]
    threads = [threading.Thread(target=engine.start, args=(spec,)) for engine in engines]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    local.until_phase(spec.run_id, Phase.RUNNING)
    time.sleep(0.2)
    assert local.text(spec.run_id) == "life\n"
    arguments = [Path(f"/proc/{p}/cmdline").read_bytes() for p in processes_of(local, spec.run_id)]
    assert sum(b"bwrap" in words for words in arguments) == 1


START_AND_DIE = """
import os, sys
from datetime import timedelta
from pathlib import Path
from sublet.base.kernel.clock import SystemClock
from sublet.capacity.engines.local import LocalEngine
from sublet.capacity.engines.local.supervise import records
from sublet.capacity.engines.port import StartSpec

root, moment, device = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
clock = SystemClock.unanchored()
engine = LocalEngine(root, clock, disk_reserve_bytes=0)
write, spawn = records.write_plan, os.posix_spawn

def dies_after_writing(folder, plan):
    write(folder, plan)
    os._exit(9)

def dies_after_spawning(*args, **kwargs):
    spawn(*args, **kwargs)
    os._exit(9)

if moment == "write":
    records.write_plan = dies_after_writing
elif moment == "spawn":
    os.posix_spawn = dies_after_spawning
engine.start(StartSpec(
    run_id="run_half", workload_id="wl", organisation_id="org", kind="job", devices=(device,),
    memory_bytes=256 << 20, disk_bytes=1 << 20, command=("sh", "-c", "echo life; sleep 600"),
    script="", env={}, home="home", hostname="h", outbound=False, stop_grace_seconds=1,
    notice_signal=None, metadata={}, runway_until=clock.now() + timedelta(minutes=5)))
"""


@pytest.mark.parametrize("moment", ["write", "spawn"])
def test_a_control_plane_killed_in_the_middle_of_a_start(local: Any, moment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", START_AND_DIE, str(local.root), moment, local.devices[0]],
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 9
    if moment == "write":
        assert "run_half" not in local.engine.observe()
    else:
        local.until_phase("run_half", Phase.RUNNING)
    local.engine.start(local.spec(run_id="run_half", command=("sh", "-c", "echo life; sleep 600")))
    local.until_phase("run_half", Phase.RUNNING)
    local.run_until(lambda: local.text("run_half"), 5)
    assert local.text("run_half") == "life\n"


def test_a_run_outlives_the_process_that_started_it_and_its_terminal(local: Any) -> None:
    """The starter's whole session is killed, as a closed terminal or a service manager does."""
    code = START_AND_DIE + "import time; time.sleep(60)"
    starter = subprocess.Popen(
        [sys.executable, "-c", code, str(local.root), "never", local.devices[0]],
        cwd=ROOT,
        start_new_session=True,
    )
    local.run_until(
        lambda: (seen := local.engine.observe().get("run_half")) and seen.phase is Phase.RUNNING, 10
    )
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(starter.pid, number)
        except ProcessLookupError:
            break
    starter.wait()
    os.kill(supervisor_of(local, "run_half"), signal.SIGHUP)
    os.kill(supervisor_of(local, "run_half"), signal.SIGINT)
    time.sleep(0.2)
    assert local.see("run_half").phase is Phase.RUNNING


def test_a_machine_that_goes_down_ends_runs_in_order(local: Any) -> None:
    """A service manager's SIGTERM to everything."""
    run = local.start("trap 'echo saved; exit 0' TERM; while :; do sleep 0.05; done")
    os.kill(supervisor_of(local, run), signal.SIGTERM)
    seen = local.until_over(run, seconds=5)
    assert (seen.term_reason, seen.exit_code) == ("stop:shutdown", 0)
    assert "saved\n" in local.text(run)


def test_a_full_disk_refuses_the_next_start_and_warns_who_holds_too_much(make_local: Any) -> None:
    plenty = make_local(disk_reserve_bytes=1 << 60)
    with pytest.raises(StartRefused, match="reserve"):
        plenty.engine.start(plenty.spec())
    assert plenty.engine.observe() == {}


def test_more_disk_than_allowed_ends_the_run(local: Any) -> None:
    script = "for n in 1 2 3 4; do head -c 1000000 /dev/zero > f$n; done; sleep 600"
    run = local.start(script, disk_bytes=2_000_000)
    seen = local.until_over(run, seconds=10)
    assert (seen.phase, seen.term_reason) == (Phase.EXITED, "disk")
    assert seen.disk_bytes >= 4_000_000
    assert "2000000 are allowed" in local.text(run)


def test_one_file_cannot_pass_the_limit_at_all(local: Any) -> None:
    run = local.start("head -c 9000000 /dev/zero > f; echo $?", disk_bytes=2_000_000)
    local.until_over(run)
    assert (local.root / "homes").exists()
    assert local.see(run).disk_bytes <= 2_100_000


def test_a_command_that_is_not_there_never_ran(local: Any) -> None:
    spec = local.spec(command=("/no/such/program",))
    local.engine.start(spec)
    seen = local.until_over(spec.run_id)
    assert (seen.phase, seen.started_at) == (Phase.FAILED, None)
    assert "/no/such/program: No such file" in seen.failure


def test_stopped_before_it_ran_it_never_ran(local: Any) -> None:
    spec = local.spec(outbound=True)
    local.engine.start(spec)
    local.engine.stop(spec.run_id, grace_seconds=5, reason="user")
    seen = local.until_over(spec.run_id, seconds=3)
    if seen.phase is Phase.FAILED:
        assert "stop:user" in seen.failure
    else:
        assert seen.exited_at - seen.started_at < timedelta(seconds=1)


def test_without_a_supervisor_an_order_is_to_be_tried_again(local: Any) -> None:
    run = local.start("sleep 600")
    (local.folder(run) / records.SOCKET).rename(local.folder(run) / "away")
    notice = Notice(term_at=local.now(), action="stop", reason="owner_recall")
    with pytest.raises(EngineError):
        local.engine.notice(run, notice)
    (local.folder(run) / "away").rename(local.folder(run) / records.SOCKET)


def test_without_bubblewrap_nothing_starts_and_the_way_is_named(make_local: Any) -> None:
    fenceless = make_local(without=frozenset({"bubblewrap"}))
    with pytest.raises(StartRefused, match="apt-get install bubblewrap"):
        fenceless.engine.start(fenceless.spec())
    fences = fenceless.engine.inventory().fences
    assert {row.strength for row in fences.values()} == {"none"}
    assert {row.remedy for row in fences.values()} == {"apt-get install bubblewrap"}


def test_what_is_left_of_a_run_is_found_and_ended_by_the_scrub(local: Any) -> None:
    """A process that carries the run's mark though the run is over: what must never be, looked for."""
    run = local.start("exit 0")
    local.until_over(run)
    plan = records.read_plan(str(local.folder(run)))
    left = subprocess.Popen(["sleep", "600"], env={usage.MARK: plan.mark})
    try:
        assert local.engine.scrub(run).clean
    finally:
        left.kill()
    assert left.wait() == -signal.SIGKILL


def test_a_run_that_holds_more_than_its_share_of_a_nearly_full_disk_is_warned_once(
    local: Any,
) -> None:
    run = local.start("head -c 500000 /dev/zero > f")
    local.until_over(run)
    plan = records.read_plan(str(local.folder(run)))
    short = dataclasses.replace(plan, disk_reserve_bytes=1 << 60, disk_share_bytes=100_000)
    watch = disk.DiskWatch(short, str(local.folder(run)))
    assert "nearly full" in watch.step()
    assert watch.step() is None
    assert watch.excess is None
    for calm in (
        dataclasses.replace(short, disk_share_bytes=1 << 30),
        dataclasses.replace(short, disk_reserve_bytes=0),
    ):
        assert disk.DiskWatch(calm, str(local.folder(run))).step() is None


def test_whoever_deletes_the_folder_gives_the_run_up(make_local: Any) -> None:
    local = make_local()
    run = local.start("sleep 600")
    supervisor = supervisor_of(local, run)
    shutil.rmtree(local.folder(run))
    local.run_until(lambda: not Path(f"/proc/{supervisor}/cmdline").exists(), 5)
    assert not any(Path(f"/sys/fs/cgroup/pids/{local.engine._rules.name}").glob("*"))


def test_folders_too_deep_to_count_are_not_allowed(local: Any) -> None:
    deep = "import os\nfor _ in range(300): os.mkdir('d'); os.chdir('d')\n"
    run = local.start(f'python3 -c "{deep}"; sleep 600')
    assert local.until_over(run, seconds=10).term_reason == "disk"
    assert "levels are allowed" in local.text(run)
