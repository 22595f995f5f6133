from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from sublet.base.kernel.errors import NoCapacity
from sublet.base.kernel.money import Money
from sublet.capacity import allocation, fleet
from sublet.capacity.fleet import NodeState
from sublet.records import tenancy
from sublet.rights import market, owner
from sublet.shops import compute

Make = Callable[..., Any]
FOREVER = {"SIM_SECONDS": "inf"}


def test_the_promise_is_running_time_and_the_meter_ends_at_sigterm(world: Any) -> None:
    job = world.job(env={**FOREVER, "SIM_TERM_SECONDS": "12"}, requeue=False)
    world.run(700)
    world.interrupt(job)
    world.step()
    run = world.last(job)
    assert world.state(job) == "interrupting"
    assert (run.t0, run.published_at) == (world.at(700), world.at(700))
    assert run.term_at == world.at(820)
    world.run(119)
    assert world.engine.run(run.id).term_at is None
    world.run(2)
    assert world.state(job) == "stopping"
    assert world.meter(run).closed_at == world.at(820)
    world.run(60)
    assert world.state(job) == "failed"
    run = world.last(job)
    assert (run.exited_at, run.reason) == (world.at(832), compute.Reason.SPOT_INTERRUPTION)
    assert world.posted(job, "interruption_credit") == 0, "its notice came after 10 minutes"


def test_a_young_spot_run_is_free_if_the_owner_ends_it(world: Any) -> None:
    job = world.job(env=FOREVER, requeue=False)
    world.run(300)
    world.interrupt(job)
    world.run(200)
    assert world.state(job) == "failed"
    assert world.posted(job) > 0
    assert world.posted(job, "interruption_credit") == -world.posted(job)


def test_it_is_free_also_when_the_consumer_stops_it_after_the_notice(world: Any) -> None:
    instance = world.rent()
    world.run(300)
    world.interrupt(instance)
    world.run(10)
    world.stop(instance)
    world.run(60)
    assert world.state(instance) == "stopped"
    assert world.last(instance).reason is compute.Reason.USER
    assert world.posted(instance, "interruption_credit") == -world.posted(instance)


def test_a_withdrawn_notice_leaves_it_running_and_billed(world: Any) -> None:
    instance = world.rent(env=FOREVER)
    world.run(100)
    world.interrupt(instance)
    world.run(20)
    run = world.last(instance)
    world.act(allocation.withdraw_notice, run.claim_id)
    world.run(500)
    assert world.state(instance) == "running"
    assert (world.last(instance).t0, world.last(instance).published_at) == (None, None)
    assert world.engine.observe()[run.id].deadline_at is None
    world.stop(instance)
    world.run(20)
    assert world.posted(instance, "interruption_credit") == 0


def test_interruptions_never_count_against_retries(make_world: Make) -> None:
    world = make_world(devices=1)
    job = world.job(env=FOREVER, max_retries=3)
    for _ in range(8):
        world.run(20)
        assert world.state(job) == "running"
        world.interrupt(job)
        world.run(160)
    world.run(20)
    assert (world.state(job), world.see(job).retries) == ("running", 0)
    assert len(world.runs(job)) == 9
    assert len({run.claim_id for run in world.runs(job)}) == 9


def test_the_next_run_starts_only_when_the_last_is_gone(make_world: Make) -> None:
    world = make_world(devices=2)
    job = world.job(env={**FOREVER, "SIM_IGNORE_TERM": "1"})
    world.run(20)
    world.interrupt(job)
    world.run(240)
    first, second = world.runs(job)
    assert first.exited_at == world.at(20 + 120 + 30)
    assert first.exit_code == 137
    assert second.intended_at >= first.exited_at
    assert world.state(job) == "running"


def test_an_instance_comes_back_only_if_it_asked_for_it(world: Any) -> None:
    stays, returns = world.rent(), world.rent(auto_resume=True)
    world.run(20)
    world.interrupt(stays)
    world.interrupt(returns)
    world.run(200)
    assert world.state(stays) == "stopped"
    assert world.state(returns) == "running"
    assert world.path(returns)[-4:] == ["stopping", "awaiting_capacity", "provisioning", "running"]


def test_what_is_recalled_before_its_meter_opens_ends_unbilled(make_world: Make) -> None:
    world = make_world(start_seconds=60)
    job = world.job(env=FOREVER)
    world.run(10)
    world.interrupt(job)
    world.step()
    assert world.state(job) in ("stopping", "awaiting_capacity", "provisioning")
    world.run(5)
    first = world.runs(job)[0]
    assert first.state is compute.RunState.FAILED
    assert world.find_meter(first) is None
    assert world.posted(job) == 0


