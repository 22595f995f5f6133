"""From error families to HTTP: the one table, the one body.

Whatever goes wrong on whatever route, the answer is `ErrorBody`: refusals of the services, values
of the wrong type, bodies that are no JSON, routes that do not exist, and our own bugs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from enum import Enum
from typing import Any, NamedTuple

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sublet.base.kernel import errors as kernel
from sublet.base.kernel.money import Money
from sublet.base.wire import rest

log = structlog.get_logger()


class RouteNotFound(kernel.NotFound):
    """There is no such route: see /openapi.json for those that there are."""

    code = "route_not_found"


class MethodNotAllowed(kernel.SubletError):
    """This route does not take that method: the `allow` header names those it takes."""

    status = 405
    code = "method_not_allowed"


class TooBusy(kernel.Unavailable):
    """More requests wait here than can be served soon: send it again in a moment."""

    code = "too_busy"


class RequestInvalid(kernel.SubletError):
    """These bytes are no HTTP/1.1 request: send one."""

    status = 400
    code = "invalid_http"


class RequestSlow(kernel.SubletError):
    """The request did not arrive in time and was given up: send it again, whole."""

    status = 408
    code = "request_timeout"


class BodyInvalid(kernel.Invalid):
    """The body is not JSON in UTF-8: send an object with `content-type: application/json`."""

    code = "invalid_body"


class Family(NamedTuple):
    """How one family of errors is answered."""

    error: type[kernel.SubletError]
    status: int
    type: str


FAMILIES = (
    Family(kernel.Invalid, 422, "invalid_request_error"),
    Family(kernel.Unauthenticated, 401, "authentication_error"),
    Family(kernel.PaymentRequired, 402, "billing_error"),
    Family(kernel.Forbidden, 403, "permission_error"),
    Family(kernel.NotFound, 404, "not_found_error"),
    Family(MethodNotAllowed, 405, "invalid_request_error"),
    Family(RequestInvalid, 400, "invalid_request_error"),
    Family(RequestSlow, 408, "invalid_request_error"),
    Family(kernel.NoCapacity, 409, "capacity_error"),
    Family(kernel.Conflict, 409, "conflict_error"),
    Family(kernel.Stale, 412, "precondition_error"),
    Family(kernel.PreconditionMissing, 428, "precondition_error"),
    Family(kernel.TooLarge, 413, "invalid_request_error"),
    Family(kernel.TooMany, 429, "rate_limit_error"),
    Family(kernel.Unavailable, 503, "unavailable_error"),
    Family(kernel.SubletError, 500, "server_error"),
)
"""The first family that the error belongs to decides."""

DESCRIPTIONS = {
    401: "No valid key was sent.",
    402: "Credit is missing.",
    403: "Not with this key, role, standing or quota.",
    404: "There is no such thing that this key may see.",
    409: "The thing is in another state, or there is no capacity: `details` names the ways on.",
    412: "It changed since it was read.",
    413: "The body is larger than 1 MiB.",
    422: "A value is wrong: `param` names it.",
    428: "`If-Match` is missing.",
    429: "Too many requests: wait as long as `retry-after` says.",
    500: "A fault of Sublet's own; it was logged under this request id.",
    503: "Not possible at the moment; nothing was lost.",
}


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error answers of a route, for its OpenAPI: those named and those of every route."""
    every = (401, 403, 404, 413, 422, 429, 500, 503)
    return {
        status: {"model": rest.ErrorBody, "description": DESCRIPTIONS[status]}
        for status in sorted({*every, *statuses})
    }


def family_of(error: kernel.SubletError) -> Family:
    return next(family for family in FAMILIES if isinstance(error, family.error))


def answer(error: kernel.SubletError) -> JSONResponse:
    """The HTTP answer of an error."""
    family = family_of(error)
    details = {name: plain(value) for name, value in error.details.items()}
    body: dict[str, Any] = {
        "message": error.message,
        "type": family.type,
        "code": error.code,
        "param": error.param,
    }
    if details:
        body["details"] = details
    headers = {}
    if family.status == 401:
        headers["www-authenticate"] = "Bearer"
    if family.status == 408:
        # What is left of the body is not waited for.
        headers["connection"] = "close"
    if family.status in (429, 503):
        headers["retry-after"] = str(details.get("retry_after_seconds", 1))
    return JSONResponse({"error": body}, status_code=family.status, headers=headers)


