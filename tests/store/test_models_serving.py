"""Replicas come, serve and leave: the loop of the models shop over the real services."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from models_cloud import Cloud, Gateway, a_gauge, clouds

from sublet.base.kernel.errors import Conflict, NoCapacity
from sublet.base.kernel.interval import micros_since_epoch
from sublet.base.wire.gateway import Outcome, UsageEvent
from sublet.capacity import allocation
from sublet.capacity.allocation import Rank
from sublet.records import metering
from sublet.shops import compute, models
from sublet.shops.compute import Reason, State
from sublet.shops.models import loops, readings
from sublet.shops.models.servers import Gauges

Make = Callable[..., Cloud]


@pytest.fixture
def make_cloud(tmp_path: Path) -> Iterator[Make]:
    yield from clouds(tmp_path)


@pytest.fixture
def cloud(make_cloud: Make) -> Cloud:
    return make_cloud()


def serving(cloud: Cloud, **options: Any) -> models.Deployment:
    """A model `m` deployed and served."""
    cloud.add_model()
    made = cloud.deploy(**options)
    cloud.run(10)
    assert cloud.ready()
    return made


# ---- coming -------------------------------------------------------------------------------------


def test_a_deployment_is_served_and_published_once_it_has_answered(cloud: Cloud) -> None:
    cloud.add_model()
    cloud.server.is_up = False
    cloud.deploy()
    cloud.run(10)
    [starting] = cloud.replicas()
    assert starting.state == "starting"
    assert cloud.workload(starting).state is State.RUNNING
    assert cloud.named() == set()
    cloud.server.is_up = True
    cloud.run(2)
    [ready] = cloud.ready()
    assert ready.door.endswith("/model.sock")
    assert ready.ready_at is not None
    [route] = cloud.snapshot.models["m"].replicas
    assert (route.id, route.path, route.slots, route.is_filler) == (ready.id, ready.door, 4, True)
    assert set(cloud.server.asked) == {ready.door}
    with cloud.books.read() as tx:
        uses = metering.partition(tx, start=ready.ready_at, end=cloud.now)
    assert uses["serving"] > 0


def test_a_minimum_is_firm_and_what_is_above_it_is_filler(cloud: Cloud) -> None:
    serving(cloud, min_replicas=1, max_replicas=3, target=1)
    cloud.gateways["gw-0"].waiting = {"m": 3}
    cloud.run(10)
    kinds = [one.is_filler for one in cloud.ready()]
    assert kinds == [False, True, True]
    ranks = []
    for one in cloud.ready():
        claim = cloud.see(allocation.find_claim_of, one.id)
        ranks.append(claim.rank)
    assert ranks == [Rank.ON_DEMAND, Rank.FILLER, Rank.FILLER]


def test_it_grows_with_the_load_never_above_its_maximum_and_shrinks_slowly(cloud: Cloud) -> None:
    serving(cloud, max_replicas=3, target=2)
    gateway = cloud.gateways["gw-0"]
    gateway.waiting = {"m": 50}
    cloud.run(10)
    assert len(cloud.replicas()) == 3
    gateway.waiting = {}
    gateway.in_flight = {cloud.ready()[0].id: 1}
    cloud.run(25)
    assert len(cloud.ready()) == 3
    cloud.run(20)
    assert [one.state for one in cloud.replicas()] == ["ready"]


def test_to_none_when_idle_and_back_with_the_first_request(cloud: Cloud) -> None:
    made = serving(cloud, idle_seconds=20)
    cloud.run(30)
    assert cloud.replicas() == []
    assert cloud.named() == set()
    assert "m" in cloud.snapshot.models
    cloud.run(60)
    assert cloud.replicas() == []
    cloud.gateways["gw-0"].waiting = {"m": 1}
    cloud.run(10)
    assert len(cloud.ready()) == 1
    assert cloud.deployment(made).failure is None


def test_load_of_a_dead_gateway_does_not_count(cloud: Cloud) -> None:
    serving(cloud, max_replicas=3, target=1)
    cloud.gateways["gw-1"] = Gateway(is_alive=False, waiting={"m": 50})
    cloud.run(10)
    assert len(cloud.replicas()) == 1


def test_without_room_it_is_tried_again_and_says_why(make_cloud: Make) -> None:
    cloud = make_cloud(devices=1)
    blocker = cloud.rent()
    cloud.add_model()
    made = cloud.deploy()
    cloud.run(40)
    assert cloud.replicas() == []
    seen = cloud.deployment(made)
    assert seen.failure is not None
    assert seen.failures == 0, "out of stock is no failed start"
    assert seen.version == made.version
    with cloud.books.work(cloud.buyer.actor()) as work:
        compute.terminate(work, cloud.buyer, blocker.id)
    cloud.run(60)
    assert len(cloud.ready()) == 1, "as soon as there is room, however long there was none"
    assert cloud.deployment(made).failure is None
    cloud.run(90)
    assert cloud.deployment(made).failures == 0


def test_a_start_that_fails_shows_its_last_words_and_backs_off(cloud: Cloud) -> None:
    cloud.add_model()
    for _ in range(2):
        cloud.engine.fail_next_start("n0001")
    made = cloud.deploy()
    cloud.run(3)
    assert "the sandbox did not come up" in (cloud.deployment(made).failure or "")
    cloud.run(60)
    assert len(cloud.ready()) == 1
    gone = cloud.replicas("gone")
    assert len(gone) == 2
    waits = [
        (later.created_at - before.created_at).total_seconds()
        for before, later in zip(gone, [*gone[1:], cloud.ready()[0]], strict=True)
    ]
    assert waits == sorted(waits)
    assert waits[0] >= 2
    assert waits[-1] >= 5


def test_one_that_never_answers_is_given_up(cloud: Cloud) -> None:
    cloud.add_model()
    cloud.server.is_up = False
    made = cloud.deploy(min_replicas=1)
    cloud.run(loops.START_LIMIT.total_seconds() + 20)
    [first] = cloud.replicas("gone")
    assert "did not answer" in (first.reason or "")
    assert "did not answer" in (cloud.deployment(made).failure or "")


def test_weights_that_changed_are_not_served(cloud: Cloud) -> None:
    model = cloud.add_model()
    Path(model.path).write_bytes(b"GGUF, but another one")
    made = cloud.deploy()
    cloud.run(10)
    assert cloud.replicas() == []
    assert "sha256 differs" in (cloud.deployment(made).failure or "")
    Path(model.path).unlink()
    cloud.run(20)
    assert "are not at" in (cloud.deployment(made).failure or "")


def test_a_new_control_plane_goes_on_with_what_serves(cloud: Cloud) -> None:
    serving(cloud)
    [before] = cloud.ready()
    cloud.restart()
    cloud.run(30)
    assert [one.id for one in cloud.ready()] == [before.id]
    assert len(cloud.engine.live_runs()) == 1


def test_a_raised_minimum_replaces_filler_without_a_gap(cloud: Cloud) -> None:
    made = serving(cloud, max_replicas=2)
    [filler] = cloud.ready()
    cloud.act(models.scale, cloud.owner, made.id, version=made.version, min_replicas=1)
    for _ in range(60):
        cloud.run(0.5)
        assert cloud.ready()
        if filler.id not in {one.id for one in cloud.replicas()}:
            break
    [firm] = cloud.ready()
    assert not firm.is_filler


# ---- leaving ------------------------------------------------------------------------------------


def test_drain_waits_for_every_gateway_and_for_the_last_request(cloud: Cloud) -> None:
    made = serving(cloud)
    [replica] = cloud.ready()
    slow = cloud.gateways["gw-1"] = Gateway(snapshot=cloud.snapshot.number)
    cloud.run(1)
    slow.is_stuck = True
    slow.in_flight = {replica.id: 1}
    cloud.act(models.retire, cloud.owner, made.id)
    cloud.run(5)
    assert cloud.named() == set()
    assert [one.state for one in cloud.replicas()] == ["draining"]
    assert cloud.workload(replica).state is State.RUNNING
    slow.is_stuck = False
    cloud.run(5)
    assert cloud.workload(replica).state is State.RUNNING
    slow.in_flight = {}
    cloud.run(5)
    over = cloud.workload(replica)
    assert (over.state, over.reason) == (State.TERMINATED, Reason.DRAINED)
    assert cloud.replicas() == []
    assert cloud.deployment(made).state == "retired"
    assert "m" not in cloud.snapshot.models


def test_a_dead_gateway_is_not_waited_for(cloud: Cloud) -> None:
    made = serving(cloud)
    [replica] = cloud.ready()
    cloud.gateways["gw-1"] = Gateway(
        snapshot=cloud.snapshot.number, is_stuck=True, in_flight={replica.id: 3}
    )
    cloud.run(1)
    cloud.gateways["gw-1"].is_alive = False
    cloud.act(models.retire, cloud.owner, made.id)
    cloud.run(5)
    assert cloud.workload(replica).reason is Reason.DRAINED


def test_a_notice_drains_at_once_and_stops_when_empty_before_its_end(cloud: Cloud) -> None:
    serving(cloud, drain_seconds=30)
    [replica] = cloud.ready()
    gateway = cloud.gateways["gw-0"]
    gateway.in_flight = {replica.id: 1}
    cloud.run(1)
    claim = cloud.notice(replica)
    cloud.run(2)
    assert replica.id not in cloud.named()
    assert cloud.workload(replica).state is State.INTERRUPTING
    cloud.run(5)
    gateway.in_flight = {}
    cloud.run(4)
    over = cloud.workload(replica)
    assert over.state is State.TERMINATED
    assert over.reason is Reason.DRAINED
    assert over.ended_at is not None
    assert claim.term_at is not None
    assert over.ended_at < claim.term_at


def test_at_the_end_of_the_notice_the_engine_ends_it(cloud: Cloud) -> None:
    serving(cloud, drain_seconds=30)
    [replica] = cloud.ready()
    cloud.gateways["gw-0"].in_flight = {replica.id: 1}
    claim = cloud.notice(replica)
    assert claim.term_at is not None
    cloud.run(28)
    assert cloud.workload(replica).state is State.INTERRUPTING
    cloud.run(15)
    over = cloud.workload(replica)
    assert over.state is State.TERMINATED
    assert over.reason is Reason.OWNER_RECALL
    assert over.ended_at is not None
    assert over.ended_at >= claim.term_at


def test_a_notice_that_is_withdrawn_leaves_it_where_it_was(cloud: Cloud) -> None:
    serving(cloud, drain_seconds=30, max_replicas=1)
    [replica] = cloud.ready()
    cloud.gateways["gw-0"].in_flight = {replica.id: 1}
    claim = cloud.notice(replica)
    cloud.run(3)
    assert replica.id not in cloud.named()
    cloud.act(allocation.withdraw_notice, claim.id)
    cloud.run(60)
    assert replica.id in {one.id for one in cloud.ready()}
    assert replica.id in cloud.named()


def test_a_firm_one_under_notice_is_not_cut_while_it_is_busy(cloud: Cloud) -> None:
    serving(cloud, min_replicas=1, drain_seconds=5)
    [replica] = cloud.ready()
    cloud.gateways["gw-0"].in_flight = {replica.id: 1}
    cloud.notice(replica)
    cloud.run(120)
    assert cloud.workload(replica).state is State.INTERRUPTING
    cloud.gateways["gw-0"].in_flight = {}
    cloud.run(5)
    assert cloud.workload(replica).reason is Reason.DRAINED


def test_filler_makes_room_for_a_sale(make_cloud: Make) -> None:
    cloud = make_cloud(devices=1)
    serving(cloud, drain_seconds=10)
    [replica] = cloud.ready()
    sold = cloud.rent()
    # It drains in a moment, and its ten seconds are not waited for.
    cloud.run(10)
    assert replica.id not in cloud.named()
    assert cloud.workload(replica).reason is Reason.DRAINED
    with cloud.books.read() as tx:
        assert compute.get_workload(tx, cloud.buyer, sold.id).state is State.RUNNING


def test_a_request_without_end_holds_nothing_for_ever(cloud: Cloud) -> None:
    made = serving(cloud, max_replicas=2, target=1)
    gateway = cloud.gateways["gw-0"]
    gateway.waiting = {"m": 2}
    cloud.run(10)
    first, second = cloud.ready()
    gateway.waiting, gateway.in_flight = {}, {first.id: 1, second.id: 1}
    cloud.act(models.scale, cloud.owner, made.id, version=made.version, max_replicas=1)
    cloud.run(loops.LEAVE_LIMIT.total_seconds() - 30)
    assert cloud.workload(second).state is State.RUNNING
    cloud.run(60)
    assert cloud.workload(second).reason is Reason.SCALED_IN
    assert cloud.workload(first).state is State.RUNNING


def test_one_that_dies_is_gone_and_another_takes_its_place(cloud: Cloud) -> None:
    made = serving(cloud)
    [replica] = cloud.ready()
    cloud.engine.run(cloud.see(compute.location, replica.id).run_id).vanish(cloud.now)
    cloud.run(15)
    [other] = cloud.ready()
    assert other.id != replica.id
    assert cloud.named() == {other.id}
    assert cloud.replicas("gone")[0].reason
    assert cloud.deployment(made).failures == 1


def test_one_that_hangs_is_replaced_and_what_it_has_in_hand_not_waited_for(cloud: Cloud) -> None:
    """It holds its socket and answers nobody, so no supervisor sees an end."""
    serving(cloud, max_replicas=2)
    [hung] = cloud.ready()
    cloud.gateways["gw-0"].in_flight = {hung.id: 1}
    cloud.server.silent.add(hung.door)
    cloud.run(100)
    assert cloud.ready() == [hung]  # A slow answer or a few are no reason.
    cloud.run(40)
    [other] = cloud.ready()
    assert other.id != hung.id
    assert cloud.named() == {other.id}
    [gone] = cloud.replicas("gone")
    assert (gone.id, gone.reason) == (hung.id, "not_answering")
    cloud.run(150)
    assert cloud.ready() == [other]


# ---- who may serve ------------------------------------------------------------------------------


def test_with_its_last_grant_a_sealed_models_replicas_end_within_a_minute(cloud: Cloud) -> None:
    cloud.add_model("s", access=models.Access.SEALED)
    cloud.act(models.grant, "s", cloud.buyer.organisation.id)
    made = cloud.deploy("s", drain_seconds=60)
    # The key's way is a test of its own: here it has it.
    cloud.run(2)
    [replica] = cloud.replicas()
    with cloud.books.work(cloud.owner.actor()) as work:
        models.store.update_replica(work.tx, replica, has_key=True)
    cloud.run(5)
    assert [one.id for one in cloud.ready()] == [replica.id]
    cloud.gateways["gw-0"].in_flight = {replica.id: 1}
    cloud.run(1)
    revoked_at = cloud.now
    cloud.act(models.revoke_grant, "s", cloud.buyer.organisation.id)
    cloud.run(2)
    assert cloud.named() == set()
    cloud.run(60)
    [gone] = cloud.replicas("gone")
    assert (gone.id, gone.reason) == (replica.id, "grant_revoked")
    assert gone.gone_at is not None
    assert gone.gone_at - revoked_at <= timedelta(seconds=60)
    cloud.run(60)
    assert cloud.replicas() == []
    # Granted again, it serves again.
    cloud.act(models.grant, "s")
    cloud.gateways["gw-0"].in_flight = {}
    cloud.gateways["gw-0"].waiting = {"s": 1}
    cloud.run(5)
    assert len(cloud.replicas()) == 1
    assert cloud.deployment(made).state == "active"


def test_at_its_end_of_life_a_model_is_served_no_more(cloud: Cloud) -> None:
    serving(cloud)
    [replica] = cloud.ready()
    cloud.act(
        models.set_lifecycle,
        "m",
        models.Lifecycle.ACTIVE,
        legacy_on=cloud.now.date(),
        end_of_life_on=cloud.now.date() + timedelta(days=9),
    )
    cloud.run(5)
    assert cloud.snapshot.models["m"].lifecycle == "legacy"
    assert cloud.ready()
    cloud.act(models.set_lifecycle, "m", models.Lifecycle.ACTIVE, end_of_life_on=cloud.now.date())
    cloud.run(10)
    assert "m" not in cloud.snapshot.models
    assert cloud.replicas("gone")[0].reason == "model_ended"
    assert cloud.workload(replica).is_over
    with pytest.raises(models.ModelEnded):
        cloud.deploy()


# ---- snapshots and drains -----------------------------------------------------------------------


def test_no_snapshot_names_one_that_has_left_since_it_was_composed(cloud: Cloud) -> None:
    made = serving(cloud)
    with cloud.books.read() as tx:
        composed = models.compose(tx, number=99, now=cloud.now, gateways=1)
    cloud.act(models.retire, cloud.owner, made.id)
    cloud.models.step(cloud.now)
    with pytest.raises(Conflict), cloud.books.work(cloud.owner.actor()) as work:
        models.keep_snapshot(work, composed)


def test_a_gateway_that_acts_by_a_forgotten_snapshot_may_still_send(cloud: Cloud) -> None:
    serving(cloud)
    [replica] = cloud.ready()
    slow = cloud.gateways["gw-1"] = Gateway(snapshot=cloud.snapshot.number, is_stuck=True)
    cloud.gauge()
    for number in range(300):
        with cloud.books.work(cloud.owner.actor()) as work:
            bare = cloud.snapshot.number + 1 + number
            models.store.keep_snapshot(work.tx, bare, [], work.now, 200)
    assert not cloud.see(models.is_dropped, replica.id)
    slow.is_stuck, cloud.gateways["gw-0"].is_stuck = False, False
    with cloud.books.work(cloud.owner.actor()) as work:
        for name in cloud.gateways:
            gateway = Gateway(snapshot=bare)
            models.keep_gauge(work, a_gauge(name, gateway))
    assert cloud.see(models.is_dropped, replica.id)


# ---- readings -----------------------------------------------------------------------------------


def counted(prompt: int, predicted: int, *, processing: int = 0) -> Gauges:
    return Gauges(
        prompt_total=prompt,
        cached_total=0,
        predicted_total=predicted,
        processing=processing,
        deferred=0,
    )


def record(cloud: Cloud, replica_id: str, number: int, *, prompt: int, output: int) -> None:
    """A request's row, as the link keeps it."""
    now_us = micros_since_epoch(cloud.now)
    cloud.has_books = False
    with cloud.books.work(cloud.owner.actor()) as work:
        metering.open_epoch(work, "gw-0", 1)
        event = UsageEvent(
            id=f"req_{number}",
            key_id="key_1",
            organisation_id=cloud.buyer.organisation.id,
            project_id=None,
            is_first_party=False,
            model="m",
            deployment_id="dep_1",
            replica_id=replica_id,
            surface="chat",
            tier="default",
            price_version="v1",
            outcome=Outcome.OK,
            started_us=now_us,
            ended_us=now_us,
            first_us=now_us,
            input_uncached=prompt,
            cache_read=0,
            output=output,
            made=output,
            micros=0,
        )
        metering.ingest(work, gateway="gw-0", epoch=1, events=[event], file=0, offset=number)


