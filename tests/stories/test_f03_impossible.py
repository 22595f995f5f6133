"""F3 The owner asks for the impossible: 64 devices by +5:00 of 4 idle, 36 spot, 12 on-demand with
24 h of notice and 12 in a block of 6 days."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

from sublet.capacity import allocation
from sublet.rehearsal import World
from sublet.rights.owner import RecallState, RowState

Worlds = Callable[..., World]
DAY = 86_400
GRACE, SCRUB = 30, 60
FREED_AFTER = timedelta(seconds=120 + GRACE + SCRUB)
IDLE, SPOT, FIRM, BLOCK = 4, 36, 12, 12


def test_f3_the_plan_its_first_forty_and_the_shortfall(worlds: Worlds) -> None:
    world = worlds(
        nodes=IDLE + SPOT + FIRM + BLOCK,
        devices_per_node=1,
        head_room_percent=0,
        audit_every=40,
    )
    buyers = [world.sign_up(f"buyer{n}", "5000") for n in range(3)]
    spot = [buyers[n % 3].rent("gpu-spot", notice=120) for n in range(SPOT)]
    firm = [buyers[n % 3].rent("gpu-on-demand", notice=DAY) for n in range(FIRM)]
    block = world.owner.sell_block("blk_1", buyers[0], devices=1, count=BLOCK, seconds=6 * DAY)
    world.run_for(900)
    with world.work() as work:
        held = allocation.place(work, block.id)
    assert held is not None
    assert len(held) == BLOCK

    asked_at = world.now
    by = asked_at + timedelta(minutes=5)
    plan = world.owner.plan(64, by=by)
    idle, noticed = plan.rows
    assert (idle.devices, idle.free_by, idle.victims) == (IDLE, asked_at, ())
    assert (noticed.devices, noticed.free_by) == (SPOT, by)
    assert {victim.workload_id for victim in noticed.victims} == {w.id for w in spot}
    for victim in noticed.victims:
        # Each noticed at +5:00 − 2:30 − scrub.
        assert victim.notice_at == by - FREED_AFTER
        assert victim.term_at == by - timedelta(seconds=GRACE + SCRUB)
    assert plan.shortfall_devices == FIRM + BLOCK
    day_later = asked_at + timedelta(seconds=DAY + GRACE + SCRUB)
    assert plan.shortfall_earliest_at == day_later

    book = world.read(allocation.get_book, world.pool_id, now=asked_at)
    short = allocation.plan(book, 64, by, now=asked_at).shortfall
    assert short is not None
    assert [(row.devices, row.free_by) for row in short.rows] == [
        (FIRM, day_later),
        (BLOCK, block.starts_at + timedelta(days=6)),
    ]
    assert {v.holder for v in short.rows[0].victims} == {w.id for w in firm}
    assert short.rows[1].victims == ()
    (offer,) = short.buy_back
    assert (offer.claim_id, offer.devices) == (block.id, BLOCK)
    assert offer.free_by == block.starts_at + timedelta(days=6)

    accepted = world.owner.accept(plan, [row.number for row in plan.rows])
    assert sum(row.devices for row in accepted.rows) == IDLE + SPOT
    world.run_until(by)
    done = world.owner.look(plan)
    assert done.state is RecallState.DELIVERED
    assert not done.is_late
    assert all(row.state is RowState.DELIVERED for row in done.rows)
    assert done.delivered_at is not None
    assert done.delivered_at <= by
    held_now = {device for row in done.rows for device in row.device_ids}
    assert len(held_now) == IDLE + SPOT

    for number, workload in enumerate(spot):
        run = buyers[number % 3].run(workload)
        assert run.published_at is not None
        assert run.published_at >= by - FREED_AFTER
        seen = world.engine.run(run.id)
        assert seen.term_reason == "notice"
        assert seen.term_at is not None
        assert seen.term_at - run.published_at >= timedelta(seconds=120)
    for number, workload in enumerate(firm):
        buyer = buyers[number % 3]
        run = buyer.run(workload)
        seen = world.engine.run(run.id)
        assert (buyer.state(workload), run.t0, seen.term_at) == ("running", None, None)
        assert seen.notice is None
    kept = world.read(allocation.get_claim, block.id)
    assert (kept.noticed_at, kept.term_at, kept.released_at) == (None, None, None)
    placed = world.read(allocation.placements_of, block.id)
    assert {row.device_id for row in placed} == set(held)

    (shortfall,) = world.owner.shortfalls()
    assert (shortfall.recall_id, shortfall.devices) == (plan.id, FIRM + BLOCK)
    assert (shortfall.needed_at, shortfall.earliest_at) == (by, day_later)
    assert shortfall.ended_at is None, "it stands in the report"


def test_f3_by_now_says_when_the_notice_lets_it(worlds: Worlds) -> None:
    """Without a date the spot devices come at +2:30 + scrub."""
    world = worlds(nodes=3, devices_per_node=1, head_room_percent=0)
    buyer = world.sign_up()
    for _ in range(2):
        buyer.rent("gpu-spot", notice=120)
    world.run_for(60)
    plan = world.owner.plan(3)
    assert [(row.devices, row.free_by) for row in plan.rows] == [
        (1, world.now),
        (2, world.now + FREED_AFTER),
    ]
    assert plan.shortfall_devices == 0
