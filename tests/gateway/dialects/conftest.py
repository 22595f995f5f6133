"""Routes as a snapshot would name them, and requests prepared for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import orjson
import pytest

from sublet.base.wire.gateway import ModelRoute, Price
from sublet.gateway.dialects import Prepared, prepare

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "frequency_penalty", "presence_penalty",
    "logit_bias", "stop",
)  # fmt: skip
FIELDS = {
    "chat": (
        *SAMPLING, "logprobs", "top_logprobs", "response_format", "tools", "tool_choice",
        "parallel_tool_calls",
    ),
    "completions": SAMPLING,
    "messages": ("temperature", "top_p", "top_k"),
    "embeddings": ("encoding_format",),
}  # fmt: skip


@dataclass(frozen=True)
class AModel:
    route: ModelRoute


def a_route(name: str, **changes: Any) -> ModelRoute:
    price = Price(version="v1", input_micros=1, cached_micros=1, output_micros=1)
    facts: dict[str, Any] = {
        "name": name,
        "kind": "generate",
        "deployment_id": "dep_1",
        "server": "llama.cpp",
        "context": 512,
        "max_output": 512,
        "quantization": "Q4_1",
        "owned_by": "owner",
        "created_s": 1_700_000_000,
        "lifecycle": "active",
        "is_sealed": False,
        "max_n": 8,
        "splits_n": True,
        "counters": "timings_per_token",
        "fields": FIELDS,
        "prices": {"default": price, "flex": price},
    }
    return ModelRoute(**{**facts, **changes})


MODELS = {
    route.name: AModel(route)
    for route in (
        a_route("smol"),
        a_route("muse", is_sealed=True),
        a_route("mini", kind="embed", counters="", context=256),
        a_route("mini-plain", kind="embed", counters="", fields={}),
        a_route("big", context=1 << 20, max_output=4096),
        a_route("bare", fields={}, counters=""),
        a_route(
            "gpu",
            server="vllm",
            counters="continuous_usage_stats",
            splits_n=False,
            fields={**FIELDS, "completions": (*SAMPLING, "logprobs", "echo", "suffix")},
        ),
    )
}


@pytest.fixture(scope="session")
def models() -> dict[str, AModel]:
    return MODELS


@pytest.fixture(scope="session")
def read() -> Callable[..., Prepared]:
    """A request of a surface, with what is not said filled in."""

    def read(surface: Any, **fields: Any) -> Prepared:
        body: dict[str, Any] = {"model": "smol"}
        if surface in ("chat", "messages", "count_tokens"):
            body["messages"] = [{"role": "user", "content": "Hello."}]
        if surface == "completions":
            body["prompt"] = "Once"
        if surface == "messages":
            body["max_tokens"] = 16
        if surface == "embeddings":
            body["model"] = "mini"
            body["input"] = "Hello."
        return prepare(surface, orjson.dumps({**body, **fields}), MODELS)

    return read


@pytest.fixture(scope="session")
def sent() -> Callable[..., dict[str, Any]]:
    """What an engine reads of it: of a name given twice, the last."""

    def sent(prepared: Prepared, cap: int | None = None, leg: int = 0) -> dict[str, Any]:
        rendered = prepared.render(prepared.cap if cap is None else cap, leg)
        body: dict[str, Any] = orjson.loads(rendered)
        return body

    return sent
