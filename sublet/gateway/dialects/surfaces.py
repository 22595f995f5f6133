"""The surfaces: which path speaks which dialect; and the list of models."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import orjson

from sublet.base.wire.gateway import ModelRoute

Surface = Literal["chat", "completions", "embeddings", "messages", "count_tokens"]

SURFACES: dict[bytes, Surface] = {
    b"/v1/chat/completions": "chat",
    b"/v1/completions": "completions",
    b"/v1/embeddings": "embeddings",
    b"/v1/messages": "messages",
    b"/v1/messages/count_tokens": "count_tokens",
}


def _model(route: ModelRoute) -> dict[str, Any]:
    # Both families in one object: OpenAI's SDK reads `object`, `created`, `owned_by`, Anthropic's
    # reads `type`, `display_name`, `created_at`; each leaves the others alone.
    created_at = datetime.fromtimestamp(route.created_s, UTC)
    return {
        "id": route.name,
        "object": "model",
        "created": route.created_s,
        "owned_by": route.owned_by,
        "type": "model",
        "display_name": route.name,
        "created_at": created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "context_length": route.context,
        "max_output_tokens": route.max_output,
        "quantization": route.quantization,
        "lifecycle": route.lifecycle,
    }


def model_object(route: ModelRoute) -> bytes:
    """The body of `GET /v1/models/{name}`, for both families. Nothing of a model's inside."""
    return orjson.dumps(_model(route))


def model_list(routes: Sequence[ModelRoute]) -> bytes:
    """The body of `GET /v1/models`: one page, whole."""
    data = [_model(route) for route in routes]
    return orjson.dumps(
        {
            "object": "list",
            "data": data,
            "has_more": False,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
        }
    )
