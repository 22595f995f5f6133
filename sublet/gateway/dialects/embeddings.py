"""`/v1/embeddings`: strings or token ids in, vectors out. Output tokens: none.

The OpenAI SDK asks for base64 where its caller does not say; it is made here where the engine is
not trusted with it. `dimensions` are refused where the route does not list them.
"""

from __future__ import annotations

import base64
import sys
from array import array
from typing import Any

import orjson

from sublet.base.wire.gateway import Counts, ModelRoute
from sublet.gateway.dialects.checks import missing, one_of, passes, sealed, wrong
from sublet.gateway.dialects.prepared import TEMPLATE_TOKENS, Prepared, counts_of
from sublet.gateway.dialects.streams import USAGE, object_end
from sublet.gateway.dialects.surfaces import Surface

_OWN = frozenset(("model", "input", "encoding_format", "service_tier"))
INPUTS_AT_MOST = 2048


class Embeddings(Prepared):
    """A request of the embeddings surface: no stream, no cap."""

    __slots__ = ("is_base64",)

    surface: Surface = "embeddings"
    path = b"/v1/embeddings"
    input_name = "input"

    def __init__(self, raw: bytes, body: dict[str, Any], route: ModelRoute) -> None:
        super().__init__(raw, body, route)
        fields = route.fields.get("embeddings", ())
        for key, value in body.items():
            if key not in _OWN and not passes(key, value, route, fields):
                self.drop(key)
        self.read_tier()
        self.is_base64 = False
        encoding = body.get("encoding_format")
        if encoding is not None:
            one_of("float", "base64")(encoding, "encoding_format")
            if encoding == "base64" and "encoding_format" not in fields:
                self.is_base64 = True
        if "encoding_format" not in fields:
            self.drop("encoding_format")
        self.inputs = self._read_input()
        self.settle_input(len(raw) + TEMPLATE_TOKENS + 2 * self.inputs, prompts=self.inputs)

    def _read_input(self) -> int:
        given = self.body.get("input")
        if given is None:
            raise missing("input")
        if type(given) is str:
            if not given:
                raise wrong("input", "not empty")
            return 1
        if type(given) is not list or not 0 < len(given) <= INPUTS_AT_MOST:
            raise wrong("input", f"a string, token ids, or a list of 1 to {INPUTS_AT_MOST}")
        if type(given[0]) is int:
            self._read_tokens(given, "input")
            return 1
        kind = type(given[0])
        for index, item in enumerate(given):
            if type(item) is not kind or kind not in (str, list):
                raise wrong(f"input[{index}]", "a string or token ids, as the others are")
            if not item:
                raise wrong(f"input[{index}]", "not empty")
            if kind is list:
                self._read_tokens(item, f"input[{index}]")
        return len(given)

    def _read_tokens(self, tokens: list[Any], param: str) -> None:
        if self.route.is_sealed:
            raise sealed("input")
        if any(type(token) is not int or not 0 <= token < 1 << 31 for token in tokens):
            raise wrong(param, "whole numbers, if it is token ids")

    def render(self, cap: int, leg: int = 0) -> bytes:
        if self.is_plain:
            return self.raw
        body = {
            key: value
            for key, value in self.body.items()
            if value is not None and key not in self.drops
        }
        return orjson.dumps(body)

    def _reply(self, raw: bytes, tier: str) -> tuple[bytes, Counts]:
        usage = raw.rfind(USAGE)
        begin = usage + len(USAGE) - 1
        end = object_end(raw, begin) if usage >= 0 else -1
        if end > 0 and not self.is_base64 and b'"object":"list"' in raw:
            counts = counts_of(self.route, orjson.loads(raw[begin:end]))
            return raw, counts
        reply = orjson.loads(raw)
        if type(reply) is not dict or type(reply.get("data")) is not list:
            raise ValueError("the answer has no embeddings")
        counts = counts_of(self.route, reply.get("usage"))
        body = {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": self._encoded(item["embedding"]),
                }
                for index, item in enumerate(reply["data"])
            ],
            "model": self.route.name,
            "usage": {"prompt_tokens": counts.prompt, "total_tokens": counts.prompt},
        }
        return orjson.dumps(body), counts

    def _encoded(self, vector: Any) -> Any:
        """As the client wants it: base64 of little-endian floats of 32 bits."""
        if not self.is_base64 or type(vector) is not list:
            return vector
        floats = array("f", vector)
        if sys.byteorder == "big":
            floats.byteswap()
        return base64.b64encode(floats.tobytes()).decode()
