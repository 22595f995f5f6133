"""Shells and commands, with OpenSSH's client."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import asyncssh

from sublet.base.kernel.clock import SystemClock
from sublet.capacity.engines.port import Notice

from .conftest import LOGIN, RUN, Door

HOST = "127.0.0.1"


def until(true: Callable[[], bool], what: str) -> None:
    pause = threading.Event()
    for _ in range(1000):
        if true():
            return
        pause.wait(0.01)
    raise AssertionError(f"did not come: {what}")


@contextmanager
def at_a_terminal(door: Door, *words: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """OpenSSH with a terminal of ours: the process, and our end of the terminal."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
    client = subprocess.Popen(
        door.ssh_argv("-tt", HOST, *words), stdin=its, stdout=its, stderr=its, process_group=0
    )
    os.close(its)
    try:
        yield client, ours
    finally:
        client.kill()
        client.wait()
        os.close(ours)


def read_until(fd: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        ready, _, _ = select.select([fd], [], [], 10)
        assert ready, f"{wanted!r} did not come; seen {seen!r}"
        seen += os.read(fd, 4096)
    return seen


def test_a_command_keeps_its_streams_apart_and_its_exit_status(door: Door) -> None:
    done = door.ssh(HOST, "echo out; echo err >&2; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 7)


def test_a_command_ended_by_a_signal_has_a_shells_exit_status(door: Door) -> None:
    assert door.ssh(HOST, "kill -9 $$").returncode == 137


def test_binary_data_passes_unchanged_both_ways(door: Door) -> None:
    data = bytes(range(256)) * (3 << 12)
    assert door.ssh(HOST, "cat", stdin=data).stdout == data
    done = door.ssh(HOST, "sha256sum | cut -c1-64", stdin=data)
    assert done.stdout.decode().strip() == hashlib.sha256(data).hexdigest()


def test_what_a_child_says_after_the_command_ended_is_not_lost(door: Door) -> None:
    assert door.ssh(HOST, "(sleep 0.3; echo late) &").stdout == b"late\n"


def test_a_shell_reads_its_commands_from_standard_input(door: Door) -> None:
    done = door.ssh(HOST, stdin=b"echo $HOME\nexit 3\n")
    assert (done.stdout.decode().strip(), done.returncode) == (str(door.engine.home), 3)


def test_a_terminal_has_the_clients_size_name_and_modes(door: Door) -> None:
    with at_a_terminal(door, "stty size; echo $TERM; stty -a; tty") as (client, ours):
        said = read_until(ours, b"/dev/pts/")
        assert client.wait(10) == 0
    assert b"33 101" in said
    assert os.environ.get("TERM", "").encode() in said
    assert b" echo " in said


def test_a_terminal_follows_the_clients_window(door: Door) -> None:
    script = "trap 'stty size; exit 5' WINCH; echo ready; while :; do sleep 0.02; done"
    with at_a_terminal(door, script) as (client, ours):
        read_until(ours, b"ready")
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 155, 0, 0))
        client.send_signal(signal.SIGWINCH)
        read_until(ours, b"44 155")
        assert client.wait(10) == 5


def test_ctrl_c_at_a_terminal_interrupts(door: Door) -> None:
    # In short naps: a shell that is about to wait for a long one would wait for it first.
    script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.02; done"
    with at_a_terminal(door, script) as (client, ours):
        read_until(ours, b"ready")
        os.write(ours, b"\x03")
        read_until(ours, b"caught")
        assert client.wait(10) == 9


def test_a_child_in_the_background_does_not_keep_a_terminal(door: Door) -> None:
    with at_a_terminal(door, "sleep 60 & echo gone") as (client, ours):
        read_until(ours, b"gone")
        assert client.wait(10) == 0


