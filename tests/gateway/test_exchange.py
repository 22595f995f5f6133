"""One request to its settled row: holds, top-ups, bills, queues, streams cut at every byte."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from bench.gateway.alone import PRICES, Caller, a_route
from sublet.base.kernel.clock import read_boot_ns
from sublet.gateway import exchange, state
from sublet.gateway.exchange import STEP_TOKENS
from sublet.gateway.purse import cost
from tests.gateway.mock_server import MockServer
from tests.gateway.running import (
    CALLER,
    CHAT,
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
    until,
)

PRICE = PRICES["default"]


def a_caller(credit: int) -> Caller:
    return Caller(secret=SECRET, id="key_test", credit_micros=credit)


async def held_for(gateway: Running, words: str) -> int:
    """What the input of this prompt is held at."""
    async with Client(gateway.port) as client:
        client.post(chat(words + " delay=0.2", max_tokens=1))
        await until(lambda: gateway.g.open)
        held = gateway.purse.held - cost(PRICE, 0, 0, 1)
        await client.answer()
    await until(lambda: not gateway.g.open)
    return held


async def give_back(gateway: Running) -> None:
    """What was granted ahead is not there any more."""
    purse = gateway.purse
    gateway.g.control.ask(purse._give_back(read_boot_ns()))
    await until(lambda: purse.granted == purse.spent and not purse._asked_serial)


def test_a_stream_is_topped_up_ahead_and_billed_as_counted(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        async with MockServer(path), running(tmp_path, a_route("mock", a_replica(path))) as gateway:
            answer = await ask(
                gateway,
                chat("n=900 prompt=20", stream=True, stream_options={"include_usage": True}),
            )
            events = answer.events()
            assert json.loads(events[-2])["usage"]["completion_tokens"] == 900
            assert events[-1] == b"[DONE]"
            assert b"timings" not in answer.body
            assert json.loads(events[0])["service_tier"] == "default"
            assert answer.headers["content-type"] == "text/event-stream"
            assert answer.headers["cache-control"] == "no-cache"
            assert answer.headers["x-accel-buffering"] == "no"
            row = await gateway.row()
            assert (row.input_uncached, row.output, row.made) == (20, 900, 900)
            assert row.micros == cost(PRICE, 20, 0, 900)
            assert row.id == answer.headers["x-request-id"]

    run(work)


@pytest.mark.parametrize("is_stream", [False, True])
def test_never_more_than_was_held(tmp_path: Path, is_stream: bool) -> None:
    """The engine counts more than it was asked for, or cached more than there was."""

    async def work() -> None:
        path = socket_path(tmp_path)
        async with MockServer(path), running(tmp_path, a_route("mock", a_replica(path))) as gateway:
            assert (
                await ask(gateway, chat("n=8 usage=lie", max_tokens=8, stream=is_stream))
            ).status == 200
            row = await gateway.row()
            assert (row.output, row.made) == (8, 9)
            await ask(gateway, chat("n=2 prompt=100000 usage=over", max_tokens=2, stream=is_stream))
            await until(lambda: len(gateway.rows()) == 2)
            row = gateway.rows()[-1]
            assert row.is_inconsistent
            assert row.input_uncached + row.cache_read < 1000
            assert row.micros <= cost(PRICE, 1000, 0, 2)

    run(work)


@pytest.mark.parametrize("surface", ["chat", "completions"])
def test_no_count_at_all_is_marked(tmp_path: Path, surface: str) -> None:
    """What was made is counted by its texts."""
    words = "n=5 usage=none delay=0.005"
    body = chat(words) if surface == "chat" else {"model": "mock", "prompt": words}
    to = CHAT if surface == "chat" else "/v1/completions"

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path), counters="")
        async with MockServer(path), running(tmp_path, route) as gateway:
            answer = await ask(gateway, {**body, "stream": True}, to)
            assert answer.events()[-1] == b"[DONE]"
            row = await gateway.row()
            assert (row.input_uncached, row.output, row.is_inconsistent) == (0, 5, True)

    run(work)


def test_out_of_credit(tmp_path: Path) -> None:
    """What is affordable is served to the last micro; then 402; nothing is overspent."""

    async def work() -> None:
        path = socket_path(tmp_path)
        caller = a_caller(10**9)
        route = a_route("mock", a_replica(path))
        async with MockServer(path), running(tmp_path, route, callers=[caller]) as gateway:
            for_input = await held_for(gateway, "n=1 prompt=3")
            # From here on: for the input and some twelve tokens.
            object.__setattr__(
                caller, "credit_micros", gateway.purse.spent + for_input + cost(PRICE, 0, 0, 12)
            )
            await give_back(gateway)
            answer = await ask(gateway, chat("n=500 prompt=3 delay=0", max_tokens=400))
            assert answer.status == 200
            choice = answer.json()["choices"][0]
            assert choice["finish_reason"] == "length"
            made = answer.json()["usage"]["completion_tokens"]
            assert 8 <= made <= 12
            left = caller.credit_micros - gateway.purse.spent
            object.__setattr__(caller, "credit_micros", gateway.purse.spent + min(left, 2))
            await asyncio.sleep(1.1)  # As long as a denial is believed.
            answer = await ask(gateway, chat("n=500 prompt=3", max_tokens=400))
            assert (answer.status, answer.code) == (402, "insufficient_quota")
            assert answer.json()["error"]["type"] == "insufficient_quota"
            assert gateway.purse.spent <= caller.credit_micros

    run(work)


def test_a_stream_ends_where_its_credit_does(tmp_path: Path) -> None:
    """It delivers what it can hold for, says why it ends, and is billed for just that."""

    async def work() -> None:
        path = socket_path(tmp_path)
        caller = a_caller(10**9)
        route = a_route("mock", a_replica(path))
        async with MockServer(path) as mock, running(tmp_path, route, callers=[caller]) as gateway:
            for_input = await held_for(gateway, "n=900 prompt=3 delay=0.001")
            before = gateway.purse.spent
            object.__setattr__(
                caller, "credit_micros", before + for_input + cost(PRICE, 0, 0, STEP_TOKENS + 50)
            )
            await give_back(gateway)
            answer = await ask(gateway, chat("n=900 prompt=3 delay=0.001", stream=True))
            last = json.loads(answer.events()[-1])
            assert last["error"]["code"] == "credit_exhausted"
            await until(lambda: not mock.open)
            row = gateway.rows()[-1]
            assert row.outcome == "credit_exhausted"
            assert STEP_TOKENS < row.output < STEP_TOKENS + 200
            assert row.made - row.output <= 5
            assert gateway.purse.spent <= caller.credit_micros

    run(work)


def test_less_than_was_asked_for_is_not_the_last_word(tmp_path: Path) -> None:
    """With several gateways a grant may be a part of what is left, and no denial."""

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path))
        async with MockServer(path), running(tmp_path, route) as gateway:
            real = gateway.granter._answer
            asked = 0

            def in_parts(name: str, request: object) -> object:
                nonlocal asked
                asked += 1
                found = gateway.granter._slices.setdefault(
                    (name, gateway.g.epoch, CALLER.id), [0, 0]
                )
                before = found[0]
                answer = real(name, request)  # type: ignore[arg-type]
                if asked < 6:
                    found[0] = min(found[0], before + 1)
                    object.__setattr__(answer, "granted_micros", found[0])
                return answer

            gateway.granter._answer = in_parts  # type: ignore[method-assign, assignment]
            assert (await ask(gateway, chat("n=3"))).status == 200
            assert asked >= 6

    run(work)


def test_nobody_answers_for_the_credit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "ALLOWANCE_SECONDS", 0.1)

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path))
        async with MockServer(path), running(tmp_path, route) as gateway:
            gateway.granter.close()
            await until(lambda: not gateway.g.control.is_connected)
            answer = await ask(gateway, chat("n=3"))
            assert (answer.status, answer.code) == (503, "credit_unknown")
            assert answer.headers["retry-after"] == "2"
            gateway.granter.open()
            await until(lambda: gateway.g.control.is_connected)
            assert (await ask(gateway, chat("n=3"))).status == 200
            assert len(gateway.rows()) == 1

    run(work)


def test_a_charge_is_given_back(tmp_path: Path) -> None:
    """Of tokens a minute, what was not used; all of it where nothing was served."""

    async def work() -> None:
        path = socket_path(tmp_path)
        routes = a_route("mock", a_replica(path)), a_route("full", a_replica(path), queue_length=0)
        async with MockServer(path), running(tmp_path, *routes) as gateway:
            known = gateway.g.routes.find_key(SECRET.encode())
            assert known is not None
            bucket = known.token_buckets[0]
            bucket.resize(100_000, 1)
            gateway.g.routes.models["full"].replicas[0].slots = 0
            await ask(gateway, {**chat("n=4 prompt=6"), "model": "full"})
            assert bucket.remaining(read_boot_ns()) == 100_000
            await ask(gateway, chat("n=4 prompt=6"))
            assert bucket.remaining(read_boot_ns()) >= 100_000 - 10

    run(work)


def test_tiers_are_told_and_billed(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path, is_filler=True))
        async with MockServer(path), running(tmp_path, route) as gateway:
            for tier in ("default", "flex", "auto"):
                answer = await ask(gateway, chat("n=100 prompt=50", service_tier=tier))
                served = "flex" if tier == "flex" else "default"
                assert answer.json()["service_tier"] == served
                assert answer.headers["x-sublet-tier"] == served
                row = gateway.rows()[-1]
                assert (row.tier, row.micros) == (served, cost(PRICES[served], 50, 0, 100))

    run(work)


def test_the_queue(tmp_path: Path) -> None:
    """Default before flex, flex on filler only, a bound in length and in time."""

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route(
            "mock",
            a_replica(path, "rep_firm", slots=1),
            a_replica(path, "rep_filler", slots=1, is_filler=True),
            queue_seconds=5,
            queue_length=3,
        )
        async with MockServer(path), running(tmp_path, route) as gateway:
            model = gateway.g.routes.models["mock"]
            done: list[str] = []

            async def one(name: str, words: str, tier: str) -> Answer:
                answer = await ask(gateway, chat(words, service_tier=tier))
                done.append(name)
                return answer

            works = []
            for name, tier in (("a", "flex"), ("b", "default"), ("c", "flex"), ("d", "default")):
                works.append(asyncio.ensure_future(one(name, "n=10 delay=0.01", tier)))
                await until(lambda: len(gateway.g.open) + len(model.waiting) == len(works))
            assert len(model.waiting) == 2
            works.append(asyncio.ensure_future(one("e", "n=1", "flex")))
            await until(lambda: len(model.waiting) == 3)
            answer = await ask(gateway, chat("n=1"))
            assert (answer.status, answer.code) == (503, "model_overloaded")
            assert int(answer.headers["retry-after"]) <= 5
            for answer in await asyncio.gather(*works):
                assert answer.status == 200
            assert done.index("d") < done.index("e")
            flex = [row for row in gateway.rows() if row.tier == "flex"]
            assert {row.replica_id for row in flex} == {"rep_filler"}

    run(work)


def test_waiting_has_an_end_and_a_replica_may_come(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        cold = a_route("mock", queue_seconds=1)
        async with MockServer(path), running(tmp_path, cold) as gateway:
            answer = await ask(gateway, chat("n=1"))
            assert (answer.status, answer.code) == (503, "no_replica")
            waiting = asyncio.ensure_future(ask(gateway, chat("n=1")))
            await until(lambda: gateway.g.routes.models["mock"].waiting)
            gateway.publish(a_route("mock", a_replica(path)))
            assert (await waiting).status == 200

    run(work)


def test_legs(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        async with MockServer(path), running(tmp_path, a_route("mock", a_replica(path))) as gateway:
            answer = await ask(gateway, chat("n=5 prompt=10", n=3))
            assert [choice["index"] for choice in answer.json()["choices"]] == [0, 1, 2]
            row = await gateway.row()
            assert (row.input_uncached, row.output) == (10, 15)
            answer = await ask(gateway, chat("n=5 prompt=10", n=3, stream=True))
            assert answer.events()[-1] == b"[DONE]"
            row = gateway.rows()[-1]
            assert (row.input_uncached, row.output) == (10, 15)
            answer = await ask(gateway, chat("status=500", n=2))
            assert answer.status == 503
            answer = await ask(gateway, chat("n=9 die=4 delay=0.01", n=2, stream=True))
            assert json.loads(answer.events()[-1])["error"]["code"] == "stream_interrupted"

    run(work)


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ("n=2 comments=2 prompt=5", {}),
        ("n=2 text=trap prompt=5", {"stream_options": {"include_usage": True}}),
        ("n=1 calls=1 prompt=5", {"tools": [{"type": "function", "function": {"name": "get_0"}}]}),
    ],
    ids=["comments", "traps", "parsed"],
)
def test_a_stream_cut_at_every_byte(tmp_path: Path, words: str, fields: dict[str, object]) -> None:
    """However the engine's bytes arrive, the client gets the same, and the bill is the same."""

    async def work() -> None:
        path = socket_path(tmp_path)
        async with MockServer(path), running(tmp_path, a_route("mock", a_replica(path))) as gateway:
            whole = await ask(gateway, chat(words, stream=True, **fields))
            assert whole.events()[-1] == b"[DONE]"
            assert b": busy" not in whole.body
            gate = asyncio.Semaphore(24)

            async def cut(at: int) -> None:
                async with gate:
                    answer = await ask(gateway, chat(f"{words} cut={at}", stream=True, **fields))
                    assert answer.body == whole.body, at

            await asyncio.gather(*[cut(at) for at in range(1, len(whole.body) + 900)])
            by_byte = await ask(gateway, chat(words + " split=each", stream=True, **fields))
            assert by_byte.body == whole.body
            rows = gateway.rows()
            assert {(row.output, row.outcome) for row in rows} == {(rows[0].output, "ok")}

    run(work)


