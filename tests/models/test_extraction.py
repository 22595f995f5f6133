"""The published attack on what a model server says too much of, against an open and a sealed model.

Carlini et al., "Stealing Part of a Production Language Model" (ICML 2024): every vector of logits
is the output matrix times a hidden vector, so many of them span no more dimensions than the model
is wide. With the log-probabilities of all tokens in every answer, the singular values of the
answers fall off a cliff at the hidden size.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sealed_models

WORDS = [
    "the",
    "of",
    "a",
    "class",
    "function",
    "list",
    "module",
    "string",
    "object",
    "value",
    "return",
    "import",
    "error",
    "type",
]
PER_ANSWER = 20


def questions(vocabulary: int) -> Iterator[dict[str, Any]]:
    """Chats that differ, each asking for the log-probability of every token there is."""
    rng = random.Random(7)
    for number in range(100):
        yield {
            "model": "muse-tiny",
            "messages": [{"role": "user", "content": " ".join(rng.choices(WORDS, k=6))}],
            "max_tokens": PER_ANSWER,
            "temperature": 1.5,
            "seed": number,
            "logprobs": True,
            "top_logprobs": vocabulary,
        }


def hidden_size(rows: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[int, float]:
    """The attack's own sum: where the cliff is, and how deep.

    A log-probability is a logit less one number for the whole row; subtracting one token's column
    takes that number out.
    """
    singular = np.linalg.svd(rows - rows[:, :1], compute_uv=False)
    falls = singular[:-1] / singular[1:]
    at = int(np.argmax(falls))
    return at + 1, float(falls[at])


def test_an_open_model_tells_its_hidden_size(tmp_path: Path) -> None:
    facts = gguf.GGUFReader(str(sealed_models.MUSE))
    width = int(facts.fields["llama.embedding_length"].contents())
    vocabulary = int(facts.fields["llama.vocab_size"].contents())
    rows: list[Any] = []
    with sealed_models.served(tmp_path / "home") as replica:
        replica.until_ready()
        for question in questions(vocabulary):
            answer = replica.post("/v1/chat/completions", question)
            for token in answer["choices"][0]["logprobs"]["content"]:
                row = np.full(vocabulary, np.nan)
                for said in token["top_logprobs"]:
                    row[said["id"]] = said["logprob"]
                rows.append(row)
            if len(rows) > width + 40:
                break
    found = np.array(rows)
    assert not np.isnan(found).any(), "every answer names every token"
    size, fall = hidden_size(found)
    assert size == width == 192
    assert fall > 1000, "not a slope but a cliff"


def test_the_same_questions_are_refused_of_the_sealed_model() -> None:
    """By name, each of them, before any engine hears of it; without what gives it away, they pass."""
    asked = list(questions(2048))
    for question in asked:
        refused = sealed_models.refusal_of("chat", **question)
        assert refused is not None
        assert (refused.status, refused.code) == (400, "sealed_parameter")
        plain = {k: v for k, v in question.items() if k not in ("logprobs", "top_logprobs")}
        assert sealed_models.refusal_of("chat", **plain) is None
        few = {**question, "top_logprobs": 5}
        assert sealed_models.refusal_of("chat", **few, is_sealed=False) is None
        assert sealed_models.refusal_of("chat", **few) is not None, "nor a few of them"
    assert len(asked) == 100


def test_the_sum_finds_what_was_planted() -> None:
    """The measure itself, on matrices of known rank, so that 192 above is no accident."""
    rng = np.random.default_rng(3)
    for width in (16, 48):
        logits = rng.normal(size=(120, width)) @ rng.normal(size=(width, 300))
        rows = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        assert hidden_size(rows)[0] == width