def test_a_signal_that_the_client_sends_reaches_the_process(door: Door) -> None:
    async def story() -> int | None:
        async with asyncssh.connect(
            HOST, door.port, username=LOGIN, client_keys=[str(door.key)], known_hosts=None
        ) as connection:
            process = await connection.create_process(
                "trap 'echo bye; exit 4' TERM; echo ready; while :; do sleep 0.02; done"
            )
            assert await process.stdout.readline() == "ready\n"
            process.send_signal("TERM")
            done = await process.wait()
            assert done.stdout == "bye\n"
            return done.exit_status

    assert asyncio.run(story()) == 4


def test_a_process_whose_client_went_away_is_hung_up(door: Door) -> None:
    client = subprocess.Popen(door.ssh_argv(HOST, "echo on; sleep 600"), stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"on\n"
    client.kill()
    client.wait()
    client.stdout.close()
    (process,) = door.engine.processes
    until(lambda: process.popen.poll() is not None, "the end of the process")


def test_what_was_left_in_the_background_on_purpose_stays(door: Door, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    done = door.ssh(HOST, f"nohup sh -c 'sleep 0.3; touch {mark}' >/dev/null 2>&1 &")
    assert done.returncode == 0
    until(mark.exists, "what the background wrote")


def test_a_client_that_does_not_read_stops_the_process_not_our_memory(
    door: Door, tmp_path: Path
) -> None:
    progress = tmp_path / "progress"
    progress.write_text("0")
    writer = (
        f"import os\nn = 0\nwhile n < 400:\n os.write(1, b'x' * (1 << 20)); n += 1\n"
        f" open('{progress}', 'w').write(str(n))"
    )
    client = subprocess.Popen(door.ssh_argv(HOST, f'python3 -c "{writer}"'), stdout=subprocess.PIPE)
    pause = threading.Event()
    seen, before = 0, -1
    while seen != before or seen == 0:  # until it stands still
        before = seen
        pause.wait(0.4)
        seen = int(progress.read_text() or 0)
    client.kill()
    client.wait()
    assert client.stdout is not None
    client.stdout.close()
    assert seen < 32, "more than 32 MiB were taken from the process for a client that reads nothing"


def test_an_interruption_is_told_at_the_terminal_once_and_so_is_its_withdrawal(door: Door) -> None:
    term_at = SystemClock.unanchored().now() + timedelta(seconds=120)
    with at_a_terminal(door, "echo ready; cat") as (_, ours):
        read_until(ours, b"ready")
        door.notices[RUN] = Notice(term_at=term_at, action="requeue", reason="owner_recall")
        said = read_until(ours, b"Save your work.")
        assert b"interruption (owner_recall): SIGTERM in 1" in said
        assert f"{term_at:%H:%M:%S} UTC".encode() in said
        assert b"is queued again" in said
        del door.notices[RUN]
        said = read_until(ours, b"goes on.")
        assert b"SIGTERM in" not in said


def test_an_interruption_does_not_disturb_the_output_of_a_command(door: Door) -> None:
    door.notices[RUN] = Notice(
        term_at=SystemClock.unanchored().now(), action="stop", reason="owner_recall"
    )
    assert door.ssh(HOST, "echo a; sleep 0.3; echo b").stdout == b"a\nb\n"


def test_a_session_that_is_open_when_the_bastion_stops_is_ended(
    make_door: Callable[..., Door],
) -> None:
    door = make_door()
    client = subprocess.Popen(
        door.ssh_argv(HOST, "echo on; sleep 600"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert client.stdout is not None
    assert client.stdout.readline() == b"on\n"
    door.run(door.bastion.stop())
    _, err = client.communicate(timeout=10)
    assert b"this SSH door is closing" in err
    assert client.returncode == 255
    (process,) = door.engine.processes
    assert process.popen.wait(5) == -signal.SIGHUP
    door.bastion = door.run(door._start())


def test_the_clients_environment_is_passed_on_within_bounds(door: Door) -> None:
    done = subprocess.run(
        door.ssh_argv("-o", "SendEnv=WORD LONG", HOST, 'echo "$WORD" ${#LONG}'),
        env={"PATH": os.environ["PATH"], "WORD": "Grüße", "LONG": "x" * 5000},
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.stdout.decode() == "Grüße 0\n"
