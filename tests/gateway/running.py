"""A gateway in the test's own loop, a raw client of it, and what is left when all is over.

    async with running(folder, a_route("mock", …)) as gateway:
        async with Client(gateway.port) as client:
            client.post({"model": "mock", …})
            answer = await client.answer()

The link is `bench.gateway.alone.Granter`: it grants from credit in memory by the contract's rules.
Once a tick, in place of once a second, the gateway sweeps.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import uvloop

from bench.gateway.alone import Caller, Granter, now_us
from sublet.base.wire.gateway import (
    ModelRoute,
    ReplicaRoute,
    Snapshot,
    SpoolReader,
    UsageEvent,
    write_snapshot,
)
from sublet.gateway.process import Keeper, Orders, begin, drain
from sublet.gateway.purse import Purse
from sublet.gateway.state import Gateway

SECRET = "sk-test"
CALLER = Caller(secret=SECRET, id="key_test")
CHAT = "/v1/chat/completions"
PATIENCE = 10.0


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """On the loop that the gateway is made for."""
    uvloop.run(work())


def socket_path(folder: Path, name: str = "mock") -> str:
    return os.fspath(folder / f"{name}.sock")


def a_replica(path: Path | str, name: str = "rep_1", **fields: Any) -> ReplicaRoute:
    return ReplicaRoute(id=name, path=os.fspath(path), **{"slots": 64, **fields})


@dataclass
class Running:
    g: Gateway
    port: int
    server: asyncio.Server
    granter: Granter
    folder: Path
    publish: Callable[..., None]
    """Routes that are in force from here on."""

    @property
    def purse(self) -> Purse:
        return self.g.routes.purses[CALLER.id]

    def rows(self) -> list[UsageEvent]:
        """All that is in the spool."""
        frames = SpoolReader(self.folder / "gw-0" / str(self.g.epoch)).frames()
        return [UsageEvent.from_json(body) for body in frames]

    async def row(self) -> UsageEvent:
        """The only one, once it is there."""
        await until(lambda: len(self.rows()) == 1)
        return self.rows()[0]

    def check_quiet(self) -> None:
        """Nothing is held, waited for, in flight or open any more."""
        assert not self.g.open
        for purse in self.g.routes.purses.values():
            assert (purse.held, purse.held_tokens, len(purse.waiting)) == (0, 0, 0)
            assert purse.spent <= max(purse.granted, 0)
        assert sum(row.micros for row in self.rows()) == sum(
            purse.spent for purse in self.g.routes.purses.values()
        )
        for model in self.g.routes.models.values():
            assert not model.waiting
        assert not any(self.g.routes.in_flight().values())


async def until(is_so: Callable[[], Any], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(
    folder: Path,
    *models: ModelRoute,
    callers: Sequence[Caller] = (CALLER,),
    body_limit: int = 1 << 20,
    tick: float = 0.05,
    is_checked: bool = True,
) -> AsyncIterator[Running]:
    home = folder / "gateway"
    home.mkdir(mode=0o700)
    by_id = {caller.id: caller for caller in callers}
    granter = Granter(home / "control.sock", lambda key: by_id[key].credit_micros)
    number = 0

    def write(*routes: ModelRoute, made_us: int | None = None) -> None:
        nonlocal number
        number += 1
        snapshot = Snapshot(
            number=number,
            made_us=now_us() if made_us is None else made_us,
            gateways=1,
            keys={caller.digest(): caller.made_policy() for caller in callers},
            limits={caller.id: caller.limits for caller in callers},
            models={route.name: route for route in routes},
        )
        (home / ".new").write_bytes(write_snapshot(snapshot))
        os.replace(home / ".new", home / "snapshot")

    listening = socket.create_server(("127.0.0.1", 0))
    port: int = listening.getsockname()[1]
    granter.open()
    write(*models)
    orders = Orders(
        name="gw-0", folder=os.fspath(home), socket_fd=listening.detach(), body_limit=body_limit
    )
    g, keeper, server = await begin(orders)

    def publish(*routes: ModelRoute, made_us: int | None = None) -> None:
        write(*routes, made_us=made_us)
        keeper.look()

    sweeps = asyncio.ensure_future(_sweep(g, keeper, tick))
    gateway = Running(g, port, server, granter, home, publish)
    try:
        await until(lambda: g.control.is_connected)
        yield gateway
        if is_checked:
            await until(lambda: not g.open)
            await g.spool.finish()
            gateway.check_quiet()
    finally:
        sweeps.cancel()
        for connection in list(g.connections):
            connection.close()
        if not g.is_draining:
            await drain(g, server)
        for replica in g.routes.replicas.values():
            replica.close_idle()
        granter.close()
        await asyncio.sleep(0.01)


async def _sweep(g: Gateway, keeper: Keeper, tick: float) -> None:
    while True:
        await asyncio.sleep(tick)
        keeper.look()
        g.sweep()


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        code: str = self.json()["error"]["code"]
        return code

    def events(self) -> list[bytes]:
        """Of a stream, what stands after `data: `; comments and names of events left out."""
        assert self.body.endswith(b"\n\n"), "it ends within an event"
        lines = [line for event in self.body.split(b"\n\n") for line in event.split(b"\n")]
        return [line[6:] for line in lines if line.startswith(b"data: ")]

    def text(self) -> str:
        """What a chat stream says."""
        said = ""
        for event in self.events():
            for choice in json.loads(event).get("choices", []) if event != b"[DONE]" else []:
                said += choice["delta"].get("content") or ""
        return said


class Client:
    """One connection, by hand."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.abort()

    def abort(self) -> None:
        self.writer.transport.abort()

    def post(
        self,
        body: Mapping[str, Any] | bytes,
        path: str = CHAT,
        *,
        headers: Mapping[str, str] | None = None,
        version: str = "1.1",
        method: str = "POST",
    ) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        fields = {
            "Host": "gateway",
            "Authorization": f"Bearer {SECRET}",
            "Content-Length": str(len(data)),
            **(headers or {}),
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items() if value)
        self.writer.write(f"{method} {path} HTTP/{version}\r\n{head}\r\n".encode() + data)

    def get(self, path: str, *, method: str = "GET") -> None:
        self.post(b"", path, method=method, headers={"Content-Length": ""})

    async def answer(self, *, is_head: bool = False) -> Answer:
        async with asyncio.timeout(PATIENCE):
            status, headers = await self.head()
            if is_head or status == 204:
                return Answer(status, headers, b"")
            if headers.get("transfer-encoding") == "chunked":
                body = b"".join([piece async for piece in self.pieces()])
            elif "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:
                body = await self.reader.read()
            return Answer(status, headers, body)

    async def head(self) -> tuple[int, dict[str, str]]:
        lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        fields = [line.partition(": ") for line in lines[1:] if line]
        return int(lines[0].split(" ")[1]), {name: value for name, _, value in fields}

    async def pieces(self) -> AsyncIterator[bytes]:
        """The chunks of a body, as they come."""
        while True:
            size = int(await self.reader.readuntil(b"\r\n"), 16)
            data = await self.reader.readexactly(size + 2)
            if not size:
                return
            yield data[:-2]

    async def is_closed(self) -> bool:
        async with asyncio.timeout(PATIENCE):
            try:
                return not await self.reader.read(1)
            except ConnectionError:
                return True


def chat(words: str, **fields: Any) -> dict[str, Any]:
    """A request whose prompt steers the mock."""
    return {"model": "mock", "messages": [{"role": "user", "content": words}], **fields}


async def ask(
    gateway: Running,
    body: Mapping[str, Any] | bytes,
    path: str = CHAT,
    **options: Any,
) -> Answer:
    """One request on a connection of its own."""
    async with Client(gateway.port) as client:
        client.post(body, path, **options)
        return await client.answer()


@contextlib.asynccontextmanager
async def serving(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]],
    path: str,
) -> AsyncIterator[None]:
    """A model server whose every byte is the test's."""
    server = await asyncio.start_unix_server(talk, path)
    try:
        yield
    finally:
        server.close()


def swallowing() -> tuple[list[socket.socket], int]:
    """An address that takes no more connections and answers nothing, and what keeps it so."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(0)
    port = listening.getsockname()[1]
    kept = [listening]
    for _ in range(4):
        waiting = socket.socket()
        waiting.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            waiting.connect(("127.0.0.1", port))
        kept.append(waiting)
    return kept, port
