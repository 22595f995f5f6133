"""Whatever is sent: `prepare` answers or refuses, and no field passes that nobody listed."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from sublet.gateway.dialects import SURFACES, Prepared, prepare
from sublet.gateway.errors import KINDS, Refusal

surfaces = st.sampled_from(sorted(set(SURFACES.values())))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 63), (1 << 64) - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8),
)
names = st.sampled_from(
    [
        "model", "messages", "prompt", "input", "role", "content", "type", "text", "name", "id",
        "function", "arguments", "tools", "tool_choice", "tool_calls", "parameters", "stream",
        "stream_options", "include_usage", "max_tokens", "max_completion_tokens", "n", "seed",
        "stop", "stop_sequences", "system", "temperature", "logprobs", "top_logprobs",
        "logit_bias", "response_format", "json_schema", "schema", "service_tier", "metadata",
        "user", "store", "thinking", "input_schema", "encoding_format", "best_of", "suffix",
        "echo", "modalities", "parallel_tool_calls", "tool_use_id", "is_error", "$ref",
    ]
)  # fmt: skip
words = st.sampled_from(
    [
        "smol", "muse", "mini", "gpu", "user", "assistant", "system", "tool", "function", "text",
        "auto", "required", "any", "none", "json_schema", "json_object", "tool_use",
        "tool_result", "flex", "base64", "get_a", "#/$defs/A", "{}",
    ]
)  # fmt: skip
values = st.recursive(
    scalars | words,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(names | st.text(max_size=4), inner, max_size=5)
    ),
    max_leaves=24,
)
bodies = st.dictionaries(names, values, max_size=8)


def try_prepare(surface: Any, raw: bytes, models: Any) -> Prepared | None:
    try:
        prepared = prepare(surface, raw, models)
    except Refusal as caught:
        refusal = caught
    else:
        return check(prepared)
    assert refusal.code in KINDS
    assert refusal.status in (400, 404)
    return None


def check(prepared: Prepared) -> Prepared:
    assert prepared.cap <= prepared.route.max_output
    for leg in range(prepared.legs):
        orjson.loads(prepared.render(max(prepared.cap, 1), leg))
    return prepared


@given(surfaces, values)
@settings(max_examples=300)
def test_any_json_is_prepared_or_refused(models: Any, surface: Any, value: Any) -> None:
    try_prepare(surface, orjson.dumps(value), models)


@given(surfaces, st.binary(max_size=64))
def test_any_bytes_are_prepared_or_refused(models: Any, surface: Any, raw: bytes) -> None:
    try_prepare(surface, raw, models)


@given(surfaces, st.sampled_from(["smol", "muse", "mini", "gpu"]), bodies)
@settings(max_examples=600)
def test_any_fields_are_prepared_or_refused(
    models: Any, surface: Any, model: str, body: dict[str, Any]
) -> None:
    full = {
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "a"}],
        "prompt": "a",
        "input": "a",
        **body,
        "model": model,
    }
    for key in {"messages", "prompt", "input", "max_tokens"} - set(body):
        if key != OWN.get(surface) and not (key == "max_tokens" and surface == "messages"):
            del full[key]
    try_prepare(surface, orjson.dumps(full), models)


OWN = {
    "chat": "messages",
    "messages": "messages",
    "count_tokens": "messages",
    "completions": "prompt",
    "embeddings": "input",
}
TOOL = {"type": "function", "function": {"name": "get_a", "parameters": {"type": "object"}}}
CALL = {"id": "c", "type": "function", "function": {"name": "get_a", "arguments": "{}"}}
RICH: dict[str, dict[str, Any]] = {
    "chat": {
        "model": "smol",
        "messages": [
            {"role": "system", "content": "a"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "a"},
        ],
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "get_a"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": 2,
        "seed": 3,
        "stop": ["a"],
        "logit_bias": {"1": 2},
        "max_completion_tokens": 9,
        "metadata": {"a": "b"},
    },
    "completions": {"model": "smol", "prompt": [[1, 2], [3]], "n": 2, "best_of": 2, "seed": 1},
    "embeddings": {"model": "mini-plain", "input": ["a", "b"], "encoding_format": "base64"},
    "messages": {
        "model": "smol",
        "max_tokens": 9,
        "system": [{"type": "text", "text": "a"}],
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": "t", "name": "get_a", "input": {"x": 1}}],
            },
            {
                "role": "user",
                "content": [
                    {
                        "type": "tool_result",
                        "tool_use_id": "t",
                        "content": [{"type": "text", "text": "a"}],
                    },
                    {"type": "text", "text": "a"},
                ],
            },
        ],
        "tools": [{"name": "get_a", "input_schema": {"type": "object"}}],
        "tool_choice": {"type": "tool", "name": "get_a"},
        "stop_sequences": ["a"],
        "thinking": {"type": "disabled"},
        "metadata": {"user_id": "u"},
    },
}
RICH["count_tokens"] = RICH["messages"]


@given(surfaces, st.data())
@settings(max_examples=600)
def test_a_good_request_with_one_part_gone_wrong(models: Any, surface: str, data: Any) -> None:
    body = orjson.loads(orjson.dumps(RICH[surface]))
    assert try_prepare(surface, orjson.dumps(body), models) is not None
    at: Any = body
    while True:
        key = data.draw(st.sampled_from(list(at) if type(at) is dict else list(range(len(at)))))
        if not at[key] or type(at[key]) not in (dict, list) or data.draw(st.booleans()):
            break
        at = at[key]
    if data.draw(st.booleans()):
        at[key] = data.draw(scalars | words | values)
    else:
        del at[key]
    try_prepare(surface, orjson.dumps(body), models)


KNOWN_UPSTREAM = {
    "model", "messages", "prompt", "input", "stream", "stream_options", "timings_per_token",
    "max_tokens", "max_completion_tokens", "n", "tools", "tool_choice", "parallel_tool_calls",
    "response_format", "stop", "verbose", "top_logprobs", "encoding_format",
}  # fmt: skip


@given(
    surfaces,
    st.sampled_from(["smol", "muse", "mini", "gpu"]),
    st.text(min_size=1, max_size=12) | names,
    scalars | values,
)
@settings(max_examples=500)
def test_a_field_that_nobody_lists_never_reaches_an_engine(
    models: Any, surface: Any, model: str, field: str, value: Any
) -> None:
    body = {"model": model, OWN[surface]: [{"role": "user", "content": "a"}]}
    if surface in ("completions", "embeddings"):
        body[OWN[surface]] = "a"
    if surface == "messages":
        body["max_tokens"] = 5
    prepared = try_prepare(surface, orjson.dumps({field: value, **body}), models)
    if prepared is None:
        return
    listed = {name for fields in prepared.route.fields.values() for name in fields}
    for leg in range(prepared.legs):
        upstream = orjson.loads(prepared.render(max(prepared.cap, 1), leg))
        assert set(upstream) <= KNOWN_UPSTREAM | listed
        if prepared.route.is_sealed:
            assert not upstream.get("logprobs")
            assert not {"logit_bias", "grammar", "echo", "n_probs"} & set(upstream)


@given(st.lists(st.tuples(st.sampled_from(["user", "system", "assistant"]), st.text()), min_size=1))
def test_the_bound_covers_a_token_for_each_byte_and_a_frame_for_each_message(
    models: Any, turns: list[tuple[str, str]]
) -> None:
    body = {
        "model": "big",
        "messages": [{"role": role, "content": text} for role, text in turns],
    }
    prepared = prepare("chat", orjson.dumps(body), models)
    most = sum(len(text.encode()) + len(role) + 4 for role, text in turns) + 64
    assert prepared.input_estimate >= most


def test_the_bound_is_never_above_the_context(models: Any) -> None:
    text = "a" * 9000
    body = {"model": "smol", "messages": [{"role": "user", "content": text}]}
    assert prepare("chat", orjson.dumps(body), models).input_estimate == 512
    several = {"model": "mini", "input": [text, text]}
    assert prepare("embeddings", orjson.dumps(several), models).input_estimate == 512
