"""What an event of a stream costs in the dialects, by what is done to it. In process, no sockets.

Most events pass as bytes; those of llama.cpp have the counters cut out that were asked for; events
with tool calls, and all of the Messages surface, are parsed and written anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import orjson

from bench.gateway.alone import a_route
from sublet.base.wire.gateway import ModelRoute
from sublet.gateway.dialects import Prepared, cut_counters, prepare
from sublet.gateway.routes import Model

EVENTS = 2_000
TIMINGS = {
    "cache_n": 20, "prompt_n": 1, "prompt_ms": 12.345, "prompt_per_token_ms": 12.345,
    "prompt_per_second": 81.004, "predicted_n": 12, "predicted_ms": 123.456,
    "predicted_per_token_ms": 10.288, "predicted_per_second": 97.2,
}  # fmt: skip
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def run(rounds: int) -> dict[str, list[float]]:
    """CPU µs per event, a figure a round."""
    text = _event({"content": " word"})
    first = {"index": 0, "id": "call_1", "type": "function"}
    begin = _event({"tool_calls": [{**first, "function": {"name": "find", "arguments": "{"}}]})
    call = _event({"tool_calls": [{"index": 0, "function": {"arguments": '"at": 1, '}}]})
    ways: dict[str, Callable[[], float]] = {
        "counters cut out": lambda: _cutting(text),
        "tool calls, parsed and rewritten": lambda: _rewriting(_asked("chat"), begin, call),
        "text beside tools, parsed and rewritten": lambda: _rewriting(_asked("chat"), b"", text),
        "Messages, parsed and rewritten": lambda: _rewriting(_asked("messages"), b"", text),
    }
    found: dict[str, list[float]] = {f"CPU µs per event: {name}": [] for name in ways}
    for _ in range(rounds):
        for figures, way in zip(found.values(), ways.values(), strict=True):
            figures.append(way())
    return found


def _event(delta: dict[str, object]) -> bytes:
    """As llama.cpp sends it."""
    body = {
        "choices": [{"finish_reason": None, "index": 0, "delta": delta}],
        "created": 1_790_000_000,
        "id": "chatcmpl-x7Q2p3",
        "model": "mock",
        "object": "chat.completion.chunk",
        "timings": TIMINGS,
    }
    return b"data: " + orjson.dumps(body) + b"\n\n"


def _asked(surface: str) -> Prepared:
    route: ModelRoute = a_route("mock")
    body = {
        "model": "mock",
        "messages": [{"role": "user", "content": "Where is it?"}],
        "stream": True,
        "max_tokens": 64,
    }
    if surface == "chat":
        body["tools"] = [TOOL]
        return prepare("chat", orjson.dumps(body), {"mock": Model(route)})
    return prepare("messages", orjson.dumps(body), {"mock": Model(route)})


def _cutting(event: bytes) -> float:
    begun = time.process_time_ns()
    for _ in range(EVENTS):
        cut_counters(event)
    return (time.process_time_ns() - begun) / EVENTS / 1000


def _rewriting(asked: Prepared, first: bytes, event: bytes) -> float:
    events = asked.events("default", b"req_1")
    if first:
        events.feed(first)
    begun = time.process_time_ns()
    for _ in range(EVENTS):
        assert events.feed(event)
    return (time.process_time_ns() - begun) / EVENTS / 1000
