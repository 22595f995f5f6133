"""The Messages surface's answers: the events of its streams, and the message object.

    message_start · (content_block_start · content_block_delta … · content_block_stop) …
    · message_delta · message_stop

Counts are cumulative: the last value of a field is the value (never a sum). `input_tokens` is what
was not met in the cache; what was stands beside it.
"""

from __future__ import annotations

from typing import Any

import orjson

from sublet.base.wire.gateway import Counts
from sublet.gateway.dialects.events import Events
from sublet.gateway.dialects.tools import Calls, forced_call

_REASONS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "content_filter": "refusal",
}
_NONE = Counts(input_uncached=0, cache_read=0, output=0)


def stop_reason(finish: Any, *, has_calls: bool, by: str | None) -> str:
    """Why it ended, in Anthropic's words."""
    if has_calls and finish != "length":
        return "tool_use"
    if by is not None:
        return "stop_sequence"
    return _REASONS.get(finish, "end_turn")


def stopped_by(choice: dict[str, Any], whole: dict[str, Any]) -> str | None:
    """The stop sequence that ended it, where the engine tells."""
    told = choice.get("stop_reason")  # vLLM
    verbose = whole.get("__verbose")  # llama.cpp
    if told is None and type(verbose) is dict:
        told = verbose.get("stopping_word")
    return told if type(told) is str and told else None


def anthropic_usage(counts: Counts, tier: str) -> dict[str, Any]:
    return {
        "input_tokens": counts.input_uncached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cache_read,
        "cache_creation": None,
        "output_tokens": counts.output,
        "output_tokens_details": None,
        "server_tool_use": None,
        "inference_geo": None,
        "service_tier": "standard" if tier == "default" else tier,
    }


def new_message(engine_id: str, model: str, counts: Counts, tier: str) -> dict[str, Any]:
    """A message without content yet."""
    return {
        "id": "msg_" + engine_id.rpartition("-")[2],
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "stop_details": None,
        "container": None,
        "usage": anthropic_usage(counts, tier),
    }


def tool_use(call_id: str, name: str, arguments: Any) -> dict[str, Any]:
    return {
        "type": "tool_use",
        "id": call_id,
        "name": name,
        "input": arguments,
        "caller": {"type": "direct"},
    }


class MessagesEvents(Events):
    """Rewrites one chat stream of an engine into a Messages stream."""

    def __init__(
        self, server: str, *, model: str, tier: str, is_counted: bool, is_forced: bool
    ) -> None:
        super().__init__("messages", server, is_counted=is_counted)
        self._model = model
        self._tier = tier
        self._is_forced = is_forced
        self._calls: Calls | None = None
        self._block = -1
        self._open: Any = None
        """What the open block is of: `text`, or a call's index; None: no block is open."""
        self._text = ""
        self._id = ""
        self._has_begun = False
        self._finish: str | None = None
        self._by: str | None = None

    def _chunk(self, chunk: dict[str, Any], leg: int) -> None:
        if self._calls is None:
            self._id = str(chunk.get("id", ""))
            self._calls = Calls(self._id.rpartition("-")[2][:24])
        choices = chunk.get("choices")
        if type(choices) is not list or not choices or type(choices[0]) is not dict:
            return
        choice = choices[0]
        self._finish = choice.get("finish_reason") or self._finish
        self._by = stopped_by(choice, chunk) or self._by
        delta = choice.get("delta")
        delta = delta if type(delta) is dict else {}
        content = delta.get("content")
        calls = delta.get("tool_calls")
        # llama.cpp's first event tells no counts, and its next one does.
        if content or calls or self.legs[0].counts is not None:
            self._begin()
        if content and type(content) is str:
            if self._is_forced:
                self._text += content
            else:
                self._turn_to("text", {"type": "text", "text": "", "citations": None})
                self._delta({"type": "text_delta", "text": content})
        for added in self._calls.feed(calls):
            self._call(*added)

    def _call(self, call: Any, is_first: bool, more: str) -> None:
        self._turn_to(call.index, tool_use(call.id, call.name, {}))
        if more:
            self._delta({"type": "input_json_delta", "partial_json": more})

    def _begin(self) -> None:
        if not self._has_begun:
            self._has_begun = True
            message = new_message(self._id, self._model, self.counts or _NONE, self._tier)
            self._event("message_start", {"message": message})

    def _turn_to(self, what: Any, block: dict[str, Any]) -> None:
        """The block that the next delta is of, open and at its own index."""
        if self._open == what:
            return
        self._close()
        self._open = what
        self._block += 1
        self._event("content_block_start", {"index": self._block, "content_block": block})

    def _close(self) -> None:
        if self._open is not None:
            self._open = None
            self._event("content_block_stop", {"index": self._block})

    def _delta(self, delta: dict[str, Any]) -> None:
        self._event("content_block_delta", {"index": self._block, "delta": delta})

    def _end(self) -> None:
        self._begin()
        calls = self._calls or Calls("")
        found = forced_call(self._text) if self._text else None
        if found is not None:
            self._call(*calls.add(*found))
        self._close()
        reason = stop_reason(self._finish, has_calls=bool(calls.calls), by=self._by)
        self._event(
            "message_delta",
            {
                "delta": {
                    "stop_reason": reason,
                    "stop_sequence": self._by,
                    "stop_details": None,
                    "container": None,
                },
                "usage": anthropic_usage(self.counts or _NONE, self._tier),
            },
        )
        self._event("message_stop", {})

    def _event(self, kind: str, values: dict[str, Any]) -> None:
        data = orjson.dumps({"type": kind, **values})
        self._out.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), data))
