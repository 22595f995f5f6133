"""What a tenant finds inside, and what reaches in from outside: processes, files, connections."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pty
import re
import signal
import socket
import stat
import struct
import termios
import threading
import time
from datetime import datetime, timedelta
from typing import Any

import pytest

from sublet.capacity.engines.port import Attachable, NotAttachable, Notice, Phase, SpawnSpec


class Attached:
    """A process inside, with its output collected."""

    def __init__(self, local: Any, run: str, *argv: str, given: bytes = b"", **fields: Any) -> None:
        stdin, self.input = os.pipe()
        self.output, stdout = os.pipe()
        self.spawned = local.engine.spawn(
            run, SpawnSpec(argv=argv, **fields), (stdin, stdout, stdout)
        )
        os.close(stdin)
        os.close(stdout)
        if given:
            os.write(self.input, given)
        os.close(self.input)

    def read(self) -> str:
        with os.fdopen(self.output, "rb") as source:
            return source.read().decode()

    def finish(self) -> tuple[str, int]:
        said = self.read()
        return said, self.spawned.wait()


def shell(local: Any, run: str, script: str, **fields: Any) -> str:
    said, code = Attached(local, run, "sh", "-c", script, **fields).finish()
    assert code == 0, said
    return said


# -- what it looks like


def test_the_sandbox_shows_a_small_world_of_its_own(local: Any) -> None:
    assert isinstance(local.engine, Attachable)
    run = local.start(env={"GREETING": "hi", "SUBLET_RUN_ID": "forged"})
    said = shell(local, run, "id -un; hostname; pwd; ls /; ls /dev; cat /proc/self/status")
    user, host, home, *rest = said.splitlines()
    assert (user, host, home) == ("tenant", "ins-1", "/home/tenant")
    assert {"usr", "proc", "scratch", "tmp"} <= set(rest)
    assert not {"root", "boot", "sys", "srv", "mnt", "opt", "work"} & set(rest)
    assert not {"sda", "vda", "kvm", "mem", "fuse", "net"} & set(rest)
    powers = dict(re.findall(r"^(Cap\w+|NoNewPrivs|Seccomp):\s+(\w+)$", said, re.M))
    assert {powers[name] for name in powers if name.startswith("Cap")} == {"0" * 16}
    assert (powers["NoNewPrivs"], powers["Seccomp"]) == ("1", "2")
    env = dict(line.split("=", 1) for line in shell(local, run, "env").splitlines())
    assert env["SUBLET_RUN_ID"] == run
    assert env["SUBLET_WORKLOAD_ID"] == local.see(run).workload_id
    assert (env["GREETING"], env["SUBLET_DEVICES"]) == ("hi", local.devices[0])
    assert not {name for name in env if name.startswith(("VIRTUAL", "PYTEST", "SUDO"))}


def test_a_home_persists_and_scratch_does_not(local: Any) -> None:
    first = local.start("echo kept > ~/f; echo gone > /scratch/f; ls -a /scratch", home="data")
    local.until_over(first)
    assert local.engine.scrub(first).clean
    assert not (local.root / "scratch" / first).exists()
    second = local.start("cat ~/f; ls -A /scratch", home="data")
    local.until_over(second)
    assert local.text(second) == "kept\n"
    assert local.engine.scrub(second).clean
    local.engine.erase_home("data")
    assert not (local.root / "homes" / "data").exists()


def test_an_instance_runs_its_script_and_says_how_it_went(local: Any) -> None:
    run = local.start(
        kind="instance", command=(), script="echo set up > ~/done; echo to the log; exit 3"
    )
    local.run_until(lambda: "exit code 3" in local.text(run), 5)
    assert local.text(run).startswith("to the log\n")
    assert local.see(run).phase is Phase.RUNNING
    assert shell(local, run, "cat ~/done") == "set up\n"


def test_what_a_job_leaves_running_ends_with_it(local: Any) -> None:
    run = local.start("(setsid sleep 600 &) ; exit 4")
    seen = local.until_over(run, seconds=5)
    assert (seen.phase, seen.exit_code) == (Phase.EXITED, 4)


# -- reaching in


def test_a_command_has_its_streams_and_its_exit_code(local: Any) -> None:
    run = local.start()
    data = "x" * 300_000
    echo = Attached(local, run, "sh", "-c", "wc -c; exit 7", given=b"12345")
    assert echo.finish() == ("5\n", 7)
    assert shell(local, run, f"head -c {len(data)} /dev/zero | tr '\\0' x") == data
    assert shell(local, run, "echo $A$B", env={"A": "1", "B": "ü"}) == "1ü\n"
    for argv, number in ((("/no/such",), errno.ENOENT), (("/etc",), errno.EACCES)):
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            Attached(local, run, *argv)


def test_signals_arrive_and_count_as_a_shell_has_it(local: Any) -> None:
    run = local.start()
    sleeper = Attached(local, run, "sleep", "600")
    sleeper.spawned.signal("SIGUSR1")
    assert sleeper.spawned.wait() == 128 + signal.SIGUSR1
    sleeper.read()


def test_a_terminal_is_one(local: Any) -> None:
    run = local.start()
    outer, inner = pty.openpty()
    fcntl.ioctl(outer, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 101, 0, 0))
    spec = SpawnSpec(argv=("sh", "-i"), env={"TERM": "dumb", "PS1": "> "}, terminal=True)
    spawned = local.engine.spawn(run, spec, (inner, inner, inner))
    os.close(inner)
    said = b""

    def until(word: bytes) -> None:
        nonlocal said
        give_up = time.monotonic() + 5
        while word not in said:
            assert time.monotonic() < give_up, said
            said += os.read(outer, 65536)

    os.write(outer, b"stty size; test -t 0 && echo terminal=$((40+2))\n")
    until(b"terminal=42")
    assert b"33 101" in said
    fcntl.ioctl(outer, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 120, 0, 0))
    os.write(outer, b"stty size\n")
    until(b"44 120")
    os.write(outer, b"sleep 600\n")
    time.sleep(0.2)
    os.write(outer, b"\x03")  # the terminal's own Ctrl-C
    os.write(outer, b"echo again=$((1+1)); exit 3\n")
    until(b"again=2")
    assert spawned.wait() == 3
    os.close(outer)


def test_hanging_up_ends_the_process_and_what_it_started(local: Any) -> None:
    run = local.start()
    for spawned in (
        Attached(local, run, "sh", "-c", "echo $$; sleep 600 & sleep 600"),
        Attached(
            local, run, "sh", "-c", "trap '' HUP; echo $$; sleep 600 & while :; do wait; done"
        ),
    ):
        assert os.read(spawned.output, 16)
        spawned.spawned.close()
        began = time.monotonic()
        assert spawned.spawned.wait() in (128 + signal.SIGHUP, 128 + signal.SIGKILL)
        assert spawned.read() == ""  # nobody holds the other end any more
        assert time.monotonic() - began < 3


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_whoever_vanishes_hangs_up(local: Any) -> None:
    run = local.start()
    reading, writing = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    child = os.fork()
    if child == 0:
        spec = SpawnSpec(argv=("sh", "-c", "echo up; sleep 600"))
        held = local.engine.spawn(run, spec, (null, writing, null))
        time.sleep(60 if held else 0)
        os._exit(0)
    os.close(writing)
    os.close(null)
    assert os.read(reading, 10) == b"up\n"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert os.read(reading, 10) == b""  # the end of the pipe: its holders are gone
    os.close(reading)


def test_attached_processes_are_the_workloads_and_end_with_it(local: Any) -> None:
    run = local.start()
    attached = Attached(local, run, "sh", "-c", "trap 'echo term; exit 5' TERM; sleep 600 & wait")
    deaf = Attached(local, run, "sh", "-c", "trap '' TERM; exec sleep 600")
    time.sleep(0.2)
    local.engine.stop(run, grace_seconds=1, reason="user")
    assert attached.finish() == ("term\n", 5)
    assert deaf.finish() == ("", 137)
    local.until_over(run)
    with pytest.raises(NotAttachable):
        Attached.__init__(object.__new__(Attached), local, run, "true")
    with pytest.raises(NotAttachable):
        local.engine.file(run, "stat", "/")
    with pytest.raises(NotAttachable):
        local.engine.connect("run_unknown", "127.0.0.1", 80)


def test_a_connection_is_opened_from_inside(local: Any) -> None:
    run = local.start()
    server = (
        "import socket; s = socket.create_server(('127.0.0.1', 0)); "
        "print(s.getsockname()[1], flush=True); c, _ = s.accept(); "
        "c.sendall(b'from inside: ' + c.recv(10)); c.close()"
    )
    attached = Attached(local, run, "python3", "-c", server)
    port = int(os.read(attached.output, 10))
    with socket.socket(fileno=local.engine.connect(run, "localhost", port)) as peer:
        peer.sendall(b"hello")
        assert peer.recv(100) == b"from inside: hello"
    attached.finish()
    with pytest.raises(ConnectionRefusedError):
        local.engine.connect(run, "127.0.0.1", port)
    with pytest.raises(OSError, match=r"No route|unreachable"):
        local.engine.connect(run, "203.0.113.9", 80)
    with socket.create_server(("127.0.0.1", 0)) as outside, pytest.raises(ConnectionRefusedError):
        local.engine.connect(run, "127.0.0.1", outside.getsockname()[1])


# -- files


def test_files_are_the_tenants_own(local: Any) -> None:
    run = local.start()

    def file(*args: Any) -> Any:
        return local.engine.file(run, *args)

    fd = file("open", "notes", os.O_WRONLY | os.O_CREAT, 0o640)
    os.write(fd, b"hello")
    os.close(fd)
    found = file("stat", "/home/tenant/notes")
    assert (found.st_size, found.st_uid, stat.S_IMODE(found.st_mode)) == (5, 1000, 0o640)
    file("utime", "notes", 1_000_000_001, 2_000_000_002)
    assert file("stat", "notes").st_mtime_ns == 2_000_000_002
    file("mkdir", "d", 0o755)
    file("rename", "notes", "d/notes")
    file("symlink", "d/notes", "link")
    file("link", "d/notes", "d/hard")
    assert file("readlink", "link") == "d/notes"
    assert stat.S_ISLNK(file("lstat", "link").st_mode)
    assert file("realpath", "link") == "/home/tenant/d/notes"
    assert {name for name, _ in file("listdir", "d")} == {"notes", "hard"}
    file("chmod", "d/notes", 0o600)
    file("truncate", "d/notes", 2)
    fd = file("open", "link", os.O_RDONLY, 0)
    assert os.read(fd, 10) == b"he"
    os.close(fd)
    assert file("fstatvfs", "/").f_bsize > 0
    for name in ("d/notes", "d/hard", "link"):
        file("unlink", name)
    file("rmdir", "d")
    assert file("listdir", ".") == []
    for args, number in (
        (("rmdir", "/no/such"), errno.ENOENT),
        (("mkdir", "/usr/x", 0o755), errno.EROFS),
        (("open", "/home/tenant", os.O_RDONLY, 0), errno.EISDIR),
        (("frobnicate", "x"), errno.ENOSYS),
        (("open", "x\0y", os.O_RDONLY, 0), errno.EINVAL),
    ):
        with pytest.raises(OSError, match=re.escape(os.strerror(number))):
            file(*args)


def test_a_large_folder_comes_whole(local: Any) -> None:
    run = local.start()
    shell(local, run, "mkdir many; cd many; for n in $(seq 1500); do : > file-number-$n; done")
    assert len(local.engine.file(run, "listdir", "many")) == 1500


def test_no_path_leads_out_and_no_file_makes_one_wait(local: Any) -> None:
    run = local.start()
    (local.root / "secret").write_text("of the data folder")
    shell(
        local, run, f"ln -s {local.root}/secret out; ln -s /proc/1/root/etc/shadow up; mkfifo pipe"
    )
    for path in ("out", "up", str(local.root / "secret"), "../../../../etc/shadow"):
        with pytest.raises(OSError, match=r"No such file|denied"):
            local.engine.file(run, "open", path, os.O_RDONLY, 0)
    for path in ("pipe", "/dev/zero", "/dev/tty", "/proc/self/mem", "/proc/self/environ"):
        began = time.monotonic()
        with pytest.raises(OSError, match=r"denied|such device"):
            local.engine.file(run, "open", path, os.O_RDWR, 0)
        assert time.monotonic() - began < 1
    os.close(local.engine.file(run, "open", "/dev/null", os.O_RDWR, 0))


# -- the interruption, as seen from inside


def get(local: Any, run: str, path: str) -> tuple[int, Any]:
    code = (
        "import json, os, urllib.request as r, urllib.error\n"
        f"try: a = r.urlopen(os.environ['SUBLET_METADATA_URL'] + '{path}', timeout=3)\n"
        "except urllib.error.HTTPError as e: a = e\n"
        "print(json.dumps([a.status, json.load(a)]))"
    )
    said, _ = Attached(local, run, "python3", "-c", code).finish()
    status, body = json.loads(said)
    return status, body


def test_the_endpoint_tells_of_the_interruption_from_the_notice_on(local: Any) -> None:
    run = local.start(metadata={"instance": "ins_1"}, stop_grace_seconds=5)
    assert get(local, run, "/v1/metadata") == (200, {"instance": "ins_1", "interruption": None})
    status, body = get(local, run, "/v1/metadata/interruption")
    assert (status, body["error"]["code"]) == (404, "no_interruption")
    local.engine.publish_metadata(run, {"instance": "ins_1", "price": "0.5"})
    notice = Notice(
        term_at=local.now() + timedelta(seconds=60), action="requeue", reason="owner_recall"
    )
    fixed = local.engine.notice(run, notice)
    status, body = get(local, run, "/v1/metadata/interruption")
    assert status == 200
    assert (body["action"], body["reason"]) == ("requeue", "owner_recall")
    assert abs(datetime.fromisoformat(body["time"]) - fixed) < timedelta(milliseconds=1)
    assert 55 <= body["seconds_left"] <= 60
    _, whole = get(local, run, "/v1/metadata")
    assert (whole["price"], whole["interruption"]["action"]) == ("0.5", "requeue")
    local.engine.withdraw(run)
    assert get(local, run, "/v1/metadata/interruption")[0] == 404


def test_a_rude_client_of_the_endpoint_disturbs_nobody(local: Any) -> None:
    run = local.start()
    rude = (
        "import os, socket\n"
        "host = os.environ['SUBLET_METADATA_URL'][7:].partition(':')\n"
        "at = (host[0], int(host[2] or 80))\n"
        "held = [socket.create_connection(at) for _ in range(40)]\n"
        "big = socket.create_connection(at); big.sendall(b'x' * 100000)\n"
        "print('up', flush=True); input()"
    )
    reading, writing = os.pipe()
    out, said = os.pipe()
    spawned = local.engine.spawn(
        run, SpawnSpec(argv=("python3", "-c", rude)), (reading, said, said)
    )
    assert os.read(out, 100) == b"up\n"
    assert get(local, run, "/v1/metadata")[0] == 200
    fixed = local.engine.notice(
        run, Notice(term_at=local.now() + timedelta(seconds=0.5), action="stop", reason="price")
    )
    assert local.until_over(run).term_at - fixed < timedelta(seconds=0.5)
    for fd in (reading, writing, out, said):
        os.close(fd)
    spawned.wait()


def test_the_notice_signal_comes_at_the_notice_and_only_if_asked_for(local: Any) -> None:
    script = "trap 'echo usr1' USR1; echo ready; while :; do sleep 0.05; done"
    run = local.start(script, notice_signal="SIGUSR1")
    local.run_until(lambda: "ready" in local.text(run), 5)
    far = local.now() + timedelta(seconds=60)
    for _ in range(2):
        local.engine.notice(run, Notice(term_at=far, action="stop", reason="owner_recall"))
    local.run_until(lambda: "usr1" in local.text(run), 5)
    assert local.text(run).count("usr1") == 1
    local.engine.signal(run, "SIGUSR1")
    local.run_until(lambda: local.text(run).count("usr1") == 2, 5)


@pytest.mark.parametrize("stubborn", [False, True])
def test_r1_the_work_goes_on_to_the_last_moment_of_the_notice(local: Any, stubborn: bool) -> None:
    """Field case R1 with a notice of 2 s and a grace of 1 s."""
    trap = "trap '' TERM; " if stubborn else ""
    run = local.start(f"{trap}while sleep 0.05; do date +%s.%N; done", stop_grace_seconds=1)
    local.run_until(lambda: local.text(run), 5)
    t0 = local.now()
    fixed = local.engine.notice(
        run, Notice(term_at=t0 + timedelta(seconds=2), action="stop", reason="owner_recall")
    )
    seen = local.until_over(run)
    stamps = [line for line in local.text(run).splitlines() if line[:1].isdigit()]
    last = float(stamps[-1]) - t0.timestamp()
    promised = 3.0 if stubborn else 2.0
    assert promised - 0.4 <= last <= promised + 0.2
    assert seen.term_at >= fixed
    assert (seen.exited_at - t0).total_seconds() <= promised + 1


def test_sigterm_reaches_who_hides_from_the_process_group(local: Any) -> None:
    """Doubly forked, in a session of its own, and stopped: SIGTERM is for every process."""
    hidden = "trap 'echo hidden got it; exit' TERM; echo up; while :; do sleep 0.05; done"
    run = local.start(
        f'(setsid sh -c "{hidden}" &); kill -STOP $$; sleep 600', stop_grace_seconds=3
    )
    local.run_until(lambda: "up" in local.text(run), 5)
    local.engine.stop(run, grace_seconds=3, reason="user")
    seen = local.until_over(run, seconds=2)
    assert "hidden got it" in local.text(run)
    assert seen.exit_code == 143


# -- logs


def test_of_too_much_output_the_beginning_and_the_end_are_kept(make_local: Any) -> None:
    local = make_local(log_bytes=64 << 10)
    run = local.start("echo begin; head -c 500000 /dev/zero | tr '\\0' x; echo; echo end")
    local.until_over(run)
    text = local.text(run)
    size = sum(path.stat().st_size for path in local.folder(run).glob("log*"))
    assert size <= 80 << 10
    whole, offset = b"", 0
    while True:
        data, offset = local.engine.logs(run, offset=offset)
        if not data:
            break
        whole += data
    assert whole.startswith(b"begin\nxxx")
    assert whole.endswith(b"x\nend\n")
    assert re.search(rb"\n\[sublet\] \d+ bytes of output were left out here\n", whole)
    assert offset == 500_000 + len("begin\n\nend\n")
    assert text.startswith("begin\n")


def test_a_flood_of_output_delays_no_deadline(local: Any) -> None:
    run = local.start("yes | tr -d '\\n'")
    time.sleep(0.3)
    fixed = local.engine.notice(
        run, Notice(term_at=local.now() + timedelta(seconds=0.5), action="stop", reason="price")
    )
    assert local.until_over(run).term_at - fixed < timedelta(seconds=0.3)


def test_many_threads_may_reach_in_at_once(local: Any) -> None:
    run = local.start()
    found: list[str] = []

    def work(number: int) -> None:
        found.append(shell(local, run, f"echo {number}").strip())

    threads = [threading.Thread(target=work, args=(n,)) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(int, found)) == list(range(12))
