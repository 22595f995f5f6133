"""The autoscaler: up at once, down slowly, to none and back, never above its maximum."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.shops.models import scaling
from sublet.shops.models.model import (
    Access,
    Deployment,
    DeploymentState,
    Lifecycle,
    Model,
    Replica,
    ReplicaState,
    TierPrice,
)
from sublet.shops.models.scaling import Load

NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)


def a_deployment(**differs: object) -> Deployment:
    made = Deployment(
        seq=1,
        id="dep_1",
        model="m",
        pool_id="pol_1",
        devices=1,
        min_replicas=0,
        max_replicas=5,
        slots=4,
        target=4,
        drain_seconds=30,
        idle_seconds=300,
        state=DeploymentState.ACTIVE,
        wanted=1,
        lower_since=None,
        last_asked_at=NOW,
        failure=None,
        failures=0,
        retry_at=None,
        created_at=NOW,
        version=1,
    )
    return replace(made, **differs)  # type: ignore[arg-type]


def a_replica(number: int, *, filler: bool = True, state: str = "ready") -> Replica:
    return Replica(
        id=f"rep_{number:03d}",
        deployment_id="dep_1",
        model="m",
        is_filler=filler,
        state=ReplicaState(state),
        door="",
        has_key=False,
        created_at=NOW + timedelta(seconds=number),
        ready_at=None,
        draining_at=None,
        gone_at=None,
        reason=None,
    )


def decide(deployment: Deployment, running: int, waiting: int = 0, after: float = 0):
    return scaling.decide(
        deployment, Load(running=running, waiting=waiting), now=NOW + timedelta(seconds=after)
    )


@pytest.mark.parametrize(
    ("running", "waiting", "wanted"),
    [(0, 0, 1), (1, 0, 1), (4, 0, 1), (4, 1, 2), (8, 0, 2), (0, 9, 3), (99, 99, 5)],
)
def test_as_many_as_the_load_fills_to_the_target(running: int, waiting: int, wanted: int) -> None:
    assert decide(a_deployment(), running, waiting).wanted == wanted


def test_up_at_once_and_down_after_half_a_minute_of_calm() -> None:
    three = a_deployment(wanted=3)
    first = decide(three, 4)
    assert (first.wanted, first.lower_since) == (3, NOW)
    seen = replace(three, lower_since=first.lower_since)
    assert decide(seen, 4, after=29).wanted == 3
    assert decide(seen, 4, after=30).wanted == 1
    # A single busy moment begins the calm anew.
    busy = decide(seen, 12, after=29)
    assert (busy.wanted, busy.lower_since) == (3, None)


def test_to_none_when_nobody_asks_and_back_with_the_first_who_waits() -> None:
    deployment = a_deployment(last_asked_at=NOW - timedelta(seconds=299))
    assert decide(deployment, 0).wanted == 1
    idle = decide(deployment, 0, after=1)
    assert idle.wanted == 0
    asleep = replace(deployment, wanted=0)
    assert decide(asleep, 0, after=2).wanted == 0
    woken = decide(asleep, 0, 1, after=3)
    assert (woken.wanted, woken.last_asked_at) == (1, NOW + timedelta(seconds=3))


def test_a_minimum_stays_however_idle() -> None:
    deployment = a_deployment(min_replicas=2, wanted=4, last_asked_at=NOW - timedelta(days=1))
    assert decide(deployment, 0).wanted == 2


def test_one_that_retires_wants_none() -> None:
    retiring = a_deployment(state=DeploymentState.RETIRING, min_replicas=2, wanted=4)
    assert decide(retiring, 50, 50).wanted == 0


deployments = st.builds(
    lambda least, more, wanted, target, asked, lower: a_deployment(
        min_replicas=least,
        max_replicas=max(least + more, 1),
        wanted=wanted,
        target=target,
        last_asked_at=NOW - timedelta(seconds=asked),
        lower_since=None if lower is None else NOW - timedelta(seconds=lower),
    ),
    st.integers(0, 4),
    st.integers(0, 4),
    st.integers(0, 9),
    st.integers(1, 8),
    st.integers(0, 900),
    st.none() | st.integers(0, 90),
)


@given(deployment=deployments, running=st.integers(0, 60), waiting=st.integers(0, 60))
def test_always_within_its_bounds_and_never_fewer_than_wait_for(
    deployment: Deployment, running: int, waiting: int
) -> None:
    found = decide(deployment, running, waiting)
    assert deployment.min_replicas <= found.wanted <= deployment.max_replicas
    needed = -(-(running + waiting) // deployment.target)
    assert found.wanted >= min(needed, deployment.max_replicas)


@given(deployment=deployments, loads=st.lists(st.integers(0, 40), min_size=1, max_size=40))
def test_over_time_it_falls_only_after_calm_or_idleness(
    deployment: Deployment, loads: list[int]
) -> None:
    at, fell_from = NOW, None
    for number, load in enumerate(loads):
        at = NOW + timedelta(seconds=7 * number)
        found = scaling.decide(deployment, Load(running=load, waiting=0), now=at)
        before = min(max(deployment.wanted, deployment.min_replicas), deployment.max_replicas)
        if found.wanted < before:
            is_idle = at - found.last_asked_at >= timedelta(seconds=deployment.idle_seconds)
            fell_from = deployment.lower_since
            assert is_idle or (fell_from is not None and at - fell_from >= scaling.CALM)
        deployment = replace(
            deployment,
            wanted=found.wanted,
            lower_since=found.lower_since,
            last_asked_at=found.last_asked_at,
        )


# ---- who leaves, who comes ----------------------------------------------------------------------


def leaving(staying: list[Replica], wanted: int, least: int = 0) -> list[str]:
    return [one.id for one in scaling.surplus(staying, wanted, least)]


def test_filler_leaves_before_firm_and_the_newest_first() -> None:
    staying = [a_replica(1, filler=False), a_replica(2), a_replica(3)]
    assert leaving(staying, 2, 1) == ["rep_003"]
    assert leaving(staying, 1, 1) == ["rep_003", "rep_002"]
    assert leaving(staying, 0, 0) == ["rep_003", "rep_002", "rep_001"]


def test_one_that_does_not_serve_yet_leaves_before_one_that_does() -> None:
    assert leaving([a_replica(1, state="starting"), a_replica(2)], 1) == ["rep_001"]


def test_filler_serves_until_the_firm_one_in_its_place_does() -> None:
    old, new = a_replica(1), a_replica(2, filler=False, state="starting")
    assert leaving([old, new], 1, 1) == []
    assert leaving([old, replace(new, state=ReplicaState.READY)], 1, 1) == ["rep_001"]


def test_a_raised_minimum_is_met_by_firm_ones() -> None:
    deployment = a_deployment(min_replicas=1, max_replicas=2)
    assert scaling.next_is_filler([a_replica(1)], 1, deployment) is False
    assert scaling.next_is_filler([a_replica(1, filler=False)], 2, deployment) is True
    assert scaling.next_is_filler([a_replica(1, filler=False)], 1, deployment) is None


def test_at_the_maximum_filler_makes_room_for_a_firm_one() -> None:
    deployment = a_deployment(min_replicas=1, max_replicas=1)
    filler = a_replica(1)
    assert scaling.next_is_filler([filler], 1, deployment) is None
    assert scaling.blocks_firm([filler], 1, deployment) == filler
    assert scaling.blocks_firm([a_replica(1, filler=False)], 1, deployment) is None
    assert scaling.blocks_firm([], 1, deployment) is None


replicas = st.lists(
    st.tuples(st.booleans(), st.sampled_from(["starting", "ready"])), max_size=8
).map(lambda kinds: [a_replica(n, filler=f, state=s) for n, (f, s) in enumerate(kinds)])


@given(staying=replicas, wanted=st.integers(0, 8), least=st.integers(0, 4))
def test_who_leaves_takes_nothing_that_is_wanted(
    staying: list[Replica], wanted: int, least: int
) -> None:
    gone = scaling.surplus(staying, wanted, least)
    left = [one for one in staying if one not in gone]
    assert len(left) >= min(wanted, len(staying))
    assert len(gone) == len({one.id for one in gone})

    def serving(some: list[Replica]) -> int:
        return sum(one.state is ReplicaState.READY for one in some)

    assert serving(left) >= min(wanted, serving(staying))

    def firm(some: list[Replica]) -> int:
        return sum(not one.is_filler for one in some)

    assert firm(left) >= min(firm(staying), least, wanted)
    if wanted == 0:
        assert left == []


@given(staying=replicas, wanted=st.integers(0, 8), least=st.integers(0, 4), more=st.integers(0, 4))
def test_none_comes_above_the_maximum(
    staying: list[Replica], wanted: int, least: int, more: int
) -> None:
    deployment = a_deployment(min_replicas=least, max_replicas=max(least + more, 1))
    if scaling.next_is_filler(staying, wanted, deployment) is not None:
        assert len(staying) + 1 <= deployment.max_replicas
        assert scaling.blocks_firm(staying, wanted, deployment) is None


# ---- worth, and trying again --------------------------------------------------------------------


def test_the_nth_replica_is_worth_what_those_before_it_leave() -> None:
    model = Model(
        seq=1,
        name="m",
        provider="p",
        is_third_party=False,
        access=Access.OPEN,
        kind="generate",
        licence="l",
        licence_allows_download=True,
        source="",
        path="",
        sha256="",
        size_bytes=0,
        quantization="Q8_0",
        context=512,
        max_output=512,
        server="llama.cpp",
        template="",
        tokens_per_device_hour=2_000_000,
        lifecycle=Lifecycle.ACTIVE,
        legacy_on=None,
        end_of_life_on=None,
        created_at=NOW,
        version=1,
    )
    price = TierPrice(
        seq=1,
        model="m",
        tier="default",
        version="v",
        effective_from=NOW,
        input_micros=40_000,
        cached_micros=20_000,
        output_micros=160_000,
    )
    load = Load(running=4, waiting=2)
    shares = [scaling.expected_permille(load, 4, n) for n in (1, 2, 3)]
    assert shares == [1000, 500, 0]
    # 2 million tokens an hour at 0.16 a million: 0.32 when busy.
    assert [scaling.worth_micros(model, price, s) for s in shares] == [320_000, 160_000, 0]
    embed = replace(model, kind="embed")
    assert scaling.worth_micros(embed, price, 1000) == 80_000
    assert scaling.worth_micros(model, None, 1000) == 0
    assert scaling.worth_micros(replace(model, tokens_per_device_hour=0), price, 1000) == 0


def test_failed_starts_are_tried_again_later_and_later_to_a_bound() -> None:
    pauses = [scaling.retry_after(n).total_seconds() for n in range(1, 9)]
    assert pauses == [2, 5, 15, 30, 60, 60, 60, 60]
