"""The dialects: what OpenAI and Anthropic clients say, in the engines' words, and back. Pure.

Owns     the surfaces, the checks of every request field, the bound of a request's input, the
         upstream body, and the rewriting of answers, events and engines' errors.
Always   a field is honoured, listed as harmless, or refused by name, never dropped by accident;
         `prepare` raises Refusal and nothing else; the bound is never below the input; a sealed
         model is asked for nothing but text; of an engine's bytes only our own cuts and fills are
         changed where a stream passes as bytes.
Callers  exchange and legs (requests, answers, events), edge and pages (paths, lists of models).

Fields that change neither what is made nor what it costs are checked and dropped; the list is
`checks.IGNORED`, `store: false`, `modalities: ["text"]`, and for Messages `metadata`,
`cache_control`, `thinking: disabled`.
"""

from __future__ import annotations

from collections.abc import Mapping

from sublet.gateway.dialects.chat import Chat
from sublet.gateway.dialects.checks import read_object
from sublet.gateway.dialects.completions import Completions
from sublet.gateway.dialects.embeddings import Embeddings
from sublet.gateway.dialects.events import Events
from sublet.gateway.dialects.messages import CountTokens, Messages
from sublet.gateway.dialects.prepared import UNCHANGED, Model, Prepared, find_route
from sublet.gateway.dialects.streams import (
    TIMINGS,
    count_texts,
    cut_counters,
    cut_usage,
    input_of,
    splice_first,
    without_comments,
)
from sublet.gateway.dialects.surfaces import SURFACES, Surface, model_list, model_object

_READERS: dict[Surface, tuple[type[Prepared], str]] = {
    "chat": (Chat, "generate"),
    "completions": (Completions, "generate"),
    "embeddings": (Embeddings, "embed"),
    "messages": (Messages, "generate"),
    "count_tokens": (CountTokens, "generate"),
}


def prepare(surface: Surface, raw: bytes, models: Mapping[str, Model]) -> Prepared:
    """Read, check and translate one request. Raises Refusal, and nothing else."""
    body = read_object(raw)
    reader, kind = _READERS[surface]
    prepared = reader(raw, body, find_route(body, models, kind))
    if prepared.is_plain:
        # Sent as it came: what was read of it is not kept beside it.
        prepared.body = UNCHANGED
    return prepared


__all__ = [
    "SURFACES",
    "TIMINGS",
    "Events",
    "Model",
    "Prepared",
    "Surface",
    "count_texts",
    "cut_counters",
    "cut_usage",
    "input_of",
    "model_list",
    "model_object",
    "prepare",
    "splice_first",
    "without_comments",
]