def test_a_higher_rank_displaces_with_notice_and_the_victim_is_queued(make_world: Make) -> None:
    world = make_world(devices=1)
    spot = world.job(env=FOREVER)
    world.run(50)
    firm = world.rent(offer="gpu-on-demand", who=world.other)
    assert firm.state is compute.State.PROVISIONING
    first = world.last(spot)
    for _ in range(60):
        world.run(10)
        if world.state(spot) == "interrupting":
            break
    assert world.state(firm) == "provisioning"
    world.run(180)
    assert world.last(spot).term_at - world.last(spot).published_at >= timedelta(seconds=120)
    assert world.last(spot).id == first.id
    assert world.state(firm) == "running"
    assert world.state(spot) == "awaiting_capacity"
    assert world.runs(spot)[0].reason is compute.Reason.SPOT_INTERRUPTION
    assert world.meter(world.last(firm)).opened_at >= world.runs(spot)[0].exited_at
    assert world.posted(spot, "interruption_credit") == -world.posted(spot)


def test_a_limit_on_the_price_gives_full_notice_in_time(make_world: Make) -> None:
    world = make_world(look=60)
    quoted = world.contract(world.job("sleep", "1")).price_micros
    job = world.job(env=FOREVER, max_price=Money(quoted + 1))
    world.run(30)
    dear = market.seed_rate_card().replace(
        "price_usd_per_device_hour = 0.4007", "price_usd_per_device_hour = 40.07"
    )
    with world.books.work(world.owner.actor()) as work:
        market.load_rate_card(work, dear, work.now)
    for _ in range(60):
        with world.books.work(world.owner.actor()) as work:
            market.post_spot_prices(work, work.now)
        world.run(120)
        if world.state(job) != "running":
            break
    world.run(300)
    first = world.runs(job)[0]
    assert first.reason is compute.Reason.PRICE
    assert first.term_at - first.published_at >= timedelta(seconds=120)
    assert world.posted(job, "interruption_credit") == 0
    assert world.state(job) == "awaiting_capacity", "it waits for a price it may pay"


def test_a_restart_and_lost_records_neither_shorten_nor_repeat_a_notice(world: Any) -> None:
    job = world.job(env=FOREVER, requeue=False)
    world.run(700)
    world.interrupt(job)
    run = world.last(job)
    notice = world.engine.notice

    def die_after(*args: Any) -> Any:
        notice(*args)
        raise SystemExit

    world.engine.notice = die_after
    with pytest.raises(SystemExit):
        world.step()
    world.engine.notice = notice
    world.run(0)
    world.clock.advance_to(world.now + timedelta(seconds=40))
    world.restart()
    world.run(1)
    assert world.last(job).term_at == world.at(820)
    world.run(100)
    assert world.engine.run(run.id).term_at == world.at(820)


def test_a_late_publication_moves_sigterm_not_the_promise(world: Any) -> None:
    job = world.job(env=FOREVER, requeue=False)
    world.run(700)
    world.interrupt(job)
    world.clock.advance_to(world.now + timedelta(seconds=45))
    world.run(200)
    run = world.last(job)
    assert run.t0 == world.at(700)
    assert run.published_at == world.at(745)
    assert run.term_at == world.at(745 + 120)


def test_an_immediate_cordon_is_refused_without_break_notice(world: Any) -> None:
    instance, own = world.rent(env=FOREVER), world.job(env=FOREVER, who=world.owner)
    world.run(100)
    node_id = world.nodes["n0001"]
    with pytest.raises(compute.NoticeProtected) as refused:
        world.act(compute.cordon, world.owner, node_id, "immediate")
    assert refused.value.code == "notice_protected"
    assert refused.value.details["workloads"] == [instance.id]
    assert world.state(instance) == "running"
    with world.books.read() as tx:
        assert fleet.get_node(tx, node_id).state is NodeState.PRODUCTION
    with world.books.work(world.owner.actor()) as work:
        compute.cordon(work, world.owner, node_id, "immediate", True)
        rows = [
            r for r in tenancy.list_audit(work.tx, None, limit=500) if r.action == "break_notice"
        ]
        assert [row.target for row in rows] == [instance.id]
        # The penalty stands before anything is sent.
    assert world.posted(instance) == -world.posted(instance, "interruption_credit") > 0
    assert world.engine.run(world.last(instance).id).term_at is None
    world.run(60)
    assert world.state(instance) == "stopped"
    assert world.see(instance).reason is compute.Reason.MAINTENANCE
    assert world.state(own) == "provisioning", "its claim stands, and no device is for sale"


