"""Commands and logs of a workload: real processes, real pipes, and bounds on both."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from sublet.base.wire import rest
from sublet.capacity.engines.port import NotAttachable, SpawnSpec
from sublet.edge.api import inside
from sublet.sdk import ApiError


class Process:
    def __init__(self, started: subprocess.Popen[bytes]) -> None:
        self._started = started

    def wait(self) -> int:
        code = self._started.wait()
        return code if code >= 0 else 128 - code

    def signal(self, name: str) -> None:
        self._started.send_signal(getattr(signal, name))

    def close(self) -> None:
        os.killpg(self._started.pid, signal.SIGKILL)


class HereEngine:
    """An engine whose workloads are this machine: only what a command needs."""

    def __init__(self) -> None:
        self.fds: list[int] = []

    def spawn(self, run_id: str, spec: SpawnSpec, fds: Sequence[int]) -> Process:
        self.fds += fds
        stdin, stdout, stderr = fds
        started = subprocess.Popen(
            spec.argv,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={"PATH": os.environ["PATH"], **spec.env},
            start_new_session=True,
        )
        return Process(started)

    def connect(self, run_id: str, host: str, port: int) -> int:
        raise NotAttachable

    def file(self, run_id: str, operation: str, *args: Any) -> Any:
        raise NotAttachable


def run(script: str, *, stdin: bytes = b"", seconds: int = 20) -> inside.Ran:
    spec = SpawnSpec(argv=("/bin/sh", "-c", script), env={"WHO": "tenant"})
    engine = HereEngine()
    before = set(os.listdir("/proc/self/fd"))
    try:
        return inside.run_inside(engine, "run_1", spec, stdin, seconds)
    finally:
        assert set(os.listdir("/proc/self/fd")) == before


def test_output_exit_code_and_input() -> None:
    ran = run("cat; echo $WHO; echo no >&2; exit 7", stdin="渐\n".encode())
    assert (ran.exit_code, ran.stdout.text(), ran.stderr.text()) == (7, "渐\ntenant\n", "no\n")


def test_a_signal_is_told_as_a_shell_tells_it() -> None:
    assert run("kill -9 $$").exit_code == 137


def test_much_input_and_much_output_do_not_wait_for_each_other() -> None:
    data = os.urandom(1 << 14) * 64
    ran = run("cat", stdin=data)
    assert ran.exit_code == 0
    assert bytes(ran.stdout.data) == data[: inside.OUTPUT_BYTES]
    assert ran.stdout.is_truncated


def test_a_command_that_does_not_read_is_fed_in_vain() -> None:
    assert run("exec <&-; exit 3", stdin=b"x" * (1 << 20)).exit_code == 3


def test_one_that_goes_on_is_ended_at_its_limit() -> None:
    ran = run("echo before; sleep 600", seconds=1)
    assert (ran.exit_code, ran.stdout.text()) == (None, "before\n")


def test_what_it_leaves_in_the_background_keeps_nobody_waiting() -> None:
    ran = run("sleep 5 & echo done")
    assert (ran.exit_code, ran.stdout.text()) == (0, "done\n")


def test_a_program_that_is_not_there() -> None:
    engine = HereEngine()
    with pytest.raises(FileNotFoundError):
        inside.run_inside(engine, "run_1", SpawnSpec(argv=("/no/such",)), b"", 5)


def refused(call, status: int, code: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call()
    assert (caught.value.status, caught.value.code) == (status, code), caught.value
    return caught.value


def test_exec_needs_a_running_workload_and_an_engine_that_lets_in(world) -> None:
    client, _ = world.newcomer()
    made = client.instances.create(rest.InstanceCreate(offer_id="gpu-spot"))
    command = rest.ExecCreate(argv=["id"])
    refused(lambda: client.instances.exec(made.id, command), 409, "not_attachable")
    world.settle(client, made.id, "running")
    refused(lambda: client.instances.exec(made.id, command), 409, "not_attachable")
    tried = [e for e in client.audit.list() if e.action == "exec"]
    assert [e.result for e in tried] == ["not_attachable", "not_attachable"]


def test_exec_through_the_api(world, monkeypatch) -> None:
    client, _ = world.newcomer()
    made = client.instances.create(rest.InstanceCreate(offer_id="gpu-spot"))
    world.settle(client, made.id, "running")
    here = HereEngine()
    for power in ("spawn", "connect", "file"):
        monkeypatch.setattr(type(world.engine), power, getattr(here, power), raising=False)
    ran = client.instances.exec(
        made.id,
        rest.ExecCreate(argv=["/bin/sh", "-c", "read a; echo $a $B"], stdin="x\n", env={"B": "y"}),
    )
    assert (ran.exit_code, ran.stdout, ran.timed_out) == (0, "x y\n", False)
    error = refused(
        lambda: client.instances.exec(made.id, rest.ExecCreate(argv=["/no/such"])),
        422,
        "invalid_request",
    )
    assert error.param == "argv"


def test_a_log_is_read_from_an_offset_and_followed_to_the_end(world) -> None:
    client, made = world.newcomer()
    job = client.jobs.create(
        rest.JobCreate(offer_id="gpu-spot", command=["sh", "-c", "echo one; sleep 30; echo two"])
    )
    assert "".join(client.jobs.logs(job.id)) == ""
    world.settle(client, job.id, "running")
    world.advance(60)
    world.settle(client, job.id, "completed")
    whole = "".join(client.jobs.logs(job.id, follow=True))
    assert "one" in whole
    assert "".join(client.jobs.logs(job.id, offset=2)) == whole[2:]
    answer = world.ask("GET", f"/v1/jobs/{job.id}/logs", made.secret)
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"


def test_a_follower_is_sent_away_after_so_many_looks_and_holds_no_connection(world) -> None:
    client, _ = world.newcomer()
    job = client.jobs.create(rest.JobCreate(offer_id="gpu-spot", command=["sleep", "90000"]))
    world.settle(client, job.id, "running")
    # The clock does not move: the workload never ends, and only the bound ends the answer.
    "".join(client.jobs.logs(job.id, follow=True))
    assert world.store._reader.pool.checkedout() == 0
