"""From what engines count to what is billed: one inner form, one normaliser a server.

OpenAI counts cached tokens inside the prompt, Anthropic beside it; taking one for the other counts
them twice (field case G4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Counts(NamedTuple):
    """Tokens by class. `input_uncached + cache_read` is OpenAI's `prompt_tokens`.

    A tuple, since one is made for every request on the fast path.
    """

    input_uncached: int
    cache_read: int
    output: int
    is_inconsistent: bool = False

    @property
    def prompt(self) -> int:
        return self.input_uncached + self.cache_read


def normalise(server: str, usage: Mapping[str, Any]) -> Counts:
    """An engine's OpenAI-style `usage` object. Both servers we know report it in that form.

    Never a negative quantity: cached beyond the prompt is billed as the prompt and marked
    inconsistent. Numbers that are none are 0 and marked. An unknown server is a ValueError.
    """
    if server not in ("llama.cpp", "vllm"):
        raise ValueError(f"no usage normaliser for {server!r}")
    details = usage.get("prompt_tokens_details")
    plain: Any = details.get("cached_tokens") if type(details) is dict else 0
    asked: Any = usage.get("prompt_tokens")
    made: Any = usage.get("completion_tokens")
    if type(asked) is type(made) is type(plain) is int and 0 <= plain <= asked and made >= 0:
        return Counts(asked - plain, plain, made)
    cached, odd_cached = _count(details.get("cached_tokens") if isinstance(details, dict) else 0)
    prompt, odd_prompt = _count(usage.get("prompt_tokens"))
    output, odd_output = _count(usage.get("completion_tokens", 0))
    return Counts(
        input_uncached=max(prompt - cached, 0),
        cache_read=min(cached, prompt),
        output=output,
        is_inconsistent=odd_cached or odd_prompt or odd_output or cached > prompt,
    )


def _count(value: Any) -> tuple[int, bool]:
    if value is None:
        return 0, False
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value, False
    return 0, True
