"""Keys, roles, standing, the pace of a key, and other people's things."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest

from sublet.base.wire import rest
from sublet.sdk import ApiError, Client


def refused(call, status: int, code: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call()
    assert (caught.value.status, caught.value.code) == (status, code), caught.value
    return caught.value


def test_a_revoked_key_is_dead_with_the_next_request(world) -> None:
    client, made = world.newcomer()
    second = client.keys.create(rest.KeyCreate(name="second"))
    other = world.caller(second.secret)
    assert other.me().key.id == second.id
    client.keys.revoke(second.id)
    refused(other.me, 401, "invalid_api_key")
    assert client.keys.get(second.id).revoked_at == world.clock.now()
    # A key may revoke itself, and is then dead too.
    client.keys.revoke(made.key.id)
    refused(client.me, 401, "invalid_api_key")


def test_a_new_key_works_at_once_and_an_expired_one_does_not(world) -> None:
    client, _ = world.newcomer()
    until = world.clock.now() + timedelta(hours=1)
    made = client.keys.create(rest.KeyCreate(name="an hour", expires_at=until))
    short = world.caller(made.secret)
    assert short.me().key.expires_at == until
    world.clock.advance_to(until - timedelta(microseconds=1))
    short.me()
    world.clock.advance_to(until)
    refused(short.me, 401, "invalid_api_key")
    error = refused(
        lambda: client.keys.create(rest.KeyCreate(name="past", expires_at=until)),
        422,
        "invalid_request",
    )
    assert error.param == "expires_at"


def test_secrets_are_shown_once_and_never_listed(world) -> None:
    _, made = world.newcomer()
    listed = world.ask("GET", "/v1/keys", made.secret).text
    assert made.secret not in listed
    assert made.key.prefix in listed
    assert "digest" not in listed


def test_a_viewer_reads_and_a_member_rents_and_an_admin_manages(world) -> None:
    client, _ = world.newcomer()
    viewer = world.caller(client.keys.create(rest.KeyCreate(name="v", role="viewer")).secret)
    member = world.caller(client.keys.create(rest.KeyCreate(name="m", role="member")).secret)
    viewer.money.balance()
    refused(lambda: viewer.quotes.create(rest.QuoteCreate(offer_id="gpu-spot")), 403, "forbidden")
    member.quotes.create(rest.QuoteCreate(offer_id="gpu-spot"))
    refused(lambda: member.keys.create(rest.KeyCreate(name="x")), 403, "forbidden")
    # Refused acts are audited, under the key that tried.
    tried = [e for e in client.audit.list() if e.result == "forbidden"]
    assert [e.action for e in tried] == ["create_quote", "create_key"]
    assert {e.actor for e in tried} == {viewer.me().key.id, member.me().key.id}


def test_only_the_owner_does_the_owners_acts(world) -> None:
    client, _ = world.newcomer()
    for act in (
        lambda: list(client.organisations.list()),
        lambda: list(client.nodes.list()),
        lambda: client.pools.get(world.pool_id),
        lambda: client.recalls.plan(rest.RecallCreate(pool_id=world.pool_id, count=1)),
        lambda: client.rate_card.put(rest.RateCardPut(text="x"), version=1),
        lambda: client.money.statement(
            start=world.clock.now() - timedelta(hours=1), end=world.clock.now()
        ),
        client.audit_books,
        lambda: client.money.grant(
            rest.CreditCreate(
                organisation_id=client.me().organisation.id, amount_micros=1, reference="me"
            )
        ),
    ):
        refused(act, 403, "forbidden")


def test_suspended_may_end_and_read_but_not_begin(world) -> None:
    client, made = world.newcomer()
    job = client.jobs.create(rest.JobCreate(offer_id="gpu-spot", command=["sleep", "900"]))
    organisation = world.owner.organisations.get(made.organisation.id)
    world.owner.organisations.set_standing(
        organisation.id,
        rest.StandingPut(standing="suspended", why="unpaid"),
        version=organisation.version,
    )
    refused(
        lambda: client.quotes.create(rest.QuoteCreate(offer_id="gpu-spot")),
        403,
        "standing_forbids",
    )
    assert client.money.balance().organisation_id == made.organisation.id
    client.jobs.cancel(job.id)


def _suspended(world, made: rest.SignUp) -> None:
    organisation = world.owner.organisations.get(made.organisation.id)
    world.owner.organisations.set_standing(
        organisation.id,
        rest.StandingPut(standing="suspended", why="abuse report 12"),
        version=organisation.version,
    )


def test_the_owner_ends_what_a_suspended_consumer_runs_and_it_stays_ended(world) -> None:
    client, made = world.newcomer()
    job = client.jobs.create(rest.JobCreate(offer_id="gpu-spot", command=["sleep", "900"]))
    machine = client.instances.create(
        rest.InstanceCreate(offer_id="gpu-spot", auto_resume=True, wait=True)
    )
    other, _ = world.newcomer("Other")
    waiting = client.jobs.create(
        rest.JobCreate(offer_id="gpu-spot", command=["sleep", "900"], wait=True)
    )
    world.settle(client, job.id, "running")
    world.settle(client, machine.id, "running")
    _suspended(world, made)
    stop = rest.StopWorkloads(reason="abuse")
    for stranger in (client, other):
        refused(
            lambda who=stranger: who.organisations.stop_workloads(made.organisation.id, stop),
            403,
            "forbidden",
        )
    ended = world.owner.organisations.stop_workloads(made.organisation.id, stop)
    assert sorted(ended.workload_ids) == sorted([job.id, machine.id])
    world.advance(300)
    assert client.instances.get(machine.id).state == "stopped"
    assert client.instances.get(machine.id).reason == "abuse"
    assert client.jobs.get(job.id).state in ("failed", "terminated")
    assert client.jobs.get(job.id).reason == "abuse"
    assert client.jobs.get(waiting.id).state == "awaiting_capacity"
    [row] = [e for e in client.audit.list() if e.action == "stop_workloads" and e.result == "ok"]
    assert row.target == made.organisation.id
    assert row.detail == {"reason": "abuse"}
    assert world.owner.organisations.stop_workloads(made.organisation.id, stop).workload_ids == []


def test_the_owner_does_not_end_its_own_so(world) -> None:
    owner = world.owner
    mine = owner.me().organisation.id
    stop = rest.StopWorkloads(reason="legal_order")
    error = refused(lambda: owner.organisations.stop_workloads(mine, stop), 422, "invalid_request")
    assert error.param == "organisation_id"
    refused(
        lambda: owner.organisations.stop_workloads("org_none", stop), 404, "organisation_not_found"
    )


def test_a_limited_key_makes_none_that_may_do_more(world) -> None:
    client, _ = world.newcomer()
    until = world.clock.now() + timedelta(hours=1)
    limits = rest.KeyLimitsBody(max_devices=1, requests_per_minute=100)
    made = client.keys.create(rest.KeyCreate(name="limited", expires_at=until, limits=limits))
    limited = world.caller(made.secret)
    heir = limited.keys.create(rest.KeyCreate(name="heir")).key
    assert (heir.expires_at, heir.limits) == (until, made.key.limits)
    less = rest.KeyLimitsBody(max_devices=0)
    lesser = limited.keys.create(rest.KeyCreate(name="lesser", role="viewer", limits=less)).key
    assert (lesser.role, lesser.limits.max_devices) == ("viewer", 0)
    assert lesser.limits.requests_per_minute == 100
    for param, body in {
        "expires_at": {"expires_at": until + timedelta(seconds=1)},
        "limits.max_devices": {"limits": rest.KeyLimitsBody(max_devices=2)},
        "limits.requests_per_minute": {"limits": rest.KeyLimitsBody(requests_per_minute=101)},
    }.items():
        more = rest.KeyCreate(name="more", **body)
        error = refused(lambda more=more: limited.keys.create(more), 403, "forbidden")
        assert error.param == param
    # Nor by way of a principal of one's own.
    bot = limited.principals.create(
        rest.PrincipalCreate(kind="service_account", name="bot", role="admin")
    )
    of_bot = limited.keys.create(rest.KeyCreate(name="bot", principal_id=bot.id)).key
    assert of_bot.limits.max_devices == 1
    # A key that says admin makes keys for lesser principals all the same.
    admin = client.keys.create(rest.KeyCreate(name="admin", role="admin"))
    reader = client.principals.create(
        rest.PrincipalCreate(kind="service_account", name="reader", role="viewer")
    )
    body = rest.KeyCreate(name="reads", principal_id=reader.id)
    assert world.caller(admin.secret).keys.create(body).key.role == "viewer"


def test_a_key_of_a_project_sees_that_project_and_no_other(world) -> None:
    client, made = world.newcomer()
    other = client.projects.create(rest.ProjectCreate(name="other"))
    secret = client.keys.create(rest.KeyCreate(name="bound", project_id=other.id)).secret
    bound = world.caller(secret)
    assert [p.id for p in bound.projects.list()] == [other.id]
    refused(lambda: bound.projects.get(made.project.id), 404, "project_not_found")
    job = client.jobs.create(
        rest.JobCreate(offer_id="gpu-spot", command=["true"], project_id=made.project.id)
    )
    refused(lambda: bound.jobs.get(job.id), 404, "workload_not_found")
    assert list(bound.jobs.list()) == []
    mine = bound.jobs.create(rest.JobCreate(offer_id="gpu-spot", command=["true"]))
    assert mine.project_id == other.id
    refused(bound.money.balance, 403, "forbidden")


def test_requests_a_minute_of_a_key(world) -> None:
    client, _ = world.newcomer()
    limits = rest.KeyLimitsBody(requests_per_minute=3)
    secret = client.keys.create(rest.KeyCreate(name="slow", limits=limits)).secret
    slow = world.caller(secret)
    for _ in range(3):
        slow.me()
    world.clock.advance_to(world.clock.now() + timedelta(seconds=20))
    error = refused(slow.me, 429, "rate_limited")
    assert error.retry_after_seconds == 40
    assert error.details["resets_at"] == "2026-11-24T10:01:00Z"
    client.me()
    world.clock.advance_to(world.clock.now() + timedelta(seconds=40))
    slow.me()


def test_the_last_admin_stays(world) -> None:
    client, made = world.newcomer()
    who = client.principals.get(made.principal.id)
    refused(
        lambda: client.principals.change(
            who.id, rest.PrincipalPatch(role="viewer"), version=who.version
        ),
        409,
        "last_admin",
    )
    bot = client.principals.create(rest.PrincipalCreate(kind="service_account", name="bot"))
    assert bot.role == "member"
    client.principals.remove(bot.id)
    refused(lambda: client.principals.get(bot.id), 404, "principal_not_found")


def _things(client: Client, made: rest.SignUp) -> dict[str, str]:
    """One of everything an organisation can have, by its path."""
    quote = client.quotes.create(rest.QuoteCreate(offer_id="gpu-spot"))
    job = client.jobs.create(rest.JobCreate(quote_id=quote.id, command=["sleep", "9"]))
    instance = client.instances.create(rest.InstanceCreate(offer_id="gpu-spot"))
    return {
        f"/v1/organisations/{made.organisation.id}": "organisation_not_found",
        f"/v1/projects/{made.project.id}": "project_not_found",
        f"/v1/principals/{made.principal.id}": "principal_not_found",
        f"/v1/keys/{made.key.id}": "key_not_found",
        f"/v1/quotes/{quote.id}": "quote_not_found",
        f"/v1/jobs/{job.id}": "workload_not_found",
        f"/v1/jobs/{job.id}/logs": "workload_not_found",
        f"/v1/jobs/{job.id}/transitions": "workload_not_found",
        f"/v1/instances/{instance.id}": "workload_not_found",
        f"/v1/instances/{instance.id}/runs": "workload_not_found",
        f"/v1/usage?organisation_id={made.organisation.id}": "organisation_not_found",
        f"/v1/balance?organisation_id={made.organisation.id}": "organisation_not_found",
        f"/v1/invoices?organisation_id={made.organisation.id}": "organisation_not_found",
        f"/v1/audit?organisation_id={made.organisation.id}": "organisation_not_found",
        f"/v1/budgets?project_id={made.project.id}": "project_not_found",
    }


def test_anothers_things_are_not_found_and_look_like_what_never_was(world) -> None:
    mine, made = world.newcomer("Mine")
    _, other = world.newcomer("Other")
    for path, code in _things(mine, made).items():
        assert world.ask("GET", path, made.secret).status_code == 200, path
        hidden = world.ask("GET", path, other.secret)
        assert hidden.status_code == 404, path
        assert hidden.json()["error"]["code"] == code, path
        absent = re.sub(r"(?<=_)[a-z2-7]{16}", "a" * 16, path)
        assert absent != path
        never = world.ask("GET", absent, other.secret)
        assert never.status_code == 404, path
        assert never.json() == hidden.json(), path


def test_anothers_things_cannot_be_acted_on(world) -> None:
    mine, made = world.newcomer("Mine")
    other, _ = world.newcomer("Other")
    job = mine.jobs.create(rest.JobCreate(offer_id="gpu-spot", command=["sleep", "9"]))
    key = mine.keys.create(rest.KeyCreate(name="k"))
    refused(lambda: other.jobs.cancel(job.id), 404, "workload_not_found")
    refused(
        lambda: other.jobs.change(job.id, rest.WorkloadPatch(name="x"), version=job.version),
        404,
        "workload_not_found",
    )
    refused(
        lambda: other.jobs.exec(job.id, rest.ExecCreate(argv=["id"])), 404, "workload_not_found"
    )
    refused(lambda: other.keys.revoke(key.id), 404, "key_not_found")
    refused(
        lambda: other.keys.create(rest.KeyCreate(name="x", principal_id=made.principal.id)),
        404,
        "principal_not_found",
    )
    refused(
        lambda: other.budgets.set(
            rest.BudgetPut(
                scope_kind="project", scope_id=made.project.id, period="day", limit_micros=0
            )
        ),
        404,
        "project_not_found",
    )
    # Of a kind too: a job is no instance.
    refused(lambda: mine.instances.get(job.id), 404, "workload_not_found")
    # What was tried is in the trail of who tried it.
    assert {e.result for e in other.audit.list()} >= {"workload_not_found", "key_not_found"}
    assert "workload_not_found" not in {e.result for e in mine.audit.list()}


def test_the_owner_reads_consumers_money_and_not_their_work(world) -> None:
    client, made = world.newcomer()
    job = client.jobs.create(rest.JobCreate(offer_id="gpu-spot", command=["sleep", "9"]))
    owner = world.owner
    assert owner.money.balance(organisation_id=made.organisation.id).held.micros > 0
    refused(lambda: owner.jobs.get(job.id), 404, "workload_not_found")
    assert made.organisation.id in {o.id for o in owner.organisations.list()}


def test_trial_credit_is_for_so_many_a_day(worlds) -> None:
    world = worlds(trials_per_day=2)
    for name in ("One", "Two"):
        _, made = world.newcomer(name)
        assert (made.trial_credit.micros, made.note) == (20_000_000, None)
        world.clock.advance_to(world.clock.now() + timedelta(hours=1))
    client, made = world.newcomer("Three")
    assert made.trial_credit.micros == 0
    assert made.organisation.standing == "unverified"
    assert "No trial credit is left" in made.note
    assert client.me().available.micros == 0
    world.clock.advance_to(world.clock.now() + timedelta(hours=24))
    assert world.newcomer("Four")[1].trial_credit.micros == 20_000_000
    assert worlds(trials_per_day=0).newcomer()[1].trial_credit.micros == 0


def test_sign_ups_of_one_address_have_a_pace(world) -> None:
    body = {"email": "no address", "organisation_name": "A"}
    taken = {"email": "owner@example.org", "organisation_name": "A"}
    for _ in range(30):
        assert world.ask("POST", "/v1/signup", None, taken).status_code in (201, 409)
    answer = world.ask("POST", "/v1/signup", None, taken)
    assert answer.status_code == 429
    assert answer.json()["error"]["code"] == "rate_limited"
    assert "sign-ups a minute" in answer.json()["error"]["message"]
    assert world.ask("POST", "/v1/signup", None, body).status_code == 422
    world.clock.advance_to(world.clock.now() + timedelta(minutes=1))
    world.newcomer("Later")


def test_an_address_signs_up_once(world) -> None:
    world.newcomer()
    answer = world.ask(
        "POST", "/v1/signup", None, {"email": "ACME@example.org", "organisation_name": "B"}
    )
    assert answer.status_code == 409
    assert answer.json()["error"]["param"] == "email"
    for wrong in ("no", "a@b@c", "a b@c.org", "", "x" * 300 + "@y.org"):
        answer = world.ask("POST", "/v1/signup", None, {"email": wrong, "organisation_name": "B"})
        assert answer.status_code == 422, wrong
        assert answer.json()["error"]["param"] == "email"
