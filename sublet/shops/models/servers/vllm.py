"""vLLM, for production on GPUs: its own OpenAI server in the sandbox, from the same Python.

Written after its documentation (0.12 and later). It is not among our packages: the contract tests
of this adapter run where it is installed.
"""

from __future__ import annotations

import os
import sys

from sublet.shops.compute import ServerSpec
from sublet.shops.models.servers import asking, python, unix
from sublet.shops.models.servers.port import (
    MODEL_SOCKET,
    Fields,
    Gauges,
    ModelFacts,
    NotServable,
)

READY_SECONDS = 10.0
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
    "response_format",
)
_FIELDS: Fields = {
    "chat": (
        *_SAMPLING,
        "logprobs",
        "top_logprobs",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
    ),
    "completions": (*_SAMPLING, "logprobs", "echo"),
    "messages": ("temperature", "top_p", "top_k"),
    "embeddings": ("encoding_format", "dimensions"),
}
_QUIET = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
"""It tells nobody of its use, and looks for nothing outside."""


class Vllm:
    """Implements `ModelServer`. `tool_parser`: how models of this installation write calls."""

    name = "vllm"
    takes_sealed = False
    fields = _FIELDS
    revealing = frozenset({"logprobs", "top_logprobs", "logit_bias", "echo"})
    counters = "continuous_usage_stats"
    splits_n = False
    stops_unstreamed = True
    normaliser = "vllm"

    def __init__(self, *, tool_parser: str = "hermes") -> None:
        self._tool_parser = tool_parser

    def spawn(self, model: ModelFacts, *, devices: int, slots: int) -> ServerSpec:
        """One process group over all devices held. Weights lie in a folder, as it wants them."""
        if model.is_sealed:
            raise NotServable(
                "vLLM reads weights from files only: deploy a sealed model with llama.cpp."
            )
        weights = os.path.realpath(model.path)
        argv = [sys.executable, "-I", "-m", "vllm.entrypoints.cli.main", "serve", weights]
        argv += ["--uds", MODEL_SOCKET, "--served-model-name", model.name]
        argv += ["--max-model-len", str(model.context), "--max-num-seqs", str(slots)]
        argv += ["--tensor-parallel-size", str(devices), "--enable-prompt-tokens-details"]
        if model.kind == "embed":
            argv += ["--runner", "pooling"]
        else:
            argv += ["--enable-auto-tool-choice", "--tool-call-parser", self._tool_parser]
        if model.template:
            argv += ["--chat-template", f"{python.CHILD}/{model.template}.jinja"]
        shown = python.shown(sys.prefix, python.CHILD, weights)
        return ServerSpec(argv=tuple(argv), env=_QUIET, read_only=shown)

    def ready(self, door: str, model: ModelFacts) -> bool:
        return asking.answers(door, model, seconds=READY_SECONDS)

    def lives(self, door: str) -> bool:
        return unix.get(door, "/health", seconds=LIVES_SECONDS) is not None

    def gauges(self, door: str) -> Gauges | None:
        page = unix.get(door, "/metrics", seconds=GAUGES_SECONDS)
        return None if page is None else read_gauges(page)


def read_gauges(page: bytes) -> Gauges | None:
    """What its metrics say. It counts a prompt whole, whether it was met in its cache or not."""
    found = unix.read_metrics(page)
    try:
        cached = int(found["vllm:prefix_cache_hits_total"])
        return Gauges(
            prompt_total=int(found["vllm:prompt_tokens_total"]) - cached,
            cached_total=cached,
            predicted_total=int(found["vllm:generation_tokens_total"]),
            processing=int(found["vllm:num_requests_running"]),
            deferred=int(found["vllm:num_requests_waiting"]),
        )
    except KeyError:
        return None
