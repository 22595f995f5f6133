"""What of the host a run is shown, and what it may lock: as root and as an ordinary user."""

from __future__ import annotations

import json
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sublet.capacity.engines.local.reading import check_lockable, most_locked, swaps
from sublet.capacity.engines.local.supervise import records
from sublet.capacity.engines.port import Phase, StartRefused

Make = Callable[..., Any]

LOCKS = """
import ctypes, mmap, os, resource, sys
size = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
fd = os.memfd_create("weights", os.MFD_ALLOW_SEALING)
with open(sys.argv[2], "rb") as source:
    os.write(fd, source.read())
os.ftruncate(fd, size)
held = mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
address = ctypes.addressof(ctypes.c_char.from_buffer(held))
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
locked = libc.mlock(address, size) == 0
plain = libc.prctl(4, 0, 0, 0, 0) == 0 and libc.prctl(3, 0, 0, 0, 0) == 0
again = open(f"/proc/self/fd/{fd}", "rb").read(7)
print(locked, plain, again, resource.getrlimit(resource.RLIMIT_CORE), flush=True)
"""


@pytest.fixture(params=["local", "local-bare"])
def rung(request: pytest.FixtureRequest, make_local: Make) -> Any:
    if request.param == "local":
        return make_local()
    return make_local(trusted=True, without=frozenset({"bubblewrap"}))


