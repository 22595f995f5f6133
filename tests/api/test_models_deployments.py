"""Deployments, gateways, token usage and limits over REST."""

from __future__ import annotations

from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from token_books import MODEL, seed_prices

from sublet.audit import check
from sublet.base.kernel.interval import from_micros, micros_since_epoch
from sublet.base.store import Actor
from sublet.base.wire import rest
from sublet.base.wire.gateway import AllowanceRequest, Gauge, Outcome, UsageEvent
from sublet.money import billing
from sublet.records import metering, tenancy
from sublet.sdk import ApiError, Client
from sublet.shops import models

MUSE = Path(str(files("sublet.shops.models") / "carried" / "muse-tiny.gguf"))
SYSTEM = Actor.system("test")


def refused(call: Any, status: int, code: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call()
    assert (caught.value.status, caught.value.code) == (status, code), caught.value
    return caught.value


@pytest.fixture
def served(world: Any) -> Any:
    """A world with a model on its catalogue."""
    world.owner.catalogue.add(
        rest.ModelCreate(
            name="m",
            provider="us",
            licence="PSF-2.0",
            path=str(MUSE),
            quantization="Q8_0",
            context=512,
        )
    )
    return world


# ---- deployments --------------------------------------------------------------------------------


def test_a_deployment_is_made_seen_changed_and_retired(served: Any) -> None:
    owner = served.owner
    made = owner.deployments.create(
        rest.DeploymentCreate(model="m", max_replicas=2), idempotency_key="once"
    )
    again = owner.deployments.create(
        rest.DeploymentCreate(model="m", max_replicas=2), idempotency_key="once"
    )
    assert again == made
    assert (made.pool_id, made.state, made.wanted, made.replicas) == (
        served.pool_id,
        "active",
        1,
        [],
    )
    refused(
        lambda: owner.deployments.create(rest.DeploymentCreate(model="m")),
        409,
        "deployment_exists",
    )
    loop = models.ModelsLoop(served.store, served.engine)
    for _ in range(20):
        loop.step(served.clock.now())
        served.advance(1, step=1)
        if owner.deployments.get(made.id).replicas:
            break
    loop.close()
    [replica] = owner.deployments.get(made.id).replicas
    assert (replica.state, replica.is_filler, replica.in_flight) == ("starting", True, 0)
    assert list(owner.deployments.replicas(made.id)) == [replica]
    patch = rest.DeploymentPatch(max_replicas=5, idle_seconds=60)
    changed = owner.deployments.change(made.id, patch, version=made.version)
    assert (changed.max_replicas, changed.idle_seconds, changed.version) == (5, 60, 2)
    refused(lambda: owner.deployments.change(made.id, patch, version=1), 412, "stale_version")
    owner.deployments.retire(made.id)
    owner.deployments.retire(made.id)
    assert owner.deployments.get(made.id).state == "retiring"
    done = [e.action for e in owner.audit.list() if e.target == made.id and e.result == "ok"]
    assert done == ["deploy_model", "change_deployment", "retire_deployment", "retire_deployment"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"model": "m", "min_replicas": 3, "max_replicas": 2}, "max_replicas"),
        ({"model": "m", "max_replicas": 0}, "max_replicas"),
        ({"model": "m", "drain_seconds": 61}, "drain_seconds"),
        ({"model": "m", "slots": 0}, "slots"),
        ({"model": "m", "replicas": 3}, "replicas"),
        ({}, "model"),
    ],
)
def test_a_wrong_deployment_is_refused_by_its_field(
    served: Any, body: dict[str, Any], param: str
) -> None:
    answer = served.ask("POST", "/v1/deployments", served.owner_secret, body)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == param


def test_a_change_keeps_minimum_and_maximum_in_order(served: Any) -> None:
    owner = served.owner
    made = owner.deployments.create(rest.DeploymentCreate(model="m", max_replicas=2))
    patch = rest.DeploymentPatch(min_replicas=3)
    error = refused(
        lambda: owner.deployments.change(made.id, patch, version=1), 422, "invalid_request"
    )
    assert error.param == "max_replicas"
    refused(lambda: owner.deployments.get("dep_none"), 404, "deployment_not_found")
    refused(
        lambda: owner.deployments.create(rest.DeploymentCreate(model="none")),
        404,
        "model_not_found",
    )
    answer = served.ask("PATCH", f"/v1/deployments/{made.id}", served.owner_secret, {"target": 2})
    assert answer.status_code == 428


# ---- gateways -----------------------------------------------------------------------------------


