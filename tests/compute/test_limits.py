"""What credit, quotas and the queue allow, and what one failure keeps from the others."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from sublet.base.kernel.errors import Conflict
from sublet.base.kernel.money import Money
from sublet.capacity import allocation
from sublet.records import ledger, tenancy
from sublet.shops import compute
from sublet.shops.compute import admission, life

Make = Callable[..., Any]
FOREVER = {"SIM_SECONDS": "inf"}


def drain(world: Any, *, leave: int = 0) -> None:
    """Pay out the buyer's free credit, but for that many micros."""
    organisation_id = world.buyer.organisation.id
    with world.books.work(world.owner.actor()) as work:
        free = ledger.available(work.tx, organisation_id)
        ledger.post(
            work,
            key="payout",
            debit=ledger.customer_account(organisation_id),
            credit=ledger.PAYMENTS,
            amount=free - Money(leave),
            kind="payout",
            organisation_id=organisation_id,
        )


def leave(world: Any, *workloads: compute.Workload) -> None:
    for workload in workloads:
        world.act(compute.stop_for, workload.id, reason=compute.Reason.USER)


def lost(world: Any, workload: compute.Workload) -> int:
    with world.books.read() as tx:
        return ledger.lost(tx, workload.contract_id).micros


# ---- credit -----------------------------------------------------------------------------------


def test_a_notice_that_credit_does_not_cover_ends_it_while_it_is_still_paid(world: Any) -> None:
    instance = world.rent(env={**FOREVER, "SIM_TERM_SECONDS": "12"})
    other = world.rent(who=world.other)
    world.run(60)
    drain(world)
    while world.hold(instance).expires_at - world.now >= timedelta(seconds=50):
        world.run(5)
    runway = world.last(instance).runway_until
    world.interrupt(instance, "maintenance")
    world.loop.step(world.now)
    run = world.last(instance)
    assert (world.state(instance), run.stop_reason) == ("stopping", "credit_exhausted")
    assert (run.t0, run.published_at, run.runway_until) == (None, None, runway)
    # Nobody looks for ten minutes, and another is to be served then.
    world.clock.advance_to(world.now + timedelta(minutes=10))
    world.restart()
    with world.books.work(world.other.actor()) as work:
        compute.stop(work, world.other, other.id)
    world.run(60)
    assert world.last(instance).reason is compute.Reason.CREDIT_EXHAUSTED
    assert world.state(instance) == world.state(other) == "stopped"
    assert lost(world, instance) == 0


def test_use_past_the_credit_is_the_owners_loss_and_ends_all_the_same(world: Any) -> None:
    instance = world.rent(env=FOREVER)
    world.run(60)
    # The engine was told to run on, and nobody looks when the money ends.
    run = world.last(instance)
    world.engine.extend(run.id, world.now + timedelta(hours=2))
    drain(world)
    world.clock.advance_to(world.now + timedelta(hours=1))
    world.restart()
    world.run(60)
    assert (world.state(instance), world.last(instance).reason) == ("stopped", "credit_exhausted")
    assert world.posted(instance) > 0
    assert lost(world, instance) > 0
    with world.books.read() as tx:
        customer = ledger.customer_account(world.buyer.organisation.id)
        assert ledger.balance(tx, customer) == Money(0)
        assert ledger.balance(tx, ledger.LOSSES) == -ledger.lost(tx, instance.contract_id)


def test_while_its_node_is_silent_a_hold_does_not_grow(make_world: Make) -> None:
    world = make_world(nodes=2, devices=1)
    first, second = world.rent(), world.rent()
    world.run(60)
    drain(world, leave=2_000_000)
    node_id = world.last(first).node_id
    [name] = [name for name, known in world.nodes.items() if known == node_id]
    world.engine.silence(name, 2 * 3600)
    world.run(200)
    held, runway = world.hold(first), world.last(first).runway_until
    world.run(5400)
    assert world.hold(first).amount <= held.amount
    assert world.last(first).runway_until == runway
    assert world.hold(second).expires_at > world.now
    world.run(2000)
    run = world.last(first)
    assert run.reason is compute.Reason.CONTROL_LOST
    assert world.meter(run).closed_at <= runway
    assert world.state(second) == "running"


# ---- quotas and the queue -----------------------------------------------------------------------


