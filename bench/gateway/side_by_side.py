"""One run of gatewaybench with our gateway among its candidates."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gateway.alone import Alone, Caller, a_route
from sublet.base.wire.gateway import ReplicaRoute

MOCK_PORT = 9100
MODELS = ("mock-n50-d0", "mock-n50-d5000")
CONTEXT = 131_072
"""Tokens: the long prompt fits, as in any model that is asked such prompts."""
KEY = "sk-bench-0123456789abcdef"
OURS = "sublet"
PEERS = ("nginx", "py-d-ack", "vllm-router", "ferrogw", "litellm")
NEEDS = {"py-d-ack": "PY", "vllm-router": "MISC", "ferrogw": "MISC", "litellm": "LITELLM"}
"""What a candidate is filled in with: a folder that `peers` makes."""
FOLDERS = {"PY": "py", "MISC": "misc", "LITELLM": "litellm"}
PROXY_CORE = 0


class Missing(Exception):
    """Something that is not part of this repository is not there; the text says how to get it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """gatewaybench's own JSON, its table, and the command that made them."""

    result: dict[str, Any]
    table: str
    command: str


def find_bench(given: str | None) -> Path:
    """The gatewaybench folder. Raises Missing."""
    root = Path(__file__).resolve().parents[2]
    named = given or os.environ.get("SUBLET_GATEWAYBENCH")
    folder = Path(named) if named else root.parent / "shared" / "gatewaybench"
    if not (folder / "gatewaybench.py").is_file():
        raise Missing(f"no gatewaybench.py in {folder}: name its folder with SUBLET_GATEWAYBENCH")
    return folder.resolve()


def find_peers(given: str | None) -> dict[str, str]:
    """What gatewaybench's candidates are filled in with, from the folder that its `peers` made."""
    named = given or os.environ.get("SUBLET_GATEWAYBENCH_PEERS")
    if not named:
        return {}
    folder = Path(named).resolve()
    return {
        name: str(folder / part / "bin")
        for name, part in FOLDERS.items()
        if (folder / part / "bin").is_dir()
    }


def choose(wanted: Sequence[str], peers: Mapping[str, str]) -> list[str]:
    """Those that can be started here; it says aloud which cannot."""
    chosen = []
    for name in wanted:
        needs = NEEDS.get(name)
        if (needs and needs not in peers) or (
            name == "nginx" and not Path("/usr/sbin/nginx").exists()
        ):
            print(f"left out: {name} is not installed (gatewaybench's `peers` does it)", flush=True)
        else:
            chosen.append(name)
    return chosen


def measure(
    bench: Path,
    peers: Mapping[str, str],
    *,
    rounds: int,
    seconds: float = 4.0,
    only: Sequence[str] = PEERS,
    scenarios: str = "",
    ack: bool = True,
    quiet_cores: float | None = None,
    work: Path | None = None,
    mock_port: int = MOCK_PORT,
) -> Measured:
    """Start our gateway, run gatewaybench over all, stop it. Lasts minutes; wants a quiet machine."""
    mock = ReplicaRoute(id="rep_mock", host="127.0.0.1", port=mock_port, slots=4096)
    # The mock tells no counters: events are counted, as with any server that has none.
    models = [a_route(name, mock, context=CONTEXT, counters="") for name in MODELS]
    with tempfile.TemporaryDirectory(prefix="sublet-bench-", dir=work) as made:
        folder = Path(made)
        caller = Caller(secret=KEY, id="key_bench")
        with Alone(
            folder / "gateway", models=models, callers=[caller], ack=ack, core=PROXY_CORE
        ) as gateway:
            out = folder / "result.json"
            command = [sys.executable, str(bench / "gatewaybench.py")]
            command += ["--only", ",".join(choose(only, peers))]
            command += ["--rounds", str(rounds), "--seconds", str(seconds), "--pin-external"]
            command += [f"--var={name}={value}" for name, value in peers.items()]
            if scenarios:
                command += ["--scenarios", scenarios]
            if quiet_cores is not None:
                command += ["--quiet", str(quiet_cores)]
            command += ["--upstream-port", str(mock_port), "--proxy-core", str(PROXY_CORE)]
            command += ["--work", str(folder / "work"), "--out", str(out)]
            command += ["--external", f"{OURS}={gateway.url}/v1,{KEY},{gateway.pid}"]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            said = []
            try:
                assert process.stdout is not None
                for line in process.stdout:
                    print(line, end="", flush=True)
                    said.append(line)
                status = process.wait()
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            assert gateway.is_alive(), gateway.said()
        if status or not out.exists():
            raise SystemExit(f"gatewaybench ended with {status}")
        result: dict[str, Any] = json.loads(out.read_text())
    table = "".join(line for line in said if line.startswith("|"))
    return Measured(result=result, table=table, command=shlex.join(command[1:]))
