"""What a request is once it was read: all that the exchange needs to know of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol

import orjson

from sublet.base.wire.gateway import Counts, ModelRoute, normalise
from sublet.gateway.dialects.checks import boolean, missing, unsupported, wrong
from sublet.gateway.dialects.events import Events
from sublet.gateway.dialects.surfaces import Surface
from sublet.gateway.errors import Refusal

LLAMA = "llama.cpp"
TEMPLATE_TOKENS = 256
"""What a chat template may add to a conversation: a default system message, how tools are told."""
MESSAGE_TOKENS = 8
"""And to each message, beyond what its own JSON takes."""
NOTHING: frozenset[str] = frozenset()
UNCHANGED: dict[str, Any] = {}
"""Stands for what most requests have none of; never written to."""
OUR_TIERS = ("default", "flex")
TIERS = {"auto": "default", "default": "default", "flex": "flex"}

_STREAM_TAILS = {
    "timings_per_token": b',"stream_options":{"include_usage":true},"timings_per_token":true',
    "continuous_usage_stats": (
        b',"stream_options":{"include_usage":true,"continuous_usage_stats":true}'
    ),
    "": b',"stream_options":{"include_usage":true}',
}
STREAM_FIELDS: dict[str, dict[str, Any]] = {
    counters: orjson.loads(b"{" + tail[1:] + b"}") for counters, tail in _STREAM_TAILS.items()
}
"""By the route's counters: what makes an engine tell usage and counts in a stream."""
_TOO_LONG = re.compile(r"maximum context length|is too large to process")
_INPUT = re.compile(r"(\d+) (?:in the messages|in the prompt|input tokens)|input \((\d+) tokens\)")
"""How vLLM and llama.cpp (of embeddings, as a 500) tell that an input is too long."""


class Model(Protocol):
    """As much of a gateway's model as a dialect reads."""

    @property
    def route(self) -> ModelRoute: ...


