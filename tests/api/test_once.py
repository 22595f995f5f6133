"""Doing it twice is doing it once: field case A1."""

from __future__ import annotations

import threading
from datetime import timedelta

from sublet.base.wire import rest


def test_the_same_key_and_body_is_one_instance(world) -> None:
    client, made = world.newcomer()
    body = {"offer_id": "gpu-spot", "count": 1}
    first = world.ask("POST", "/v1/instances", made.secret, body, idempotency_key="k")
    again = world.ask("POST", "/v1/instances", made.secret, body, idempotency_key="k")
    assert first.status_code == again.status_code == 201
    assert first.json() == again.json()
    assert first.headers["etag"] == again.headers["etag"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert len(list(client.instances.list())) == 1
    # The same words in another order, with other blanks, say the same.
    raw = b'{ "count":1,\\n"offer_id":"gpu-spot" }'.replace(b"\\n", b"\n")
    third = world.http.post(
        "/v1/instances",
        content=raw,
        headers={
            "authorization": f"Bearer {made.secret}",
            "content-type": "application/json",
            "idempotency-key": "k",
        },
    )
    assert third.headers["idempotent-replayed"] == "true"


def test_another_body_is_refused_and_another_path_runs(world) -> None:
    client, made = world.newcomer()
    body = {"offer_id": "gpu-spot", "count": 1}
    world.ask("POST", "/v1/instances", made.secret, body, idempotency_key="k")
    other = world.ask(
        "POST", "/v1/instances", made.secret, {**body, "count": 2}, idempotency_key="k"
    )
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "idempotency_key_reused"
    quote = world.ask("POST", "/v1/quotes", made.secret, body, idempotency_key="k")
    assert quote.status_code == 201
    assert "idempotent-replayed" not in quote.headers
    assert len(list(client.instances.list())) == 1


def test_keys_of_two_organisations_do_not_meet(world) -> None:
    _, first = world.newcomer("First")
    _, second = world.newcomer("Second")
    body = {"name": "a"}
    one = world.ask("POST", "/v1/projects", first.secret, body, idempotency_key="k")
    two = world.ask("POST", "/v1/projects", second.secret, body, idempotency_key="k")
    assert one.json()["organisation_id"] != two.json()["organisation_id"]


def test_the_answer_of_an_admin_is_not_for_who_may_not_do_it(world) -> None:
    client, made = world.newcomer()
    viewer = client.keys.create(rest.KeyCreate(name="v", role="viewer")).secret
    member = client.keys.create(rest.KeyCreate(name="m", role="member")).secret
    machine = client.instances.create(rest.InstanceCreate(offer_id="gpu-spot"))
    for path, body, who in (
        ("/v1/keys", {"name": "a"}, member),
        ("/v1/projects", {"name": "a"}, member),
        ("/v1/quotes", {"offer_id": "gpu-spot"}, viewer),
        ("/v1/jobs", {"offer_id": "gpu-spot", "command": ["true"]}, viewer),
        (f"/v1/instances/{machine.id}/stop", None, viewer),
    ):
        first = world.ask("POST", path, made.secret, body, idempotency_key="k")
        assert first.status_code in (200, 201), path
        again = world.ask("POST", path, who, body, idempotency_key="k")
        assert again.status_code == 403, path
        assert again.json()["error"]["code"] == "forbidden"
        kept = world.ask("POST", path, made.secret, body, idempotency_key="k")
        assert kept.headers["idempotent-replayed"] == "true"
    assert [e.result for e in client.audit.list()].count("forbidden") == 5


def test_a_refusal_is_not_kept(world) -> None:
    client, made = world.newcomer()
    blocker = client.jobs.create(
        rest.JobCreate(offer_id="gpu-spot-2", command=["sleep", "50"], max_run_seconds=50)
    )
    world.settle(client, blocker.id, "running")
    body = {"offer_id": "gpu-spot-2", "command": ["true"]}
    refused = world.ask("POST", "/v1/jobs", made.secret, body, idempotency_key="k")
    assert refused.status_code == 409
    world.advance(120)
    done = world.ask("POST", "/v1/jobs", made.secret, body, idempotency_key="k")
    assert done.status_code == 201


def test_after_a_day_the_key_is_new(world) -> None:
    _, made = world.newcomer()
    one = world.ask(
        "POST", "/v1/quotes", made.secret, {"offer_id": "gpu-spot"}, idempotency_key="k"
    )
    world.advance(24 * 3600, step=6 * 3600)
    two = world.ask(
        "POST", "/v1/quotes", made.secret, {"offer_id": "gpu-spot"}, idempotency_key="k"
    )
    assert one.json()["id"] != two.json()["id"]


def test_a_quote_accepted_in_time_is_the_same_contract_when_repeated_late(world) -> None:
    client, made = world.newcomer()
    quote = client.quotes.create(rest.QuoteCreate(offer_id="gpu-on-demand"))
    card = world.owner.rate_card.get()
    world.clock.advance_to(world.clock.now() + timedelta(minutes=3))
    world.owner.rate_card.put(
        rest.RateCardPut(text=card.text.replace("3.60", "9.99")), version=card.newest_version
    )
    world.clock.advance_to(world.clock.now() + timedelta(seconds=119))
    body = {"quote_id": quote.id, "command": ["sleep", "60"]}
    first = world.ask("POST", "/v1/jobs", made.secret, body, idempotency_key="k")
    assert first.status_code == 201
    assert first.json()["price_micros_per_device_hour"] == 3_600_000
    world.clock.advance_to(world.clock.now() + timedelta(seconds=2))
    again = world.ask("POST", "/v1/jobs", made.secret, body, idempotency_key="k")
    assert again.json()["contract_id"] == first.json()["contract_id"]
    late = world.ask("POST", "/v1/jobs", made.secret, body)
    assert (late.status_code, late.json()["error"]["code"]) == (409, "quote_expired")


def test_a_secret_is_not_kept_with_the_answer(world) -> None:
    _, made = world.newcomer()
    one = world.ask("POST", "/v1/keys", made.secret, {"name": "a"}, idempotency_key="k")
    two = world.ask("POST", "/v1/keys", made.secret, {"name": "a"}, idempotency_key="k")
    assert one.json()["secret"].startswith("sk_")
    assert two.json()["secret"] is None
    assert two.json()["key"] == one.json()["key"]
    sign_up = {"email": "twice@example.org", "organisation_name": "Twice"}
    one = world.ask("POST", "/v1/signup", None, sign_up, idempotency_key="k")
    two = world.ask("POST", "/v1/signup", None, sign_up, idempotency_key="k")
    assert (one.status_code, two.status_code) == (201, 201)
    assert one.json()["secret"].startswith("sk_")
    assert two.json()["secret"] is None


def test_a_key_that_is_none_is_refused(world) -> None:
    _, made = world.newcomer()
    for wrong in ("", "a b", "x" * 201):
        answer = world.ask(
            "POST", "/v1/projects", made.secret, {"name": "a"}, idempotency_key=wrong
        )
        assert answer.status_code == 422
        assert answer.json()["error"]["param"] == "idempotency-key"


def test_twenty_at_once_are_one(world) -> None:
    client, made = world.newcomer()
    answers: list[tuple[int, str]] = []
    start = threading.Barrier(20)

    def buy() -> None:
        start.wait()
        answer = world.ask(
            "POST", "/v1/instances", made.secret, {"offer_id": "gpu-spot"}, idempotency_key="k"
        )
        answers.append((answer.status_code, answer.json()["id"]))

    threads = [threading.Thread(target=buy) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _ in answers} == {201}
    assert len({found for _, found in answers}) == 1
    assert len(list(client.instances.list())) == 1
