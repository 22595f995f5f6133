"""The runs of a probe: hostile workloads side by side, and things of the host for them to find.

They live on an engine of their own in a folder of their own, so that no real run is near them,
and are ended and wiped whatever happens. Nothing is sent to any address but this machine's.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from sublet.base.kernel.clock import Clock
from sublet.base.kernel.ids import SystemIds
from sublet.capacity.engines.local.planning import PYTHON
from sublet.capacity.engines.local.supervise import addresses, records, usage
from sublet.capacity.engines.local.supervise.sandbox import CONTROL_NODES
from sublet.capacity.engines.port import Engine, Observation, Phase, StartSpec, SubletError

MEMORY = 64 << 20
DISK = 8 << 20
PIDS = 64
SPIN_SECONDS = 0.6
_LONGEST_SECONDS = 10.0
_OVER = (Phase.EXITED, Phase.FAILED)
_HARMLESS = {"null", "zero", "full", "random", "urandom", "tty", "ptmx"}
_TOUCHY = ("watchdog", "st", "nst", "ipmi", "mei")
"""Opening one of these does something, so a probe leaves it alone."""
_MOST_NODES = 300
_MOST_ADDRESSES = 16


@dataclass(frozen=True)
class Outcome:
    """How one attempt went: its answer, all it said before, and how the run ended."""

    answer: dict[str, Any] | None
    said: list[dict[str, Any]]
    seen: Observation | None
    failure: str


@dataclass(frozen=True)
class Host:
    """What a workload should not find: a port, an abstract socket, a file, a process."""

    mark: str
    port: int
    file: str
    pid: int


def attempts(
    engine: Engine, clock: Clock, folder: Path, devices: Sequence[str], outbound: str
) -> dict[str, Outcome]:
    """Try everything once, side by side."""
    mark = SystemIds().new("sublet-probe")
    party = _Party(engine, clock, folder, devices)
    try:
        with host_to_find(mark) as host:
            _start_all(party, host, outbound)
            return party.finish()
    finally:
        party.clear()


def _start_all(party: _Party, host: Host, outbound: str) -> None:
    party.start("victim", {"mark": host.mark})
    party.start("cpu", {"host_cpus": os.cpu_count() or 1, "seconds": SPIN_SECONDS})
    party.start("disk", {"files": 3, "each": DISK // 2, "stay": 6})
    party.start("memory", {"most": 2 * MEMORY, "stay": 4})
    party.start("bomb", {"most": 2 * PIDS})
    party.await_word("victim")
    here = ["127.0.0.1", host.port]
    net = {"abstract": host.mark}
    secret = party.folder / "secret"
    secret.write_text("of the data folder")
    files = [secret, party.folder / "runs/victim/plan.json", party.folder / "homes/victim/secret"]
    given = {
        "files": ["/etc/shadow", host.file, *map(str, files)],
        "pids": [host.pid, *party.victims()],
        "mark": host.mark,
        "nodes": [*host_nodes(), *party.nodes_of_others("walls")],
        "addresses": [here],
        **net,
    }
    party.start("walls", given)
    if outbound != "none":
        own = [network.partition("/")[0] for network in addresses.of_host()][:_MOST_ADDRESSES]
        # The last is where slirp4netns would have the host's loopback.
        reachable = [[address, host.port] for address in (*own, "198.51.100.2")]
        given = {
            "addresses": [here, *reachable],
            "bound": reachable,
            "private": _one_of_each(addresses.NOT_PUBLIC),
            **net,
        }
        party.start("outbound", given, outbound=True)


def _one_of_each(networks: Sequence[str]) -> list[str]:
    """An address of each network but the loopback's: what is asked is only whether a way leads."""
    parsed = map(ipaddress.IPv4Network, networks)
    return [str(network[-2]) for network in parsed if not network.is_loopback]


