"""F4 Notice cut short: what a restart, a clock and an operator in a hurry cannot do.

A wall that jumps is slewed after, as the kernel's own tests show: what is left of it here is a UTC
whose seconds are a little short. Webhooks come later: the notice is out when its metadata is.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest

from sublet.base.kernel.clock import SLEW_PPM, VirtualClock
from sublet.records import ledger, tenancy
from sublet.rehearsal import World
from sublet.rehearsal.world import START
from sublet.rights import market
from sublet.shops.compute import NoticeProtected, Reason

Worlds = Callable[..., World]
NOTICE = timedelta(seconds=120)


class SlewedClock(VirtualClock):
    """UTC as it follows a wall that jumped ahead: it gains half a millisecond a second."""

    def to_boot_ns(self, at: datetime) -> int:
        return super().to_boot_ns(at) * 1_000_000 // (1_000_000 + SLEW_PPM)

    def from_boot_ns(self, boot_ns: int) -> datetime:
        utc_ns = -(-boot_ns * (1_000_000 + SLEW_PPM) // 1_000_000)
        return super().from_boot_ns(utc_ns + 999)


def test_f4_the_notice_is_counted_on_the_boot_clock(worlds: Worlds) -> None:
    """While UTC hurries after a wall that jumped ten minutes, 120 of its seconds are too few."""
    clock = SlewedClock(START)
    world = worlds(devices_per_node=1, head_room_percent=0, clock=clock)
    buyer = world.sign_up()
    workload = buyer.rent("gpu-spot", notice=120)
    world.run_for(900)
    world.owner.recall(1)
    world.run_for(300)
    run = buyer.run(workload)
    seen = world.engine.run(run.id)
    assert seen.term_reason == "notice"
    assert run.published_at is not None
    assert seen.term_at is not None
    told_ns = clock.to_boot_ns(seen.term_at) - clock.to_boot_ns(run.published_at)
    assert 120_000_000_000 <= told_ns < 120_001_000_000


@pytest.mark.parametrize("killed", ["after publishing", "before publishing", "while it runs"])
def test_f4_restart_during_the_notice_moves_no_sigterm(worlds: Worlds, killed: str) -> None:
    world = worlds(devices_per_node=1, head_room_percent=0)
    buyer = world.sign_up()
    workload = buyer.rent("gpu-spot", notice=120)
    world.run_for(900)
    if killed != "while it runs":
        world.line.cut("notice", "after" if killed == "after publishing" else "before")
    world.owner.recall(1)
    world.run_for(40)
    if killed == "while it runs":
        world.restart()
    run = buyer.run(workload)
    live = world.engine.run(run.id)
    assert world.restarts == 1
    assert live.notice is not None, "metadata tells"
    published_at = run.published_at
    assert published_at is not None
    fixed = live.deadline_at
    assert fixed is not None
    assert fixed - published_at >= NOTICE
    world.run_until(fixed - timedelta(milliseconds=1))
    assert world.engine.run(run.id).term_at is None
    assert buyer.state(workload) == "interrupting"
    world.run_for(60)
    ended = world.engine.run(run.id)
    assert ended.term_at == fixed, "published once, fixed once"
    assert ended.term_reason == "notice"
    # The clock of a notice starts when the metadata is out, on the boot clock too.
    told_ns = world.clock.to_boot_ns(published_at)
    assert world.clock.to_boot_ns(fixed) - told_ns >= 120_000_000_000
    assert buyer.run(workload).published_at == published_at


def test_f4_immediate_cordon_needs_break_notice_and_pays_in_the_same_transaction(
    worlds: Worlds,
) -> None:
    world = worlds(devices_per_node=1, head_room_percent=0)
    buyer = world.sign_up()
    workload = buyer.rent("gpu-spot", notice=120)
    world.run_for(300)
    world.owner.recall(1)
    world.run_for(30)
    fixed = world.engine.run(buyer.run(workload).id).deadline_at
    with pytest.raises(NoticeProtected) as refused:
        world.owner.cordon("n0001", "immediate")
    assert refused.value.details["workloads"] == [workload.id]
    assert fixed is not None
    assert refused.value.details["earliest_at"] == fixed.isoformat()
    world.run_for(10)
    assert buyer.state(workload) == "interrupting"
    assert world.engine.run(buyer.run(workload).id).term_at is None, "refused is not begun"

    changes_before = world.commits
    world.owner.cordon("n0001", "immediate", break_notice=True)
    assert world.commits == changes_before + 1, "one transaction"
    meter = buyer.meter(workload)
    assert meter is not None
    assert meter.closed_at is not None, "closed in it"
    used = buyer.posted(workload)
    assert used > 0
    # t0 fell within the first ten minutes of its meter: the whole run is free, to the micro.
    assert buyer.posted(workload, market.INTERRUPTION_CREDIT) == -used
    assert buyer.balance == 1_000_000_000
    assert buyer.see(workload).reason == Reason.MAINTENANCE
    rows = world.read(tenancy.list_audit, world.owner.organisation_id, None, 1000)
    (row,) = [row for row in rows if row.action == "break_notice"]
    assert (row.target, row.result) == (workload.id, "ok")
    assert row.actor_id == world.owner.identity.actor().id

    world.run_for(60)
    run = buyer.run(workload)
    assert run.reason is Reason.MAINTENANCE
    assert buyer.posted(workload) == used, "nothing is billed past the break"
    credits = [
        transfer
        for transfer in world.read(
            ledger.list_transfers,
            buyer.organisation_id,
            world.now - timedelta(hours=1),
            world.now + timedelta(seconds=1),
        )
        if transfer.kind == market.INTERRUPTION_CREDIT
    ]
    assert [credit.amount_micros for credit in credits] == [used]


def test_f4_break_notice_on_demand_pays_the_running_hour(worlds: Worlds) -> None:
    world = worlds(devices_per_node=1, head_room_percent=0)
    buyer = world.sign_up()
    workload = buyer.rent("gpu-on-demand")
    world.run_for(2 * 3600 + 1800)
    world.owner.cordon("n0001", "immediate", break_notice=True)
    meter = buyer.meter(workload)
    assert meter is not None
    assert meter.closed_at is not None
    used = buyer.posted(workload)
    third_hour = meter.closed_at - (meter.opened_at + timedelta(hours=2))
    quantity = third_hour // timedelta(milliseconds=1)
    expected = round(quantity * 800_000 / 3_600_000)
    assert buyer.posted(workload, market.INTERRUPTION_CREDIT) == -expected
    assert buyer.balance == 1_000_000_000 - used + expected
