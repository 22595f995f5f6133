"""The spool on real files: groups, failing disks, `kill -9`, and how it is read again."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.wire.gateway import SpoolReader, frame, read_frames
from sublet.base.wire.gateway.spool import file_name
from sublet.gateway import spool as spool_module
from sublet.gateway.spool import Spool


def bodies(folder: Path) -> list[bytes]:
    return list(SpoolReader(folder).frames())


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.005)


def with_spool(folder: Path, story: Callable[[Spool], Awaitable[None]], **options: object) -> None:
    async def run() -> None:
        spool = Spool(folder, asyncio.get_running_loop(), **options)  # type: ignore[arg-type]
        try:
            await story(spool)
        finally:
            spool.close()

    asyncio.run(run())


# ---- writing -------------------------------------------------------------------------------------


def test_an_event_is_on_disk_when_its_answer_may_leave(tmp_path: Path) -> None:
    seen: list[tuple[int, list[bytes], tuple[int, int]]] = []

    async def story(spool: Spool) -> None:
        for number in range(3):
            spool.append(
                b'{"n":%d}' % number,
                lambda n=number: seen.append((n, bodies(tmp_path), spool.position)),
            )
        await until(lambda: len(seen) == 3)

    with_spool(tmp_path, story)
    assert [n for n, _, _ in seen] == [0, 1, 2]
    for number, on_disk, (file, offset) in seen:
        assert b'{"n":%d}' % number in on_disk
        assert file == 1
        assert offset == len(b"".join(frame(body) for body in on_disk))


def test_what_comes_while_the_disk_works_is_one_group_in_order(tmp_path: Path) -> None:
    order: list[int] = []

    async def story(spool: Spool) -> None:
        for number in range(500):
            spool.append(b"%d" % number, lambda n=number: order.append(n))
            if number % 50 == 0:
                await asyncio.sleep(0)
        await spool.finish()
        await until(lambda: len(order) == 500)

    with_spool(tmp_path, story)
    assert order == list(range(500))
    assert bodies(tmp_path) == [b"%d" % n for n in range(500)]


def test_closing_writes_all_that_was_appended(tmp_path: Path) -> None:
    async def story(spool: Spool) -> None:
        for number in range(100):
            spool.append(b"%d" % number, None)

    with_spool(tmp_path, story)
    assert len(bodies(tmp_path)) == 100


def test_a_full_file_is_followed_by_a_new_one(tmp_path: Path) -> None:
    async def story(spool: Spool) -> None:
        for number in range(10):
            done = asyncio.Event()
            spool.append(b"%d" % number, done.set)
            await done.wait()
        assert spool.position == (5, 2 * len(frame(b"0")))

    with_spool(tmp_path, story, file_bytes=2 * len(frame(b"0")))
    assert SpoolReader(tmp_path).files() == [1, 2, 3, 4, 5]
    assert bodies(tmp_path) == [b"%d" % n for n in range(10)]


def test_without_ack_the_answer_leaves_at_once_and_the_disk_follows(tmp_path: Path) -> None:
    async def story(spool: Spool) -> None:
        told: list[int] = []
        spool.append(b"a", lambda: told.append(1))
        assert told == [1]
        assert bodies(tmp_path) == []
        await until(lambda: bodies(tmp_path) == [b"a"])
        assert told == [1]

    with_spool(tmp_path, story, ack=False)


def test_a_fault_in_one_callback_keeps_no_other_answer_back(tmp_path: Path) -> None:
    faults: list[object] = []
    told: list[int] = []

    def breaks() -> None:
        raise ValueError("one request's fault")

    async def story(spool: Spool) -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, c: faults.append(c["exception"]))
        spool.append(b"a", breaks)
        spool.append(b"b", lambda: told.append(1))
        await until(lambda: told == [1])

    with_spool(tmp_path, story)
    assert [str(fault) for fault in faults] == ["one request's fault"]


# ---- disks that fail -----------------------------------------------------------------------------


def test_a_disk_that_fails_acknowledges_nothing_and_recovers_by_itself(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, away = tmp_path / "here", tmp_path / "away"
    folder.mkdir()
    told: list[bytes] = []

    async def story(spool: Spool) -> None:
        spool.append(b"a", lambda: told.append(b"a"))
        await until(lambda: told == [b"a"])
        folder.rename(away)  # No new file can be made now.
        spool.append(b"b", lambda: told.append(b"b"))
        await until(lambda: spool.is_failing)
        spool.append(b"c", lambda: told.append(b"c"))
        await spool.finish()  # Does not wait for a disk that fails.
        position = spool.position
        await asyncio.sleep(0.3)
        assert told == [b"a"]
        assert spool.position == position == (1, len(frame(b"a")))
        away.rename(folder)
        await until(lambda: len(told) == 3)
        assert not spool.is_failing

    with_spool(folder, story, file_bytes=1)
    assert told == [b"a", b"b", b"c"]
    assert bodies(folder) == [b"a", b"b", b"c"]
    said = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert [line["event"] for line in said] == ["spool_not_written", "spool_written_again"]


def run_child(source: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(source), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SHORT_DISK = """
    import asyncio, resource, signal, sys
    from pathlib import Path
    from sublet.gateway.spool import Spool

    async def main():
        spool = Spool(Path(sys.argv[1]), asyncio.get_running_loop())
        for number in range(12):
            done = asyncio.Event()
            spool.append(b'{"n":%d,"p":"%b"}' % (number, b"x" * 300), done.set)
            await done.wait()
            print(number, flush=True)
        spool.close()

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    asyncio.run(main())
"""


def test_a_write_that_the_disk_takes_in_part_is_taken_back_and_repeated(tmp_path: Path) -> None:
    """The kernel lets no file grow beyond 1,000 bytes: every fourth write ends in its middle."""
    child = run_child(SHORT_DISK, str(tmp_path))
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    assert out.split() == [str(n) for n in range(12)]
    reader = SpoolReader(tmp_path)
    assert len(reader.files()) == 4
    assert [json.loads(body)["n"] for body in reader.frames()] == list(range(12))
    for number in reader.files():  # What was half written is gone.
        data = (tmp_path / file_name(number)).read_bytes()
        assert read_frames(data)[1] == len(data)


# ---- the end of a process ------------------------------------------------------------------------

WRITES_FOR_EVER = """
    import asyncio, os, sys
    from pathlib import Path
    from sublet.gateway.spool import Spool

    async def main():
        loop = asyncio.get_running_loop()
        spool = Spool(Path(sys.argv[1]), loop, rows=lambda: [b'{"id":"open"}'], file_bytes=20_000)
        number = 0
        def send():
            nonlocal number
            for _ in range(7):
                number += 1
                body = b'{"n":%d,"p":"%b"}' % (number, b"x" * 600)
                spool.append(body, lambda n=number: told(n))
        def told(n):
            os.write(1, b"%d\\n" % n)
            if n % 7 == 0:
                send()
        send()
        await asyncio.Event().wait()

    asyncio.run(main())
