"""A deployment in its daily life on a real cloud: from zero and back, under load, and when its model
server or its weights are not what they should be."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from serving_cloud import CARRIED, PLAIN, SMOL, Serving, Steady, Stream, needs_weights, serving
from system.conftest import wait_until

from sublet.base.wire import rest
from sublet.sdk import ApiError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("serving")) as made:
        made.add_plain()
        yield made


@pytest.fixture
def cloud(opened: Serving) -> Iterator[Serving]:
    """With nothing deployed, before and after."""
    yield opened
    for deployment in opened.owner.deployments.list():
        opened.retire(deployment.id)
    opened.audit()


def uses(cloud: Serving) -> set[str]:
    return {device.use for device in cloud.owner.devices.list()}


def test_from_zero_and_back_with_a_request_in_the_queue(cloud: Serving) -> None:
    before = len([u for u in cloud.billed() if u.outcome == "ok"])
    deployment = cloud.deploy(PLAIN, idle_seconds=1)
    wait_until(lambda: not cloud.seen(deployment.id).replicas, 30, "nobody asks: no replica")
    idle_at = time.monotonic()
    assert cloud.seen(deployment.id).wanted == 0
    wait_until(lambda: uses(cloud) == {"idle"}, 10, "scrubbed")

    asked = Stream()
    thread = threading.Thread(target=cloud.stream, args=(PLAIN, 16, asked))
    thread.start()
    wait_until(lambda: cloud.seen(deployment.id).waiting == 1, 10, "it waits in the queue")
    thread.join(60)
    assert asked.is_whole, asked.failure
    assert asked.output > 0
    [first, second] = cloud.owner.deployments.replicas(deployment.id)
    assert (first.state, first.reason) == ("gone", "scaled_in")
    assert second.created_at > first.gone_at
    wait_until(lambda: not cloud.seen(deployment.id).replicas, 30, "and back")
    found = [u for u in cloud.billed() if u.outcome == "ok"][before:]
    assert [(u.input_uncached + u.cache_read, u.output) for u in found] == [
        (asked.prompt, asked.output)
    ]
    print(
        f"from zero: the first token after {asked.first_at - asked.began_at:.2f} s; "
        f"back to zero {time.monotonic() - asked.ended_at:.2f} s after the answer "
        f"(idle for {asked.began_at - idle_at:.2f} s before)"
    )


def test_up_under_load_and_down_when_nobody_asks(cloud: Serving) -> None:
    """One replica for each so many requests, as far as there are devices; none when all is calm."""
    needs_weights(cloud)
    deployment = cloud.deploy(SMOL, max_replicas=8, target=2, slots=4, idle_seconds=2)
    with Steady(cloud, SMOL, 24, 2 * cloud.devices) as clients:
        grown = cloud.until_ready(deployment.id, cloud.devices)
        clients.until_answered(2 * cloud.devices)
        assert cloud.seen(deployment.id).wanted >= cloud.devices
        # More are wanted than devices are there: that is said, and what serves goes on.
        for _ in range(3):
            wait_until(lambda: len(cloud.ready(deployment.id)) == cloud.devices, 5, "they stay")
    assert clients.broken() == []
    assert len(clients.whole()) == len(clients.done), "none was refused"
    assert all(replica.is_filler for replica in grown)
    wait_until(lambda: not cloud.seen(deployment.id).replicas, 40, "all calm: none")
    gone = list(cloud.owner.deployments.replicas(deployment.id))
    assert {r.reason for r in gone} == {"scaled_in"}
    wait_until(lambda: uses(cloud) == {"idle"}, 10, "scrubbed")


def test_a_server_that_dies_at_each_start_is_tried_less_and_less(cloud: Serving) -> None:
    """A GGUF file, as added, of an architecture that no server knows."""
    data = CARRIED.read_bytes()
    at = data.index(b"llama", data.index(b"general.architecture"))
    cloud.add_plain("odd", data=data[:at] + b"lhama" + data[at + 5 :])
    deployment = cloud.owner.deployments.create(rest.DeploymentCreate(model="odd"))

    def tried() -> list[rest.Replica]:
        return list(cloud.owner.deployments.replicas(deployment.id))

    wait_until(lambda: len(tried()) >= 3, 60, "the third try")
    [first, second, third] = tried()[:3]
    assert first.gone_at is not None
    assert second.gone_at is not None
    assert (second.created_at - first.gone_at).total_seconds() >= 2
    assert (third.created_at - second.gone_at).total_seconds() >= 5
    found = _failed(cloud, deployment.id)
    assert "it ended by itself with exit code 1: " in str(found.failure)
    assert "lhama" in str(found.failure), "its last words"
    assert found.retry_at is not None
    said = cloud.command("deployments", "list", "--json")
    assert "lhama" in said.stdout, said.stdout + said.stderr


def test_a_file_that_is_not_the_one_that_was_added_is_refused(cloud: Serving) -> None:
    cloud.add_plain("swapped")
    path = cloud.folder / "swapped.gguf"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    deployment = cloud.owner.deployments.create(rest.DeploymentCreate(model="swapped"))
    found = _failed(cloud, deployment.id)
    assert found.failure == (
        f"{path} is not the file that was added as swapped: its sha256 differs."
    )
    assert found.retry_at is not None
    assert list(cloud.owner.deployments.replicas(deployment.id)) == [], "nothing was started"
    path.write_bytes(data)
    cloud.until_ready(deployment.id)
    assert cloud.seen(deployment.id).failure is None
    # Nor is one added under another's digest.
    with pytest.raises(ApiError) as refused:
        cloud.add_plain("other", sha256="0" * 64)
    assert refused.value.code == "weights_changed"
    assert "its sha256 is" in refused.value.message


def test_weights_that_are_gone_are_named(cloud: Serving) -> None:
    cloud.add_plain("passing")
    path = cloud.folder / "passing.gguf"
    data = path.read_bytes()
    path.unlink()
    hint = cloud.owner.catalogue.get("passing").hint
    assert hint is not None
    assert "make setup" in hint
    done = cloud.command("deploy", "passing")
    assert done.returncode == 1
    said = " ".join((done.stdout + done.stderr).split())
    assert "The weights of passing are not on this machine" in said
    assert "make setup" in said
    assert "Traceback" not in said
    # Gone after it was deployed: the deployment says so, and heals.
    path.write_bytes(data)
    deployment = cloud.deploy("passing", idle_seconds=1)
    wait_until(lambda: not cloud.seen(deployment.id).replicas, 30, "back at zero")
    path.unlink()
    asked = Stream()
    thread = threading.Thread(target=cloud.stream, args=("passing", 8, asked))
    thread.start()
    assert str(path) in str(_failed(cloud, deployment.id).failure)
    path.write_bytes(data)
    thread.join(60)
    assert asked.is_whole, asked.failure


def _failed(cloud: Serving, deployment_id: str) -> rest.Deployment:
    found: rest.Deployment = wait_until(
        lambda: (d := cloud.seen(deployment_id)).failure and d, 30, "why it does not start"
    )
    return found
