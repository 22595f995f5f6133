"""F1 Crash between start and commit: one process, one meter from its real start, one hold."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import pytest

from sublet.base.kernel.interval import millis_between
from sublet.capacity.engines.simulated import FaultKind
from sublet.records import ledger
from sublet.rehearsal import Consumer, World
from sublet.rights import market
from sublet.shops.compute import Workload

Worlds = Callable[..., World]


def paid(world: World, who: Consumer, workload: Workload) -> int:
    """What the latest run comes to by its meter and its contract's price, rounded once."""
    meter = who.meter(workload)
    assert meter is not None
    assert meter.closed_at is not None
    contract = world.read(market.get_contract, workload.contract_id)
    quantity = millis_between(meter.opened_at, meter.closed_at) * meter.devices
    return round(Fraction(quantity * contract.price_micros, 3_600_000))


@pytest.mark.parametrize("side", ["before", "after"])
def test_f1_killed_around_start(worlds: Worlds, side: str) -> None:
    world = worlds(start_seconds=2.0)
    buyer = world.sign_up()
    world.line.cut("start", side)  # type: ignore[arg-type]
    workload = buyer.rent("gpu-on-demand")
    world.run_for(20)
    assert world.restarts == 1
    (run,) = buyer.runs(workload)
    (live,) = world.engine.live_runs()
    assert live.spec.run_id == run.id
    assert run.started_at == live.started_at
    meter = buyer.meter(workload)
    assert meter is not None
    assert meter.opened_at == live.started_at
    (hold,) = world.read(ledger.list_holds, buyer.organisation_id)
    assert hold.subject == workload.id
    world.run_for(600)
    buyer.stop(workload)
    world.run_for(60)
    assert buyer.state(workload) == "stopped"
    assert buyer.held(workload) is None
    assert buyer.posted(workload) == paid(world, buyer, workload) > 0
    assert buyer.balance == 1_000_000_000 - buyer.posted(workload)


def test_f1_answered_failed_but_it_runs(worlds: Worlds) -> None:
    world = worlds(start_seconds=2.0)
    buyer = world.sign_up()
    world.engine.fail_next_start("n0001", FaultKind.START_ANSWER_LOST)
    workload = buyer.rent("gpu-on-demand")
    world.run_for(5)
    (run,) = buyer.runs(workload)
    (live,) = world.engine.live_runs()
    assert live.spec.run_id == run.id
    assert buyer.state(workload) == "running"
    assert run.started_at == live.started_at
    assert len(world.read(ledger.list_holds, buyer.organisation_id)) == 1


def test_f1_answered_failed_and_never_handed_over_is_never_billed(worlds: Worlds) -> None:
    world = worlds(start_seconds=30.0)
    buyer = world.sign_up()
    world.engine.fail_next_start("n0001", FaultKind.START_ANSWER_LOST)
    workload = buyer.rent("gpu-spot")
    world.run_for(1)
    assert len(world.engine.live_runs()) == 1
    buyer.end(workload)
    world.run_for(60)
    assert buyer.state(workload) == "terminated"
    assert world.engine.live_runs() == []
    assert buyer.meter(workload) is None
    assert buyer.posted(workload) == 0
    assert buyer.available == buyer.balance == 1_000_000_000


def test_f1_killed_at_every_call_of_a_life(worlds: Worlds) -> None:
    """Whichever call is cut, on whichever side, one life is one process and one bill."""
    for side in ("before", "after"):
        for call in ("start", "observe", "notice", "extend", "scrub", "stop"):
            world = worlds(start_seconds=2.0, audit_every=20)
            buyer = world.sign_up()
            workload = buyer.rent("gpu-spot")
            world.line.cut(call, side)  # type: ignore[arg-type]
            world.run_for(900)
            recall = world.owner.recall(2, until=None)
            world.run_for(400)
            assert world.owner.look(recall).state == "delivered"
            assert len(buyer.runs(workload)) == 1
            assert buyer.state(workload) == "stopped"
            assert buyer.posted(workload) == paid(world, buyer, workload)
            buyer_is_whole = buyer.balance + buyer.posted(workload) == 1_000_000_000
            assert buyer_is_whole
            assert world.restarts == (0 if call == "stop" else 1)
