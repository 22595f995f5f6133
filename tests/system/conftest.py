"""A real cloud in real processes: `sublet up` on a data folder of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sublet.base.wire import rest
from sublet.sdk import Client

SUBLET = str(Path(sys.executable).with_name("sublet"))
START_SECONDS = 60.0


def children_of(pid: int) -> list[int]:
    """The processes that this one has started and not reaped."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def processes_naming(text: str) -> list[str]:
    """Command lines of all processes that mention the text, but our own."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (entry / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if text in line or text in environment:
            found.append(line)
    return found


class RunningCloud:
    """A cloud that can be closed, killed and started again on the same data."""

    def __init__(self, folder: Path, *options: str) -> None:
        self.folder = folder
        self.data = folder / "data"
        self.options = options
        self.owner_key = ""
        self.url = ""
        self.ssh_port = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.output = folder / "up.out"
        self.starts = 0
        self.keys: dict[str, str] = {}
        self._clients: dict[str, Client] = {}

    def client(self, key: str | None) -> Client:
        """A client of the cloud as it runs now; closed with it."""
        return self._clients.setdefault(key or "", Client(self.url, key))

    def forget_clients(self) -> None:
        for client in self._clients.values():
            client.close()
        self._clients.clear()

    def start(self) -> None:
        self.starts += 1
        self.forget_clients()
        ready = self.folder / f"ready-{self.starts}.json"
        command = [SUBLET, "up", "--data", str(self.data), "--port", "0", "--ssh-port", "0"]
        if "--gateway-port" not in self.options:
            command += ["--gateway-port", "0"]
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                [*command, "--ready-file", str(ready), *self.options],
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env={**os.environ, "XDG_CONFIG_HOME": str(self.folder / "config")},
                start_new_session=True,
            )
        wait_until(lambda: ready.exists() or self.process_ended(), START_SECONDS, "ready")
        assert ready.exists(), self.said()
        facts = json.loads(ready.read_text())
        self.url, self.ssh_port = facts["api_url"], facts["ssh"]["port"]
        self.owner_key = facts["owner_key"] or self.owner_key

    def process_ended(self) -> bool:
        assert self.process is not None
        return self.process.poll() is not None

    def said(self) -> str:
        return self.output.read_text()

    def log(self) -> str:
        return (self.data / "sublet.log").read_text()

    def pids(self) -> list[int]:
        """The control plane: `up` and its children. Supervisors are nobody's children."""
        assert self.process is not None
        return [*children_of(self.process.pid), self.process.pid]

    def kill(self) -> None:
        """kill -9 of the whole control plane at once."""
        assert self.process is not None
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)
        for pid in self.pids():
            os.kill(pid, signal.SIGKILL)
        self.process.wait(10)

    def close(self, number: int = signal.SIGINT, seconds: float = 60.0) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def owner(self) -> Client:
        return self.client(self.owner_key)

    def consumer(self, name: str) -> Client:
        """A stranger who has just signed up."""
        body = rest.SignUpCreate(email=f"{name}@example.org", organisation_name=name.title())
        self.keys[name] = self.client(None).sign_up(body).secret
        return self.client(self.keys[name])


def wait_until(happened: Callable[[], Any], seconds: float, what: str) -> Any:
    """Look every 50 ms; fails naming what did not happen."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = happened()
        if found:
            return found
        threading.Event().wait(0.05)
    raise AssertionError(f"{what}: not within {seconds} s")


@pytest.fixture
def make_cloud(tmp_path: Path) -> Iterator[Callable[..., RunningCloud]]:
    made: list[RunningCloud] = []

    def make(*options: str, start: bool = True, name: str = "cloud") -> RunningCloud:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        cloud = RunningCloud(folder, *options)
        made.append(cloud)
        if start:
            cloud.start()
        return cloud

    yield make
    for cloud in made:
        cloud.forget_clients()
        if cloud.process is not None and cloud.process.poll() is None:
            cloud.close(signal.SIGINT, 90)
    # Whatever a failed test left behind would disturb the next one.
    for line in processes_naming(str(tmp_path)):
        sys.stderr.write(f"left running: {line}\n")


@pytest.fixture
def waiting() -> Callable[[Callable[[], Any], float, str], Any]:
    return wait_until


@pytest.fixture
def left_running() -> Callable[[str], list[str]]:
    return processes_naming
