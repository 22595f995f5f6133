from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from sublet.base.kernel.ids import seeded_rng
from sublet.capacity import allocation, fleet
from sublet.capacity.engines.port import EngineError, Phase
from sublet.capacity.engines.simulated import Fault, FaultKind, seeded_faults
from sublet.capacity.fleet import NodeState
from sublet.rights import market
from sublet.shops import compute

Make = Callable[..., Any]
FOREVER = {"SIM_SECONDS": "inf"}


def look_at_devices(world: Any) -> None:
    """What the app's fleet loop does."""
    for inventory in world.engine.inventories():
        world.act(fleet.look, world.nodes[inventory.node], inventory)


def test_a_crash_between_start_and_its_record_gives_one_run(world: Any) -> None:
    instance = world.rent()
    start = world.engine.start

    def die_after(spec: Any) -> None:
        start(spec)
        raise SystemExit

    world.engine.start = die_after
    with pytest.raises(SystemExit):
        world.loop.step(world.now)
    world.engine.start = start
    assert world.last(instance).state is compute.RunState.INTENDED
    world.clock.advance_to(world.at(50))
    world.restart()
    world.run(10)
    assert world.state(instance) == "running"
    assert len(world.engine.live_runs()) == 1
    assert world.meter(world.last(instance)).opened_at == world.at(1)
    assert len(world.runs(instance)) == 1


def test_a_start_said_to_have_failed_that_runs_is_adopted_at_once(world: Any) -> None:
    world.engine.fail_next_start("n0001", FaultKind.START_ANSWER_LOST)
    job = world.job("sleep", "100")
    world.loop.step(world.now)
    assert world.last(job).state is compute.RunState.STARTING
    world.run(200)
    assert world.state(job) == "completed"
    assert len(world.runs(job)) == 1


def test_a_run_that_the_books_closed_is_ended_and_never_billed(make_world: Make) -> None:
    world = make_world(nodes=2, devices=1)
    start, hidden = world.engine.start, []

    def start_unseen(spec: Any) -> None:
        if not hidden or spec.run_id == hidden[0].run_id:
            hidden.append(spec)
            raise EngineError("no answer")
        start(spec)

    world.engine.start = start_unseen
    job = world.job(env=FOREVER)
    world.run(30)
    assert world.state(job) == "running"
    first = world.runs(job)[0]
    assert first.state is compute.RunState.FAILED
    world.engine.start = start
    world.act(compute.cancel, world.buyer, job.id)
    world.run(10)
    start(hidden[0])
    world.run(30)
    assert world.engine.run(first.id).scrubbed
    assert world.find_meter(first) is None
    assert world.engine.live_runs() == []


def test_a_workload_that_never_starts_is_given_up_unbilled(make_world: Make) -> None:
    world = make_world(nodes=3)
    for node in world.nodes:
        for _ in range(3):
            world.engine.fail_next_start(node)
    job = world.job(env=FOREVER)
    world.run(60)
    seen = world.see(job)
    assert seen.state is compute.State.FAILED
    assert seen.failure == "the sandbox did not come up"
    assert (seen.start_failures, seen.retries) == (3, 0)
    assert world.posted(job) == 0
    assert world.hold(job) is None


def test_a_node_that_fails_every_start_is_taken_out(make_world: Make) -> None:
    world = make_world(nodes=1)
    for _ in range(3):
        world.engine.fail_next_start("n0001")
    world.job(env=FOREVER)
    world.run(60)
    with world.books.read() as tx:
        assert fleet.get_node(tx, world.nodes["n0001"]).state is NodeState.TRIAGE


