"""Field cases A1 and A2: keys of requests, and keys of callers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from sublet.base.kernel.ids import SeededIds
from sublet.base.store import open_store
from sublet.edge.api import Deps, create_api
from sublet.records import tenancy
from sublet.rehearsal import Consumer, World

Worlds = Callable[..., World]
Ask = Callable[..., httpx2.Response]
RENT = {"offer_id": "gpu-spot", "count": 1}


@pytest.fixture
def site(worlds: Worlds) -> Iterator[tuple[World, list[Ask]]]:
    """A world, and three APIs on its database that share nothing else."""
    world = worlds(devices_per_node=4, head_room_percent=0)
    stores = [open_store(world.url, world.clock, SeededIds(seed)) for seed in (201, 202, 203)]

    def asker(store: Any) -> Ask:
        deps = Deps(store=store, engine=world.line.engine, version="test")
        http = TestClient(create_api(deps))

        def ask(method: str, path: str, secret: str, body: Any = None, key: str | None = None):
            headers = {"authorization": f"Bearer {secret}"}
            if key is not None:
                headers["idempotency-key"] = key
            return http.request(method, path, json=body, headers=headers)

        return ask

    yield world, [asker(store) for store in stores]
    for store in stores:
        store.close()


def test_a1_same_key_same_body_is_one_instance(site: tuple[World, list[Ask]]) -> None:
    world, (ask, other, _) = site
    buyer = world.sign_up()
    first = ask("POST", "/v1/instances", buyer.secret, RENT, "k")
    again = other("POST", "/v1/instances", buyer.secret, RENT, "k")
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json()
    assert again.headers["idempotent-replayed"] == "true"
    assert "idempotent-replayed" not in first.headers
    assert len(buyer.workloads()) == 1


def test_a1_another_body_is_422_and_another_path_runs(site: tuple[World, list[Ask]]) -> None:
    world, (ask, other, _) = site
    buyer = world.sign_up()
    ask("POST", "/v1/instances", buyer.secret, RENT, "k")
    refused = other("POST", "/v1/instances", buyer.secret, {**RENT, "count": 2}, "k")
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "idempotency_key_reused"
    quoted = other("POST", "/v1/quotes", buyer.secret, RENT, "k")
    assert quoted.status_code == 201
    assert len(buyer.workloads()) == 1


def test_a1_another_organisations_key_is_another(site: tuple[World, list[Ask]]) -> None:
    world, (ask, *_) = site
    one, two = world.sign_up("one"), world.sign_up("two")
    first = ask("POST", "/v1/instances", one.secret, RENT, "k")
    second = ask("POST", "/v1/instances", two.secret, RENT, "k")
    assert first.json()["id"] != second.json()["id"]


def test_a1_a_refusal_is_not_kept_and_an_answer_is_for_a_day(
    site: tuple[World, list[Ask]],
) -> None:
    world, (ask, *_) = site
    poor = world.sign_up("poor", "0.01")
    refused = ask("POST", "/v1/instances", poor.secret, RENT, "k")
    assert refused.status_code == 402
    poor.top_up("100", "payment 1")
    made = ask("POST", "/v1/instances", poor.secret, RENT, "k")
    assert made.status_code == 201, "only what succeeded is kept"
    poor.end(poor.workloads()[0])
    world.run_for(120)
    world.sleep_until(world.now + timedelta(hours=23, minutes=50))
    replayed = ask("POST", "/v1/instances", poor.secret, RENT, "k")
    assert replayed.json()["id"] == made.json()["id"]
    world.sleep_until(world.now + timedelta(minutes=11))
    anew = ask("POST", "/v1/instances", poor.secret, RENT, "k")
    assert anew.json()["id"] != made.json()["id"]


def test_a2_a_revoked_key_is_refused_everywhere_at_once(site: tuple[World, list[Ask]]) -> None:
    """Every API reads the key itself, so the two seconds of a snapshot are none here."""
    world, apis = site
    buyer = world.sign_up()
    workload = buyer.rent("gpu-spot")
    world.run_for(30)
    made = apis[0]("POST", "/v1/keys", buyer.secret, {"name": "second"})
    assert made.status_code == 201
    second = made.json()["secret"]
    for ask in apis:
        assert ask("GET", "/v1/instances", second).status_code == 200, "a new key works"
    gone = apis[1]("DELETE", f"/v1/keys/{made.json()['id']}", buyer.secret)
    assert gone.status_code == 204
    for ask in apis:
        refused = ask("GET", "/v1/instances", second)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert buyer.state(workload) == "running", "what runs goes on"


def test_a2_expiry_and_loss_of_a_role_hold_at_once(site: tuple[World, list[Ask]]) -> None:
    world, apis = site
    buyer = world.sign_up()
    identity = buyer.identity
    with world.work() as work:
        user = tenancy.create_principal(
            work, identity.organisation.id, kind="user", name="second", role="member"
        )
        _, secret = tenancy.create_key(
            work, user.id, name="short", expires_at=world.now + timedelta(seconds=60)
        )
        _, lasting = tenancy.create_key(work, user.id, name="lasting")
    member = Consumer(world, lasting)
    member.rent("gpu-spot")
    with world.work() as work:
        tenancy.change_role(work, user.id, "viewer")
    for ask in apis:
        refused = ask("POST", "/v1/instances", lasting, RENT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "forbidden")
        assert ask("GET", "/v1/instances", lasting).status_code == 200
    world.run_for(59.999)
    assert apis[0]("GET", "/v1/instances", secret).status_code == 200
    world.run_for(0.001)
    for ask in apis:
        assert ask("GET", "/v1/instances", secret).status_code == 401