class Prepared:
    """A request that is well formed, and how it is asked of the engine.

    `cap`: output tokens of each choice, at most; `n`: choices in all; `legs`: upstream requests to
    make; `input_estimate`: never below the input's tokens as the engine counts them.
    """

    __slots__ = (
        "asked", "body", "cap", "changes", "drops", "input_estimate", "inputs", "is_counted",
        "is_new_cap", "is_parsed", "is_plain", "legs", "n", "needs_count", "raw", "route", "stream",
        "tier", "told_cap", "wants_usage",
    )  # fmt: skip

    surface: Surface
    path: bytes
    """The engine's."""
    ping = b": keep-alive\n\n"
    """Said between events while nothing comes from the engine."""
    count_path = b""
    text_mark = b'"content":"'
    """What stands before a text in an event."""
    input_name = "prompt"
    """The member that holds the input."""

    def __init__(self, raw: bytes, body: dict[str, Any], route: ModelRoute) -> None:
        self.raw = raw
        self.body = body
        self.route = route
        self.asked: int | None = None
        self.told_cap = self.cap = 0
        self.is_new_cap = False
        """The cap comes under its new name, `max_completion_tokens`."""
        self.n = self.legs = 1
        self.inputs = 0
        self.input_estimate = 0
        self.tier = "default"
        self.stream = self.is_parsed = self.needs_count = False
        self.is_counted = bool(route.counters)
        self.wants_usage = 0
        self.is_plain = True
        """The body may be sent as it came, with ours after it."""
        self.drops: set[str] | frozenset[str] = NOTHING
        self.changes: dict[str, Any] = UNCHANGED

    # ---- to the engine ---------------------------------------------------------------------

    def render(self, cap: int, leg: int = 0) -> bytes:
        """The body for the engine: the cap under its name, usage and counters asked for.

        A plain body is sent as it came, with our members behind it: of a name given twice the last
        counts, in the engines as in our own reader. So nothing that was read is written again.
        """
        if self.is_plain and not leg:
            raw = self.raw
            if cap == self.told_cap and not self.stream:
                return raw
            end = len(raw) - 1 if raw[-1] == 125 else raw.rindex(b"}")
            tail = _STREAM_TAILS[self.route.counters] if self.stream else b""
            if self.is_new_cap:
                # llama.cpp prefers it to `max_tokens`.
                tail += b',"max_completion_tokens":%d' % cap
            return b"".join((memoryview(raw)[:end], b',"max_tokens":%d%b}' % (cap, tail)))
        return orjson.dumps(self.upstream(cap, leg))

    def upstream(self, cap: int, leg: int) -> dict[str, Any]:
        """The body as an object, where it cannot be sent as it came."""
        drops = self.drops
        body = {
            key: value for key, value in self.body.items() if value is not None and key not in drops
        }
        body.update(self.changes)
        body.pop("max_completion_tokens", None)
        body["max_tokens"] = cap
        if self.legs > 1:
            body["n"] = 1
            if "seed" in body:
                # Else all choices were the same one.
                body["seed"] = (body["seed"] + leg) % 0xFFFFFFFF
        if self.stream:
            body.update(STREAM_FIELDS[self.route.counters])
        return body

    def count_body(self) -> bytes:
        """Where `needs_count`: asked of `count_path` first, its answer given to `counted`."""
        raise AssertionError("a dialect with a `count_path` says what is asked there")

    def counted(self, status: int, raw: bytes) -> None:
        """Raises Refusal where input and cap exceed the context. An answer that is not
        understood passes: then the engine decides."""
        try:
            found = orjson.loads(raw)
            tokens = found.get("input_tokens", found.get("tokens"))
            count = len(tokens) if type(tokens) is list else tokens
        except (orjson.JSONDecodeError, AttributeError):
            return
        asked = self.asked or 0
        if status == 200 and type(count) is int and count + asked > self.route.context:
            raise self.too_long(count)

    def refusal(self, status: int, body: bytes) -> Refusal:
        """An engine's error, mapped to ours: 400 where this request is at fault, else 503, which
        another replica may do better."""
        try:
            error = orjson.loads(body)
            error = error.get("error", error)
            message, kind = str(error.get("message", "")), error.get("type")
        except (orjson.JSONDecodeError, AttributeError):
            error, message, kind = {}, "", None
        count = error.get("n_prompt_tokens")
        named = _INPUT.search(message)
        if type(count) is not int and named is not None:
            count = int(named[1] or named[2])
        if kind == "exceed_context_size_error" or _TOO_LONG.search(message):
            return self.too_long(count if type(count) is int else self.route.context + 1)
        if status in (400, 413, 422, 501):
            at = message.find("JSON schema error")
            text = message[max(at, 0) :][:500] or "it gives no reason"
            return Refusal(
                400, "invalid_request", f"The model server refuses this request: {text}."
            )
        return Refusal(
            503, "no_replica", "The model server did not take this request: try again.",
            retry_after_s=2,
        )  # fmt: skip

    def too_long(self, count: int) -> Refusal:
        limit = self.route.context
        asked = self.asked if self.asked is not None else self.cap
        told = f"{count} input tokens"
        advice = "Shorten the input."
        if asked:
            told += f" and asks for {asked} output tokens: {count} + {asked} > {limit}"
            advice = "Shorten the input or ask for less output."
        return Refusal(
            400,
            "context_length_exceeded",
            f"This model's maximum context length is {limit} tokens, and this request has {told}. "
            + advice,
            param=self.input_name,
        )

    # ---- from the engine -------------------------------------------------------------------

    def reply(self, raw: bytes, tier: str) -> tuple[bytes, Counts]:
        """A whole answer as the client's SDK expects it. ValueError: it cannot be read."""
        try:
            return self._reply(raw, tier)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise ValueError(f"the answer has another form: {error}") from error

    def join(self, raws: list[bytes], tier: str) -> tuple[bytes, Counts]:
        """The answers of all legs as one. ValueError: one cannot be read."""
        try:
            return self._join(raws, tier)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"an answer has another form: {error}") from error

    def _reply(self, raw: bytes, tier: str) -> tuple[bytes, Counts]:
        return self._join([raw], tier)

    def _join(self, raws: list[bytes], tier: str) -> tuple[bytes, Counts]:
        raise AssertionError("a dialect reads its own answers")

    def events(self, tier: str, rid: bytes) -> Events:
        """For streams that are parsed; its `fail` for all streams."""
        return Events(self.surface, self.route.server)

    # ---- read from the body ----------------------------------------------------------------

    def read_cap(self, *keys: str) -> None:
        """The cap under any of its names; two that differ are refused by the older name."""
        body = self.body
        cap = body.get("max_tokens")
        if type(cap) is int and 0 < cap <= self.route.max_output and keys[0] not in body:
            self.asked = self.cap = self.told_cap = cap
            return
        self.is_new_cap = "max_completion_tokens" in body
        for key in keys:
            value = body.get(key)
            if value is None:
                if key in body:
                    self.is_plain = False
                continue
            if type(value) is not int or not 1 <= value <= self.route.max_output:
                raise wrong(key, f"a whole number from 1 to {self.route.max_output}")
            if self.asked is not None and value != self.asked:
                raise Refusal(
                    400,
                    "invalid_request",
                    f"{keys[0]} and max_tokens are both a cap and differ: send one of them.",
                    param="max_tokens",
                )
            self.asked = value
        self.cap = self.route.max_output if self.asked is None else self.asked

    def read_stream(self) -> None:
        body = self.body
        stream = body.get("stream")
        if stream is not None:
            if type(stream) is not bool:
                raise wrong("stream", "true or false")
            self.stream = stream
        elif "stream" in body:
            self.is_plain = False
        options = body.get("stream_options")
        if options is None:
            if "stream_options" in body:
                self.is_plain = False
            return
        if not self.stream:
            raise wrong("stream_options", "left out where stream is not true")
        if type(options) is not dict:
            raise wrong("stream_options", "an object")
        for key, value in options.items():
            if key not in ("include_usage", "include_obfuscation"):
                raise unsupported(f"stream_options.{key}")
            if value is not None:
                boolean(value, f"stream_options.{key}")
        self.wants_usage = 1 if options.get("include_usage") else 0

    def read_tier(self) -> None:
        tier = self.body.get("service_tier")
        if "service_tier" not in self.body:
            return
        self.drop("service_tier")
        if tier is None:
            return
        if type(tier) is not str or tier not in TIERS:
            raise wrong("service_tier", "one of auto, default, flex")
        self.tier = TIERS[tier]

    def read_n(self) -> None:
        n = self.body.get("n")
        if n is None:
            if "n" in self.body:
                self.is_plain = False
            return
        if type(n) is not int or not 1 <= n <= self.route.max_n:
            raise wrong("n", f"a whole number from 1 to {self.route.max_n}")
        self.n = n

    def drop(self, key: str) -> None:
        """Known here, and not for the engine."""
        self.is_plain = False
        self.drops = self.drops | {key}

    def change(self, key: str, value: Any) -> None:
        """For the engine in another form than it came in."""
        self.is_plain = False
        self.changes = {**self.changes, key: value}

    def settle_seed(self) -> None:
        """llama.cpp takes 32 bits, and their last value for chance: any other is folded into it."""
        seed = self.body.get("seed")
        if type(seed) is int and not 0 <= seed < 0xFFFFFFFF and self.route.server == LLAMA:
            self.change("seed", seed % 0xFFFFFFFF)

    def settle_legs(self) -> None:
        """Several choices from a server that counts one: as many requests."""
        if self.n > 1 and self.route.splits_n:
            self.legs = self.n
            self.is_parsed = True
            self.is_plain = False

    def settle_input(self, bound: int, prompts: int = 1) -> None:
        """The hold must cover the input, and the cap must fit beside it.

        A token of a byte-level or byte-fallback vocabulary stands for one byte of text at least,
        one of WordPiece for one character, and JSON never writes a text in fewer bytes than UTF-8
        does: so `bound`, made of the length of the body, is not below the input. (A vocabulary that
        writes compatible characters out first, NFKC, would need a factor; none is served.) Nor can
        an input be above the context: the engine refuses it.
        """
        route = self.route
        self.input_estimate = min(bound, route.context * prompts)
        if self.asked is not None and bound + self.asked > route.context and self.count_path:
            # vLLM refuses such a request itself; llama.cpp stops in the middle, as if at the cap.
            self.needs_count = route.server == LLAMA


def model_not_found(name: str) -> Refusal:
    return Refusal(
        404,
        "model_not_found",
        f"There is no model {name[:200]} here: GET /v1/models lists them.",
        param="model",
    )


def find_route(body: dict[str, Any], models: Mapping[str, Model], kind: str) -> ModelRoute:
    """The route of the model that is asked for. Raises Refusal."""
    name = body.get("model")
    if type(name) is not str or not name:
        raise missing("model")
    model = models.get(name)
    if model is None:
        raise model_not_found(name)
    route = model.route
    if route.kind != kind:
        if route.is_sealed and kind == "embed":
            raise Refusal(
                400,
                "sealed_parameter",
                f"model: {name} gives no embeddings, since its weights are sealed.",
                param="model",
            )
        does = "makes embeddings" if route.kind == "embed" else "makes text"
        raise Refusal(
            400, "invalid_request", f"model: {name} {does} and cannot be asked this.", param="model"
        )
    return route


def counts_of(route: ModelRoute, usage: Any) -> Counts:
    """ValueError: an answer without usage is none that can be billed."""
    if type(usage) is not dict:
        raise ValueError("the answer tells no usage")
    return normalise(route.server, usage)
