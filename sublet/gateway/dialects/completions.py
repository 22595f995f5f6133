"""`/v1/completions`: a prompt is continued.

A prompt is a string, a list of token ids, or a list of either; several are asked one by one of a
server that counts only one. `best_of` beyond `n`, `echo` and `suffix` are refused where the route
does not list them.
"""

from __future__ import annotations

from typing import Any

import orjson

from sublet.base.wire.gateway import Counts, ModelRoute
from sublet.gateway.dialects.chat import joined, read_reply
from sublet.gateway.dialects.checks import missing, passes, sealed, unsupported, wrong
from sublet.gateway.dialects.events import ChatEvents, openai_usage
from sublet.gateway.dialects.prepared import (
    LLAMA,
    TEMPLATE_TOKENS,
    Prepared,
    counts_of,
)
from sublet.gateway.dialects.streams import APART, TIMINGS, USAGE, object_end
from sublet.gateway.dialects.surfaces import Surface

_COMMON = frozenset(("model", "prompt", "stream", "max_tokens", "stream_options"))
_OWN = frozenset(("n", "service_tier", "best_of", "suffix", "logprobs"))
PROMPTS_AT_MOST = 128


class Completions(Prepared):
    """A request of the completions surface. `n` counts the choices of all prompts."""

    __slots__ = ("prompts",)

    surface: Surface = "completions"
    path = b"/v1/completions"
    text_mark = b'"text":"'

    def __init__(self, raw: bytes, body: dict[str, Any], route: ModelRoute) -> None:
        super().__init__(raw, body, route)
        fields = route.fields.get("completions", ())
        for key, value in body.items():
            if key not in _COMMON and key not in _OWN and not passes(key, value, route, fields):
                self.drop(key)
        self.read_cap("max_tokens")
        self.read_stream()
        self.read_tier()
        self.read_n()
        self.settle_seed()
        self._read_rest(fields)
        self.prompts = self._read_prompts()
        each = self.n
        self.n *= len(self.prompts)
        self.settle_legs()
        if self.legs == 1 and each > 1:
            self.is_plain = False
        if self.wants_usage and route.server == LLAMA:
            self.wants_usage = APART
        self.settle_input(len(raw) + TEMPLATE_TOKENS * len(self.prompts), prompts=len(self.prompts))
        if type(self.prompts[0]) is list or len(self.prompts) > 1:
            self.needs_count = False
            longest = max(len(prompt) for prompt in self.prompts)
            if type(self.prompts[0]) is list and longest + (self.asked or 0) > route.context:
                raise self.too_long(longest)

    def _read_rest(self, fields: tuple[str, ...]) -> None:
        body, route = self.body, self.route
        best_of = body.get("best_of")
        if "best_of" in body:
            if best_of is not None and best_of != self.n:
                raise unsupported("best_of", "best_of: leave it out, or make it equal to n.")
            self.drop("best_of")
        if "suffix" in body:
            if body["suffix"] not in (None, ""):
                if not passes("suffix", body["suffix"], route, fields):
                    raise unsupported("suffix")
            else:
                self.drop("suffix")
        logprobs = body.get("logprobs")
        if "logprobs" in body:
            if logprobs is None:
                self.drop("logprobs")
            elif route.is_sealed:
                raise sealed("logprobs")
            elif "logprobs" not in fields:
                raise unsupported("logprobs")
            elif type(logprobs) is not int or not 0 <= logprobs <= 5:
                raise wrong("logprobs", "a whole number from 0 to 5")

    def _read_prompts(self) -> list[Any]:
        """One entry a prompt: a string, or a list of token ids."""
        prompt = self.body.get("prompt")
        if prompt is None:
            raise missing("prompt")
        several = [prompt]
        if type(prompt) is list and prompt and type(prompt[0]) in (str, list):
            several = prompt
        if len(several) > PROMPTS_AT_MOST:
            raise wrong("prompt", f"at most {PROMPTS_AT_MOST} prompts")
        kind = type(several[0])
        for item in several:
            if type(item) is not kind or kind not in (str, list):
                raise wrong("prompt", "a string, token ids, or a list of either")
            if not item:
                raise wrong("prompt", "not empty")
            if kind is list:
                self._read_tokens(item)
        if len(several) == 1 and several is prompt:
            self.change("prompt", several[0])
        return several

    def _read_tokens(self, tokens: list[Any]) -> None:
        if self.route.is_sealed:
            raise sealed("prompt")
        if any(type(token) is not int or not 0 <= token < 1 << 31 for token in tokens):
            raise wrong("prompt", "whole numbers, if it is token ids")

    # ---- to the engine ---------------------------------------------------------------------

    count_path = b"/tokenize"

    def count_body(self) -> bytes:
        asked = {"content": self.prompts[0], "add_special": True, "parse_special": True}
        return orjson.dumps(asked)

    def upstream(self, cap: int, leg: int) -> dict[str, Any]:
        body = super().upstream(cap, leg)
        if self.legs > 1:
            body["prompt"] = self.prompts[leg * len(self.prompts) // self.legs]
        return body

    # ---- from the engine -------------------------------------------------------------------

    def _reply(self, raw: bytes, tier: str) -> tuple[bytes, Counts]:
        usage = raw.rfind(USAGE)
        begin = usage + len(USAGE) - 1
        end = object_end(raw, begin) if usage >= 0 else -1
        if end < 0 or b'"object":"text_completion"' not in raw or b'"choices":[{' not in raw:
            return self._join([raw], tier)
        counts = counts_of(self.route, orjson.loads(raw[begin:end]))
        cut = raw.find(TIMINGS, end)
        after = object_end(raw, cut + len(TIMINGS) - 1) if cut >= 0 else -1
        return (raw if after < 0 else raw[:cut] + raw[after:]), counts

    def _join(self, raws: list[bytes], tier: str) -> tuple[bytes, Counts]:
        replies = [read_reply(raw) for raw in raws]
        told = [counts_of(self.route, reply.get("usage")) for reply in replies]
        counts = joined(told)
        if len(self.prompts) > 1 and len(raws) > 1:
            # Each prompt's input once: that of the first of its choices.
            each = len(raws) // len(self.prompts)
            firsts = told[::each]
            counts = Counts(
                input_uncached=sum(one.input_uncached for one in firsts),
                cache_read=sum(one.cache_read for one in firsts),
                output=counts.output,
                is_inconsistent=counts.is_inconsistent,
            )
        choices = [choice for reply in replies for choice in reply["choices"]]
        first = replies[0]
        body = {
            "id": first.get("id") or "cmpl-0",
            "object": "text_completion",
            "created": first.get("created") or 0,
            "model": self.route.name,
            "system_fingerprint": first.get("system_fingerprint"),
            "choices": [
                {
                    "index": index,
                    "text": choice["text"] or "",
                    "logprobs": choice.get("logprobs"),
                    "finish_reason": choice.get("finish_reason") or "stop",
                }
                for index, choice in enumerate(choices)
            ],
            "usage": openai_usage(counts),
        }
        return orjson.dumps(body), counts

    def events(self, tier: str, rid: bytes) -> ChatEvents:
        return ChatEvents(
            self.surface,
            self.route.server,
            tier=tier,
            legs=self.legs,
            is_counted=self.is_counted,
            wants_usage=bool(self.wants_usage),
            prompts=len(self.prompts),
        )
