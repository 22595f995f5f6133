"""`/v1/chat/completions`.

Honoured here: model, messages, stream, stream_options, max_completion_tokens and max_tokens, n,
service_tier, tool_choice. Passed where the route lists them: `checks.PASSED`. Dropped: what
`checks.IGNORED` names, `store: false`, `modalities: ["text"]`. All else is refused by name.

llama.cpp continues a last message of the assistant; the answer holds what was added to it.
"""

from __future__ import annotations

from operator import is_not
from typing import Any

import orjson

from sublet.base.wire.gateway import Counts, ModelRoute
from sublet.gateway.dialects.checks import missing, name, only, passes, unsupported, wrong
from sublet.gateway.dialects.events import ChatEvents, trim_logprobs
from sublet.gateway.dialects.prepared import (
    LLAMA,
    MESSAGE_TOKENS,
    TEMPLATE_TOKENS,
    Prepared,
    counts_of,
)
from sublet.gateway.dialects.surfaces import Surface
from sublet.gateway.dialects.tools import Calls, call_schema, forced_call

_COMMON = frozenset(
    ("model", "messages", "stream", "max_tokens", "max_completion_tokens", "stream_options")
)
_OWN = frozenset(("n", "service_tier", "store", "modalities"))
_READ = _OWN | {
    "seed", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls",
}  # fmt: skip
"""What means more than that it is passed or dropped."""
_PLAIN = frozenset(("user", "system", "assistant", "developer"))
_ROLES = frozenset(("system", "developer", "user", "assistant", "tool"))
_KEYS = {
    "system": frozenset(("role", "content", "name")),
    "developer": frozenset(("role", "content", "name")),
    "user": frozenset(("role", "content", "name")),
    "tool": frozenset(("role", "content", "tool_call_id", "name")),
    "assistant": frozenset(
        (
            "role", "content", "name", "tool_calls", "refusal", "annotations", "audio",
            "function_call", "parsed", "reasoning_content",
        )
    ),
}  # fmt: skip
_LACKING: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
"""What a message of an answer always has."""
_ECHOED = ("refusal", "annotations", "audio", "function_call", "parsed")
"""What a client sends back of an answer: of no meaning to the model, and dropped."""


