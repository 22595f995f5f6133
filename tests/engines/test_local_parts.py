"""Parts of the local engine that can be looked at by themselves."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sublet.capacity.engines.local import uids
from sublet.capacity.engines.local.supervise import cgroups, logs, records, seccomp
from sublet.capacity.engines.local.wipe import wipe
from sublet.capacity.engines.port import EngineError

LOCAL = Path(records.__file__).parents[1]

# Python 3.12 warns of threads, which test runners have and these children do not use.
forks = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")


# -- what runs without the installation's packages


def test_the_supervisor_stands_on_the_standard_library_alone() -> None:
    code = (
        "import sys; sys.path.append(sys.argv[1]); import supervise.main; "
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, str(LOCAL)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    strange = set(done.stdout.split()) - set(sys.stdlib_module_names) - {"__main__", "supervise"}
    assert strange == set()


@pytest.mark.parametrize("name", ["supervise/init.py", "intruder.py"])
def test_what_runs_inside_needs_no_more_than_python_3_9(name: str) -> None:
    source = (LOCAL / name).read_text()
    tree = ast.parse(source, feature_version=(3, 9))
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert imported <= set(sys.stdlib_module_names)
    assert len(source) < 100_000  # the intruder travels as one argument, of 128 KiB at most


# -- the filter


def judged(program: bytes, arch: int, nr: int, *args: int) -> int:
    """Run the filter as the kernel would; the errno, or 0 where the call is allowed."""
    data = nr.to_bytes(4, "little") + arch.to_bytes(4, "little") + bytes(8)
    data += b"".join((value & (1 << 64) - 1).to_bytes(8, "little") for value in args)
    data = data.ljust(64, b"\0")
    at = accumulator = 0
    while True:
        code = int.from_bytes(program[at : at + 2], sys.byteorder)
        if_true, if_false = program[at + 2], program[at + 3]
        value = int.from_bytes(program[at + 4 : at + 8], sys.byteorder)
        at += 8
        if code == 0x20:
            accumulator = int.from_bytes(data[value : value + 4], "little")
        elif code == 0x06:
            return 0 if value == 0x7FFF0000 else value & 0xFFFF
        else:
            holds = {
                0x15: accumulator == value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[code]
            at += 8 * (if_true if holds else if_false)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_lets_work_pass_and_keeps_the_odd_doors_shut(machine: str) -> None:
    arch, numbers = seccomp._NUMBERS[machine]
    program = seccomp.program(pin_affinity=False, machine=machine)
    pinned = seccomp.program(pin_affinity=True, machine=machine)
    assert len(program) % 8 == 0
    assert len(program) // 8 < 4096
    for nr in set(range(450)) - set(numbers.values()):
        assert judged(program, arch, nr) == 0
    special = {"clone", "unshare", "ioctl", "socket", "clone3", "sched_setaffinity"}
    for name in numbers.keys() - special:
        assert judged(program, arch, numbers[name]) == errno.EPERM, name
    thread, user_namespace = 0x3D0F00, 0x10000000
    assert judged(program, arch, numbers["clone"], thread) == 0
    assert judged(program, arch, numbers["clone"], thread | user_namespace) == errno.EPERM
    assert judged(program, arch, numbers["unshare"], 0x20000) == 0
    assert judged(program, arch, numbers["unshare"], user_namespace) == errno.EPERM
    assert judged(program, arch, numbers["clone3"]) == errno.ENOSYS
    for family, answer in ((1, 0), (2, 0), (10, 0), (16, 0), (17, 97), (38, 97), (40, 97)):
        assert judged(program, arch, numbers["socket"], family) == answer
    for request, answer in ((0x5412, 1), (0x541C, 1), (0x5423, 1), (0x5413, 0), (0x540E, 0)):
        assert judged(program, arch, numbers["ioctl"], 0, request) == answer
    assert judged(program, arch, numbers["sched_setaffinity"]) == 0
    assert judged(pinned, arch, numbers["sched_setaffinity"]) == errno.EPERM
    assert judged(program, arch ^ 1, 0) == errno.EPERM
    assert judged(program, arch, 0x40000000) == errno.ENOSYS


def test_a_tenant_meets_the_filter(local: Any) -> None:
    attempts = (
        "import ctypes, errno, os, socket\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "def call(name, *args):\n"
        "    r = getattr(libc, name)(*args)\n"
        "    print(name, errno.errorcode.get(ctypes.get_errno()) if r == -1 else 'done')\n"
        "call('unshare', 0x10000000); call('setns', 0, 0); call('ioctl', 0, 0x5412, b'x')\n"
        "call('mount', None, b'/tmp', b'tmpfs', 0, None); call('socket', 40, 1, 0)\n"
        "call('keyctl' if hasattr(libc, 'keyctl') else 'unshare', 0x10000000)\n"
        "os.waitpid(os.fork() or os._exit(0), 0); print('fork done')\n"
    )
    run = local.start(f'python3 -c "{attempts}"')
    local.until_over(run)
    assert local.text(run).splitlines() == [
        "unshare EPERM",
        "setns EPERM",
        "ioctl EPERM",
        "mount EPERM",
        "socket EAFNOSUPPORT",
        "unshare EPERM",
        "fork done",
    ]


# -- cgroups


V1 = (
    "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 /docker/abc /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw\n"
    "42 31 0:39 / /proc rw - proc proc rw\n"
)


def test_mounts_of_both_generations_are_read() -> None:
    first, second, third = cgroups.mounts(V1)
    assert (first.point, first.controllers) == (
        "/sys/fs/cgroup/cpu,cpuacct",
        frozenset({"cpu", "cpuacct"}),
    )
    assert (second.root, second.unified) == ("/docker/abc", False)
    assert third.unified
    assert cgroups.own_paths("4:memory:/docker/abc/x\n3:cpu,cpuacct:/\n0::/user.slice\n") == {
        "memory": "/docker/abc/x",
        "cpu": "/",
        "cpuacct": "/",
        "unified": "/user.slice",
    }


class FakeTree:
    """A delegated part of generation 2: a new folder comes with its files, as the kernel makes it."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        make = os.mkdir

        def mkdir(path: Any, mode: int = 0o777, **kwargs: Any) -> None:
            make(path, mode, **kwargs)
            if str(path).startswith(str(root)):
                self.fill(Path(path))

        monkeypatch.setattr(os, "mkdir", mkdir)
        root.mkdir()

    def fill(self, folder: Path) -> None:
        files = {
            "cgroup.type": "domain\n",
            "cgroup.procs": "",
            "cgroup.controllers": "cpuset cpu io memory pids\n",
            "cgroup.subtree_control": "",
            "cpu.max": "max 100000\n",
            "cpuset.cpus": "",
            "memory.max": "max\n",
            "memory.swap.max": "max\n",
            "pids.max": "max\n",
            "cpu.stat": "usage_usec 4000\nuser_usec 3000\n",
            "memory.current": "77\n",
            "memory.events": "low 0\noom 1\noom_kill 2\n",
        }
        for name, text in files.items():
            (folder / name).write_text(text)