def test_a_drain_gives_everybody_their_notice_and_takes_nobody_new(world: Any) -> None:
    job = world.job(env=FOREVER)
    world.run(700)
    world.act(compute.cordon, world.owner, world.nodes["n0001"], "drain")
    world.run(300)
    run = world.runs(job)[0]
    assert run.reason is compute.Reason.MAINTENANCE
    assert run.term_at - run.published_at == timedelta(seconds=120)
    assert world.state(job) == "awaiting_capacity"
    assert len(world.runs(job)) == 1


def test_an_uncordon_takes_back_the_notices_of_a_drain(world: Any) -> None:
    job = world.job(env=FOREVER)
    world.run(700)
    world.act(compute.cordon, world.owner, world.nodes["n0001"], "drain")
    world.run(20)
    assert world.state(job) == "interrupting"
    node = world.act(compute.uncordon, world.owner, world.nodes["n0001"])
    world.run(300)
    assert str(node.state) == "production"
    assert world.state(job) == "running"
    (run,) = world.runs(job)
    assert (run.t0, run.term_at) == (None, None)


def test_shutdown_credits_as_if_the_owner_had_ended_it_and_starts_nothing(world: Any) -> None:
    job, instance = world.job(env=FOREVER), world.rent()
    world.run(100)
    assert world.act(compute.begin_shutdown) == 2
    world.step()
    late = world.rent()
    world.run(60)
    assert world.state(late) == "stopped"
    assert world.posted(late) == 0
    assert world._read(compute.count_live) == 0
    assert world.state(job) == "awaiting_capacity"
    assert world.state(instance) == "stopped"
    for workload in (job, instance):
        assert world.posted(workload) == -world.posted(workload, "interruption_credit") > 0
    world.restart()
    world.run(30)
    assert world.state(job) == "running"


def test_credit_exhaustion_ends_without_credit(world: Any) -> None:
    job, instance = world.job(env=FOREVER), world.rent(auto_resume=True)
    world.run(100)
    for workload in (job, instance):
        world.act(compute.stop_for, workload.id, "credit_exhausted")
    world.run(60)
    assert (world.state(job), world.state(instance)) == ("failed", "stopped")
    run = world.last(job)
    assert run.reason is compute.Reason.CREDIT_EXHAUSTED
    assert world.meter(run).closed_at == run.term_at == world.at(100)
    assert world.posted(job, "interruption_credit") == 0


def test_a_suspended_organisation_waits(world: Any) -> None:
    job = world.job(env=FOREVER)
    world.run(20)
    world.act(tenancy.set_standing, world.buyer.organisation.id, "suspended", "unpaid")
    world.interrupt(job)
    world.run(300)
    assert world.state(job) == "awaiting_capacity"
    world.act(tenancy.set_standing, world.buyer.organisation.id, "good", "paid")
    world.run(20)
    assert world.state(job) == "running"


def test_the_owner_recalls_runs_on_it_and_gives_it_back(make_world: Make) -> None:
    world = make_world(devices=1)
    spot = world.job(env=FOREVER)
    world.run(700)
    until = world.now + timedelta(seconds=900)
    with world.books.work(world.owner.actor()) as work:
        recall = owner.plan_recall(
            work,
            world.owner,
            pool_id=world.pool_id,
            devices=1,
            count=1,
            by=world.now + timedelta(seconds=300),
            until=until,
        )
        owner.accept_recall(work, recall.id)
    world.run(300)
    with world.books.read() as tx:
        delivered = owner.get_recall(tx, recall.id)
    assert delivered.state is owner.RecallState.DELIVERED
    assert not delivered.is_late
    assert world.runs(spot)[0].reason is compute.Reason.OWNER_RECALL
    own = world.job("sleep", "60", who=world.owner)
    world.run(100)
    assert world.state(own) == "completed"
    assert world.state(spot) == "awaiting_capacity"
    last = world.uses(world.now - timedelta(seconds=20), world.now)
    assert last == {"first_party": 20_000}, "a device that the owner holds is the owner's time"
    world.run(700)
    assert world.state(spot) == "running"
    assert len(world.runs(spot)) == 2


