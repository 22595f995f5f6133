"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's dialect over the engine's chat.

Honoured: model, max_tokens, messages, system, stop_sequences, stream, tools, tool_choice,
service_tier; temperature, top_p and top_k where the route lists them. `metadata`, `cache_control`
and `thinking: disabled` change neither what is made nor what it costs, and are dropped. Thinking,
images, documents and server tools are refused by name.

llama.cpp continues a last message of the assistant; the answer holds what was added to it.
"""

from __future__ import annotations

from typing import Any

import orjson

from sublet.base.wire.gateway import Counts, ModelRoute
from sublet.gateway.dialects.chat import read_reply
from sublet.gateway.dialects.checks import (
    MEMBERS_AT_MOST,
    STOPS_AT_MOST,
    TOOLS_AT_MOST,
    boolean,
    missing,
    name,
    number,
    only,
    passes,
    schema,
    shallow,
    stops,
    text,
    unsupported,
    wrong,
)
from sublet.gateway.dialects.messages_events import (
    MessagesEvents,
    new_message,
    stop_reason,
    stopped_by,
    tool_use,
)
from sublet.gateway.dialects.prepared import (
    LLAMA,
    MESSAGE_TOKENS,
    STREAM_FIELDS,
    TEMPLATE_TOKENS,
    Prepared,
    counts_of,
)
from sublet.gateway.dialects.surfaces import Surface
from sublet.gateway.dialects.tools import Calls, call_schema, forced_call
from sublet.gateway.errors import Refusal

_OWN = frozenset(
    (
        "model", "messages", "max_tokens", "system", "stop_sequences", "stream", "tools",
        "tool_choice", "service_tier", "metadata", "thinking", "temperature",
    )
)  # fmt: skip
_TIERS = {"auto": "default", "standard_only": "default", "default": "default", "flex": "flex"}
_BLOCK_EXTRAS = frozenset(("cache_control", "citations"))


class Messages(Prepared):
    """A request of the messages surface, and what it is for the engine's chat."""

    __slots__ = ("chat", "is_forced", "prefill")

    surface: Surface = "messages"
    path = b"/v1/chat/completions"
    count_path = b"/v1/chat/completions/input_tokens"
    input_name = "messages"
    ping = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, raw: bytes, body: dict[str, Any], route: ModelRoute) -> None:
        super().__init__(raw, body, route)
        self.is_plain = False
        self.is_parsed = True
        self.is_forced = False
        self.prefill = ""
        self.chat: dict[str, Any] = {"model": route.name}
        fields = route.fields.get("messages", ())
        chat_fields = route.fields.get("chat", ())
        for key, value in body.items():
            if key not in _OWN and passes(key, value, route, fields):
                self.chat[key] = value
        self._read_own(fields, chat_fields)
        self.chat["messages"] = messages = self._read_system() + self._read_messages()
        self._read_tools(chat_fields)
        last = messages[-1]
        if last["role"] == "assistant" and route.server == LLAMA:
            self.prefill = last.get("content") or ""
        told = len(raw) << self.is_forced  # as in chat
        self.settle_input(told + TEMPLATE_TOKENS + MESSAGE_TOKENS * len(messages))

    def _read_own(self, fields: tuple[str, ...], chat_fields: tuple[str, ...]) -> None:
        body = self.body
        if body.get("max_tokens") is None:
            raise missing("max_tokens")
        self.read_cap("max_tokens")
        stream = body.get("stream")
        if stream is not None:
            boolean(stream, "stream")
            self.stream = stream
        tier = body.get("service_tier")
        if tier is not None:
            if type(tier) is not str or tier not in _TIERS:
                raise wrong("service_tier", "one of auto, standard_only, default, flex")
            self.tier = _TIERS[tier]
        temperature = body.get("temperature")
        if temperature is not None and passes("temperature", temperature, self.route, fields):
            number(0, 1)(temperature, "temperature")
            self.chat["temperature"] = temperature
        thinking = body.get("thinking")
        if thinking is not None and (
            type(thinking) is not dict or thinking.get("type") != "disabled"
        ):
            raise unsupported("thinking", "thinking is not offered for this model: leave it out.")
        metadata = body.get("metadata")
        if metadata is not None:
            if type(metadata) is not dict:
                raise wrong("metadata", "an object")
            only(metadata, {"user_id"}, "metadata")
        sequences = body.get("stop_sequences")
        if sequences:
            if type(sequences) is not list:
                raise wrong("stop_sequences", f"a list of at most {STOPS_AT_MOST} strings")
            if "stop" not in chat_fields:
                raise unsupported("stop_sequences")
            stops(sequences, "stop_sequences")
            self.chat["stop"] = sequences
            if self.route.server == LLAMA:
                # Only then does it tell which of them ended the answer.
                self.chat["verbose"] = True

    # ---- the conversation ------------------------------------------------------------------

    def _read_system(self) -> list[dict[str, Any]]:
        system = self.body.get("system")
        if system is None or system == []:
            return []
        if type(system) is str:
            return [{"role": "system", "content": system}] if system else []
        return [{"role": "system", "content": _texts(system, "system")}]

    def _read_messages(self) -> list[dict[str, Any]]:
        messages = self.body.get("messages")
        if type(messages) is not list or not messages:
            raise missing("messages") if not messages else wrong("messages", "a list")
        if len(messages) > self.route.context:
            # Each takes a token at least: too long, and known before any of them is looked at.
            raise self.too_long(len(messages))
        out: list[dict[str, Any]] = []
        for index, message in enumerate(messages):
            at = f"messages[{index}]"
            if type(message) is not dict:
                raise wrong(at, "an object")
            only(message, {"role", "content"}, at)
            role, content = message.get("role"), message.get("content")
            if role not in ("user", "assistant"):
                raise wrong(f"{at}.role", "user or assistant")
            if type(content) is str:
                out.append({"role": role, "content": content})
            elif type(content) is not list or not content:
                raise wrong(f"{at}.content", "a string or a list of blocks")
            elif role == "user":
                out += _user(content, f"{at}.content")
            else:
                out.append(_assistant(content, f"{at}.content"))
        return out

    # ---- tools -----------------------------------------------------------------------------

    def _read_tools(self, chat_fields: tuple[str, ...]) -> None:
        given, choice = self.body.get("tools"), self.body.get("tool_choice")
        if not given:
            if choice is not None:
                raise wrong("tool_choice", "left out where there are no tools")
            return
        if "tools" not in chat_fields:
            raise unsupported("tools")
        tools = _tools(given)
        self.chat["tools"] = tools
        kind, wanted = _choice(choice)
        if wanted is not None and all(t["function"]["name"] != wanted for t in tools):
            raise wrong("tool_choice.name", "the name of one of the tools")
        if type(choice) is dict and choice.get("disable_parallel_tool_use"):
            self.chat["parallel_tool_calls"] = False
        if kind not in ("any", "tool"):
            self.chat["tool_choice"] = kind
        elif self.route.server == LLAMA:
            self.is_forced = True
            form = {"name": "call", "schema": call_schema(tools, wanted)}
            self.chat["response_format"] = {"type": "json_schema", "json_schema": form}
            self.chat["tool_choice"] = "none"
            self.chat.pop("parallel_tool_calls", None)
        elif wanted is None:
            self.chat["tool_choice"] = "required"
        else:
            self.chat["tool_choice"] = {"type": "function", "function": {"name": wanted}}

    # ---- to and from the engine ------------------------------------------------------------

    def upstream(self, cap: int, leg: int) -> dict[str, Any]:
        body = {**self.chat, "max_tokens": cap}
        if self.stream:
            body.update(stream=True, **STREAM_FIELDS[self.route.counters])
        return body

    def count_body(self) -> bytes:
        return self.render(self.cap)

    def too_long(self, count: int) -> Refusal:
        limit, asked = self.route.context, self.asked or 0
        return Refusal(
            400,
            "context_length_exceeded",
            f"The input and `max_tokens` exceed the context: {count} + {asked} > {limit}. "
            "Shorten the input or ask for less output.",
        )

    def _reply(self, raw: bytes, tier: str) -> tuple[bytes, Counts]:
        reply = read_reply(raw)
        counts = counts_of(self.route, reply.get("usage"))
        choice = reply["choices"][0]
        given = choice["message"]
        content = (given.get("content") or "").removeprefix(self.prefill)
        calls = Calls(str(reply.get("id", "")).rpartition("-")[2][:24])
        calls.feed(given.get("tool_calls"))
        if self.is_forced:
            found = forced_call(content)
            content = ""
            if found is not None:
                calls.add(*found)
        blocks: list[dict[str, Any]] = []
        if content or not calls.calls:
            blocks.append({"type": "text", "text": content, "citations": None})
        blocks += [tool_use(c.id, c.name, _arguments(c.arguments)) for c in calls.calls]
        sequence = stopped_by(choice, reply)
        finish = choice.get("finish_reason")
        message = new_message(str(reply.get("id", "")), self.route.name, counts, tier)
        message["content"] = blocks
        message["stop_reason"] = stop_reason(finish, has_calls=bool(calls.calls), by=sequence)
        message["stop_sequence"] = sequence
        return orjson.dumps(message), counts

    def events(self, tier: str, rid: bytes) -> MessagesEvents:
        return MessagesEvents(
            self.route.server,
            model=self.route.name,
            tier=tier,
            is_counted=self.is_counted,
            is_forced=self.is_forced,
        )