def test_gateways_stand_as_they_last_said(served: Any) -> None:
    owner = served.owner
    made = owner.deployments.create(rest.DeploymentCreate(model="m"))
    epoch = micros_since_epoch(served.clock.now())
    with served.store.work(SYSTEM) as work:
        models.keep_gauge(
            work,
            Gauge(
                gateway="gw-0",
                epoch=epoch,
                snapshot=7,
                is_cut_off=False,
                in_flight={"rep_1": 2, "rep_2": 1},
                waiting={"m": 3},
                refusals={"rate_limit_exceeded": 4},
                requests=9,
                spool_file=0,
                spool_offset=0,
                ejected=("rep_2",),
            ),
        )
        models.set_gateways(work, ["gw-0"])
    [seen] = owner.gateways.list()
    assert (seen.name, seen.started_at, seen.is_alive) == ("gw-0", served.clock.now(), True)
    assert (seen.in_flight, seen.waiting, seen.refusals) == (
        3,
        {"m": 3},
        {"rate_limit_exceeded": 4},
    )
    assert (seen.requests, seen.ejected, seen.snapshot, seen.newest_snapshot) == (
        9,
        ["rep_2"],
        7,
        0,
    )
    assert owner.deployments.get(made.id).waiting == 3


def test_usage_that_is_not_booked_shows_with_its_gateway(world: Any) -> None:
    now = world.clock.now()
    epoch = micros_since_epoch(now)
    with world.store.work(SYSTEM) as work:
        for name in ("gw-0", "gw-1"):
            models.keep_gauge(
                work,
                Gauge(
                    gateway=name,
                    epoch=epoch,
                    snapshot=1,
                    is_cut_off=False,
                    in_flight={},
                    waiting={},
                    refusals={},
                    requests=0,
                    spool_file=0,
                    spool_offset=0,
                    ejected=(),
                ),
            )
        models.set_gateways(work, ["gw-0", "gw-1"])
    assert [g.spool_faults for g in world.owner.gateways.list()] == [[], []]
    assert "sublet_spool_faults 0.0" in world.owner.metrics()
    faults = [("gw-1", epoch - 2_000_000), ("gw-1", epoch), ("gw-00", epoch - 1_000_000)]
    with world.store.work(SYSTEM) as work:
        metering.keep_spool_faults(
            work,
            [
                metering.SpoolFault(gateway=name, epoch=of, why=f"damaged at {of}")
                for name, of in faults
            ],
        )
    well, silent, hurt = world.owner.gateways.list()
    assert (well.name, well.spool_faults) == ("gw-0", [])
    assert [(f.life, f.started_at, f.why) for f in hurt.spool_faults] == [
        (f"gw-1/{of}", from_micros(of), f"damaged at {of}") for of in (epoch - 2_000_000, epoch)
    ]
    # One that never said anything is shown for what it has left.
    assert (silent.name, silent.is_alive, silent.requests) == ("gw-00", False, 0)
    assert [f.life for f in silent.spool_faults] == [f"gw-00/{epoch - 1_000_000}"]
    assert silent.started_at == now - timedelta(seconds=1)
    assert "sublet_spool_faults 3.0" in world.owner.metrics()
    customer, _ = world.newcomer()
    refused(lambda: list(customer.gateways.list()), 403, "forbidden")


# ---- token usage --------------------------------------------------------------------------------


def _used(
    world: Any,
    made: rest.SignUp,
    number: int,
    *,
    key_id: str | None = None,
    project_id: str | None = None,
) -> None:
    now_us = micros_since_epoch(world.clock.now())
    with world.store.work(SYSTEM) as work:
        if number == 1:
            metering.open_epoch(work, "gw-0", 1)
        event = UsageEvent(
            id=f"req_{number}",
            key_id=key_id or made.key.id,
            organisation_id=made.organisation.id,
            project_id=project_id,
            is_first_party=False,
            model="m",
            deployment_id="dep_1",
            replica_id="rep_1",
            surface="chat",
            tier="default",
            price_version="v1",
            outcome=Outcome.OK,
            started_us=now_us,
            ended_us=now_us + 5,
            first_us=now_us + 1,
            input_uncached=10,
            cache_read=2,
            output=3,
            made=3,
            micros=1,
        )
        metering.ingest(work, gateway="gw-0", epoch=1, events=[event], file=0, offset=number)


