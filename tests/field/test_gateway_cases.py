"""Field cases of the gateway, G1 to G7, through a gateway and a steerable model server."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from bench.gateway.alone import PRICES, Alone, Caller, a_route
from sublet.gateway import state
from sublet.gateway.purse import cost
from tests.gateway.mock_server import MockServer, mock_process
from tests.gateway.running import (
    SECRET,
    Client,
    a_replica,
    ask,
    chat,
    run,
    running,
    serving,
    socket_path,
    until,
)

SUM = {
    "type": "function",
    "function": {"name": "get_a", "parameters": {"type": "object", "properties": {}}},
}


def chunked(*parts: bytes) -> bytes:
    head = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    return head + b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


class Scripted:
    """A model server that sends what it is told to, each part in a write of its own."""

    def __init__(self) -> None:
        self.parts: list[bytes] = []

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(size)
                for part in self.parts:
                    writer.write(part)
                    await writer.drain()
                    await asyncio.sleep(0.0005)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


def test_g1_no_character_is_torn(tmp_path: Path) -> None:
    """Cut after each byte in turn, then byte by byte: the engine's bytes, and the same bill."""
    said = "渐😀"
    event = json.dumps(
        {"choices": [{"index": 0, "delta": {"content": said}}]}, ensure_ascii=False
    ).encode()
    data = [
        b"data: " + event.replace(b": ", b":").replace(b", ", b",") + b"\n\n",
        b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\n',
        b"data: [DONE]\n\n",
    ]
    stream = chunked(*data)
    begin = stream.index(b"data: ")

    async def work() -> None:
        path = socket_path(tmp_path)
        engine = Scripted()
        async with (
            serving(engine.talk, path),
            running(tmp_path, a_route("mock", a_replica(path))) as gateway,
        ):
            scripts = [[stream[:at], stream[at:]] for at in range(begin, begin + len(data[0]) + 8)]
            scripts.append([stream[:begin], *[bytes([byte]) for byte in stream[begin:]]])
            for script in scripts:
                engine.parts = script
                answer = await ask(gateway, chat("hello", stream=True))
                assert answer.text() == said
                assert "\ufffd" not in answer.body.decode()
                assert answer.events()[-1] == b"[DONE]"
            bills = {(row.input_uncached, row.output, row.micros) for row in gateway.rows()}
            assert bills == {(3, 2, cost(PRICES["default"], 3, 0, 2))}

    run(work)


def test_g2_comments_silence_and_keep_alive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """15 s of silence stand for 0.3 s here: 200 with the first keep-alive, a second one, the chunk."""
    monkeypatch.setattr(state, "SILENCE_NS", 300_000_000)

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path))
        async with (
            MockServer(path),
            running(tmp_path, route, tick=0.02) as gateway,
            Client(gateway.port) as client,
        ):
            loop = asyncio.get_running_loop()
            begun = loop.time()
            client.post(chat("n=1 comments=9 pause=0.8", stream=True))
            status, headers = await client.head()
            assert status == 200
            assert 0.2 < loop.time() - begun < 0.6
            assert headers["content-type"] == "text/event-stream"
            assert headers["cache-control"] == "no-cache"
            assert headers["x-accel-buffering"] == "no"
            pieces = [piece async for piece in client.pieces()]
            assert pieces[:2] == [b": keep-alive\n\n"] * 2
            assert all(piece.endswith(b"\n\n") for piece in pieces)
            body = b"".join(pieces)
            assert b"busy" not in body
            assert body.count(b" w0") == 1
            assert body.endswith(b"data: [DONE]\n\n")
            # What is refused is never behind a 200.
            client.post(chat("n=1", stream=True, temperature="hot"))
            assert (await client.answer()).status == 400

    run(work)


