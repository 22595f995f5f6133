"""Weights in the one process that may see them: how the key comes in, who is kept out."""

from __future__ import annotations

import ast
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sealed_models
from sealed_models import KEK, MUSE, OTHER_USER, USER, leaks, probe, run_python, served, wait_until

from sublet.shops.models import keys
from sublet.shops.models.servers.child import unseal

PLAIN = MUSE.read_bytes()
OWN = USER if os.geteuid() == 0 else None
"""Whose process it is: an ordinary user's, whoever runs the tests."""


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that other users can pass through."""
    made = Path(
        subprocess.check_output(
            ["mktemp", "-d", "/tmp/sublet-test-sealed-XXXXXX"], text=True
        ).strip()
    )
    made.chmod(0o755)
    yield made
    subprocess.run(["rm", "-rf", str(made)], check=True)


@pytest.fixture
def muse(place: Path) -> keys.Imported:
    return sealed_models.seal_muse(place)


OPEN = """
import fcntl, hashlib, json, mmap, os, sys, unseal
path = unseal.receive_and_open(sys.argv[1], sys.argv[2], wait_seconds=20)
fd = int(path.rpartition("/")[2])
locked = lambda: int(open("/proc/self/status").read().partition("VmLck:")[2].split()[0])
found = {"seals": fcntl.fcntl(fd, 1034), "link": os.readlink(path), "locked": locked(),
         "digest": hashlib.sha256(open(path, "rb").read()).hexdigest(), "refused": []}
for name, act in {
    "write": lambda: os.write(os.open(path, os.O_RDWR), b"x"),
    "truncate": lambda: os.truncate(path, 0),
    "grow": lambda: os.truncate(path, 1 << 30),
    "map for writing": lambda: mmap.mmap(os.open(path, os.O_RDWR), 4096),
}.items():
    try:
        act()
    except PermissionError:
        found["refused"].append(name)
unseal.let_go(path)
found["after"] = os.path.exists(path)
found["still"] = locked()
print(json.dumps(found))
"""


def deliver(door: Path, key: bytes) -> None:
    def try_once() -> bool:
        try:
            with keys.knock(str(door)) as caller:
                caller.deliver(bytearray(key))
            return True
        except FileNotFoundError:
            return False

    wait_until(try_once, 10, "somebody listens for a key")


def test_it_opens_into_memory_that_is_locked_sealed_and_nameless(
    muse: keys.Imported, tmp_path: Path
) -> None:
    door = tmp_path / "key.sock"
    tmp_path.chmod(0o700)
    key = bytes(KEK.unwrap(muse.wrapped))
    sender = threading.Thread(target=deliver, args=(door, key))
    sender.start()
    [found] = run_python(OPEN, str(muse.path), str(door))
    sender.join()
    assert found["digest"] == muse.sha256
    assert found["seals"] == 1 | 2 | 4 | 8
    assert found["refused"] == ["write", "truncate", "grow", "map for writing"]
    assert "memfd:weights (deleted)" in found["link"]
    assert found["locked"] * 1024 >= len(PLAIN)
    assert (found["after"], found["still"]) == (False, found["locked"])
    assert not door.exists()


def starts(argv: list[str], **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def child(script: str, *arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    head = f"import sys; sys.path[:0] = [{str(sealed_models.CHILD)!r}]; import os, time, unseal\n"
    return starts([sys.executable, "-c", head + script, *map(str, arguments)], **options)


RECEIVE = "unseal.receive_and_open(sys.argv[1], sys.argv[2], wait_seconds=float(sys.argv[3]))"


def test_another_key_opens_nothing(muse: keys.Imported, tmp_path: Path) -> None:
    process = child(RECEIVE, muse.path, tmp_path / "key.sock", 10)
    deliver(tmp_path / "key.sock", bytes(32))
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"chunk 0 of 3 does not open" in said
    assert list(tmp_path.iterdir()) == []


def test_a_file_cut_short_asks_for_no_key(muse: keys.Imported, tmp_path: Path) -> None:
    cut = tmp_path / "cut.sealed"
    cut.write_bytes(muse.path.read_bytes()[:-1])
    process = child(RECEIVE, cut, tmp_path / "key.sock", 10)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"cut short" in said


def test_without_a_key_it_gives_up(muse: keys.Imported, tmp_path: Path) -> None:
    process = child(RECEIVE, muse.path, tmp_path / "key.sock", 0.1)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"no key came within 0.1 s" in said
    assert list(tmp_path.iterdir()) == []


def test_sigterm_ends_the_wait_also_where_it_is_blocked(
    muse: keys.Imported, tmp_path: Path
) -> None:
    block = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])\n"
    process = child(block + RECEIVE, muse.path, tmp_path / "key.sock", 60)
    wait_until((tmp_path / "key.sock").exists, 10, "it listens")
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 128 + signal.SIGTERM


def test_killed_in_the_middle_it_leaves_nothing(muse: keys.Imported, tmp_path: Path) -> None:
    slow = (
        "whole = unseal.Cipher.open\n"
        "def slow(self, index, *rest):\n"
        "    whole(self, index, *rest)\n"
        "    if index == 1:\n"
        "        print('half', flush=True); time.sleep(60)\n"
        "unseal.Cipher.open = slow\n"
    )
    process = child(slow + RECEIVE, muse.path, tmp_path / "key.sock", 10, cwd=tmp_path)
    deliver(tmp_path / "key.sock", bytes(KEK.unwrap(muse.wrapped)))
    assert process.stdout is not None
    assert process.stdout.readline() == b"half\n"
    if os.geteuid() == 0:  # nobody else can look
        assert sealed_models.weights_address(process.pid), "half of it was in memory"
    process.kill()
    process.communicate(timeout=10)
    assert list(tmp_path.iterdir()) == []
    assert leaks(PLAIN, tmp_path, muse.path.parent, Path("/dev/shm")) == []


# -- who may bring the key


def test_whose_key_is_taken() -> None:
    """Outside of any user namespace: root's and our own."""
    assert unseal.is_rightful(0)
    assert unseal.is_rightful(os.geteuid())
    assert not unseal.is_rightful(OTHER_USER)
    assert not unseal.is_rightful(65_534), "here nobody is a user like any other"


