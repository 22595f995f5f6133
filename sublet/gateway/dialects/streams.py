"""Streams that pass as bytes: what is cut out of whole events, and put in, by byte search.

Why a search is exact. `,"usage":{` and `,"timings":{` begin with a comma and a quote. Inside a
JSON string a quote is always escaped, so it has a backslash before it and not a comma. The quote
that is found therefore opens or ends a string. It ends none, since after an end there stands no
bare word. So it opens one, and the string that it opens is exactly `usage`, followed by a colon:
a member's name. Only the engine's own members bear these names: what a model writes, tool
arguments included, is inside strings. Both objects hold numbers, null and objects of such, never a
string, so their braces can be counted.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from sublet.base.wire.gateway import Counts

USAGE = b',"usage":{'
TIMINGS = b',"timings":{'
PREDICTED = b'"predicted_n":'
PROMPT = b'"prompt_n":'
CACHED = b'"cache_n":'
TEXTS = re.compile(rb'"(?:content|text)":"(?!")')
"""Text that is not empty."""
NO_USAGE = b',"usage":null'
NO_TIER = b',"service_tier":null'
NO_CHOICES = b'"choices":[]'
NEVER, PASS, APART = 0, 1, 2
"""Usage for the client: none; as the engine tells it; or told apart from the event that it is in."""


def object_end(data: bytes, begin: int) -> int:
    """The index after the object of numbers whose opening brace is at `begin`; -1: it is cut."""
    end = data.find(b"}", begin) + 1
    open_still = data.count(b"{", begin + 1, end)
    while open_still and end:
        after = data.find(b"}", end) + 1
        open_still += data.count(b"{", end, after) - 1
        end = after
    return end or -1


def cut_counters(events: bytes) -> tuple[bytes, int | None]:
    """Whole events without the engine's `timings`, and the last count of tokens made in them."""
    at = events.find(TIMINGS)
    if at < 0:
        return events, None
    # One object without another inside, as each token's is: cut at once.
    end = events.find(b"}", at) + 1
    counted_at = events.find(PREDICTED, at, end)
    if counted_at > 0 > events.find(b"{", at + len(TIMINGS), end) and events.find(TIMINGS, end) < 0:
        digits = events[counted_at + len(PREDICTED) : end - 1].partition(b",")[0]
        if digits.isdigit():
            return events[:at] + events[end:], int(digits)
    parts = []
    begin = 0
    made: int | None = None
    while at >= 0:
        end = object_end(events, at + len(TIMINGS) - 1)
        if end < 0:
            break
        counted = _number(events, PREDICTED, at, end)
        if counted is not None:
            made = counted
        parts.append(events[begin:at])
        begin = end
        at = events.find(TIMINGS, end)
    parts.append(events[begin:])
    return b"".join(parts), made


def input_of(events: bytes) -> Counts | None:
    """The input as the engine's first `timings` in these events tell it; None: they do not."""
    at = events.find(TIMINGS)
    end = object_end(events, at + len(TIMINGS) - 1) if at >= 0 else -1
    if end < 0:
        return None
    return Counts(
        input_uncached=_number(events, PROMPT, at, end) or 0,
        cache_read=_number(events, CACHED, at, end) or 0,
        output=0,
    )


def _number(events: bytes, member: bytes, begin: int, end: int) -> int | None:
    """The whole number that a member of an object of numbers holds."""
    at = events.find(member, begin, end)
    if at < 0:
        return None
    digits = events[at + len(member) : end - 1].partition(b",")[0]
    return int(digits) if digits.isdigit() else None


def count_texts(events: bytes) -> int:
    """Events that hold text, for engines that tell no counts: the role's and the last are none."""
    return len(TEXTS.findall(events))


def without_comments(events: bytes) -> bytes:
    """Whole events, less the lines that begin with a colon; an event of comments alone is none."""
    kept = []
    for event in events.split(b"\n\n"):
        lines = [line for line in event.split(b"\n") if line and not line.startswith(b":")]
        if lines:
            kept.append(b"\n".join(lines) + b"\n\n")
    return b"".join(kept)


def cut_usage(events: bytes, wants: int) -> tuple[bytes, dict[str, Any] | None]:
    """Whole events as the client is to get them, and the last usage told in them.

    Usage leaves in an event of its own at the end, and only where the client asked for it: an
    engine's event that carries nothing else is dropped or kept, and where usage stands beside a
    choice it is cut out. `wants` is NEVER, PASS or APART: vLLM's running counts stand beside
    choices and are told once more at the end; llama.cpp's completions tell them only beside the
    last choice, so that an event is made of it.
    """
    usage: dict[str, Any] | None = None
    out = []
    for event in events.split(b"\n\n"):
        at = event.rfind(USAGE)
        if at < 0:
            if event:
                out.append(event.replace(NO_USAGE, b"", 1) if not wants else event)
            continue
        end = object_end(event, at + len(USAGE) - 1)
        if end < 0:
            out.append(event)
            continue
        usage = orjson.loads(event[at + len(USAGE) - 1 : end])
        if NO_CHOICES in event:
            if wants:
                out.append(event)
            continue
        out.append(event[:at] + event[end:])
        if wants == APART:
            out.append(_usage_event(event, event[at:end]))
    if out:
        out.append(b"")
    return b"\n\n".join(out), usage


def _usage_event(event: bytes, usage: bytes) -> bytes:
    """The event that tells usage alone, as OpenAI sends it, made of one that tells more."""
    values = orjson.loads(event[event.find(b"{") :])
    head = {key: values[key] for key in ("id", "object", "created", "model") if key in values}
    return b'data: %b,"choices":[]%b}' % (orjson.dumps(head)[:-1], usage)


def splice_first(events: bytes, tier: str) -> bytes:
    """The tier served, in the first event that has data."""
    at = events.find(b"data: {")
    if at < 0:
        return events
    rest = events[at + 7 :].replace(NO_TIER, b"", 1)
    return b'%bdata: {"service_tier":"%b",%b' % (events[:at], tier.encode(), rest)
