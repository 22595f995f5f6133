"""OpenAI's own client, sync and async, against a real model and its awkward cases on a mock."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from .conftest import GONE, MINILM, MOCKED, SMOL, Shop

SAY: list[Any] = [{"role": "user", "content": "Say the name of the capital of France."}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def steer(words: str) -> list[Any]:
    """A prompt that tells the mock what to do."""
    return [{"role": "user", "content": words}]


@pytest.fixture
def client(shop: Shop) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=shop.v1, api_key=shop.key, max_retries=0, timeout=60) as made:
        yield made


def test_an_answer_in_one_piece_and_its_bill(client: openai.OpenAI, shop: Shop) -> None:
    answer = client.chat.completions.create(model=SMOL, messages=SAY, max_tokens=24, temperature=0)
    assert "Paris" in str(answer.choices[0].message.content)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.model == SMOL
    assert answer.service_tier == "default"
    assert answer.usage is not None
    row = shop.bill(str(answer._request_id))
    assert (row.input_uncached + row.cache_read, row.output) == (
        answer.usage.prompt_tokens,
        answer.usage.completion_tokens,
    )
    assert row.outcome == "ok"
    assert row.micros > 0


def test_a_stream_says_the_same_and_bills_the_same(client: openai.OpenAI, shop: Shop) -> None:
    asked: Any = {"model": SMOL, "messages": SAY, "max_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
        rid = stream.response.headers["x-request-id"]
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None
    assert not any(chunk.usage for chunk in chunks[:-1])
    row = shop.bill(rid)
    assert (row.input_uncached + row.cache_read, row.output) == (
        usage.prompt_tokens,
        usage.completion_tokens,
    )
    assert all(
        chunk.model_extra == {} or "timings" not in (chunk.model_extra or {}) for chunk in chunks
    )


def test_usage_that_was_not_asked_for_is_not_in_the_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=SMOL, messages=steer("Count to a hundred."), max_tokens=8, temperature=0, stream=True
    )
    chunks = list(stream)
    assert all(chunk.usage is None for chunk in chunks)
    assert all(chunk.choices for chunk in chunks)
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_forced_tool_is_called(client: openai.OpenAI, choice: Any, is_stream: bool) -> None:
    asked: Any = {
        "model": SMOL,
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [WEATHER],
        "tool_choice": choice,
        "max_tokens": 64,
        "temperature": 0,
    }
    if is_stream:
        with client.chat.completions.stream(**asked) as stream:
            answer: Any = stream.get_final_completion()
    else:
        answer = client.chat.completions.create(**asked)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert isinstance(json.loads(call.function.arguments)["city"], str)
    assert call.id
    assert answer.choices[0].finish_reason == "tool_calls"
    # The answer to a call can be told, and the talk goes on.
    talk = [
        *asked["messages"],
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "Sunny, 21 degrees."},
    ]
    for message in talk:
        message.pop("parsed", None)
        for made in message.get("tool_calls", []):
            made["function"].pop("parsed_arguments", None)
    after = client.chat.completions.create(
        model=SMOL, messages=talk, tools=[WEATHER], max_tokens=16
    )
    assert after.choices[0].finish_reason in ("stop", "length", "tool_calls")


class Place(BaseModel):
    city: str
    people: int


def test_a_json_schema_is_kept(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=SMOL,
        messages=[{"role": "user", "content": "Name one city and how many people live there."}],
        response_format=Place,
        max_tokens=64,
        temperature=0,
    )
    assert isinstance(answer.choices[0].message.parsed, Place)


def test_stop_seed_and_several_choices_are_honoured(client: openai.OpenAI, shop: Shop) -> None:
    asked: Any = {"model": SMOL, "messages": SAY, "max_tokens": 16}
    one, two = (
        client.chat.completions.create(**asked, seed=7, temperature=1.5).choices[0].message.content
        for _ in range(2)
    )
    assert one == two
    cut = client.chat.completions.create(**asked, temperature=0, stop=["Paris"])
    assert "Paris" not in str(cut.choices[0].message.content)
    assert cut.choices[0].finish_reason == "stop"
    several = client.chat.completions.create(**asked, n=3, temperature=2.0)
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.usage is not None
    assert several.usage.completion_tokens > 16, "the model server counts the first choice alone"
    assert shop.bill(str(several._request_id)).output == several.usage.completion_tokens


def test_both_names_of_the_cap(client: openai.OpenAI) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        asked: Any = {name: 5}
        answer = client.chat.completions.create(
            model=SMOL, messages=steer("Count to a hundred."), temperature=0, **asked
        )
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 5


def test_completions_of_old(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=SMOL, prompt="The capital of France is", max_tokens=4, temperature=0
    )
    assert "Paris" in answer.choices[0].text
    stream = client.completions.create(
        model=SMOL, prompt="The capital of France is", max_tokens=4, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == answer.choices[0].text


def test_embeddings_in_base64_and_in_numbers_are_the_same(
    client: openai.OpenAI, shop: Shop
) -> None:
    texts = ["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose."]
    # The SDK asks for base64 unless told otherwise, and reads it back into numbers.
    packed = client.embeddings.create(model=MINILM, input=texts)
    plain = client.embeddings.create(model=MINILM, input=texts, encoding_format="float")
    assert [found.index for found in packed.data] == [0, 1, 2]
    assert len(packed.data[0].embedding) == 384
    for a, b in zip(packed.data, plain.data, strict=True):
        assert a.embedding == pytest.approx(b.embedding, abs=1e-5)

    def near(a: int, b: int) -> float:
        one, two = plain.data[a].embedding, plain.data[b].embedding
        size = math.hypot(*one) * math.hypot(*two)
        return sum(x * y for x, y in zip(one, two, strict=True)) / size

    assert near(0, 1) > near(0, 2) + 0.3
    with client.embeddings.with_streaming_response.create(model=MINILM, input=texts[0]) as raw:
        row = shop.bill(raw.headers["x-request-id"])
    assert (row.output, row.surface) == (0, "embeddings")
    assert row.input_uncached + row.cache_read > 3


def test_an_input_too_long_to_embed_is_the_request_s_fault_and_free(
    client: openai.OpenAI, shop: Shop
) -> None:
    """The engine answers 500 to it, as if another replica might do better."""
    with pytest.raises(openai.BadRequestError) as raised:
        client.embeddings.create(model=MINILM, input="word " * 2000)
    assert (raised.value.code, raised.value.param) == ("context_length_exceeded", "input")
    row = shop.bill(raised.value.response.headers["x-request-id"])
    assert (row.outcome, row.micros) == ("failed", 0)


def test_the_models_are_listed_and_shown(client: openai.OpenAI, shop: Shop) -> None:
    assert {model.id for model in client.models.list()} >= {SMOL, MINILM, MOCKED, GONE}
    assert client.models.retrieve(SMOL).owned_by
    bound = client.with_options(api_key=shop.keys["bound"])
    assert [model.id for model in bound.models.list()] == [MOCKED]
    with pytest.raises(openai.NotFoundError):
        bound.models.retrieve(SMOL)


def test_raw_headers(client: openai.OpenAI, shop: Shop) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MOCKED, messages=steer("n=3"), service_tier="auto"
    )
    head = raw.headers
    assert raw.parse().choices[0].message.content == " w0 w1 w2"
    assert shop.bill(head["x-request-id"]).output == 3
    assert head["x-sublet-tier"] == "default"
    assert head["x-sublet-deployment"] == "dep_mock"
    assert head["x-sublet-quantization"] == "Q4_1"
    for unit in ("requests", "tokens"):
        limit, left = (int(head[f"x-ratelimit-{what}-{unit}"]) for what in ("limit", "remaining"))
        assert 0 <= left <= limit
        assert head[f"x-ratelimit-reset-{unit}"].endswith("s")


def test_each_cause_raises_its_own_class(client: openai.OpenAI, shop: Shop) -> None:
    def ask(key: str = "", model: str = MOCKED, **fields: Any) -> None:
        asking = client.with_options(api_key=key) if key else client
        asking.chat.completions.create(**{"model": model, "messages": steer("n=2"), **fields})

    cases: list[tuple[type[openai.APIStatusError], int, str, dict[str, Any]]] = [
        (openai.AuthenticationError, 401, "invalid_api_key", {"key": "sk-nobody"}),
        (openai.NotFoundError, 404, "model_not_found", {"model": "gpt-9"}),
        (openai.PermissionDeniedError, 403, "model_not_allowed", {"key": "bound", "model": SMOL}),
        (openai.APIStatusError, 402, "insufficient_quota", {"key": "poor"}),
        (openai.BadRequestError, 400, "invalid_request", {"temperature": "hot"}),
        (openai.BadRequestError, 400, "invalid_request", {"messages": []}),
        (openai.BadRequestError, 400, "unsupported_parameter", {"extra_body": {"best_of": 3}}),
        (
            openai.BadRequestError,
            400,
            "invalid_request",
            {"max_tokens": 5, "max_completion_tokens": 9},
        ),
        (
            openai.BadRequestError,
            400,
            "context_length_exceeded",
            {"messages": steer("status=context")},
        ),
        (openai.InternalServerError, 503, "no_replica", {"messages": steer("status=503")}),
    ]
    rows = shop.count()
    for kind, status, code, given in cases:
        key = given.pop("key", "")
        with pytest.raises(kind) as raised:
            ask(key=shop.keys.get(key, key), **given)
        assert raised.value.status_code == status, given
        assert raised.value.code == code, given
        assert raised.value.request_id
        assert raised.value.response.headers["x-request-id"] == raised.value.request_id
    # Only what a model server was asked has a row, and nothing of it is billed.
    assert shop.count() - rows == 2


def test_what_a_model_does_not_take_is_refused_by_name(client: openai.OpenAI) -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    talk: Any = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model=SMOL, messages=talk)
    assert raised.value.param == "messages[0].content[1].type"


def test_a_prompt_beyond_the_context_of_a_real_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(
            model=SMOL, messages=steer("many words " * 2000), max_tokens=8
        )
    assert raised.value.code == "context_length_exceeded"
    assert "2048" in raised.value.message


def test_a_cut_stream_raises_and_bills_what_was_delivered(
    client: openai.OpenAI, shop: Shop
) -> None:
    with client.chat.completions.create(
        model=MOCKED, messages=steer("n=20 die=7 delay=0.001"), stream=True
    ) as stream:
        got: list[str | None] = []
        with pytest.raises(openai.APIError, match="interrupted"):
            got.extend(chunk.choices[0].delta.content for chunk in stream)
        rid = stream.response.headers["x-request-id"]
    row = shop.bill(rid)
    assert row.outcome == "interrupted"
    assert row.output == sum(text is not None for text in got)


def test_a_reached_limit_is_waited_out(client: openai.OpenAI, shop: Shop) -> None:
    slow = client.with_options(api_key=shop.keys["slow"], max_retries=0)

    def many() -> None:
        for _ in range(200):
            slow.chat.completions.create(model=MOCKED, messages=steer("n=1"))

    with pytest.raises(openai.RateLimitError) as raised:
        many()
    head = raised.value.response.headers
    assert raised.value.code == "rate_limit_exceeded"
    assert head["x-ratelimit-remaining-requests"] == "0"
    seconds = int(head["retry-after"])
    before = time.monotonic()
    answer = slow.with_options(max_retries=1).chat.completions.create(
        model=MOCKED, messages=steer("n=1")
    )
    assert answer.choices
    assert seconds >= 1
    assert time.monotonic() - before < 10


def test_a_server_that_is_away_is_waited_for(client: openai.OpenAI, shop: Shop) -> None:
    with pytest.raises(openai.InternalServerError) as raised:
        client.chat.completions.create(model=GONE, messages=steer("n=2"))
    assert (raised.value.code, raised.value.status_code) == ("no_replica", 503)
    assert int(raised.value.response.headers["retry-after"]) <= 5
    before = time.monotonic()
    with shop.mock_later("gone.sock", 0.5):
        answer = client.with_options(max_retries=2).chat.completions.create(
            model=GONE, messages=steer("n=2")
        )
    assert answer.choices[0].message.content == " w0 w1"
    assert time.monotonic() - before >= 1, "the SDK honours retry-after"


def test_many_at_once_through_the_async_client(shop: Shop) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=shop.v1, api_key=shop.key, max_retries=0) as client:

            async def whole(number: int) -> str:
                raw = await client.chat.completions.with_raw_response.create(
                    model=MOCKED, messages=steer(f"n={number}")
                )
                answer = raw.parse()
                assert answer.usage is not None
                assert answer.usage.completion_tokens == number
                return raw.headers["x-request-id"]

            async def streamed(number: int) -> str:
                stream = await client.chat.completions.create(
                    model=MOCKED, messages=steer(f"n={number} delay=0.001"), stream=True
                )
                got = [chunk async for chunk in stream]
                text = "".join(c.choices[0].delta.content or "" for c in got if c.choices)
                assert text == "".join(f" w{index}" for index in range(number))
                return stream.response.headers["x-request-id"]

            ids = await asyncio.gather(
                *(whole(n) for n in range(1, 21)), *(streamed(n) for n in range(1, 21))
            )
            assert [shop.bill(rid).output for rid in ids] == [*range(1, 21), *range(1, 21)]
            real = await client.chat.completions.create(model=SMOL, messages=SAY, max_tokens=4)
            assert real.choices[0].message.content

    asyncio.run(ask())


def test_a_stream_that_is_left_is_stopped_and_billed(client: openai.OpenAI, shop: Shop) -> None:
    with client.chat.completions.create(
        model=MOCKED, messages=steer("n=400 delay=0.01"), stream=True
    ) as stream:
        rid = stream.response.headers["x-request-id"]
        for number, _ in enumerate(stream):
            if number == 5:
                break
    end = time.monotonic() + 5
    while not any(
        event.id == rid for e in shop.gateway.epochs() for event in shop.gateway.events(e)
    ):
        assert time.monotonic() < end, "a stream that was left is not billed"
        time.sleep(0.02)
    row = shop.bill(rid)
    assert row.outcome == "client_gone"
    assert 4 <= row.output <= 40


def test_a_real_model_server_is_heard_out_where_nothing_streams(
    client: openai.OpenAI, shop: Shop
) -> None:
    """llama.cpp goes on for nobody there: who hangs up pays for what it made."""
    shop.await_idle(SMOL)
    before = {event.id for e in shop.gateway.epochs() for event in shop.gateway.events(e)}
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3, max_retries=0).chat.completions.create(
            model=SMOL,
            messages=steer("Tell a very long story of the sea, with many chapters."),
            max_tokens=200,
            logit_bias={"2": -100},
        )
    shop.await_idle(SMOL, seconds=30)
    end = time.monotonic() + 5
    while True:
        rows = [event for e in shop.gateway.epochs() for event in shop.gateway.events(e)]
        fresh = [row for row in rows if row.id not in before]
        if fresh:
            break
        assert time.monotonic() < end, "it is not billed"
        time.sleep(0.02)
    assert [(row.outcome, row.output) for row in fresh] == [("client_gone", 200)]


def test_a_real_model_server_stops_for_who_left(client: openai.OpenAI, shop: Shop) -> None:
    shop.await_idle(SMOL)
    with client.chat.completions.create(
        model=SMOL,
        messages=steer("Tell a very long story of the sea, with many chapters."),
        max_tokens=1000,
        temperature=1.5,
        logit_bias={"2": -100},  # Its end is not to come by itself.
        stream=True,
    ) as stream:
        begun = [next(stream) for _ in range(5)]
    assert all(not chunk.choices[0].finish_reason for chunk in begun)
    shop.await_idle(SMOL, seconds=3)
