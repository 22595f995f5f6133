"""F2 Last node sold twice (SQLite form): two API processes, each with a store of its own."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import httpx2
import pytest
from starlette.testclient import TestClient

from sublet.base.kernel.ids import SeededIds
from sublet.base.store import open_store
from sublet.edge.api import Deps, create_api
from sublet.rehearsal import Consumer, World
from sublet.shops import compute

Worlds = Callable[..., World]
BUYERS = 50
TEN_MINUTES = {
    "offer_id": "gpu-on-demand",
    "command": ["sleep", "600"],
    "max_run_seconds": 600,
}


@pytest.fixture
def sites(worlds: Worlds) -> Any:
    """A world of one device and two APIs that share nothing but its database file."""
    world = worlds(devices_per_node=1, head_room_percent=0)
    stores = [open_store(world.url, world.clock, SeededIds(seed)) for seed in (101, 102)]
    apps = [
        create_api(Deps(store=store, engine=world.line.engine, version="test")) for store in stores
    ]
    for app in apps:
        # Routes and document are made at the first request: not in fifty threads at once.
        app.openapi()
        TestClient(app).get("/healthz")
    yield world, apps
    for store in stores:
        store.close()


def post_at_once(
    apps: list[Any], asks: list[tuple[Consumer, dict[str, Any], str | None]], path: str
) -> list[httpx2.Response]:
    """Every request in a thread of its own, let go at one instant, by turns at either app."""
    barrier = threading.Barrier(len(asks))
    answers: list[Any] = [None] * len(asks)

    def ask(number: int) -> None:
        buyer, body, key = asks[number]
        headers = {"authorization": f"Bearer {buyer.secret}"}
        if key is not None:
            headers["idempotency-key"] = key
        http = TestClient(apps[number % len(apps)])
        barrier.wait()
        answers[number] = http.post(path, json=body, headers=headers)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.parametrize("first_is", ["anybody", "the one with the key"])
def test_f2_fifty_buyers_one_node(sites: Any, first_is: str) -> None:
    world, apps = sites
    repeating = world.sign_up("repeating")
    others = [world.sign_up(f"buyer{n}") for n in range(BUYERS // 2)]
    asks = [(repeating, TEN_MINUTES, "one-key") for _ in range(BUYERS // 2)]
    if first_is != "anybody":
        (first,) = post_at_once(apps, asks[:1], "/v1/jobs")
        assert first.status_code == 201
    asks += [(other, TEN_MINUTES, None) for other in others]
    answers = post_at_once(apps, asks, "/v1/jobs")

    made = [answer for answer in answers if answer.status_code == 201]
    ids = {answer.json()["id"] for answer in made}
    total = world.read(compute.list_workloads, limit=1000)
    assert len(total) == 1, "one Admitted"
    assert {workload.id for workload in total} == ids or not made
    refused = [answer for answer in answers if answer.status_code == 409]
    assert len(made) + len(refused) == BUYERS, [
        answer.text for answer in answers if answer.status_code not in (201, 409)
    ][:3]
    keyed = Counter(answer.status_code for answer in answers[: BUYERS // 2])
    assert keyed in (Counter({201: BUYERS // 2}), Counter({409: BUYERS // 2}))
    if first_is != "anybody":
        assert keyed[201] == BUYERS // 2
        assert all(a.headers["idempotent-replayed"] == "true" for a in answers[: BUYERS // 2])

    winner = total[0]
    for buyer in (repeating, *others):
        is_winner = buyer.organisation_id == winner.organisation_id
        held = buyer.balance - buyer.available
        assert (held > 0) == is_winner, "losers' holds are void"
    earliest = {answer.json()["error"]["details"]["earliest_at"] for answer in refused}
    assert len(earliest) == 1
    assert {answer.json()["error"]["code"] for answer in refused} == {"insufficient_capacity"}
    (told,) = earliest
    promised_at = datetime.fromisoformat(told)
    # 600 s from the admission, then 30 s of grace and 60 s of scrub; the book keeps five minutes
    # as its grain, and rounds a promise up.
    free_at = world.now + timedelta(seconds=690)
    assert free_at <= promised_at < free_at + timedelta(seconds=300)

    loser = next(b for b in others if b.organisation_id != winner.organisation_id)
    before = TestClient(apps[0]).post(
        "/v1/jobs", json=TEN_MINUTES, headers={"authorization": f"Bearer {loser.secret}"}
    )
    assert before.status_code == 409
    world.run_until(promised_at)
    then = TestClient(apps[1]).post(
        "/v1/jobs", json=TEN_MINUTES, headers={"authorization": f"Bearer {loser.secret}"}
    )
    assert then.status_code == 201, "asked at the instant that was named, it is admitted"


def test_f2_open_ended_in_the_way_is_no_instant(sites: Any) -> None:
    world, apps = sites
    buyers = [world.sign_up(f"buyer{n}") for n in range(6)]
    asks = [(buyer, {"offer_id": "gpu-on-demand"}, None) for buyer in buyers]
    answers = post_at_once(apps, asks, "/v1/instances")
    assert Counter(a.status_code for a in answers) == {201: 1, 409: 5}
    for answer in answers:
        if answer.status_code == 409:
            details = answer.json()["error"]["details"]
            assert details["earliest_at"] is None
            assert details["offer_to_wait"] is True


def test_f2_one_key_is_one_instance_and_another_body_is_refused(sites: Any) -> None:
    world, apps = sites
    buyer = world.sign_up()
    body = {"offer_id": "gpu-on-demand"}
    answers = post_at_once(apps, [(buyer, body, "k")] * 20, "/v1/instances")
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(buyer.workloads()) == 1
    other = {"offer_id": "gpu-on-demand", "notice_seconds": 1800}
    refusals = post_at_once(apps, [(buyer, other, "k")] * 2, "/v1/instances")
    assert {answer.status_code for answer in refusals} == {422}
    assert {a.json()["error"]["code"] for a in refusals} == {"idempotency_key_reused"}