def last_reading(cloud: Cloud) -> metering.Reading:
    [found] = cloud.see(metering.list_readings, cloud.now - timedelta(days=1))
    return found


def test_what_a_trial_took_is_nobodys_and_the_last_counts_are_set_against_ours(
    cloud: Cloud,
) -> None:
    cloud.server.counts = counted(1, 1)
    made = serving(cloud)
    [replica] = cloud.ready()
    begun = last_reading(cloud)
    assert (begun.replica_id, begun.gap.is_none) == (replica.id, True)
    cloud.server.counts = counted(11, 4)
    cloud.act(models.retire, cloud.owner, made.id)
    cloud.run(2)
    # Its last row is on its way.
    record(cloud, replica.id, 1, prompt=10, output=2)
    cloud.run(60)
    assert (last_reading(cloud).gap.input_uncached, last_reading(cloud).gap.output) == (0, 1)


def test_one_that_serves_is_compared_while_it_is_idle(cloud: Cloud) -> None:
    cloud.server.counts = counted(1, 1)
    serving(cloud, min_replicas=1)
    [replica] = cloud.ready()
    record(cloud, replica.id, 1, prompt=7, output=3)
    cloud.server.counts = counted(8, 5)
    cloud.run(readings.EVERY.total_seconds() + 20)
    assert last_reading(cloud).gap.output == 1
    assert last_reading(cloud).read_at > cloud.now - timedelta(seconds=30)


