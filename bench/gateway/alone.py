"""One gateway without a control plane: a snapshot file, a script that grants credit, a process.

    with Alone(folder, models=[...], keys=[...]) as gateway:
        gateway.url, gateway.pid, gateway.publish(...), gateway.kill(), gateway.start()

The granter plays the link's side of the control socket by the rules of the contract, from credit
in memory; usage stays in the spool for whoever wants to read it. Benchmarks and tests use it where
the books are not the subject.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from sublet.base.wire.gateway import (
    Allowance,
    AllowanceRequest,
    Gauge,
    KeyPolicy,
    ModelRoute,
    Price,
    ReplicaRoute,
    ScopeLimits,
    Snapshot,
    SpoolReader,
    UsageEvent,
    write_snapshot,
)

AMPLE = 10**15
"""Micros: a thousand million units of credit."""
EXPIRES_US = 600_000_000
READY_SECONDS = 20.0
END_SECONDS = 20.0
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty",
    "logit_bias", "stop",
)  # fmt: skip
FIELDS: Mapping[str, tuple[str, ...]] = {
    "chat": (
        *SAMPLING, "logprobs", "top_logprobs", "response_format", "tools", "tool_choice",
        "parallel_tool_calls",
    ),
    "completions": SAMPLING,
    "messages": ("temperature", "top_p", "top_k"),
    "embeddings": ("encoding_format",),
}  # fmt: skip
PRICES = {
    "default": Price(
        version="2026-11-01", input_micros=100_000, cached_micros=25_000, output_micros=400_000
    ),
    "flex": Price(
        version="2026-11-01", input_micros=50_000, cached_micros=12_500, output_micros=200_000
    ),
}


def now_us() -> int:
    return time.time_ns() // 1000


def a_route(name: str, *replicas: ReplicaRoute, **fields: Any) -> ModelRoute:
    """A model as a llama.cpp deployment serves it; only what matters need be said."""
    given: dict[str, Any] = {
        "kind": "generate",
        "deployment_id": f"dep_{name}",
        "server": "llama.cpp",
        "context": 4096,
        "max_output": 1024,
        "quantization": "Q4_1",
        "owned_by": "bench",
        "created_s": 1_790_000_000,
        "lifecycle": "active",
        "is_sealed": False,
        "max_n": 8,
        "splits_n": True,
        "counters": "timings_per_token",
        "fields": FIELDS,
        "prices": PRICES,
    }
    return ModelRoute(name=name, replicas=replicas, **{**given, **fields})


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """A key, its secret, its credit and its limits."""

    secret: str
    id: str
    organisation_id: str = "org_bench"
    credit_micros: int = AMPLE
    limits: ScopeLimits = field(
        default_factory=lambda: ScopeLimits(
            requests_per_minute=1_000_000_000, tokens_per_minute=1_000_000_000_000
        )
    )
    policy: Mapping[str, Any] = field(default_factory=dict)
    """Fields of its KeyPolicy that are to be other than usual."""

    def digest(self) -> str:
        return hashlib.sha256(self.secret.encode()).hexdigest()

    def made_policy(self) -> KeyPolicy:
        usual: dict[str, Any] = {
            "id": self.id,
            "organisation_id": self.organisation_id,
            "project_id": None,
            "is_first_party": False,
            "expires_us": None,
            "models": None,
            "scopes": (self.id,),
        }
        return KeyPolicy(**{**usual, **self.policy})


class Granter:
    """The link's end of the control socket, for any number of gateways. Keeps each g by the rules:
    the sum of all, and of what closed epochs spent, never exceeds a key's credit."""

    def __init__(self, path: Path, credit: Callable[[str], int]) -> None:
        self._path = path
        self._credit = credit
        self._lock = threading.Lock()
        self._slices: dict[tuple[str, int, str], list[int]] = {}
        """By gateway, epoch, key: g, and the serial that was acted on last."""
        self._connections: dict[str, socket.socket] = {}
        self.gauges: dict[str, Gauge] = {}
        self._is_closed = False
        self._listener: socket.socket | None = None

    def open(self) -> None:
        self._path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(os.fspath(self._path))
        self._path.chmod(0o600)
        listener.listen(16)
        self._is_closed = False
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def close(self) -> None:
        """The control plane is away: gateways find nobody."""
        self._is_closed = True
        listener, self._listener = self._listener, None
        if listener is not None:
            # A thread that waits in accept() holds the socket open: this wakes it.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        self._path.unlink(missing_ok=True)
        with self._lock:
            connections = list(self._connections.values())
            self._connections.clear()
        for connection in connections:
            _hang_up(connection)

    def nudge(self, number: int) -> None:
        line = json.dumps({"type": "snapshot", "number": number}).encode() + b"\n"
        with self._lock:
            connections = list(self._connections.values())
        for connection in connections:
            # One that is gone connects again, and reads the file then.
            with contextlib.suppress(OSError):
                connection.sendall(line)

    def granted(self, gateway: str, epoch: int, key_id: str) -> int:
        with self._lock:
            return self._slices.get((gateway, epoch, key_id), [0, 0])[0]

    def close_epoch(self, gateway: str, epoch: int, spent: Mapping[str, int]) -> None:
        """A dead gateway's slices shrink to what its spool says was spent."""
        with self._lock:
            for (name, life, key_id), found in self._slices.items():
                if name == gateway and life == epoch:
                    assert spent.get(key_id, 0) <= found[0], "spent more than was granted"
                    found[0] = spent.get(key_id, 0)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if self._is_closed:
                connection.close()
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        name = ""
        try:
            with connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if message["type"] == "hello":
                        name = message["gateway"]
                        with self._lock:
                            older = self._connections.get(name)
                            self._connections[name] = connection
                        if older is not None:
                            _hang_up(older)
                        connection.sendall(b'{"type":"welcome"}\n')
                    elif message["type"] == "gauge":
                        self.gauges[name] = Gauge.from_json(line)
                    elif message["type"] == "ask":
                        answer = self._answer(name, AllowanceRequest.from_json(line))
                        connection.sendall(b'{"type":"allowance",%b\n' % answer.to_json()[1:])
        except (OSError, ValueError):
            pass
        finally:
            with self._lock:
                if self._connections.get(name) is connection:
                    del self._connections[name]
            connection.close()

    def _answer(self, name: str, ask: AllowanceRequest) -> Allowance:
        with self._lock:
            found = self._slices.setdefault((name, ask.epoch, ask.key_id), [0, 0])
            target = ask.spent_micros + ask.held_micros + ask.wanted_micros
            if ask.serial > found[1]:
                found[1] = ask.serial
                if ask.wanted_micros:
                    others = sum(g[0] for k, g in self._slices.items() if k[2] == ask.key_id)
                    left = max(self._credit(ask.key_id) - others, 0)
                    found[0] = max(found[0], min(target, found[0] + left))
                else:
                    found[0] = min(found[0], ask.spent_micros + ask.held_micros)
            is_denied = bool(ask.wanted_micros) and found[0] < target
            return Allowance(
                key_id=ask.key_id,
                epoch=ask.epoch,
                granted_micros=found[0],
                granted_tokens=None,
                expires_us=now_us() + EXPIRES_US,
                answers=found[1],
                denied="insufficient_quota" if is_denied else None,
                denied_why="The credit of this organisation is used up." if is_denied else "",
            )


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # It was gone already.
        connection.shutdown(socket.SHUT_RDWR)


