"""Cuts: the client goes at any moment, the engine goes before and after its first byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.gateway.alone import PRICES, a_route
from sublet.base.wire.gateway import ReplicaRoute
from sublet.gateway import exchange, legs, upstream
from sublet.gateway.purse import cost
from tests.gateway.mock_server import MockServer
from tests.gateway.running import (
    Client,
    Running,
    a_replica,
    ask,
    chat,
    run,
    running,
    serving,
    socket_path,
    swallowing,
    until,
)


async def go_away(gateway: Running, body: dict[str, Any], when: Callable[[], Any]) -> None:
    async with Client(gateway.port) as client:
        client.post(body)
        await until(when)
    await until(lambda: not gateway.g.connections)
    await gateway.g.spool.finish()
    gateway.check_quiet()


def test_a_client_goes_while_it_waits(tmp_path: Path) -> None:
    """For its allowance, in the queue, for a connection, for the count of its input, in legs."""

    async def work() -> None:
        path = socket_path(tmp_path)
        kept, port = swallowing()
        away = ReplicaRoute(id="rep_away", host="127.0.0.1", port=port, slots=64)
        routes = (
            a_route("mock", a_replica(path)),
            a_route("cold"),
            a_route("away", away),
        )
        async with MockServer(path) as mock, running(tmp_path, *routes) as gateway:
            g = gateway.g
            gateway.granter.close()
            await until(lambda: not g.control.is_connected)
            await go_away(
                gateway,
                chat("n=5"),
                lambda: g.routes.purses and len(gateway.purse.waiting) == 1,
            )
            gateway.granter.open()
            await until(lambda: g.control.is_connected)
            cold = g.routes.models["cold"]
            await go_away(gateway, {**chat("n=5"), "model": "cold"}, lambda: cold.waiting)
            await go_away(gateway, {**chat("n=5"), "model": "away"}, lambda: g.open)
            await go_away(
                gateway,
                chat("n=5 silent=9 prompt=3 " + "x" * 4000, max_tokens=1000),
                lambda: any(x.legs for x in g.open) or mock.open,
            )
            await go_away(gateway, chat("n=500 delay=0.02", n=3), lambda: mock.open == 3)
            await until(lambda: not mock.open)
            assert all(row.outcome == "client_gone" for row in gateway.rows())
            assert all(row.micros == 0 for row in gateway.rows())
        for held in kept:
            held.close()

    run(work)


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_goes_in_the_middle(tmp_path: Path, is_stream: bool) -> None:
    """The engine stops at once; billed is the last count that it told of."""

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path))
        async with MockServer(path) as mock, running(tmp_path, route) as gateway:
            async with Client(gateway.port) as client:
                client.post(chat("n=500 delay=0.01 prompt=7", stream=is_stream))
                await until(lambda: mock.made >= 10)
            await until(lambda: not mock.open)
            row = await gateway.row()
            assert row.outcome == "client_gone"
            assert mock.made < 40
            if is_stream:
                assert 5 <= row.output <= mock.made
                assert row.micros == cost(PRICES["default"], 7, 0, row.output)
            else:
                assert (row.output, row.micros) == (0, 0)

    run(work)


def test_an_engine_that_cannot_be_stopped_is_heard_out(tmp_path: Path) -> None:
    """Its slot is taken until it ends, and what it made is billed: hanging up gains nothing."""

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path, slots=4), stops_unstreamed=False)
        async with MockServer(path) as mock, running(tmp_path, route) as gateway:
            for extra, made in (({}, 30), ({"n": 2}, 60)):
                before = mock.made
                async with Client(gateway.port) as client:
                    client.post(chat("n=30 delay=0.01 prompt=7", **extra))
                    await until(lambda before=before: mock.made >= before + 5)
                await until(lambda: not gateway.g.connections)
                assert sum(r.inflight for r in gateway.g.routes.replicas.values()) > 0
                await until(lambda: not gateway.g.open)
                row = gateway.rows()[-1] if gateway.rows() else await gateway.row()
                assert (row.outcome, row.output, mock.made - before) == ("client_gone", made, made)
                assert row.micros == cost(PRICES["default"], 7, 0, made)
                await until(lambda: not any(r.inflight for r in gateway.g.routes.replicas.values()))

    run(work)


def test_an_engine_that_is_heard_out_may_die(tmp_path: Path) -> None:
    """Nobody waits for another answer: it is asked nowhere else, and nothing is billed."""

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path, slots=4), stops_unstreamed=False)
        async with MockServer(path) as mock, running(tmp_path, route) as gateway:
            async with Client(gateway.port) as client:
                client.post(chat("n=30 delay=0.01 die=20"))
                await until(lambda: mock.made >= 5)
            await until(lambda: not gateway.g.open)
            row = await gateway.row()
            assert (row.outcome, row.output, row.micros) == ("client_gone", 0, 0)
            assert gateway.purse.held == 0

    run(work)


def test_a_client_goes_at_any_moment(tmp_path: Path) -> None:
    """Sixty that go a little later each, with and without legs, tools and streams."""

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path, slots=6))
        kinds: list[dict[str, Any]] = [
            {"stream": True},
            {},
            {"stream": True, "n": 2},
            {"stream": True, "tools": [{"type": "function", "function": {"name": "get_0"}}]},
        ]
        async with MockServer(path) as mock, running(tmp_path, route) as gateway:

            async def one(number: int) -> None:
                async with Client(gateway.port) as client:
                    client.post(chat("n=30 delay=0.001 calls=1", **kinds[number % 4]))
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(number * 0.002):
                            await client.answer()

            await asyncio.gather(*[one(number) for number in range(60)])
            await until(lambda: not gateway.g.open and not gateway.g.connections)
            await until(lambda: not mock.open)
            for row in gateway.rows():
                assert row.outcome in ("ok", "client_gone")
                assert row.output <= row.made

    run(work)


def test_the_engine_goes_after_its_first_byte(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path))
        async with MockServer(path) as mock, running(tmp_path, route) as gateway:
            for words in ("n=20 die=3 prompt=9", "n=20 end=3 prompt=9"):
                answer = await ask(gateway, chat(words + " delay=0.002", stream=True))
                last = json.loads(answer.events()[-1])["error"]
                assert last["code"] == "stream_interrupted"
                assert (last["type"], last["param"]) == ("server_error", None)
                assert answer.text() == " w0 w1 w2"
                assert b"[DONE]" not in answer.body
                row = gateway.rows()[-1]
                assert (row.outcome, row.input_uncached, row.output) == ("interrupted", 9, 3)
            assert mock.made == 6
            answer = await ask(
                gateway,
                {**chat("n=20 die=3 delay=0.002", stream=True), "max_tokens": 20},
                "/v1/messages",
            )
            assert b"event: error\n" in answer.body
            assert b"message_stop" not in answer.body

    run(work)


@pytest.mark.parametrize(
    ("words", "is_stream"),
    [
        *[(words, stream) for words in ("die=0", "die=head", "status=500") for stream in (0, 1)],
        ("die=7 n=9", 0),
    ],
)
def test_the_engine_goes_before_its_first_byte(tmp_path: Path, words: str, is_stream: int) -> None:
    """Another replica, once; with one alone a refusal, and no bill."""
    words += " counters=none"

    async def work() -> None:
        paths = [socket_path(tmp_path, name) for name in ("one", "two")]
        one, two = (a_replica(path, f"rep_{path[-8:-5]}") for path in paths)
        async with (
            MockServer(paths[0]) as mock,
            MockServer(paths[1]) as other,
            running(tmp_path, a_route("mock", one)) as gateway,
        ):
            answer = await ask(gateway, chat(words, stream=bool(is_stream), max_tokens=9))
            assert answer.status == 503
            assert int(answer.headers["retry-after"]) <= 5
            assert len(mock.requests) == 1
            row = await gateway.row()
            assert (row.outcome, row.micros, row.output) == ("failed", 0, 0)
            gateway.publish(a_route("mock", one, two))
            answer = await ask(gateway, chat(words, stream=bool(is_stream), max_tokens=9))
            assert answer.status == 503
            assert len(other.requests) == 1
            rid = answer.headers["x-request-id"]
            assert [len(found.requests[rid]) for found in (mock, other)] == [1, 1]

    run(work)


def test_half_an_event_is_forgotten_by_the_next_replica(tmp_path: Path) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        event = b'data: {"choices":[{"delta":{"content":"half'
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\n%x\r\n%b\r\n" % (len(event), event)
        )
        await writer.drain()
        writer.close()

    async def work() -> None:
        paths = [socket_path(tmp_path, name) for name in ("one", "two")]
        route = a_route("mock", a_replica(paths[0], "rep_one"), a_replica(paths[1], "rep_two"))
        async with (
            serving(half, paths[0]),
            MockServer(paths[1]),
            running(tmp_path, route) as gateway,
        ):
            for _ in range(2):
                answer = await ask(gateway, chat("n=2", stream=True))
                assert answer.text() == " w0 w1"
                assert b"half" not in answer.body

    run(work)


def test_connections_that_came_to_their_idle_end(tmp_path: Path) -> None:
    """One replica, whose server closes after each reply without having said so: no request is
    refused for it, and the replica is not put out."""

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path))
        async with MockServer(path), running(tmp_path, route) as gateway:
            for _ in range(8):
                answers = await asyncio.gather(
                    *[ask(gateway, chat("n=1 close=1")) for _ in range(4)]
                )
                assert [answer.status for answer in answers] == [200] * 4
            replica = gateway.g.routes.replicas["rep_1"]
            assert replica.failures == 0

    run(work)


@pytest.mark.parametrize(
    "reply",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n1234567",
        b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffff\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        b"0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 70_000,
    ],
    ids=range(10),
)
def test_nonsense_of_a_model_server(tmp_path: Path, reply: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(reply)
            await writer.drain()
            await reader.read()
        writer.close()

    async def work() -> None:
        path = socket_path(tmp_path)
        async with (
            serving(talk, path),
            running(tmp_path, a_route("mock", a_replica(path))) as gateway,
        ):
            for is_stream in (False, True):
                answer = await ask(gateway, chat("n=2", stream=is_stream))
                assert (answer.status, answer.code) == (503, "no_replica")
                replica = gateway.g.routes.replicas["rep_1"]
                replica.answered()
                replica.close_idle()  # The server answers once on each.

    run(work)


def test_an_event_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "CARRY_LIMIT", 100_000)
    monkeypatch.setattr(legs, "CARRY_LIMIT", 100_000)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b'transfer-encoding: chunked\r\n\r\n21\r\ndata: {"choices":[{"index":0}]}\n\n\r\n'
        )
        with contextlib.suppress(ConnectionError):
            for _ in range(100):
                writer.write(b"1000\r\n%b\r\n" % (b"x" * 4096))
                await writer.drain()
            await reader.read()
        writer.close()

    async def work() -> None:
        path = socket_path(tmp_path)
        async with (
            serving(talk, path),
            running(tmp_path, a_route("mock", a_replica(path))) as gateway,
        ):
            for choices in (1, 2):
                answer = await ask(gateway, chat("n=2", stream=True, n=choices))
                if answer.status == 200:
                    last = json.loads(answer.events()[-1])
                    assert last["error"]["code"] == "stream_interrupted"
                else:
                    assert answer.status == 503

    run(work)


def test_a_reply_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client has its [DONE]; the connection is not kept for a server that hangs."""
    monkeypatch.setattr(upstream, "END_SECONDS", 0.1)
    closed = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\n\r\ne\r\ndata: [DONE]\n\n\r\n"
        )
        with contextlib.suppress(ConnectionError):
            await reader.read()
            while await reader.read(1000):
                pass
        closed.set()
        writer.close()

    async def work() -> None:
        path = socket_path(tmp_path)
        async with (
            serving(talk, path),
            running(tmp_path, a_route("mock", a_replica(path))) as gateway,
        ):
            answer = await ask(gateway, chat("n=2", stream=True))
            assert answer.body == b"data: [DONE]\n\n"
            async with asyncio.timeout(3):
                await closed.wait()

    run(work)