def test_a_busy_one_is_not_compared_and_what_comes_between_spoils_the_look(cloud: Cloud) -> None:
    cloud.server.counts = counted(1, 1)
    serving(cloud, min_replicas=1)
    [replica] = cloud.ready()
    begun = last_reading(cloud)
    gateway = cloud.gateways["gw-0"]
    gateway.in_flight = {replica.id: 1}
    cloud.run(readings.EVERY.total_seconds() + 30)
    assert last_reading(cloud) == begun
    gateway.in_flight = {}
    cloud.server.counts = counted(9, 9, processing=1)
    cloud.run(70)
    assert last_reading(cloud) == begun
    # The second look finds other counts than the first: every second something else.
    cloud.server.counts = counted(9, 9)
    for number in range(10, 80):
        cloud.run(1)
        cloud.server.counts = counted(number, number)
    assert last_reading(cloud) == begun
    cloud.run(90)
    assert last_reading(cloud).prompt == 79


# ---- always -------------------------------------------------------------------------------------

ACTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["wait", "flight", "calm", "run", "sale", "notice", "die", "restart", "min", "stuck"]
        ),
        st.integers(1, 20),
    ),
    max_size=12,
)


@settings(
    max_examples=12,
    deadline=None,
    # To shrink takes minutes, and a story of twelve acts is read as it is.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(acts=ACTS)
def test_whatever_happens_nobody_is_stopped_under_a_gateway_that_may_send(
    make_cloud: Make, acts: list[tuple[str, int]]
) -> None:
    """Drained means: named by no snapshot that a living gateway acts by, and nothing in flight. And
    there are never more than the maximum."""
    cloud = make_cloud(devices=3)
    cloud.add_model()
    made = cloud.deploy(max_replicas=3, target=2, drain_seconds=20)
    gateway = cloud.gateways["gw-0"]
    other = cloud.gateways["gw-1"] = Gateway()
    for act, number in [*acts, ("run", 20)]:
        ready = cloud.ready()
        if act == "wait":
            gateway.waiting = {"m": number}
        elif act == "flight" and ready:
            gateway.in_flight = {ready[number % len(ready)].id: number}
        elif act == "calm":
            gateway.waiting, gateway.in_flight = {}, {}
        elif act == "stuck":
            other.is_stuck = number % 2 == 0
        elif act == "sale":
            try:
                cloud.rent()
            except NoCapacity:
                continue
        elif act == "notice" and ready:
            try:
                cloud.notice(ready[number % len(ready)])
            except Conflict:
                continue
        elif act == "die" and ready:
            dying = cloud.see(compute.location, ready[number % len(ready)].id)
            cloud.engine.run(dying.run_id).vanish(cloud.now)
        elif act == "restart":
            cloud.restart()
        elif act == "min":
            seen = cloud.deployment(made)
            least = number % 3
            cloud.act(models.scale, cloud.owner, made.id, version=seen.version, min_replicas=least)
        for _ in range(number if act == "run" else 2):
            # Each step looks that nobody is stopped under a gateway that may send to it.
            cloud.run(0.5)
            assert len(cloud.replicas("starting", "ready")) <= 3
