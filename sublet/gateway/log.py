"""What a gateway has to say: one line of JSON to stderr. Never a key, a prompt or an answer."""

from __future__ import annotations

import contextlib
import sys

import orjson


def say(event: str, **fields: str | int | None) -> None:
    """A constant event and its fields. Not for the hot path: it may block.

    A log that takes nothing, on a full disk, stops nobody's work.
    """
    with contextlib.suppress(OSError):
        sys.stderr.write(orjson.dumps({"event": event, **fields}).decode() + "\n")
        sys.stderr.flush()
