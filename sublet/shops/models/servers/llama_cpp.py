"""llama.cpp, as xllamacpp carries it: one child process of our own Python in the sandbox.

The field lists say what the server was seen to honour (its test asks the real one, field by
field). Without an entry: `user`, `metadata`, `store` and the like, which it ignores; `logprobs` of
completions, which it answers in the form of chat.
"""

from __future__ import annotations

import json
import os

from sublet.shops.compute import ServerSpec
from sublet.shops.models.servers import asking, python, unix
from sublet.shops.models.servers.port import (
    KEY_SOCKET,
    MODEL_SOCKET,
    Fields,
    Gauges,
    ModelFacts,
)

READY_SECONDS = 10.0
"""Most of it for a large model's first token on slow devices."""
LIVES_SECONDS = 5.0
GAUGES_SECONDS = 2.0
_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "frequency_penalty",
    "presence_penalty",
    "logit_bias",
    "stop",
)
_FIELDS: Fields = {
    "chat": (
        *_SAMPLING,
        "logprobs",
        "top_logprobs",
        "response_format",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
    ),
    "completions": _SAMPLING,
    "messages": ("temperature", "top_p", "top_k"),
    "embeddings": ("encoding_format",),
}
_PREFIX = "llamacpp:"


class LlamaCpp:
    """Implements `ModelServer`."""

    name = "llama.cpp"
    takes_sealed = True
    fields = _FIELDS
    revealing = frozenset({"logprobs", "top_logprobs", "logit_bias"})
    counters = "timings_per_token"
    splits_n = True
    stops_unstreamed = False
    normaliser = "llama.cpp"

    def spawn(self, model: ModelFacts, *, devices: int, slots: int) -> ServerSpec:
        """Threads are the devices held. A sealed model's key comes by `KEY_SOCKET`."""
        weights = os.path.realpath(model.path)
        orders = {
            "model": weights,
            "alias": model.name,
            "socket": MODEL_SOCKET,
            "key_socket": KEY_SOCKET if model.is_sealed else None,
            "context": model.context,
            "slots": slots,
            "threads": devices,
            "is_embedding": model.kind == "embed",
            "template": f"{python.CHILD}/{model.template}.jinja" if model.template else None,
            "packages": list(python.packages()),
        }
        return ServerSpec(
            argv=(python.interpreter(), "-I", "-S", f"{python.CHILD}/serve.py", json.dumps(orders)),
            read_only=python.shown(python.CHILD, weights),
            lock_memory=model.is_sealed,
        )

    def ready(self, door: str, model: ModelFacts) -> bool:
        return asking.answers(door, model, seconds=READY_SECONDS)

    def lives(self, door: str) -> bool:
        return unix.get(door, "/health", seconds=LIVES_SECONDS) is not None

    def gauges(self, door: str) -> Gauges | None:
        page = unix.get(door, "/metrics", seconds=GAUGES_SECONDS)
        found = {} if page is None else unix.read_metrics(page)
        try:
            return Gauges(
                prompt_total=int(found[f"{_PREFIX}prompt_tokens_total"]),
                cached_total=int(found[f"{_PREFIX}prompt_tokens_cached_total"]),
                predicted_total=int(found[f"{_PREFIX}tokens_predicted_total"]),
                processing=int(found[f"{_PREFIX}requests_processing"]),
                deferred=int(found[f"{_PREFIX}requests_deferred"]),
            )
        except KeyError:
            return None
