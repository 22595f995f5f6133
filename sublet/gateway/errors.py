"""Refusals: one code per cause, and the bodies that both families of clients expect.

    OpenAI     {"error": {"message", "type", "code", "param"}}
    Anthropic  {"type": "error", "error": {"type", "message", "code", "param"}}

A code is permanent. What kind of error it is for each family's SDK is told here in one table, so
that the same cause raises the same exception in a client wherever it is refused.
"""

from __future__ import annotations

import orjson

_INVALID = "invalid_request_error"
ANTHROPIC_SURFACES = frozenset(("messages", "count_tokens"))

KINDS: dict[str, tuple[str, str]] = {
    # code: (OpenAI's type, Anthropic's type)
    "invalid_json": (_INVALID, _INVALID),
    "invalid_request": (_INVALID, _INVALID),
    "unsupported_parameter": (_INVALID, _INVALID),
    "context_length_exceeded": (_INVALID, _INVALID),
    "sealed_parameter": (_INVALID, _INVALID),
    "invalid_api_key": ("authentication_error", "authentication_error"),
    "insufficient_quota": ("insufficient_quota", "billing_error"),
    "credit_exhausted": ("insufficient_quota", "billing_error"),
    "budget_exceeded": ("insufficient_quota", "permission_error"),
    "quota_exceeded": ("insufficient_quota", "permission_error"),
    "standing_forbids": ("permission_error", "permission_error"),
    "model_not_allowed": ("permission_error", "permission_error"),
    "model_not_found": (_INVALID, "not_found_error"),
    "unknown_url": (_INVALID, "not_found_error"),
    "unsupported_surface": (_INVALID, "not_found_error"),
    "method_not_allowed": (_INVALID, _INVALID),
    "request_too_large": (_INVALID, "request_too_large"),
    "headers_too_large": (_INVALID, _INVALID),
    "rate_limit_exceeded": ("rate_limit_error", "rate_limit_error"),
    "model_overloaded": ("server_error", "overloaded_error"),
    "no_replica": ("server_error", "overloaded_error"),
    "snapshot_stale": ("server_error", "api_error"),
    "credit_unknown": ("server_error", "api_error"),
    "unavailable": ("server_error", "api_error"),
    "stream_interrupted": ("server_error", "api_error"),
}


class Refusal(Exception):
    """A request that is not served. Known before the first byte, it is the whole answer.

    `headers`: lines of the answer's head, each ended by CRLF, in place of the limits that stand
    there else. `allow`: the methods that would be right. `type` overrides the OpenAI type.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        type: str | None = None,
        retry_after_s: int | None = None,
        headers: bytes = b"",
        allow: bytes = b"",
    ) -> None:
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.type = type
        self.retry_after_s = retry_after_s
        self.headers = headers
        self.allow = allow
        super().__init__(message)


def head(refusal: Refusal) -> bytes:
    """What a refusal adds to the answer's head: when to come again, which methods are right."""
    lines = b""
    if refusal.retry_after_s is not None:
        lines = b"retry-after: %d\r\n" % refusal.retry_after_s
    if refusal.allow:
        lines += b"allow: %b\r\n" % refusal.allow
    return lines


def kind(surface: str | None, code: str) -> str:
    """The type of error in the family of the surface; an unknown code is the server's fault."""
    known = KINDS.get(code, ("server_error", "api_error"))
    return known[1] if surface in ANTHROPIC_SURFACES else known[0]


def body(surface: str | None, refusal: Refusal) -> bytes:
    """The whole body of the answer. `surface`: None where the URL named none."""
    error = {
        "message": refusal.message,
        "type": kind(surface, refusal.code),
        "code": refusal.code,
        "param": refusal.param,
    }
    if surface in ANTHROPIC_SURFACES:
        return orjson.dumps({"type": "error", "error": error})
    if refusal.type is not None:
        error["type"] = refusal.type
    return orjson.dumps({"error": error})


def frame(surface: str | None, code: str, message: str) -> bytes:
    """The last frame of a stream that cannot go on: SDKs raise on it. No end mark follows."""
    error = {"message": message, "type": kind(surface, code), "code": code, "param": None}
    if surface in ANTHROPIC_SURFACES:
        return b"event: error\ndata: %b\n\n" % orjson.dumps({"type": "error", "error": error})
    return b"data: %b\n\n" % orjson.dumps({"error": error})
