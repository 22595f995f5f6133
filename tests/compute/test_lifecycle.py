from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from sublet.base.kernel.errors import Invalid, NoCapacity, Stale
from sublet.base.kernel.money import Money
from sublet.shops import compute

Make = Callable[..., Any]


def test_the_first_start_needs_one_step_and_opens_the_meter_where_the_engine_says(
    make_world: Make,
) -> None:
    world = make_world(start_seconds=0)
    instance = world.rent()
    assert world.state(instance) == "provisioning"
    world.loop.step(world.now)
    assert world.state(instance) == "running"
    run = world.last(instance)
    assert world.meter(run).opened_at == run.started_at == world.now
    assert world.path(instance) == ["pending", "provisioning", "running"]


def test_a_job_is_billed_from_its_start_to_its_exit(world: Any) -> None:
    job = world.job("sleep", "600")
    world.run(700)
    assert world.see(job).state is compute.State.COMPLETED
    assert world.see(job).exit_code == 0
    run = world.last(job)
    meter = world.meter(run)
    assert (meter.opened_at, meter.closed_at) == (world.at(1), world.at(601))
    assert run.state is compute.RunState.SCRUBBED
    price = world.contract(job).price_micros
    assert world.posted(job) == round(price * 600 / 3600)
    assert world.hold(job) is None
    assert world.free() == 2


def test_device_time_is_named_to_the_millisecond(world: Any) -> None:
    world.job("sleep", "600")
    world.run(1000)
    uses = world.uses(world.at(0), world.at(1000))
    assert uses["sold_used"] == 600_000
    assert sum(uses.values()) == 2_000_000
    assert 1_000 <= uses["overhead"] <= 3_000
    assert set(uses) == {"sold_used", "overhead", "idle"}


def test_a_stopped_instance_holds_nothing_and_starts_again_elsewhere(make_world: Make) -> None:
    world = make_world(devices=1)
    first = world.rent()
    world.run(60)
    answer = world.stop(first)
    assert answer.still_costs_per_hour == Money(0)
    assert "files are kept" in answer.explanation
    world.run(60)
    assert world.see(first).state is compute.State.STOPPED
    assert world.see(first).claim_id is None
    assert world.hold(first) is None
    run = world.last(first)
    assert world.meter(run).closed_at == run.exited_at == world.at(60)
    second = world.rent(who=world.other)
    world.run(10)
    with pytest.raises(NoCapacity) as refused:
        world.act(compute.start, world.buyer, first.id)
    assert refused.value.details["earliest_at"] is None
    assert refused.value.details["offer_to_wait"]
    waiting = world.act(compute.start, world.buyer, first.id, wait=True)
    assert waiting.state is compute.State.AWAITING_CAPACITY
    assert world.hold(first) is None
    world.run(300)
    assert world.state(first) == "awaiting_capacity"
    with world.books.work(world.other.actor()) as work:
        compute.stop(work, world.other, second.id)
    world.run(40)
    assert world.state(first) == "running"
    assert [run.number for run in world.runs(first)] == [1, 2]
    assert world.engine.erased_homes == []


def test_the_last_device_is_refused_with_a_way_on_or_waited_for(make_world: Make) -> None:
    world = make_world(devices=1)
    job = world.job("sleep", "100", max_run_seconds=3600)
    with pytest.raises(NoCapacity) as refused:
        world.job("sleep", "5", who=world.other)
    assert refused.value.code == "insufficient_capacity"
    waiting = world.job("sleep", "5", who=world.other, wait=True)
    assert waiting.state is compute.State.AWAITING_CAPACITY
    assert waiting.waiting_since == world.now
    world.run(150)
    assert world.state(job) == "completed"
    assert world.state(waiting) == "completed"
    assert world.last(waiting).intended_at <= world.last(job).gone_at + timedelta(seconds=2)


def test_waiters_are_served_by_rank_then_age(make_world: Make) -> None:
    world = make_world(devices=1)
    world.rent(offer="gpu-on-demand", kind="job", command=("sleep", "1000"))
    world.run(5)
    spot = world.job("sleep", "10", wait=True)
    world.run(1)
    later = world.job("sleep", "10", wait=True)
    world.run(1)
    firm = world.job("sleep", "10", offer="gpu-on-demand", wait=True)
    world.until(1100)
    order = sorted((world.last(job).started_at, job.id) for job in (spot, later, firm))
    assert [job_id for _, job_id in order] == [firm.id, spot.id, later.id]