def test_token_usage_is_ones_own_and_the_owner_reads_anybodys(world: Any) -> None:
    client, made = world.newcomer()
    other, _ = world.newcomer("Other")
    second = client.keys.create(rest.KeyCreate(name="second"))
    _used(world, made, 1)
    _used(world, made, 2, key_id=second.id)
    rows = list(client.token_usage.list())
    assert [row.id for row in rows] == ["req_1", "req_2"]
    assert (rows[0].input_uncached, rows[0].cache_read, rows[0].output) == (10, 2, 3)
    assert rows[0].started_at == world.clock.now()
    assert [row.id for row in client.token_usage.list(key_id=second.id)] == ["req_2"]
    assert list(other.token_usage.list()) == []
    assert list(other.token_usage.list(key_id=second.id)) == []
    refused(
        lambda: list(other.token_usage.list(organisation_id=made.organisation.id)),
        404,
        "organisation_not_found",
    )
    theirs = world.owner.token_usage.list(organisation_id=made.organisation.id)
    assert [row.id for row in theirs] == ["req_1", "req_2"]
    first = world.ask("GET", "/v1/token-usage?limit=1", made.secret).json()
    assert [row["id"] for row in first["data"]] == ["req_1"]
    after = world.ask("GET", f"/v1/token-usage?after={first['next']}", made.secret).json()
    assert [row["id"] for row in after["data"]] == ["req_2"]


def test_a_key_bound_to_a_project_sees_its_own_requests(world: Any) -> None:
    client, made = world.newcomer()
    bound = client.keys.create(rest.KeyCreate(name="p", project_id=made.project.id))
    _used(world, made, 1)
    _used(world, made, 2, key_id=bound.id)
    caller = world.caller(bound.secret)
    assert [row.id for row in caller.token_usage.list()] == ["req_2"]
    refused(lambda: list(caller.token_usage.list(key_id=made.key.id)), 404, "key_not_found")


def test_token_usage_of_a_project(world: Any) -> None:
    client, made = world.newcomer()
    other, others = world.newcomer("Other")
    second = client.projects.create(rest.ProjectCreate(name="second"))
    for number, project_id in enumerate((made.project.id, second.id, None, second.id), start=1):
        _used(world, made, number, project_id=project_id)

    def of(caller: Client, **named: str) -> list[str]:
        return [row.id for row in caller.token_usage.list(**named)]

    assert of(client, project_id=second.id) == ["req_2", "req_4"]
    assert of(client, project_id=made.project.id, key_id=made.key.id) == ["req_1"]
    # The owner names whose; a project is only found with its own organisation.
    org = made.organisation.id
    assert of(world.owner, organisation_id=org, project_id=second.id) == ["req_2", "req_4"]
    for caller, named in (
        (client, {"project_id": "prj_none"}),
        (client, {"project_id": others.project.id}),
        (other, {"project_id": second.id}),
        (world.owner, {"project_id": second.id}),
        (world.owner, {"organisation_id": org, "project_id": others.project.id}),
    ):
        error = refused(lambda c=caller, n=named: of(c, **n), 404, "project_not_found")
        assert "project" in error.message
    bound = client.keys.create(rest.KeyCreate(name="b", project_id=second.id))
    _used(world, made, 5, key_id=bound.id, project_id=second.id)
    caller = world.caller(bound.secret)
    assert of(caller, project_id=second.id) == ["req_5"], "a bound key sees its own requests"
    refused(lambda: of(caller, project_id=made.project.id), 404, "project_not_found")
    answer = world.ask("GET", "/v1/token-usage?project_id=not%20one", made.secret)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "project_id")


def test_the_last_requests_cost_no_more_pages_than_hold_them(world: Any) -> None:
    client, made = world.newcomer()
    for number in range(1, 8):
        _used(world, made, number)
    before = _asked(world)
    assert [row.id for row in client.token_usage.last(2)] == ["req_6", "req_7"]
    assert _asked(world) == before + 1
    assert [row.id for row in client.token_usage.last(7)] == [f"req_{n}" for n in range(1, 8)]
    assert [row.id for row in client.token_usage.last(99)] == [f"req_{n}" for n in range(1, 8)]
    assert _asked(world) == before + 3
    assert client.token_usage.last(5, key_id="key_none") == ()
    # Page by page, also while more is used: what came later is before the first page.
    query = "/v1/token-usage?order=newest&limit=3"
    first = world.ask("GET", query, made.secret).json()
    _used(world, made, 8)
    second = world.ask("GET", f"{query}&after={first['next']}", made.secret).json()
    third = world.ask("GET", f"{query}&after={second['next']}", made.secret).json()
    ids = [[row["id"] for row in page["data"]] for page in (first, second, third)]
    assert ids == [["req_7", "req_6", "req_5"], ["req_4", "req_3", "req_2"], ["req_1"]]
    assert third["next"] is None
    answer = world.ask("GET", "/v1/token-usage?order=best", made.secret)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "order")


