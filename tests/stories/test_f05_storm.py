"""F5 Recall storm: a hundred first-party one-device jobs in ten seconds, then sixty cancelled."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from sublet.rehearsal import World
from sublet.shops.compute import Reason

Worlds = Callable[..., World]
NODES, SIZE = 14, 8
GANG = 8


@pytest.mark.slow
def test_f5_a_hundred_jobs_and_sixty_cancelled(worlds: Worlds) -> None:
    world = worlds(
        nodes=NODES, devices_per_node=SIZE, head_room_percent=0, audit_every=60, start_seconds=1.0
    )
    buyers = [world.sign_up(f"buyer{n}", "5000") for n in range(4)]
    gang = buyers[0].rent("gpu-spot-8", notice=120)
    singles = [
        (buyers[n % 4], buyers[n % 4].rent("gpu-spot", notice=120))
        for n in range(NODES * SIZE - GANG)
    ]
    world.run_for(900)
    assert all(buyer.state(single) == "running" for buyer, single in singles)

    began_at = world.now
    own = []
    for _ in range(10):
        own += [world.owner.job("sleep", "3600") for _ in range(10)]
        world.run_for(1)
    noticed = [(b, w) for b, w in singles if b.state(w) == "interrupting"]
    assert len(noticed) == 100, "as many as are needed, none more"
    assert buyers[0].state(gang) == "running", "no gang is broken while singles exist"
    assert all(buyer.see(w).reason == Reason.OWNER_RECALL for buyer, w in noticed)
    assert all(buyer.run(w).t0 is not None for buyer, w in noticed)

    for job in own[:60]:
        world.owner.end(job)
    world.run_for(1)
    still = [(b, w) for b, w in noticed if b.state(w) == "interrupting"]
    assert len(still) == 40, "notices no longer needed are withdrawn"
    for buyer, workload in noticed:
        live = world.engine.run(buyer.run(workload).id)
        is_told = live.notice is not None
        assert is_told == ((buyer, workload) in still), "and the consumer is told"
        assert live.term_at is None

    world.run_until(began_at + timedelta(seconds=240))
    assert all(world.owner.state(job) == "running" for job in own[60:])
    ended = [(b, w) for b, w in singles if b.state(w) == "stopped"]
    assert sorted(w.id for _, w in ended) == sorted(w.id for _, w in still)
    assert buyers[0].state(gang) == "running"
    for buyer, workload in singles:
        assert buyer.path(workload).count("interrupting") <= 1, "noticed once"
    for buyer, workload in ended:
        run = buyer.run(workload)
        assert run.published_at is not None
        assert run.term_at is not None
        assert run.term_at - run.published_at >= timedelta(seconds=120)
    # Within the pool's promise for each: notice, grace and scrub, 210 s.
    for job in own[60:]:
        started_at = world.owner.run(job).started_at
        assert started_at is not None
        assert started_at - job.created_at <= timedelta(seconds=210 + 2)
    assert world.owner.shortfalls() == []


def test_f5_a_withdrawn_notice_is_not_repeated_within_ten_minutes(worlds: Worlds) -> None:
    world = worlds(nodes=1, devices_per_node=2, head_room_percent=0)
    buyer = world.sign_up()
    pair = [buyer.rent("gpu-spot", notice=120) for _ in range(2)]
    world.run_for(900)
    job = world.owner.job("sleep", "600")
    world.run_for(10)
    (told,) = [w for w in pair if buyer.state(w) == "interrupting"]
    world.owner.end(job)
    world.run_for(5)
    assert buyer.state(told) == "running"
    assert world.engine.run(buyer.run(told).id).notice is None
    world.owner.job("sleep", "600")
    world.run_for(10)
    (other,) = [w for w in pair if buyer.state(w) == "interrupting"]
    assert other.id != told.id