class CountTokens(Messages):
    """The same conversation, only counted. Free: nothing is held and nothing billed."""

    __slots__ = ()

    surface: Surface = "count_tokens"
    path = b"/v1/chat/completions/input_tokens"
    count_path = b""

    def __init__(self, raw: bytes, body: dict[str, Any], route: ModelRoute) -> None:
        if route.server != LLAMA:
            raise unsupported(
                "model", "Tokens of this model are not counted beforehand: its server cannot."
            )
        super().__init__(raw, {"max_tokens": 1, **body}, route)
        self.stream = self.is_parsed = False
        self.cap = self.input_estimate = 0

    def _reply(self, raw: bytes, tier: str) -> tuple[bytes, Counts]:
        count = orjson.loads(raw)["input_tokens"]
        if type(count) is not int:
            raise ValueError("the answer tells no count")
        body = orjson.dumps({"input_tokens": count})
        return body, Counts(input_uncached=0, cache_read=0, output=0)


# ---- blocks --------------------------------------------------------------------------------------


def _texts(blocks: Any, at: str) -> str:
    """Text blocks alone, joined by line breaks."""
    if type(blocks) is str:
        return blocks
    if type(blocks) is not list:
        raise wrong(at, "a string or a list of text blocks")
    return "\n".join(_text(block, f"{at}[{index}]") for index, block in enumerate(blocks))


