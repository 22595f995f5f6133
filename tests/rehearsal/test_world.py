"""A world is the cloud: it repeats with its seed, it is watched, and it breaks off aloud."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa

from sublet.capacity import fleet
from sublet.capacity.engines.simulated import FaultKind
from sublet.records import ledger
from sublet.records.ledger.store import accounts
from sublet.rehearsal import Broken, World, play
from sublet.rehearsal.line import ControlPlaneDied


def history(seed: int) -> list[tuple[str, str, str]]:
    with World(seed, devices_per_node=2, start_jitter=1.0, lag_seconds=1.0) as world:
        buyer = world.sign_up()
        jobs = [buyer.job("sleep", str(n * 10), wait=True) for n in range(4)]
        world.run_for(120)
        return [
            (run.id, str(run.started_at), str(run.exited_at))
            for job in jobs
            for run in buyer.runs(job)
        ]


def test_one_seed_is_one_history_and_another_is_another() -> None:
    assert history(7) == history(7)
    assert history(7) != history(8)


def test_a_broken_invariant_stops_it_with_seed_instant_and_what_came_before() -> None:
    with World(42) as world:
        buyer = world.sign_up("Acme")
        buyer.rent("gpu-spot")
        world.run_for(5)
        with world.store.engine.begin() as tx:
            tx.execute(
                accounts.update()
                .where(accounts.c.name == ledger.customer_account(buyer.organisation_id))
                .values(balance_micros=-1)
            )
        with pytest.raises(Broken) as broken:
            world.run_for(60)
    assert broken.value.seed == 42
    assert broken.value.at == world.now
    assert "credit_is_never_negative" in {v.name for v in broken.value.violations}
    assert "seed 42" in str(broken.value)
    assert "Acme signs up" in str(broken.value)


def test_a_loop_that_fails_stops_it() -> None:
    with World(1) as world:
        world.sign_up().rent("gpu-spot")
        with world.store.engine.begin() as tx:
            tx.execute(sa.text("drop table metering_meter"))
        with pytest.raises(Broken) as broken:
            world.run_for(10)
    assert broken.value.violations[0].name == "loops_do_not_fail"


def test_nothing_happens_without_time() -> None:
    with World(1) as world:
        workload = world.sign_up().rent("gpu-spot")
        assert world.engine.live_runs() == []
        assert workload.state == "provisioning"


def test_after_a_kill_the_same_metal_meets_a_new_control_plane() -> None:
    with World(1) as world:
        buyer = world.sign_up()
        workload = buyer.rent("gpu-spot")
        world.run_for(10)
        before, store = world.engine.live_runs()[0], world.store
        world.restart()
        assert world.store is not store
        world.run_for(60)
        assert world.engine.live_runs() == [before]
        assert buyer.state(workload) == "running"


def test_a_kill_is_caught_by_nobody_but_the_world() -> None:
    assert not issubclass(ControlPlaneDied, Exception)
    with World(1) as world:
        buyer = world.sign_up()
        buyer.rent("gpu-spot")
        world.line.cut("start", "before")
        world.run_for(10)
        assert world.restarts == 1
        assert len(world.engine.live_runs()) == 1


def test_the_control_plane_may_sleep_for_days() -> None:
    with World(1, audit_every=10) as world:
        buyer = world.sign_up()
        job = buyer.job("sleep", "300")
        world.run_for(10)
        started_at = buyer.run(job).started_at
        assert started_at is not None
        world.sleep_until(world.now + timedelta(days=3))
        world.run_for(60)
        meter = buyer.meter(job)
        assert meter is not None
        assert buyer.state(job) == "completed"
        assert meter.closed_at == started_at + timedelta(seconds=300)


def test_a_silent_node_bills_to_its_last_evidence() -> None:
    with World(1, nodes=2, devices_per_node=1) as world:
        buyer = world.sign_up()
        workload = buyer.rent("gpu-on-demand")
        world.run_for(300)
        node = world.engine.run(buyer.run(workload).id).node
        silent_at = world.now
        world.engine.silence(node, 100_000)
        world.run_for(300)
        meter = buyer.meter(workload)
        assert meter is not None
        assert meter.metered_to <= silent_at
        with world.work() as work:
            for state in ("cordoned", "triage", "repair"):
                fleet.set_node_state(work, world.node_ids[node], state, "silent")
        world.run_for(60)
        assert buyer.state(workload) == "stopped"
        meter = buyer.meter(workload)
        assert meter is not None
        assert meter.closed_at is not None
        assert meter.closed_at <= silent_at


@pytest.mark.parametrize("kind", list(FaultKind))
def test_each_fault_by_itself_ends_well(kind: FaultKind) -> None:
    with World(3, nodes=2, devices_per_node=1, start_seconds=2.0) as world:
        buyer = world.sign_up()
        workload = buyer.job("sleep", "120", max_retries=2, wait=True)
        world.run_for(1)
        run = world.engine.live_runs()[0]
        target = (
            run.spec.devices[0] if kind in (FaultKind.DIRTY, FaultKind.DEVICE_LOST) else run.node
        )
        match kind:
            case FaultKind.SILENCE:
                world.engine.silence(target, 90)
            case FaultKind.DEVICE_LOST:
                world.engine.lose_device(target, 200)
            case FaultKind.DIRTY:
                world.engine.dirty(target, 60)
            case FaultKind.REBOOT:
                world.engine.reboot(target)
            case _:
                buyer.end(workload)
                world.run_for(60)
                for node in world.node_ids:
                    world.engine.fail_next_start(node, kind)
                workload = buyer.job("sleep", "120", max_retries=2)
        world.run_for(1200)
        assert buyer.state(workload) == "completed"
        assert buyer.balance == 1_000_000_000 - buyer.posted(workload)
        assert world.engine.live_runs() == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_random_players_break_nothing(seed: int) -> None:
    """Two virtual hours each, dense with acts, faults and kills; the auditor at every 10th change."""
    report = play(
        seed,
        days=2 / 24,
        acts_an_hour=60,
        faults_per_node_day=24,
        crashes_a_day=48,
        audit_every=10,
    )
    assert report.workloads > 5
    assert report.audits > 5
    assert sum(report.device_ms.values()) == report.devices * report.virtual_ms


@pytest.mark.slow
def test_a_play_repeats() -> None:
    one = play(5, days=1 / 24, acts_an_hour=60, faults_per_node_day=24, crashes_a_day=48)
    two = play(5, days=1 / 24, acts_an_hour=60, faults_per_node_day=24, crashes_a_day=48)
    assert one == two
    assert one.speed > 1


@pytest.mark.soak
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("first", range(1000, 1200, 10))
def test_random_players_for_days(first: int) -> None:
    """200 seeds of six dense virtual hours, and a calm virtual day for every tenth."""
    for seed in range(first, first + 10):
        play(
            seed,
            days=0.25,
            acts_an_hour=60,
            faults_per_node_day=24,
            crashes_a_day=48,
            audit_every=10,
        )
    play(first, days=1.0, nodes=16, acts_an_hour=30)