def test_generation_two_is_used_where_it_was_delegated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = FakeTree(tmp_path / "tree", monkeypatch)
    mount = cgroups.Mount(str(tree.root.parent), "/", frozenset(), True)
    (tmp_path / "cgroup.type").write_text("domain\n")
    (tmp_path / "cgroup.procs").write_text("1\n")
    assert list(cgroups._unified_parents(mount, "/tree")) == [str(tree.root)]
    leaf = f"/tree/{cgroups.LEAF}"
    (tree.root / cgroups.LEAF).mkdir()
    assert list(cgroups._unified_parents(mount, leaf)) == [str(tree.root)]
    base = tree.root / "sublet-abc"
    assert cgroups._make(str(base), unified=True)
    assert (base / "cgroup.subtree_control").read_text().startswith("+")
    bases = {cgroups.UNIFIED: str(base), **dict.fromkeys(cgroups._available(str(base)), str(base))}
    run = cgroups.folders(bases, "run_1")
    cgroups.create(run, cpus=[1, 3], cpu_percent=200, memory_bytes=1 << 20, pids=99)
    made = base / "run_1"
    assert (made / "cpu.max").read_text().startswith("200000 100000")
    assert (made / "cpuset.cpus").read_text() == "1,3"
    assert (made / "memory.max").read_text() == str(1 << 20)
    assert (made / "memory.swap.max").read_text().startswith("0")
    assert (made / "pids.max").read_text().startswith("99")
    assert (cgroups.cpu_ms(run), cgroups.memory_bytes(run), cgroups.oom_kills(run)) == (4, 77, 2)