def _asked(world: Any) -> int:
    """How many pages of token usage were read."""
    counted = 'sublet_http_answers_total{method="GET",route="/v1/token-usage",status="200"} '
    lines = world.owner.metrics().splitlines()
    return sum(int(float(line.removeprefix(counted))) for line in lines if line.startswith(counted))


def test_what_the_owner_bore_is_in_the_owners_list_of_transfers_only(world: Any) -> None:
    """Two requests, one cut: of 50 tokens that were made 10 are billed, the rest is a loss."""
    client, made = world.newcomer()
    with world.store.work(SYSTEM) as work:
        seed_prices(work)
        now_us = micros_since_epoch(work.now)
        event = UsageEvent(
            id="req_1",
            key_id=made.key.id,
            organisation_id=made.organisation.id,
            project_id=None,
            is_first_party=False,
            model=MODEL,
            deployment_id="dep_1",
            replica_id="rep_1",
            surface="chat",
            tier="default",
            price_version="v1",
            outcome=Outcome.CLIENT_GONE,
            started_us=now_us,
            ended_us=now_us + 5,
            first_us=now_us + 1,
            input_uncached=100,
            cache_read=0,
            output=10,
            made=50,
            micros=14,
        )
        billing.grant_allowance(
            work,
            gateway="gw-0",
            epoch=1,
            request=AllowanceRequest(
                key_id=made.key.id,
                epoch=1,
                wanted_micros=1000,
                wanted_tokens=0,
                spent_micros=0,
                held_micros=0,
                spent_tokens=0,
                held_tokens=0,
                serial=1,
            ),
        )
        billing.ingest_usage(work, gateway="gw-0", epoch=1, events=[event], file=0, offset=9)
        billing.close_epoch(work, gateway="gw-0", epoch=1, lost=[])
    world.advance(1)
    window = {"start": world.clock.now() - timedelta(hours=1), "end": world.clock.now()}
    seen = list(client.money.transfers(**window))
    assert [t.kind for t in seen] == ["grant", "token_usage", "token_usage"]
    own = f"customer:{made.organisation.id}"
    assert {own} == {own for t in seen if own in (t.debit, t.credit)}
    assert sum(t.amount.micros * (1 if t.credit == own else -1) for t in seen) == (
        client.money.balance().balance.micros
    )
    by_owner = list(world.owner.money.transfers(organisation_id=made.organisation.id, **window))
    [loss] = [t for t in by_owner if t.kind == "token_loss"]
    assert [t for t in by_owner if t != loss] == seen
    assert (loss.debit, loss.credit, loss.amount.micros) == ("losses", "revenue:tokens", 16)
    # Nor does it stand on the invoice, and the owner's statement has it as given away.
    assert {line.kind for line in client.money.invoice_so_far().lines} == {"token_usage"}
    assert world.owner.money.statement(**window).credits.micros == 16
    with world.store.read() as tx:
        assert check(tx, world.clock.now()) == []


# ---- limits -------------------------------------------------------------------------------------


def test_a_key_is_made_with_limits_of_tokens_and_models(world: Any) -> None:
    client, _ = world.newcomer()
    wanted = {"tokens_per_minute": 500, "tokens_per_day": 9000, "models": ["m", "a"]}
    made = client.keys.create(
        rest.KeyCreate(name="k", limits=rest.KeyLimitsBody.model_validate(wanted))
    )
    limits = client.keys.get(made.id).limits
    assert (limits.tokens_per_minute, limits.tokens_per_day) == (500, 9000)
    assert limits.models == ["a", "m"]
    assert client.limits.get("key", made.id).models == ["a", "m"]
    with world.store.read() as tx:
        found = tenancy.find_valid_key(tx, made.id, world.clock.now())
    assert found is not None
    assert found.limits.models == ("a", "m")