@pytest.mark.parametrize("path_of_api", ["/v1/chat/completions", "/v1/messages"])
def test_g3_the_engine_dies(tmp_path: Path, path_of_api: str) -> None:
    """After the first byte: an error event, no end mark, closed, billed so far. Before it: another
    replica, else 503. Here with a gateway in a process of its own."""
    paths = [socket_path(tmp_path, name) for name in ("one", "two")]
    routes = [
        a_route("mock", a_replica(paths[0], "rep_one")),
        a_route("pair", a_replica(paths[0], "rep_one"), a_replica(paths[1], "rep_two")),
    ]
    caller = Caller(secret=SECRET, id="key_test")

    async def work(gateway: Alone) -> None:
        async def one(words: str, model: str = "mock") -> Any:
            async with Client(gateway.port) as client:
                body = {**chat(words, stream=True), "model": model, "max_tokens": 50}
                client.post(body, path_of_api)
                answer = await client.answer()
                assert answer.headers.get("retry-after", "5") <= "5"
                assert answer.status != 200 or await client.is_closed()
                return answer

        answer = await one("n=20 die=3 prompt=9")
        assert answer.status == 200
        last = json.loads(answer.events()[-1])
        assert last["error"]["code"] == "stream_interrupted"
        assert b"[DONE]" not in answer.body
        assert b"message_stop" not in answer.body
        assert b'"finish_reason":"stop"' not in answer.body
        assert ("/messages" in path_of_api) is (b"event: error" in answer.body)
        for model in ("mock", "pair"):
            answer = await one("n=20 die=0", model)
            assert answer.status == 503

    with (
        mock_process(paths[0]),
        mock_process(paths[1]),
        Alone(tmp_path / "gateway", models=routes, callers=[caller]) as gateway,
    ):
        run(lambda: work(gateway))
        gateway.stop()
        (epoch,) = gateway.epochs()
        rows = list(gateway.events(epoch))
    assert [row.outcome for row in rows] == ["interrupted", "failed", "failed"]
    assert (rows[0].input_uncached, rows[0].output) == (9, 3)
    assert [row.micros for row in rows] == [cost(PRICES["default"], 9, 0, 3), 0, 0]


