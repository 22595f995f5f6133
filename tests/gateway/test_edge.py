"""The HTTP edge, what the wire tests of `fuzz` do not cover: versions, methods, refusals, ends."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.gateway.alone import Caller, a_route
from sublet.base.wire.gateway import ScopeLimits
from sublet.gateway import edge, process
from tests.gateway.mock_server import MockServer
from tests.gateway.running import (
    CHAT,
    SECRET,
    Client,
    a_replica,
    ask,
    chat,
    run,
    running,
    socket_path,
    until,
)


def test_old_clients_get_their_answers(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        async with MockServer(path), running(tmp_path, a_route("mock", a_replica(path))) as gateway:
            async with Client(gateway.port) as client:
                client.post(chat("n=3"), version="1.0", headers={"Connection": "keep-alive"})
                answer = await client.answer()
                assert answer.headers["connection"] == "keep-alive"
                assert answer.json()["usage"]["completion_tokens"] == 3
                # A stream has no end but the connection's.
                client.post(
                    chat("n=3", stream=True), version="1.0", headers={"Connection": "keep-alive"}
                )
                answer = await client.answer()
                assert answer.headers["connection"] == "close"
                assert "transfer-encoding" not in answer.headers
                assert answer.text() == " w0 w1 w2"
                assert answer.events()[-1] == b"[DONE]"
            answer = await ask(gateway, chat("n=1"), version="1.0", headers={"Host": ""})
            assert (answer.status, answer.headers["connection"]) == (200, "close")

    run(work)


def test_methods(tmp_path: Path) -> None:
    async def work() -> None:
        async with running(tmp_path, a_route("mock")) as gateway, Client(gateway.port) as client:
            client.get("/v1/models")
            listed = await client.answer()
            assert [model["id"] for model in listed.json()["data"]] == ["mock"]
            assert "x-ratelimit-remaining-tokens" in listed.headers
            client.get("/v1/models", method="HEAD")
            answer = await client.answer(is_head=True)
            assert answer.headers["content-length"] == str(len(listed.body))
            client.get(CHAT, method="HEAD")
            assert (await client.answer(is_head=True)).status == 405
            client.get(CHAT)
            answer = await client.answer()
            assert (answer.status, answer.code) == (405, "method_not_allowed")
            assert answer.headers["allow"] == "POST, OPTIONS"
            client.get(CHAT, method="OPTIONS")
            answer = await client.answer()
            assert (answer.status, answer.headers["allow"]) == (204, "POST, OPTIONS")
            client.get("http://elsewhere.example/v1/models?limit=20")
            assert (await client.answer()).body == listed.body
            client.get("/v1/responses")
            assert (await client.answer()).code == "unsupported_surface"
            client.get("/nothing")
            answer = await client.answer()
            assert answer.code == "unknown_url"
            assert answer.headers["x-request-id"].startswith("req_")

    run(work)


def test_a_pipeline_with_a_refusal_in_the_middle(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        async with (
            MockServer(path),
            running(tmp_path, a_route("mock", a_replica(path))) as gateway,
            Client(gateway.port) as client,
        ):
            for body in (chat("n=2 delay=0.01"), b"{", {"model": "none"}, chat("n=4", stream=True)):
                client.post(body)
            client.get("/health")
            client.post(chat("n=5"))
            answers = [await client.answer() for _ in range(6)]
            assert [answer.status for answer in answers] == [200, 400, 404, 200, 200, 200]
            assert answers[1].code == "invalid_json"
            # A key that is known is told its limits with every answer.
            assert answers[1].headers["x-ratelimit-remaining-requests"]
            assert answers[3].text() == " w0 w1 w2 w3"
            assert answers[5].json()["usage"]["completion_tokens"] == 5

    run(work)


def test_what_is_too_large_is_refused_as_its_client_expects(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        async with (
            MockServer(path),
            running(tmp_path, a_route("mock", a_replica(path)), body_limit=200_000) as gateway,
        ):
            body = json.dumps(chat("n=1 " + "x" * 250_000)).encode()
            answer = await ask(gateway, body)
            assert (answer.status, answer.code) == (413, "request_too_large")
            assert answer.headers["connection"] == "close"
            answer = await ask(gateway, body, "/v1/messages")
            assert answer.json()["type"] == "error"
            # Before a byte of it was sent, and without a word to go on.
            async with Client(gateway.port) as client:
                client.post(
                    b"", headers={"Expect": "100-continue", "Content-Length": str(len(body))}
                )
                assert (await client.answer()).code == "request_too_large"
            async with Client(gateway.port) as client:
                client.post(b"", headers={"Transfer-Encoding": "chunked", "Content-Length": ""})
                client.writer.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
                assert (await client.answer()).code == "request_too_large"
            fits = json.dumps(chat("n=1 " + "x" * 150_000)).encode()
            assert (await ask(gateway, fits)).status == 200
            # A stranger's large body is not collected.
            async with Client(gateway.port) as client:
                client.post(b"{", headers={"Authorization": "", "Content-Length": "150000"})
                assert (await client.answer()).code == "invalid_api_key"

    run(work)


def test_go_on_is_said_when_its_turn_comes(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        async with (
            MockServer(path),
            running(tmp_path, a_route("mock", a_replica(path))) as gateway,
            Client(gateway.port) as client,
        ):
            client.post(chat("n=2 delay=0.02"))
            body = json.dumps(chat("n=7")).encode()
            client.post(b"", headers={"Expect": "100-continue", "Content-Length": str(len(body))})
            assert (await client.answer()).status == 200
            status, _ = await client.head()
            assert status == 100
            client.writer.write(body)
            assert (await client.answer()).json()["usage"]["completion_tokens"] == 7

    run(work)


def test_who_keeps_it_waiting_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_NS", "BODY_NS", "IDLE_NS", "LINGER_NS", "STALL_NS"):
        monkeypatch.setattr(edge, name, 100_000_000)

    async def work() -> None:
        path = socket_path(tmp_path)
        async with (
            MockServer(path) as mock,
            running(
                tmp_path, a_route("mock", a_replica(path), max_output=200_000, context=1 << 20)
            ) as gateway,
        ):
            halves = (
                b"",
                b"POST /v1/ch",
                b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{",
            )
            for half in halves:
                async with Client(gateway.port) as client:
                    client.writer.write(half)
                    assert await client.is_closed()
            # Refused, and it will not go: after a while it is shown out.
            async with Client(gateway.port) as client:
                client.post(b"x" * 10, headers={"Content-Length": "100", "Authorization": ""})
                client.post(b"")
                await until(lambda: not gateway.g.connections)
            # It asks for much and reads nothing.
            async with Client(gateway.port) as client:
                client.writer.transport.pause_reading()
                client.post(chat("n=100000", stream=True))
                await until(lambda: mock.open)
                await until(lambda: not gateway.g.connections)
                await until(lambda: not mock.open)
                assert mock.made < 100_000

    run(work)


def test_half_closed_is_gone(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        async with (
            MockServer(path) as mock,
            running(tmp_path, a_route("mock", a_replica(path))) as gateway,
        ):
            async with Client(gateway.port) as client:
                client.post(chat("n=500 delay=0.01", stream=True))
                await client.head()
                client.writer.write_eof()
                await until(lambda: not mock.open)
            row = await gateway.row()
            assert row.outcome == "client_gone"
            # What was written before is sent all the same.
            async with Client(gateway.port) as client:
                client.get("/health")
                client.writer.write_eof()
                assert (await client.answer()).status == 200

    run(work)


def test_limits_are_told_and_kept(tmp_path: Path) -> None:
    caller = Caller(secret=SECRET, id="key_test", limits=ScopeLimits(requests_per_minute=2))

    async def work() -> None:
        path = socket_path(tmp_path)
        async with (
            MockServer(path),
            running(tmp_path, a_route("mock", a_replica(path)), callers=[caller]) as gateway,
        ):
            left = []
            for _ in range(3):
                answer = await ask(gateway, chat("n=1"))
                left.append((answer.status, answer.headers["x-ratelimit-remaining-requests"]))
            assert left == [(200, "1"), (200, "0"), (429, "0")]
            assert 1 <= int(answer.headers["retry-after"]) <= 30
            assert "x-ratelimit-limit-tokens" not in answer.headers

    run(work)


def test_a_stale_snapshot_sells_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path))
        async with MockServer(path), running(tmp_path, route) as gateway:
            async with Client(gateway.port) as client:
                client.get("/health")
                assert (await client.answer()).json()["ok"] is True
            gateway.g.fresh_ns -= gateway.g.stale_ns  # None has come for so long.
            answer = await ask(gateway, chat("n=1"))
            assert (answer.status, answer.code) == (503, "snapshot_stale")
            assert int(answer.headers["retry-after"]) <= 5
            async with Client(gateway.port) as client:
                client.get("/health")
                answer = await client.answer()
                assert (answer.status, answer.json()["is_snapshot_old"]) == (503, True)
            gateway.publish(route)
            assert (await ask(gateway, chat("n=1"))).status == 200

    run(work)


def test_its_metrics_are_such_as_prometheus_reads(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        async with (
            MockServer(path),
            running(tmp_path, a_route("mock", a_replica(path))) as gateway,
            Client(gateway.port) as client,
        ):
            for words in ("n=1", "n=1", "n=1 silent=0.1"):
                assert (await ask(gateway, chat(words))).status == 200
            assert (
                await ask(gateway, chat("n=1"), headers={"Authorization": "Bearer sk-x"})
            ).status == 401
            client.get("/metrics")
            page = (await client.answer()).body.decode()
        found = {family.name: family for family in text_string_to_metric_families(page)}
        assert found["sublet_gateway_requests"].samples[0].value == 3
        [refusal] = found["sublet_gateway_refusals"].samples
        assert (refusal.labels, refusal.value) == ({"code": "invalid_api_key"}, 1)
        waits = found["sublet_gateway_first_byte_seconds"]
        assert waits.type == "histogram"
        by_limit = {
            float(sample.labels["le"]): sample.value
            for sample in waits.samples
            if sample.name.endswith("_bucket")
        }
        assert list(by_limit) == sorted(by_limit)
        assert list(by_limit.values()) == sorted(by_limit.values())
        assert by_limit[0.064] <= 2
        assert by_limit[math.inf] == 3
        rest = {sample.name.rpartition("_")[2]: sample.value for sample in waits.samples}
        assert rest["count"] == 3
        assert rest["sum"] >= 0.1

    run(work)


def test_a_step_of_the_wall_clock_stops_nothing(tmp_path: Path) -> None:
    """The books slew after a step for hours: what they say is new when it comes, whatever we read
    on the wall."""

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path))
        async with MockServer(path), running(tmp_path, route) as gateway:
            for step_us in (-120_000_000, 300_000_000):
                made_us = gateway.g.now_us() + step_us
                gateway.publish(route, made_us=made_us)
                assert (await ask(gateway, chat("n=1"))).status == 200
                assert abs(gateway.g.now_us() - made_us) < 30_000_000

    run(work)


def test_the_end_of_a_gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be finished is; the rest is cut and billed; who waits is told."""
    monkeypatch.setattr(process, "DRAIN_SECONDS", 0.3)

    async def work() -> None:
        path = socket_path(tmp_path)
        routes = (
            a_route("mock", a_replica(path)),
            a_route("cold", queue_seconds=60),
        )
        async with MockServer(path), running(tmp_path, *routes) as gateway:
            clients = [Client(gateway.port) for _ in range(4)]
            for client in clients:
                await client.__aenter__()
            idle, short, long, queued = clients
            short.post(chat("n=10 delay=0.01", stream=True))
            long.post(chat("n=500 delay=0.01", stream=True))
            queued.post({**chat("n=1"), "model": "cold"})
            await until(
                lambda: len(gateway.g.open) == 2 and gateway.g.routes.models["cold"].waiting
            )
            ending = asyncio.ensure_future(process.drain(gateway.g, gateway.server))
            assert await idle.is_closed()
            assert (await short.answer()).events()[-1] == b"[DONE]"
            answer = await long.answer()
            assert json.loads(answer.events()[-1])["error"]["code"] == "stream_interrupted"
            assert (await queued.answer()).code == "unavailable"
            await ending
            assert not gateway.g.connections
            made = {row.outcome: row for row in gateway.rows()}
            assert made["ok"].output == 10
            assert 0 < made["interrupted"].output < 500
            for client in clients:
                client.abort()

    run(work)
