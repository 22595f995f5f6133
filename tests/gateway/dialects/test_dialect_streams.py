"""Streams that pass as bytes: exactly our cuts, whatever a model writes."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from sublet.gateway.dialects import cut_counters, cut_usage, splice_first
from sublet.gateway.dialects.streams import APART, NEVER, PASS, object_end

HEAD = {"created": 1, "id": "chatcmpl-1", "model": "smol", "object": "chat.completion.chunk"}
TIMINGS = {"cache_n": 35, "prompt_n": 1, "prompt_ms": 9.184, "predicted_n": 7, "predicted_ms": 0.1}
USAGE = {
    "completion_tokens": 3,
    "prompt_tokens": 36,
    "total_tokens": 39,
    "prompt_tokens_details": {"cached_tokens": 35},
}
DONE = b"data: [DONE]\n\n"

nasty = st.one_of(
    st.text(),
    st.sampled_from(
        [
            ',"timings":{"predicted_n":9}',
            ',"usage":{"completion_tokens":99}',
            '\\",\\"usage\\":{',
            'x",',
            '"choices":[]',
            "\\",
            ',"usage":null',
            "}}\n\ndata: [DONE]\n\n",
            "渐😀",
        ]
    ),
    st.lists(st.sampled_from(list('",:{}\\usagetimn \n'))).map("".join),
)


def event(values: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(values) + b"\n\n"


def chunk(text: str, **more: Any) -> dict[str, Any]:
    choice = {"finish_reason": None, "index": 0, "delta": {"content": text}}
    return {"choices": [choice], **HEAD, **more}


def read(events: bytes) -> list[Any]:
    return [
        orjson.loads(part[6:]) if part != b"data: [DONE]" else "[DONE]"
        for part in events.split(b"\n\n")
        if part
    ]


@given(st.lists(nasty, min_size=1, max_size=6), st.booleans())
def test_counters_are_cut_and_nothing_else(texts: list[str], is_last: bool) -> None:
    plain = [chunk(text) for text in texts]
    counted = [
        {**values, "timings": {**TIMINGS, "predicted_n": index + 1}}
        for index, values in enumerate(plain)
    ]
    tail = DONE if is_last else b""
    out, made = cut_counters(b"".join(map(event, counted)) + tail)
    assert out == b"".join(map(event, plain)) + tail
    assert made == len(texts)


@given(st.lists(nasty, max_size=6))
def test_what_holds_no_counters_is_left_as_it_is(texts: list[str]) -> None:
    events = b"".join(event(chunk(text)) for text in texts)
    assert cut_counters(events) == (events, None)
    assert cut_usage(events, NEVER) == (events, None)
    assert cut_usage(events, PASS) == (events, None)


@given(st.lists(nasty, max_size=4), st.booleans())
def test_usage_leaves_only_where_it_was_asked_for(texts: list[str], wants: bool) -> None:
    before = b"".join(event(chunk(text)) for text in texts)
    last = event({"choices": [], **HEAD, "usage": USAGE})
    out, usage = cut_usage(before + last + DONE, PASS if wants else NEVER)
    assert usage == USAGE
    assert out == before + (last if wants else b"") + DONE


@given(st.lists(nasty, min_size=1, max_size=4), st.booleans())
def test_running_counts_are_cut_out_of_each_event(texts: list[str], wants: bool) -> None:
    """vLLM tells usage in every event, and once more alone."""
    plain = [event(chunk(text)) for text in texts]
    counted = [event(chunk(text, usage={**USAGE, "completion_tokens": 1})) for text in texts]
    last = event({"choices": [], **HEAD, "usage": USAGE})
    out, usage = cut_usage(b"".join(counted) + last + DONE, PASS if wants else NEVER)
    assert usage == USAGE
    assert out == b"".join(plain) + (last if wants else b"") + DONE


@given(nasty)
def test_usage_beside_the_last_choice_is_told_in_an_event_of_its_own(text: str) -> None:
    """llama.cpp's completions."""
    head = {**HEAD, "object": "text_completion"}
    choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": "stop"}
    given = event({"choices": [choice], "object": head["object"], "usage": USAGE, **head})
    out, usage = cut_usage(given + DONE, APART)
    assert usage == USAGE
    first, second, third = read(out)
    assert first == {"choices": [choice], **head}
    assert second == {"choices": [], "usage": USAGE, **head}
    assert third == "[DONE]"
    assert read(cut_usage(given + DONE, NEVER)[0]) == [first, third]


@given(nasty)
def test_the_tier_is_told_in_the_first_event(text: str) -> None:
    rest = event(chunk(text))
    out = splice_first(event(chunk(text)) + rest, "flex")
    assert out.endswith(rest)
    assert read(out)[0] == {**chunk(text), "service_tier": "flex"}
    assert read(splice_first(event({**HEAD, "service_tier": None}), "flex"))[0] == {
        **HEAD,
        "service_tier": "flex",
    }


def test_without_data_there_is_no_first_event() -> None:
    assert splice_first(b": busy\n\n", "default") == b": busy\n\n"


def test_null_usage_is_no_usage() -> None:
    """vLLM without running counts."""
    events = event(chunk("a", usage=None)) + event({"choices": [], **HEAD, "usage": USAGE})
    out, usage = cut_usage(events, NEVER)
    assert (out, usage) == (event(chunk("a")), USAGE)


nested = st.recursive(
    st.integers(-(1 << 63), 1 << 63) | st.none() | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from("abcd"), nested), st.binary())
def test_the_end_of_an_object_of_numbers_is_found_by_its_braces(
    values: dict[str, Any], after: bytes
) -> None:
    written = orjson.dumps(values)
    assert object_end(b"xx" + written + after, 2) == 2 + len(written)
    assert object_end(written[:-1], 0) == -1
