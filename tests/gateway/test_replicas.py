"""Replicas: one that cannot be reached, one that leaves, a slow reader, several gateways."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from pathlib import Path

import pytest

from bench.gateway.alone import a_route
from sublet.base.wire.gateway import ReplicaRoute
from sublet.gateway import upstream
from sublet.gateway.process import Orders, begin, drain
from sublet.gateway.state import RETRY_NS
from tests.gateway.mock_server import MockServer
from tests.gateway.running import (
    SECRET,
    Answer,
    Client,
    Running,
    a_replica,
    ask,
    chat,
    run,
    running,
    socket_path,
    swallowing,
    until,
)


def test_r2_an_address_that_swallows_packets(tmp_path: Path) -> None:
    """A hundred calls, a hundred answers, none over five seconds; three failures put it out."""

    async def work() -> None:
        path = socket_path(tmp_path)
        kept, port = swallowing()
        away = ReplicaRoute(id="rep_away", host="127.0.0.1", port=port, slots=8)
        route = a_route("mock", a_replica(path, "rep_near", slots=8), away)
        async with MockServer(path) as mock, running(tmp_path, route) as gateway:

            async def one() -> tuple[Answer, float]:
                begun = time.monotonic()
                return await ask(gateway, chat("n=3 delay=0.001")), time.monotonic() - begun

            done = await asyncio.gather(*[one() for _ in range(100)])
            assert [answer.status for answer, _ in done] == [200] * 100
            assert max(took for _, took in done) < 5
            replica = gateway.g.routes.replicas["rep_away"]
            assert replica.failures >= 3
            assert gateway.g.gauge().ejected == ("rep_away",)
            # It is out: nobody waits for it any more.
            begun = time.monotonic()
            await asyncio.gather(*[one() for _ in range(20)])
            assert time.monotonic() - begun < 1
            assert len(mock.requests) == 120
            # Thirty seconds on it is tried again.
            assert 29e9 < replica.out_until_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME) < 30e9
            replica.out_until_ns = 1
            assert gateway.g.pick(gateway.g.routes.models["mock"], "default", ()) is not None
        for held in kept:
            held.close()

    run(work)


def test_none_can_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "CONNECT_SECONDS", 0.1)

    async def work() -> None:
        kept, port = swallowing()
        away = ReplicaRoute(id="rep_away", host="127.0.0.1", port=port, slots=8)
        gone = a_replica(tmp_path / "nothing.sock", "rep_gone")
        async with running(tmp_path, a_route("mock", away, gone)) as gateway:
            for _ in range(4):
                begun = time.monotonic()
                answer = await ask(gateway, chat("n=1"))
                assert (answer.status, answer.code) == (503, "no_replica")
                assert 0 < int(answer.headers["retry-after"]) <= 5
                assert time.monotonic() - begun < 2
        for held in kept:
            held.close()

    run(work)


def test_all_were_out_and_one_is_back(tmp_path: Path) -> None:
    """As after a crash of a node: no half minute of refusals, and one try a second at most."""

    async def work() -> None:
        path = socket_path(tmp_path)
        async with running(tmp_path, a_route("mock", a_replica(path, "rep_only"))) as gateway:
            replica = gateway.g.routes.replicas["rep_only"]
            while not replica.out_until_ns:
                assert (await ask(gateway, chat("n=1"))).code == "no_replica"
            async with MockServer(path) as mock:
                answer = await ask(gateway, chat("n=1"))
                assert (answer.status, answer.headers["retry-after"]) == (503, "2")
                assert not mock.requests
                replica.out_until_ns -= RETRY_NS
                assert (await ask(gateway, chat("n=1"))).status == 200
                assert not replica.out_until_ns
                assert gateway.g.gauge().ejected == ()

    run(work)


def test_who_waits_for_a_model_that_is_taken_away(tmp_path: Path) -> None:
    async def work() -> None:
        other = a_route("other", a_replica(tmp_path / "other.sock", "rep_other"))
        async with running(tmp_path, a_route("mock"), other) as gateway:
            waits = asyncio.ensure_future(ask(gateway, chat("n=1")))
            await until(lambda: gateway.g.gauge().waiting == {"mock": 1})
            gateway.publish(other)
            answer = await asyncio.wait_for(waits, 2)
            assert (answer.status, answer.code) == (404, "model_not_found")
            assert gateway.g.gauge().waiting == {}

    run(work)


def test_a_replica_leaves_under_load(tmp_path: Path) -> None:
    """It ends what it has, gets nothing new, is reported until it is empty, and its connections
    close with its last request."""

    async def work() -> None:
        paths = [socket_path(tmp_path, name) for name in ("one", "two")]
        leaves, stays = (a_replica(path, path[-8:-5]) for path in paths)
        async with (
            MockServer(paths[0]) as one,
            MockServer(paths[1]) as two,
            running(tmp_path, a_route("mock", leaves)) as gateway,
        ):
            # An idle connection beside the busy ones.
            await asyncio.gather(*[ask(gateway, chat("n=1 silent=0.2")) for _ in range(5)])
            streams = [
                asyncio.ensure_future(ask(gateway, chat("n=30 delay=0.01", stream=True)))
                for _ in range(3)
            ]
            await until(lambda: one.open == 3)
            assert one.stats()["connections"] == 5
            gateway.publish(a_route("mock", leaves, stays))
            gateway.publish(a_route("mock", stays))
            assert gateway.g.gauge().in_flight["one"] == 3
            await until(lambda: one.stats()["connections"] == 3)
            answers = await asyncio.gather(*[ask(gateway, chat("n=1")) for _ in range(5)])
            assert [answer.status for answer in answers] == [200] * 5
            assert len(two.requests) == 5
            for answer in await asyncio.gather(*streams):
                assert answer.events()[-1] == b"[DONE]"
            await until(lambda: one.stats()["connections"] == 0)
            assert "one" not in gateway.g.gauge().in_flight
            assert len(one.requests) == 8

    run(work)


def test_a_reader_that_stalls_holds_its_engine_back(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path), max_output=200_000, context=1 << 20)
        async with (
            MockServer(path) as mock,
            running(tmp_path, route) as gateway,
            Client(gateway.port) as client,
        ):
            client.writer.transport.pause_reading()
            client.post(chat("n=60000", stream=True))
            client.post(chat("n=2"))
            made = -1
            while made != mock.made or not made:
                made = mock.made
                await asyncio.sleep(0.2)
            assert 0 < made < 60_000
            (connection,) = gateway.g.connections
            assert connection.t.get_write_buffer_size() < 2 << 20
            client.writer.transport.resume_reading()
            answer = await client.answer()
            assert answer.events()[-1] == b"[DONE]"
            assert mock.made == 60_000
            assert (await client.answer()).json()["usage"]["completion_tokens"] == 2

    run(work)


def test_several_gateways_on_one_port(tmp_path: Path) -> None:
    """Each takes its share of the connections; one that ends leaves the port to the others."""

    async def work() -> None:
        path = socket_path(tmp_path)
        with contextlib.ExitStack() as sockets:
            listening = []
            port = 0
            for _ in range(3):
                found = sockets.enter_context(socket.socket())
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                found.bind(("127.0.0.1", port))
                port = found.getsockname()[1]
                found.listen(100)
                listening.append(found)
            async with (
                MockServer(path),
                running(tmp_path, a_route("mock", a_replica(path))) as first,
            ):
                others = []
                for number, found in enumerate(listening):
                    orders = Orders(
                        name=f"gw-{number + 1}",
                        folder=os.fspath(first.folder),
                        socket_fd=found.detach(),
                    )
                    others.append(await begin(orders))
                for g, _, _ in others:
                    await until(lambda g=g: g.control.is_connected)
                gateway = Running(
                    first.g, port, first.server, first.granter, first.folder, first.publish
                )
                answers = await asyncio.gather(*[ask(gateway, chat("n=1")) for _ in range(60)])
                assert {answer.status for answer in answers} == {200}
                ids = {answer.headers["x-request-id"] for answer in answers}
                assert len(ids) == 60
                assert all(g.requests for g, _, _ in others)
                assert sum(g.requests for g, _, _ in others) == 60
                await drain(others[0][0], others[0][2])
                answers = await asyncio.gather(*[ask(gateway, chat("n=1")) for _ in range(20)])
                assert {answer.status for answer in answers} == {200}
                for g, _, server in others[1:]:
                    await drain(g, server)
                for g, _, _ in others:
                    for replica in g.routes.replicas.values():
                        replica.close_idle()

    run(work)


def test_a_secret_is_asked_of_every_request(tmp_path: Path) -> None:
    """On one connection each request stands for itself."""

    async def work() -> None:
        path = socket_path(tmp_path)
        async with (
            MockServer(path),
            running(tmp_path, a_route("mock", a_replica(path))) as gateway,
            Client(gateway.port) as client,
        ):
            for headers, status in (
                ({}, 200),
                ({"Authorization": ""}, 401),
                ({"Authorization": "Bearer sk-other"}, 401),
                ({"Authorization": "", "X-API-Key": SECRET}, 200),
                ({"Authorization": "", "authorization": f"bearer {SECRET}"}, 200),
            ):
                client.post(chat("n=1"), headers=headers)
                assert (await client.answer()).status == status

    run(work)
