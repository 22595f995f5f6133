"""ETag and If-Match, and lists in parts."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from sublet.base.wire import rest

MUSE = Path(str(files("sublet.shops.models") / "carried" / "muse-tiny.gguf"))


def test_a_change_names_the_version_it_changes(world) -> None:
    client, made = world.newcomer()
    job = client.jobs.create(rest.JobCreate(offer_id="gpu-spot", command=["sleep", "900"]))
    path = f"/v1/jobs/{job.id}"
    seen = world.ask("GET", path, made.secret)
    assert seen.headers["etag"] == f'"{seen.json()["version"]}"'

    missing = world.ask("PATCH", path, made.secret, {"name": "a"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (428, "if_match_required")
    assert missing.json()["error"]["param"] == "if-match"
    for wrong in ("3", "*", 'W/"1"', '"x"', '"1", "2"'):
        answer = world.ask("PATCH", path, made.secret, {"name": "a"}, if_match=wrong)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "if-match")

    done = world.ask("PATCH", path, made.secret, {"name": "a"}, if_match=seen.headers["etag"])
    assert done.status_code == 200
    assert done.json()["name"] == "a"
    assert done.headers["etag"] != seen.headers["etag"]

    stale = world.ask("PATCH", path, made.secret, {"name": "b"}, if_match=seen.headers["etag"])
    assert (stale.status_code, stale.json()["error"]["code"]) == (412, "stale_version")
    assert stale.json()["error"]["details"]["version"] == done.json()["version"]
    assert client.jobs.get(job.id).name == "a"
    null = world.ask("PATCH", path, made.secret, {"name": None}, if_match=done.headers["etag"])
    assert (null.status_code, null.json()["error"]["param"]) == (422, "name")


def test_standing_rate_card_and_shelf_are_guarded_too(world) -> None:
    client, made = world.newcomer()
    owner = world.owner_secret
    card = world.owner.rate_card.get()
    pool = world.owner.pools.get(world.pool_id)
    for path, body, version in (
        (
            f"/v1/organisations/{made.organisation.id}/standing",
            {"standing": "warned", "why": "late"},
            client.me().organisation.version,
        ),
        (
            "/v1/rate-card",
            {"text": card.text.replace("3.60", "4.00")},
            card.newest_version,
        ),
        (f"/v1/pools/{world.pool_id}/firm-shelf", {"devices": 1}, pool.version),
    ):
        assert world.ask("PUT", path, owner, body).status_code == 428, path
        wrong = world.ask("PUT", path, owner, body, if_match=f'"{version + 7}"')
        assert wrong.status_code == 412, path
        done = world.ask("PUT", path, owner, body, if_match=f'"{version}"')
        assert done.status_code == 200, done.text
        assert done.headers["etag"] != f'"{version}"', path
        again = world.ask("PUT", path, owner, body, if_match=f'"{version}"')
        assert again.status_code == 412, path
    assert world.owner.pools.get(world.pool_id).firm_shelf.devices == 1


def test_a_new_rate_card_prices_what_is_quoted_from_then_on(world) -> None:
    client, _ = world.newcomer()
    before = client.quotes.create(rest.QuoteCreate(offer_id="gpu-on-demand"))
    card = world.owner.rate_card.get()
    made = world.owner.rate_card.put(
        rest.RateCardPut(text=card.text.replace("3.60", "7.20")), version=card.newest_version
    )
    assert made.version == 2
    after = client.quotes.create(rest.QuoteCreate(offer_id="gpu-on-demand"))
    assert after.total.micros == 2 * before.total.micros
    assert client.quotes.get(before.id).total == before.total
    assert [c.version for c in client.rate_card.versions()] == [1, 2]
    wrong = world.ask(
        "PUT", "/v1/rate-card", world.owner_secret, {"text": "[[offer]]\nid = 3"}, if_match='"2"'
    )
    assert wrong.status_code == 422
    assert "offer[0].id" in wrong.json()["error"]["param"] or "id" in wrong.json()["error"]["param"]


def test_a_list_in_parts_is_the_list(world) -> None:
    client, made = world.newcomer()
    for number in range(7):
        client.projects.create(rest.ProjectCreate(name=f"p{number}"))
    whole = [p.name for p in client.projects.list()]
    assert whole == ["default", *(f"p{n}" for n in range(7))]
    seen: list[str] = []
    path = "/v1/projects?limit=3"
    sizes = []
    while True:
        page = world.ask("GET", path, made.secret).json()
        seen += [p["name"] for p in page["data"]]
        sizes.append(len(page["data"]))
        if page["next"] is None:
            break
        # What comes in meanwhile comes at the end, and moves nothing.
        if len(sizes) == 1:
            client.projects.create(rest.ProjectCreate(name="late"))
        path = f"/v1/projects?limit=3&after={page['next']}"
    assert seen == [*whole, "late"]
    assert sizes == [3, 3, 3]


def test_every_list_pages(world) -> None:
    client, made = world.newcomer()
    client.jobs.create(rest.JobCreate(offer_id="gpu-spot", command=["true"]))
    document = world.ask("GET", "/openapi.json").json()
    lists = [
        path
        for path, routes in document["paths"].items()
        if "get" in routes and routes["get"]["operationId"].startswith("list_")
    ]
    assert len(lists) > 20
    job = next(client.jobs.list()).id
    model = world.owner.catalogue.add(
        rest.ModelCreate(
            name="m", provider="p", licence="l", path=str(MUSE), quantization="Q8_0", context=512
        )
    )
    served = world.owner.deployments.create(rest.DeploymentCreate(model=model.name))
    for path in lists:
        mine = path.startswith("/v1/instances/{")
        here = path.replace("{workload_id}", "ins_none" if mine else job)
        here = here.replace("{name}", model.name).replace("{deployment_id}", served.id)
        secret = made.secret if here.startswith("/v1/jobs/") else world.owner_secret
        answer = world.ask("GET", f"{here}?limit=1", secret)
        if mine:
            assert answer.status_code == 404, here
            continue
        assert answer.status_code == 200, (here, answer.text)
        page = answer.json()
        assert set(page) == {"data", "next"}, here
        assert len(page["data"]) <= 1, here
        if page["next"] is not None:
            more = world.ask("GET", f"{here}?limit=1&after={page['next']}", secret).json()
            assert more["data"] != page["data"], here