@pytest.mark.parametrize("is_stream", [False, True])
def test_g4_counts_are_told_once(tmp_path: Path, is_stream: bool) -> None:
    """OpenAI's prompt holds what was cached, Anthropic's stands beside it; the bill is the same."""

    async def work() -> None:
        path = socket_path(tmp_path)
        route = a_route("mock", a_replica(path), context=16_384)
        async with MockServer(path), running(tmp_path, route) as gateway:
            words = "n=47 prompt=4742 usage=cached " + "x" * 5000
            answer = await ask(
                gateway,
                chat(words, stream=is_stream)
                | ({"stream_options": {"include_usage": True}} if is_stream else {}),
            )
            told = json.loads(answer.events()[-2]) if is_stream else answer.json()
            usage = told["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4742, 47)
            assert usage["prompt_tokens_details"]["cached_tokens"] == 2371
            answer = await ask(
                gateway, {**chat(words, stream=is_stream), "max_tokens": 60}, "/v1/messages"
            )
            if is_stream:
                events = [json.loads(event) for event in answer.events()]
                usage = next(e for e in events if e["type"] == "message_delta")["usage"]
            else:
                usage = answer.json()["usage"]
            assert (usage["input_tokens"], usage["cache_read_input_tokens"]) == (2371, 2371)
            assert usage["output_tokens"] == 47
            await ask(gateway, chat("n=2 prompt=10 usage=over", stream=is_stream))
            rows = gateway.rows()
            for row in rows[:2]:
                assert (row.input_uncached, row.cache_read, row.output) == (2371, 2371, 47)
            assert (rows[2].input_uncached, rows[2].cache_read) == (0, 10)
            assert [row.is_inconsistent for row in rows] == [False, False, True]

    run(work)


def test_g5_a_cap_by_either_name(tmp_path: Path) -> None:
    async def work() -> None:
        path = socket_path(tmp_path)
        async with (
            MockServer(path) as mock,
            running(tmp_path, a_route("mock", a_replica(path))) as gateway,
        ):
            for caps in ({"max_completion_tokens": 5}, {"max_tokens": 5}):
                for is_stream in (False, True):
                    async with Client(gateway.port) as client:
                        client.post(chat("n=50 delay=0.01", stream=is_stream, **caps))
                        await until(lambda: gateway.g.open)
                        # The hold is for no more than the cap.
                        assert gateway.purse.held_tokens < 600
                        answer = await client.answer()
                    whole = answer.events()[-2] if is_stream else answer.body
                    assert b'"finish_reason":"length"' in whole
                    row = gateway.rows()[-1]
                    assert row.output == 5
            assert mock.made == 20
            answer = await ask(gateway, chat("n=50", max_completion_tokens=5, max_tokens=9))
            assert (answer.status, answer.json()["error"]["param"]) == (400, "max_tokens")
            answer = await ask(gateway, chat("n=50", best_of=3))
            assert (answer.status, answer.json()["error"]["param"]) == (400, "best_of")

    run(work)


def test_g6_too_long_a_prompt(tmp_path: Path) -> None:
    """400 with the numbers, nothing billed, the hold released, nobody else asked."""

    async def work() -> None:
        paths = [socket_path(tmp_path, name) for name in ("one", "two")]
        route = a_route(
            "mock",
            a_replica(paths[0], "rep_one"),
            a_replica(paths[1], "rep_two"),
            context=512,
            max_output=512,
        )
        async with (
            MockServer(paths[0]) as one,
            MockServer(paths[1]) as two,
            running(tmp_path, route) as gateway,
        ):
            words = "prompt=500 " + "x" * 500
            answer = await ask(gateway, chat(words, max_tokens=100))
            assert (answer.status, answer.code) == (400, "context_length_exceeded")
            error = answer.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert all(number in error["message"] for number in ("512", "500", "100"))
            answer = await ask(gateway, chat("prompt=600 status=context"))
            assert (answer.status, answer.code) == (400, "context_length_exceeded")
            assert "600" in answer.json()["error"]["message"]
            answer = await ask(gateway, chat(words, max_tokens=100), "/v1/messages")
            assert "500 + 100 > 512" in answer.json()["error"]["message"]
            assert sum(len(found) for mock in (one, two) for found in mock.requests.values()) == 1
            assert [row.micros for row in gateway.rows() if row.micros] == []

    run(work)


def test_g7_parallel_calls_without_index(tmp_path: Path) -> None:
    calls = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in (("get_a", '{"x":1}'), ("get_b", '{"x":2}'))
    ]
    frame = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "mock"}

    def event(**fields: Any) -> bytes:
        return b"data: " + json.dumps({**frame, **fields}).encode() + b"\n\n"

    parts = [
        event(choices=[{"index": 0, "delta": {"tool_calls": calls}, "finish_reason": None}]),
        event(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
        event(choices=[], usage={"prompt_tokens": 5, "completion_tokens": 9}),
        b"data: [DONE]\n\n",
    ]

    async def work() -> None:
        path = socket_path(tmp_path)
        engine = Scripted()
        engine.parts = [chunked(*parts)]
        async with (
            serving(engine.talk, path),
            running(tmp_path, a_route("mock", a_replica(path))) as gateway,
        ):
            other = {**SUM, "function": {**SUM["function"], "name": "get_b"}}
            answer = await ask(gateway, chat("hello", stream=True, tools=[SUM, other]))
            found: dict[int, dict[str, str]] = {}
            reasons = []
            for piece in answer.events()[:-1]:
                for choice in json.loads(piece)["choices"]:
                    reasons.append(choice["finish_reason"])
                    for call in choice["delta"].get("tool_calls", []):
                        kept = found.setdefault(call["index"], {"id": "", "name": "", "args": ""})
                        kept["id"] += call.get("id", "")
                        kept["name"] += call["function"].get("name", "")
                        kept["args"] += call["function"]["arguments"]
            assert [found[index]["name"] for index in (0, 1)] == ["get_a", "get_b"]
            assert [json.loads(found[index]["args"]) for index in (0, 1)] == [{"x": 1}, {"x": 2}]
            assert found[0]["id"] != found[1]["id"]
            assert reasons[-1] == "tool_calls"
            assert set(reasons[:-1]) <= {None}
            row = await gateway.row()
            assert (row.input_uncached, row.output) == (5, 9)

    run(work)
