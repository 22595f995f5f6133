"""Tool calls: forced where the engine does not force them, told apart where it does not number them.

llama.cpp forces a call only with chat templates whose form of a call it recognises; with others
`required` is silently ignored. What it does keep with every template is a JSON schema of the whole
answer. So a forced call is asked for as an answer of the form {"name": …, "arguments": …}, one
alternative a tool, and turned back into a call here.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*"([a-zA-Z0-9_-]+)"\s*,\s*"arguments"\s*:\s*(.*)\Z', re.DOTALL
)


def call_schema(tools: list[dict[str, Any]], only: str | None) -> dict[str, Any]:
    """The schema of an answer that is one call: of `only`, or of any of the tools."""
    chosen = [tool["function"] for tool in tools if only in (None, tool["function"]["name"])]
    definitions: dict[str, Any] = {}
    calls = []
    for index, function in enumerate(chosen):
        parameters = _object_schema(function.get("parameters") or {})
        if b'"$ref":' in orjson.dumps(parameters):
            # References are resolved from the schema's root, which is ours now.
            at = f"tool_{index}"
            definitions[at] = _moved(parameters, f"#/$defs/{at}")
            parameters = {"$ref": f"#/$defs/{at}"}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": function["name"]}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    return {**schema, "$defs": definitions} if definitions else schema


def _object_schema(parameters: dict[str, Any]) -> dict[str, Any]:
    """Arguments are always an object, also where the schema does not say so."""
    if any(key in parameters for key in ("type", "$ref", "anyOf", "oneOf", "allOf")):
        return parameters
    return {**parameters, "type": "object"}


def _moved(schema: Any, root: str) -> Any:
    """The same schema under another root. Its depth was bounded when it was checked."""
    if type(schema) is list:
        return [_moved(item, root) for item in schema]
    if type(schema) is not dict:
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and type(value) is str and value.startswith("#")
        else _moved(value, root)
        for key, value in schema.items()
    }


def forced_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of an answer after `call_schema`; None: it was cut before its name ended.

    Arguments of an answer that was cut are what there is of them, as of any cut answer.
    """
    try:
        whole = orjson.loads(text)
        return whole["name"], orjson.dumps(whole["arguments"]).decode()
    except (orjson.JSONDecodeError, KeyError, TypeError):
        head = _HEAD.match(text)
        return None if head is None else (head[1], head[2])


def is_whole(arguments: str) -> bool:
    try:
        orjson.loads(arguments)
    except orjson.JSONDecodeError:
        return False
    return True


class Call:
    """One call as it grows in a stream."""

    __slots__ = ("arguments", "engine_id", "engine_index", "id", "index", "is_told", "name")

    def __init__(self, index: int) -> None:
        self.index = index
        self.id = ""
        self.engine_id: str | None = None
        self.engine_index: int | None = None
        self.name = ""
        self.arguments = ""
        self.is_told = False


class Calls:
    """The calls of one choice of a stream, each with an index of its own, id and name told once.

    In, they are told apart by id, then by name, then by position: engines were seen to give one
    index to all calls, or none.
    """

    __slots__ = ("_base", "calls")

    def __init__(self, base: str) -> None:
        self._base = base
        self.calls: list[Call] = []

    def feed(self, parts: Any) -> list[tuple[Call, bool, str]]:
        """What the parts add: the call, whether it is told for the first time, more arguments."""
        added = []
        taken: set[int] = set()
        given = [part for part in parts if type(part) is dict] if type(parts) is list else []
        for position, part in enumerate(given):
            function = part.get("function")
            function = function if type(function) is dict else {}
            engine_id = part.get("id") or None
            name = function.get("name") or ""
            index = part.get("index")
            index = index if type(index) is int else None
            call = self._find(engine_id, name, index, taken)
            if call is None and engine_id is None and not name and index is None:
                # Nothing names it: the calls of one event go on with the last calls, in order.
                last = self.calls[max(len(self.calls) - len(given), 0) :]
                call = last[position] if position < len(last) else None
            if call is None:
                call = Call(len(self.calls))
                call.engine_index = index
                self.calls.append(call)
            taken.add(call.index)
            if name and not call.name:
                call.name = str(name)
            if engine_id and call.engine_id is None:
                call.engine_id = str(engine_id)
            more = function.get("arguments") or ""
            if type(more) is not str:
                more = orjson.dumps(more).decode()
            call.arguments += more
            if not call.name:
                continue
            is_first = not call.is_told
            if is_first:
                call.is_told = True
                call.id = call.engine_id or f"call_{self._base}_{call.index}"
                more = call.arguments
            if is_first or more:
                added.append((call, is_first, more))
        return added

    def add(self, name: str, arguments: str) -> tuple[Call, bool, str]:
        """A call that is known whole."""
        part = {"function": {"name": name, "arguments": arguments}, "id": None}
        return self.feed([part])[0]

    def _find(
        self, engine_id: str | None, name: str, index: int | None, taken: set[int]
    ) -> Call | None:
        """The call that a part names, if it was met; never one that this event told of before."""
        free = [call for call in self.calls if call.index not in taken]
        if engine_id is not None:
            same = [call for call in free if call.engine_id == engine_id]
            # An id that comes late belongs to the call at its index that has none yet.
            same = same or [
                call
                for call in free
                if call.engine_id is None
                and not call.is_told
                and index is not None
                and call.engine_index == index
            ]
        elif name:
            same = [
                call
                for call in free
                if call.name in ("", name)
                and (index is None or call.engine_index == index)
                and not is_whole(call.arguments)
            ]
        elif index is not None:
            same = [call for call in free if call.engine_index == index]
        else:
            return None
        return same[-1] if same else None