class _Party:
    def __init__(self, engine: Engine, clock: Clock, folder: Path, devices: Sequence[str]) -> None:
        self._engine = engine
        self._clock = clock
        self._devices = devices
        self._failures: dict[str, str] = {}
        self._source = (Path(__file__).parent / "intruder.py").read_text()
        self.folder = folder

    def start(self, name: str, given: Mapping[str, Any], *, outbound: bool = False) -> None:
        device = self.device_of(name)
        spec = StartSpec(
            run_id=name,
            workload_id=name,
            organisation_id="probe",
            kind="job",
            devices=(device,),
            memory_bytes=MEMORY,
            disk_bytes=DISK,
            command=(PYTHON, "-I", "-S", "-c", self._source, name, json.dumps(dict(given))),
            script="",
            env={},
            home=name,
            hostname=name,
            outbound=outbound,
            stop_grace_seconds=1,
            notice_signal=None,
            metadata={},
            runway_until=self._clock.now() + timedelta(seconds=3 * _LONGEST_SECONDS),
        )
        self._failures[name] = ""
        try:
            self._engine.start(spec)
        except SubletError as error:
            self._failures[name] = error.message

    def device_of(self, name: str) -> str:
        """The one that measures CPU time has a device to itself where there are two."""
        return self._devices[0 if name == "cpu" else -1]

    def nodes_of_others(self, name: str) -> list[str]:
        """The device nodes of GPUs that are not this attempt's own."""
        others = set(self._devices) - {self.device_of(name)}
        return [f"/dev/nvidia{device[3:]}" for device in others if device.startswith("gpu")]

    def victims(self) -> list[int]:
        """The host's pids of the victim's processes."""
        try:
            state = records.read_state(str(self.folder / "runs/victim"))
        except records.Damaged:
            return []
        if state is None or state.init_pid is None:
            return []
        return [process.pid for process in usage.tree(state.init_pid)]

    def await_word(self, name: str) -> None:
        give_up = time.monotonic() + _LONGEST_SECONDS
        while time.monotonic() < give_up and not self._failures[name]:
            seen = self._engine.observe().get(name)
            if seen is None or seen.phase in _OVER or self._engine.logs(name)[0]:
                return
            time.sleep(0.01)

    def finish(self) -> dict[str, Outcome]:
        """Wait for all but the victim, which only ends when it is ended."""
        give_up = time.monotonic() + _LONGEST_SECONDS
        while True:
            seen = self._engine.observe()
            waiting = [
                name
                for name, failure in self._failures.items()
                if name != "victim" and not failure and name in seen
                if seen[name].phase not in _OVER
            ]
            if not waiting or time.monotonic() > give_up:
                return {name: self._outcome(name, seen.get(name)) for name in self._failures}
            time.sleep(0.02)

    def _outcome(self, name: str, seen: Observation | None) -> Outcome:
        if self._failures[name]:
            return Outcome(None, [], None, self._failures[name])
        if seen is None:
            return Outcome(None, [], None, "nothing was seen of it")
        said = []
        text = self._engine.logs(name, limit=1 << 20)[0]
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                word = json.loads(line)
                if isinstance(word, dict):
                    said.append(word)
        answer = said[-1] if said and seen.exit_code == 0 else None
        return Outcome(answer, said, seen, seen.failure or text.decode(errors="replace")[-300:])

    def clear(self) -> None:
        for name in self._failures:
            with contextlib.suppress(SubletError):
                self._engine.stop(name, grace_seconds=0, reason="probe")
        give_up = time.monotonic() + _LONGEST_SECONDS
        while time.monotonic() < give_up:
            seen = self._engine.observe()
            if all(found.phase in _OVER for found in seen.values()):
                break
            time.sleep(0.01)
        for name in self._engine.observe():
            with contextlib.suppress(SubletError):
                self._engine.scrub(name)


@contextlib.contextmanager
def host_to_find(mark: str) -> Iterator[Host]:
    """Put them there, and take them away again."""
    with contextlib.ExitStack() as stack:
        port = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
        port.bind(("", 0))  # every address, as a control plane may be told to
        port.listen(8)
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        abstract.bind(f"\0{mark}")
        abstract.listen(1)
        file = stack.enter_context(tempfile.NamedTemporaryFile("w", prefix="sublet-probe-"))
        file.write("of the host")
        file.flush()
        os.fchmod(file.fileno(), 0o644)
        process = stack.enter_context(
            subprocess.Popen(
                ["sh", "-c", "read _", mark],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        yield Host(mark, port.getsockname()[1], file.name, process.pid)


def host_nodes() -> list[str]:
    """Device nodes of this machine that a workload with its own devices has no business with."""
    own = {os.path.basename(path) for path in CONTROL_NODES}
    found: list[str] = []
    for folder, below, names in os.walk("/dev"):
        below[:] = [name for name in below if name not in ("pts", "shm", "mqueue", "nvidia-caps")]
        for name in names:
            touchy = name.rstrip("0123456789") in _TOUCHY
            if name in _HARMLESS or name in own or touchy or name.startswith("nvidia"):
                continue
            path = os.path.join(folder, name)
            with contextlib.suppress(OSError):
                mode = os.lstat(path).st_mode
                if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
                    found.append(path)
    return sorted(found)[:_MOST_NODES]
