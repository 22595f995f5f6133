"""A bastion on a real port, with OpenSSH's own clients, over an engine without a sandbox."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sublet.capacity.engines.port import NotAttachable, Notice, SpawnSpec
from sublet.edge.bastion import Bastion, Limits, Target, public_line

LOGIN = "ins_aaaaaaaaaaaaaaaa"
RUN = "run_aaaaaaaaaaaaaaaa"

# Takes the terminal at descriptor 0 as its own, then becomes the program.
_TAKE_TERMINAL = (
    "import fcntl, os, sys, termios;"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "os.execvp(sys.argv[1], sys.argv[1:])"
)


class HostProcess:
    def __init__(self, argv: Sequence[str], home: Path, spec: SpawnSpec, fds: Sequence[int]):
        if spec.terminal:
            argv = [sys.executable, "-I", "-c", _TAKE_TERMINAL, *argv]
        self.popen = subprocess.Popen(
            argv,
            stdin=fds[0],
            stdout=fds[1],
            stderr=fds[2],
            cwd=home,
            env={"PATH": os.environ["PATH"], "HOME": str(home), **spec.env},
            start_new_session=True,
        )

    def wait(self) -> int:
        code = self.popen.wait()
        return code if code >= 0 else 128 - code

    def signal(self, name: str) -> None:
        os.killpg(self.popen.pid, signal.Signals[name])

    def close(self) -> None:
        for number in (signal.SIGHUP, signal.SIGKILL):
            try:
                os.killpg(self.popen.pid, number)
                self.popen.wait(0.5)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


class HostEngine:
    """Does on the host what an engine does inside a workload; a folder stands for its home."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.running = True
        self.processes: list[HostProcess] = []

    def spawn(self, run_id: str, spec: SpawnSpec, fds: Sequence[int]) -> HostProcess:
        self._need(run_id)
        process = HostProcess(spec.argv, self.home, spec, fds)
        self.processes.append(process)
        return process

    def connect(self, run_id: str, host: str, port: int) -> int:
        self._need(run_id)
        return socket.create_connection((host, port), timeout=5).detach()

    def file(self, run_id: str, operation: str, *args: Any) -> Any:
        self._need(run_id)
        return getattr(self, f"_{operation}")(*args)

    def _need(self, run_id: str) -> None:
        assert run_id == RUN
        if not self.running:
            raise NotAttachable

    def _path(self, path: str) -> str:
        return os.path.join(self.home, path)

    def _open(self, path: str, flags: int, mode: int) -> int:
        return os.open(self._path(path), flags, mode)

    def _stat(self, path: str) -> os.stat_result:
        return os.stat(self._path(path))

    def _lstat(self, path: str) -> os.stat_result:
        return os.lstat(self._path(path))

    def _fstatvfs(self, path: str) -> os.statvfs_result:
        return os.statvfs(self._path(path))

    def _listdir(self, path: str) -> list[tuple[str, os.stat_result]]:
        with os.scandir(self._path(path)) as entries:
            return [(e.name, e.stat(follow_symlinks=False)) for e in entries]

    def _mkdir(self, path: str, mode: int) -> None:
        os.mkdir(self._path(path), mode)

    def _rmdir(self, path: str) -> None:
        os.rmdir(self._path(path))

    def _unlink(self, path: str) -> None:
        os.unlink(self._path(path))

    def _rename(self, old: str, new: str) -> None:
        os.rename(self._path(old), self._path(new))

    def _readlink(self, path: str) -> str:
        return os.readlink(self._path(path))

    def _symlink(self, target: str, path: str) -> None:
        os.symlink(target, self._path(path))

    def _link(self, old: str, new: str) -> None:
        os.link(self._path(old), self._path(new))

    def _chmod(self, path: str, mode: int) -> None:
        os.chmod(self._path(path), mode)

    def _utime(self, path: str, atime_ns: int, mtime_ns: int) -> None:
        os.utime(self._path(path), ns=(atime_ns, mtime_ns))

    def _truncate(self, path: str, size: int) -> None:
        os.truncate(self._path(path), size)

    def _realpath(self, path: str) -> str:
        return os.path.realpath(self._path(path))


@dataclass
class Door:
    """A served bastion, and what a person at home has: a key, known hosts, OpenSSH."""

    folder: Path
    engine: HostEngine
    found: dict[str, Target | str] = field(default_factory=dict)
    notices: dict[str, Notice] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    port: int = 0

    def __post_init__(self) -> None:
        self.key = make_key(self.folder / "id")
        self.found[LOGIN] = Target(run_id=RUN, keys=(self.key.with_suffix(".pub").read_text(),))

    def serve(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="door")
        self.thread.start()
        self.bastion = self.run(self._start())
        self.port = self.bastion.port

    async def _start(self) -> Bastion:
        bastion = Bastion(
            self.engine,
            self.found.get,
            host_key_dir=self.folder / "keys",
            notice=self.notices.get,
            limits=self.limits,
        )
        await bastion.start()
        return bastion

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(20)

    def close(self) -> None:
        self.run(self.bastion.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()

    def options(self, *, key: Path | None = None) -> list[str]:
        known = self.folder / "known_hosts"
        known.write_text(f"[127.0.0.1]:{self.port} {public_line(self.folder / 'keys')}\n")
        return [
            *("-F", "none", "-i", str(key or self.key)),
            *("-o", f"UserKnownHostsFile={known}", "-o", "StrictHostKeyChecking=yes"),
            *("-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "LogLevel=INFO"),
        ]

    def ssh_argv(self, *words: str, login: str = LOGIN, key: Path | None = None) -> list[str]:
        return ["ssh", *self.options(key=key), "-p", str(self.port), "-l", login, *words]

    def ssh(
        self, *words: str, login: str = LOGIN, key: Path | None = None, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        argv = self.ssh_argv(*words, login=login, key=key)
        return subprocess.run(argv, input=stdin, capture_output=True, timeout=30, check=False)

    def sftp(self, *commands: str) -> subprocess.CompletedProcess[str]:
        argv = ["sftp", *self.options(), "-P", str(self.port), "-b", "-", f"{LOGIN}@127.0.0.1"]
        text = "\n".join(commands) + "\n"
        return subprocess.run(
            argv, input=text, capture_output=True, text=True, timeout=30, check=False
        )

    def scp(self, *words: str) -> subprocess.CompletedProcess[str]:
        argv = ["scp", *self.options(), "-P", str(self.port), *words]
        return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


def make_key(path: Path) -> Path:
    argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(argv, check=True, timeout=30)
    return path


@pytest.fixture
def make_door(tmp_path: Path) -> Iterator[Callable[..., Door]]:
    """Doors that are closed at the end; what was left unawaited shows as a warning, so fails."""
    made: list[Door] = []

    def make(**limits: Any) -> Door:
        folder = tmp_path / f"door{len(made)}"
        home = folder / "home"
        home.mkdir(parents=True)
        door = Door(folder=folder, engine=HostEngine(home), limits=Limits(**limits))
        door.serve()
        made.append(door)
        return door

    yield make
    for door in made:
        door.close()
        for process in door.engine.processes:
            process.close()
            process.popen.wait()
    gc.collect()


@pytest.fixture
def door(make_door: Callable[..., Door]) -> Door:
    return make_door(watch_seconds=0.05)