def plain(value: Any) -> Any:
    """A value as JSON has it: instants in ISO 8601 Z, money with its text."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, Money):
        return rest.Money.of(value).model_dump()
    if isinstance(value, Enum):
        return value.name.lower() if isinstance(value, int) else value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    return str(value)


def in_words(item: Mapping[str, Any]) -> str:
    """What would be right, of one error of validation: for people, whatever library found it."""
    context = item.get("ctx", {})
    kind = item["type"]
    if kind == "string_pattern_mismatch" and context["pattern"] in rest.PATTERNS:
        return f"must look like {rest.PATTERNS[context['pattern']]}"
    if kind == "literal_error":
        return "must be " + str(context["expected"]).replace("'", "`")
    if kind in ("too_short", "string_too_short") and context["min_length"] == 1:
        return "must not be empty"
    if kind in ("too_short", "too_long") and isinstance(item["input"], str):
        kind = f"string_{kind}"
    words = _WORDS.get(kind)
    if words is not None:
        return words.format(**{name: _counted(value) for name, value in context.items()})
    return str(item["msg"]).removeprefix("Value error, ").replace("Input should", "this should", 1)


def _counted(value: Any) -> str:
    return f"{value:_}".replace("_", " ") if isinstance(value, int) else str(value)


_WHOLE = "must be a whole number"
_WORDS = {
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "dict_type": "must be an object",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": _WHOLE,
    "int_parsing": _WHOLE,
    "int_parsing_size": _WHOLE + " of usual size",
    "int_type": _WHOLE,
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "must be a list",
    "model_attributes_type": "must be an object",
    "model_type": "must be an object",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} characters",
    "string_type": "must be a text",
    "string_unicode": "must be a text of whole characters",
    "too_long": "at most {max_length} items",
    "too_short": "at least {min_length} items",
}


class WrongValues:
    """Says of each wrong value where it is and what would be right."""

    def __init__(self, fields_of: Callable[[str], Sequence[str]]) -> None:
        self._fields_of = fields_of
        """Operation id → the top-level fields of its body."""

    def error(self, found: Sequence[Mapping[str, Any]], operation: str) -> kernel.Invalid:
        wrong = [self._one(item, operation) for item in found]
        if any(item["type"] == "json_invalid" for item in found):
            return BodyInvalid(param="body")
        if any(item["loc"] == ("body",) and item["type"] != "wrong_field" for item in found):
            return BodyInvalid(param="body")
        param, message = wrong[0]
        more = [{"param": name, "message": text} for name, text in wrong]
        details = {"errors": more} if len(more) > 1 else {}
        return kernel.Invalid(f"{param}: {message}", param=param, **details)

    def _one(self, item: Mapping[str, Any], operation: str) -> tuple[str, str]:
        where = [str(part) for part in item["loc"][1:]] or [str(item["loc"][0])]
        param = ".".join(where)
        if item["type"] == "wrong_field":
            return str(item["ctx"]["param"]), str(item["msg"])
        if item["type"] == "extra_forbidden":
            fields = ", ".join(self._fields_of(operation)) if len(where) == 1 else ""
            hint = f"; the fields are: {fields}" if fields else ""
            return param, f"there is no such field{hint}"
        if item["type"] == "missing":
            return param, "this is required and was left out"
        return param, in_words(item)


def install(
    app: FastAPI,
    fields_of: Callable[[str], Sequence[str]],
    methods_of: Callable[[Request], Sequence[str]],
) -> None:
    """Make every failure of the app answer in the one shape.

    `methods_of`: what may be sent to the path of a request.
    """
    wrong_values = WrongValues(fields_of)

    def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, kernel.SubletError)
        if family_of(error).status >= 500:
            log.warning("request_not_served", code=error.code, request_id=_request_id(request))
        return answer(error)

    def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        operation = getattr(request.scope.get("route"), "name", "")
        return answer(wrong_values.error(error.errors(), operation))

    def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return answer(RouteNotFound())
        if error.status_code == 405:
            headers = {"allow": ", ".join(methods_of(request))}
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
            refusal = answer(MethodNotAllowed())
            refusal.headers.update(headers)
            return refusal
        return answer(BodyInvalid(param="body"))

    app.add_exception_handler(kernel.SubletError, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _request_id(request: Request) -> str:
    return str(request.scope.get("state", {}).get("request_id", ""))
