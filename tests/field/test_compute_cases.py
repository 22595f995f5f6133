"""Field cases C1 and C2: dirty devices, and instances that were stopped."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import pytest

from sublet.base.kernel.errors import NoCapacity
from sublet.capacity import allocation, fleet
from sublet.records import metering
from sublet.rehearsal import World

Worlds = Callable[..., World]


def test_c1_a_dirty_device_goes_to_triage_and_who_waits_goes_elsewhere(worlds: Worlds) -> None:
    """A ends; its device reports 12 GiB and a process for ten minutes. B waits for it."""
    world = worlds(nodes=2, devices_per_node=1, head_room_percent=0)
    first, second = world.sign_up("first"), world.sign_up("second")
    a = first.rent("gpu-on-demand")
    neighbour = second.rent("gpu-on-demand")
    world.run_for(300)
    dirty = first.run(a)
    (device,) = dirty.device_ids
    world.engine.dirty(dirty.devices[0], 600)
    b = second.rent("gpu-on-demand", wait=True)
    assert second.state(b) == "awaiting_capacity"
    stopped_at = world.now
    first.stop(a)
    world.run_for(60)
    ended = first.run(a)
    assert ended.state == "gone"
    assert ended.exited_at is not None
    assert second.state(b) == "awaiting_capacity", "its devices go to nobody unchecked"
    world.run_until(ended.exited_at + timedelta(seconds=125))
    node = world.read(fleet.get_node, dirty.node_id)
    assert node.state == "triage"
    assert second.state(b) == "awaiting_capacity"
    second.stop(neighbour)
    world.run_for(60)
    assert second.state(b) == "running"
    served = second.run(b)
    assert served.node_id != dirty.node_id
    assert served.started_at is not None

    # Nobody pays from the exit on: overhead until triage, down from there.
    meter = world.read(metering.get_meter, dirty.id)
    assert meter.closed_at == ended.exited_at
    gone_at = first.run(a).gone_at
    assert gone_at is not None
    triage_at = gone_at + timedelta(seconds=120)
    spent = world.read(
        metering.partition, device_ids=[device], start=ended.exited_at, end=world.now
    )
    known = {use: ms for use, ms in spent.items() if ms}
    assert known == {
        "overhead": (triage_at - ended.exited_at) // timedelta(milliseconds=1),
        "down": (world.now - triage_at) // timedelta(milliseconds=1),
    }
    assert stopped_at <= ended.exited_at
    before = first.posted(a)
    world.run_for(700)
    assert first.posted(a) == before
    assert world.read(allocation.holder_of_device, device) is None


def test_c1_the_next_meter_opens_after_the_check(worlds: Worlds) -> None:
    """Clean within the limit: the same device is let again, and its check lies before the meter."""
    world = worlds(devices_per_node=1, head_room_percent=0)
    buyer = world.sign_up()
    a = buyer.rent("gpu-on-demand")
    world.run_for(300)
    world.engine.dirty(buyer.run(a).devices[0], 60)
    b = buyer.rent("gpu-on-demand", wait=True)
    buyer.stop(a)
    world.run_for(120)
    clean_at = world.now - timedelta(seconds=60)
    served = buyer.run(b)
    assert buyer.state(b) == "running"
    assert served.started_at is not None
    assert served.started_at >= clean_at
    left = buyer.run(a).exited_at
    assert left is not None
    uses = world.read(metering.partition, start=left, end=served.started_at)
    waited = (served.started_at - left) // timedelta(milliseconds=1)
    assert uses["overhead"] + uses["idle"] == waited
    assert uses["idle"] == 0, "the device went from hand to hand"


def test_c2_a_stopped_instance_holds_nothing_and_starts_as_a_new_admission(
    worlds: Worlds,
) -> None:
    """A pool of one: run A, stop A, run B, start A; then stop B."""
    world = worlds(devices_per_node=1, head_room_percent=0)
    buyer = world.sign_up()
    a = buyer.rent("gpu-on-demand")
    world.run_for(60)
    answer = buyer.stop(a)
    assert answer.still_costs_per_hour.micros == 0
    assert "costs nothing" in answer.explanation
    world.run_for(120)
    stopped = buyer.see(a)
    assert (stopped.state, stopped.claim_id) == ("stopped", None)
    assert world.read(allocation.find_claim_of, a.id) is None
    assert buyer.held(a) is None
    b = buyer.rent("gpu-on-demand")
    world.run_for(60)
    assert buyer.state(b) == "running"

    with pytest.raises(NoCapacity) as refused:
        buyer.start(a)
    assert refused.value.details["earliest_at"] is None
    assert refused.value.details["offer_to_wait"] is True
    assert buyer.state(a) == "stopped"
    assert buyer.start(a, wait=True).state == "awaiting_capacity"
    paid = buyer.posted(a)
    world.run_for(600)
    assert buyer.posted(a) == paid, "waiting is free"
    assert buyer.held(a) is None
    buyer.stop(b)
    world.run_for(120)
    assert buyer.state(a) == "running"
    assert [run.number for run in buyer.runs(a)] == [1, 2]
