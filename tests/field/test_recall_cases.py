"""Field cases R1, R3 and R4: notices that keep their time, whole plans, one live run."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from itertools import pairwise

from sublet.rehearsal import World
from sublet.shops.compute import Reason

Worlds = Callable[..., World]


def seconds(n: float) -> timedelta:
    return timedelta(seconds=n)


def test_r1_the_promise_is_running_time(worlds: Worlds) -> None:
    """Notice 120: one loop dies of SIGTERM at T0 + 120, one that traps it is killed at + 150."""
    world = worlds(devices_per_node=2, head_room_percent=0)
    buyer = world.sign_up()
    loop = "while sleep 1; do date +%s; done"
    meek = buyer.job("sh", "-c", loop, requeue=False)
    stubborn = buyer.job("sh", "-c", f"trap '' TERM; {loop}", requeue=False)
    world.run_for(900)
    world.owner.recall(2)
    world.run_for(1)
    for job in (meek, stubborn):
        run = buyer.run(job)
        live = world.engine.run(run.id)
        assert buyer.state(job) == "interrupting"
        assert live.notice is not None, "metadata answers 200"
        assert live.notice.reason == "owner_recall"
        assert live.term_at is None, "no signal unless asked for"
        assert b"SIG" not in live.log
        assert run.published_at is not None
        assert live.deadline_at == run.published_at + seconds(120)
    world.run_for(200)
    for job, kill_after in ((meek, 0), (stubborn, 30)):
        run = buyer.run(job)
        seen = world.engine.run(run.id)
        assert run.published_at is not None
        assert seen.term_at == run.published_at + seconds(120)
        assert seen.ended_at == seen.term_at + seconds(kill_after)
        assert run.gone_at is not None
        assert run.gone_at <= run.published_at + seconds(152)
        meter = buyer.meter(job)
        assert meter is not None
        assert meter.closed_at == seen.term_at, "we ended it: billed to SIGTERM"
    assert buyer.run(stubborn).exit_code == 137


def test_r1_the_signal_that_was_asked_for_comes_at_the_notice(worlds: Worlds) -> None:
    world = worlds(devices_per_node=1, head_room_percent=0)
    buyer = world.sign_up()
    job = buyer.job("sleep", "9000", notice_signal="SIGUSR1")
    world.run_for(900)
    world.owner.recall(1)
    world.run_for(1)
    live = world.engine.run(buyer.run(job).id)
    assert live.log.decode() == "SIGUSR1\n"
    assert live.term_at is None


def test_r3_one_need_one_notice_and_no_more_than_it_takes(worlds: Worlds) -> None:
    """8 devices, one organisation: A on-demand 4, B spot 2, C spot 2."""
    world = worlds(devices_per_node=8, head_room_percent=0, audit_every=20)
    buyer = world.sign_up("Acme", "10000")
    a = buyer.rent("gpu-on-demand-4")
    b, c = buyer.rent("gpu-spot-2"), buyer.rent("gpu-spot-2")
    world.run_for(7200)
    by = world.now + seconds(3600 + 1800)

    two = world.owner.plan(2, by=by)
    victims = [victim for row in two.rows for victim in row.victims]
    assert len(victims) == 1
    assert victims[0].workload_id in (b.id, c.id)
    four = world.owner.plan(4, by=by)
    victims = [victim for row in four.rows for victim in row.victims]
    assert {victim.workload_id for victim in victims} == {b.id, c.id}
    assert four.shortfall_devices == 0
    soon = world.owner.plan(8, by=world.now + seconds(600))
    assert {v.workload_id for row in soon.rows for v in row.victims} == {b.id, c.id}
    assert soon.shortfall_devices == 4, "nobody gets notice for what cannot be delivered"
    assert soon.shortfall_earliest_at == world.now + seconds(3600 + 90)

    world.owner.accept(four)
    world.run_until(by)
    assert world.owner.look(four).state == "delivered"
    assert not world.owner.look(four).is_late
    assert buyer.state(a) == "running"
    for workload in (b, c):
        assert buyer.path(workload).count("interrupting") == 1, "one notice"
        run = buyer.run(workload)
        assert run.t0 is not None
        assert run.t0 >= by - seconds(211), "at the last responsible moment"
    assert buyer.path(a).count("interrupting") == 0


def test_r4_at_most_one_live_run(worlds: Worlds) -> None:
    """The job ignores SIGTERM, and devices are free while it is in its grace: overlap 0 s."""
    world = worlds(devices_per_node=2, head_room_percent=0)
    buyer = world.sign_up()
    job = buyer.job("sh", "-c", "trap '' TERM; sleep 90000")
    world.run_for(900)
    recall = world.owner.recall(2)
    world.run_for(125)
    assert buyer.state(job) == "stopping"
    world.owner.cancel(recall)
    world.run_for(10)
    assert len(buyer.runs(job)) == 1, "a device is free, and it is not run twice"
    world.run_for(60)
    first, second = (world.engine.run(run.id) for run in buyer.runs(job))
    assert first.term_at is not None
    assert first.ended_at == first.term_at + seconds(30)
    assert second.started_at is not None
    assert second.started_at >= first.ended_at
    assert buyer.state(job) == "running"


def test_r4_interruptions_never_eat_the_retries(worlds: Worlds) -> None:
    """Preempted eight times with `max_retries` 3: still queued, and it starts again."""
    world = worlds(devices_per_node=1, head_room_percent=0, audit_every=5)
    buyer = world.sign_up()
    job = buyer.job("sh", "-c", "trap '' TERM; sleep 900000", max_retries=3)
    for number in range(1, 9):
        world.run_for(700)
        assert buyer.state(job) == "running"
        recall = world.owner.recall(1)
        world.run_for(300)
        assert buyer.state(job) == "awaiting_capacity"
        assert world.owner.look(recall).state == "delivered"
        assert len(buyer.runs(job)) == number
        world.owner.give_back(recall)
    world.run_for(60)
    runs = buyer.runs(job)
    assert buyer.state(job) == "running"
    assert buyer.see(job).retries == 0
    assert [run.reason for run in runs[:-1]] == [Reason.OWNER_RECALL] * 8
    lives = [
        (world.engine.run(run.id).started_at, world.engine.run(run.id).ended_at) for run in runs
    ]
    for (_, ended_at), (started_at, _) in pairwise(lives):
        assert ended_at is not None
        assert started_at is not None
        assert ended_at <= started_at, "overlap 0 s"