class Chat(Prepared):
    """A request of the chat surface."""

    __slots__ = ("is_forced", "prefill", "tops")

    surface: Surface = "chat"
    path = b"/v1/chat/completions"
    count_path = b"/v1/chat/completions/input_tokens"
    input_name = "messages"

    def __init__(self, raw: bytes, body: dict[str, Any], route: ModelRoute) -> None:
        super().__init__(raw, body, route)
        self.is_forced = False
        self.prefill = ""
        self.tops: int | None = None
        fields = route.fields.get("chat", ())
        rest = body.keys() - _COMMON
        # One alone is at hand; of several the first to be refused is the first that was sent.
        for key in rest if len(rest) < 2 else body:
            if key in rest and key not in _OWN and not passes(key, body[key], route, fields):
                self.drop(key)
        self.read_cap("max_completion_tokens", "max_tokens")
        if "stream" in body or "stream_options" in body:
            self.read_stream()
        if not rest.isdisjoint(_READ):
            self._read_rest()
        messages = body.get("messages")
        if type(messages) is not list or not messages:
            raise missing("messages") if not messages else wrong("messages", "a list")
        if len(messages) > route.context:
            # Each takes a token at least: too long, and known before any of them is looked at.
            raise self.too_long(len(messages))
        if not all(map(_is_plain, messages)):
            read = [_message(m, f"messages[{index}]") for index, m in enumerate(messages)]
            if any(map(is_not, read, messages)):
                self.change("messages", read)
                messages = read
        last = messages[-1]
        if last["role"] == "assistant" and route.server == LLAMA:
            self.prefill = last.get("content") or ""
        if self.n > 1:
            self.settle_legs()
        # A forced call's schema tells the tools once more, should a template show it.
        told = len(raw) << self.is_forced
        self.settle_input(told + TEMPLATE_TOKENS + MESSAGE_TOKENS * len(messages))

    def _read_rest(self) -> None:
        body = self.body
        self.read_tier()
        self.read_n()
        self.settle_seed()
        store = body.get("store")
        if "store" in body:
            if store is not None and store is not False:
                raise unsupported("store", "store is not offered: nothing is kept of a request.")
            self.drop("store")
        modalities = body.get("modalities")
        if "modalities" in body:
            if modalities is not None and modalities != ["text"]:
                raise unsupported("modalities", 'modalities: only ["text"] is offered.')
            self.drop("modalities")
        if body.get("logprobs") or body.get("top_logprobs") is not None:
            self._read_logprobs()
        tools = body.get("tools")
        choice = body.get("tool_choice")
        if tools is None:
            if choice not in (None, "none", "auto"):
                raise wrong("tool_choice", "none or auto where there are no tools")
            if choice is not None:
                self.drop("tool_choice")
            if body.get("parallel_tool_calls") is not None:
                self.drop("parallel_tool_calls")
        elif choice != "none":
            self.is_parsed = True
            self._force(tools, choice)

    def _read_logprobs(self) -> None:
        body = self.body
        if body.get("logprobs") is not True:
            raise wrong("logprobs", "true where top_logprobs is given")
        self.tops = body.get("top_logprobs") or 0
        self.is_parsed = True
        if self.route.server == LLAMA:
            # For 0 llama.cpp tells no log-probabilities at all.
            self.change("top_logprobs", max(self.tops, 1))

    def _force(self, tools: list[dict[str, Any]], choice: Any) -> None:
        """A call that must be made."""
        wanted = choice["function"]["name"] if type(choice) is dict else None
        if wanted is not None and all(t["function"]["name"] != wanted for t in tools):
            raise wrong("tool_choice.function.name", "the name of one of the tools")
        if self.route.server != LLAMA or (wanted is None and choice != "required"):
            return
        self.is_forced = True
        schema = {"name": "call", "schema": call_schema(tools, wanted)}
        self.change("response_format", {"type": "json_schema", "json_schema": schema})
        self.change("tool_choice", "none")
        self.drop("parallel_tool_calls")

    def count_body(self) -> bytes:
        return self.render(self.cap)

    # ---- from the engine -------------------------------------------------------------------

    def _reply(self, raw: bytes, tier: str) -> tuple[bytes, Counts]:
        """One plain choice is filled where it lacks something; all else is written anew."""
        if self.is_parsed or self.prefill or self.n > 1:
            return self._join([raw], tier)
        # Read and written whole: two microseconds, and half of what byte searches for the places
        # to fill took, since each of those reads all of the answer.
        reply = orjson.loads(raw)
        choice = reply["choices"][0]
        message = choice["message"]
        if message.get("tool_calls") or not choice["finish_reason"] or not reply["id"]:
            return self._join([raw], tier)
        message.pop("tool_calls", None)
        reply.pop("timings", None)
        reply["object"] = "chat.completion"
        reply["model"] = self.route.name
        reply["service_tier"] = tier
        if "logprobs" not in choice:
            choice["logprobs"] = None
        if message.get("annotations") is None:
            message["annotations"] = []
        choice["message"] = _LACKING | message
        return orjson.dumps(reply), counts_of(self.route, reply["usage"])

    def _join(self, raws: list[bytes], tier: str) -> tuple[bytes, Counts]:
        replies = [read_reply(raw) for raw in raws]
        first = replies[0]
        told = [counts_of(self.route, reply.get("usage")) for reply in replies]
        counts = joined(told)
        of = str(first.get("id", ""))
        given = [choice for reply in replies for choice in reply["choices"]]
        choices = [self._choice(choice, index, of) for index, choice in enumerate(given)]
        usage = first["usage"] if len(raws) == 1 else {}
        body = {
            "id": first.get("id") or "chatcmpl-0",
            "object": "chat.completion",
            "created": first.get("created") or 0,
            "model": self.route.name,
            "service_tier": tier,
            "system_fingerprint": first.get("system_fingerprint"),
            "choices": choices,
            "usage": {
                **usage,
                "prompt_tokens": counts.prompt,
                "completion_tokens": counts.output,
                "total_tokens": counts.prompt + counts.output,
                "prompt_tokens_details": {"cached_tokens": counts.cache_read},
            },
        }
        return orjson.dumps(body), counts

    def _choice(self, choice: Any, index: int, of: str) -> dict[str, Any]:
        if type(choice) is not dict or type(choice.get("message")) is not dict:
            raise ValueError("the answer has a choice without a message")
        given = choice["message"]
        content = given.get("content")
        if self.prefill and type(content) is str:
            content = content.removeprefix(self.prefill)
        calls = Calls(f"{of.rpartition('-')[2][:24]}{index}")
        calls.feed(given.get("tool_calls"))
        if self.is_forced and type(content) is str:
            found = forced_call(content)
            content = None
            if found is not None:
                calls.add(*found)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or None if calls.calls else content or "",
            "refusal": given.get("refusal"),
            "annotations": given.get("annotations") or [],
        }
        if given.get("reasoning_content"):
            message["reasoning_content"] = given["reasoning_content"]
        finish = choice.get("finish_reason") or "stop"
        if calls.calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in calls.calls
            ]
            finish = finish if finish == "length" else "tool_calls"
        return {
            "index": index,
            "message": message,
            "logprobs": trim_logprobs(choice.get("logprobs"), self.tops),
            "finish_reason": finish,
        }

    def events(self, tier: str, rid: bytes) -> ChatEvents:
        return ChatEvents(
            self.surface,
            self.route.server,
            tier=tier,
            legs=self.legs,
            is_counted=self.is_counted,
            wants_usage=bool(self.wants_usage),
            is_forced=self.is_forced,
            tops=self.tops,
        )