@pytest.mark.parametrize("by", ["key", "standing"])
def test_a_quota_holds_in_the_queue_too(make_world: Make, by: str) -> None:
    world = make_world(devices=3)
    with world.books.work(world.owner.actor()) as work:
        if by == "standing":
            organisation_id = world.buyer.organisation.id
            tenancy.set_standing(work, organisation_id, "unverified", "test")
            organisation = tenancy.get_organisation(work.tx, organisation_id)
            key = world.buyer.key
        else:
            organisation = world.buyer.organisation
            limits = tenancy.Limits(max_devices=1)
            key, _ = tenancy.create_key(work, world.buyer.principal.id, name="one", limits=limits)
    small = tenancy.Identity(organisation=organisation, principal=world.buyer.principal, key=key)
    full = [world.rent(who=world.other) for _ in range(3)]
    world.run(10)
    jobs = [world.job("sleep", "300", who=small, wait=True) for _ in range(2)]
    leave(world, *full)
    world.run(60)
    assert [world.state(job) for job in jobs] == ["running", "awaiting_capacity"]
    world.run(400)
    assert [world.state(job) for job in jobs] == ["completed", "running"]


def test_waiters_who_cannot_pay_keep_nobody_behind_them_waiting(
    make_world: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sublet.shops.compute.loops.WAITERS_A_PAGE", 3)
    world = make_world(devices=1)
    full = world.rent(who=world.other)
    world.run(10)
    for _ in range(7):
        world.rent(kind="job", wait=True)
    last = world.rent(kind="job", who=world.other, wait=True)
    drain(world)
    leave(world, full)
    tried: list[str] = []
    serve = admission.serve

    def served(work: Any, workload: compute.Workload) -> None:
        tried.append(workload.organisation_id)
        serve(work, workload)

    monkeypatch.setattr(admission, "serve", served)
    world.run(3)
    assert world.state(last) == "running"
    mine, others = (tried.count(who.organisation.id) for who in (world.buyer, world.other))
    assert mine <= others + 1, "in each pass one refusal speaks for all alike"


def test_a_waiter_with_a_longer_notice_keeps_no_shorter_one_waiting(make_world: Make) -> None:
    world = make_world(devices=1)
    with world.books.work(world.owner.actor()) as work:
        allocation.set_firm_shelf(work, world.pool_id, 0, None)
    full = world.rent(who=world.other, notice=30)
    world.run(10)
    long = world.rent(kind="job", notice=3600, wait=True)
    short = world.rent(kind="job", notice=30, wait=True)
    leave(world, full)
    world.run(60)
    assert (world.state(long), world.state(short)) == ("awaiting_capacity", "running")


# ---- one failure --------------------------------------------------------------------------------


def test_a_run_that_cannot_be_recorded_keeps_none_of_the_others(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = world.job("sleep", "100"), world.job("sleep", "100")
    world.run(20)
    ended = life.ended
    broken = {world.last(first).id}

    def fails(work: Any, run_id: str, end: Any) -> None:
        if run_id in broken:
            raise RuntimeError("broken")
        ended(work, run_id, end)

    monkeypatch.setattr(life, "ended", fails)
    world.run(120)
    assert (world.state(first), world.state(second)) == ("running", "completed")
    broken.clear()
    world.run(20)
    assert world.state(first) == "completed"


@pytest.mark.parametrize("error", [Conflict("moved on"), RuntimeError("broken")])
def test_an_event_that_always_fails_is_passed_over(
    world: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    first, second = world.rent(), world.rent()
    world.run(20)
    noticed = life.noticed

    def fails(work: Any, event: allocation.ClaimNoticed) -> None:
        if event.holder == first.id:
            raise error
        noticed(work, event)

    monkeypatch.setattr(life, "noticed", fails)
    world.interrupt(first)
    world.interrupt(second)
    for _ in range(12):
        world.loop.step(world.now)
    assert (world.state(first), world.state(second)) == ("running", "interrupting")


def test_an_event_that_failed_once_is_handled_at_the_next_step(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = world.rent()
    world.run(20)
    noticed, failed = life.noticed, []

    def fails_once(work: Any, event: allocation.ClaimNoticed) -> None:
        if not failed:
            failed.append(event)
            raise RuntimeError("once")
        noticed(work, event)

    monkeypatch.setattr(life, "noticed", fails_once)
    world.interrupt(instance)
    world.loop.step(world.now)
    assert world.state(instance) == "running"
    world.loop.step(world.now)
    assert world.state(instance) == "interrupting"
