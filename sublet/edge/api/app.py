"""The REST edge put together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.routing import APIRoute
from starlette.requests import Request

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


def create_api(deps: Deps) -> FastAPI:
    """The ASGI application. It holds nothing but counters: any number may serve one store."""
    app = FastAPI(
        title="Sublet",
        version=deps.version,
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        generate_unique_id_function=_operation_id,
        dependencies=[Depends(_no_unknown_query)],
    )
    metrics = Metrics(deps)
    app.state.deps = deps
    app.state.metrics = metrics
    app.state.pace = Pace(deps.store.clock.now)
    for router in ROUTERS:
        app.include_router(router)
    document = app.openapi()
    app.state.known_queries = _known_queries(document)
    errors.install(app, _known_fields(document))
    app.add_middleware(
        Envelope, new_id=lambda: deps.store.ids.new("req"), counted=metrics.count_answer
    )
    return app


def _operation_id(route: APIRoute) -> str:
    return route.name


def _no_unknown_query(request: Request) -> None:
    """A misspelt query parameter is refused by name, as a misspelt field is."""
    known = request.app.state.known_queries.get(getattr(request.scope["route"], "name", ""))
    for name in request.query_params:
        if known is not None and name not in known:
            there_are = f"; there are: {', '.join(sorted(known))}" if known else ""
            raise Invalid(f"{name}: there is no such query parameter{there_are}", param=name)


def _operations(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {
        operation["operationId"]: operation
        for path in document["paths"].values()
        for operation in path.values()
    }


def _known_queries(document: Mapping[str, Any]) -> dict[str, frozenset[str]]:
    return {
        name: frozenset(
            item["name"] for item in operation.get("parameters", ()) if item["in"] == "query"
        )
        for name, operation in _operations(document).items()
    }


def _known_fields(document: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Operation → the fields of its body, read from the same document that callers read."""
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
