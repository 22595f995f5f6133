"""How the command fails: one sentence, the code, and the way on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

FAILED = 1
USAGE = 2
INTERRUPTED = 130


class CliError(Exception):
    """The command cannot go on. The text says why and what to do."""

    exit_code = FAILED


class UsageError(CliError):
    """The command was called wrongly: change the words."""

    exit_code = USAGE


def report(error: Exception) -> int:
    """Say what went wrong on stderr (and as JSON on stdout for `--json`); the exit code."""
    if isinstance(error, CliError):
        _say(str(error))
        return error.exit_code
    # Costly to import, and only needed once something has gone wrong.
    from sublet.base.kernel.errors import SubletError
    from sublet.sdk.errors import ApiError, ClientError, GatewayError, Unreachable

    if isinstance(error, ApiError):
        _show_json(error)
        _say(sentence(error.message, error.code, error.param, error.details))
        if isinstance(error, GatewayError):
            # It logs no requests, and its codes say more than a log could.
            advice = _of_gateway(error.code, error.model, error.retry_after_seconds)
            if advice is not None:
                _say(advice)
        elif error.status >= 500 and error.request_id:
            _say(f"request {error.request_id}: the log has more under it")
        return FAILED
    if isinstance(error, SubletError):
        _say(sentence(error.message, error.code, error.param, error.details))
        return FAILED
    if isinstance(error, ClientError):
        way = (
            " Set SUBLET_URL, or open one with `sublet up`."
            if isinstance(error, Unreachable)
            else ""
        )
        _say(f"{str(error).rstrip('.')}.{way}")
        return FAILED
    found = _wrong_field(error)
    if found is not None:
        _say(found)
        return USAGE
    if os.environ.get("SUBLET_DEBUG"):
        raise error
    _say(
        f"this should not happen ({type(error).__name__}: {error}). "
        "Please report it with the output of the same command under SUBLET_DEBUG=1."
    )
    return FAILED


def _of_gateway(code: str, model: str | None, retry_seconds: int | None) -> str | None:
    """What to do about a failure of the gateway; None where its message says it already."""
    again = "ask again" if retry_seconds is None else f"ask again in {retry_seconds} s"
    advice = _GATEWAY_WAYS.get(code)
    return None if advice is None else advice.format(model=model or "MODEL", again=again)


_GATEWAY_WAYS: Mapping[str, str] = {
    "no_replica": (
        "{again}; the owner sees by `sublet deployments show {model}` whether one starts, and why not"
    ),
    "model_overloaded": (
        "{again}; the owner makes more room by `sublet deployments scale {model} --max N`"
    ),
    "snapshot_stale": (
        "the gateway does not hear from its control plane: is `sublet up` running? "
        "The owner sees by `sublet gateways` whether it is cut off"
    ),
    "credit_unknown": (
        "{again}; if it stays so, the gateway does not reach its control plane: is `sublet up` "
        "running? The owner sees by `sublet gateways` whether it is cut off"
    ),
    "stream_interrupted": "ask anew; `sublet tokens --last 1` shows what of it is billed",
    "credit_exhausted": (
        "what came is billed; `sublet balance` and `sublet budgets list` show what is left"
    ),
    "unavailable": (
        "{again}; if it stays so, the owner sees by `sublet gateways` how it stands, and the log "
        "says why (`spool_not_written`, `request_failed`)"
    ),
}
"""By code. What a limit, a grant or a wrong request needs stands in the gateway's own message."""


def sentence(message: str, code: str, param: str | None, details: Mapping[str, Any]) -> str:
    """`message (code; ways on)`."""
    told = [code]
    if param and param not in message:
        told.append(f"at {param}")
    told += [words for name in _WAYS if (words := _WAYS[name](details.get(name))) is not None]
    return f"{message.rstrip()} ({'; '.join(told)})"


def _value(words: str) -> Any:
    return lambda value: None if value in (None, "", [], 0) else words.format(value)


def _offers(value: Any) -> str | None:
    ids = [str(way["offer_id"]) for way in value or [] if "offer_id" in way]
    return f"there is room for: {', '.join(ids)}" if ids else None


_WAYS: Mapping[str, Any] = {
    "earliest_at": _value("earliest: {}"),
    "smaller_count": _value("now at most: --count {}"),
    "alternatives": _offers,
    "offer_to_wait": lambda value: "--queue waits for room" if value else None,
    "resets_at": _value("resets: {}"),
    "retry_after_seconds": _value("again in {} s"),
    "remedy": _value("way: {}"),
}


def _wrong_field(error: Exception) -> str | None:
    """A body that the shapes refuse before it is sent, in words."""
    found = getattr(error, "errors", None)
    if type(error).__name__ != "ValidationError" or not callable(found):
        return None
    first = found()[0]
    field = ".".join(str(part) for part in first["loc"]) or "request"
    return f"{field}: {first['msg']}"


def _show_json(error: Any) -> None:
    if "--json" not in sys.argv:
        return
    body = {
        "message": error.message,
        "type": error.type,
        "code": error.code,
        "param": error.param,
        "details": dict(error.details) or None,
    }
    print(json.dumps({"error": body}))


def _say(text: str) -> None:
    print(f"sublet: {text}", file=sys.stderr)