def test_a_silent_node_bills_to_its_last_evidence_and_comes_back_once(make_world: Make) -> None:
    world = make_world(nodes=2, devices=1)
    job = world.job(env=FOREVER, requeue=True)
    world.run(100)
    run = world.last(job)
    node = world.engine.run(run.id).node
    world.engine.silence(node, 500)
    world.run(400)
    assert world.state(job) == "running"
    assert world.meter(run).metered_to <= world.at(100)
    assert len(world.runs(job)) == 1
    world.run(200)
    assert world.meter(run).metered_to > world.at(600)
    assert len(world.runs(job)) == 1


def test_a_fenced_node_frees_its_workload_for_another(make_world: Make) -> None:
    world = make_world(nodes=2, devices=1)
    job = world.job(env=FOREVER)
    world.run(100)
    run = world.last(job)
    node = world.engine.run(run.id).node
    world.engine.silence(node, 5000)
    world.run(100)
    for state in (NodeState.TRIAGE, NodeState.REPAIR):
        world.act(fleet.set_node_state, run.node_id, state, "power off")
    world.run(30)
    first, second = world.runs(job)
    assert first.reason is compute.Reason.NODE_FAULT
    assert world.meter(first).closed_at <= world.at(100)
    assert second.node_id != first.node_id
    assert world.state(job) == "running"
    world.engine.end_silence(node)
    world.run(30)
    assert [r.spec.run_id for r in world.engine.live_runs()] == [second.id]


def test_a_reboot_ends_at_the_last_evidence(world: Any) -> None:
    job = world.job(env=FOREVER)
    world.run(100)
    world.engine.reboot("n0001")
    world.run(30)
    first, second = world.runs(job)
    assert world.meter(first).closed_at == world.at(100)
    assert first.reason is compute.Reason.NODE_FAULT
    assert second.state is compute.RunState.RUNNING
    assert world.see(job).retries == 0


def test_a_lost_device_ends_what_ran_on_it_and_a_blip_does_not(make_world: Make) -> None:
    world = make_world(nodes=2, devices=1)
    job = world.job(env=FOREVER)
    world.run(30)
    device = world.last(job).devices[0]
    world.engine.lose_device(device)
    look_at_devices(world)
    world.run(20)
    look_at_devices(world)
    assert world.state(job) == "running"
    world.run(50)
    look_at_devices(world)
    world.run(10)
    first, second = world.runs(job)
    assert first.reason is compute.Reason.NODE_FAULT
    assert second.devices != first.devices
    down = world.uses(world.now - timedelta(seconds=5), world.now)["down"]
    assert down == 5000


def test_a_dirty_device_goes_to_triage_and_nobody_gets_it(make_world: Make) -> None:
    """Field case C1."""
    world = make_world(nodes=2, devices=1)
    first = world.job("sleep", "60")
    world.run(10)
    device = world.last(first).devices[0]
    world.engine.dirty(device, 600)
    world.run(70)
    assert world.state(first) == "completed"
    second = world.job(env=FOREVER)
    third = world.job(env=FOREVER, wait=True)
    assert third.state is compute.State.AWAITING_CAPACITY
    world.run(200)
    assert world.last(second).devices != (device,)
    assert world.state(third) == "awaiting_capacity"
    run = world.last(first)
    assert run.failure is not None
    assert "12 GiB" in run.failure
    with world.books.read() as tx:
        assert fleet.get_node(tx, run.node_id).state is NodeState.TRIAGE
        assert allocation.placements_of(tx, run.claim_id) == []
    after = world.at(61) + timedelta(seconds=120)
    assert world.uses(world.at(62), after)["overhead"] >= 118_000
    assert world.uses(after + timedelta(seconds=10), world.now)["down"] > 0
    assert world.meter(run).closed_at == world.at(61)


def test_a_dirty_device_that_comes_clean_in_time_is_used_again(make_world: Make) -> None:
    world = make_world(nodes=1, devices=1)
    first = world.job("sleep", "60")
    waiting = world.job("sleep", "10", wait=True)
    world.run(10)
    world.engine.dirty(world.last(first).devices[0], 100)
    world.run(90)
    assert world.state(waiting) == "awaiting_capacity"
    world.run(60)
    assert world.state(waiting) == "completed"


