"""What all shapes are made of: strict integers, instants, money, pages, the one error."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, StringConstraints
from pydantic_core import PydanticCustomError

from sublet.base.kernel import money as kernel_money

BODY_LIMIT_BYTES = 1 << 20
"""The largest request body of the REST edge."""
PAGE_LIMIT = 500
PAGE_DEFAULT = 100

_FIRST = datetime(2000, 1, 1, tzinfo=UTC)
_LAST = datetime(2200, 1, 1, tzinfo=UTC)


class Shape(BaseModel):
    """An answer. Unknown fields are ignored, so that an older client reads a newer server."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Body(BaseModel):
    """A request body. Unknown fields are refused, so that a misspelt one is not lost."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _instant(value: Any) -> datetime:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(_INSTANT_HELP) from None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError(_INSTANT_HELP)
    try:
        found = value.astimezone(UTC)
    except OverflowError:
        raise ValueError(_INSTANT_HELP) from None
    if not _FIRST <= found < _LAST:
        raise ValueError(_INSTANT_HELP)
    return found


_INSTANT_HELP = (
    "an instant is ISO 8601 with its zone, from 2000 to 2199, such as 2026-11-25T10:00:00Z"
)


def wrong_field(param: str, message: str) -> PydanticCustomError:
    """A rule between fields is broken: the error names `param`, as one of a single field does."""
    return PydanticCustomError("wrong_field", "{message}", {"param": param, "message": message})


def text_of_one_line(value: Any) -> Any:
    if isinstance(value, str) and any(ord(c) < 32 or 127 <= ord(c) < 160 for c in value):
        raise ValueError("a text of one line, without control characters")
    return storable(value)


def storable(value: Any) -> Any:
    """Half a surrogate pair has no UTF-8, and a database keeps no NUL."""
    if isinstance(value, str) and any(c == "\0" or "\ud800" <= c <= "\udfff" for c in value):
        raise ValueError("a text of whole characters, without NUL")
    return value


ANY_ID = r"^[A-Za-z0-9][A-Za-z0-9_.:@-]{0,63}$"
OWN_ID = r"^[a-z]{3}_[a-z0-9]{1,32}$"
EMAIL = r"^[^@\s\x00-\x1f]{1,64}@[^@\s\x00-\x1f]{1,190}$"
REFERENCE = r"^[!-~]([ -~]{0,98}[!-~])?$"
ENV_NAME = r"^[A-Za-z_][A-Za-z0-9_]{0,127}$"
SSH_KEY = (
    r"^(ssh-ed25519|ssh-rsa|ecdsa-sha2-nistp(256|384|521)|sk-[a-z0-9@.-]+) [A-Za-z0-9+/=]+"
    r"( [^\r\n\x00]*)?$"
)
SHA256 = r"^[0-9a-f]{64}$"
GRANTEE = r"^(\*|org_[a-z0-9]{1,32})$"
HOST_PATH = r"^/"
PATTERNS: Mapping[str, str] = {
    ANY_ID: "an id: 1 to 64 letters, digits and any of _ . : @ -, such as ins_4f2a or gpu-spot",
    OWN_ID: "an id of this cloud, such as org_4f2a",
    EMAIL: "name@example.org",
    REFERENCE: "bank-2026-118: 1 to 100 printable ASCII characters",
    ENV_NAME: "MY_NAME: letters, digits and _, not a digit first, 128 at most",
    SHA256: "a sha256: 64 hexadecimal digits in lower case",
    GRANTEE: "an organisation, such as org_4f2a, or * for everyone",
    HOST_PATH: "an absolute path on the machine of this cloud, such as /srv/models/my.gguf",
    SSH_KEY: "a line of a .pub file, such as ssh-ed25519 AAAA… you@home",
}
"""Every pattern of this surface, and what a text of it looks like, for who broke it."""

Instant = Annotated[datetime, BeforeValidator(_instant)]
Flag = Annotated[bool, Strict()]
Whole = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(ge=1, le=1_000_000)]
Seconds = Annotated[int, Strict(), Field(ge=0, le=366 * 86_400)]
Micros = Annotated[int, Strict(), Field(ge=0, le=10**15)]
"""Millionths of the currency's unit."""
PositiveMicros = Annotated[int, Strict(), Field(ge=1, le=10**15)]
Name = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=100),
    BeforeValidator(text_of_one_line),
]
Identifier = Annotated[str, StringConstraints(pattern=ANY_ID)]
"""An id as this API gives it, such as `ins_4f…`; offers have words, such as `cpu-spot`."""
Text = Annotated[str, BeforeValidator(storable), StringConstraints(max_length=65_536)]
Reason = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=500),
    BeforeValidator(text_of_one_line),
]


class Money(Shape):
    """An amount: exact integer micros, and the same as text for people."""

    micros: int
    currency: str
    text: str

    @classmethod
    def of(cls, amount: kernel_money.Money) -> Money:
        return cls(micros=amount.micros, currency=amount.currency, text=str(amount))

    def value(self) -> kernel_money.Money:
        return kernel_money.Money(self.micros, self.currency)


T = TypeVar("T")


class Page(Shape, Generic[T]):
    """A part of a list, in order. `next` goes into `after` for the part that follows; null: no more."""

    data: list[T]
    next: int | None = None


class ErrorDetail(Shape):
    """What went wrong and what to do next."""

    message: str
    """For people; may change."""
    type: str
    """The family, by what the caller can do."""
    code: str
    """The cause: permanent, for programs."""
    param: str | None = None
    """The field, header or query parameter that is wrong."""
    details: dict[str, Any] | None = None
    """Ways on, such as `earliest_at`, `resets_at`, `smaller_count`, or the new plan."""


class ErrorBody(Shape):
    """The one error shape of every route."""

    error: ErrorDetail
