"""ETag and If-Match: who changes a thing says which version of it they read."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Header
from starlette.responses import Response

from sublet.base.kernel.errors import Invalid, PreconditionMissing, Stale

_ETAG = re.compile(r'"(\d{1,18})"')


def etag(version: int) -> str:
    return f'"{version}"'


def show_version(response: Response, version: int) -> None:
    response.headers["etag"] = etag(version)


def _expected(
    if_match: Annotated[
        str | None, Header(description='The ETag of the version that is changed, such as `"3"`.')
    ] = None,
) -> int:
    if if_match is None:
        raise PreconditionMissing(param="if-match")
    found = _ETAG.fullmatch(if_match.strip())
    if found is None:
        raise Invalid('if-match: one ETag as it was given, such as "3"', param="if-match")
    return int(found.group(1))


Expected = Annotated[int, Depends(_expected)]


def demand(expected: int, actual: int) -> None:
    """Raises Stale when the thing is no longer of the version that the caller read."""
    if expected != actual:
        raise Stale(param="if-match", version=actual)