def _text(block: Any, at: str) -> str:
    if type(block) is not dict or block.get("type") != "text":
        raise wrong(f"{at}.type", "text: this model takes nothing else there")
    only(block, {"type", "text"} | _BLOCK_EXTRAS, at)
    text(block.get("text"), f"{at}.text")
    return str(block["text"])


def _user(blocks: list[Any], at: str) -> list[dict[str, Any]]:
    """What tools answered, each a message of its own, then what the user says."""
    results: list[dict[str, Any]] = []
    texts = []
    for index, block in enumerate(blocks):
        here = f"{at}[{index}]"
        if type(block) is dict and block.get("type") == "tool_result":
            results.append(_result(block, here))
        else:
            texts.append(_text(block, here))
    if texts:
        results.append({"role": "user", "content": "\n".join(texts)})
    return results


def _result(block: dict[str, Any], at: str) -> dict[str, Any]:
    only(block, {"type", "tool_use_id", "content", "is_error"} | _BLOCK_EXTRAS, at)
    text(block.get("tool_use_id"), f"{at}.tool_use_id")
    content = block.get("content")
    told = "" if content is None else _texts(content, f"{at}.content")
    if block.get("is_error") is not None:
        boolean(block["is_error"], f"{at}.is_error")
        if block["is_error"]:
            # Chat has no place for it but the text.
            told = f"Error: {told}"
    return {"role": "tool", "tool_call_id": block["tool_use_id"], "content": told}


def _assistant(blocks: list[Any], at: str) -> dict[str, Any]:
    texts = []
    calls = []
    for index, block in enumerate(blocks):
        here = f"{at}[{index}]"
        if type(block) is dict and block.get("type") == "tool_use":
            only(block, {"type", "id", "name", "input", "caller"} | _BLOCK_EXTRAS, here)
            text(block.get("id"), f"{here}.id")
            name(block.get("name"), f"{here}.name")
            shallow(block.get("input"), f"{here}.input")
            arguments = orjson.dumps(block["input"]).decode()
            function = {"name": block["name"], "arguments": arguments}
            calls.append({"id": block["id"], "type": "function", "function": function})
        else:
            texts.append(_text(block, here))
    message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if calls:
        message["tool_calls"] = calls
    return message


def _tools(given: Any) -> list[dict[str, Any]]:
    """As chat tells them."""
    if type(given) is not list or len(given) > TOOLS_AT_MOST:
        raise wrong("tools", f"a list of at most {TOOLS_AT_MOST} tools")
    tools: list[dict[str, Any]] = []
    members = 0
    for index, tool in enumerate(given):
        at = f"tools[{index}]"
        if type(tool) is not dict or tool.get("type") not in (None, "custom"):
            raise wrong(f"{at}.type", "custom: no server tools are offered")
        only(tool, {"type", "name", "description", "input_schema", "cache_control", "strict"}, at)
        name(tool.get("name"), f"{at}.name")
        if any(known["function"]["name"] == tool["name"] for known in tools):
            raise wrong(f"{at}.name", "different from the other tools' names")
        members += schema(tool.get("input_schema"), f"{at}.input_schema")
        function = {"name": tool["name"], "parameters": tool["input_schema"]}
        if tool.get("description") is not None:
            text(tool["description"], f"{at}.description")
            function["description"] = tool["description"]
        tools.append({"type": "function", "function": function})
    if members > MEMBERS_AT_MOST:
        raise wrong("tools", f"of at most {MEMBERS_AT_MOST} members of their schemas in all")
    return tools


def _choice(choice: Any) -> tuple[str, str | None]:
    """Its kind, and the tool that is named."""
    if choice is None:
        return "auto", None
    if type(choice) is not dict or choice.get("type") not in ("auto", "any", "tool", "none"):
        raise wrong("tool_choice.type", "one of auto, any, tool, none")
    only(choice, {"type", "name", "disable_parallel_tool_use"}, "tool_choice")
    if choice.get("disable_parallel_tool_use") is not None:
        boolean(choice["disable_parallel_tool_use"], "tool_choice.disable_parallel_tool_use")
    if choice["type"] != "tool":
        return choice["type"], None
    name(choice.get("name"), "tool_choice.name")
    return "tool", choice["name"]


def _arguments(arguments: str) -> Any:
    """An object, as Anthropic's clients get it; of a call that was cut nothing can be read."""
    try:
        found = orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return {}
    return found if type(found) is dict else {}
