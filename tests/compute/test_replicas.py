"""Replicas as workloads, and sealed ones beside nobody."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sublet.base.kernel.errors import Invalid, NoCapacity
from sublet.capacity import allocation, fleet
from sublet.capacity.allocation import Rank
from sublet.capacity.engines.simulated import FaultKind
from sublet.records import ledger
from sublet.rights import market, owner
from sublet.shops import compute
from sublet.shops.compute import Reason, SealedNode, ServerSpec, StrangersPresent

Make = Callable[..., Any]


def replica(
    world: Any,
    *,
    devices: int = 1,
    filler: bool = True,
    drain: int = 20,
    value: int = 50_000,
    sealed: bool = False,
    memory: int | None = None,
    **env: str,
) -> compute.Workload:
    server = ServerSpec(
        argv=("serve", "--alias", "m"),
        env=env,
        read_only=(("/host/weights", "/host/weights"),),
        lock_memory=sealed,
    )
    with world.books.work(world.owner.actor()) as work:
        return compute.rent_replica(
            work,
            deployment_id="dep_1",
            pool_id=world.pool_id,
            devices=devices,
            memory_bytes=memory,
            is_filler=filler,
            drain_seconds=drain,
            value_micros=value,
            server=server,
            organisation_id=world.owner.organisation.id,
            is_sealed=sealed,
        )


def see(world: Any, workload: compute.Workload) -> compute.Workload:
    with world.books.read() as tx:
        return compute.location(tx, workload.id).workload


def claim(world: Any, workload: compute.Workload) -> allocation.Claim:
    with world.books.read() as tx:
        found = allocation.find_claim_of(tx, workload.id)
    assert found is not None
    return found


def stop(world: Any, workload: compute.Workload, reason: Reason) -> None:
    with world.books.work(world.owner.actor()) as work:
        compute.stop_for(work, workload.id, reason)


# ---- a life -------------------------------------------------------------------------------------


def test_it_serves_on_its_devices_and_costs_nobody_anything(world: Any) -> None:
    made = replica(world)
    assert made.id.startswith("rep_")
    world.run(10)
    assert see(world, made).state is compute.State.RUNNING
    world.run(600)
    assert world.uses(world.at(10), world.at(610)) == {"serving": 600_000, "idle": 600_000}
    assert world.hold(made) is None
    with world.books.read() as tx:
        contract = market.get_contract(tx, made.contract_id)
        assert (contract.product, contract.takes_hold) == (market.Product.SERVING, False)
        assert ledger.posted(tx, made.contract_id, "usage", "first_party_credit").micros == 0
    stop(world, made, Reason.DRAINED)
    world.run(10)
    over = see(world, made)
    assert (over.state, over.reason) == (compute.State.TERMINATED, Reason.DRAINED)
    assert world.path(made)[-2:] == ["stopping", "terminated"]
    assert world.free() == 2
    with world.books.read() as tx:
        ended = market.get_contract(tx, made.contract_id)
        assert ended.state is market.ContractState.ENDED
        owners = [
            transfer
            for transfer in ledger.list_transfers(tx, None, world.at(0), world.now)
            if transfer.organisation_id == world.owner.organisation.id
        ]
        assert owners == []


def test_the_engine_is_told_what_the_adapter_said(world: Any) -> None:
    made = replica(world, devices=2, memory=1 << 30, sealed=True, A="b")
    world.run(5)
    spec = world.engine.run(world.last(made).id).spec
    assert (spec.kind, spec.command) == ("replica", ("serve", "--alias", "m"))
    assert spec.env["A"] == "b"
    assert (spec.read_only, spec.lock_memory) == ((("/host/weights", "/host/weights"),), True)
    assert spec.memory_bytes == 1 << 30
    assert len(spec.devices) == 2
    assert spec.stop_grace_seconds == 5


def test_it_runs_on_past_its_runway_without_anybody_paying_ahead(make_world: Make) -> None:
    world = make_world(look=60)
    made = replica(world)
    world.run(5 * 3600)
    assert see(world, made).state is compute.State.RUNNING
    assert world.runs(made)[-1].number == 1


def test_one_that_ends_by_itself_has_failed_and_is_not_queued_again(world: Any) -> None:
    made = replica(world, SIM_SECONDS="30", SIM_EXIT_CODE="3")
    world.run(60)
    over = see(world, made)
    assert (over.state, over.exit_code) == (compute.State.FAILED, 3)
    assert len(world.runs(made)) == 1
    assert world.free() == 2


def test_one_that_does_not_start_has_failed_and_is_not_tried_elsewhere(world: Any) -> None:
    world.engine.fail_next_start("n0001")
    made = replica(world)
    world.run(30)
    over = see(world, made)
    assert over.state is compute.State.FAILED
    assert over.failure == "the sandbox did not come up"
    assert len(world.runs(made)) == 1


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        (Reason.SCALED_IN, "terminated"),
        (Reason.DRAINED, "terminated"),
        (Reason.SHUTDOWN, "terminated"),
        (Reason.NODE_FAULT, "failed"),
    ],
)
def test_however_it_is_ended_it_does_not_come_back(world: Any, reason: Reason, state: str) -> None:
    made = replica(world)
    world.run(10)
    stop(world, made, reason)
    world.run(60)
    assert (see(world, made).state, see(world, made).reason) == (state, reason)
    assert world.free() == 2


def test_it_can_be_ended_before_it_runs(make_world: Make) -> None:
    world = make_world(start_seconds=30)
    made = replica(world)
    world.run(5)
    stop(world, made, Reason.SCALED_IN)
    world.run(30)
    assert see(world, made).state is compute.State.TERMINATED
    assert world.find_meter(world.last(made)) is None
    assert world.free() == 2


def test_a_new_control_plane_adopts_it(world: Any) -> None:
    made = replica(world)
    world.run(10)
    run = world.last(made)
    world.restart()
    world.run(100)
    assert see(world, made).state is compute.State.RUNNING
    assert world.last(made) == world.runs(made)[0]
    assert world.last(made).id == run.id
    assert len(world.engine.live_runs()) == 1


def test_a_start_whose_answer_was_lost_is_found_again(world: Any) -> None:
    world.engine.fail_next_start("n0001", FaultKind.START_ANSWER_LOST)
    made = replica(world)
    world.restart()
    world.run(20)
    assert see(world, made).state is compute.State.RUNNING
    assert len(world.engine.live_runs()) == 1


def test_a_shutdown_of_the_cloud_ends_it(world: Any) -> None:
    made = replica(world)
    world.run(10)
    with world.books.work(world.owner.actor()) as work:
        compute.begin_shutdown(work)
    world.run(30)
    assert see(world, made).reason is Reason.SHUTDOWN
    with world.books.read() as tx:
        assert compute.count_live(tx) == 0


# ---- who sees it --------------------------------------------------------------------------------


def test_nobody_meets_it_among_instances_and_jobs(world: Any) -> None:
    made = replica(world)
    job = world.job("sleep", "60")
    world.run(5)
    with world.books.read() as tx:
        assert [w.id for w in compute.list_workloads(tx)] == [job.id]
        assert [w.id for w in compute.list_workloads(tx, kind="replica")] == [made.id]
        for who in (world.owner, world.buyer):
            with pytest.raises(compute.WorkloadNotFound):
                compute.get_workload(tx, who, made.id)
    for deed in (compute.stop, compute.terminate, compute.cancel):
        with (
            pytest.raises(compute.WorkloadNotFound),
            world.books.work(world.owner.actor()) as work,
        ):
            deed(work, world.owner, made.id)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"devices": 0}, "devices"),
        ({"drain": 61}, "drain_seconds"),
        ({"memory": 1 << 50}, "memory"),
    ],
)
def test_what_cannot_be_is_refused_naming_the_field(
    world: Any, wrong: dict[str, Any], field: str
) -> None:
    with pytest.raises(Invalid) as refused:
        replica(world, **wrong)
    assert (refused.value.param or "").startswith(field)
    assert world.free() == 2


# ---- displacement -------------------------------------------------------------------------------


def test_filler_leaves_for_a_sale_after_its_drain(make_world: Make) -> None:
    world = make_world(devices=1)
    made = replica(world, drain=20)
    world.run(10)
    assert claim(world, made).rank is Rank.FILLER
    instance = world.rent()
    # Its notice, a grace of 5 s and a scrub of 2; and 2 s in which to tell it.
    starts_at = claim(world, instance).starts_at
    assert starts_at == world.at(10 + 20 + 5 + 2 + 2)
    world.until(29)
    assert see(world, made).state is compute.State.INTERRUPTING
    world.until(45)
    run = world.last(made)
    assert run.term_at - run.published_at >= timedelta(seconds=20)
    over = see(world, made)
    assert (over.state, over.reason) == (compute.State.TERMINATED, Reason.SPOT_INTERRUPTION)
    assert world.state(instance) == "running"
    assert world.meter(world.last(instance)).opened_at - starts_at <= timedelta(seconds=2)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("age", [100, 290, 1000])
@pytest.mark.parametrize("offer", ["gpu-spot", "gpu-on-demand"])
def test_a_buyer_waits_for_the_drain_and_not_for_the_grid(
    make_world: Make, nodes: int, age: int, offer: str
) -> None:
    world = make_world(nodes=nodes, devices=2)
    made = [replica(world, drain=20) for _ in range(2 * nodes)]
    world.run(age)
    first = world.rent(offer=offer)
    world.run(15)
    second = world.rent(offer=offer, who=world.other)
    world.run(50)
    for instance in (first, second):
        waited = world.last(instance).intended_at - instance.created_at
        assert timedelta(seconds=20) <= waited <= timedelta(seconds=20 + 5 + 2 + 2)
    left = [see(world, one) for one in made]
    assert [one.state for one in left].count(compute.State.TERMINATED) == 2
    for one in left:
        run = world.last(one)
        if run.term_at is not None:
            assert run.term_at - run.published_at >= timedelta(seconds=20)


def test_the_owners_own_work_waits_for_the_drain_of_filler_and_no_longer(make_world: Make) -> None:
    world = make_world(devices=2)
    made = [replica(world, drain=20) for _ in range(2)]
    world.run(100)
    job = world.job(offer="gpu-spot", who=world.owner)
    world.run(30)
    waited = world.last(job).intended_at - job.created_at
    assert timedelta(seconds=20) <= waited <= timedelta(seconds=20 + 5 + 2 + 2)
    over = [see(world, one) for one in made]
    assert [one.reason for one in over].count(Reason.OWNER_RECALL) == 1
    assert [one.state for one in over].count(compute.State.RUNNING) == 1


def test_filler_that_has_drained_leaves_at_once(make_world: Make) -> None:
    world = make_world(devices=1)
    made = replica(world, drain=60)
    world.run(10)
    instance = world.rent()
    promised = claim(world, instance).starts_at
    world.until(20)
    assert see(world, made).state is compute.State.INTERRUPTING
    stop(world, made, Reason.DRAINED)
    world.until(35)
    assert see(world, made).reason is Reason.DRAINED
    assert world.state(instance) == "running"
    # A grace of 5 s and a scrub of 2 from the end of its drain: before the notice has run.
    opened_at = world.meter(world.last(instance)).opened_at
    assert opened_at <= world.at(20 + 5 + 2 + 1) < promised


def test_a_minimum_stands_as_firm_as_what_is_sold_on_demand(make_world: Make) -> None:
    world = make_world(devices=1)
    made = replica(world, filler=False)
    world.run(10)
    assert claim(world, made).rank is Rank.ON_DEMAND
    assert claim(world, made).release.notice_seconds == 3600
    for offer in ("gpu-spot", "gpu-on-demand"):
        with pytest.raises(NoCapacity):
            world.rent(offer=offer)
    world.run(60)
    assert see(world, made).state is compute.State.RUNNING


def test_a_minimum_displaces_filler_and_spot(make_world: Make) -> None:
    world = make_world(devices=2)
    spot, filler = world.rent(notice=120), replica(world)
    world.run(10)
    minimum = replica(world, devices=2, filler=False)
    world.until(500)
    assert see(world, filler).state is compute.State.TERMINATED
    assert world.state(spot) == "stopped"
    assert see(world, minimum).state is compute.State.RUNNING


def test_filler_displaces_nobody_and_takes_what_is_left(make_world: Make) -> None:
    world = make_world(devices=2)
    world.rent()
    first = replica(world)
    with pytest.raises(NoCapacity) as refused:
        replica(world)
    assert refused.value.code == "insufficient_capacity"
    world.run(10)
    assert see(world, first).state is compute.State.RUNNING
    with world.books.read() as tx:
        assert len(compute.list_workloads(tx, kind="replica")) == 1


def test_a_recall_counts_filler_at_its_value_and_takes_it_first(make_world: Make) -> None:
    world = make_world(devices=2)
    spot = world.rent()
    made = replica(world, value=123_000, drain=20)
    world.run(700)
    with world.books.work(world.owner.actor()) as work:
        recall = owner.plan_recall(
            work,
            world.owner,
            pool_id=world.pool_id,
            devices=1,
            count=1,
            by=work.now + timedelta(minutes=10),
            until=None,
        )
        victims = [victim for row in recall.rows for victim in row.victims]
        assert [victim.workload_id for victim in victims] == [made.id]
        # A day of it at its value: what an open-ended claim is taken to have earned yet.
        assert victims[0].lost_revenue_micros == 24 * 123_000
        assert victims[0].credit_micros == 0
        owner.accept_recall(work, recall.id)
    world.run(620)
    assert see(world, made).reason is Reason.OWNER_RECALL
    assert world.state(spot) == "running"


# ---- sealed -------------------------------------------------------------------------------------


def test_a_stranger_is_refused_beside_a_sealed_filler_and_told_when(world: Any) -> None:
    made = replica(world, sealed=True, drain=20)
    world.run(10)
    with pytest.raises(SealedNode) as refused:
        world.rent()
    assert refused.value.code == "sealed_node"
    assert refused.value.details["reason"] == "sealed_node"
    in_time = (world.now + timedelta(seconds=20 + 5 + 2 + 5)).isoformat()
    assert refused.value.details["earliest_at"] == in_time
    assert see(world, made).state is compute.State.RUNNING
    assert world.free() == 1


def test_what_was_said_to_a_refused_stranger_is_then_true(world: Any) -> None:
    made = replica(world, sealed=True, drain=20)
    world.run(10)
    with pytest.raises(SealedNode) as refused:
        world.rent()
    earliest_at = refused.value.details["earliest_at"]
    with world.books.work(world.buyer.actor()) as work:  # as the edge keeps it
        market.note_unmet(
            work,
            organisation_id=world.buyer.organisation.id,
            pool_id=world.pool_id,
            devices=1,
            reason=refused.value.details["reason"],
        )
    world.run(5)
    assert see(world, made).state is compute.State.INTERRUPTING
    world.run(27)
    assert world.now.isoformat() == earliest_at
    with pytest.raises(StrangersPresent):
        replica(world, sealed=True)
    instance = world.rent()
    world.run(5)
    assert world.state(instance) == "running"
    assert see(world, made).reason is Reason.SPOT_INTERRUPTION


def test_one_that_waits_comes_after_the_scrub(world: Any) -> None:
    made = replica(world, sealed=True, drain=20)
    world.run(10)
    instance = world.rent(wait=True)
    assert world.state(instance) == "awaiting_capacity"
    assert world.hold(instance) is None
    world.run(60)
    assert world.state(instance) == "running"
    gone_at = world.last(made).gone_at
    assert gone_at is not None
    assert world.last(instance).intended_at >= gone_at
    with pytest.raises(StrangersPresent):
        replica(world, sealed=True)


def test_beside_a_sealed_minimum_nobody_knows_when(world: Any) -> None:
    made = replica(world, sealed=True, filler=False)
    world.run(10)
    with pytest.raises(SealedNode) as refused:
        world.rent()
    assert refused.value.details["earliest_at"] is None
    assert refused.value.details["offer_to_wait"]
    waiting = world.rent(wait=True)
    world.run(100)
    assert world.state(waiting) == "awaiting_capacity"
    assert see(world, made).state is compute.State.RUNNING
    stop(world, made, Reason.SCALED_IN)
    world.run(30)
    assert world.state(waiting) == "running"


def test_the_owners_own_work_and_open_replicas_may_stand_beside_it(make_world: Make) -> None:
    world = make_world(devices=3)
    sealed = replica(world, sealed=True)
    opened = replica(world)
    mine = world.rent(who=world.owner)
    world.run(10)
    assert world.state(mine) == "running"
    assert see(world, opened).state is compute.State.RUNNING
    assert see(world, sealed).state is compute.State.RUNNING


def test_a_sealed_one_is_refused_beside_strangers_until_their_scrub(world: Any) -> None:
    instance = world.rent()
    with pytest.raises(StrangersPresent) as refused:
        replica(world, sealed=True)
    assert refused.value.details["reason"] == "strangers_present"
    world.run(10)
    with pytest.raises(StrangersPresent):
        replica(world, sealed=True, filler=False)
    for device in world.engine.inventory().devices:
        world.engine.dirty(device.name, seconds=60)
    world.stop(instance)
    world.run(40)
    assert world.state(instance) == "stopped"
    with pytest.raises(StrangersPresent):
        replica(world, sealed=True)
    world.run(60)
    made = replica(world, sealed=True)
    world.run(10)
    assert see(world, made).state is compute.State.RUNNING


def test_sealed_filler_keeps_away_while_a_stranger_waits(make_world: Make) -> None:
    world = make_world(devices=1)
    minimum = replica(world, filler=False)
    world.run(5)
    world.rent(wait=True)
    stop(world, minimum, Reason.SCALED_IN)
    with pytest.raises(NoCapacity):
        replica(world, sealed=True)


def test_a_stopped_instance_does_not_start_beside_it(world: Any) -> None:
    instance = world.rent()
    world.run(10)
    world.stop(instance)
    world.run(60)
    replica(world, sealed=True)
    world.run(10)
    with pytest.raises(SealedNode):
        world.act(compute.start, world.buyer, instance.id)
    assert world.state(instance) == "stopped"


def test_on_one_device_a_stranger_takes_its_place_once_it_is_scrubbed(make_world: Make) -> None:
    world = make_world(devices=1)
    made = replica(world, sealed=True, drain=20)
    world.run(10)
    instance = world.rent()
    assert world.state(instance) == "provisioning"
    world.until(490)
    assert see(world, made).state is compute.State.TERMINATED
    assert world.state(instance) == "running"


def test_where_there_are_several_nodes_it_has_one_to_itself(make_world: Make) -> None:
    world = make_world(nodes=3, devices=2)
    strangers = [world.rent()]
    made = replica(world, devices=1, sealed=True)
    assert made.devices == 2
    strangers += [world.rent(), world.rent(), world.rent()]
    world.run(10)
    assert see(world, made).state is compute.State.RUNNING
    sealed_on = world.last(made).node_id
    assert all(world.state(stranger) == "running" for stranger in strangers)
    assert sealed_on not in {world.last(stranger).node_id for stranger in strangers}
    with pytest.raises(NoCapacity):
        replica(world, sealed=True)


ACTS = st.lists(
    st.tuples(
        st.sampled_from(["rent", "wait", "sealed", "filler", "stop", "end", "run"]),
        st.integers(min_value=1, max_value=40),
    ),
    max_size=12,
)


@pytest.mark.parametrize("nodes", [1, 2])
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(acts=ACTS)
def test_sealed_and_strangers_are_never_on_one_node(
    make_world: Make, nodes: int, acts: list[tuple[str, int]]
) -> None:
    world = make_world(nodes=nodes, devices=2)
    made: list[compute.Workload] = []
    for act, number in acts:
        try:
            if act in ("rent", "wait"):
                made.append(world.rent(wait=act == "wait", notice=30))
            elif act in ("sealed", "filler"):
                made.append(replica(world, sealed=True, filler=act == "filler", drain=number))
            elif act == "run":
                world.run(number)
            elif made:
                workload = made[number % len(made)]
                if workload.kind == "replica":
                    stop(world, workload, Reason.SCALED_IN)
                elif not see(world, workload).is_over:
                    world.stop(workload)
        except NoCapacity:
            continue
        finally:
            _apart(world)
    world.run(30)
    _apart(world)


def _apart(world: Any) -> None:
    """By what holds devices in the book, from admission to the end of the scrub."""
    with world.books.read() as tx:
        standing: dict[str, set[bool]] = {}
        for placement in allocation.list_placements(tx, world.pool_id):
            held = allocation.get_claim(tx, placement.claim_id)
            workload = compute.location(tx, held.holder).workload
            standing.setdefault(placement.node_id, set()).add(workload.spec.is_sealed)
        assert all(len(kinds) == 1 for kinds in standing.values()), standing
        assert len(fleet.list_nodes(tx, world.pool_id)) >= len(standing)
