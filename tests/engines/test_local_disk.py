"""Deleted files take room while somebody holds them, and a disk that fills up is defended."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sublet.capacity.engines.local.supervise import disk, held, records
from sublet.capacity.engines.port import Phase

MIB = 1 << 20
SECOND = 1_000_000_000

MAKE = """
import ctypes, mmap, os, socket, sys, threading, time
def nameless(n, size=1 << 20):
    fd = os.open(f"f{n}", os.O_RDWR | os.O_CREAT)
    os.posix_fallocate(fd, 0, size)
    os.unlink(f"f{n}")
    return fd
def is_open():
    return [nameless(n) for n in range(4)]
def of_a_thread():
    ready = threading.Event()
    def hold():
        assert ctypes.CDLL(None).unshare(0x400) == 0
        fds = [nameless(n) for n in range(4)]
        ready.set()
        time.sleep(600)
    threading.Thread(target=hold).start()
    ready.wait()
def mapped():
    kept = []
    for n in range(4):
        fd = nameless(n)
        kept.append(mmap.mmap(fd, 4096))
        os.close(fd)
    return kept
kept = globals()[sys.argv[1]]()
"""


def holding(how: str, then: str = "time.sleep(600)") -> str:
    return f"python3 -c '{MAKE}\n{then}' {how}"


@pytest.mark.parametrize("how", ["is_open", "of_a_thread"])
def test_what_was_deleted_and_is_open_counts(local: Any, how: str) -> None:
    run = local.start(holding(how), disk_bytes=2 * MIB)
    seen = local.until_over(run, seconds=10)
    assert (seen.phase, seen.term_reason) == (Phase.EXITED, "disk")
    assert seen.disk_bytes >= 4 * MIB
    assert f"{2 * MIB} are allowed" in local.text(run)


@pytest.mark.root
def test_what_was_deleted_and_is_mapped_counts(local: Any) -> None:
    run = local.start(holding("mapped"), disk_bytes=2 * MIB)
    assert local.until_over(run, seconds=10).term_reason == "disk"


def test_what_is_held_many_times_counts_once_and_not_when_it_is_let_go(local: Any) -> None:
    then = "for _ in range(8): os.fork() or time.sleep(600)\ntime.sleep(600)"
    run = local.start(holding("is_open", then), disk_bytes=6 * MIB)
    local.run_until(lambda: local.see(run).disk_bytes >= 4 * MIB, 10)
    time.sleep(1.5)  # another count at least
    seen = local.see(run)
    assert (seen.phase, seen.term_reason) == (Phase.RUNNING, None)
    assert seen.disk_bytes < 5 * MIB
    local.engine.signal(run, "SIGKILL")


def test_a_file_that_somebody_outside_was_handed_counts_until_it_is_closed(local: Any) -> None:
    run = local.start(disk_bytes=8 * MIB)
    fd = local.engine.file(run, "open", "big", os.O_WRONLY | os.O_CREAT, 0o600)
    local.engine.file(run, "unlink", "big")
    os.posix_fallocate(fd, 0, 4 * MIB)
    local.run_until(lambda: local.see(run).disk_bytes >= 4 * MIB, 10)
    os.close(fd)
    local.run_until(lambda: local.see(run).disk_bytes < MIB, 10)
    fd = local.engine.file(run, "open", "bigger", os.O_WRONLY | os.O_CREAT, 0o600)
    local.engine.file(run, "unlink", "bigger")
    os.posix_fallocate(fd, 0, 9 * MIB)
    assert local.until_over(run, seconds=10).term_reason == "disk"
    os.close(fd)


def test_descriptors_under_way_are_told(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    os.unlink(tmp_path / "f")
    file, socket_there = os.fstat(fd).st_ino, os.fstat(theirs.fileno()).st_ino

    def look() -> tuple[bool, bool]:
        """Is the file seen, and is the socket told?"""
        found = list(held.by_processes([os.getpid()], {tmp_path.stat().st_dev}))
        inodes = {one.st_ino for one in found if isinstance(one, os.stat_result)}
        return file in inodes, held.Unseen(f"socket {socket_there}") in found

    with ours, theirs:
        assert look() == (True, False)
        socket.send_fds(ours, [b"x"], [fd])
        os.close(fd)
        assert look() == (False, True)
        _, [again], _, _ = socket.recv_fds(theirs, 1, 1)
        assert look() == (True, False)
        os.close(again)
    assert look() == (False, False)


# -- a disk that fills up


class Room:
    """A disk and a clock in the hands of the test, and a watch that looks at both."""

    def __init__(self, folder: Path, plan: records.Plan, **changes: int) -> None:
        for name in ("home", "scratch"):
            (folder / name).mkdir()
        (folder / "home" / "f").write_bytes(b"x" * MIB)
        self.free = 0
        self.now = SECOND
        self.watch = disk.DiskWatch(
            dataclasses.replace(
                plan, home=str(folder / "home"), scratch=str(folder / "scratch"), **changes
            ),
            str(folder),
            clock_ns=lambda: self.now,
            find_free=lambda _: self.free,
        )

    def ends_at(self, *free: int, root: int | None = None) -> list[bool]:
        """For each figure, a second apart: is the run to be ended?"""
        answers = []
        for self.free in free:
            self.watch.step(root)
            answers.append(self.watch.emergency is not None)
            self.now += SECOND
        return answers


@pytest.fixture
def plan(make_local: Any) -> records.Plan:
    local = make_local(trusted=True, without=frozenset({"bubblewrap"}))
    run = local.start("exit 0", disk_bytes=100 * MIB)
    local.until_over(run)
    found = records.read_plan(str(local.folder(run)))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("share", "free", "ends"),
    [
        pytest.param(MIB // 2, (900, 600, 501), [False] * 3, id="over half of the reserve"),
        pytest.param(MIB // 2, (499, 480), [False, True], id="falls under half"),
        pytest.param(MIB // 2, (499, 499, 499), [False] * 3, id="stays"),
        pytest.param(MIB // 2, (400, 450, 499), [False] * 3, id="rises"),
        pytest.param(MIB // 2, (400, 600, 399), [False] * 3, id="had risen in between"),
        pytest.param(MIB // 2, (0, 0), [False, True], id="nothing left to fall"),
        pytest.param(2 * MIB, (499, 300, 0, 0), [False] * 4, id="within its share"),
    ],
)
def test_under_half_of_the_reserve_whoever_is_over_the_share_is_ended_while_room_falls(
    tmp_path: Path, plan: records.Plan, share: int, free: tuple[int, ...], ends: list[bool]
) -> None:
    room = Room(tmp_path, plan, disk_reserve_bytes=1000, disk_share_bytes=share)
    assert room.ends_at(*free) == ends
    if any(ends):
        assert "goes on filling" in str(room.watch.emergency)
        assert str(share) in str(room.watch.emergency)


def test_who_hides_files_where_they_cannot_be_counted_is_ended_too(
    tmp_path: Path, plan: records.Plan
) -> None:
    room = Room(tmp_path, plan, disk_reserve_bytes=1000, disk_share_bytes=100 * MIB)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs, (tmp_path / "home" / "f").open() as file:
        assert room.ends_at(499, 480, root=os.getpid()) == [False, False]
        socket.send_fds(ours, [b"x"], [file.fileno()])
        assert room.ends_at(470, root=os.getpid()) == [False], "once may be a moment's traffic"
        assert room.ends_at(460, root=os.getpid()) == [True]
        assert "cannot be counted" in str(room.watch.emergency)
        os.close(socket.recv_fds(theirs, 1, 1)[1][0])
        assert room.ends_at(450, root=os.getpid()) == [False]


def test_who_hides_nothing_and_is_within_its_share_stays(
    tmp_path: Path, plan: records.Plan, local: Any
) -> None:
    state = records.read_state(str(local.folder(local.start("sleep 600"))))
    assert state is not None
    room = Room(tmp_path, plan, disk_reserve_bytes=1000, disk_share_bytes=100 * MIB)
    assert room.ends_at(499, 400, 300, 0, root=state.init_pid) == [False] * 4


def test_while_room_is_short_there_is_no_rest_between_counts(
    tmp_path: Path, plan: records.Plan
) -> None:
    room = Room(tmp_path, plan, disk_reserve_bytes=1000)
    room.ends_at(5000)
    before = room.watch.disk_bytes
    room.watch._rest_until_ns = room.now + 1000 * SECOND  # as after a count that took a minute
    (tmp_path / "home" / "g").write_bytes(b"x" * MIB)
    room.ends_at(5000)
    assert room.watch.disk_bytes == before
    room.ends_at(999)
    assert room.watch.disk_bytes >= before + MIB


@pytest.fixture
def small_disk(make_local: Any) -> Iterator[Any]:
    """An engine whose folder is a volume of 64 MiB, of which 32 are kept."""
    local = make_local(disk_reserve_bytes=32 * MIB)
    argv = ["mount", "-t", "tmpfs", "-o", "size=64m,mode=755", "tmpfs", str(local.root)]
    if subprocess.run(argv, capture_output=True).returncode != 0:
        pytest.skip("nothing can be mounted here")
    try:
        local.engine = local.reopened()
        yield local
        for run_id, seen in local.engine.observe().items():
            if seen.phase not in (Phase.EXITED, Phase.FAILED):
                local.engine.stop(run_id, grace_seconds=0, reason="test")
                local.until_over(run_id)
            assert local.engine.scrub(run_id).clean
    finally:
        umount = ["umount", str(local.root)]  # supervisors take a moment to go
        local.run_until(lambda: subprocess.run(umount, capture_output=True).returncode == 0, 5)


@pytest.mark.root
def test_a_disk_that_strangers_fill_is_free_again_for_the_books(small_disk: Any) -> None:
    """All the room at once, in files that no folder names, by one who may by its own limit."""
    then = "kept += [nameless(n, 8 << 20) for n in range(4)]; time.sleep(0.5)\n" + (
        "while True:\n    try: kept.append(nameless(99, 1 << 20)); time.sleep(0.2)\n"
        "    except OSError: time.sleep(0.2)"
    )
    run = small_disk.start(
        "trap '' TERM; " + holding("is_open", then), disk_bytes=1 << 30, stop_grace_seconds=600
    )
    plan = records.read_plan(str(small_disk.folder(run)))
    assert plan is not None
    assert plan.disk_share_bytes <= 32 * MIB
    began = time.monotonic()
    seen = small_disk.until_over(run, seconds=25)
    assert (seen.phase, seen.term_reason) == (Phase.EXITED, "disk")
    assert time.monotonic() - began < 20, "the run's own grace of ten minutes was not waited for"
    assert "[sublet] ended: the disk is full but for" in small_disk.text(run)
    assert small_disk.engine._free_bytes() > 60 * MIB
