"""F9 Weights walk out, its lines that need the whole cloud: the sealed model deployed over the API,
called through the gateway, and a tenant who looks for it before, beside and after."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import sealed_models
from sealed_models import OTHER_USER, leaks, probe
from serving_cloud import CARRIED, MUSE, SMOL, Serving, Stream, serving
from system.conftest import wait_until

from sublet.base.wire import rest
from sublet.sdk import ApiError, Gateway

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SHARED_MEMORY = Path("/dev/shm")
SPOT = "cpu-spot"
OPEN = (SMOL, "all-minilm-l6-v2")
LOOK = """
echo shared: $(ls -A /dev/shm | wc -l)
echo scratch: $(ls -A /scratch | wc -l)
echo sockets: $(find / -xdev -name '*.sock' 2>/dev/null | wc -l)
echo files: $(find / -xdev '(' -name '*.gguf' -o -name '*.sealed' ')' 2>/dev/null | wc -l)
echo door: $(ls %(door)s 2>&1 | tail -1)
echo folder: $(ls -A %(data)s 2>&1 | tail -1)
echo servers: $(cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n' | grep -c '/serve\\.py$')
echo opened: $(for pid in %(pids)s; do [ -e /proc/$pid/mem ] && echo yes; done | wc -l)
echo over
"""


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("sealed")) as made:
        yield made


@pytest.fixture
def cloud(opened: Serving) -> Iterator[Serving]:
    """With nothing deployed and nothing rented, before and after."""
    yield opened
    for box in opened.consumer.instances.list():
        opened.consumer.instances.terminate(box.id)
    for deployment in opened.owner.deployments.list():
        opened.retire(deployment.id)
    opened.audit()


def plaintext(cloud: Serving) -> list[str]:
    """Files of the data folder (homes, scratch, logs, books) and shared memory that hold some, or are
    a model that is not one of the open ones."""
    found = leaks(CARRIED.read_bytes(), cloud.cloud.data, SHARED_MEMORY)
    open_ones = {cloud.owner.catalogue.get(name).sha256 for name in OPEN}
    return [path for path in found if _sha256(Path(path)) not in open_ones]


def door_of(cloud: Serving, deployment: rest.Deployment) -> Path:
    [replica] = cloud.ready(deployment.id)
    door = cloud.cloud.data / "engine" / "homes" / replica.id / "model.sock"
    assert door.is_socket()
    return door


def facts_in(text: str) -> dict[str, str]:
    assert text.endswith("over\n"), text
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)


def run_own_job(cloud: Serving, script: str) -> dict[str, str]:
    """What a job of the owner's says."""
    jobs = cloud.owner.jobs
    job = jobs.create(rest.JobCreate(offer_id=SPOT, command=["sh", "-c", script]))
    wait_until(lambda: jobs.get(job.id).state in ("completed", "failed"), 40, "the job ended")
    assert jobs.get(job.id).state == "completed"
    return facts_in("".join(jobs.logs(job.id)))


def looks(cloud: Serving, pids: list[int], door: Path) -> str:
    return LOOK % {"door": door, "data": cloud.cloud.data, "pids": " ".join(map(str, pids))}


NOTHING = dict.fromkeys(("shared", "scratch", "sockets", "files", "servers", "opened"), "0")


def test_f9_a_job_beside_it_meets_nothing_of_it(cloud: Serving) -> None:
    """The owner's own, which alone may stand on its node."""
    if cloud.devices < 2:
        pytest.skip("one device: nothing can stand beside the replica")
    deployment = cloud.deploy(MUSE, min_replicas=1)
    [server] = cloud.server_pids(MUSE)
    door = door_of(cloud, deployment)
    seen = run_own_job(cloud, looks(cloud, [server], door))
    assert {name: seen[name] for name in NOTHING} == NOTHING
    assert "No such file" in seen["door"]
    assert "No such file" in seen["folder"]


def test_f9_every_key_release_is_audited_and_a_revoked_grant_ends_it(cloud: Serving) -> None:
    before = {(e.target, e.result) for e in releases(cloud)}
    deployment = cloud.deploy(MUSE, min_replicas=1)
    [replica] = cloud.ready(deployment.id)
    fresh = [e for e in releases(cloud) if (e.target, e.result) not in before]
    assert [(e.target, e.result, e.actor) for e in fresh] == [(replica.id, "ok", "system:models")]
    assert fresh[0].detail["model"] == MUSE
    assert fresh[0].at <= replica.ready_at
    [node] = cloud.owner.nodes.list()
    assert fresh[0].detail["node_id"] == node.id

    grants = [g.organisation_id for g in cloud.owner.catalogue.grants(MUSE)]
    assert grants == [rest.EVERYONE]
    # One of two grants taken back ends nothing.
    cloud.owner.catalogue.grant(MUSE, cloud.organisation)
    cloud.owner.catalogue.revoke(MUSE)
    assert cloud.stream(MUSE, 4).is_whole
    assert [r.id for r in cloud.ready(deployment.id)] == [replica.id]
    with cloud.streams(MUSE, 2, 400) as open_ones:
        cloud.owner.catalogue.revoke(MUSE, cloud.organisation)
        revoked_at = time.monotonic()
    wait_until(lambda: cloud.stream(MUSE, 4).code == "model_not_allowed", 5, "nobody may call it")
    wait_until(lambda: cloud.server_pids(MUSE) == [], 60, "its replica is gone")
    taken = time.monotonic() - revoked_at
    assert taken < 60
    assert all(one.is_whole for one in open_ones), "what had begun was let end"
    wait_until(lambda: not cloud.seen(deployment.id).replicas, 10, "and known to be gone")
    gone = next(cloud.owner.deployments.replicas(deployment.id))
    assert gone.reason == "grant_revoked"
    print(f"the replica was gone {taken:.2f} s after the grant")
    # Granted again it comes back, with a release of its own.
    cloud.owner.catalogue.grant(MUSE)
    cloud.until_ready(deployment.id)
    assert len([e for e in releases(cloud) if e.result == "ok"]) == len(
        {e.target for e in releases(cloud) if e.result == "ok"}
    )


def test_f9_a_foreign_sealed_model_without_a_verifier_is_never_loaded(cloud: Serving) -> None:
    """It is kept as ciphertext, and its deployment says why no replica starts."""
    before = len(releases(cloud))
    cloud.add_plain("foreign", access="sealed", is_third_party=True, provider="Others")
    cloud.owner.catalogue.grant("foreign")
    (cloud.folder / "foreign.gguf").unlink()
    deployment = cloud.owner.deployments.create(rest.DeploymentCreate(model="foreign"))
    wait_until(lambda: cloud.seen(deployment.id).failure, 30, "it says why")
    found = cloud.seen(deployment.id)
    assert "attest" in str(found.failure)
    assert cloud.ready(deployment.id) == []
    refusals = releases(cloud)[before:]
    assert refusals
    assert {e.result for e in refusals} == {"attestation_required"}
    assert plaintext(cloud) == []


def test_f9_gateway_and_api_tell_nothing_of_its_inside(cloud: Serving) -> None:
    cloud.deploy(MUSE, min_replicas=1)
    headers = {"authorization": f"Bearer {cloud.key}"}
    with httpx2.Client(base_url=cloud.url, headers=headers, trust_env=False) as http:
        shown = http.get("/v1/models").text + http.get(f"/v1/models/{MUSE}").text
        for path in ("/slots", "/props", "/lora-adapters", f"/v1/models/{MUSE}/weights"):
            assert http.get(path).status_code == 404, path
    assert MUSE in shown
    digest = cloud.owner.catalogue.get(MUSE).sha256
    assert len(digest) == 64
    inside = ("sealed", "GGUF", "gguf", ".sock", "sha256", digest, "n_embd", "vocab", "rep_")
    assert not [word for word in inside if word in shown]
    question = [{"role": "user", "content": "The"}]
    for body in ({"logprobs": True, "top_logprobs": 5}, {"logit_bias": {"7": 100}}):
        with Gateway(cloud.url, cloud.key) as gateway, pytest.raises(ApiError) as refused:
            list(gateway.chat(MUSE, question, max_tokens=1, **body))
        assert refused.value.code == "sealed_parameter"
    with pytest.raises(ApiError) as kept:
        b"".join(cloud.consumer.catalogue.weights(MUSE))
    assert kept.value.code == "weights_sealed"


def test_f9_nobody_reaches_it_and_nothing_is_left_for_who_comes_after(cloud: Serving) -> None:
    assert plaintext(cloud) == []
    deployment = cloud.deploy(MUSE)
    answered = cloud.stream(MUSE, 24)
    assert answered.is_whole, answered.failure
    assert plaintext(cloud) == []
    door = door_of(cloud, deployment)
    [server] = cloud.server_pids(MUSE)
    check_fences(server, door)

    # A stranger's shell is refused, or admitted for an instant when it will have left.
    body = rest.InstanceCreate(offer_id=SPOT, notice_seconds=5)
    try:
        early = cloud.consumer.instances.create(body)
    except ApiError as beside:
        refusal = (beside.code, bool(beside.details["earliest_at"]))
    else:
        is_later = early.starts_at is not None and early.starts_at > early.created_at
        refusal = ("sealed_node", is_later)
        cloud.consumer.instances.terminate(early.id)
        cloud.owner.deployments.retire(deployment.id)  # That instant may be minutes away.
    assert refusal == ("sealed_node", True)
    box = cloud.consumer.instances.create(body.model_copy(update={"wait": True}))

    def runs() -> bool:
        is_running: bool = cloud.consumer.instances.get(box.id).state == "running"
        assert not (is_running and cloud.server_pids(MUSE)), "side by side"
        return is_running

    wait_until(runs, 60, "it runs")
    # Then the same node is theirs, and nothing of it is there any more.
    assert plaintext(cloud) == []
    if door.exists():
        assert connects(os.geteuid(), door) == "ConnectionRefusedError", "nobody listens there"
    look = ["sh", "-c", looks(cloud, [server], door)]
    seen = facts_in(cloud.consumer.instances.exec(box.id, rest.ExecCreate(argv=look)).stdout)
    assert {name: seen[name] for name in NOTHING} == NOTHING
    assert "No such file" in seen["door"]
    assert "No such file" in seen["folder"]
    if cloud.seen(deployment.id).state == "active":
        check_stays_away(cloud, deployment.id)


def check_fences(server: int, door: Path) -> None:
    """Its process and its socket, for another user of the machine and for its own uid."""
    assert door.stat().st_mode & 0o777 == 0o600
    assert door.parent.stat().st_mode & 0o077 == 0
    if os.geteuid() != 0:
        return
    address = sealed_models.weights_address(server)
    assert set(probe(OTHER_USER, server, address).values()) == {"refused"}
    own = door.stat().st_uid
    assert own >= 200_000, "a uid of its own"
    assert set(probe(own, server, address, namespace=True).values()) == {"refused"}
    assert connects(OTHER_USER, door) == "PermissionError"
    assert connects(0, door) == "connected", "root of the host can: docs/sealed.md says so"


def check_stays_away(cloud: Serving, deployment_id: str) -> None:
    """It does not come back beside a stranger, though a request asks for it."""
    asked = Stream()
    thread = threading.Thread(
        target=cloud.stream, args=(MUSE, 4, asked), kwargs={"patience": 4}, daemon=True
    )
    thread.start()
    wait_until(lambda: "trangers" in str(cloud.seen(deployment_id).failure), 20, "refused")
    assert cloud.server_pids(MUSE) == []
    assert cloud.seen(deployment_id).replicas == []
    thread.join(60)
    assert not asked.is_whole
    assert not asked.texts


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def releases(cloud: Serving) -> list[rest.AuditEntry]:
    return [e for e in cloud.owner.audit.list() if e.action == "key_release"]


_CONNECT = """
import os, socket, sys
if os.geteuid() == 0:
    os.setgroups([])
os.setresgid(*[int(sys.argv[1])] * 3); os.setresuid(*[int(sys.argv[1])] * 3)
try:
    folder, name = os.path.split(sys.argv[2])
    descriptor = os.open(folder, os.O_PATH)
    socket.socket(socket.AF_UNIX).connect(f"/proc/self/fd/{descriptor}/{name}")
    print("connected")
except OSError as error:
    print(type(error).__name__)
"""


def connects(uid: int, door: Path) -> str:
    """What a process of that user meets at the engine's socket."""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _CONNECT, str(uid), str(door)],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout.strip()
