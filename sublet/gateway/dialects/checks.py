"""What a field may hold. A check returns nothing, or raises a Refusal that names the field.

Hand-written, since it stands on the road of every request: a plain one passes a handful of calls.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import orjson

from sublet.base.wire.gateway import ModelRoute
from sublet.gateway.errors import Refusal

Check = Callable[[Any, str], Any]

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}\Z")
STOPS_AT_MOST = 16
STOP_LENGTH = 1024
TOOLS_AT_MOST = 128
DEPTH_AT_MOST = 64
"""Of a JSON schema: the engine's reader of schemas calls itself."""
MEMBERS_AT_MOST = 1000
ENUM_AT_MOST = 256
PATTERN_LENGTH = 512
REPEATS_AT_MOST = 100_000
BOUND_AT_MOST = 1_000_000
"""Engines make a grammar of a schema, and go through all that it still allows with every token, on
the one thread that serves everybody: a large one stops them for minutes."""
_RANGES = (("minItems", "maxItems"), ("minLength", "maxLength"))
_REPEATED = re.compile(r"(?<!\\)\{([^}]*)\}?")
_REPEAT = re.compile(r"(\d{1,6})?(,)?(\d{1,6})?\Z")


def wrong(param: str, what: str) -> Refusal:
    return Refusal(400, "invalid_request", f"{param} must be {what}.", param=param)


def missing(param: str) -> Refusal:
    return Refusal(400, "invalid_request", f"{param} is required.", param=param)


def unsupported(param: str, why: str = "") -> Refusal:
    text = why or f"{param} is not supported here: leave it out."
    return Refusal(400, "unsupported_parameter", text, param=param)


def sealed(param: str) -> Refusal:
    return Refusal(
        400,
        "sealed_parameter",
        f"{param} is not offered for this model: its weights are sealed.",
        param=param,
    )


