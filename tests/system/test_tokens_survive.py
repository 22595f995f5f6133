"""kill -9 of everything that tokens pass through, one after the other, on a cloud that is in use:
no answer that came is unbilled, none is billed twice, what was lost is the owner's."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta

import pytest
from serving_cloud import RETRY_SECONDS, SMOL, Serving, Steady, Stream, needs_weights, serving
from system.conftest import wait_until

from sublet.base.wire import rest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

STALE_SECONDS = 6
LONG, SHORT = 300, 24


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("survive")
    with serving(folder, gateway_stale_seconds=STALE_SECONDS) as made:
        needs_weights(made)
        made.price(SMOL)
        made.deploy(SMOL, made.devices, min_replicas=made.devices, max_replicas=made.devices)
        yield made


@pytest.fixture
def cloud(opened: Serving) -> Iterator[Serving]:
    """With every replica ready; afterwards its books are audited, alive and by the command."""
    [deployment] = opened.owner.deployments.list()
    opened.until_ready(deployment.id, opened.devices)
    yield opened
    opened.audit()
    opened.audit_command()


def deployment_of(cloud: Serving) -> rest.Deployment:
    [found] = cloud.owner.deployments.list()
    return found


def lost_rows(cloud: Serving) -> int:
    return sum(u.outcome == "lost" for u in cloud.billed())


def token_losses(cloud: Serving) -> int:
    """Micros that were ever posted as the owner's loss."""
    now: datetime = cloud.owner.status().now
    found = cloud.owner.money.transfers(
        start=now - timedelta(days=1),
        end=now + timedelta(days=1),
        organisation_id=cloud.organisation,
    )
    return sum(t.amount.micros for t in found if t.kind == "token_loss")


def test_a_gateway_that_dies_takes_its_open_streams_and_no_more(cloud: Serving) -> None:
    for _ in range(3):
        assert cloud.stream(SMOL, SHORT).is_whole
    before, losses = lost_rows(cloud), token_losses(cloud)
    with cloud.streams(SMOL, 3, LONG) as open_ones:
        # What is open is written down once a second.
        wait_until(lambda: min(one.texts for one in open_ones) > 1, 20, "they run")
        time.sleep(1.5)
        assert not any(one.ended_at for one in open_ones)
        cloud.kill("gateway")
    assert not any(one.is_whole for one in open_ones)
    assert cloud.stream(SMOL, SHORT).is_whole, "another one serves"
    cloud.await_books(lost=before + 3)
    assert token_losses(cloud) > losses, "what was made for nobody is the owner's loss"


def test_link_and_loops_may_die_under_traffic(cloud: Serving) -> None:
    before = lost_rows(cloud)
    with Steady(cloud, SMOL, SHORT, 4) as clients:
        clients.until_answered(4)
        for role in ("link", "loops", "link"):
            cloud.kill(role)
            clients.until_answered(4)
    assert clients.broken() == []
    cloud.await_books(lost=before)


def test_without_a_control_plane_it_goes_on_for_as_long_as_it_may(cloud: Serving) -> None:
    before = lost_rows(cloud)
    assert cloud.stream(SMOL, SHORT).is_whole
    link = cloud.pid_of("link")
    os.kill(link, signal.SIGSTOP)
    away_at = time.monotonic()
    try:
        long_one = Stream()
        thread = threading.Thread(target=cloud.stream, args=(SMOL, LONG, long_one))
        thread.start()
        assert cloud.stream(SMOL, SHORT).is_whole, "on what it was allowed"

        def refused() -> Stream | None:
            asked = cloud.stream(SMOL, 2)
            return None if asked.is_whole else asked

        stale: Stream = wait_until(refused, STALE_SECONDS + 10, "it is stale")
        after = stale.began_at - away_at
        assert stale.code == "snapshot_stale"
        assert stale.is_refused
        assert stale.failure.retry_after_seconds <= RETRY_SECONDS
        # It counts from the last snapshot that it saw, which was a quarter of it old at most.
        assert STALE_SECONDS / 2 <= after <= STALE_SECONDS + 3
        thread.join(60)
        assert long_one.is_whole, "what had begun is let end"
    finally:
        os.kill(link, signal.SIGCONT)
    wait_until(lambda: cloud.stream(SMOL, 2).is_whole, 20, "it serves again")
    cloud.await_books(lost=before)
    print(f"refused {after:.1f} s after the link fell silent, limit {STALE_SECONDS} s")


def test_a_replica_that_dies_is_replaced(cloud: Serving) -> None:
    before = lost_rows(cloud)
    deployment = deployment_of(cloud)
    first = {r.id for r in cloud.ready(deployment.id)}
    with cloud.streams(SMOL, 2 * cloud.devices, LONG) as open_ones:
        victim = cloud.server_pids(SMOL)[0]
        os.kill(victim, signal.SIGKILL)
        # The gateway is not told yet; who comes now and meets the dead one is sent on.
        others = [cloud.stream(SMOL, 4) for _ in range(3)] if cloud.devices > 1 else []
    cut = [one for one in open_ones if not one.is_whole]
    assert len(cut) == 2, "those of the dead one, and no others"
    assert {one.code for one in cut} == {"stream_interrupted"}
    assert all(one.texts for one in cut)
    assert all(one.is_whole for one in others)

    def is_replaced() -> bool:
        now = {r.id for r in cloud.ready(deployment.id)}
        return len(now) == cloud.devices and len(first - now) == 1

    wait_until(is_replaced, 40, "another one comes")
    gone = [r for r in cloud.owner.deployments.replicas(deployment.id) if r.state == "gone"]
    assert gone[-1].reason == "it ended by itself with exit code 137"
    cloud.await_books(lost=before)


def test_before_its_first_byte_a_request_goes_to_another_replica(cloud: Serving) -> None:
    if cloud.devices < 2:
        pytest.skip("one device: there is no other replica")
    before = lost_rows(cloud)
    deployment = deployment_of(cloud)
    victim = cloud.server_pids(SMOL)[0]
    os.kill(victim, signal.SIGSTOP)  # It takes requests, and answers none.
    asked = [Stream() for _ in range(4)]
    threads = [threading.Thread(target=cloud.stream, args=(SMOL, SHORT, one)) for one in asked]
    for thread in threads:
        thread.start()

    def hangs() -> bool:
        replicas = cloud.seen(deployment.id).replicas
        return sum(one.ended_at > 0 for one in asked) == 2 and any(
            r.in_flight == 2 for r in replicas
        )

    try:
        wait_until(hangs, 20, "two are with the one that is silent")
    finally:
        os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join(60)
    assert all(one.is_whole for one in asked), [one.code for one in asked]
    cloud.await_books(lost=before)