def test_without_a_control_plane_the_runway_ends_it_without_credit(world: Any) -> None:
    job = world.job(env=FOREVER, requeue=False)
    world.run(100)
    runway = world.last(job).runway_until
    world.clock.advance_to(world.now + timedelta(days=1))
    world.restart()
    world.run(5)
    run = world.last(job)
    assert (run.reason, run.term_at) == (compute.Reason.CONTROL_LOST, runway)
    assert world.meter(run).closed_at == runway
    assert world.posted(job, "interruption_credit") == 0
    assert world.state(job) == "failed"


def test_the_owners_own_run_goes_on_as_long_as_it_is_looked_at(make_world: Make) -> None:
    world = make_world(look=60)
    job = world.job("sleep", "20000", who=world.owner)
    world.run(4_500)
    assert world.state(job) == "running"


def test_a_full_disk_is_abuse(world: Any) -> None:
    job = world.job(env={**FOREVER, "SIM_DISK_FULL_AFTER": "30"})
    world.run(60)
    assert world.see(job).state is compute.State.FAILED
    assert world.see(job).reason is compute.Reason.ABUSE


def test_one_empty_answer_proves_nothing(world: Any) -> None:
    job = world.job(env=FOREVER)
    world.run(20)
    observe = world.engine.observe
    world.engine.observe = dict
    world.step()
    world.engine.observe = observe
    world.run(10)
    assert world.state(job) == "running"
    assert len(world.runs(job)) == 1


def test_strangers_are_refused_where_the_fences_do_not_hold(make_world: Make) -> None:
    world = make_world(fences={"network": "none"})
    with pytest.raises(market.FencesMissing) as refused:
        world.rent()
    assert refused.value.code == "fences_missing"
    own = world.job("sleep", "5", who=world.owner)
    world.run(20)
    assert world.state(own) == "completed"


@pytest.mark.parametrize("seed", [1, 2])
def test_mixed_work_under_faults_keeps_the_books_true(make_world: Make, seed: int) -> None:
    world = make_world(nodes=3, devices=2)
    rng = seeded_rng(seed)
    kinds = [kind for kind in FaultKind if kind is not FaultKind.DEVICE_LOST]
    nodes = {i.node: [d.name for d in i.devices] for i in world.engine.inventories()}
    faults: list[Fault] = list(
        seeded_faults(
            rng,
            nodes=nodes,
            start=world.at(0),
            end=world.at(1200),
            per_node_day=120,
            kinds=kinds,
            longest_seconds=200,
        )
    )
    made = []
    for minute in range(20):
        for _ in range(rng.randrange(3)):
            long = str(rng.randrange(5, 400))
            made.append(
                world.job(
                    "sleep", long, wait=True, env={"SIM_TERM_SECONDS": str(rng.randrange(40))}
                )
            )
        live = [w for w in made if world.state(w) == "running"]
        if live and rng.random() < 0.3:
            world.interrupt(live[rng.randrange(len(live))])
        while faults and faults[0].at <= world.now:
            world.engine.inject(faults.pop(0))
        if rng.random() < 0.1:
            world.restart()
        world.until(60 * (minute + 1))
    world.run(1000)
    live_runs = {run.spec.run_id for run in world.engine.live_runs()}
    with world.books.read() as tx:
        known = {run.id for run in compute.list_live_runs(tx)}
    assert live_runs <= known, f"seed {seed}: runs that nobody knows"
    for run_id in known:
        assert world.engine.observe().get(run_id) is None or world.engine.observe()[
            run_id
        ].phase in (Phase.STARTING, Phase.RUNNING, Phase.STOPPING, Phase.EXITED, Phase.SILENT)
    done = sum(world.state(workload) == "completed" for workload in made)
    assert done > 0, f"seed {seed}: nothing completed"
