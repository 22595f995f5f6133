"""Errors that a caller may meet, by what the caller can do about them.

    SubletError
    ├── Invalid            422  the request is wrong: change it
    ├── Unauthenticated    401  no key, or one that is not valid
    ├── PaymentRequired    402  credit is missing: add some
    ├── Forbidden          403  not with this key, role, standing or quota
    ├── NotFound           404  no such thing that this key may see
    ├── Conflict           409  the thing is in another state than the request assumes
    ├── NoCapacity         409  out of stock; the details name the ways on
    ├── Stale              412  somebody changed it since it was read
    ├── PreconditionMissing 428 the request must say which version it changes
    ├── TooLarge           413  send less
    ├── TooMany            429  send later
    └── Unavailable        503  Sublet cannot do this now; nothing was lost

A `code` is permanent, bare snake_case and unique in the whole product. The docstring is the
default message and says what to do next.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class SubletError(Exception):
    """Something went wrong."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"

    def __init__(
        self, message: str | None = None, *, param: str | None = None, **details: Any
    ) -> None:
        self.message = message or (type(self).__doc__ or "").strip()
        self.param = param
        self.details: Mapping[str, Any] = details
        super().__init__(self.message)


class Invalid(SubletError):
    """The request is not valid: `param` names the field, the message says what would be right."""

    status = 422
    code = "invalid_request"


class Unauthenticated(SubletError):
    """No valid key was sent: send `Authorization: Bearer <key>`."""

    status = 401
    code = "invalid_api_key"


class PaymentRequired(SubletError):
    """The organisation's credit does not cover this: add credit or ask for less."""

    status = 402
    code = "insufficient_credit"


class Forbidden(SubletError):
    """This key may not do that: ask an admin of the organisation."""

    status = 403
    code = "forbidden"


class NotFound(SubletError):
    """There is no such thing, or this key may not see it."""

    status = 404
    code = "not_found"


class Conflict(SubletError):
    """The resource is in another state than this request needs: read it again."""

    status = 409
    code = "conflict"


class NoCapacity(SubletError):
    """No capacity for this now: `details` names when, how much or what else there is."""

    status = 409
    code = "insufficient_capacity"


class Stale(SubletError):
    """It changed since you read it: read it again and repeat with the new ETag."""

    status = 412
    code = "stale_version"


class PreconditionMissing(SubletError):
    """Send `If-Match` with the ETag of the version you mean to change."""

    status = 428
    code = "if_match_required"


class TooLarge(SubletError):
    """The request body is too large: send less."""

    status = 413
    code = "request_too_large"


class TooMany(SubletError):
    """Too many requests: wait as long as `retry-after` says."""

    status = 429
    code = "rate_limited"


class Unavailable(SubletError):
    """Sublet cannot do this at the moment; nothing was lost: try again shortly."""

    status = 503
    code = "unavailable"
