"""Streams that are parsed: tool calls, log-probabilities, several legs, and the Messages surface.

Whole events of the engine in, whole events for the client out. An event that cannot be read, and
an engine's own error event, are dropped: no end mark follows those, so the stream is cut and ends
with an error event of ours.
"""

from __future__ import annotations

from typing import Any

import orjson

from sublet.base.wire.gateway import Counts, normalise
from sublet.gateway import errors
from sublet.gateway.dialects.tools import Calls, forced_call

DONE = b"data: [DONE]\n\n"


class Leg:
    """What one upstream stream has told so far."""

    __slots__ = ("counts", "is_done", "made")

    def __init__(self) -> None:
        self.made = 0
        self.counts: Counts | None = None
        self.is_done = False


class Events:
    """Rewrites the events of all legs of one request into the one stream of its client."""

    def __init__(
        self,
        surface: str,
        server: str,
        *,
        legs: int = 1,
        prompts: int = 1,
        is_counted: bool = False,
    ) -> None:
        self._surface = surface
        self._server = server
        self._prompts = prompts
        self._is_counted = is_counted
        self._out: list[bytes] = []
        self.legs = [Leg() for _ in range(legs)]
        self.is_done = False

    @property
    def made(self) -> int:
        """Output tokens that all legs are known to have made."""
        return sum(leg.made for leg in self.legs)

    @property
    def counts(self) -> Counts | None:
        """Each prompt's input once, as the first of its legs told it, since the client sent it
        once; outputs added up. None: nothing was told yet."""
        told = [leg.counts for leg in self.legs]
        each = len(told) // self._prompts
        prompts = [told[at : at + each] for at in range(0, len(told), each)]
        firsts = [
            next((counts for counts in prompt if counts is not None), None) for prompt in prompts
        ]
        known = [counts for counts in firsts if counts is not None]
        if not known:
            return None
        return Counts(
            input_uncached=sum(counts.input_uncached for counts in known),
            cache_read=sum(counts.cache_read for counts in known),
            output=self.made,
            is_inconsistent=any(counts.is_inconsistent for counts in told if counts is not None),
        )

    def leg_is_done(self, leg: int) -> bool:
        return self.legs[leg].is_done

    def feed(self, data: bytes, leg: int = 0) -> bytes:
        """Whole events of a leg; what is to be sent on for them, which may be nothing."""
        state = self.legs[leg]
        for event in data.split(b"\n\n"):
            payload = _payload(event)
            if not payload or state.is_done:
                continue
            if payload == b"[DONE]":
                state.is_done = True
                self._leg_ends(leg)
                continue
            try:
                chunk = orjson.loads(payload)
            except orjson.JSONDecodeError:
                continue
            if type(chunk) is dict and "error" not in chunk:
                self._count(state, chunk)
                self._chunk(chunk, leg)
        if not self.is_done and all(each.is_done for each in self.legs):
            self.is_done = True
            self._end()
        out, self._out = self._out, []
        return b"".join(out)

    def fail(self, code: str, message: str) -> bytes:
        """The last frame of a stream that is cut: SDKs raise on it. No end mark."""
        return errors.frame(self._surface, code, message)

    def _count(self, leg: Leg, chunk: dict[str, Any]) -> None:
        usage = chunk.get("usage")
        timings = chunk.get("timings")
        if type(usage) is dict:
            leg.counts = normalise(self._server, usage)
            leg.made = leg.counts.output
        elif type(timings) is dict:
            told = normalise(
                self._server,
                {
                    "prompt_tokens": _whole(timings, "prompt_n") + _whole(timings, "cache_n"),
                    "completion_tokens": timings.get("predicted_n"),
                    "prompt_tokens_details": {"cached_tokens": timings.get("cache_n")},
                },
            )
            leg.made = max(leg.made, told.output)
            leg.counts = leg.counts or told
        elif not self._is_counted and _says_something(chunk.get("choices")):
            leg.made += 1

    def _chunk(self, chunk: dict[str, Any], leg: int) -> None:
        """What one event of the engine becomes, appended to `_out`."""

    def _leg_ends(self, leg: int) -> None:
        """A leg said that it is at its end."""

    def _end(self) -> None:
        """All legs have: usage, end mark."""


class Choice:
    """One choice of a chat stream."""

    __slots__ = ("calls", "finish", "is_ended", "text")

    def __init__(self, calls: Calls) -> None:
        self.calls = calls
        self.finish: str | None = None
        self.is_ended = False
        self.text = ""