@pytest.fixture
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that nobody else may pass through, with a file and a folder for everybody."""
    top = tmp_path_factory.mktemp("closed")
    shown = top / "below" / "shown"
    shown.mkdir(parents=True)
    for path in (top / "below", shown):
        path.chmod(0o755)
    (shown / "inner").write_text("of the folder")
    (top / "file").write_text("weights")
    for path in (shown / "inner", top / "file"):
        path.chmod(0o644)
    (top / "secret").write_text("not shown")
    (top / "secret").chmod(0o644)
    top.chmod(0o700)
    return top


def both(closed: Path) -> tuple[tuple[str, str], ...]:
    paths = (str(closed / "below" / "shown"), str(closed / "file"))
    return tuple((path, path) for path in paths)


def test_what_is_shown_can_be_read_whoever_may_pass_above_it(rung: Any, closed: Path) -> None:
    shown = both(closed)
    folder, file = (target for _, target in shown)
    run = rung.start(f"cat {folder}/inner; echo; cat {file}", read_only=shown)
    assert rung.until_over(run).exit_code == 0, rung.text(run)
    assert rung.text(run) == "of the folder\nweights"


def test_nothing_of_it_can_be_changed(local: Any, closed: Path) -> None:
    shown = both(closed)
    folder, file = (target for _, target in shown)
    script = f"""
    for path in {file} {folder}/inner {folder}/new; do echo x > $path && echo WROTE $path; done
    rm -f {file}; rm -f {folder}/inner; mv {folder}/inner {folder}/other; chmod 0777 {file}
    echo done
    """
    run = local.start(script, read_only=shown)
    local.until_over(run)
    assert "WROTE" not in local.text(run)
    assert local.text(run).endswith("done\n")
    assert (closed / "file").read_text() == "weights"
    assert [path.name for path in (closed / "below" / "shown").iterdir()] == ["inner"]


def test_nothing_beside_it_is_shown(local: Any, closed: Path) -> None:
    run = local.start(f"cat {closed}/secret", read_only=both(closed))
    assert local.until_over(run).exit_code != 0
    assert "not shown" not in local.text(run)


def test_it_may_be_shown_under_another_path_in_a_sandbox_only(make_local: Make) -> None:
    local = make_local()
    file = local.root / "weights"
    file.write_text("weights")
    file.chmod(0o644)
    run = local.start("cat /srv/model/weights", read_only=((str(file), "/srv/model/weights"),))
    local.until_over(run)
    assert local.text(run) == "weights"
    bare = make_local(trusted=True, without=frozenset({"bubblewrap"}))
    with pytest.raises(StartRefused, match="bubblewrap"):
        bare.engine.start(bare.spec(read_only=((str(file), "/srv/model/weights"),)))


@pytest.mark.parametrize("target", ["relative", "/a/../b", "/", "/proc/x", "/dev/shm/x"])
def test_some_places_show_nothing(local: Any, target: str) -> None:
    with pytest.raises(StartRefused, match="no place"):
        local.engine.start(local.spec(read_only=((str(local.root), target),)))


def test_what_is_not_there_is_refused(local: Any) -> None:
    missing = str(local.root / "missing")
    with pytest.raises(StartRefused, match="missing"):
        local.engine.start(local.spec(read_only=((missing, missing),)))


def test_what_its_uid_could_not_read_is_refused_naming_the_way(local: Any) -> None:
    if os.geteuid() != 0:
        pytest.skip("an ordinary user's runs read what the user reads")
    file = local.root / "private"
    file.write_text("x")
    file.chmod(0o600)
    with pytest.raises(StartRefused, match=r"chmod -R o\+rX"):
        local.engine.start(local.spec(read_only=((str(file), str(file)),)))


def test_a_socket_in_the_home_is_reached_through_the_door(rung: Any) -> None:
    script = (
        "umask 177; exec /usr/bin/python3 -c 'import socket; s = socket.socket(socket.AF_UNIX); "
        's.bind("model.sock"); s.listen(); c = s.accept()[0]; c.sendall(c.recv(9).upper())\''
    )
    run = rung.start(script, kind="replica")
    door = rung.engine.door(run, "model.sock")
    rung.run_until(lambda: os.path.exists(door), 5)
    assert os.stat(door).st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(5)
        rung.run_until(lambda: peer.connect_ex(door) == 0, 5)
        peer.sendall(b"hello")
        assert peer.recv(9) == b"HELLO"
    assert rung.until_over(run).exit_code == 0


# -- locked memory


def test_weights_can_be_locked_in_a_memory_file_larger_than_its_disk(
    rung: Any, closed: Path
) -> None:
    """As root as much as it may use; as an ordinary user what the limit allows."""
    most = most_locked()
    size = 96 << 20 if most is None else min(96 << 20, most // 2) // 4096 * 4096
    run = rung.start(
        command=("/usr/bin/python3", "-I", "-S", "-c", LOCKS, str(size), str(closed / "file")),
        kind="replica",
        read_only=both(closed),
        lock_memory=True,
        memory_bytes=256 << 20,
        disk_bytes=16 << 20,
    )
    assert rung.until_over(run).exit_code == 0, rung.text(run)
    assert rung.text(run) == "True True b'weights' (0, 0)\n"


def test_others_may_lock_no_more_than_before(local: Any) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    run = local.start("ulimit -Hl")
    local.until_over(run)
    own = "unlimited" if hard == resource.RLIM_INFINITY else str(hard >> 10)
    assert local.text(run).strip() == own


def test_what_cannot_be_locked_is_refused_where_it_could_be_swapped_out(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(bytes(1000))
    shown = ((str(weights), "/w"), (str(tmp_path), "/folder"))
    check_lockable(shown, most=1000, swaps=True)
    check_lockable(shown, most=999, swaps=False)
    check_lockable(shown, most=None, swaps=True)
    with pytest.raises(StartRefused, match="1000 bytes are to be locked in memory, 999 may be"):
        check_lockable(shown, most=999, swaps=True)
    assert isinstance(swaps(), bool)


def test_a_plan_of_an_older_version_still_runs(local: Any) -> None:
    """Records without the newer fields are read as showing nothing and locking nothing."""
    run = local.start("sleep 600")
    path = local.folder(run) / records.PLAN
    document = json.loads(path.read_text())
    del document["read_only"], document["lock_memory"]
    path.write_text(json.dumps(document))
    plan = records.read_plan(str(local.folder(run)))
    assert plan is not None
    assert (plan.read_only, plan.lock_memory) == ([], False)
    assert local.see(run).phase is Phase.RUNNING
