"""Whatever goes wrong, on whatever route: one body, one code a cause, an id, and a way on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from sublet.base.kernel import errors as kernel
from sublet.base.wire import rest
from sublet.edge.api.errors import FAMILIES, family_of


def error_of(answer: Any, status: int, code: str) -> dict[str, Any]:
    body = answer.json()
    assert answer.status_code == status, body
    assert set(body) == {"error"}
    assert {"message", "type", "code", "param"} <= set(body["error"])
    assert body["error"]["code"] == code, body
    assert answer.headers["x-request-id"]
    found: dict[str, Any] = body["error"]
    return found


def test_every_route_declares_the_one_error_shape(world) -> None:
    document = world.ask("GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    operations = [
        (f"{method} {path}", operation)
        for path, routes in document["paths"].items()
        for method, operation in routes.items()
    ]
    assert len(operations) > 60
    for name, operation in operations:
        failures = {s: r for s, r in operation["responses"].items() if s >= "400"}
        assert {"401", "404", "413", "422", "429", "500", "503"} <= set(failures), name
        for answer in failures.values():
            schema = answer["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/ErrorBody"}, name
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_operations_have_names_of_their_own(world) -> None:
    document = world.ask("GET", "/openapi.json").json()
    names = [op["operationId"] for routes in document["paths"].values() for op in routes.values()]
    assert len(names) == len(set(names))


def test_each_family_has_its_status_and_the_kernel_agrees() -> None:
    for family in FAMILIES:
        assert family.status == family.error.status, family
    assert family_of(kernel.NoCapacity()).type == "capacity_error"


def test_unknown_route_and_method(world) -> None:
    error_of(world.ask("GET", "/v1/nothing"), 404, "route_not_found")
    error_of(world.ask("GET", "/v1/me/"), 404, "route_not_found")
    answer = world.ask("DELETE", "/v1/me")
    error_of(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD, OPTIONS"
    error_of(world.ask("OPTIONS", "/v1/nothing"), 404, "route_not_found")
    asked = world.ask("OPTIONS", "/v1/projects")
    assert (asked.status_code, asked.content) == (204, b"")
    assert asked.headers["allow"] == "GET, HEAD, OPTIONS, POST"
    assert asked.headers["x-request-id"]


def test_head_is_get_without_what_it_says(world) -> None:
    owner = world.owner_secret
    for path in ("/healthz", "/v1/me", "/v1/projects", "/openapi.json"):
        said, head = world.ask("GET", path, owner), world.ask("HEAD", path, owner)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-length"] == said.headers["content-length"]
    head = world.ask("HEAD", "/v1/me")
    assert (head.status_code, head.content) == (401, b"")
    assert world.ask("HEAD", "/v1/nothing").status_code == 404
    # An answer that never ends by itself is broken off behind its head.
    client, made = world.newcomer()
    job = client.jobs.create(rest.JobCreate(offer_id="gpu-spot", command=["sleep", "900"]))
    head = world.ask("HEAD", f"/v1/jobs/{job.id}/logs?follow=true", made.secret)
    assert (head.status_code, head.content) == (200, b"")
    metrics = world.ask("GET", "/metrics", owner).text
    assert 'method="HEAD",route="/v1/me",status="200"' in metrics


def test_every_pattern_has_words(world) -> None:
    found: set[str] = set()

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            found.update({part["pattern"]} if isinstance(part.get("pattern"), str) else ())
            part = list(part.values())
        for inner in part if isinstance(part, list) else ():
            walk(inner)

    walk(world.ask("GET", "/openapi.json").json())
    assert found
    assert found <= set(rest.PATTERNS)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "/v1/signup",
            {"email": "nobody", "organisation_name": "A"},
            "email: must look like name@example.org",
        ),
        ("/v1/projects", {"name": "a" * 101}, "name: at most 100 characters"),
        ("/v1/projects", {"name": " "}, "name: must not be empty"),
        ("/v1/projects", {"name": 5}, "name: must be a text"),
        ("/v1/keys", {"name": "a", "limits": 5}, "limits: must be an object"),
        ("/v1/keys", {"name": "a", "role": "boss"}, "role: must be `admin`, `member` or `viewer`"),
        (
            "/v1/jobs",
            {"offer_id": "gpu-spot", "command": "true"},
            "command: must be a list",
        ),
        (
            "/v1/jobs",
            {"offer_id": "gpu-spot", "command": ["true"], "wait": 1},
            "wait: must be true or false",
        ),
        ("/v1/projects?limit=x", None, "limit: must be a whole number"),
        ("/v1/projects?limit=501", None, "limit: at most 500"),
    ],
)
def test_a_wrong_value_is_answered_in_words(world, path, body, message) -> None:
    method = "GET" if body is None else "POST"
    error = error_of(world.ask(method, path, world.owner_secret, body), 422, "invalid_request")
    assert error["message"] == message


@pytest.mark.parametrize(
    "header", [None, b"Bearer sk_wrong", b"Bearer sk_\xc3\xa9", b"Basic sk_x", b"Bearer", b"sk_x"]
)
def test_no_key_and_a_wrong_key(world, header: bytes | None) -> None:
    headers = {} if header is None else {b"authorization": header}
    answer = world.http.get("/v1/me", headers=headers)
    error_of(answer, 401, "invalid_api_key")
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_request_id_is_kept_if_it_is_one(world) -> None:
    assert world.ask("GET", "/healthz", x_request_id="mine-1").headers["x-request-id"] == "mine-1"
    made = world.ask("GET", "/healthz", x_request_id="no spaces here").headers["x-request-id"]
    assert made.startswith("req_")


@pytest.mark.parametrize(
    "content", [b"\xff\xfe{}", b"{", b"", b"[1", b'{"name": 1e', b"[" * 100_000]
)
def test_a_body_that_is_no_json(world, content: bytes) -> None:
    answer = world.http.post(
        "/v1/projects",
        content=content,
        headers={
            "authorization": f"Bearer {world.owner_secret}",
            "content-type": "application/json",
        },
    )
    error_of(answer, 422, "invalid_body")


def test_a_body_of_another_kind(world) -> None:
    headers = {"authorization": f"Bearer {world.owner_secret}"}
    for content_type in ("text/plain", "application/x-www-form-urlencoded"):
        answer = world.http.post(
            "/v1/projects",
            content=b'{"name": "a"}',
            headers={**headers, "content-type": content_type},
        )
        error_of(answer, 422, "invalid_body")
    error_of(world.ask("POST", "/v1/projects", world.owner_secret, [1]), 422, "invalid_body")


def test_a_body_over_a_mebibyte(world) -> None:
    headers = {
        "authorization": f"Bearer {world.owner_secret}",
        "content-type": "application/json",
    }
    whole = b'{"name": "' + b"a" * (1 << 20) + b'"}'
    announced = world.http.post("/v1/projects", content=whole, headers=headers)
    error = error_of(announced, 413, "request_too_large")
    assert error["details"] == {"limit_bytes": 1 << 20}
    pieces = (whole[i : i + 65536] for i in range(0, len(whole), 65536))
    error_of(
        world.http.post("/v1/projects", content=pieces, headers=headers), 413, "request_too_large"
    )


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"offer_id": "gpu-spot", "count": True}, "count", "whole number"),
        ({"offer_id": "gpu-spot", "count": "1"}, "count", "whole number"),
        ({"offer_id": "gpu-spot", "count": 1.0}, "count", "whole number"),
        ({"offer_id": "gpu-spot", "count": 0}, "count", "at least 1"),
        ({"offer_id": "gpu-spot", "count": 10**30}, "count", "at most"),
        ({"count": 1}, "offer_id", "required"),
        ({"offer_id": "gpu-spot", "cuont": 1}, "cuont", "the fields are: offer_id, count"),
        ({"offer_id": "gpu\u0000spot"}, "offer_id", "must look like an id"),
        ({"offer_id": "gpu-spot", "notice_seconds": 7}, "notice_seconds", "30 or 120"),
        (
            {"offer_id": "gpu-spot", "max_price_micros_per_device_hour": 5},
            "max_price_micros_per_device_hour",
            "at least the present price",
        ),
        ({"offer_id": "gpu-none"}, "offer_id", "list the offers"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_be_right(
    world, body: dict[str, Any], param: str, says: str
) -> None:
    _, made = world.newcomer()
    answer = world.ask("POST", "/v1/quotes", made.secret, body)
    status, code = (
        (404, "offer_not_found") if "gpu-none" in body.values() else (422, "invalid_request")
    )
    error = error_of(answer, status, code)
    assert error["param"] == param
    assert says in error["message"]


def test_all_wrong_values_are_named_at_once(world) -> None:
    _, made = world.newcomer()
    answer = world.ask("POST", "/v1/quotes", made.secret, {"count": "x", "duration_seconds": -1})
    error = error_of(answer, 422, "invalid_request")
    named = [item["param"] for item in error["details"]["errors"]]
    assert named == ["offer_id", "count", "duration_seconds"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"command": ["true"]}, "quote_id"),
        ({"command": ["true"], "quote_id": "quo_1", "offer_id": "gpu-spot"}, "quote_id"),
        ({"command": ["true"], "quote_id": "quo_1", "notice_seconds": 30}, "notice_seconds"),
        ({"command": [], "offer_id": "gpu-spot"}, "command"),
        ({"command": [" "], "offer_id": "gpu-spot"}, "command"),
        ({"command": ["a", 1], "offer_id": "gpu-spot"}, "command.1"),
        ({"command": ["a\u0000"], "offer_id": "gpu-spot"}, "command.0"),
        ({"command": ["a\ud800"], "offer_id": "gpu-spot"}, "command.0"),
        ({"command": ["a"], "offer_id": "gpu-spot", "env": {"1A": "x"}}, "env.1A.[key]"),
        ({"command": ["a"], "offer_id": "gpu-spot", "env": {"SUBLET_A": "x"}}, "env.SUBLET_A"),
        ({"command": ["a"], "offer_id": "gpu-spot", "wait": "yes"}, "wait"),
        ({"command": ["a"], "offer_id": "gpu-spot", "count": 2}, "count"),
    ],
)
def test_a_job_that_cannot_be_is_refused_by_field(world, body: dict[str, Any], param: str) -> None:
    _, made = world.newcomer()
    error = error_of(world.ask("POST", "/v1/jobs", made.secret, body), 422, "invalid_request")
    assert error["param"] == param


def test_instants_have_a_zone_and_are_sane(world) -> None:
    for wrong in ("2026-11-25T10:00:00", "tomorrow", 1764064800, "0001-01-01T00:00:00+14:00"):
        body = {"pool_id": world.pool_id, "count": 1, "by": wrong}
        error = error_of(
            world.ask("POST", "/v1/recalls", world.owner_secret, body), 422, "invalid_request"
        )
        assert error["param"] == "by"
        assert "2026-11-25T10:00:00Z" in error["message"]


def test_query_and_path_are_checked_too(world) -> None:
    owner = world.owner_secret
    for path, param in (
        ("/v1/projects?limt=5", "limt"),
        ("/v1/projects?limit=0", "limit"),
        ("/v1/projects?limit=501", "limit"),
        ("/v1/projects?after=-1", "after"),
        (f"/v1/projects?after={2**63}", "after"),
        ("/v1/jobs?state=dead", "state"),
        ("/v1/projects/a%20b", "project_id"),
        ("/v1/projects/%00", "project_id"),
        ("/v1/statement?start=yesterday", "start"),
        ("/v1/statement?start=2026-11-24T00:00:00Z&end=2026-11-23T00:00:00Z", "end"),
    ):
        assert error_of(world.ask("GET", path, owner), 422, "invalid_request")["param"] == param


def test_our_own_fault_is_answered_in_the_one_shape(world, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a secret that must not get out")

    monkeypatch.setattr("sublet.edge.api.routes.people.ledger.available", broken)
    with capture_logs() as logs:
        answer = world.ask("GET", "/v1/me", world.owner_secret)
    error = error_of(answer, 500, "internal_error")
    assert "secret" not in error["message"]
    [line] = logs
    assert line["event"] == "request_failed"
    assert line["request_id"] == answer.headers["x-request-id"]


def test_trusted_tenants_stay_visible(world, worlds) -> None:
    assert "x-trusted-tenants" not in world.ask("GET", "/healthz").headers
    trusting = worlds(trusted_tenants=True)
    for path in ("/healthz", "/v1/me", "/nothing"):
        assert trusting.ask("GET", path).headers["x-trusted-tenants"] == "true"


def test_a_store_that_cannot_be_read_is_unavailable(world) -> None:
    world.store.close()
    file = Path(world.store.url.database)
    file.write_bytes(b"not a database at all, by no means" * 200)
    for left in file.parent.glob(f"{file.name}-*"):
        left.unlink()
    answer = world.ask("GET", "/v1/me", world.owner_secret)
    error_of(answer, 503, "database_unavailable")
    assert int(answer.headers["retry-after"]) >= 1
