"""The bastion over the local engine: the same doors, into a real sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import asyncssh
import pytest

from sublet.base.kernel.clock import SystemClock
from sublet.capacity.engines.local import LocalEngine
from sublet.capacity.engines.port import Phase, StartSpec
from sublet.edge.bastion import Limits

from .conftest import LOGIN, RUN, Door

HOST = "127.0.0.1"
DATA = random.Random(5).randbytes(2_000_003)


def wait_for(true: Callable[[], bool], seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, "did not come"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def rented() -> Iterator[Door]:
    """One instance for the whole module: its sandbox is costly, and tests keep apart in folders."""
    root = Path(tempfile.mkdtemp(prefix="sublet-test-"))
    clock = SystemClock.unanchored()
    engine = LocalEngine(root / "engine", clock, trusted=True, disk_reserve_bytes=0)
    device = engine.inventory().devices[0].name
    engine.start(
        StartSpec(
            run_id=RUN,
            workload_id=LOGIN,
            organisation_id="org_a",
            kind="instance",
            devices=(device,),
            memory_bytes=256 << 20,
            disk_bytes=256 << 20,
            command=(),
            script="",
            env={"GREETING": "hello"},
            home="home-a",
            hostname="ins-a",
            outbound=False,
            stop_grace_seconds=1,
            notice_signal=None,
            metadata={},
            runway_until=clock.now() + timedelta(seconds=600),
        )
    )
    wait_for(lambda: engine.observe()[RUN].phase is Phase.RUNNING)
    (root / "door").mkdir()
    door = Door(folder=root / "door", engine=engine, limits=Limits(watch_seconds=0.1))  # type: ignore[arg-type]
    door.serve()
    try:
        yield door
    finally:
        door.close()
        engine.stop(RUN, grace_seconds=0, reason="test")
        wait_for(lambda: engine.observe()[RUN].phase is Phase.EXITED)
        engine.scrub(RUN)
        engine.erase_home("home-a")
        shutil.rmtree(root)


def test_a_command_runs_inside_with_the_workloads_environment(rented: Door) -> None:
    done = rented.ssh(HOST, "echo $GREETING; hostname; pwd; echo oops >&2; exit 7")
    greeting, name, folder = done.stdout.decode().split()
    assert (greeting, done.stderr, done.returncode) == ("hello", b"oops\n", 7)
    home = rented.ssh(HOST, "echo $HOME").stdout.decode().strip()
    assert folder == home
    if shutil.which("bwrap"):
        assert name == "ins-a"


def test_binary_data_and_signals_pass_through_the_sandbox(rented: Door) -> None:
    assert rented.ssh(HOST, "cat", stdin=DATA).stdout == DATA
    assert rented.ssh(HOST, "kill -9 $$").returncode == 137

    async def story() -> int | None:
        async with asyncssh.connect(
            HOST, rented.port, username=LOGIN, client_keys=[str(rented.key)], known_hosts=None
        ) as connection:
            process = await connection.create_process(
                "trap 'exit 4' USR1; echo ready; while :; do sleep 0.02; done"
            )
            assert await process.stdout.readline() == "ready\n"
            process.send_signal("USR1")
            return (await process.wait()).exit_status

    assert asyncio.run(story()) == 4


def test_a_terminal_has_size_changes_and_ctrl_c(rented: Door) -> None:
    async def story() -> tuple[str, int | None]:
        async with asyncssh.connect(
            HOST, rented.port, username=LOGIN, client_keys=[str(rented.key)], known_hosts=None
        ) as connection:
            process = await connection.create_process(
                "stty size; trap 'stty size' WINCH; trap 'echo caught; exit 9' INT; echo ready;"
                "while :; do sleep 0.02; done",
                term_type="xterm",
                term_size=(101, 33),
            )
            said = await process.stdout.readuntil("ready")
            process.change_terminal_size(155, 44)
            said += await process.stdout.readuntil("44 155")
            process.stdin.write("\x03")
            said += await process.stdout.readuntil("caught")
            return said, (await process.wait()).exit_status

    said, code = asyncio.run(story())
    assert "33 101" in said
    assert code == 9


def test_files_pass_by_sftp_and_scp_and_belong_to_the_tenant(rented: Door, tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.write_bytes(DATA)
    here.chmod(0o640)
    back = tmp_path / "back"
    done = rented.sftp(
        *("mkdir s", f"put -p {here} s/a", "rename s/a s/b", "ln -s b s/c", "chmod 600 s/b"),
        *("ls -l s", "df .", f"get -p s/b {back}"),
    )
    assert done.returncode == 0, done.stderr
    assert back.read_bytes() == DATA
    assert stat.S_IMODE(back.stat().st_mode) == 0o600
    seen = rented.ssh(HOST, "cd s; wc -c < c; test -O b && echo mine; readlink c")
    assert seen.stdout.decode().split() == [str(len(DATA)), "mine", "b"]
    for flags in ([], ["-O"]):
        name = f"scp{len(flags)}"
        to = rented.scp(*flags, "-p", str(here), f"{LOGIN}@{HOST}:{name}")
        assert to.returncode == 0, to.stderr
        again = tmp_path / name
        assert rented.scp(*flags, f"{LOGIN}@{HOST}:{name}", str(again)).returncode == 0
        assert again.read_bytes() == DATA


def test_what_is_no_regular_file_is_refused_at_once(rented: Door, tmp_path: Path) -> None:
    assert rented.ssh(HOST, "mkfifo pipe; mkdir -p folder").returncode == 0
    for name in ("pipe", "folder", "/dev/zero", "/proc/self/mem"):
        done = rented.sftp(f'get "{name}" {tmp_path / "got"}')
        assert done.returncode == 1, name
        assert not (tmp_path / "got").exists()


def test_the_hosts_files_are_not_there(rented: Door, tmp_path: Path) -> None:
    if not shutil.which("bwrap"):
        pytest.skip("without bubblewrap a trusted tenant sees the host's files")
    secret = Path(tempfile.mkdtemp(prefix="sublet-secret-")) / "secret"
    secret.write_text("secret")
    secret.parent.chmod(0o755)
    try:
        done = rented.sftp(f"get {secret} {tmp_path / 'got'}")
        assert done.returncode == 1
        assert rented.ssh(HOST, f"cat {secret}").returncode == 1
    finally:
        shutil.rmtree(secret.parent)


def test_a_port_inside_is_reached_and_one_outside_is_not(rented: Door) -> None:
    server = (
        "import socket\ns = socket.create_server(('127.0.0.1', 8888))\n"
        "print('up', flush=True)\nc, _ = s.accept()\nd = b''\n"
        "while True:\n p = c.recv(65536)\n if not p: break\n d += p\nc.sendall(d)"
    )

    async def story() -> bytes:
        async with asyncssh.connect(
            HOST, rented.port, username=LOGIN, client_keys=[str(rented.key)], known_hosts=None
        ) as connection:
            process = await connection.create_process("python3 -u -", stdin=asyncssh.PIPE)
            process.stdin.write(server)
            process.stdin.write_eof()
            assert await process.stdout.readline() == "up\n"
            reader, writer = await connection.open_connection("localhost", 8888, encoding=None)
            writer.write(DATA)
            writer.write_eof()
            return await reader.read()

    assert asyncio.run(story()) == DATA
    if shutil.which("bwrap"):
        with contextlib.closing(_listening()) as listening:
            done = rented.ssh("-W", f"{HOST}:{listening.getsockname()[1]}", HOST)
        assert done.returncode == 255
        assert b"refused" in done.stderr


def _listening() -> socket.socket:
    return socket.create_server((HOST, 0))


def test_nothing_is_left_open_here(rented: Door) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    rented.ssh(HOST, "true")
    wait_for(lambda: not rented.bastion._logins)
    before = count()
    for _ in range(5):
        assert rented.ssh(HOST, "true").returncode == 0
        assert rented.sftp("ls").returncode == 0
    wait_for(lambda: count() <= before)


def test_what_is_left_in_the_background_does_not_keep_the_session(rented: Door) -> None:
    done = rented.ssh(HOST, "nohup sleep 60 >/dev/null 2>&1 & echo started $!")
    word, pid = done.stdout.decode().split()
    assert word == "started"
    assert rented.ssh(HOST, f"kill -0 {pid} && kill {pid}").returncode == 0
