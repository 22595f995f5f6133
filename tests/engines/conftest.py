"""Engines under test, each with a way to let time pass.

`harness` runs a test once per engine. To add one, write a factory that makes a `Harness` and name
it in HARNESSES: nothing else in the suite knows which engine it is looking at. A harness
with a virtual clock jumps in its `pause` where the others wait.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sublet.base.kernel.clock import SystemClock, VirtualClock
from sublet.capacity.engines.local import LocalEngine
from sublet.capacity.engines.port import Engine, Observation, Phase, StartSpec, SubletError
from sublet.capacity.engines.simulated import SimulatedEngine

PREFIX = f"sublet-test-{os.getpid()}-"
OVER = (Phase.EXITED, Phase.FAILED)


class Harness:
    """An engine, its clock, and short words for what tests do with both."""

    engine: Any
    devices: tuple[str, ...]
    clock: Any

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def now(self) -> datetime:
        return self.clock.now()

    def run_until(self, predicate: Callable[[], Any], seconds: float) -> Any:
        """Let time pass until the predicate holds; its value. Fails after so many seconds."""
        give_up = self.now() + timedelta(seconds=seconds)
        while not (value := predicate()):
            assert self.now() < give_up, f"not within {seconds} s: {self.engine.observe()}"
            self.pause()
        return value

    def pause(self) -> None:
        """A moment: slept through, or jumped."""
        time.sleep(0.01)

    def reopened(self) -> Any:
        """The engine as a control plane finds it that has just been started again."""
        return self.engine

    # -- words

    def spec(self, **fields: Any) -> StartSpec:
        number = next(self._numbers)
        values: dict[str, Any] = {
            "run_id": f"run_{number}",
            "workload_id": f"wl_{number}",
            "organisation_id": "org_1",
            "kind": "job",
            "devices": self.devices[:1],
            "memory_bytes": 256 << 20,
            "disk_bytes": 256 << 20,
            "command": ("sleep", "600"),
            "script": "",
            "env": {},
            "home": f"home_{number}",
            "hostname": "ins-1",
            "outbound": False,
            "stop_grace_seconds": 1,
            "notice_signal": None,
            "metadata": {},
            "runway_until": self.now() + timedelta(seconds=600),
        }
        return StartSpec(**{**values, **fields})

    def start(self, *script: str, **fields: Any) -> str:
        """Start a job that runs a shell script (or an instance, without one) until it runs."""
        if script:
            fields.setdefault("command", ("sh", "-c", script[0]))
        elif "kind" not in fields:
            fields |= {"kind": "instance", "command": ()}
        spec = self.spec(**fields)
        self.engine.start(spec)
        self.run_until(lambda: self.see(spec.run_id).phase is not Phase.STARTING, 15)
        return spec.run_id

    def see(self, run_id: str) -> Observation:
        found: Mapping[str, Observation] = self.engine.observe()
        return found[run_id]

    def until_phase(self, run_id: str, *phases: Phase, seconds: float = 15) -> Observation:
        self.run_until(lambda: self.see(run_id).phase in phases, seconds)
        return self.see(run_id)

    def until_over(self, run_id: str, seconds: float = 15) -> Observation:
        return self.until_phase(run_id, *OVER, seconds=seconds)

    def text(self, run_id: str) -> str:
        data, _ = self.engine.logs(run_id, limit=1 << 20)
        return str(data.decode())

    def close(self) -> None:
        """End what still runs and take everything away."""


class LocalHarness(Harness):
    """Real processes in real time, in a folder that is gone afterwards."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.clock = SystemClock.unanchored()
        # Not pytest's own folder: an ordinary user keeps out of root's, and paths stay short.
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX))
        self.options = {"disk_reserve_bytes": 0, **options}
        self.engine = self.reopened()
        self.devices = tuple(device.name for device in self.engine._hardware().devices)

    def reopened(self) -> LocalEngine:
        return LocalEngine(self.root, self.clock, **self.options)

    def folder(self, run_id: str) -> Path:
        return self.root / "runs" / run_id

    def close(self) -> None:
        for run_id, seen in self.engine.observe().items():
            if seen.phase not in OVER:
                with contextlib.suppress(SubletError):
                    self.engine.stop(run_id, grace_seconds=0, reason="test")
        with contextlib.suppress(KeyError):
            for run_id in self.engine.observe():
                self.until_over(run_id)
                assert self.engine.scrub(run_id).clean
        for folder in self.engine._rules.cgroup_bases.values():
            self.run_until(lambda folder=folder: not os.path.exists(folder), 2)
        shutil.rmtree(self.root)


class SimulatedHarness(Harness):
    """The same life in virtual time."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = VirtualClock(datetime(2026, 11, 2, 12, tzinfo=UTC))
        self.engine = SimulatedEngine(self.clock)
        self.devices = tuple(device.name for device in self.engine.inventory().devices)

    def pause(self) -> None:
        self.clock.advance_to(self.now() + timedelta(milliseconds=50))


HARNESSES: dict[str, Callable[[], Harness]] = {
    "local": LocalHarness,
    "local-bare": lambda: LocalHarness(trusted=True, without=frozenset({"bubblewrap"})),
    "simulated": SimulatedHarness,
}


@pytest.fixture(params=HARNESSES)
def harness(request: pytest.FixtureRequest) -> Iterator[Harness]:
    made = HARNESSES[request.param]()
    assert isinstance(made.engine, Engine)
    yield made
    made.close()


@pytest.fixture
def local() -> Iterator[LocalHarness]:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    made = LocalHarness()
    yield made
    made.close()


@pytest.fixture
def make_local() -> Iterator[Callable[..., LocalHarness]]:
    """Local engines with options of the test's own."""
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> LocalHarness:
            made = LocalHarness(**options)
            stack.callback(made.close)
            return made

        yield make


@pytest.fixture(autouse=True, scope="session")
def nothing_left() -> Iterator[None]:
    """The whole suite leaves no supervisor and no folder behind."""
    yield
    give_up = time.monotonic() + 5
    while (left := _traces()) and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not left


def _traces() -> set[str]:
    found = {str(path) for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*")}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{name}/cmdline").read_bytes()
                if b"supervise.main" in words and PREFIX.encode() in words:
                    found.add(f"process {name}")
    return found