def test_limits_of_a_project_and_a_key_are_their_admins_to_set(world: Any) -> None:
    client, made = world.newcomer()
    other, _ = world.newcomer("Other")
    for kind, scope_id in (("project", made.project.id), ("key", made.key.id)):
        body = rest.LimitsPut(requests_per_minute=60, tokens_per_day=1000)
        put = client.limits.set(kind, scope_id, body)
        assert put == client.limits.get(kind, scope_id)
        assert (put.scope_kind, put.requests_per_minute, put.tokens_per_day) == (kind, 60, 1000)
        cleared = client.limits.set(kind, scope_id, rest.LimitsPut(tokens_per_minute=5))
        if kind == "project":
            assert (cleared.requests_per_minute, cleared.tokens_per_minute) == (None, 5)
        code = f"{kind}_not_found"
        refused(lambda k=kind, s=scope_id: other.limits.get(k, s), 404, code)
        refused(lambda k=kind, s=scope_id, b=body: other.limits.set(k, s, b), 404, code)
    member = world.caller(client.keys.create(rest.KeyCreate(name="m", role="member")).secret)
    body = rest.LimitsPut()
    refused(lambda: member.limits.set("project", made.project.id, body), 403, "forbidden")
    refused(lambda: member.limits.set("key", made.key.id, body), 403, "forbidden")


def test_an_organisations_limits_are_the_owners_word(world: Any) -> None:
    client, made = world.newcomer()
    org = made.organisation.id
    assert client.limits.get("organisation", org).tokens_per_minute is None
    body = rest.LimitsPut(tokens_per_minute=77)
    refused(lambda: client.limits.set("organisation", org, body), 403, "forbidden")
    world.owner.limits.set("organisation", org, body)
    assert client.limits.get("organisation", org).tokens_per_minute == 77
    other, _ = world.newcomer("Other")
    refused(lambda: other.limits.get("organisation", org), 404, "organisation_not_found")
    refused(lambda: other.limits.set("organisation", org, body), 404, "organisation_not_found")
    error = refused(
        lambda: world.owner.limits.set("organisation", org, rest.LimitsPut(max_devices=1)),
        422,
        "invalid_request",
    )
    assert error.param == "max_devices"
    entries = [e for e in client.audit.list() if e.action == "set_limits" and e.result == "ok"]
    assert [e.target for e in entries] == [org]


def test_a_limited_key_lets_no_key_do_more_than_itself(world: Any) -> None:
    client, _ = world.newcomer()
    limited = client.keys.create(
        rest.KeyCreate(name="l", limits=rest.KeyLimitsBody(tokens_per_day=100))
    )
    caller = world.caller(limited.secret)
    error = refused(
        lambda: caller.limits.set("key", limited.id, rest.LimitsPut(tokens_per_day=101)),
        403,
        "forbidden",
    )
    assert error.param == "limits.tokens_per_day"
    kept = caller.limits.set("key", limited.id, rest.LimitsPut(requests_per_minute=5))
    assert (kept.tokens_per_day, kept.requests_per_minute) == (100, 5)
    other = client.keys.create(rest.KeyCreate(name="o"))
    assert caller.limits.set("key", other.id, rest.LimitsPut()).tokens_per_day == 100


def test_a_scope_of_another_kind_is_no_scope(world: Any) -> None:
    _, made = world.newcomer()
    answer = world.ask("GET", f"/v1/limits/planet/{made.key.id}", made.secret)
    assert answer.status_code == 422
    assert answer.json()["error"]["param"] == "scope_kind"


# ---- whatever is sent -----------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=5,
)
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/catalogue": {
        "name": "m",
        "provider": "p",
        "licence": "l",
        "path": "/nowhere.gguf",
        "quantization": "q",
        "context": 64,
        "max_output": 9,
        "server": "llama.cpp",
        "sha256": "0" * 64,
    },
    "/v1/catalogue/m/prices": {
        "tier": "default",
        "input_micros": 1,
        "cached_micros": 1,
        "output_micros": 1,
        "effective_from": "2026-11-24T10:00:00Z",
    },
    "/v1/catalogue/m/grants": {"organisation_id": "*"},
    "/v1/deployments": {"model": "m", "min_replicas": 0, "max_replicas": 2, "target": 1},
}


@pytest.mark.parametrize("path", RIGHT)
def test_bodies_of_any_kind_are_answered_as_declared(one_world: Any, path: str) -> None:
    right = RIGHT[path]
    template = path.replace("/m/", "/{name}/")

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(
        body=JSON
        | st.dictionaries(st.sampled_from(sorted(right)), JSON, max_size=3).map(
            lambda wrong: right | wrong
        )
    )
    def sent(body: Any) -> None:
        answer = one_world.ask("POST", path, one_world.owner_secret, body)
        declared = one_world.http.app.openapi()["paths"][template]["post"]["responses"]
        assert str(answer.status_code) in declared, (answer.status_code, answer.text)
        assert answer.status_code < 500, answer.text
        if answer.status_code == 422:
            assert answer.json()["error"]["param"] is not None

    sent()