def test_a_notice_called_off_too_late_was_given(make_world: Make) -> None:
    world = make_world(devices=1)
    instance = world.rent(env=FOREVER)
    world.run(60)
    world.interrupt(instance)
    world.run(5)
    run = world.last(instance)
    # Nobody looks between the withdrawal and SIGTERM.
    world.clock.advance_to(run.term_at - timedelta(seconds=1))
    world.act(allocation.withdraw_notice, run.claim_id)
    world.clock.advance_to(run.term_at + timedelta(seconds=60))
    world.restart()
    world.run(20)
    ended = world.last(instance)
    assert (ended.reason, ended.t0) == (compute.Reason.SPOT_INTERRUPTION, run.t0)
    assert world.posted(instance, "interruption_credit") == -world.posted(instance) < 0


def test_sigterm_between_the_look_and_the_withdrawal_leaves_the_notice_given(world: Any) -> None:
    instance = world.rent(env=FOREVER)
    world.run(60)
    world.interrupt(instance)
    world.run(5)
    run = world.last(instance)
    world.clock.advance_to(run.term_at - timedelta(milliseconds=10))
    world.act(allocation.withdraw_notice, run.claim_id)
    withdraw = world.engine.withdraw

    def too_late(run_id: str) -> None:
        world.clock.advance_to(run.term_at + timedelta(milliseconds=10))
        withdraw(run_id)

    world.engine.withdraw = too_late
    world.loop.step(world.now)
    world.run(60)
    assert world.last(instance).t0 == run.t0
    assert world.posted(instance, "interruption_credit") == -world.posted(instance) < 0


def test_a_stop_after_a_notice_was_called_off_is_billed(world: Any) -> None:
    instance = world.rent(env=FOREVER)
    world.run(60)
    world.interrupt(instance)
    world.run(5)
    world.act(allocation.withdraw_notice, world.last(instance).claim_id)
    withdraw, world.engine.withdraw = world.engine.withdraw, lambda _: None
    world.loop.step(world.now)
    assert world.last(instance).t0 is not None, "the engine has not taken it back"
    world.stop(instance)
    world.run(60)
    world.engine.withdraw = withdraw
    assert world.last(instance).reason is compute.Reason.USER
    assert world.posted(instance, "interruption_credit") == 0


def test_a_drain_waits_for_whose_notice_was_just_withdrawn(world: Any) -> None:
    first, second = world.rent(env=FOREVER), world.rent(env=FOREVER, who=world.other)
    world.run(20)
    world.interrupt(first)
    world.run(2)
    world.act(allocation.withdraw_notice, world.last(first).claim_id)
    world.run(2)
    [node_id] = world.nodes.values()
    with world.books.work(world.owner.actor()) as work:
        node = compute.cordon(work, world.owner, node_id, "drain")
    world.loop.step(world.now)
    assert node.state is NodeState.DRAINING
    assert (world.state(first), world.state(second)) == ("running", "interrupting")
    world.run(620)
    run = world.last(first)
    assert (world.state(first), run.notice_reason) == ("interrupting", "maintenance")
    world.run(180)
    assert (world.state(first), world.state(second)) == ("stopped", "stopped")


def test_what_is_out_of_service_is_offered_to_wait_for(make_world: Make) -> None:
    world = make_world(devices=1)
    [node_id] = world.nodes.values()
    with world.books.work(world.owner.actor()) as work:
        compute.cordon(work, world.owner, node_id)
    with pytest.raises(NoCapacity, match="out of service now: send `wait`") as refused:
        world.rent(kind="job")
    assert refused.value.details["reason"] == "out_of_service"
    assert refused.value.details["offer_to_wait"] is True
    job = world.job("sleep", "100", wait=True)
    world.run(20)
    assert world.state(job) == "awaiting_capacity"
    with world.books.work(world.owner.actor()) as work:
        compute.uncordon(work, world.owner, node_id)
    world.run(20)
    assert world.state(job) == "running"


def test_a_refusal_that_only_spot_stands_behind_speaks_of_no_rights(make_world: Make) -> None:
    world = make_world(devices=1)
    world.rent(env=FOREVER)
    world.run(10)
    with pytest.raises(NoCapacity) as refused:
        world.rent(kind="job")
    assert refused.value.details["offer_to_wait"] is True
    assert "no end" not in refused.value.message
    assert "send `wait`" in refused.value.message
