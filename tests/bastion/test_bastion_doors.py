"""Who comes in, what is refused, and the host key."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import asyncssh
import pytest

from sublet.base.kernel.errors import Unavailable
from sublet.edge.bastion import Target, public_line

from .conftest import LOGIN, RUN, Door, make_key

HOST = "127.0.0.1"


def test_another_key_is_refused(door: Door, tmp_path: Path) -> None:
    done = door.ssh(HOST, "true", key=make_key(tmp_path / "other"))
    assert done.returncode == 255
    assert b"Permission denied (publickey)" in done.stderr
    assert not door.engine.processes


def test_a_key_opens_no_other_workload(door: Door, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other")
    door.found["ins_b"] = Target(run_id=RUN, keys=(other.with_suffix(".pub").read_text(),))
    assert door.ssh(HOST, "true", login="ins_b").returncode == 255
    assert door.ssh(HOST, "true", login="ins_b", key=other).returncode == 0


def test_an_unknown_login_looks_like_a_wrong_key(door: Door) -> None:
    done = door.ssh(HOST, "true", login="ins_nothing")
    assert done.returncode == 255
    assert b"Permission denied (publickey)" in done.stderr


def test_a_workload_that_does_not_run_says_why_and_what_to_do(door: Door) -> None:
    why = f"{LOGIN} is stopped (user): start it with `sublet start {LOGIN}`."
    door.found[LOGIN] = why
    done = door.ssh(HOST, "true")
    assert done.returncode == 255
    assert why in done.stderr.decode()


def test_a_lookup_that_fails_is_a_sentence_not_a_login(door: Door) -> None:
    def lookup(login: str) -> Target | str | None:
        raise Unavailable("the database cannot be read: try again shortly.")

    door.bastion.lookup = lookup
    done = door.ssh(HOST, "true")
    assert done.returncode == 255
    assert b"the database cannot be read" in done.stderr


def test_a_workload_without_keys_says_so(door: Door) -> None:
    door.found[LOGIN] = Target(run_id=RUN, keys=("not a key", ""))
    done = door.ssh(HOST, "true")
    assert done.returncode == 255
    assert b"rented without an SSH key" in done.stderr


def test_a_connection_ends_with_its_run_saying_why(door: Door) -> None:
    argv = door.ssh_argv("-N", HOST)
    client = subprocess.Popen(argv, stderr=subprocess.PIPE)
    _wait_for_login(door)
    door.found[LOGIN] = "it was interrupted (owner_recall) and is queued again."
    _, err = client.communicate(timeout=10)
    assert b"interrupted (owner_recall)" in err
    assert client.returncode == 255


def test_a_connection_does_not_live_on_in_the_next_run(door: Door) -> None:
    client = subprocess.Popen(door.ssh_argv("-N", HOST), stderr=subprocess.PIPE)
    _wait_for_login(door)
    keys = (door.key.with_suffix(".pub").read_text(),)
    door.found[LOGIN] = Target(run_id="run_next", keys=keys)
    _, err = client.communicate(timeout=10)
    assert b"this run of it has ended" in err


def _wait_for_login(door: Door, *, many: int = 1) -> None:
    pause = threading.Event()
    for _ in range(500):
        if sum(bool(login.run_id) for login in list(door.bastion._logins)) >= many:
            return
        pause.wait(0.01)
    raise AssertionError("no login")


def test_a_process_that_cannot_be_started_is_a_sentence(door: Door) -> None:
    door.engine.running = False
    done = door.ssh(HOST, "true")
    assert done.returncode == 255
    assert b"sublet: " in done.stderr
    assert b"not running" in done.stderr


def test_too_many_keys_name_the_way(make_door: Callable[..., Door], tmp_path: Path) -> None:
    door = make_door(key_attempts=2)
    wrong = [make_key(tmp_path / f"k{n}") for n in range(3)]
    extra = [word for key in wrong for word in ("-i", str(key))]
    done = door.ssh(*extra, HOST, "true", key=wrong[0])
    assert done.returncode == 255
    assert b"IdentitiesOnly=yes" in done.stderr


def test_who_does_not_log_in_in_time_is_put_out(make_door: Callable[..., Door]) -> None:
    door = make_door(login_grace_seconds=0.3)
    with socket.create_connection((HOST, door.port), timeout=10) as silent:
        assert silent.recv(100).startswith(b"SSH-2.0-Sublet")
        rest = b"."
        while rest:
            rest = silent.recv(4096)


def silent(port: int, *, address: str = HOST) -> socket.socket:
    """A connection that says nothing; the bastion has taken it in."""
    made = socket.create_connection((HOST, port), timeout=10, source_address=(address, 0))
    assert made.recv(100).startswith(b"SSH-2.0-Sublet")
    return made


def is_dropped(connection: socket.socket) -> bool:
    """Was it hung up on? Else it is still served: nothing comes."""
    connection.settimeout(0.3)
    try:
        while connection.recv(4096):
            continue
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


def test_silent_connections_do_not_keep_people_out(make_door: Callable[..., Door]) -> None:
    door = make_door(unauthenticated=3, unauthenticated_per_address=8)
    held = [silent(door.port, address=f"127.0.0.{n}") for n in (2, 3, 4)]
    assert door.ssh(HOST, "true").returncode == 0
    assert [is_dropped(one) for one in held] == [True, False, False], "the oldest makes room"
    for one in held:
        one.close()


def test_one_address_makes_room_among_its_own(make_door: Callable[..., Door]) -> None:
    door = make_door(unauthenticated=8, unauthenticated_per_address=2)
    other = silent(door.port, address="127.0.0.2")
    held = [silent(door.port) for _ in range(3)]
    assert [is_dropped(one) for one in (other, *held)] == [False, True, False, False]
    assert len(door.bastion._logins) == 3
    assert door.ssh(HOST, "true").returncode == 0, "those who only wait there do not lock it out"
    assert not is_dropped(other)
    for one in (other, *held):
        one.close()


def test_who_has_logged_in_is_never_dropped_for_a_newcomer(make_door: Callable[..., Door]) -> None:
    door = make_door(connections=2)
    client = subprocess.Popen(door.ssh_argv("-N", HOST), stderr=subprocess.DEVNULL)
    _wait_for_login(door)
    first, second = silent(door.port), silent(door.port)
    assert [is_dropped(first), is_dropped(second)] == [True, False]
    argv = door.ssh_argv("-N", HOST)
    another = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
    _wait_for_login(door, many=2)
    assert is_dropped(second)
    assert door.ssh(HOST, "true").returncode == 255, "full of people who have logged in"
    assert client.poll() is None
    for process in (client, another):
        process.kill()
        process.wait()
    for one in (first, second):
        one.close()


def test_sessions_of_one_workload_have_a_bound(make_door: Callable[..., Door]) -> None:
    door = make_door(channels_per_workload=1)
    first = subprocess.Popen(
        door.ssh_argv(HOST, "echo on; sleep 600"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert first.stdout is not None
    assert first.stdout.readline() == b"on\n"
    done = door.ssh(HOST, "true")
    assert done.returncode == 255
    assert b"close one" in done.stderr
    first.kill()
    first.wait()
    first.stdout.close()
    pause = threading.Event()
    for _ in range(100):
        if door.ssh(HOST, "true").returncode == 0:
            return
        pause.wait(0.02)
    raise AssertionError("the place was not given back")


def test_many_sessions_asked_for_at_once_are_bounded_too(make_door: Callable[..., Door]) -> None:
    door = make_door(channels_per_workload=3)

    async def story() -> int:
        async with asyncssh.connect(
            HOST, door.port, username=LOGIN, client_keys=[str(door.key)], known_hosts=None
        ) as connection:
            asked = [connection.create_process("cat") for _ in range(12)]
            found = await asyncio.gather(*asked, return_exceptions=True)
            return sum(not isinstance(one, BaseException) for one in found)

    assert asyncio.run(story()) == 3


def test_the_host_key_is_made_once_and_kept_private(make_door: Callable[..., Door]) -> None:
    door = make_door()
    path = door.folder / "keys" / "ssh_host_ed25519_key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    before = public_line(door.folder / "keys")
    assert before.startswith("ssh-ed25519 ")
    assert len(os.listdir(path.parent)) == 1
    door.run(door.bastion.stop())
    door.bastion = door.run(door._start())
    door.port = door.bastion.port
    assert public_line(door.folder / "keys") == before
    assert door.ssh(HOST, "true").returncode == 0, "known hosts hold across a restart"


def test_a_port_in_use_is_an_error_of_the_system(door: Door, tmp_path: Path) -> None:
    from sublet.edge.bastion import Bastion

    async def start_second() -> None:
        await Bastion(door.engine, door.found.get, host_key_dir=tmp_path, port=door.port).start()

    with pytest.raises(OSError, match="address already in use"):
        door.run(start_second())
