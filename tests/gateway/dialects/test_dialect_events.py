"""Streams that are parsed: tool calls, legs, log-probabilities, the Messages surface."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.gateway.dialects import Prepared
from sublet.gateway.dialects.tools import Calls

Read = Callable[..., Prepared]
HEAD = {"created": 1, "id": "chatcmpl-abc", "model": "smol", "object": "chat.completion.chunk"}
TOOL = {"type": "function", "function": {"name": "get_a"}}
DONE = b"data: [DONE]\n\n"
USAGE = {
    "completion_tokens": 3,
    "prompt_tokens": 36,
    "total_tokens": 39,
    "prompt_tokens_details": {"cached_tokens": 35},
}


def event(delta: dict[str, Any], finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, **more.pop("choice", {})}
    return b"data: %b\n\n" % orjson.dumps({"choices": [choice], **HEAD, **more})


def usage(**changes: Any) -> bytes:
    return b"data: %b\n\n" % orjson.dumps({"choices": [], **HEAD, "usage": {**USAGE, **changes}})


def timings(made: int, prompt: int = 1, cached: int = 35) -> dict[str, Any]:
    return {"timings": {"cache_n": cached, "prompt_n": prompt, "predicted_n": made}}


def told(data: bytes) -> list[Any]:
    """The events of an OpenAI stream, without the end mark, which must be there."""
    assert data.endswith(DONE)
    assert data.count(DONE) == 1
    return [orjson.loads(part[6:]) for part in data[: -len(DONE)].split(b"\n\n") if part]


def calls_of(events: list[Any]) -> dict[int, dict[str, Any]]:
    """As an SDK joins them: id and name may come once only."""
    calls: dict[int, dict[str, Any]] = {}
    for each in events:
        for choice in each["choices"]:
            for part in choice["delta"].get("tool_calls", []):
                if "id" in part:
                    assert part["index"] not in calls
                    assert part["type"] == "function"
                    calls[part["index"]] = {
                        "id": part["id"],
                        "name": part["function"]["name"],
                        "arguments": "",
                    }
                calls[part["index"]]["arguments"] += part["function"]["arguments"]
    return calls


def finishes(events: list[Any]) -> list[Any]:
    return [choice["finish_reason"] for each in events for choice in each["choices"]]


@pytest.fixture
def tool_stream(read: Read) -> Callable[..., list[Any]]:
    def run(*events: bytes) -> list[Any]:
        rewriter = read("chat", tools=[TOOL], stream=True).events("default", b"req_1")
        out = b"".join(rewriter.feed(one) for one in (*events, DONE))
        assert rewriter.is_done
        return told(out)

    return run


# ---- G7 ------------------------------------------------------------------------------------------


def test_g7_two_calls_without_index_in_one_chunk(tool_stream: Callable[..., list[Any]]) -> None:
    parts = [
        {"id": "a", "function": {"name": "get_a", "arguments": '{"x":1}'}},
        {"id": "b", "function": {"name": "get_b", "arguments": '{"x":2}'}},
    ]
    events = tool_stream(event({"role": "assistant", "tool_calls": parts}), event({}, "stop"))
    calls = calls_of(events)
    assert {index: (call["name"], call["arguments"]) for index, call in calls.items()} == {
        0: ("get_a", '{"x":1}'),
        1: ("get_b", '{"x":2}'),
    }
    assert finishes(events) == [None, "tool_calls"]


@pytest.mark.parametrize(
    "keys",
    [
        ("id", "name"),
        ("id",),
        ("name",),
        ("id", "name", "index"),
        ("name", "index"),
        ("id", "same"),
        (),
    ],
)
def test_g7_calls_are_told_apart_by_id_then_name_then_position(
    tool_stream: Callable[..., list[Any]], keys: tuple[str, ...]
) -> None:
    """Two calls in one chunk, and each continued in the next. `same`: one index for both."""

    def part(number: int, arguments: str, is_first: bool) -> dict[str, Any]:
        function: dict[str, Any] = {"arguments": arguments}
        if is_first or "name" in keys:
            function["name"] = f"get_{number}"
        out: dict[str, Any] = {"function": function}
        if "id" in keys:
            out["id"] = f"id{number}"
        if "index" in keys:
            out["index"] = number
        if "same" in keys:
            out["index"] = 0
        return out

    events = tool_stream(
        event({"tool_calls": [part(0, '{"x":', True), part(1, '{"y":', True)]}),
        event({"tool_calls": [part(0, "1}", False), part(1, "2}", False)]}),
        event({}, "tool_calls"),
    )
    calls = calls_of(events)
    found = [(call["name"], call["arguments"]) for _, call in sorted(calls.items())]
    assert found == [("get_0", '{"x":1}'), ("get_1", '{"y":2}')]
    assert len({call["id"] for call in calls.values()}) == 2


def test_g7_one_call_after_another_continued_without_any_name(
    tool_stream: Callable[..., list[Any]],
) -> None:
    events = tool_stream(
        event({"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": ""}}]}),
        event({"tool_calls": [{"function": {"arguments": '{"x"'}}]}),
        event({"tool_calls": [{"function": {"arguments": ":1}"}}]}),
        event({"tool_calls": [{"id": "b", "function": {"name": "f", "arguments": "{}"}}]}),
    )
    calls = calls_of(events)
    assert [call["arguments"] for call in calls.values()] == ['{"x":1}', "{}"]


def test_g7_the_same_function_called_twice_by_name_alone(
    tool_stream: Callable[..., list[Any]],
) -> None:
    one = {"function": {"name": "f", "arguments": '{"x":1}'}}
    two = {"function": {"name": "f", "arguments": '{"x":2}'}}
    calls = calls_of(tool_stream(event({"tool_calls": [one, two]})))
    assert [call["arguments"] for call in calls.values()] == ['{"x":1}', '{"x":2}']
    calls = calls_of(tool_stream(event({"tool_calls": [one]}), event({"tool_calls": [two]})))
    assert [call["arguments"] for call in calls.values()] == ['{"x":1}', '{"x":2}']


@pytest.mark.parametrize("reason", ["", "stop", "tool_calls"])
def test_g7_a_reason_on_each_chunk_is_told_once_at_the_end(
    tool_stream: Callable[..., list[Any]], reason: str
) -> None:
    call = {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}
    events = tool_stream(
        event({"role": "assistant", "content": "So"}, reason),
        event({"tool_calls": [call]}, reason),
        event({}, reason),
    )
    assert finishes(events) == [None, None, "tool_calls"]
    events = tool_stream(event({"content": "So"}, reason), event({}, "length"))
    assert finishes(events) == [None, "length"]


pieces = st.lists(st.sampled_from(['{"k":', '"v', "渐😀", '"', "}"]), min_size=1, max_size=5)


@given(st.lists(st.tuples(st.sampled_from("fgh"), pieces), min_size=1, max_size=4))
def test_g7_calls_with_ids_are_joined_whatever_their_order(
    wanted: list[tuple[str, list[str]]],
) -> None:
    calls = Calls("x")
    joined: dict[int, str] = {}
    firsts: list[int] = []
    longest = max(len(parts) for _, parts in wanted)
    for step in range(longest):
        for number, (name, parts) in enumerate(wanted):
            if step < len(parts):
                part = {"id": f"i{number}", "function": {"name": name, "arguments": parts[step]}}
                for call, is_first, more in calls.feed([part]):
                    firsts += [call.index] * is_first
                    joined[call.index] = joined.get(call.index, "") + more
    assert firsts == list(range(len(wanted)))
    assert joined == {number: "".join(parts) for number, (_, parts) in enumerate(wanted)}


@given(st.lists(st.one_of(st.none(), st.integers(), st.dictionaries(
    st.sampled_from(["id", "index", "function", "name"]),
    st.none() | st.integers(0, 2) | st.sampled_from(["a", ""]) | st.dictionaries(
        st.sampled_from(["name", "arguments"]),
        st.none() | st.sampled_from(["f", "", "{"]) | st.integers(0, 3),
    ),
)), max_size=6))  # fmt: skip
def test_no_form_of_calls_breaks_the_stream(parts: list[Any]) -> None:
    calls = Calls("x")
    told_first = [call.index for call, is_first, _ in calls.feed(parts) if is_first]
    assert len(set(told_first)) == len(told_first)


# ---- counts --------------------------------------------------------------------------------------


def test_counts_follow_the_engine_and_the_last_value_wins(read: Read) -> None:
    events = read("chat", tools=[TOOL], stream=True).events("default", b"r")
    assert (events.made, events.counts) == (0, None)
    events.feed(event({"role": "assistant", "content": None}))
    events.feed(event({"content": "a"}, **timings(1)) + event({"content": "b"}, **timings(2)))
    assert events.made == 2
    assert events.counts is not None
    assert (events.counts.input_uncached, events.counts.cache_read) == (1, 35)
    out = events.feed(event({}, "stop") + usage() + DONE)
    assert (events.made, events.counts.output, events.is_done) == (3, 3, True)
    assert b"usage" not in out


def test_without_counters_events_are_counted(read: Read) -> None:
    events = read("messages", model="bare", stream=True).events("default", b"r")
    events.feed(event({"role": "assistant", "content": ""}))
    events.feed(event({"content": "a"}) + event({"content": "b"}) + event({}, "stop"))
    assert events.made == 2


def test_running_usage_is_a_count_too(read: Read) -> None:
    events = read("chat", model="gpu", tools=[TOOL], stream=True).events("default", b"r")
    out = events.feed(event({"content": "a"}, usage={**USAGE, "completion_tokens": 1}))
    assert events.made == 1
    assert b"usage" not in out


def test_an_engines_error_in_the_stream_is_no_end(read: Read) -> None:
    events = read("chat", tools=[TOOL], stream=True).events("default", b"r")
    assert events.feed(b'data: {"error":{"message":"boom"}}\n\ndata: {cut\n\n') == b""
    assert not events.is_done
    last = events.fail("stream_interrupted", "It broke.")
    assert orjson.loads(last[6:]) == {
        "error": {
            "message": "It broke.",
            "type": "server_error",
            "code": "stream_interrupted",
            "param": None,
        }
    }
    assert b"[DONE]" not in last


def test_usage_comes_before_the_end_mark_where_it_was_asked_for(read: Read) -> None:
    p = read("chat", tools=[TOOL], stream=True, stream_options={"include_usage": True})
    events = p.events("flex", b"r")
    out = told(events.feed(event({"content": "a"}) + event({}, "stop") + usage() + DONE))
    assert out[0]["service_tier"] == "flex"
    assert (out[-1]["choices"], out[-1]["usage"]) == ([], USAGE)


# ---- legs ----------------------------------------------------------------------------------------


def test_legs_become_one_stream_with_indexes_of_their_own(read: Read) -> None:
    p = read("chat", n=2, stream=True, stream_options={"include_usage": True})
    events = p.events("default", b"r")
    out = events.feed(event({"role": "assistant", "content": "a"}, id="chatcmpl-1"), 0)
    out += events.feed(event({"role": "assistant", "content": "b"}, id="chatcmpl-2"), 1)
    out += events.feed(event({}, "stop") + usage(completion_tokens=4) + DONE, 1)
    assert (events.leg_is_done(1), events.leg_is_done(0), events.is_done) == (True, False, False)
    assert b"[DONE]" not in out
    out += events.feed(event({}, "length") + usage(completion_tokens=5) + DONE, 0)
    parsed = told(out)
    assert [each["choices"][0]["index"] for each in parsed[:-1]] == [0, 1, 1, 0]
    assert {each["id"] for each in parsed} == {"chatcmpl-1"}
    assert parsed[-1]["usage"]["completion_tokens"] == 9
    assert parsed[-1]["usage"]["prompt_tokens"] == 36
    assert events.counts is not None
    assert (events.made, events.counts.prompt) == (9, 36)


def test_prompts_are_billed_each_once(read: Read) -> None:
    p = read("completions", prompt=["a", "b"], n=2, stream=True)
    events = p.events("default", b"r")
    head = {**HEAD, "object": "text_completion"}
    for leg in range(4):
        choice = {"index": 0, "text": "x", "finish_reason": "stop", "logprobs": None}
        values = {"choices": [choice], **head, "usage": {**USAGE, "prompt_tokens": 40 + leg // 2}}
        out = events.feed(b"data: %b\n\n" % orjson.dumps(values) + DONE, leg)
    assert out.endswith(DONE)
    assert events.counts is not None
    assert (events.counts.prompt, events.counts.output) == (40 + 41, 12)


# ---- forced calls and log-probabilities ----------------------------------------------------------


def test_a_forced_answer_becomes_a_call(read: Read) -> None:
    p = read("chat", tools=[TOOL], tool_choice="required", stream=True)
    events = p.events("default", b"r")
    text = '{ "name": "get_a",\n "arguments": {"x": "渐"} }'
    out = b"".join(events.feed(event({"content": letter})) for letter in text)
    assert b"content" not in out
    parsed = told(out + events.feed(event({}, "stop") + DONE))
    assert calls_of(parsed)[0]["name"] == "get_a"
    assert calls_of(parsed)[0]["arguments"] == '{"x":"渐"}'
    assert finishes(parsed)[-1] == "tool_calls"


@pytest.mark.parametrize(
    ("text", "arguments"), [('{"name":"get_a","arguments":{"x', '{"x'), ('{"name":"ge', None)]
)
def test_a_forced_answer_that_is_cut_is_as_far_as_it_came(
    read: Read, text: str, arguments: str | None
) -> None:
    p = read("chat", tools=[TOOL], tool_choice="required", stream=True)
    parsed = told(p.events("default", b"r").feed(event({"content": text}, "length") + DONE))
    calls = calls_of(parsed)
    assert (calls[0]["arguments"] if calls else None) == arguments
    assert finishes(parsed)[-1] == "length"


def test_log_probabilities_are_told_as_openai_tells_them(read: Read) -> None:
    item = {"id": 4, "token": "a", "bytes": [97], "logprob": -0.5}
    logprobs = {"content": [{**item, "top_logprobs": [item, item]}]}
    for tops in (0, 1):
        p = read("chat", logprobs=True, top_logprobs=tops, stream=True)
        data = event({"content": "a"}, choice={"logprobs": logprobs}) + DONE
        first = told(p.events("default", b"r").feed(data))[0]
        top = {"token": "a", "logprob": -0.5, "bytes": [97]}
        assert first["choices"][0]["logprobs"] == {
            "content": [{**top, "top_logprobs": [top] * tops}],
            "refusal": None,
        }


# ---- Messages ------------------------------------------------------------------------------------


def read_messages(data: bytes) -> list[Any]:
    events = []
    for part in data.split(b"\n\n"):
        if part:
            name, values = part.split(b"\n")
            parsed = orjson.loads(values[6:])
            assert name == b"event: " + parsed["type"].encode()
            events.append(parsed)
    return events


def test_a_messages_stream_opens_and_closes_each_block(read: Read) -> None:
    p = read("messages", stream=True, tools=[{"name": "get_a", "input_schema": {}}])
    events = p.events("default", b"r")
    assert events.feed(event({"role": "assistant", "content": None})) == b""
    call = {"index": 0, "id": "t1", "function": {"name": "get_a", "arguments": '{"x"'}}
    out = events.feed(
        event({"content": "So"}, **timings(1)) + event({"content": " I"}, **timings(2))
    )
    out += events.feed(event({"tool_calls": [call]}, **timings(3)))
    more = {"index": 0, "function": {"arguments": ":1}"}}
    out += events.feed(event({"tool_calls": [more]}) + event({}, "tool_calls"))
    out += events.feed(usage() + DONE)
    parsed = read_messages(out)
    assert [each["type"].removeprefix("content_block_") for each in parsed] == [
        "message_start", "start", "delta", "delta", "stop", "start", "delta", "delta", "stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    assert [each["index"] for each in parsed if "index" in each] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert parsed[5]["content_block"]["name"] == "get_a"
    assert parsed[6]["delta"]["partial_json"] + parsed[7]["delta"]["partial_json"] == '{"x":1}'
    assert parsed[-2]["delta"]["stop_reason"] == "tool_use"
    assert events.is_done


def test_g4_messages_counts_are_cumulative_and_cached_tokens_stand_beside(read: Read) -> None:
    events = read("messages", stream=True).events("default", b"r")
    out = events.feed(event({"content": "a"}, **timings(1, prompt=317, cached=4425)))
    last = {
        "prompt_tokens": 4742,
        "completion_tokens": 47,
        "prompt_tokens_details": {"cached_tokens": 4425},
    }
    out += events.feed(event({}, "stop") + usage(**last) + DONE)
    start, delta = (
        read_messages(out)[0]["message"]["usage"],
        read_messages(out)[-2]["usage"],
    )
    for told_usage, output in ((start, 1), (delta, 47)):
        assert told_usage["input_tokens"] == 317
        assert told_usage["cache_read_input_tokens"] == 4425
        assert told_usage["cache_creation_input_tokens"] == 0
        assert told_usage["output_tokens"] == output
    assert events.counts is not None
    assert (events.counts.input_uncached, events.counts.cache_read) == (317, 4425)
    assert (events.counts.output, events.counts.prompt) == (47, 4742)


def test_g4_cached_beyond_the_prompt_is_billed_as_the_prompt_and_marked(read: Read) -> None:
    events = read("messages", stream=True).events("default", b"r")
    events.feed(usage(prompt_tokens=10, prompt_tokens_details={"cached_tokens": 11}) + DONE)
    assert events.counts is not None
    assert (events.counts.input_uncached, events.counts.cache_read) == (0, 10)
    assert events.counts.is_inconsistent


@pytest.mark.parametrize(
    ("finish", "more", "reason", "sequence"),
    [
        ("stop", {}, "end_turn", None),
        ("length", {}, "max_tokens", None),
        ("stop", {"__verbose": {"stopping_word": "END"}}, "stop_sequence", "END"),
        ("stop", {"__verbose": {"stopping_word": ""}}, "end_turn", None),
        ("stop", {"choice": {"stop_reason": "END"}}, "stop_sequence", "END"),
        ("content_filter", {}, "refusal", None),
    ],
)
def test_a_messages_stream_says_why_it_ended(
    read: Read, finish: str, more: dict[str, Any], reason: str, sequence: str | None
) -> None:
    events = read("messages", stream=True, stop_sequences=["END"]).events("default", b"r")
    out = events.feed(event({"content": "a"}) + event({}, finish, **more) + usage() + DONE)
    delta = read_messages(out)[-2]["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == (reason, sequence)


def test_an_empty_messages_stream_is_a_whole_one(read: Read) -> None:
    events = read("messages", stream=True).events("default", b"r")
    out = events.feed(event({"role": "assistant"}) + event({}, "stop") + usage() + DONE)
    assert [each["type"] for each in read_messages(out)] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]


def test_a_forced_messages_answer_becomes_a_tool_use(read: Read) -> None:
    tool = {"name": "get_a", "input_schema": {"type": "object"}}
    p = read("messages", stream=True, tools=[tool], tool_choice={"type": "any"})
    text = '{"name":"get_a","arguments":{"x":1}}'
    out = p.events("default", b"r").feed(event({"content": text}) + event({}, "stop") + DONE)
    parsed = read_messages(out)
    assert parsed[1]["content_block"]["type"] == "tool_use"
    assert parsed[2]["delta"]["partial_json"] == '{"x":1}'
    assert parsed[-2]["delta"]["stop_reason"] == "tool_use"


def test_a_cut_messages_stream_ends_with_an_error_event(read: Read) -> None:
    last = read("messages", stream=True).events("default", b"r").fail("credit_exhausted", "Out.")
    name, values, _, _ = last.split(b"\n")
    assert name == b"event: error"
    parsed = orjson.loads(values[6:])
    assert (parsed["type"], parsed["error"]["type"]) == ("error", "billing_error")
    assert parsed["error"]["code"] == "credit_exhausted"


# ---- G1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", ["chat", "messages"])
def test_g1_events_come_out_the_same_however_they_are_grouped(read: Read, surface: str) -> None:
    more = {"tools": [TOOL]} if surface == "chat" else {}
    events = [
        event({"role": "assistant", "content": ""}),
        event({"content": "渐😀"}, **timings(1)),
        event({"content": "\u2028 渐"}, **timings(2)),
        event({}, "stop"),
        usage(),
        DONE,
    ]

    def run(groups: list[bytes]) -> tuple[bytes, int]:
        rewriter = read(surface, stream=True, **more).events("default", b"r")
        return b"".join(map(rewriter.feed, groups)), rewriter.made

    whole = run([b"".join(events)])
    assert run(events) == whole
    assert run([*events[:3], b"".join(events[3:])]) == whole
    assert "渐😀".encode() in whole[0]
    assert "\ufffd".encode() not in whole[0]