@pytest.mark.parametrize("mapped", [True, False])
def test_in_a_namespace_without_root_the_nameless_caller_is_root(
    mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unseal, "_has_root_inside", lambda: mapped)
    assert unseal.is_rightful(65_534) is not mapped
    assert not unseal.is_rightful(OTHER_USER)


def test_who_breaks_off_does_not_stand_in_the_way(muse: keys.Imported, tmp_path: Path) -> None:
    door = tmp_path / "key.sock"
    process = child(RECEIVE, muse.path, door, 20)
    wait_until(door.exists, 10, "it listens")
    assert door.stat().st_mode & 0o777 == 0o600
    for sent in (b"", b"half a key"):
        with socket.socket(socket.AF_UNIX) as caller:
            caller.connect(str(door))
            caller.sendall(sent)
    deliver(door, bytes(KEK.unwrap(muse.wrapped)))
    process.communicate(timeout=20)
    assert process.returncode == 0


@pytest.mark.root
def test_another_user_does_not_reach_the_socket_and_is_not_believed(place: Path) -> None:
    home = place / "home"
    home.mkdir(mode=0o755)
    os.chown(home, USER, USER)
    script = "import unseal; unseal.receive_key('key.sock', 20); print('taken', flush=True)"
    path = (
        f"import sys; sys.path[:0] = [{str(sealed_models.CHILD)!r}, {sealed_models.packages()!r}]\n"
    )
    process = starts(sealed_models.python_as(USER, "-c", path + script), cwd=home)
    door = home / "key.sock"
    wait_until(door.exists, 10, "it listens")
    send = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        " print(s.recv(4))"
    )

    def call(uid: int) -> str:
        argv = sealed_models.python_as(uid, "-c", send, str(door))
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20)
        return done.stdout + done.stderr

    assert "PermissionError" in call(OTHER_USER)
    door.chmod(0o666)
    assert "b''" in call(OTHER_USER), "let in by mistake, it is still not asked for a key"
    assert process.poll() is None
    door.chmod(0o600)
    deliver(door, bytes(32))
    out, said = process.communicate(timeout=20)
    assert (out, process.returncode) == (b"taken\n", 0), said