def test_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that would not be told anything hears that its request lives."""
    monkeypatch.setattr(state, "SILENCE_NS", 150_000_000)

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path))
        async with MockServer(path), running(tmp_path, route, tick=0.02) as gateway:
            answer = await ask(gateway, chat("n=2 silent=0.5", stream=True))
            assert answer.body.startswith(b": keep-alive\n\n: keep-alive\n\n")
            assert answer.text() == " w0 w1"
            answer = await ask(
                gateway, {**chat("n=2 silent=0.4", stream=True), "max_tokens": 9}, "/v1/messages"
            )
            assert answer.body.startswith(b"event: ping\n")
            # No answer in one piece begins before its end.
            answer = await ask(gateway, chat("n=2 silent=0.4"))
            assert answer.json()["usage"]["completion_tokens"] == 2
            # An engine's error that comes behind the head is an error event.
            answer = await ask(gateway, chat("silent=0.4 status=400", stream=True))
            assert answer.status == 200
            assert "error" in json.loads(answer.events()[-1])

    run(work)


def test_a_fault_of_ours_releases_what_it_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path))
        async with MockServer(path), running(tmp_path, route) as gateway:
            await ask(gateway, chat("n=1"))
            with monkeypatch.context() as patch:
                patch.setattr(exchange, "request_head", lambda *_: 1 // 0)
                patch.setattr("sublet.gateway.edge.say", lambda *_, **__: None)
                answer = await ask(gateway, chat("n=1"))
            assert answer.status == 500
            assert (await ask(gateway, chat("n=1"))).status == 200

    run(work)