def read_object(raw: bytes) -> dict[str, Any]:
    """A request's body. Of a name given twice the last counts, here and in the engines."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Refusal(400, "invalid_json", f"The body is not valid JSON: {error}.") from error
    if type(body) is not dict:
        raise Refusal(400, "invalid_request", "The body must be a JSON object.")
    return body


# ---- single values -------------------------------------------------------------------------------


def number(low: float, high: float) -> Check:
    def check(value: Any, param: str) -> None:
        if type(value) not in (int, float) or not low <= value <= high:
            raise wrong(param, f"a number from {low:g} to {high:g}")

    return check


def integer(low: int, high: int) -> Check:
    def check(value: Any, param: str) -> None:
        if type(value) is not int or not low <= value <= high:
            raise wrong(param, f"a whole number from {low} to {high}")

    return check


def boolean(value: Any, param: str) -> None:
    if type(value) is not bool:
        raise wrong(param, "true or false")


def text(value: Any, param: str) -> None:
    if type(value) is not str:
        raise wrong(param, "a string")


def one_of(*allowed: str) -> Check:
    def check(value: Any, param: str) -> None:
        if type(value) is not str or value not in allowed:
            raise wrong(param, "one of " + ", ".join(allowed))

    return check


def stops(value: Any, param: str) -> None:
    """One string or a few; none of them empty, since each text has those."""
    if type(value) is str:
        value = [value]
    if type(value) is not list or len(value) > STOPS_AT_MOST:
        raise wrong(param, f"a string or a list of at most {STOPS_AT_MOST} strings")
    for item in value:
        if type(item) is not str or not 0 < len(item) <= STOP_LENGTH:
            raise wrong(param, f"strings of 1 to {STOP_LENGTH} characters")


def logit_bias(value: Any, param: str) -> None:
    if type(value) is not dict or len(value) > 1024:
        raise wrong(param, "an object of at most 1024 token ids")
    for token, bias in value.items():
        if not token.isascii() or not token.isdigit() or type(bias) not in (int, float):
            raise wrong(param, "an object of token ids and numbers")
        if not -100 <= bias <= 100:
            raise wrong(param, "an object of numbers from -100 to 100")


def metadata(value: Any, param: str) -> None:
    if type(value) is not dict or len(value) > 16:
        raise wrong(param, "an object of at most 16 strings")
    if any(type(item) is not str for item in value.values()):
        raise wrong(param, "an object of strings")


def shallow(value: Any, param: str) -> list[Any]:
    """An object that is not nested deeper than an engine's reader bears; all its levels' objects
    and lists."""
    if type(value) is not dict:
        raise wrong(param, "an object")
    level: list[Any] = [value]
    found: list[Any] = []
    for _ in range(DEPTH_AT_MOST):
        found += level
        level = [
            child
            for item in level
            for child in (item.values() if type(item) is dict else item)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return found
    raise wrong(param, f"nested at most {DEPTH_AT_MOST} levels deep")


def schema(value: Any, param: str) -> int:
    """A JSON schema that an engine's reader bears: not deep, not large, no range that ends before
    it begins (llama.cpp repeats that some four thousand million times, until memory is gone).
    Returns how many members it has."""
    if type(value) is not dict:
        raise wrong(param, "a JSON schema (an object)")
    items = shallow(value, param)
    members = sum(map(len, items))
    if members > MEMBERS_AT_MOST:
        raise wrong(param, f"of at most {MEMBERS_AT_MOST} members")
    for item in items:
        if type(item) is dict:
            _bounded(item, param)
    return members


def _bounded(item: dict[str, Any], param: str) -> None:
    """What one level of a schema asks to be repeated, or chosen from. Where these names are those
    of properties, objects stand behind them, which are no bounds."""
    for low, high in _RANGES:
        least, most = item.get(low), item.get(high)
        for key, bound in ((low, least), (high, most)):
            if type(bound) in (int, float) and not (
                type(bound) is int and 0 <= bound <= BOUND_AT_MOST
            ):
                raise wrong(f"{param}: {key}", f"a whole number from 0 to {BOUND_AT_MOST}")
        if type(least) is int and type(most) is int and least > most:
            raise wrong(f"{param}: {low}", f"at most {high}")
    choices = item.get("enum")
    if type(choices) is list and len(choices) > ENUM_AT_MOST:
        raise wrong(f"{param}: enum", f"a list of at most {ENUM_AT_MOST}")
    pattern = item.get("pattern")
    if type(pattern) is str:
        _pattern(pattern, f"{param}: pattern")


def _pattern(pattern: str, param: str) -> None:
    if len(pattern) > PATTERN_LENGTH:
        raise wrong(param, f"of at most {PATTERN_LENGTH} characters")
    repeats = 1
    for told in _REPEATED.findall(pattern):
        found = _REPEAT.match(told)
        if found is None or not told.strip(","):
            raise wrong(param, "of repetitions {number}, {least,}, {,most} or {least,most}")
        least, is_range, most = found.groups()
        if is_range and least and most and int(least) > int(most):
            raise wrong(param, "of repetitions whose least is at most their most")
        repeats *= max(int(most or least or 1), 1)
    if repeats > REPEATS_AT_MOST:
        raise wrong(param, f"of at most {REPEATS_AT_MOST} repetitions in all")


def response_format(value: Any, param: str) -> None:
    if type(value) is not dict:
        raise wrong(param, "an object with a type")
    form = value.get("type")
    if form not in ("text", "json_object", "json_schema"):
        raise wrong(f"{param}.type", "one of text, json_object, json_schema")
    only(value, {"type", "json_schema"} if form == "json_schema" else {"type"}, param)
    if form == "json_schema":
        inner = value.get("json_schema")
        if type(inner) is not dict:
            raise missing(f"{param}.json_schema")
        only(inner, {"name", "description", "schema", "strict"}, f"{param}.json_schema")
        name(inner.get("name"), f"{param}.json_schema.name")
        schema(inner.get("schema"), f"{param}.json_schema.schema")
        _maybe(inner, "strict", boolean, f"{param}.json_schema")
        _maybe(inner, "description", text, f"{param}.json_schema")


# ---- objects -------------------------------------------------------------------------------------


def only(value: dict[str, Any], names: set[str] | frozenset[str], param: str) -> None:
    """No member but these."""
    for key in value:
        if key not in names:
            raise unsupported(f"{param}.{key}")


def name(value: Any, param: str) -> None:
    if type(value) is not str or not NAME.match(value):
        raise wrong(param, "1 to 64 letters, digits, _ or -")


def _maybe(value: dict[str, Any], key: str, check: Check, param: str) -> None:
    found = value.get(key)
    if found is not None:
        check(found, f"{param}.{key}")


_TOOL = frozenset(("type", "function"))
_FUNCTION = frozenset(("name", "description", "parameters", "strict"))


def tools(value: Any, param: str) -> None:
    """OpenAI's: functions with names that differ."""
    if type(value) is not list or not 0 < len(value) <= TOOLS_AT_MOST:
        raise wrong(param, f"a list of 1 to {TOOLS_AT_MOST} tools")
    names = set()
    members = 0
    for index, tool in enumerate(value):
        at = f"{param}[{index}]"
        if type(tool) is not dict or tool.get("type") != "function":
            raise wrong(f"{at}.type", "function")
        only(tool, _TOOL, at)
        function = tool.get("function")
        if type(function) is not dict:
            raise missing(f"{at}.function")
        only(function, _FUNCTION, f"{at}.function")
        name(function.get("name"), f"{at}.function.name")
        if function["name"] in names:
            raise wrong(f"{at}.function.name", "different from the other tools' names")
        names.add(function["name"])
        _maybe(function, "description", text, f"{at}.function")
        _maybe(function, "strict", boolean, f"{at}.function")
        if function.get("parameters") is not None:
            members += schema(function["parameters"], f"{at}.function.parameters")
    if members > MEMBERS_AT_MOST:
        raise wrong(param, f"tools whose parameters have at most {MEMBERS_AT_MOST} members in all")


