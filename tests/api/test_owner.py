"""The owner's acts: recalls with their plan, the fleet and its fences, money, the whole at a glance."""

from __future__ import annotations

from datetime import timedelta

import pytest

from sublet.base.wire import rest
from sublet.sdk import ApiError


def refused(call, status: int, code: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call()
    assert (caught.value.status, caught.value.code) == (status, code), caught.value
    return caught.value


def _filled(world) -> tuple[object, list[str]]:
    """Both devices sold as spot with a notice of 30 s, running."""
    client, _ = world.newcomer()
    made = [
        client.jobs.create(
            rest.JobCreate(
                offer_id="gpu-spot", notice_seconds=30, command=["sleep", "90000"], name=f"j{n}"
            )
        )
        for n in range(2)
    ]
    for job in made:
        world.settle(client, job.id, "running")
    return client, [job.id for job in made]


def test_a_recall_is_planned_accepted_noticed_delivered_and_returned(world) -> None:
    client, jobs = _filled(world)
    owner = world.owner
    plan = owner.recalls.plan(rest.RecallCreate(pool_id=world.pool_id, count=1))
    assert plan.state == "planned"
    assert plan.expires_at == world.clock.now() + timedelta(seconds=60)
    [row] = plan.rows
    [victim] = row.victims
    assert victim.workload_id in jobs
    assert victim.credit.micros > 0  # Both runs are younger than ten minutes.
    assert victim.term_at >= world.clock.now() + timedelta(seconds=30)
    # Before it is accepted nothing has happened to anybody.
    world.tick()
    assert {client.jobs.get(j).state for j in jobs} == {"running"}

    accepted = owner.recalls.accept(plan.id)
    assert accepted.state in ("accepted", "noticing")
    world.tick()
    told = client.jobs.get(victim.workload_id)
    assert told.state == "interrupting"
    assert told.interruption is not None
    assert told.interruption.at == victim.term_at
    assert told.interruption.reason == "owner_recall"
    assert told.interruption.action == "requeue"

    world.advance(200, step=5)
    done = owner.recalls.get(plan.id)
    assert done.state == "delivered"
    assert not done.late
    assert done.rows[0].delivered_at is not None
    assert done.rows[0].delivered_at <= row.free_by
    [device] = [d for d in owner.devices.list() if d.id in done.rows[0].device_ids]
    assert (device.use, device.holder) == ("first_party", plan.id)
    assert client.jobs.get(victim.workload_id).state == "awaiting_capacity"
    # Interrupted young, the run is free.
    assert client.jobs.get(victim.workload_id).cost.micros == 0

    back = owner.recalls.give_back(plan.id)
    assert back.state == "returned"
    world.settle(client, victim.workload_id, "running")
    assert owner.audit_books().sound


def test_a_plan_that_no_longer_holds_carries_the_new_one(world) -> None:
    client, jobs = _filled(world)
    owner = world.owner
    plan = owner.recalls.plan(rest.RecallCreate(pool_id=world.pool_id, count=1))
    victim = plan.rows[0].victims[0].workload_id
    client.jobs.cancel(victim)
    world.settle(client, victim, "terminated")
    error = refused(lambda: owner.recalls.accept(plan.id), 409, "plan_stale")
    anew = rest.Recall.model_validate(error.details["plan"])
    assert anew.id != plan.id
    assert anew.rows[0].victims == []
    assert owner.recalls.accept(anew.id).id == anew.id
    assert client.jobs.get(next(j for j in jobs if j != victim)).state == "running"


def test_refusals_around_recalls(world) -> None:
    owner = world.owner
    now = world.clock.now()
    error = refused(
        lambda: owner.recalls.plan(rest.RecallCreate(pool_id=world.pool_id, count=99)),
        422,
        "invalid_request",
    )
    assert error.param == "count"
    refused(
        lambda: owner.recalls.plan(rest.RecallCreate(pool_id="pol_none", count=1)),
        404,
        "pool_not_found",
    )
    answer = world.ask(
        "POST",
        "/v1/recalls",
        world.owner_secret,
        {
            "pool_id": world.pool_id,
            "count": 1,
            "by": (now + timedelta(hours=1)).isoformat(),
            "until": now.isoformat(),
        },
    )
    assert answer.json()["error"]["param"] == "until"
    refused(lambda: owner.recalls.get("rec_none"), 404, "recall_not_found")
    plan = owner.recalls.plan(rest.RecallCreate(pool_id=world.pool_id, count=1))
    assert refused(
        lambda: owner.recalls.accept(plan.id, rest.RecallAccept(rows=[77])), 422, "invalid_request"
    )
    refused(lambda: owner.recalls.give_back(plan.id), 409, "recall_state")
    world.advance(61, step=61)
    refused(lambda: owner.recalls.accept(plan.id), 409, "recall_state")
    assert owner.recalls.get(plan.id).state == "expired"


def test_what_cannot_be_had_in_time_is_a_shortfall_in_the_plan(world) -> None:
    client, _ = world.newcomer()
    for _ in range(2):
        job = client.jobs.create(
            rest.JobCreate(offer_id="gpu-on-demand", command=["sleep", "90000"])
        )
        world.settle(client, job.id, "running")
    plan = world.owner.recalls.plan(
        rest.RecallCreate(
            pool_id=world.pool_id, count=2, by=world.clock.now() + timedelta(minutes=5)
        )
    )
    assert plan.shortfall_devices == 2
    assert plan.shortfall_earliest_at is not None
    assert plan.shortfall_earliest_at >= world.clock.now() + timedelta(minutes=55)


def test_the_fleet_shows_fences_devices_and_device_time(world) -> None:
    owner = world.owner
    _filled(world)
    [node] = owner.nodes.list()
    assert {row.fence for row in node.fences} >= {"cpu", "memory", "files", "network"}
    assert node.missing_for_strangers == []
    devices = list(owner.devices.list(node_id=node.id))
    assert [d.use for d in devices] == ["sold_used", "sold_used"]
    assert all(d.party == "sale" and d.rank == "spot" for d in devices)
    start = world.clock.now() - timedelta(seconds=2)
    time = owner.devices.time(start=start, end=world.clock.now())
    assert sum(time.milliseconds_by_use.values()) == 2 * 2000
    [pool] = owner.pools.list()
    assert (pool.sold_devices, pool.free_devices, pool.sellable_devices) == (2, 0, 2)
    assert pool.excess[-1].devices == 2
    [site] = owner.sites.list()
    assert site.id == pool.site_id
    [facts] = owner.cost_facts.list()
    assert facts.floor_micros_per_device_hour > 0


def test_a_cordon_that_breaks_a_notice_says_so_first(world) -> None:
    client, jobs = _filled(world)
    owner = world.owner
    [node] = owner.nodes.list()
    error = refused(
        lambda: owner.nodes.cordon(node.id, rest.CordonCreate(mode="immediate")),
        409,
        "notice_protected",
    )
    assert set(error.details["workloads"]) == set(jobs)
    assert owner.nodes.get(node.id).state == "production"
    cordoned = owner.nodes.cordon(node.id)
    assert cordoned.state == "cordoned"
    assert owner.nodes.uncordon(node.id).state == "production"
    ended = owner.nodes.cordon(node.id, rest.CordonCreate(mode="immediate", break_notice=True))
    assert ended.state == "draining"
    world.advance(60)
    assert {client.jobs.get(j).state for j in jobs} == {"awaiting_capacity"}
    # The penalty: young runs are free.
    assert {client.jobs.get(j).cost.micros for j in jobs} == {0}
    acts = [e.action for e in owner.audit.list() if e.actor == owner.me().key.id]
    assert acts.count("break_notice") == 2
    assert "cordon_node" in acts


def test_status_and_metrics_say_the_same(world) -> None:
    client, _ = _filled(world)
    status = world.owner.status()
    assert status.owner is not None
    [pool] = status.owner.pools
    assert {u.use: u.devices for u in pool.by_use} == {"sold_used": 2}
    assert status.owner.earning_micros_per_hour == client.status().burn_micros_per_hour > 0
    assert status.owner.cost_micros_per_hour > 0
    mine = client.status()
    assert mine.owner is None
    assert len(mine.workloads) == 2
    page = world.owner.metrics()
    assert 'sublet_devices{pool="' in page
    assert 'use="sold_used"} 2.0' in page
    assert 'sublet_workloads{state="running"} 2.0' in page
    assert "sublet_ledger_trial_balance_micros 0.0" in page
    assert 'sublet_http_answers_total{method="POST",route="/v1/jobs",status="201"} 2.0' in page
    assert "org_" not in page


def test_health_needs_no_key(world) -> None:
    assert world.caller(None).health().ok


def test_money_is_recorded_once_a_reference(world) -> None:
    client, made = world.newcomer()
    owner = world.owner
    body = rest.PaymentCreate(
        organisation_id=made.organisation.id, amount_micros=5_000_000, reference="wire 1"
    )
    first = owner.money.record_payment(body)
    assert owner.money.record_payment(body).id == first.id
    other = body.model_copy(update={"amount_micros": 6_000_000})
    refused(lambda: owner.money.record_payment(other), 409, "reference_reused")
    assert client.money.balance().available.micros == 25_000_000
    window = {
        "start": world.clock.now() - timedelta(hours=1),
        "end": world.clock.now() + timedelta(seconds=1),
    }
    kinds = [t.kind for t in client.money.transfers(**window)]
    assert kinds == ["grant", "payment"]
    # The customer sees the owner's act on it in its own trail.
    assert "record_payment" in {e.action for e in client.audit.list()}


def test_the_owners_own_work_is_first_party(world) -> None:
    job = world.owner.jobs.create(rest.JobCreate(offer_id="gpu-spot", command=["sleep", "60"]))
    assert (job.party, job.product) == ("first_party", "first_party")
    world.settle(world.owner, job.id, "running")
    world.advance(90)
    done = world.settle(world.owner, job.id, "completed")
    assert done.cost.micros == 0
    statement = world.owner.money.statement(start=job.created_at, end=world.clock.now())
    assert statement.first_party.micros > 0
    assert statement.revenue.micros == 0