def read_reply(raw: bytes) -> dict[str, Any]:
    """ValueError: it is no answer with choices."""
    reply = orjson.loads(raw)
    if type(reply) is not dict or type(reply.get("choices")) is not list or not reply["choices"]:
        raise ValueError("the answer has no choices")
    return reply


def joined(told: list[Counts]) -> Counts:
    """The input once, as the first leg met it; outputs added up."""
    return Counts(
        input_uncached=told[0].input_uncached,
        cache_read=told[0].cache_read,
        output=sum(counts.output for counts in told),
        is_inconsistent=any(counts.is_inconsistent for counts in told),
    )


# ---- messages ------------------------------------------------------------------------------------


def _is_plain(message: Any) -> bool:
    """A text and who said it, and nothing else: what nearly all messages are."""
    try:
        return message["role"] in _PLAIN and type(message["content"]) is str and len(message) == 2
    except (KeyError, TypeError):
        return False


def _message(message: Any, at: str) -> dict[str, Any]:
    """A message that is well formed: itself, or a form of it that engines read."""
    if type(message) is not dict:
        raise wrong(at, "an object")
    role = message.get("role")
    if type(role) is not str or role not in _ROLES:
        raise wrong(f"{at}.role", "one of system, developer, user, assistant, tool")
    only(message, _KEYS[role], at)
    out = message
    if None in message.values():
        kept = message.items()
        out = {key: value for key, value in kept if value is not None or key == "content"}
    content = message.get("content")
    if type(content) is list:
        out = {**out, "content": _parts(content, f"{at}.content")}
    elif content is None:
        if role != "assistant" or not message.get("tool_calls"):
            raise missing(f"{at}.content")
    elif type(content) is not str:
        raise wrong(f"{at}.content", "a string or a list of text parts")
    if message.get("name") is not None and type(message["name"]) is not str:
        raise wrong(f"{at}.name", "a string")
    if role == "tool" and type(message.get("tool_call_id")) is not str:
        raise missing(f"{at}.tool_call_id")
    if role == "assistant":
        out = _assistant(out, at)
    return out


def _assistant(message: dict[str, Any], at: str) -> dict[str, Any]:
    out = {
        key: value
        for key, value in message.items()
        if key not in _ECHOED and (value is not None or key == "content")
    }
    for key in ("audio", "function_call"):
        if message.get(key) is not None:
            raise unsupported(f"{at}.{key}")
    if type(out.get("reasoning_content", "")) is not str:
        raise wrong(f"{at}.reasoning_content", "a string")
    calls = out.get("tool_calls")
    if calls is not None:
        if type(calls) is not list:
            raise wrong(f"{at}.tool_calls", "a list")
        out["tool_calls"] = [
            _call(call, f"{at}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]
        if not calls:
            del out["tool_calls"]
    return out


def _call(call: Any, at: str) -> dict[str, Any]:
    if type(call) is not dict or call.get("type") != "function":
        raise wrong(f"{at}.type", "function")
    only(call, {"id", "type", "function", "index"}, at)
    if type(call.get("id")) is not str:
        raise missing(f"{at}.id")
    function = call.get("function")
    if type(function) is not dict:
        raise missing(f"{at}.function")
    only(function, {"name", "arguments", "parsed_arguments"}, f"{at}.function")
    name(function.get("name"), f"{at}.function.name")
    arguments = function.get("arguments")
    try:
        # An engine that cannot read them answers 500; none at all is how some write no arguments.
        is_read = type(orjson.loads(arguments or b"{}")) is dict
    except (orjson.JSONDecodeError, TypeError):
        is_read = False
    if not is_read:
        raise wrong(f"{at}.function.arguments", "a JSON object, written as a string")
    return {
        "id": call["id"],
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments or "{}"},
    }


def _parts(parts: list[Any], at: str) -> str:
    """Text parts, joined by line breaks: templates know one text a message."""
    texts = []
    for index, part in enumerate(parts):
        if type(part) is not dict or part.get("type") != "text":
            raise wrong(f"{at}[{index}].type", "text: this model takes nothing else")
        only(part, {"type", "text"}, f"{at}[{index}]")
        if type(part.get("text")) is not str:
            raise wrong(f"{at}[{index}].text", "a string")
        texts.append(part["text"])
    if not texts:
        raise missing(at)
    return "\n".join(texts)
