"""Recalls among other sales: what was promised to one is not taken from another."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest

from sublet.base.kernel.errors import Invalid
from sublet.capacity import fleet
from sublet.rights import owner
from sublet.rights.owner import PlanStale, Recall, RecallState


def plan(world: Any, count: int = 1, *, by: datetime | None = None, devices: int = 1) -> Recall:
    with world.books.work(world.owner.actor()) as work:
        return owner.plan_recall(
            work,
            world.owner,
            pool_id=world.pool_id,
            devices=devices,
            count=count,
            by=by,
            until=None,
        )


def accept(world: Any, planned: Recall) -> Recall:
    with world.books.work(world.owner.actor()) as work:
        return owner.accept_recall(work, planned.id)


def cancel(world: Any, recall: Recall) -> Recall:
    with world.books.work(world.owner.actor()) as work:
        return owner.cancel_recall(work, recall.id)


def see(world: Any, recall: Recall) -> Recall:
    with world.books.read() as tx:
        return owner.get_recall(tx, recall.id)


def test_two_plans_on_one_victim_are_one_recall(make_world: Any) -> None:
    world = make_world(devices=1)
    world.rent()
    world.run(20)
    by = world.now + timedelta(seconds=600)
    first, second = plan(world, by=by), plan(world, by=by)
    accept(world, first)
    with pytest.raises(PlanStale):
        accept(world, second)
    again = plan(world, by=by)
    assert (again.rows, again.shortfall_devices) == ((), 1)
    world.run(900)
    assert see(world, first).state is RecallState.DELIVERED
    assert not see(world, first).is_late


def test_a_cancelled_recall_leaves_the_notice_that_a_sale_relies_on(make_world: Any) -> None:
    world = make_world(devices=2)
    pair = world.rent(offer="gpu-spot-2")
    world.run(700)
    recall = accept(world, plan(world))
    world.step()
    assert world.state(pair) == "interrupting"
    firm = world.rent(offer="gpu-on-demand", who=world.other)
    cancel(world, recall)
    world.run(600)  # A sale of higher rank begins at an edge of the book's five minutes.
    assert world.state(firm) == "running"
    assert world.state(pair) == "stopped"


def test_a_cancelled_recall_without_anybody_behind_it_takes_its_notice_back(
    make_world: Any,
) -> None:
    world = make_world(devices=1)
    box = world.rent()
    world.run(700)
    recall = accept(world, plan(world))
    world.step()
    assert world.state(box) == "interrupting"
    assert cancel(world, recall).state is RecallState.CANCELLED
    world.run(300)
    assert world.state(box) == "running"


def test_a_cancelled_recall_leaves_the_notice_that_the_owners_job_needs(make_world: Any) -> None:
    world = make_world(devices=1)
    box = world.rent()
    world.run(700)
    recall = accept(world, plan(world))
    world.step()
    job = world.rent(kind="job", who=world.owner)
    asked = world.now
    world.step()
    cancel(world, recall)
    world.run(200)
    assert world.state(box) == "stopped"
    started = world.last(job).started_at
    assert started is not None
    assert started - asked <= timedelta(seconds=160)


def test_an_early_hand_over_leaves_the_notice_that_a_sale_relies_on(make_world: Any) -> None:
    world = make_world(devices=3)
    pair = world.rent(offer="gpu-spot-2", notice=600)
    slow = world.rent(notice=3600)
    world.run(700)
    recall = accept(world, plan(world))
    world.step()
    assert (world.state(pair), world.state(slow)) == ("interrupting", "running")
    firm = world.rent(offer="gpu-on-demand", who=world.other)
    world.stop(slow)
    world.run(60)
    assert see(world, recall).state is RecallState.DELIVERED
    world.run(900)
    assert world.state(firm) == "running"


def test_a_plan_whose_lead_has_grown_is_stale(make_world: Any) -> None:
    """Before its meter opens a run may go at once; afterwards it has its notice."""
    world = make_world(devices=1)
    world.rent()
    planned = plan(world)
    world.run(10)
    with pytest.raises(PlanStale):
        accept(world, planned)


def test_over_several_nodes_a_recall_is_for_single_devices_or_whole_nodes(make_world: Any) -> None:
    world = make_world(nodes=2, devices=4)
    with pytest.raises(Invalid) as refused:
        plan(world, devices=2)
    assert refused.value.param == "devices"
    for _ in range(2):
        world.rent()
    world.run(20)
    recall = accept(world, plan(world, devices=4))
    world.run(300)
    found = see(world, recall)
    assert found.state is RecallState.DELIVERED
    with world.books.read() as tx:
        devices = fleet.list_devices(tx, world.pool_id)
    assert len({d.node_id for d in devices if d.id in found.rows[-1].device_ids}) == 1
