"""A gateway with a key and a mock, to be attacked."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bench.gateway.alone import Alone, Caller, a_route
from sublet.base.wire.gateway import ReplicaRoute
from sublet.shops.models.servers import unix
from tests.gateway.mock_server import mock_process

from .wire import KEY, SMUGGLED, Answer, Chat, Wire

BODY_LIMIT = 1 << 20


@dataclass
class Target:
    gateway: Alone
    mock: str

    @property
    def port(self) -> int:
        return self.gateway.port

    def memory_mb(self) -> float:
        status = Path(f"/proc/{self.gateway.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) / 1024

    def stats(self) -> dict[str, Any]:
        page = unix.get(self.mock, "/stats", seconds=10)
        assert page is not None
        stats: dict[str, Any] = json.loads(page)
        return stats

    def ask(self, chat: Chat) -> Answer:
        with Wire(self.port) as wire:
            wire.send(chat.bytes())
            answer = wire.answer()
        assert answer is not None
        return answer

    def check(self) -> None:
        """It lives, serves as ever, and has sent nothing on that nobody asked for."""
        assert self.gateway.is_alive(), self.gateway.said()
        assert "Traceback" not in self.gateway.said(), self.gateway.said()[-5000:]
        answer = self.ask(Chat(13))
        assert (answer.status, answer.words) == (200, 13)
        seen = {made["prompt"] for rows in self.stats()["requests"].values() for made in rows}
        assert SMUGGLED not in seen, "a request that was hidden in another was served"

    def await_quiet(self, seconds: float = 10.0) -> None:
        """Until no request is open at the mock."""
        end = time.monotonic() + seconds
        while self.stats()["open"]:
            assert time.monotonic() < end, f"still open at the mock: {self.stats()['open']}"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    folder = Path(tempfile.mkdtemp(prefix="sublet-fuzz-"))
    mock = folder / "mock.sock"
    route = a_route(
        "mock",
        ReplicaRoute(id="rep_mock", path=str(mock), slots=256),
        context=1 << 20,
        max_output=200_000,
    )
    try:
        with (
            mock_process(mock),
            Alone(
                folder / "gateway",
                models=[route],
                callers=[Caller(secret=KEY.decode(), id="key_fuzz")],
                body_limit=BODY_LIMIT,
            ) as gateway,
        ):
            yield Target(gateway, str(mock))
    finally:
        shutil.rmtree(folder)