@pytest.mark.root
def test_a_door_that_somebody_else_made_gets_no_key(place: Path) -> None:
    """The listener is not the home's owner: nothing is sent, whatever it says."""
    home = place / "home"
    home.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(home / "key.sock"))
        listening.listen(1)
        os.chmod(home / "key.sock", 0o600)
        os.chown(home, USER, USER)
        with pytest.raises(PermissionError, match="belongs to"), keys.knock(str(home / "key.sock")):
            pass
        os.chown(home, 0, 0)
        os.chmod(home / "key.sock", 0o666)
        with pytest.raises(PermissionError, match="alone"), keys.knock(str(home / "key.sock")):
            pass


def test_a_link_in_place_of_the_door_is_not_followed(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    (tmp_path / "key.sock").symlink_to(tmp_path / "elsewhere.sock")
    with pytest.raises(OSError), keys.knock(str(tmp_path / "key.sock")):  # noqa: PT011
        pass


# -- where it cannot be kept


LOCK = (
    "import resource; resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 16, 1 << 16))\n"
    "unseal.swaps = lambda: sys.argv[4] == 'swaps'\n"
)


@pytest.mark.parametrize("memory", ["swaps", "does not swap"])
def test_weights_that_may_not_be_locked_are_refused_where_memory_swaps(
    muse: keys.Imported, place: Path, memory: str
) -> None:
    home = place / "home"
    home.mkdir(mode=0o700)
    if OWN is not None:
        os.chown(home, OWN, OWN)
    path = (
        f"import sys; sys.path[:0] = [{str(sealed_models.CHILD)!r}, {sealed_models.packages()!r}]\n"
    )
    script = path + "import unseal\n" + LOCK + RECEIVE
    arguments = [str(muse.path), "key.sock", "20", memory]
    process = starts(sealed_models.python_as(OWN, "-c", script, *arguments), cwd=home)
    if memory == "swaps":
        _, said = process.communicate(timeout=20)
        assert process.returncode == 1
        assert b"cannot be locked in memory (limit 65536), and this machine swaps" in said
    else:
        deliver(home / "key.sock", bytes(KEK.unwrap(muse.wrapped)))
        process.communicate(timeout=20)
        assert process.returncode == 0


def test_a_process_that_stays_dumpable_is_refused(muse: keys.Imported, tmp_path: Path) -> None:
    keep = "unseal._PR_SET_DUMPABLE = 3  # asks instead of setting\n"
    process = child(keep + RECEIVE, muse.path, tmp_path / "key.sock", 10)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert b"cannot be made non-dumpable" in said


# -- the probes, on a real model server


def test_no_way_leads_to_the_weights_of_a_serving_process(muse: keys.Imported, place: Path) -> None:
    """As an ordinary user, whose other processes are strangers, too; and, as root, from a third
    uid. The same probe opens everything of a process that is not protected."""
    with served(place / "home", uid=OWN, sealed=muse) as replica:
        peer = replica.unlock()
        assert peer == keys.Peer(pid=replica.process.pid, uid=OWN or os.geteuid())
        replica.until_ready()
        assert not (place / "home" / "key.sock").exists()
        pid = replica.process.pid
        address = sealed_models.weights_address(pid) if os.geteuid() == 0 else 0x10000
        for uid in (OWN, OTHER_USER) if OWN is not None else (None,):
            found = probe(uid, pid, address)
            assert set(found.values()) == {"refused"}, (uid, found)
        assert replica.post("/v1/completions", {"prompt": "The", "max_tokens": 4}) is not None
        if os.geteuid() == 0:
            assert probe(None, pid, address)["mem"] == "open", "root of the host can read it"
        assert leaks(PLAIN, place, Path("/dev/shm")) == []
    assert leaks(PLAIN, place, Path("/dev/shm")) == []


@pytest.mark.root
def test_what_it_serves_from_is_locked_and_has_no_copy(muse: keys.Imported, place: Path) -> None:
    """Root looks: the mapped file's pages are locked, its descriptor is closed, and no other memory
    of the process holds a piece of a tensor."""
    tensors = PLAIN[len(PLAIN) // 2 :]
    pieces = sealed_models.traces_of(tensors)
    assert len(pieces) > 8
    with served(place / "home", uid=OWN, sealed=muse) as replica:
        replica.unlock()
        replica.until_ready()
        proc = Path(f"/proc/{replica.process.pid}")
        locked = (proc / "status").read_text().partition("VmLck:")[2].split()[0]
        assert int(locked) * 1024 >= len(PLAIN)
        names = [os.readlink(fd) for fd in (proc / "fd").iterdir()]
        assert not [name for name in names if "memfd" in name]
        found = []
        with (proc / "mem").open("rb", buffering=0) as memory:
            for line in (proc / "maps").read_text().splitlines():
                span, rights, *_ = line.split()
                if rights.startswith("r") and "[v" not in line:
                    start, end = (int(number, 16) for number in span.split("-"))
                    memory.seek(start)
                    data = memory.read(end - start)
                    if any(piece in data for piece in pieces):
                        found.append(line.split(maxsplit=5)[-1])
        assert found
        assert {name.partition(" ")[0] for name in found} == {"/memfd:weights"}


def test_nor_where_its_sandbox_belongs_to_an_ordinary_user(
    muse: keys.Imported, place: Path
) -> None:
    """Tenants then have the same uid outside, but each is in a user namespace of its own, and has
    no power over its sisters. Root's key is taken there, although root has no number inside."""
    with served(place / "home", uid=OWN, sealed=muse, namespace=True) as replica:
        assert replica.unlock().uid == (OWN or os.geteuid())
        replica.until_ready()
        pid = replica.process.pid
        address = sealed_models.weights_address(pid) if os.geteuid() == 0 else 0x10000
        found = probe(OWN, pid, address, namespace=True)
        assert set(found.values()) == {"refused"}, found
        if OWN is not None:
            assert set(probe(OTHER_USER, pid, address).values()) == {"refused"}


def test_the_probe_opens_a_process_that_is_not_protected(place: Path) -> None:
    """Else it would show nothing."""
    script = "import mmap, sys, time; m = mmap.mmap(-1, 4096); print(1, flush=True); time.sleep(60)"
    process = starts(sealed_models.python_as(OWN, "-c", script))
    try:
        assert process.stdout is not None
        process.stdout.readline()
        address = int(Path(f"/proc/{process.pid}/maps").read_text().split("-")[0], 16)
        found = probe(OWN, process.pid, address)
        # map_files asks for CAP_SYS_ADMIN of anybody; Yama, where it is on, refuses to attach.
        ways = {"mem", "vm_read", "descriptors", "environ", "maps", "root"}
        readable = {name for name, how in found.items() if how == "open"}
        is_fenced = Path("/proc/sys/kernel/yama/ptrace_scope").exists()
        assert readable >= ({"maps"} if is_fenced else ways), found
    finally:
        process.kill()
        process.communicate()


def unlimited() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


def aborted(pid: int) -> bool:
    """End it by a signal that leaves a core; whether the kernel says that there is one."""
    os.kill(pid, signal.SIGABRT)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGABRT
    return os.WCOREDUMP(status)


def test_there_is_no_core(muse: keys.Imported, place: Path) -> None:
    """Where a plain process of the same user leaves one."""
    with served(place / "home", uid=OWN, sealed=muse, limits=unlimited) as replica:
        replica.unlock()
        replica.until_ready()
        assert not aborted(replica.process.pid)
        replica.process.returncode = -signal.SIGABRT
        assert sorted(path.name for path in (place / "home").iterdir()) == ["log", "model.sock"]
    if resource.getrlimit(resource.RLIMIT_CORE)[1] == 0:
        pytest.skip("no process leaves a core here: the limit is 0 (the sealed one left none)")
    bare = place / "bare"
    bare.mkdir()
    if OWN is not None:
        os.chown(bare, OWN, OWN)
    script = "import time; print(1, flush=True); time.sleep(60)"
    argv = sealed_models.python_as(OWN, "-c", script)
    plain = starts(argv, cwd=bare, preexec_fn=unlimited)
    assert plain.stdout is not None
    plain.stdout.readline()
    assert aborted(plain.pid)
    plain.returncode = -signal.SIGABRT
    plain.communicate()


def test_what_goes_into_the_sandbox_brings_its_own() -> None:
    """The standard library and cryptography: nothing of Sublet is there."""
    tree = ast.parse(Path(unseal.__file__).read_text())
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(str(node.module).partition(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
    assert names - sys.stdlib_module_names == {"cryptography"}


def test_the_key_is_wiped_from_where_it_was_kept() -> None:
    key = bytearray(b"k" * 32)
    unseal.wipe(key)
    assert key == bytes(32)