@forks
@pytest.mark.root
def test_the_real_tree_of_generation_two_takes_and_gives_back_a_process() -> None:
    seen = cgroups.mounts(Path("/proc/self/mountinfo").read_text())
    point = next((mount.point for mount in seen if mount.unified), None)
    if point is None or not os.access(point, os.W_OK):
        pytest.skip("no cgroup of generation 2 can be written here")
    base = Path(point) / "sublet-test-parts"
    run = {cgroups.UNIFIED: str(base / "run_1")}
    (base / "run_1").mkdir(parents=True)
    try:
        child = os.fork()
        if child == 0:
            cgroups.join(run)
            os.execvp("sleep", ["sleep", "600"])
        try:
            while not cgroups.processes(run):
                pass
            assert cgroups.processes(run) == {child}
            assert cgroups.cpu_ms(run) is not None
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
    finally:
        assert cgroups.remove(run) == []
    assert not base.exists()


# -- wiping


def test_wiping_takes_everything_and_follows_nothing(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    top = tmp_path / "top"
    top.mkdir()
    (top / "link").symlink_to(outside)
    (top / "file").symlink_to(outside / "kept")
    (top / "up").symlink_to("..")
    os.mkfifo(top / "pipe")
    (top / "a\nb \udc80").mkdir()
    (top / ".sublet-1").mkdir()
    (top / ".sublet-1" / "x" / "y").mkdir(parents=True)
    shut = top / "shut"
    (shut / "inner").mkdir(parents=True)
    (shut / "inner").chmod(0)
    shut.chmod(0)
    fd = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(1200):  # deeper than recursion goes, longer than a path may be
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert wipe(str(top)) == []
    assert not top.exists()
    assert (outside / "kept").read_text() == "kept"
    assert wipe(str(top)) == []


# -- uids


@pytest.mark.root
def test_a_home_keeps_its_uid_and_none_is_given_twice(tmp_path: Path) -> None:
    first, second = uids.allocate(tmp_path, "a"), uids.allocate(tmp_path, "b")
    assert first != second
    assert min(first, second) >= uids.FIRST
    assert uids.allocate(tmp_path, "a") == first
    uids.release(tmp_path, "a")
    assert uids.allocate(tmp_path, "c") not in (first, second)
    assert uids.allocate(tmp_path, "a") not in (first, second)


# -- files of a run


def test_evidence_is_whole_or_nothing(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert records.read_evidence(folder) is None
    fd = records.open_evidence(folder)
    for evidence in (records.Evidence(1, 2, 3, 4), records.Evidence(10**18, 9, 10**13, 0)):
        records.write_evidence(fd, evidence)
        assert records.read_evidence(folder) == evidence
    os.pwrite(fd, b"7", 3)
    assert records.read_evidence(folder) is None
    os.close(fd)


@forks
def test_the_lock_passes_to_a_child_and_is_seen_without_taking_it(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert not records.is_locked(folder)
    fd = records.open_lock(folder)
    assert records.take_lock(fd)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    os.close(fd)
    os.close(reading)
    other = records.open_lock(folder)
    assert records.is_locked(folder)
    assert not records.take_lock(other)
    os.close(writing)
    os.waitpid(child, 0)
    assert not records.is_locked(folder)
    assert records.take_lock(other)
    os.close(other)


def test_a_reader_of_logs_notices_what_is_missing(tmp_path: Path) -> None:
    folder = str(tmp_path)
    assert logs.read(folder, 0, 100) == (b"", 0)
    log = logs.LogWriter(folder, 16384)
    log.write(b"a" * 8192)
    assert logs.read(folder, 8190, 100) == (b"aa", 8192)
    assert logs.read(folder, 8192, 100) == (b"", 8192)
    log.write(b"b" * 50_000)
    said, offset = logs.read(folder, 8192, 100)
    assert b"bytes of output were left out here" in said
    assert logs.read(folder, offset, 3) == (b"bbb", offset + 3)
    assert logs.read(folder, 58_192, 100) == (b"", 58_192)


def test_metadata_too_large_is_refused(local: Any) -> None:
    run = local.start()
    with pytest.raises(EngineError):
        local.engine.publish_metadata(run, {"x": "y" * 200_000})
    local.engine.publish_metadata(run, {"x": "y" * 60_000})
