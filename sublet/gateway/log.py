"""What a gateway has to say: one line of JSON to stderr. Never a key, a prompt or an answer."""

from __future__ import annotations

import sys

import orjson


def say(event: str, **fields: str | int | None) -> None:
    """A constant event and its fields. Not for the hot path: it may block."""
    sys.stderr.write(orjson.dumps({"event": event, **fields}).decode() + "\n")
    sys.stderr.flush()
