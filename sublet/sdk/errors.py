"""What may go wrong between a client and a cloud."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ClientError(Exception):
    """Something went wrong while talking to Sublet."""


class Unreachable(ClientError):
    """No answer came: is the cloud open, and is the address right? `url` names what was tried."""

    def __init__(self, url: str, cause: Exception) -> None:
        self.url = url
        super().__init__(f"no answer from {url} ({cause}): is the cloud open there?")


class UnexpectedAnswer(ClientError):
    """The answer is not one of Sublet's: does the address belong to a Sublet of this version?"""


class ApiError(ClientError):
    """Sublet refused: `code` says why, `param` names the field, `details` the ways on."""

    def __init__(
        self,
        *,
        status: int,
        type: str,
        code: str,
        message: str,
        param: str | None,
        details: Mapping[str, Any],
        request_id: str,
        retry_after_seconds: int | None,
    ) -> None:
        self.status = status
        self.type = type
        self.code = code
        self.message = message
        self.param = param
        self.details = details
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds
        super().__init__(f"{code}: {message}")


class GatewayError(ApiError):
    """The model gateway refused, or ended a stream with an error. `model` is what was asked, None
    where no model was."""

    def __init__(self, *, model: str | None, **told: Any) -> None:
        self.model = model
        super().__init__(details={}, **told)