class Alone:
    """A gateway process on a folder. It can be killed and started again on the same port."""

    name = "gw-0"

    def __init__(
        self,
        folder: Path,
        *,
        models: Sequence[ModelRoute],
        callers: Sequence[Caller],
        ack: bool = True,
        body_limit: int = 16 << 20,
        stale_seconds: int = 86_400,
        core: int | None = None,
    ) -> None:
        self.folder = folder
        self.callers = {caller.id: caller for caller in callers}
        self.models = {route.name: route for route in models}
        self.number = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.granter = Granter(self.folder / "control.sock", self._credit)
        self._core = core
        self._orders = {"ack": ack, "body_limit": body_limit, "stale_seconds": stale_seconds}
        # Held here as well, as `sublet up` does: who connects while it is started again waits.
        self._listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen(4096)
        self.port: int = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = self.folder / "gateway.log"

    def _credit(self, key_id: str) -> int:
        return self.callers[key_id].credit_micros if key_id in self.callers else 0

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    # ---- the control plane's side ---------------------------------------------------------------

    def publish(self, **changes: Any) -> int:
        """A new snapshot, in force once the gateway has read it; its number."""
        self.number += 1
        callers = self.callers.values()
        snapshot = Snapshot(
            number=self.number,
            made_us=now_us(),
            gateways=1,
            keys={caller.digest(): caller.made_policy() for caller in callers},
            limits={caller.id: caller.limits for caller in callers},
            models=self.models,
        )
        data = write_snapshot(replace(snapshot, **changes))
        temporary = self.folder / ".snapshot.new"
        temporary.write_bytes(data)
        os.replace(temporary, self.folder / "snapshot")
        self.granter.nudge(self.number)
        return self.number

    def await_snapshot(self, number: int, seconds: float = 5.0) -> None:
        """Until the gateway says that it acts by this number."""
        end = time.monotonic() + seconds
        while True:
            gauge = self.granter.gauges.get(self.name)
            if gauge is not None and gauge.snapshot >= number:
                return
            assert time.monotonic() < end, f"snapshot {number} was not taken over: {self.said()}"
            threading.Event().wait(0.01)

    # ---- its life ------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.granter.open()
        self.publish()
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.granter.close()
        self._listening.close()

    def start(self) -> None:
        """Returns once it serves."""
        ready, told = os.pipe()
        socket_fd = self._listening.fileno()
        orders = {
            "name": self.name,
            "folder": os.fspath(self.folder),
            "socket_fd": socket_fd,
            "ready_fd": told,
            "parent": os.getpid(),
            **self._orders,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sublet.gateway"],
                env={**os.environ, "SUBLET_GATEWAY_ORDERS": json.dumps(orders)},
                pass_fds=(socket_fd, told),
                stdout=log,
                stderr=log,
            )
        os.close(told)
        if self._core is not None:
            os.sched_setaffinity(self.process.pid, {self._core})
        try:
            is_told, _, _ = select.select([ready], [], [], READY_SECONDS)
            assert is_told, f"it did not start: {self.said()}"
            assert os.read(ready, 1) == b"1", f"it ended: {self.said()}"
        finally:
            os.close(ready)

    def kill(self) -> None:
        """kill -9, and its death."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(END_SECONDS)

    def stop(self) -> int:
        """SIGTERM, and how it ended."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    # ---- what it wrote -------------------------------------------------------------------------

    def epochs(self) -> list[int]:
        """Its lives so far, oldest first."""
        folder = self.folder / self.name
        return sorted(int(found.name) for found in folder.iterdir()) if folder.exists() else []

    def events(self, epoch: int) -> Iterator[UsageEvent]:
        """All that is in the spool of one life."""
        for body in SpoolReader(self.folder / self.name / str(epoch)).frames():
            yield UsageEvent.from_json(body)

    def open_rows(self, epoch: int) -> list[UsageEvent]:
        """What the file of open streams holds; after a kill: what is lost, but for what the spool
        has by the same id."""
        path = self.folder / self.name / str(epoch) / "inflight.json"
        if not path.exists():
            return []
        return [
            UsageEvent.from_json(json.dumps(row).encode()) for row in json.loads(path.read_text())
        ]
