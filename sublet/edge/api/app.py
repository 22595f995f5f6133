"""The REST edge put together."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.routing import Match

from sublet.base.kernel.errors import Invalid
from sublet.edge.api import errors
from sublet.edge.api.deps import Deps
from sublet.edge.api.envelope import Envelope
from sublet.edge.api.metrics import Metrics
from sublet.edge.api.pace import Pace
from sublet.edge.api.routes import ROUTERS

DESCRIPTION = """An AI cloud out of the accelerator capacity you are not using.

Send `Authorization: Bearer <key>`. Every answer carries `x-request-id`; every failure has one shape.
POSTs take an `Idempotency-Key`; changes of a versioned thing take its ETag in `If-Match`; lists
take `after` and `limit` and say `next`. Money is integer micros, instants are ISO 8601 in UTC.
"""


class _Api(FastAPI):
    """Says what it is from the routes alone, which are the same for every app of a version."""

    def openapi(self) -> dict[str, Any]:
        return _document(self.version)


def create_api(deps: Deps) -> FastAPI:
    """The ASGI application. It holds nothing but counters: any number may serve one store."""
    app = _routed(_Api, deps.version)
    metrics = Metrics(deps)
    app.state.deps = deps
    app.state.metrics = metrics
    app.state.pace = Pace(deps.store.clock.now)
    errors.install(
        app, lambda operation: _known_fields(deps.version).get(operation, ()), _methods_of
    )
    app.add_middleware(
        Envelope,
        new_id=lambda: deps.store.ids.new("req"),
        counted=metrics.count_answer,
        body_seconds=deps.body_seconds,
        # That strangers are not fenced off from each other has to stay visible.
        standing={"x-trusted-tenants": "true"} if deps.trusted_tenants else {},
    )
    return app


def _routed(kind: type[FastAPI], version: str) -> FastAPI:
    app = kind(
        title="Sublet",
        version=version,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        dependencies=[Depends(_no_unknown_query)],
    )
    for router in ROUTERS:
        app.include_router(router)
    return app


@functools.cache
def _document(version: str) -> dict[str, Any]:
    # It takes a second to make, so it is made when it is first asked for.
    return _routed(FastAPI, version).openapi()


def _methods_of(request: Request) -> list[str]:
    """What may be sent to this path, over all of its routes."""
    found = {"OPTIONS"}
    for route in (*request.app.routes, *(route for router in ROUTERS for route in router.routes)):
        methods = getattr(route, "methods", None)
        if methods and route.matches(request.scope)[0] is not Match.NONE:
            found |= methods
    return sorted(found | {"HEAD"} if "GET" in found else found)


def _operation_id(route: APIRoute) -> str:
    return route.name


async def _no_unknown_query(request: Request) -> None:
    """A misspelt query parameter is refused by name, as a misspelt field is."""
    # Most requests have none: `async` spares those the way through a thread.
    if not request.query_params:
        return
    queries = await run_in_threadpool(_known_queries, request.app.version)
    known = queries[request.scope["route"].name]
    for name in request.query_params:
        if name not in known:
            there_are = f"; there are: {', '.join(sorted(known))}" if known else ""
            raise Invalid(f"{name}: there is no such query parameter{there_are}", param=name)


def _operations(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {
        operation["operationId"]: operation
        for path in document["paths"].values()
        for operation in path.values()
    }


@functools.cache
def _known_queries(version: str) -> dict[str, frozenset[str]]:
    return {
        name: frozenset(
            item["name"] for item in operation.get("parameters", ()) if item["in"] == "query"
        )
        for name, operation in _operations(_document(version)).items()
    }


@functools.cache
def _known_fields(version: str) -> dict[str, tuple[str, ...]]:
    """Operation → the fields of its body, read from the same document that callers read."""
    document = _document(version)
    schemas = document["components"]["schemas"]
    found: dict[str, tuple[str, ...]] = {}
    for name, operation in _operations(document).items():
        content = operation.get("requestBody", {}).get("content", {})
        schema = content.get("application/json", {}).get("schema", {})
        for part in (schema, *schema.get("anyOf", ())):
            reference = part.get("$ref", "").rpartition("/")[2]
            if reference:
                found[name] = tuple(schemas[reference].get("properties", ()))
    return found
