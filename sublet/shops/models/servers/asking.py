"""The one real request by which a server is found ready: both kinds of server answer it alike."""

from __future__ import annotations

from typing import Any

from sublet.shops.models.servers import unix
from sublet.shops.models.servers.port import ModelFacts


def answers(door: str, model: ModelFacts, *, seconds: float) -> bool:
    """It made one token, or one embedding."""
    if model.kind == "embed":
        body: dict[str, Any] = {"model": model.name, "input": "a"}
        answer = unix.post(door, "/v1/embeddings", body, seconds=seconds)
        return isinstance(answer, dict) and bool(answer.get("data"))
    body = {"model": model.name, "prompt": "a", "max_tokens": 1}
    answer = unix.post(door, "/v1/completions", body, seconds=seconds)
    usage = answer.get("usage") if isinstance(answer, dict) else None
    return isinstance(usage, dict) and bool(usage.get("completion_tokens") == 1)