"""


def can_be_locked(folder: Path) -> bool:
    descriptor = os.open(folder / "lock", os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


@pytest.mark.parametrize("after_lines", [1, 400, 1500])
def test_kill_9_loses_nothing_that_was_acknowledged(tmp_path: Path, after_lines: int) -> None:
    child = run_child(WRITES_FOR_EVER, str(tmp_path))
    assert child.stdout is not None
    assert child.stderr is not None
    with child.stdout, child.stderr:
        for _ in range(after_lines):
            assert child.stdout.readline()
        assert not can_be_locked(tmp_path)
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read()
        child.wait(timeout=10)
    assert can_be_locked(tmp_path)
    acknowledged = after_lines + rest.count("\n")
    kept = [json.loads(body)["n"] for body in SpoolReader(tmp_path).frames()]
    assert kept == list(range(1, len(kept) + 1))
    assert len(kept) >= acknowledged


def test_one_folder_has_one_writer(tmp_path: Path) -> None:
    async def story(_: Spool) -> None:
        with pytest.raises(BlockingIOError):
            Spool(tmp_path, asyncio.get_running_loop())

    with_spool(tmp_path, story)
    assert can_be_locked(tmp_path)


def test_what_is_open_is_written_down_and_the_file_goes_when_nothing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "INFLIGHT_SECONDS", 0.02)
    rows = [b'{"id":"a"}', b'{"id":"b"}']
    path = tmp_path / "inflight.json"

    async def story(spool: Spool) -> None:
        await until(path.exists)
        assert json.loads(path.read_bytes()) == [{"id": "a"}, {"id": "b"}]
        rows.pop()
        await until(lambda: json.loads(path.read_bytes()) == [{"id": "a"}])
        rows.pop()
        await until(lambda: not path.exists())
        rows.append(b'{"id":"c"}')
        await until(path.exists)
        rows.clear()

    with_spool(tmp_path, story, rows=lambda: list(rows))
    assert not path.exists()


# ---- reading again -------------------------------------------------------------------------------


def lay(folder: Path, number: int, data: bytes) -> None:
    (folder / file_name(number)).write_bytes(data)


def test_a_torn_end_of_the_last_file_waits_for_its_rest(tmp_path: Path) -> None:
    whole = frame(b"a") + frame(b"b")
    lay(tmp_path, 1, whole[:-2])
    reader = SpoolReader(tmp_path)
    batch = reader.read(0, 0)
    assert batch.bodies == (b"a",)
    batch = reader.read(batch.file, batch.offset)
    assert (batch.bodies, batch.torn_bytes, batch.is_last) == ((), len(frame(b"b")) - 2, True)
    lay(tmp_path, 1, whole)
    assert reader.read(batch.file, batch.offset).bodies == (b"b",)


def test_a_torn_end_before_a_later_file_is_passed_over_and_told(tmp_path: Path) -> None:
    lay(tmp_path, 1, frame(b"a") + frame(b"b")[:7])
    lay(tmp_path, 2, b"")
    lay(tmp_path, 3, frame(b"b") + frame(b"c"))
    reader = SpoolReader(tmp_path)
    assert list(reader.frames()) == [b"a", b"b", b"c"]
    batch = reader.read(1, len(frame(b"a")))
    assert (batch.file, batch.bodies, batch.passed_bytes) == (3, (b"b", b"c"), 7)
    assert (batch.torn_bytes, batch.is_last) == (0, True)


def test_a_position_that_was_taken_back_goes_on_in_the_next_file(tmp_path: Path) -> None:
    """The reader was ahead of a write that failed: its frames come again."""
    lay(tmp_path, 1, frame(b"a"))
    lay(tmp_path, 2, frame(b"b") + frame(b"c"))
    batch = SpoolReader(tmp_path).read(1, len(frame(b"a") + frame(b"b")))
    assert (batch.file, batch.bodies) == (2, (b"b", b"c"))


def test_damage_with_sound_frames_behind_it_is_never_passed_over(tmp_path: Path) -> None:
    spoilt = frame(b"b").replace(b"b\n", b"x\n")
    lay(tmp_path, 1, frame(b"a") + spoilt + frame(b"c"))
    lay(tmp_path, 2, frame(b"d"))
    reader = SpoolReader(tmp_path)
    batch = reader.read(0, 0)
    assert batch.bodies == (b"a",)
    batch = reader.read(batch.file, batch.offset)
    assert (batch.file, batch.offset, batch.bodies) == (1, len(frame(b"a")), ())
    assert batch.torn_bytes == len(spoilt + frame(b"c"))
    assert not batch.is_last
    assert list(reader.frames()) == [b"a"]


def test_a_frame_longer_than_a_read_is_read_all_the_same(tmp_path: Path) -> None:
    lay(tmp_path, 1, frame(b"x" * 5000) + frame(b"y"))
    batch = SpoolReader(tmp_path).read(0, 0, most_bytes=1000)
    assert batch.bodies == (b"x" * 5000, b"y")


@given(
    st.lists(st.binary(max_size=40).map(lambda b: b.replace(b"\n", b"")), max_size=8),
    st.integers(1, 64),
    st.data(),
)
def test_a_spool_cut_anywhere_yields_its_whole_frames_once(
    tmp_path_factory: pytest.TempPathFactory, rows: list[bytes], most: int, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = b"".join(frame(row) for row in rows)
    cut = data.draw(st.integers(0, len(whole)))
    lay(folder, 1, whole[:cut])
    expected, _ = read_frames(whole[:cut])
    reader = SpoolReader(folder)
    got: list[bytes] = []
    file = offset = 0
    while (batch := reader.read(file, offset, most_bytes=most)).bodies:
        got += batch.bodies
        file, offset = batch.file, batch.offset
    assert got == expected == rows[: len(expected)]
    assert batch.torn_bytes == cut - sum(len(frame(row)) for row in expected)
    lay(folder, 2, b"".join(frame(row) for row in rows[len(expected) :]))
    assert [*got, *reader.frames(file, offset)] == rows
