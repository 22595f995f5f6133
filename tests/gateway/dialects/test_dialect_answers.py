"""Whole answers, engines' errors, the context, and the bodies of refusals."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.wire.gateway import Counts
from sublet.gateway import errors
from sublet.gateway.dialects import Prepared, model_list, model_object
from sublet.gateway.errors import KINDS, Refusal

Read = Callable[..., Prepared]

TIMINGS = b',"timings":{"cache_n":0,"prompt_n":36,"prompt_ms":2.5,"predicted_n":4}'
CHAT = (
    b'{"choices":[{"finish_reason":"length","index":0,"message":{"role":"assistant",'
    b'"content":"Greeting,"}}],"created":1795597818,"model":"smol","system_fingerprint":"b0",'
    b'"object":"chat.completion","usage":{"completion_tokens":4,"prompt_tokens":36,'
    b'"total_tokens":40,"prompt_tokens_details":{"cached_tokens":5}},"id":"chatcmpl-v9"'
    + TIMINGS
    + b"}"
)
TEXT = (
    b'{"choices":[{"text":"-tailed","index":0,"logprobs":null,"finish_reason":"length"}],'
    b'"created":1,"model":"smol","object":"text_completion","usage":{"completion_tokens":3,'
    b'"prompt_tokens":2,"total_tokens":5,"prompt_tokens_details":{"cached_tokens":0}},'
    b'"id":"chatcmpl-SD"' + TIMINGS + b"}"
)
TOOL = {"type": "function", "function": {"name": "get_a"}}
MESSAGES_TOOL = {"name": "get_a", "input_schema": {"type": "object"}}


def altered(raw: bytes, message: dict[str, Any] | None = None, **choice: Any) -> bytes:
    reply = orjson.loads(raw)
    reply["choices"][0].update(choice)
    reply["choices"][0].get("message", {}).update(message or {})
    return orjson.dumps(reply)


# ---- chat ----------------------------------------------------------------------------------------


def test_a_chat_answer_has_what_sdks_expect(read: Read) -> None:
    body, counts = read("chat").reply(CHAT, "default")
    reply = orjson.loads(body)
    assert counts == Counts(input_uncached=31, cache_read=5, output=4)
    assert reply["service_tier"] == "default"
    assert "timings" not in reply
    choice = reply["choices"][0]
    assert choice["logprobs"] is None
    assert choice["message"] == {
        "role": "assistant",
        "content": "Greeting,",
        "refusal": None,
        "annotations": [],
    }
    assert reply["usage"]["prompt_tokens_details"] == {"cached_tokens": 5}


@given(st.text())
def test_the_text_of_an_answer_is_the_engines(read: Read, text: str) -> None:
    raw = altered(CHAT, {"content": text})
    for p in (read("chat"), read("chat", tools=[TOOL])):
        for calls in ({}, {"tool_calls": []}, {"tool_calls": None}):
            body, _ = p.reply(altered(raw, calls), "default")
            message = orjson.loads(body)["choices"][0]["message"]
            assert (message["content"], "tool_calls" in message) == (text, False)


def test_g7_an_answer_with_calls_says_so(read: Read) -> None:
    calls = [
        {"function": {"name": "get_a", "arguments": '{"x":1}'}},
        {"function": {"name": "get_b", "arguments": {"x": 2}}},
    ]
    raw = altered(CHAT, {"content": None, "tool_calls": calls}, finish_reason="stop")
    for p in (read("chat", tools=[TOOL]), read("chat")):
        choice = orjson.loads(p.reply(raw, "default")[0])["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["content"] is None
        told = choice["message"]["tool_calls"]
        assert [call["function"]["arguments"] for call in told] == ['{"x":1}', '{"x":2}']
        assert len({call["id"] for call in told}) == 2
        assert {call["type"] for call in told} == {"function"}


def test_a_forced_answer_is_a_call(read: Read) -> None:
    raw = altered(CHAT, {"content": '{"name":"get_a","arguments":{"x":1}}'}, finish_reason="stop")
    p = read("chat", tools=[TOOL], tool_choice="required")
    choice = orjson.loads(p.reply(raw, "default")[0])["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {
        "name": "get_a",
        "arguments": '{"x":1}',
    }
    assert choice["finish_reason"] == "tool_calls"


def test_the_answers_of_legs_are_one_with_the_input_once(read: Read) -> None:
    second = CHAT.replace(b'"cached_tokens":5', b'"cached_tokens":35').replace(b"v9", b"v10")
    body, counts = read("chat", n=2).join([CHAT, second], "flex")
    reply = orjson.loads(body)
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    assert (reply["id"], reply["service_tier"]) == ("chatcmpl-v9", "flex")
    assert counts == Counts(input_uncached=31, cache_read=5, output=8)
    assert reply["usage"]["total_tokens"] == 44


def test_prompts_of_legs_are_billed_each_once(read: Read) -> None:
    other = TEXT.replace(b'"prompt_tokens":2', b'"prompt_tokens":9')
    p = read("completions", prompt=["a", "b"], n=2)
    body, counts = p.join([TEXT, TEXT, other, other], "default")
    assert (counts.prompt, counts.output) == (11, 12)
    assert [choice["index"] for choice in orjson.loads(body)["choices"]] == [0, 1, 2, 3]


def test_what_was_said_for_the_assistant_is_not_said_again(read: Read) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Greet"}]
    body, _ = read("chat", messages=turns).reply(CHAT, "default")
    assert orjson.loads(body)["choices"][0]["message"]["content"] == "ing,"
    body, _ = read("messages", messages=turns).reply(CHAT, "default")
    assert orjson.loads(body)["content"][0]["text"] == "ing,"


def test_log_probabilities_of_an_answer(read: Read) -> None:
    item = {"id": 4, "token": "a", "bytes": [97], "logprob": -0.5}
    raw = altered(CHAT, logprobs={"content": [{**item, "top_logprobs": [item]}]})
    body, _ = read("chat", logprobs=True).reply(raw, "default")
    told = orjson.loads(body)["choices"][0]["logprobs"]["content"][0]
    assert told == {"token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": []}


BROKEN = [
    b"",
    b"{",
    b"[]",
    b"{}",
    b'{"choices":[]}',
    b'{"choices":[3],"usage":{}}',
    b'{"choices":[{"message":3}],"usage":{}}',
    b'{"data":[{}],"usage":{"prompt_tokens":1}}',
    b'{"data":3}',
    CHAT[:-40],
    CHAT.replace(b'"usage"', b'"used"'),
    TEXT.replace(b'"usage":{', b'"usage":[{'),
]


@pytest.mark.parametrize("raw", BROKEN)
@pytest.mark.parametrize(
    ("surface", "fields"),
    [
        ("chat", {}),
        ("chat", {"tools": [TOOL]}),
        ("completions", {}),
        ("messages", {}),
        ("count_tokens", {}),
        ("embeddings", {}),
        ("embeddings", {"model": "mini-plain", "encoding_format": "base64"}),
    ],
)
def test_an_answer_that_cannot_be_read_is_a_value_error(
    read: Read, surface: str, fields: dict[str, Any], raw: bytes
) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # of any kind: JSON's own is one
        read(surface, **fields).reply(raw, "default")


# ---- completions, embeddings, Messages -----------------------------------------------------------


def test_a_completion_loses_its_timings_and_nothing_else(read: Read) -> None:
    body, counts = read("completions").reply(TEXT, "default")
    assert body == TEXT.replace(TIMINGS, b"")
    assert counts == Counts(input_uncached=2, cache_read=0, output=3)


EMBEDDED = (
    b'{"model":"mini","object":"list","usage":{"prompt_tokens":3,"total_tokens":3},'
    b'"data":[{"embedding":[0.5,-1.25],"index":0,"object":"embedding"}]}'
)


def test_embeddings_pass_as_they_are_and_cost_input(read: Read) -> None:
    body, counts = read("embeddings").reply(EMBEDDED, "default")
    assert (body, counts) == (EMBEDDED, Counts(input_uncached=3, cache_read=0, output=0))


def test_embeddings_are_written_in_base64_where_the_engine_does_not(
    read: Read, sent: Callable[..., dict[str, Any]]
) -> None:
    p = read("embeddings", model="mini-plain", encoding_format="base64")
    assert "encoding_format" not in sent(p)
    body, counts = p.reply(EMBEDDED, "default")
    written = orjson.loads(body)["data"][0]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(written)) == (0.5, -1.25)
    assert counts.prompt == 3


def test_inputs_are_counted(read: Read) -> None:
    for inputs, number in (("a", 1), (["a", "b"], 2), ([1, 2], 1), ([[1], [2, 3]], 2)):
        p = read("embeddings", input=inputs)
        assert (p.inputs, p.cap, p.n, p.stream) == (number, 0, 1, False)


def test_a_messages_answer_is_whole(read: Read) -> None:
    body, counts = read("messages").reply(CHAT, "flex")
    reply = orjson.loads(body)
    assert reply["content"] == [{"type": "text", "text": "Greeting,", "citations": None}]
    assert (reply["id"], reply["type"], reply["role"]) == ("msg_v9", "message", "assistant")
    assert (reply["stop_reason"], reply["stop_sequence"]) == ("max_tokens", None)
    assert reply["usage"]["service_tier"] == "flex"
    told = (reply["usage"]["input_tokens"], reply["usage"]["cache_read_input_tokens"])
    assert told == (counts.input_uncached, counts.cache_read) == (31, 5)


def test_a_messages_answer_with_a_forced_call(read: Read) -> None:
    raw = altered(CHAT, {"content": '{"name":"get_a","arguments":{"x":1}}'}, finish_reason="stop")
    p = read("messages", tools=[MESSAGES_TOOL], tool_choice={"type": "tool", "name": "get_a"})
    reply = orjson.loads(p.reply(raw, "default")[0])
    assert reply["stop_reason"] == "tool_use"
    assert [(block["name"], block["input"]) for block in reply["content"]] == [("get_a", {"x": 1})]


# ---- caps (G5) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("surface", ["chat", "completions", "messages"])
def test_g5_the_cap_reaches_the_engine_under_its_name(
    read: Read, sent: Callable[..., dict[str, Any]], surface: str
) -> None:
    p = read(surface, max_tokens=5)
    assert (p.cap, sent(p)["max_tokens"]) == (5, 5)
    assert sent(p, 3)["max_tokens"] == 3


@pytest.mark.parametrize("more", [{}, {"user": "u"}, {"n": 2}, {"tools": [TOOL]}])
def test_g5_both_names_are_caps(
    read: Read, sent: Callable[..., dict[str, Any]], more: dict[str, Any]
) -> None:
    p = read("chat", max_completion_tokens=5, **more)
    body = sent(p, 4)
    # llama.cpp takes `max_completion_tokens` where both are there.
    assert (p.cap, body["max_tokens"], body.get("max_completion_tokens", 4)) == (5, 4, 4)
    assert read("chat", max_completion_tokens=5, max_tokens=5, **more).cap == 5
    with pytest.raises(Refusal) as caught:
        read("chat", max_completion_tokens=5, max_tokens=9, **more)
    assert (caught.value.status, caught.value.param) == (400, "max_tokens")


def test_g5_without_a_cap_it_is_the_routes(read: Read, sent: Callable[..., dict[str, Any]]) -> None:
    p = read("chat", model="big")
    assert (p.cap, sent(p)["max_tokens"]) == (4096, 4096)


# ---- the context (G6) ----------------------------------------------------------------------------

TOO_LONG = {
    "llama.cpp": b'{"error":{"code":400,"message":"request (600 tokens) exceeds the available '
    b'context size (512 tokens), try increasing it","type":"exceed_context_size_error",'
    b'"n_prompt_tokens":600,"n_ctx":512}}',
    "vllm": b'{"error":{"message":"This model\'s maximum context length is 512 tokens. However, '
    b"you requested 700 tokens (600 in the messages, 100 in the completion). Please reduce the "
    b'length.","type":"BadRequestError","param":null,"code":400}}',
}


@pytest.mark.parametrize("server", sorted(TOO_LONG))
def test_g6_an_engines_too_long_is_ours(read: Read, server: str) -> None:
    p = read("chat", model="smol" if server == "llama.cpp" else "gpu", max_tokens=100)
    refusal = p.refusal(400, TOO_LONG[server])
    assert (refusal.status, refusal.code) == (400, "context_length_exceeded")
    assert "600 + 100 > 512" in refusal.message
    error = orjson.loads(errors.body("chat", refusal))["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "context_length_exceeded")
    p = read("messages", max_tokens=100)
    assert "600 + 100 > 512" in p.refusal(400, TOO_LONG["llama.cpp"]).message


def test_g6_an_embedding_input_that_is_too_long_is_the_clients_fault(read: Read) -> None:
    body = (
        b'{"error":{"code":500,"message":"input (602 tokens) is too large to process.","type":"x"}}'
    )
    refusal = read("embeddings").refusal(500, body)
    assert (refusal.status, refusal.code) == (400, "context_length_exceeded")
    assert "602" in refusal.message


@pytest.mark.parametrize("surface", ["chat", "messages"])
def test_g6_input_and_cap_are_counted_where_they_may_not_fit(read: Read, surface: str) -> None:
    long = [{"role": "user", "content": "hello " * 80}]
    p = read(surface, messages=long, max_tokens=100)
    assert p.needs_count
    assert p.count_path == b"/v1/chat/completions/input_tokens"
    assert orjson.loads(p.count_body())["messages"] == long
    p.counted(200, b'{"input_tokens":412}')
    p.counted(500, b'{"input_tokens":900}')
    p.counted(200, b"what?")
    p.counted(200, b"[]")
    with pytest.raises(Refusal) as caught:
        p.counted(200, b'{"input_tokens":500}')
    assert caught.value.code == "context_length_exceeded"
    assert "500 + 100 > 512" in caught.value.message


def test_g6_a_prompt_is_counted_by_its_tokens(read: Read) -> None:
    p = read("completions", prompt="hello " * 80, max_tokens=100)
    assert (p.needs_count, p.count_path) == (True, b"/tokenize")
    assert orjson.loads(p.count_body())["content"] == "hello " * 80
    p.counted(200, orjson.dumps({"tokens": [1] * 412}))
    with pytest.raises(Refusal) as caught:
        p.counted(200, orjson.dumps({"tokens": [1] * 413}))
    assert caught.value.param == "prompt"
    with pytest.raises(Refusal):
        read("completions", prompt=[1] * 413, max_tokens=100)
    assert not read("completions", prompt=[1] * 412, max_tokens=100).needs_count


def test_g6_what_surely_fits_is_not_counted(read: Read) -> None:
    assert not read("chat", max_tokens=100).needs_count
    # Who names no cap is cut at the context by the engine, with the reason `length`.
    assert not read("chat", messages=[{"role": "user", "content": "a" * 900}]).needs_count
    # vLLM refuses by itself.
    assert not read("chat", model="gpu", max_tokens=500).needs_count
    assert not read("count_tokens", messages=[{"role": "user", "content": "a" * 900}]).needs_count


# ---- engines' errors and our bodies --------------------------------------------------------------


def test_an_engines_refusal_is_the_clients_and_other_errors_are_ours(read: Read) -> None:
    p = read("chat")
    body = (
        b'{"error":{"code":400,"message":"Unable to generate parser. JSON schema error at #: x"}}'
    )
    refusal = p.refusal(400, body)
    assert (refusal.code, refusal.status) == ("invalid_request", 400)
    assert "JSON schema error at #: x" in refusal.message
    assert "parser" not in refusal.message
    for status, raw in ((401, b"{}"), (404, b"<html>"), (500, b'{"error":"x"}'), (503, b"")):
        refusal = p.refusal(status, raw)
        assert (refusal.status, refusal.code) == (503, "no_replica")
    assert p.refusal(400, b'["x"]').code == "invalid_request"
    assert p.refusal(400, b'{"error":["x"]}').code == "invalid_request"


@pytest.mark.parametrize("code", sorted(KINDS))
def test_a_refusal_has_a_body_for_both_families(code: str) -> None:
    refusal = Refusal(400, code, "No.", param="n")
    error = orjson.loads(errors.body("chat", refusal))["error"]
    assert error == {"message": "No.", "type": KINDS[code][0], "code": code, "param": "n"}
    assert orjson.loads(errors.body(None, refusal))["error"] == error
    whole = orjson.loads(errors.body("messages", refusal))
    assert whole["type"] == "error"
    assert (whole["error"]["type"], whole["error"]["message"]) == (KINDS[code][1], "No.")
    assert whole["error"]["code"] == code


def test_a_refusal_tells_when_to_come_again_and_which_methods_are_right() -> None:
    refusal = Refusal(405, "method_not_allowed", "No.", retry_after_s=3, allow=b"POST")
    assert errors.head(refusal) == b"retry-after: 3\r\nallow: POST\r\n"
    assert errors.head(Refusal(400, "invalid_request", "No.")) == b""
    named = Refusal(400, "invalid_request", "No.", type="special")
    assert orjson.loads(errors.body("chat", named))["error"]["type"] == "special"


def test_the_list_of_models_is_one_that_both_families_read(models: dict[str, Any]) -> None:
    routes = [models[name].route for name in ("smol", "muse")]
    listed = orjson.loads(model_list(routes))
    assert (listed["object"], listed["has_more"]) == ("list", False)
    assert (listed["first_id"], listed["last_id"]) == ("smol", "muse")
    assert listed["data"][1] == orjson.loads(model_object(routes[1]))
    one = listed["data"][0]
    assert (one["object"], one["created"], one["owned_by"]) == ("model", 1_700_000_000, "owner")
    assert (one["type"], one["created_at"]) == ("model", "2023-11-14T22:13:20Z")
    assert orjson.loads(model_list([]))["data"] == []