class ChatEvents(Events):
    """Chat and completions for OpenAI clients.

    Always: a choice's `finish_reason` is null but in its last event; calls have indexes of their
    own; one id, model and creation time for all legs.
    """

    def __init__(
        self,
        surface: str,
        server: str,
        *,
        tier: str,
        legs: int,
        is_counted: bool,
        wants_usage: bool,
        is_forced: bool = False,
        tops: int | None = None,
        prompts: int = 1,
    ) -> None:
        super().__init__(surface, server, legs=legs, prompts=prompts, is_counted=is_counted)
        self._tier = tier
        self._wants_usage = wants_usage
        self._is_forced = is_forced
        self._tops = tops
        self._head: dict[str, Any] | None = None
        self._is_first = True
        self._choices: dict[tuple[int, int], Choice] = {}

    def _chunk(self, chunk: dict[str, Any], leg: int) -> None:
        if self._head is None:
            kept = ("id", "object", "created", "model", "system_fingerprint")
            self._head = {key: chunk[key] for key in kept if key in chunk}
        choices = chunk.get("choices")
        for part in choices if type(choices) is list else []:
            if type(part) is dict:
                self._part(part, leg)

    def _part(self, part: dict[str, Any], leg: int) -> None:
        index = part.get("index")
        number = index if type(index) is int and len(self.legs) == 1 else leg
        choice = self._choices.get((leg, number))
        if choice is None:
            assert self._head is not None
            base = str(self._head.get("id", "")).rpartition("-")[2][:24]
            choice = self._choices[leg, number] = Choice(Calls(f"{base}{number}"))
        finish = part.get("finish_reason")
        if finish:
            choice.finish = finish
        if "text" in part:
            if part["text"]:
                self._tell(number, {"text": part["text"]}, part.get("logprobs"))
            return
        delta = part.get("delta")
        delta = dict(delta) if type(delta) is dict else {}
        if self._is_forced:
            choice.text += delta.pop("content", None) or ""
        calls = choice.calls.feed(delta.pop("tool_calls", None))
        if calls:
            delta["tool_calls"] = [call_delta(*added) for added in calls]
        if any(value not in (None, "") for value in delta.values()) or "role" in delta:
            self._tell(number, {"delta": delta}, part.get("logprobs"))

    def _leg_ends(self, leg: int) -> None:
        for (of, number), choice in self._choices.items():
            if of != leg or choice.is_ended:
                continue
            choice.is_ended = True
            if choice.text:
                found = forced_call(choice.text)
                if found is not None:
                    added = choice.calls.add(*found)
                    self._tell(number, {"delta": {"tool_calls": [call_delta(*added)]}}, None)
            finish = choice.finish or "stop"
            if choice.calls.calls and finish != "length":
                finish = "tool_calls"
            is_text = self._head is not None and self._head.get("object") == "text_completion"
            self._tell(number, {"text": ""} if is_text else {"delta": {}}, None, finish)

    def _tell(
        self, number: int, what: dict[str, Any], logprobs: Any, finish: str | None = None
    ) -> None:
        assert self._head is not None
        choice: dict[str, Any] = {"index": number, **what, "finish_reason": finish}
        if logprobs is not None or "text" in what:
            choice["logprobs"] = trim_logprobs(logprobs, self._tops)
        event = {**self._head, "choices": [choice]}
        if self._is_first:
            self._is_first = False
            event["service_tier"] = self._tier
        self._out.append(b"data: %b\n\n" % orjson.dumps(event))

    def _end(self) -> None:
        counts = self.counts
        if self._wants_usage and counts is not None:
            event = {**(self._head or {}), "choices": [], "usage": openai_usage(counts)}
            self._out.append(b"data: %b\n\n" % orjson.dumps(event))
        self._out.append(DONE)


def call_delta(call: Any, is_first: bool, more: str) -> dict[str, Any]:
    if not is_first:
        return {"index": call.index, "function": {"arguments": more}}
    return {
        "index": call.index,
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": more},
    }


def trim_logprobs(logprobs: Any, tops: int | None) -> Any:
    """As OpenAI writes them: no token ids, as many alternatives as were asked for, `refusal`."""
    content = logprobs.get("content") if type(logprobs) is dict else None
    if type(content) is not list:
        return None
    return {
        "content": [
            {
                "token": item.get("token"),
                "logprob": item.get("logprob"),
                "bytes": item.get("bytes"),
                "top_logprobs": [
                    {key: top.get(key) for key in ("token", "logprob", "bytes")}
                    for top in (item.get("top_logprobs") or [])[: tops or 0]
                ],
            }
            for item in content
        ],
        "refusal": None,
    }


def openai_usage(counts: Counts) -> dict[str, Any]:
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.output,
        "total_tokens": counts.prompt + counts.output,
        "prompt_tokens_details": {"cached_tokens": counts.cache_read},
    }


def _payload(event: bytes) -> bytes:
    """The data of one event; empty where it has none."""
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(lines)


def _says_something(choices: Any) -> bool:
    """An event with text or a part of a call: one token, where the engine does not count."""
    for choice in choices if type(choices) is list else []:
        delta = choice.get("delta", choice) if type(choice) is dict else None
        if type(delta) is dict and any(
            delta.get(key) for key in ("content", "text", "tool_calls", "reasoning_content")
        ):
            return True
    return False


def _whole(values: dict[str, Any], key: str) -> int:
    found = values.get(key)
    return found if type(found) is int else 0
