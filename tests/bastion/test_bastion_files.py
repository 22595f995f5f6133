"""sftp and scp, with OpenSSH's clients."""

from __future__ import annotations

import asyncio
import inspect
import os
import random
import stat
from pathlib import Path

import asyncssh
import pytest

from sublet.edge.bastion.files import OPEN_LIMIT, TenantFiles

from .conftest import LOGIN, RUN, Door

HOST = "127.0.0.1"
DATA = random.Random(3).randbytes(3_000_001)


def test_sftp_carries_files_both_ways_unchanged(door: Door, tmp_path: Path) -> None:
    here, back = tmp_path / "here", tmp_path / "back"
    here.write_bytes(DATA)
    here.chmod(0o750)
    done = door.sftp(f"put -p {here} there", f"get -p there {back}")
    assert done.returncode == 0, done.stderr
    there = door.engine.home / "there"
    assert there.read_bytes() == DATA == back.read_bytes()
    assert stat.S_IMODE(there.stat().st_mode) == 0o750
    assert int(there.stat().st_mtime) == int(here.stat().st_mtime) == int(back.stat().st_mtime)


def test_sftp_does_what_people_do_with_folders(door: Door) -> None:
    home = door.engine.home
    (home / "a").write_bytes(b"12345")
    done = door.sftp(
        *("pwd", "mkdir d", "rename a d/b", "ln -s d/b s", "ln d/b h", "chmod 600 d/b"),
        *("ls -l d", "df .", "rm h", "mkdir e", "rmdir e", "ls"),
    )
    assert done.returncode == 0, done.stderr
    assert f"Remote working directory: {home}" in done.stdout
    assert "-rw-------" in done.stdout
    assert "Capacity" in done.stdout.replace("%Capacity", "Capacity")
    assert sorted(os.listdir(home)) == ["d", "s"]
    assert os.readlink(home / "s") == "d/b"
    assert (home / "d" / "b").read_bytes() == b"12345"


def test_sftp_says_what_is_wrong(door: Door) -> None:
    (door.engine.home / "a").write_bytes(b"a")
    (door.engine.home / "b").write_bytes(b"b")
    missing = door.sftp("get nothing /dev/null")
    assert missing.returncode == 1
    assert "not found" in missing.stderr or "No such file" in missing.stderr
    taken = door.sftp("rename -l a b")
    assert taken.returncode == 1
    assert (door.engine.home / "b").read_bytes() == b"b", "a plain rename does not replace"


def test_a_name_that_is_no_text_survives(door: Door, tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    (door.engine.home / name).write_bytes(b"x")
    assert door.sftp(f"get caf* {tmp_path / 'got'}").returncode == 0
    assert (tmp_path / "got").read_bytes() == b"x"


@pytest.mark.parametrize("old", [False, True], ids=["sftp", "scp protocol"])
def test_scp_carries_trees_both_ways(door: Door, tmp_path: Path, old: bool) -> None:
    flags = ["-O"] if old else []
    tree = tmp_path / "tree"
    (tree / "in").mkdir(parents=True)
    (tree / "in" / "data").write_bytes(DATA)
    (tree / "run").write_text("#!/bin/sh\n")
    (tree / "run").chmod(0o755)
    target = f"{LOGIN}@{HOST}:"
    done = door.scp(*flags, "-r", "-p", str(tree), target)
    assert done.returncode == 0, done.stderr
    assert (door.engine.home / "tree" / "in" / "data").read_bytes() == DATA
    assert os.access(door.engine.home / "tree" / "run", os.X_OK)
    back = tmp_path / "back"
    done = door.scp(*flags, "-r", f"{target}tree", str(back))
    assert done.returncode == 0, done.stderr
    assert (back / "in" / "data").read_bytes() == DATA


def test_only_regular_files_are_read_or_written(door: Door, tmp_path: Path) -> None:
    home = door.engine.home
    os.mkfifo(home / "pipe")
    (home / "zero").symlink_to("/dev/zero")
    (home / "null").symlink_to("/dev/null")
    (home / "folder").mkdir()

    async def story() -> list[str]:
        refused = []
        async with (
            asyncssh.connect(
                HOST, door.port, username=LOGIN, client_keys=[str(door.key)], known_hosts=None
            ) as connection,
            connection.start_sftp_client() as sftp,
        ):
            for name in ("pipe", "zero", "null", "folder"):
                for mode in ("rb", "r+b"):
                    try:
                        await asyncio.wait_for(sftp.open(name, mode), 5)
                    except asyncssh.SFTPError:
                        refused.append(f"{name} {mode}")
        return refused

    assert len(asyncio.run(story())) == 8


def test_open_files_and_folders_have_a_bound(door: Door) -> None:
    (door.engine.home / "a").write_bytes(b"a")

    async def story() -> None:
        async with (
            asyncssh.connect(
                HOST, door.port, username=LOGIN, client_keys=[str(door.key)], known_hosts=None
            ) as connection,
            connection.start_sftp_client() as sftp,
        ):
            files = [await sftp.open("a", "rb") for _ in range(OPEN_LIMIT)]
            with pytest.raises(asyncssh.SFTPFailure, match="close one"):
                await sftp.open("a", "rb")
            await files[0].close()
            await sftp.open("a", "rb")

    asyncio.run(story())


def test_descriptors_are_closed_with_the_session(door: Door) -> None:
    (door.engine.home / "a").write_bytes(b"a")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        assert door.sftp("get a /dev/null", "put /etc/hosts b").returncode == 0

    async def leave_open() -> None:
        async with asyncssh.connect(
            HOST, door.port, username=LOGIN, client_keys=[str(door.key)], known_hosts=None
        ) as connection:
            sftp = await connection.start_sftp_client()
            await sftp.open("a", "rb")
            connection.abort()

    asyncio.run(leave_open())
    for _ in range(100):
        if len(os.listdir("/proc/self/fd")) <= before:
            break
        door.run(asyncio.sleep(0.02))
    assert len(os.listdir("/proc/self/fd")) <= before


def test_no_operation_of_the_base_class_works_on_the_hosts_files() -> None:
    """A new version of the library must not bring an operation that we do not send inside."""
    harmless = {
        *("channel", "connection", "env", "logger", "exit", "convert_attrs", "format_longname"),
        # The identity, unless a chroot is given, which is never.
        *("map_path", "reverse_map_path"),
        # Refused by the base class.
        *("lock", "unlock"),
    }
    operations = {
        name
        for name, _ in inspect.getmembers(asyncssh.SFTPServer)
        if not name.startswith("_") and name not in harmless
    }
    assert operations, "the base class has operations"
    assert operations - set(vars(TenantFiles)) == set()


def test_files_of_a_workload_that_stopped_meanwhile_say_so(door: Door) -> None:
    async def story() -> str:
        async with (
            asyncssh.connect(
                HOST, door.port, username=LOGIN, client_keys=[str(door.key)], known_hosts=None
            ) as connection,
            connection.start_sftp_client() as sftp,
        ):
            door.engine.running = False
            with pytest.raises(asyncssh.SFTPError) as caught:
                await sftp.listdir(".")
            return str(caught.value)

    assert "not running" in asyncio.run(story())
    assert RUN not in door.found
