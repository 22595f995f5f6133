"""The owner recalls every device while clients stream: no stream that began breaks off, every token
is billed once, and the model comes back by itself when the devices do."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_cloud import SMOL, Serving, Steady, needs_weights, serving
from system.conftest import wait_until

from sublet.base.wire import rest
from sublet.shops.models.servers import MODEL_SOCKET, SERVERS, ModelFacts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

CLIENTS, TOKENS, DRAIN_SECONDS = 6, 32, 30


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Serving]:
    with serving(tmp_path) as made:
        needs_weights(made)
        yield made


def own_stop(model: rest.CatalogueModel, path: Path) -> float:
    """Seconds from SIGTERM to the exit of a model server that has nothing in hand, by itself."""
    server = SERVERS[model.server]
    facts = ModelFacts(name=model.name, path=str(path), kind="generate", context=model.context)
    home = Path(tempfile.mkdtemp(prefix="sublet-model-"))  # A socket's address is short.
    try:
        spec = server.spawn(facts, devices=1, slots=4)
        process = subprocess.Popen(
            spec.argv, cwd=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_until(lambda: server.ready(str(home / MODEL_SOCKET), facts), 30, "it serves")
            begun = time.monotonic()
            process.terminate()
            assert process.wait(10) == 0
            return time.monotonic() - begun
        finally:
            process.kill()
            process.wait()
    finally:
        shutil.rmtree(home)


def weights_of(cloud: Serving, model: str) -> Path:
    target = cloud.folder / "weights.gguf"
    with target.open("wb") as sink:
        for piece in cloud.consumer.catalogue.weights(model):
            sink.write(piece)
    return target


def test_no_stream_breaks_off_and_every_token_is_billed_once(cloud: Serving) -> None:
    stop_seconds = own_stop(cloud.owner.catalogue.get(SMOL), weights_of(cloud, SMOL))
    cloud.price(SMOL)
    deployment = cloud.deploy(
        SMOL, max_replicas=cloud.devices, target=2, slots=4, drain_seconds=DRAIN_SECONDS
    )
    with Steady(cloud, SMOL, TOKENS, CLIENTS) as clients:
        first = cloud.until_ready(deployment.id, cloud.devices)
        clients.until_answered(CLIENTS)

        planned = cloud.owner.recalls.plan(
            rest.RecallCreate(pool_id=cloud.pool.id, count=cloud.devices)
        )
        noticed_at = time.monotonic()
        recall = cloud.owner.recalls.accept(planned.id)
        limit = DRAIN_SECONDS + cloud.pool.scrub_seconds + 20
        wait_until(
            lambda: cloud.owner.recalls.get(recall.id).state == "delivered", limit, "delivered"
        )
        delivered_at = time.monotonic()
        assert {d.use for d in cloud.owner.devices.list()} == {"first_party"}
        recall = cloud.owner.recalls.get(recall.id)
        assert not recall.late
        gone = {r.id: r for r in cloud.owner.deployments.replicas(deployment.id)}
        assert all(gone[r.id].reason == "owner_recall" for r in first)

        # What begins now waits in the gateway's queue; who is refused is told when to come again.
        wait_until(lambda: cloud.seen(deployment.id).waiting == CLIENTS, 20, "all wait")
        served_before = len(clients.whole())
        cloud.owner.recalls.give_back(recall.id)
        returned_at = time.monotonic()
        cloud.until_ready(deployment.id)
        clients.until_answered(CLIENTS)
    back_at = min(one.first_at for one in clients.whole() if one.first_at > returned_at)
    assert len(clients.whole()) > served_before

    assert clients.broken() == []
    assert all(one.failure.retry_after_seconds <= 5 for one in clients.done if one.is_refused)
    cloud.await_books()

    open_then = [o for o in clients.whole() if o.first_at < noticed_at < o.ended_at]
    assert open_then, "none was open at the notice"
    emptied_at = max(o.ended_at for o in open_then)
    print(
        f"{cloud.devices} devices, {CLIENTS} clients, {len(clients.whole())} streams of up to "
        f"{TOKENS} tokens, {len(open_then)} open at the notice.\n"
        f"Notice to the end of the last of them {emptied_at - noticed_at:.2f} s, from there to the "
        f"free device {delivered_at - emptied_at:.2f} s (scrub: {cloud.pool.scrub_seconds} s allowed); "
        f"in all {delivered_at - noticed_at:.2f} s.\n"
        f"The model server's own stop, with nothing in hand: {stop_seconds * 1000:.0f} ms.\n"
        f"Return to the next token: {back_at - returned_at:.2f} s."
    )
