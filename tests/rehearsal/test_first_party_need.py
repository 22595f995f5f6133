"""First-party work on a full cloud: a notice for it, as few as it takes, and none for nothing."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest

from sublet.rehearsal import World
from sublet.shops.compute import Reason


@pytest.fixture
def world() -> Iterator[World]:
    with World(1, devices_per_node=2, head_room_percent=0, audit_every=5) as made:
        yield made
        made.audit()


def test_urgent_work_starts_within_the_promise(world: World) -> None:
    buyer = world.sign_up()
    pair = [buyer.rent("gpu-spot", notice=120) for _ in range(2)]
    world.run_for(900)
    job = world.owner.job("sleep", "600")
    world.run_for(1)
    (told,) = [w for w in pair if buyer.state(w) == "interrupting"]
    assert buyer.see(told).reason is Reason.OWNER_RECALL
    world.run_for(150)
    started_at = world.owner.run(job).started_at
    assert started_at is not None
    assert timedelta(seconds=120) <= started_at - job.created_at <= timedelta(seconds=210)
    assert world.owner.shortfalls() == []
    assert buyer.state(told) == "stopped"
    assert [buyer.state(w) for w in pair].count("running") == 1


def test_slower_spot_leaves_late_and_the_shortfall_says_so(world: World) -> None:
    buyer = world.sign_up()
    pair = [buyer.rent("gpu-spot", notice=600) for _ in range(2)]
    world.run_for(900)
    job = world.owner.job("sleep", "600")
    (short,) = world.owner.shortfalls()
    assert (short.devices, short.needed_at) == (1, job.created_at + timedelta(seconds=210))
    assert short.earliest_at == job.created_at + timedelta(seconds=690)
    world.run_for(1)
    assert [buyer.state(w) for w in pair].count("interrupting") == 1
    world.run_for(690)
    assert world.owner.state(job) == "running"
    (short,) = world.owner.shortfalls()
    assert short.ended_at is not None


def test_quick_spot_is_told_at_its_last_responsible_moment(world: World) -> None:
    buyer = world.sign_up()
    for _ in range(2):
        buyer.rent("gpu-spot", notice=30)
    world.run_for(900)
    world.owner.job("sleep", "600")
    world.run_for(85)
    assert [w for w in buyer.workloads() if w.state == "interrupting"] == []
    world.run_for(10)
    (told,) = [w for w in buyer.workloads() if w.state == "interrupting"]
    run = buyer.run(told)
    assert run.t0 is not None
    # 210 s of promise less notice 30, grace 30 and scrub 60.
    assert abs(run.t0 - world.start - timedelta(seconds=900 + 90)) < timedelta(seconds=2)


def test_what_was_sold_firm_is_not_told_but_by_a_recall(world: World) -> None:
    buyer = world.sign_up()
    pair = [buyer.rent("gpu-on-demand") for _ in range(2)]
    world.run_for(7200)
    world.owner.job("sleep", "600")
    world.run_for(600)
    assert [buyer.state(w) for w in pair] == ["running", "running"]
    (short,) = world.owner.shortfalls()
    assert short.ended_at is None
    assert short.earliest_at is not None


def test_a_notice_is_withdrawn_when_something_else_leaves(world: World) -> None:
    buyer = world.sign_up()
    pair = [buyer.rent("gpu-spot", notice=120) for _ in range(2)]
    world.run_for(900)
    job = world.owner.job("sleep", "600")
    world.run_for(5)
    (told,) = [w for w in pair if buyer.state(w) == "interrupting"]
    (other,) = [w for w in pair if w is not told]
    buyer.stop(other)
    world.run_for(10)
    assert world.owner.state(job) == "running"
    assert buyer.state(told) == "running"
    assert world.engine.run(buyer.run(told).id).notice is None
    world.run_for(300)
    assert buyer.state(told) == "running"


def test_a_notice_stands_if_its_place_was_sold_again(world: World) -> None:
    """The need went away, but a buyer has been promised the device by then."""
    buyer = world.sign_up()
    pair = [buyer.rent("gpu-spot", notice=120) for _ in range(2)]
    world.run_for(900)
    job = world.owner.job("sleep", "600")
    world.run_for(5)
    (told,) = [w for w in pair if buyer.state(w) == "interrupting"]
    world.owner.end(job)
    waiting = buyer.rent("gpu-on-demand")
    assert waiting.state == "provisioning"
    world.run_for(300)
    assert buyer.state(waiting) == "running"
    assert [buyer.state(w) for w in pair].count("running") == 1
    assert buyer.path(told).count("interrupting") <= 2
