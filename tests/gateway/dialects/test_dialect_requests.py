"""Each request field: honoured, dropped by name, or refused by name with its own code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
import pytest

from sublet.gateway.dialects import Prepared, prepare
from sublet.gateway.errors import Refusal

Read = Callable[..., Prepared]
Sent = Callable[..., dict[str, Any]]

CHAT_TOOL = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "What time it is.",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
TOOL = {"name": "get_time", "input_schema": {"type": "object"}}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "get_time", "arguments": "{}"}}
    ],
}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def refused(read: Read, surface: str, **fields: Any) -> Refusal:
    with pytest.raises(Refusal) as caught:
        read(surface, **fields)
    assert caught.value.status in (400, 404)
    assert caught.value.param is None or caught.value.param in caught.value.message
    return caught.value


PASSED = [
    ("chat", "temperature", 0.7),
    ("chat", "temperature", 2),
    ("chat", "top_p", 0.9),
    ("chat", "top_k", 40),
    ("chat", "min_p", 0.05),
    ("chat", "seed", 7),
    ("chat", "frequency_penalty", -2),
    ("chat", "presence_penalty", 1.5),
    ("chat", "logit_bias", {"290": -100}),
    ("chat", "stop", ["a", "b"]),
    ("chat", "stop", "a"),
    ("chat", "response_format", {"type": "json_object"}),
    (
        "chat",
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": True}},
    ),
    ("chat", "tools", [CHAT_TOOL]),
    ("completions", "temperature", 0),
    ("completions", "stop", "x"),
    ("completions", "seed", 0),
    ("messages", "temperature", 1),
    ("messages", "top_p", 0.5),
    ("messages", "top_k", 3),
    ("embeddings", "encoding_format", "base64"),
    ("embeddings", "encoding_format", "float"),
]


@pytest.mark.parametrize(("surface", "field", "value"), PASSED)
def test_what_the_route_lists_reaches_the_engine(
    read: Read, sent: Sent, surface: str, field: str, value: Any
) -> None:
    assert sent(read(surface, **{field: value}))[field] == value


@pytest.mark.parametrize(
    ("surface", "field", "value"), [row for row in PASSED if row[1] != "encoding_format"]
)
def test_what_the_route_does_not_list_is_refused_by_name(
    read: Read, surface: str, field: str, value: Any
) -> None:
    refusal = refused(read, surface, model="bare", **{field: value})
    assert (refusal.code, refusal.param) == ("unsupported_parameter", field)


DROPPED = [
    ("chat", "user", "u1"),
    ("chat", "metadata", {"a": "b"}),
    ("chat", "store", False),
    ("chat", "modalities", ["text"]),
    ("chat", "safety_identifier", "s"),
    ("chat", "prompt_cache_key", "k"),
    ("chat", "prompt_cache_retention", "24h"),
    ("chat", "service_tier", "flex"),
    ("chat", "logprobs", False),
    ("chat", "tool_choice", "auto"),
    ("chat", "temperature", None),
    ("chat", "stream_options", None),
    ("chat", "stream", None),
    ("chat", "n", None),
    ("chat", "max_tokens", None),
    ("completions", "user", "u1"),
    ("completions", "best_of", 1),
    ("completions", "echo", False),
    ("completions", "suffix", ""),
    ("completions", "logprobs", None),
    ("messages", "metadata", {"user_id": "u"}),
    ("messages", "thinking", {"type": "disabled"}),
    ("messages", "service_tier", "auto"),
    ("messages", "top_k", None),
    ("embeddings", "user", "u1"),
    ("embeddings", "service_tier", "default"),
    ("embeddings", "dimensions", None),
]


@pytest.mark.parametrize(("surface", "field", "value"), DROPPED)
def test_what_changes_neither_cost_nor_meaning_is_dropped(
    read: Read, sent: Sent, surface: str, field: str, value: Any
) -> None:
    body = sent(read(surface, **{field: value}))
    assert field not in body or (field == "max_tokens" and body[field] == 512)


WRONG = [
    ("chat", "model", 3, "model"),
    ("chat", "model", None, "model"),
    ("chat", "messages", None, "messages"),
    ("chat", "messages", [], "messages"),
    ("chat", "messages", "hi", "messages"),
    ("chat", "messages", ["hi"], "messages[0]"),
    ("chat", "messages", [{"role": "user"}], "messages[0].content"),
    ("chat", "messages", [{"role": "user", "content": None}], "messages[0].content"),
    ("chat", "messages", [{"role": "user", "content": 3}], "messages[0].content"),
    ("chat", "messages", [{"role": "user", "content": []}], "messages[0].content"),
    ("chat", "messages", [{"role": "king", "content": "a"}], "messages[0].role"),
    ("chat", "messages", [{"role": ["user"], "content": "a"}], "messages[0].role"),
    ("chat", "messages", [{"role": "user", "content": "a", "x": 1}], "messages[0].x"),
    ("chat", "messages", [{"role": "user", "content": "a", "name": 1}], "messages[0].name"),
    ("chat", "messages", [{"role": "tool", "content": "a"}], "messages[0].tool_call_id"),
    (
        "chat",
        "messages",
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}],
        "messages[0].content[0].type",
    ),
    (
        "chat",
        "messages",
        [{"role": "user", "content": [{"type": "text", "text": 1}]}],
        "messages[0].content[0].text",
    ),
    (
        "chat",
        "messages",
        [{**CALLED, "tool_calls": [{"id": "a", "type": "custom"}]}],
        "messages[0].tool_calls[0].type",
    ),
    (
        "chat",
        "messages",
        [
            {
                **CALLED,
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{no"}}
                ],
            }
        ],
        "messages[0].tool_calls[0].function.arguments",
    ),
    ("chat", "messages", [{**CALLED, "function_call": {"name": "f"}}], "messages[0].function_call"),
    ("chat", "stream", 1, "stream"),
    ("chat", "stream_options", {"include_usage": True}, "stream_options"),
    ("chat", "max_tokens", 0, "max_tokens"),
    ("chat", "max_tokens", "5", "max_tokens"),
    ("chat", "max_tokens", True, "max_tokens"),
    ("chat", "max_tokens", 513, "max_tokens"),
    ("chat", "max_completion_tokens", -1, "max_completion_tokens"),
    ("chat", "n", 0, "n"),
    ("chat", "n", 9, "n"),
    ("chat", "n", 1.0, "n"),
    ("chat", "temperature", 2.1, "temperature"),
    ("chat", "temperature", "hot", "temperature"),
    ("chat", "temperature", True, "temperature"),
    ("chat", "top_p", -0.1, "top_p"),
    ("chat", "seed", 1.5, "seed"),
    ("chat", "seed", 1 << 63, "seed"),
    ("chat", "stop", [""], "stop"),
    ("chat", "stop", ["a"] * 17, "stop"),
    ("chat", "stop", {"a": 1}, "stop"),
    ("chat", "logit_bias", {"x": 1}, "logit_bias"),
    ("chat", "logit_bias", {"1": 101}, "logit_bias"),
    ("chat", "logit_bias", [1], "logit_bias"),
    ("chat", "logprobs", 2, "logprobs"),
    ("chat", "top_logprobs", 2, "logprobs"),
    ("chat", "response_format", "json", "response_format"),
    ("chat", "response_format", {"type": "yaml"}, "response_format.type"),
    ("chat", "response_format", {"type": "json_schema"}, "response_format.json_schema"),
    (
        "chat",
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "x"}},
        "response_format.json_schema.schema",
    ),
    (
        "chat",
        "response_format",
        {"type": "json_schema", "json_schema": {"name": "x", "schema": deep(70)}},
        "response_format.json_schema.schema",
    ),
    ("chat", "tools", [], "tools"),
    ("chat", "tools", [{"type": "web_search"}], "tools[0].type"),
    ("chat", "tools", [CHAT_TOOL, CHAT_TOOL], "tools[1].function.name"),
    (
        "chat",
        "tools",
        [{"type": "function", "function": {"name": "a b"}}],
        "tools[0].function.name",
    ),
    (
        "chat",
        "tools",
        [{"type": "function", "function": {"name": "a", "parameters": 3}}],
        "tools[0].function.parameters",
    ),
    ("chat", "tool_choice", "required", "tool_choice"),
    ("chat", "user", 3, "user"),
    ("chat", "metadata", {"a": 1}, "metadata"),
    ("chat", "service_tier", "priority", "service_tier"),
    ("chat", "service_tier", ["flex"], "service_tier"),
    ("completions", "prompt", None, "prompt"),
    ("completions", "prompt", "", "prompt"),
    ("completions", "prompt", [], "prompt"),
    ("completions", "prompt", 3, "prompt"),
    ("completions", "prompt", ["a", [1]], "prompt"),
    ("completions", "prompt", [1, -5], "prompt"),
    ("completions", "prompt", [True], "prompt"),
    ("completions", "prompt", {"a": 1}, "prompt"),
    ("messages", "max_tokens", None, "max_tokens"),
    ("messages", "max_tokens", 1000, "max_tokens"),
    ("messages", "temperature", 1.5, "temperature"),
    ("messages", "system", 3, "system"),
    ("messages", "system", [{"type": "image"}], "system[0].type"),
    ("messages", "stop_sequences", "a", "stop_sequences"),
    ("messages", "stop_sequences", [3], "stop_sequences"),
    ("messages", "messages", [{"role": "system", "content": "a"}], "messages[0].role"),
    ("messages", "messages", [{"role": "user", "content": 3}], "messages[0].content"),
    (
        "messages",
        "messages",
        [{"role": "user", "content": [{"type": "image", "source": {}}]}],
        "messages[0].content[0].type",
    ),
    ("messages", "tools", [{"name": "a b", "input_schema": {}}], "tools[0].name"),
    ("messages", "tools", [{"name": "a"}], "tools[0].input_schema"),
    ("messages", "tools", [TOOL, TOOL], "tools[1].name"),
    ("messages", "tools", [{"type": "bash_20250124", "name": "bash"}], "tools[0].type"),
    ("messages", "tool_choice", {"type": "any"}, "tool_choice"),
    ("messages", "service_tier", "priority", "service_tier"),
    ("embeddings", "input", None, "input"),
    ("embeddings", "input", "", "input"),
    ("embeddings", "input", [], "input"),
    ("embeddings", "input", [""], "input[0]"),
    ("embeddings", "input", ["a", 3], "input[1]"),
    ("embeddings", "input", [1, "a"], "input"),
    ("embeddings", "input", [[1], [-1]], "input[1]"),
    ("embeddings", "input", {"a": 1}, "input"),
    ("embeddings", "encoding_format", "hex", "encoding_format"),
]


@pytest.mark.parametrize(("surface", "field", "value", "param"), WRONG)
def test_a_wrong_value_is_refused_by_its_name(
    read: Read, surface: str, field: str, value: Any, param: str
) -> None:
    refusal = refused(read, surface, **{field: value})
    assert (refusal.code, refusal.param) in (
        ("invalid_request", param),
        ("unsupported_parameter", param),
    )


UNKNOWN = [
    ("chat", "florb", 1),
    ("chat", "florb", None),
    ("chat", "n_predict", 9),
    ("chat", "functions", []),
    ("chat", "audio", {}),
    ("chat", "prediction", {}),
    ("chat", "web_search_options", {}),
    ("chat", "reasoning_effort", "low"),
    ("chat", "verbosity", "low"),
    ("chat", "store", True),
    ("chat", "modalities", ["text", "audio"]),
    ("chat", "grammar", "root ::= x"),
    ("completions", "best_of", 2),
    ("completions", "echo", True),
    ("completions", "suffix", "b"),
    ("completions", "logprobs", 2),
    ("messages", "thinking", {"type": "enabled", "budget_tokens": 1024}),
    ("messages", "mcp_servers", []),
    ("messages", "container", "c"),
    ("embeddings", "dimensions", 8),
    ("embeddings", "florb", 1),
]


@pytest.mark.parametrize(("surface", "field", "value"), UNKNOWN)
def test_what_is_not_offered_is_refused_by_its_name(
    read: Read, surface: str, field: str, value: Any
) -> None:
    refusal = refused(read, surface, **{field: value})
    assert (refusal.code, refusal.param) == ("unsupported_parameter", field)


@pytest.mark.parametrize(
    ("surface", "field", "value", "param"),
    [
        ("chat", "logprobs", True, "logprobs"),
        ("chat", "top_logprobs", 5, "top_logprobs"),
        ("chat", "logit_bias", {"1": 1}, "logit_bias"),
        ("chat", "n_probs", 5, "n_probs"),
        ("chat", "grammar", "x", "grammar"),
        ("chat", "lora", [], "lora"),
        ("chat", "chat_template", "x", "chat_template"),
        ("completions", "logit_bias", {"1": 1}, "logit_bias"),
        ("completions", "logprobs", 1, "logprobs"),
        ("completions", "echo", True, "echo"),
        ("completions", "prompt", [1, 2], "prompt"),
        ("completions", "prompt", [[1, 2]], "prompt"),
        ("embeddings", "input", "a", "model"),
    ],
)
def test_a_sealed_model_is_asked_for_nothing_but_text(
    read: Read, surface: str, field: str, value: Any, param: str
) -> None:
    refusal = refused(read, surface, **{"model": "muse", field: value})
    assert (refusal.code, refusal.param) == ("sealed_parameter", param)


BOMBS: dict[str, dict[str, Any]] = {
    "a range the wrong way round": {"type": "array", "minItems": 5, "maxItems": 2},
    "a length the wrong way round": {"type": "string", "minLength": 9, "maxLength": 2},
    "a bound beyond 32 bits": {"type": "array", "minItems": 5, "maxItems": 4294967298},
    "a bound below zero": {"type": "string", "maxLength": -1},
    "a bound that is no whole number": {"type": "string", "minLength": 1.5},
    "a pattern the wrong way round": {"type": "string", "pattern": "^a{5,2}$"},
    "the same with blanks": {"type": "string", "pattern": "^a{ 5, 2}$"},
    "a pattern in a pattern": {"type": "string", "pattern": "(a{0,99}b){0,99}" * 20},
    "a long pattern": {"type": "string", "pattern": "a" * 600},
    "many choices": {"enum": [f"v{number}" for number in range(300)]},
    "many properties": {"properties": {f"p{n}": {"type": "string"} for n in range(600)}},
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_schema_that_would_stop_the_engine_is_refused(read: Read, bomb: dict[str, Any]) -> None:
    """Each of them was seen to take a llama.cpp all its memory, or minutes, while nobody else was
    served by it."""
    inner = {"type": "object", "properties": {"a": bomb}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": inner}}
    tool = {"type": "function", "function": {"name": "f", "parameters": inner}}
    assert refused(read, "chat", response_format=form).code == "invalid_request"
    assert refused(read, "chat", tools=[tool]).code == "invalid_request"
    theirs = {"name": "f", "input_schema": inner}
    assert refused(read, "messages", tools=[theirs]).code == "invalid_request"


def test_usual_schemas_pass(read: Read) -> None:
    inner = {
        "type": "object",
        "properties": {
            "minItems": {"type": "integer", "minimum": -5, "maximum": 5},
            "list": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 20},
            "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
            "id": {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
            "most": {"type": "string", "pattern": "^a{,3}b{2,}c\\{x}$", "maxLength": 1000},
            "one": {"enum": [f"v{number}" for number in range(200)]},
        },
        "required": ["list"],
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": inner}}
    tool = {"type": "function", "function": {"name": "f", "parameters": inner}}
    read("chat", response_format=form, tools=[tool])
    read("messages", tools=[{"name": "f", "input_schema": inner}])


def test_what_a_call_was_given_is_no_schema(read: Read) -> None:
    given = {"minItems": 5, "maxItems": 2, "enum": list(range(2000))}
    call = {"type": "tool_use", "id": "call_1", "name": "f", "input": given}
    result = {"type": "tool_result", "tool_use_id": "call_1", "content": "done"}
    read(
        "messages",
        messages=[
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": [call]},
            {"role": "user", "content": [result]},
        ],
    )


@pytest.mark.parametrize("raw", [b"", b"{", b"[1", b'{"a":"\xff"}', b"{}x", b'{"a":NaN}'])
def test_a_body_that_is_no_json_says_so(raw: bytes, models: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as caught:
        prepare("chat", raw, models)
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("raw", [b"[]", b"3", b'"a"', b"null"])
def test_a_body_that_is_no_object_says_so(raw: bytes, models: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as caught:
        prepare("chat", raw, models)
    assert caught.value.code == "invalid_request"


def test_an_unknown_model_and_one_of_the_other_kind_are_two_things(read: Read) -> None:
    refusal = refused(read, "chat", model="none")
    assert (refusal.status, refusal.code, refusal.param) == (404, "model_not_found", "model")
    assert refused(read, "chat", model="mini").code == "invalid_request"
    assert refused(read, "embeddings", model="smol").code == "invalid_request"


# ---- what reaches the engine ---------------------------------------------------------------------


def test_a_plain_body_goes_on_as_it_came_with_ours_behind_it(models: dict[str, Any]) -> None:
    raw = b'{ "model":"smol","messages":[{"role":"user","content":"\\u00e9\\/"}],"stream":true }\n'
    rendered = prepare("chat", raw, models).render(12)
    assert rendered.startswith(raw[:70])
    body = orjson.loads(rendered)
    assert body["max_tokens"] == 12
    assert body["stream_options"] == {"include_usage": True}
    assert body["timings_per_token"] is True


def test_usage_is_asked_for_by_each_servers_names(read: Read, sent: Sent) -> None:
    body = sent(read("chat", model="gpu", stream=True, stream_options={"include_usage": False}))
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert "timings_per_token" not in body
    body = sent(read("chat", model="bare", stream=True, user="u"))
    assert body["stream_options"] == {"include_usage": True}
    assert "stream_options" not in sent(read("chat"))


def test_null_members_of_messages_and_what_was_echoed_do_not_reach_the_engine(
    read: Read, sent: Sent
) -> None:
    answered = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": [],
                "audio": None, "function_call": None, "tool_calls": None}  # fmt: skip
    user = {
        "role": "user",
        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
    }
    body = sent(read("chat", messages=[user, answered, user]))
    assert body["messages"][0] == {"role": "user", "content": "a\nb"}
    assert body["messages"][1] == {"role": "assistant", "content": "Hi"}


def test_calls_that_are_sent_back_keep_their_form(read: Read, sent: Sent) -> None:
    called = {**CALLED, "tool_calls": [
        {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
    ]}  # fmt: skip
    result = {"role": "tool", "tool_call_id": "c1", "content": "12:00"}
    messages = sent(read("chat", messages=[called, result]))["messages"]
    assert messages[0]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    ]
    assert messages[1] == result


@pytest.mark.parametrize(
    ("given", "asked"),
    [(7, 7), (-1, 4294967294), (1 << 40, (1 << 40) % 0xFFFFFFFF), (4294967295, 0)],
)
def test_a_seed_is_one_that_the_engine_does_not_take_for_chance(
    read: Read, sent: Sent, given: int, asked: int
) -> None:
    assert sent(read("chat", seed=given))["seed"] == asked


def test_several_choices_are_as_many_requests_with_seeds_of_their_own(
    read: Read, sent: Sent
) -> None:
    p = read("chat", n=3, seed=5)
    assert (p.legs, p.n, p.is_parsed) == (3, 3, True)
    legs = [sent(p, leg=leg) for leg in range(3)]
    assert [leg["seed"] for leg in legs] == [5, 6, 7]
    assert [leg["n"] for leg in legs] == [1, 1, 1]
    p = read("chat", model="gpu", n=3)
    assert (p.legs, p.n, sent(p)["n"]) == (1, 3, 3)


def test_several_prompts_are_as_many_requests(read: Read, sent: Sent) -> None:
    p = read("completions", prompt=["a", "b"], n=2)
    assert (p.legs, p.n) == (4, 4)
    assert [sent(p, leg=leg)["prompt"] for leg in range(4)] == ["a", "a", "b", "b"]
    p = read("completions", prompt=["a"])
    assert (p.legs, sent(p)["prompt"]) == (1, "a")
    assert sent(read("completions", prompt=[1, 2]))["prompt"] == [1, 2]


def test_log_probabilities_are_asked_for_as_the_engine_tells_them(read: Read, sent: Sent) -> None:
    assert sent(read("chat", logprobs=True))["top_logprobs"] == 1
    assert sent(read("chat", logprobs=True, top_logprobs=4))["top_logprobs"] == 4
    assert read("chat", logprobs=True).is_parsed


def test_a_tier_is_ours_and_the_default_is_default(read: Read) -> None:
    tiers = [read("chat", service_tier=tier).tier for tier in ("auto", "default", "flex", None)]
    assert tiers == ["default", "default", "flex", "default"]
    assert read("messages", service_tier="standard_only").tier == "default"
    assert read("messages", service_tier="flex").tier == "flex"


# ---- Messages ------------------------------------------------------------------------------------


def test_a_messages_request_is_a_chat_for_the_engine(read: Read, sent: Sent) -> None:
    p = read(
        "messages",
        system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "What time is it?"}]},
            {
                "role": "assistant",
                "content": [
                    {"type": "text", "text": "Let me look."},
                    {"type": "tool_use", "id": "t1", "name": "get_time", "input": {"zone": "UTC"}},
                ],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t1",
                        "content": "down",
                        "is_error": True,
                    },
                    {"type": "text", "text": "Well?"},
                ],
            },
        ],
        tools=[{**TOOL, "description": "What time it is."}],
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
        stop_sequences=["END"],
        stream=True,
        top_k=4,
    )
    body = sent(p)
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What time is it?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [
                {
                    "id": "t1",
                    "type": "function",
                    "function": {"name": "get_time", "arguments": '{"zone":"UTC"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "Error: down"},
        {"role": "user", "content": "Well?"},
    ]
    assert body["tools"][0]["function"]["parameters"] == {"type": "object"}
    assert body["tool_choice"] == "auto"
    assert body["parallel_tool_calls"] is False
    assert body["stop"] == ["END"]
    assert (body["stream"], body["timings_per_token"], body["top_k"]) == (True, True, 4)
    assert (p.path, p.is_parsed, p.cap) == (b"/v1/chat/completions", True, 16)
    assert "system" not in body


def test_tools_and_stops_need_a_chat_that_has_them(read: Read) -> None:
    assert refused(read, "messages", model="bare", tools=[TOOL]).param == "tools"
    assert refused(read, "messages", model="bare", stop_sequences=["a"]).param == "stop_sequences"


def test_counting_is_free_and_needs_no_cap(read: Read, sent: Sent) -> None:
    p = read("count_tokens", system="Be brief.")
    assert (p.cap, p.input_estimate, p.stream, p.is_parsed, p.needs_count) == (
        0,
        0,
        False,
        False,
        False,
    )
    assert p.path == b"/v1/chat/completions/input_tokens"
    assert len(sent(p)["messages"]) == 2
    body, counts = p.reply(b'{"input_tokens":36,"object":"response.input_tokens"}', "default")
    assert orjson.loads(body) == {"input_tokens": 36}
    assert (counts.prompt, counts.output) == (0, 0)
    assert refused(read, "count_tokens", model="gpu").code == "unsupported_parameter"


# ---- forced calls --------------------------------------------------------------------------------


def test_a_forced_call_is_asked_of_llama_cpp_as_a_schema(read: Read, sent: Sent) -> None:
    body = sent(read("chat", tools=[CHAT_TOOL], tool_choice="required", parallel_tool_calls=True))
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["name"] == {"const": "get_time"}
    assert schema["properties"]["arguments"] == CHAT_TOOL["function"]["parameters"]
    assert (body["tool_choice"], body["tools"]) == ("none", [CHAT_TOOL])
    assert "parallel_tool_calls" not in body


def test_a_named_call_allows_that_tool_alone(read: Read, sent: Sent) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    choice = {"type": "function", "function": {"name": "other"}}
    body = sent(read("chat", tools=[CHAT_TOOL, other], tool_choice=choice))
    schema = body["response_format"]["json_schema"]["schema"]
    assert schema["properties"] == {"name": {"const": "other"}, "arguments": {"type": "object"}}
    wrong = {"type": "function", "function": {"name": "none"}}
    refusal = refused(read, "chat", tools=[CHAT_TOOL], tool_choice=wrong)
    assert refusal.param == "tool_choice.function.name"


def test_references_of_several_tools_do_not_meet(read: Read, sent: Sent) -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        parameters = {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/A"}},
            "$defs": {"A": {"type": kind}},
        }
        return {"type": "function", "function": {"name": name, "parameters": parameters}}

    tools = [tool("f", "string"), tool("g", "number")]
    body = sent(read("chat", tools=tools, tool_choice="required"))
    schema = body["response_format"]["json_schema"]["schema"]
    for index, kind in enumerate(("string", "number")):
        assert schema["anyOf"][index]["properties"]["arguments"] == {
            "$ref": f"#/$defs/tool_{index}"
        }
        moved = schema["$defs"][f"tool_{index}"]
        assert moved["properties"]["a"] == {"$ref": f"#/$defs/tool_{index}/$defs/A"}
        assert moved["$defs"]["A"] == {"type": kind}


def test_other_servers_force_calls_themselves(read: Read, sent: Sent) -> None:
    body = sent(read("chat", model="gpu", tools=[CHAT_TOOL], tool_choice="required"))
    assert (body["tool_choice"], "response_format" in body) == ("required", False)
    body = sent(
        read(
            "messages", model="gpu", tools=[TOOL], tool_choice={"type": "tool", "name": "get_time"}
        )
    )
    assert body["tool_choice"] == {"type": "function", "function": {"name": "get_time"}}
    body = sent(read("messages", model="gpu", tools=[TOOL], tool_choice={"type": "any"}))
    assert body["tool_choice"] == "required"
    assert (
        refused(read, "messages", tools=[TOOL], tool_choice={"type": "tool", "name": "x"}).param
        == "tool_choice.name"
    )


def test_tools_that_must_not_be_called_are_still_told(read: Read, sent: Sent) -> None:
    p = read("chat", tools=[CHAT_TOOL], tool_choice="none")
    assert (sent(p)["tool_choice"], p.is_parsed) == ("none", False)
    assert read("chat", tools=[CHAT_TOOL]).is_parsed
