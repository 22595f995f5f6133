"""Whatever is sent, the answer is ours: declared, in the one shape, and never a fault of our own."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["gpu-spot", "\u0000", "\ud800", "2026-11-24T10:00:00Z", "1e400", "-0"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
ROUTES = {
    "/v1/quotes": ["offer_id", "count", "duration_seconds", "notice_seconds", "project_id"],
    "/v1/jobs": ["offer_id", "quote_id", "command", "env", "max_retries", "wait", "name"],
    "/v1/instances": ["offer_id", "ssh_keys", "script", "env", "notice_signal", "outbound"],
    "/v1/keys": ["name", "role", "limits", "expires_at", "project_id"],
    "/v1/projects": ["name"],
    "/v1/recalls": ["pool_id", "count", "devices", "by", "until"],
    "/v1/signup": ["email", "organisation_name"],
    "/v1/payments": ["organisation_id", "amount_micros", "reference", "note"],
}
COMMON = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def check(world, answer, path: str, method: str = "post") -> None:
    declared = world.http.app.openapi()["paths"][path][method]["responses"]
    assert str(answer.status_code) in declared, (answer.status_code, answer.text)
    assert answer.status_code < 500, answer.text
    assert answer.headers["x-request-id"]
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"]
        assert error["code"]
        if answer.status_code == 422:
            assert error["param"] is not None, error


@pytest.mark.parametrize("path", ROUTES)
def test_bodies_of_any_kind(one_world, path: str) -> None:
    right = {
        "offer_id": "gpu-spot",
        "command": ["true"],
        "name": "a",
        "pool_id": one_world.pool_id,
        "count": 1,
        "email": "a@b.org",
        "organisation_name": "o",
        "organisation_id": "org_aaaaaaaaaaaaaaaa",
        "amount_micros": 1,
        "reference": "r",
    }
    fields = ROUTES[path]

    @COMMON
    @given(
        body=JSON
        | st.dictionaries(st.sampled_from(fields), JSON, max_size=4).map(
            lambda wrong: {k: v for k, v in right.items() if k in fields} | wrong
        )
    )
    def sent(body: Any) -> None:
        check(one_world, one_world.ask("POST", path, one_world.owner_secret, body), path)

    sent()


@COMMON
@given(content=st.binary(max_size=200))
def test_bodies_that_are_mere_bytes(one_world, content: bytes) -> None:
    answer = one_world.http.post(
        "/v1/quotes",
        content=content,
        headers={
            "authorization": f"Bearer {one_world.owner_secret}",
            "content-type": "application/json",
        },
    )
    check(one_world, answer, "/v1/quotes")


@COMMON
@given(
    name=st.sampled_from(["after", "limit", "state", "project_id", "start", "else"]),
    value=st.text(max_size=30).filter(lambda t: not any("\ud800" <= c <= "\udfff" for c in t)),
)
def test_queries_of_any_kind(one_world, name: str, value: str) -> None:
    for path in ("/v1/jobs", "/v1/projects", "/v1/usage", "/v1/statement"):
        answer = one_world.http.get(
            path,
            params={name: value},
            headers={"authorization": f"Bearer {one_world.owner_secret}"},
        )
        check(one_world, answer, path, "get")


@COMMON
@given(secret=st.binary(max_size=40).filter(lambda b: b"\n" not in b and b"\r" not in b))
def test_keys_of_any_kind(one_world, secret: bytes) -> None:
    answer = one_world.http.get("/v1/me", headers={b"authorization": b"Bearer " + secret})
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
