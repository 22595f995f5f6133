"""Anthropic's own client against the same models."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from .conftest import MOCKED, SMOL, Shop

SAY: Any = [{"role": "user", "content": "Say the name of the capital of France."}]
COLD = {"temperature": 0}
"""The SDK has no argument of that name."""
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}


def steer(words: str) -> Any:
    return [{"role": "user", "content": words}]


@pytest.fixture
def client(shop: Shop) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=shop.url, api_key=shop.key, max_retries=0, timeout=60
    ) as made:
        yield made


def test_a_message_and_its_bill(client: anthropic.Anthropic, shop: Shop) -> None:
    raw = client.messages.with_raw_response.create(
        model=SMOL, messages=SAY, max_tokens=24, extra_body=COLD
    )
    answer = raw.parse()
    (block,) = answer.content
    assert block.type == "text"
    assert "Paris" in block.text
    assert (answer.role, answer.type, answer.model) == ("assistant", "message", SMOL)
    assert answer.stop_reason in ("end_turn", "max_tokens")
    assert raw.headers["request-id"] == raw.headers["x-request-id"], "their SDK reads the first"
    row = shop.bill(raw.headers["x-request-id"])
    assert row.surface == "messages"
    assert row.output == answer.usage.output_tokens
    assert row.input_uncached == answer.usage.input_tokens
    assert row.cache_read == (answer.usage.cache_read_input_tokens or 0)


def test_a_stream_says_the_same(client: anthropic.Anthropic, shop: Shop) -> None:
    asked: Any = {"model": SMOL, "messages": SAY, "max_tokens": 24, "extra_body": COLD}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
        rid = stream.response.headers["x-request-id"]
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert final.stop_reason == whole.stop_reason
    row = shop.bill(rid)
    assert row.output == final.usage.output_tokens
    # What the start said and what the end says are the same count, not two to be added.
    assert row.input_uncached == final.usage.input_tokens
    with client.messages.create(**asked, stream=True) as raw:
        kinds = [event.type for event in raw]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 1


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_forced_tool_is_used(client: anthropic.Anthropic, choice: Any, is_stream: bool) -> None:
    asked: Any = {
        "model": SMOL,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER],
        "tool_choice": choice,
        "max_tokens": 64,
        "extra_body": COLD,
    }
    if is_stream:
        with client.messages.stream(**asked) as stream:
            answer = stream.get_final_message()
    else:
        answer = client.messages.create(**asked)
    (block,) = [found for found in answer.content if found.type == "tool_use"]
    assert block.name == "get_weather"
    assert isinstance(block.input["city"], str)
    assert answer.stop_reason == "tool_use"
    talk = [
        *asked["messages"],
        {"role": "assistant", "content": [block.model_dump(exclude_none=True)]},
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": block.id, "content": "Sunny, 21 degrees."}
            ],
        },
    ]
    after = client.messages.create(model=SMOL, messages=talk, tools=[WEATHER], max_tokens=16)
    assert after.stop_reason in ("end_turn", "max_tokens", "tool_use")


def test_system_and_stop_sequences_are_honoured(client: anthropic.Anthropic) -> None:
    answer = client.messages.create(
        model=SMOL,
        system="You are a helpful assistant.",
        messages=SAY,
        max_tokens=24,
        extra_body=COLD,
        stop_sequences=["Paris"],
    )
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence == "Paris"
    assert all("Paris" not in block.text for block in answer.content if block.type == "text")


def test_tokens_are_counted_as_they_are_billed(client: anthropic.Anthropic, shop: Shop) -> None:
    rows = shop.count()
    counted = client.messages.count_tokens(model=SMOL, messages=SAY).input_tokens
    assert shop.count() == rows or all(
        event.micros == 0
        for epoch in shop.gateway.epochs()
        for event in list(shop.gateway.events(epoch))[rows:]
    ), "counting costs nothing"
    usage = client.messages.create(model=SMOL, messages=SAY, max_tokens=1).usage
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_each_cause_raises_its_own_class(client: anthropic.Anthropic, shop: Shop) -> None:
    cases: list[tuple[type[anthropic.APIStatusError], int, str, dict[str, Any]]] = [
        (anthropic.AuthenticationError, 401, "authentication_error", {"key": "sk-nobody"}),
        (anthropic.NotFoundError, 404, "not_found_error", {"model": "claude-9"}),
        (anthropic.PermissionDeniedError, 403, "permission_error", {"key": "bound", "model": SMOL}),
        (anthropic.APIStatusError, 402, "billing_error", {"key": "poor"}),
        (
            anthropic.BadRequestError,
            400,
            "invalid_request_error",
            {"extra_body": {"temperature": "hot"}},
        ),
        (anthropic.BadRequestError, 400, "invalid_request_error", {"messages": []}),
        (anthropic.BadRequestError, 400, "invalid_request_error", {"max_tokens": 0}),
        (anthropic.APIStatusError, 503, "overloaded_error", {"messages": steer("status=503")}),
    ]
    for kind, status, name, given in cases:
        key = given.pop("key", "")
        asking = client.with_options(api_key=shop.keys.get(key, key)) if key else client
        with pytest.raises(kind) as raised:
            asking.messages.create(
                **{"model": MOCKED, "messages": steer("n=2"), "max_tokens": 4, **given}
            )
        assert raised.value.status_code == status, given
        body: Any = raised.value.body
        assert body["type"] == "error"
        assert body["error"]["type"] == name, given
        assert raised.value.request_id == raised.value.response.headers["x-request-id"]


def test_a_cut_stream_raises_and_bills_what_was_delivered(
    client: anthropic.Anthropic, shop: Shop
) -> None:
    with client.messages.stream(
        model=MOCKED, messages=steer("n=20 die=7 delay=0.001"), max_tokens=64
    ) as stream:
        got: list[str] = []
        with pytest.raises(anthropic.APIError, match="interrupted"):
            got.extend(stream.text_stream)
        rid = stream.response.headers["x-request-id"]
    row = shop.bill(rid)
    assert row.outcome == "interrupted"
    assert 0 < row.output <= 7


def test_many_at_once_through_the_async_client(shop: Shop) -> None:
    async def ask() -> None:
        async with anthropic.AsyncAnthropic(
            base_url=shop.url, api_key=shop.key, max_retries=0
        ) as client:

            async def streamed(number: int) -> str:
                async with client.messages.stream(
                    model=MOCKED, messages=steer(f"n={number} delay=0.001"), max_tokens=64
                ) as stream:
                    text = "".join([piece async for piece in stream.text_stream])
                    assert text == "".join(f" w{index}" for index in range(number))
                    return str(stream.response.headers["x-request-id"])

            ids = await asyncio.gather(*(streamed(number) for number in range(1, 21)))
            assert [shop.bill(rid).output for rid in ids] == list(range(1, 21))

    asyncio.run(ask())