def test_a_job_is_retried_on_its_own_failure_as_often_as_allowed(world: Any) -> None:
    job = world.job("sh", "-c", "sleep 5; exit 3", max_retries=2)
    world.run(60)
    seen = world.see(job)
    assert (seen.state, seen.retries, seen.exit_code) == (compute.State.FAILED, 2, 3)
    assert [run.exit_code for run in world.runs(job)] == [3, 3, 3]


def test_a_job_ends_at_the_end_that_was_agreed(world: Any) -> None:
    job = world.job("sleep", "900", max_run_seconds=300, grace=10)
    world.run(400)
    assert world.see(job).state is compute.State.FAILED
    assert world.see(job).reason is compute.Reason.BLOCK_END
    run = world.last(job)
    assert world.at(300) <= run.term_at <= world.at(301)
    assert world.meter(run).closed_at == run.term_at


def test_cancel_ends_a_job_wherever_it_stands(make_world: Make) -> None:
    world = make_world(devices=1)
    job = world.job("sleep", "900")
    waiting = world.job("sleep", "900", wait=True)
    world.act(compute.cancel, world.buyer, waiting.id)
    assert world.state(waiting) == "terminated"
    world.run(30)
    world.act(compute.cancel, world.buyer, job.id)
    assert world.state(job) == "stopping"
    world.run(5)
    assert world.state(job) == "terminated"
    assert world.meter(world.last(job)).closed_at == world.at(30)
    assert world.act(compute.cancel, world.buyer, job.id).state is compute.State.TERMINATED


def test_what_is_stopped_before_it_was_handed_over_is_free(make_world: Make) -> None:
    world = make_world(start_seconds=50)
    instance = world.rent()
    world.run(10)
    world.stop(instance)
    world.run(10)
    assert world.state(instance) == "stopped"
    assert world.find_meter(world.last(instance)) is None
    assert world.posted(instance) == 0
    assert world.last(instance).state is compute.RunState.FAILED


def test_a_terminated_instance_loses_its_files_and_its_contract(world: Any) -> None:
    instance = world.rent()
    world.run(10)
    world.act(compute.terminate, world.buyer, instance.id)
    world.run(700)
    assert world.state(instance) == "terminated"
    assert world.engine.erased_homes == [instance.id]
    with pytest.raises(compute.WrongState):
        world.act(compute.start, world.buyer, instance.id)


def test_logs_and_files_of_a_job_are_kept_a_week(world: Any) -> None:
    job = world.job("sh", "-c", "echo done")
    world.run(60)
    run = world.last(job)
    assert world.engine.logs(run.id)[0] == b"done\n"
    world.clock.advance_to(world.now + timedelta(days=7, minutes=30))
    world.step()
    assert run.id not in world.engine.observe()
    assert world.engine.erased_homes == [job.id]


def test_a_change_needs_the_version_that_was_read(world: Any) -> None:
    instance = world.see(world.rent())
    changed = world.act(
        compute.change, world.buyer, instance.id, version=instance.version, auto_resume=True
    )
    assert changed.spec.auto_resume
    assert changed.version == instance.version + 1
    with pytest.raises(Stale):
        world.act(compute.change, world.buyer, instance.id, version=instance.version, name="x")
    with pytest.raises(Invalid):
        world.act(compute.change, world.buyer, instance.id, version=changed.version, command=("x",))


def test_another_organisations_workload_does_not_exist(world: Any) -> None:
    instance = world.rent()
    with pytest.raises(compute.WorkloadNotFound):
        world.act(compute.stop, world.other, instance.id)


def test_the_quote_fixes_the_grace(world: Any) -> None:
    with pytest.raises(Invalid) as refused:
        world.job("sleep", "5", grace=30, stop_grace_seconds=60)
    assert refused.value.param == "stop_grace_seconds"


def test_the_owners_own_job_is_first_party_and_credited(world: Any) -> None:
    job = world.job("sleep", "100", who=world.owner)
    world.run(200)
    assert world.state(job) == "completed"
    assert world.see(job).party == "first_party"
    assert world.uses(world.at(0), world.at(200))["first_party"] == 100_000
    assert world.posted(job) > 0
    assert world.posted(job) == -world.posted(job, "first_party_credit")