def tool_choice(value: Any, param: str) -> None:
    if type(value) is str:
        one_of("none", "auto", "required")(value, param)
        return
    if type(value) is not dict or value.get("type") != "function":
        raise wrong(param, "none, auto, required or a function")
    only(value, _TOOL, param)
    function = value.get("function")
    if type(function) is not dict:
        raise missing(f"{param}.function")
    only(function, {"name"}, f"{param}.function")
    name(function.get("name"), f"{param}.function.name")


PASSED: dict[str, Check] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": integer(-1, 1 << 20),
    "min_p": number(0, 1),
    "typical_p": number(0, 1),
    "repetition_penalty": number(0, 10),
    "repeat_penalty": number(0, 10),
    "frequency_penalty": number(-2, 2),
    "presence_penalty": number(-2, 2),
    "seed": integer(-(1 << 63), (1 << 63) - 1),
    "stop": stops,
    "logit_bias": logit_bias,
    "logprobs": boolean,
    "top_logprobs": integer(0, 20),
    "response_format": response_format,
    "tools": tools,
    "tool_choice": tool_choice,
    "parallel_tool_calls": boolean,
    "reasoning_effort": one_of("none", "minimal", "low", "medium", "high", "xhigh"),
    "dimensions": integer(1, 1 << 16),
    "encoding_format": one_of("float", "base64"),
    "echo": boolean,
    "suffix": text,
}
"""Fields that engines honour: passed where the route lists them. What a route lists and is not
here is passed as it came: who writes the route vouches for it."""

IGNORED: dict[str, Check] = {
    "user": text,
    "metadata": metadata,
    "safety_identifier": text,
    "prompt_cache_key": text,
    "prompt_cache_retention": one_of("in_memory", "in-memory", "24h"),
}
"""Checked and dropped: they change neither what is made nor what it costs. Prompt caching is
always on, and `user` and `metadata` are for the caller's own records."""

REVEALING = frozenset(
    (
        "logprobs",
        "top_logprobs",
        "prompt_logprobs",
        "n_probs",
        "logit_bias",
        "grammar",
        "guided_grammar",
        "guided_regex",
        "guided_choice",
        "structured_outputs",
        "lora",
        "chat_template",
        "chat_template_kwargs",
        "echo",
        "return_tokens",
        "return_token_ids",
        "verbose",
    )
)
"""Refused for a sealed model, whatever its route lists: each tells more of the weights, or steers
them more finely, than text in and text out."""


def passes(key: str, value: Any, route: ModelRoute, fields: tuple[str, ...]) -> bool:
    """A field that is not the dialect's own: True where it is listed and well formed, False where
    it is to be dropped; else it is refused by name."""
    if value is None:
        # SDKs send null for what was not said; it is no way around a refusal by name.
        if key in fields or key in PASSED or key in IGNORED:
            return False
        raise unsupported(key)
    ignored = IGNORED.get(key)
    if ignored is not None and key not in fields:
        ignored(value, key)
        return False
    if key in REVEALING:
        if value is False:
            return False
        if route.is_sealed:
            raise sealed(key)
    if key not in fields:
        raise unsupported(key)
    check = PASSED.get(key)
    if check is not None:
        check(value, key)
    return True
