"""Lists in parts: `?after=&limit=`, and `next` in the body."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Path, Query
from pydantic import BaseModel

from sublet.base.wire import rest

M = TypeVar("M", bound=BaseModel)

After = Annotated[
    int | None,
    Query(ge=0, le=2**63 - 1, description="The `next` of the part before; left out: the first."),
]
Limit = Annotated[int, Query(ge=1, le=rest.PAGE_LIMIT, description="How many at most.")]
Id = Annotated[str, Path(pattern=rest.ANY_ID)]
OrganisationQuery = Annotated[
    str | None,
    Query(
        pattern=rest.OWN_ID,
        description="For the owner: whose. Left out: the caller's own.",
    ),
]
ProjectQuery = Annotated[
    str | None, Query(pattern=rest.OWN_ID, description="Of this project only.")
]


def by_seq(rows: Sequence[Any], limit: int, show: Callable[[Any], M]) -> rest.Page[M]:
    """A page of rows read from a cursor in the order of their `seq`, one more than `limit`."""
    part = rows[:limit]
    more = part[-1].seq if len(rows) > limit else None
    return rest.Page(data=[show(row) for row in part], next=more)


def by_place(
    rows: Sequence[Any], after: int | None, limit: int, show: Callable[[Any], M]
) -> rest.Page[M]:
    """A page of a short list that is read whole: the cursor is the place in it."""
    start = after or 0
    more = start + limit if start + limit < len(rows) else None
    return rest.Page(data=[show(row) for row in rows[start : start + limit]], next=more)
