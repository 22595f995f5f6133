"""F9 Weights walk out: a tenant tries every door in turn, on the real engine and a real model.

The sealed model is served in a sandbox as a deployment would have it: ciphertext shown read-only,
the key released in a Work and brought to its socket. What asks over HTTP is refused by the gateway
before it gets here.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sealed_models
from hypothesis import given
from hypothesis import strategies as st
from sealed_models import KEK, MUSE, OTHER_USER, leaks, probe, refusal_of, wait_until

from sublet.app.loops import cloud_loops
from sublet.base.kernel.clock import SystemClock
from sublet.base.kernel.ids import SystemIds
from sublet.base.store import Actor, Store, metadata, open_store
from sublet.capacity import allocation, fleet
from sublet.capacity.engines.local import LocalEngine
from sublet.capacity.engines.port import Observation, Phase, StartSpec
from sublet.gateway import dialects
from sublet.gateway.dialects import Surface, checks
from sublet.records import tenancy
from sublet.rehearsal import World
from sublet.rights import market
from sublet.shops import compute, models
from sublet.shops.models import keys
from sublet.shops.models.servers import KEY_SOCKET, MODEL_SOCKET, SERVERS, ModelFacts, unix

PLAIN = MUSE.read_bytes()
SYSTEM = Actor.system("models")
OVER = (Phase.EXITED, Phase.FAILED)
SHARED_MEMORY = Path("/dev/shm")


class Machine:
    """One node: the local engine, the books, muse-tiny sealed in the data folder."""

    def __init__(self) -> None:
        self.data = Path(tempfile.mkdtemp(prefix="sublet-test-f9-"))
        self.data.chmod(0o711)
        self.clock = SystemClock.unanchored()
        self.engine = LocalEngine(self.data / "engine", self.clock, disk_reserve_bytes=0)
        self.devices = [device.name for device in self.engine.inventory().devices]
        self.numbers = itertools.count(1)
        (self.data / "models").mkdir(mode=0o711)
        self.sealed = keys.import_sealed(
            KEK, source=MUSE, folder=self.data / "models", model="muse-tiny", key_id="key_1"
        )
        self.books: Store

    def open_books(self) -> None:
        """New ones: each test reads only of what it did."""
        path = self.data / f"{next(self.numbers)}.db"
        self.books = open_store(f"sqlite:///{path}", self.clock, SystemIds())
        metadata.create_all(self.books.engine)
        with self.books.work(SYSTEM) as work:
            keys.keep(work, self.sealed.wrapped)

    def start(self, kind: str, command: tuple[str, ...], **fields: Any) -> str:
        number = next(self.numbers)
        values: dict[str, Any] = {
            "run_id": f"run_{number}",
            "workload_id": f"wl_{number}",
            "organisation_id": f"org_{number}",
            "kind": kind,
            "devices": self.devices[:1],
            "memory_bytes": 1 << 30,
            "disk_bytes": 256 << 20,
            "command": command,
            "script": "",
            "env": {},
            "home": f"home_{number}",
            "hostname": "box",
            "outbound": False,
            "stop_grace_seconds": 1,
            "notice_signal": None,
            "metadata": {},
            "runway_until": self.clock.now() + timedelta(seconds=600),
        }
        self.engine.start(StartSpec(**{**values, **fields}))
        return f"run_{number}"

    def start_replica(self) -> str:
        facts = ModelFacts(
            name="muse-tiny",
            path=str(self.sealed.path),
            kind="generate",
            context=512,
            is_sealed=True,
        )
        server = SERVERS["llama.cpp"].spawn(facts, devices=1, slots=1)
        return self.start(
            "replica",
            server.argv,
            env=dict(server.env),
            read_only=server.read_only,
            lock_memory=server.lock_memory,
        )

    def see(self, run_id: str) -> Observation:
        return self.engine.observe()[run_id]

    def log(self, run_id: str) -> str:
        return self.engine.logs(run_id, limit=1 << 20)[0].decode()

    def asked(self, run_id: str, **fields: Any) -> keys.Asked:
        values: dict[str, Any] = {
            "replica_id": run_id,
            "model": "muse-tiny",
            "node_id": "node_1",
            "is_starting": True,
            "is_granted": True,
            "is_third_party": False,
            "is_own_site": True,
        }
        return keys.Asked(**{**values, **fields})

    def knocked(self, run_id: str) -> Any:
        door = self.engine.door(run_id, KEY_SOCKET)

        def listens() -> bool:
            assert self.see(run_id).phase not in OVER, self.log(run_id)
            return os.path.exists(door)

        wait_until(listens, 20, "the replica asks for its key")
        return keys.knock(door)

    def unlock(self, run_id: str) -> keys.Peer:
        with self.knocked(run_id) as caller:
            with self.books.work(SYSTEM) as work:
                data_key = keys.release(work, KEK, self.asked(run_id), peer=caller.peer)
            caller.deliver(data_key)
            peer: keys.Peer = caller.peer
        wait_until(lambda: self.complete(run_id), 30, "the model answers")
        return peer

    def complete(self, run_id: str) -> Any:
        door = self.engine.door(run_id, MODEL_SOCKET)
        body = {"prompt": "The", "max_tokens": 1}
        return unix.post(door, "/v1/completions", body, seconds=30)

    def run_job(self, script: str, device: str) -> str:
        run_id = self.start("job", ("sh", "-c", script), devices=(device,))
        wait_until(lambda: self.see(run_id).phase in OVER, 30, "the job ends")
        return self.log(run_id)

    def evict(self, run_id: str) -> None:
        self.engine.stop(run_id, grace_seconds=0, reason="test")
        wait_until(lambda: self.see(run_id).phase in OVER, 20, "it is gone")
        assert self.engine.scrub(run_id).clean

    def leaks(self) -> list[str]:
        """Plaintext in files of the data folder (homes, scratch, logs, books), and shared memory."""
        return leaks(PLAIN, self.data, SHARED_MEMORY)

    def close_books(self) -> None:
        self.books.close()
        for run_id, seen in self.engine.observe().items():
            if seen.phase not in OVER:
                self.evict(run_id)


@pytest.fixture(scope="module")
def node() -> Iterator[Machine]:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    made = Machine()
    yield made
    shutil.rmtree(made.data)


@pytest.fixture
def machine(node: Machine) -> Iterator[Machine]:
    node.open_books()
    yield node
    node.close_books()


TENANT = """
echo processes: $(ls /proc | grep -c '^[0-9]')
echo shared: $(ls -A /dev/shm | wc -l)
echo scratch: $(ls -A /scratch | wc -l)
echo sockets: $(find / -xdev -name '*.sock' 2>/dev/null | wc -l)
echo homes: $(ls -A /home | tr '\\n' ' ')
echo data: $(ls -A %(data)s 2>&1 | tail -1)
echo door: $(ls %(door)s 2>&1 | tail -1)
echo weights: $(grep -rl -e SUBSEAL1 -e muse-tiny / --include='*.gguf' --include='*.sealed' 2>/dev/null | wc -l)
for pid in $(ls /proc | grep '^[0-9]'); do
  case $(tr '\\0' ' ' < /proc/$pid/cmdline 2>/dev/null) in *serve.py*) echo found $pid;; esac
done
echo over
"""


def test_f9_a_tenant_beside_it_meets_nothing_of_it(machine: Machine) -> None:
    """Placed together all the same, as compute never does: the sandbox alone still holds."""
    if len(machine.devices) < 2:
        pytest.skip("one device: nothing can be placed beside the replica")
    replica = machine.start_replica()
    peer = machine.unlock(replica)
    door = machine.engine.door(replica, MODEL_SOCKET)
    seen = machine.run_job(TENANT % {"data": machine.data, "door": door}, machine.devices[1])
    facts = dict(re.findall(r"^(\w+): ?(.*)$", seen, re.M))
    assert "found" not in facts
    assert seen.endswith("over\n")
    assert (facts["shared"], facts["scratch"], facts["sockets"]) == ("0", "0", "0")
    assert facts["homes"].strip() == "tenant"
    assert "No such file" in facts["data"]
    assert "No such file" in facts["door"]
    assert facts["weights"] == "0"
    # With all processes in sight: as its own uid in a sandbox's namespace, and as another uid.
    is_root = os.geteuid() == 0
    address = sealed_models.weights_address(peer.pid) if is_root else 0x10000
    own = peer.uid if is_root else None
    assert set(probe(own, peer.pid, address, namespace=True).values()) == {"refused"}
    if is_root:
        assert peer.uid >= 200_000, "a uid of its own"
        assert set(probe(OTHER_USER, peer.pid, address).values()) == {"refused"}
    assert machine.complete(replica) is not None


def test_f9_nothing_is_left_on_disk_or_in_shared_memory(machine: Machine) -> None:
    """While it serves, in a snapshot of its volume, after a crash, and for the next tenant."""
    assert machine.leaks() == []
    replica = machine.start_replica()
    peer = machine.unlock(replica)
    assert machine.leaks() == []
    home = Path(machine.engine.door(replica, MODEL_SOCKET)).parent
    assert [path.name for path in home.iterdir()] == [MODEL_SOCKET], "its volume: one socket"
    if os.geteuid() == 0:
        os.kill(peer.pid, signal.SIGSEGV)
    else:
        machine.engine.signal(replica, "SIGSEGV")
    wait_until(lambda: machine.see(replica).phase in OVER, 20, "it crashed")
    assert machine.see(replica).exit_code == 128 + signal.SIGSEGV
    assert [path.name for path in home.iterdir()] == [MODEL_SOCKET], "no core"
    assert machine.engine.scrub(replica).clean
    assert machine.leaks() == []
    seen = machine.run_job("ls -A /dev/shm /scratch /home/tenant; echo over", machine.devices[0])
    assert seen.split() == ["/dev/shm:", "/home/tenant:", "/scratch:", "over"]


def test_f9_killed_while_it_loads(machine: Machine) -> None:
    """Between the key and the first answer, by kill -9 of all of the run."""
    for _ in range(3):
        replica = machine.start_replica()
        with machine.knocked(replica) as caller:
            with machine.books.work(SYSTEM) as work:
                data_key = keys.release(work, KEK, machine.asked(replica), peer=caller.peer)
            caller.deliver(data_key)
            assert data_key == bytes(32), "wiped where it was kept"
        machine.evict(replica)
        assert machine.leaks() == []


def test_f9_every_release_is_audited_before_the_key_leaves(machine: Machine) -> None:
    replica = machine.start_replica()
    with machine.knocked(replica) as caller:
        with machine.books.work(SYSTEM) as work:
            data_key = keys.release(work, KEK, machine.asked(replica), peer=caller.peer)
        with machine.books.read() as tx:
            [release] = keys.list_releases(tx)
            [entry] = tenancy.list_audit(tx, None)
        assert machine.log(replica).endswith("awaiting the key of muse-tiny\n")
        caller.deliver(data_key)
        assert release.peer == caller.peer
    assert (release.replica_id, release.model, release.node_id) == (replica, "muse-tiny", "node_1")
    assert (entry.action, entry.result, entry.target) == ("key_release", "ok", replica)
    wait_until(lambda: machine.complete(replica), 30, "the model answers")


@pytest.mark.parametrize(
    ("why", "code"),
    [
        ({"is_third_party": True}, "attestation_required"),
        ({"is_own_site": False}, "attestation_required"),
        ({"is_granted": False}, "grant_missing"),
    ],
)
def test_f9_a_model_that_may_not_be_loaded_stays_ciphertext(
    machine: Machine, why: dict[str, bool], code: str
) -> None:
    """A foreign sealed model with no verifier; one that nobody is granted."""
    replica = machine.start_replica()
    wish = machine.asked(replica, **why)
    with machine.knocked(replica) as caller:
        expected = pytest.raises((keys.AttestationRequired, keys.GrantMissing))
        with expected as refused, machine.books.work(SYSTEM) as work:
            keys.release(work, KEK, wish, peer=caller.peer)
        assert refused.value.code == code
    with machine.books.work(SYSTEM) as work:
        keys.note_refusal(work, wish, refused.value)
    with machine.books.read() as tx:
        assert keys.list_releases(tx) == []
        assert [row.result for row in tenancy.list_audit(tx, None)] == [code]
    assert machine.log(replica).endswith("awaiting the key of muse-tiny\n")
    assert machine.complete(replica) is None
    machine.evict(replica)
    assert machine.leaks() == []


# -- the whole cloud around it


def opened(machine: Machine) -> tenancy.Identity:
    """The machine enrolled, its shop open with what comes along, an owner to deploy."""
    with machine.books.work(SYSTEM) as work:
        node = fleet.enrol(
            work, machine.engine.inventory(), site_name="home", trusted_tenants=False
        )
        fleet.set_pool(work, node.pool_id, head_room_percent=0, scrub_seconds=2)
        market.load_rate_card(work, market.seed_rate_card(), work.now)
        market.post_spot_prices(work, work.now)
        allocation.set_firm_shelf(work, node.pool_id, len(machine.devices), None)
        organisation = tenancy.create_organisation(
            work, name="Owner", kind="owner", standing="good"
        )
        person = tenancy.create_principal(
            work, organisation.id, kind="user", name="Ada", role="admin"
        )
        key, _ = tenancy.create_key(work, person.id, name="key")
    models.seed(
        machine.books, weights=machine.data / "none", folder=machine.data / "models", key=KEK
    )
    return tenancy.Identity(organisation=organisation, principal=person, key=key)


def test_f9_a_revoked_grant_ends_the_replica_within_a_minute(machine: Machine) -> None:
    """From the import to the end by the real loops: deployed, unsealed, served; revoked, stopped,
    scrubbed; and no other starts."""
    books = machine.books
    owner = opened(machine)
    shop = models.ModelsLoop(books, machine.engine, key=lambda: KEK)
    # The shop of this test has the key.
    others = [loop for loop in cloud_loops(books, machine.engine) if loop.name != "models"]
    steps = [loop.step for loop in others] + [shop.step]

    def state(replica_id: str | None = None) -> models.ReplicaState | None:
        """Of the replica, or of the only one there is, after one round of all loops."""
        for step in steps:
            step(machine.clock.now())
        with books.read() as tx:
            found = [r for r in models.list_replicas(tx) if replica_id in (None, r.id)]
            return found[0].state if found else None

    with books.work(owner.actor()) as work:
        models.deploy(work, owner, model="muse-tiny")
    wait_until(lambda: state() is models.ReplicaState.READY, 30, "the replica serves")
    with books.read() as tx:
        [replica] = models.list_replicas(tx)
        [release] = keys.list_releases(tx)
        audited = [row for row in tenancy.list_audit(tx, None) if row.action == "key_release"]
        run_id = compute.location(tx, replica.id).run_id
    assert run_id is not None
    assert release.replica_id == replica.id
    assert [(row.target, row.result) for row in audited] == [(replica.id, "ok")]
    assert machine.complete(run_id) is not None
    assert machine.leaks() == []

    with books.work(owner.actor()) as work:
        models.revoke_grant(work, "muse-tiny")
    revoked_at = machine.clock.now()
    wait_until(lambda: state(replica.id) is models.ReplicaState.GONE, 60, "the replica ends")
    assert machine.clock.now() - revoked_at < timedelta(seconds=60)
    seen = machine.engine.observe().get(run_id)
    assert seen is None or seen.phase in OVER
    assert machine.leaks() == []
    for _ in range(20):
        state()
    with books.read() as tx:
        assert [r.id for r in models.list_replicas(tx)] == [replica.id], "no other is started"
        assert len(keys.list_releases(tx)) == 1
    shop.close()


# -- over HTTP

CHAT = {"messages": [{"role": "user", "content": "The"}]}
DOORS: list[tuple[Surface, dict[str, Any]]] = [
    ("chat", {**CHAT, "logprobs": True, "logit_bias": {"7": 100}}),
    ("chat", {**CHAT, "logprobs": True, "top_logprobs": 20}),
    ("chat", {**CHAT, "top_logprobs": 1}),
    ("chat", {**CHAT, "logit_bias": {"7": -100}}),
    ("chat", {**CHAT, "n_probs": 2048}),
    ("chat", {**CHAT, "lora": [{"id": 0, "scale": 1.0}]}),
    ("chat", {**CHAT, "grammar": 'root ::= "a"'}),
    ("chat", {**CHAT, "chat_template": "{{ messages }}"}),
    ("completions", {"prompt": "The", "logprobs": 5}),
    ("completions", {"prompt": "The", "n_probs": 2048}),
    ("completions", {"prompt": "The", "echo": True}),
    ("completions", {"prompt": [1, 2, 3]}),
    ("completions", {"prompt": [[1, 2, 3]]}),
    ("completions", {"prompt": "The", "lora": [{"id": 0, "scale": 1.0}]}),
    ("embeddings", {"input": "The"}),
    ("messages", {**CHAT, "max_tokens": 1, "logprobs": True}),
    ("messages", {**CHAT, "max_tokens": 1, "grammar": 'root ::= "a"'}),
]


@pytest.mark.parametrize(("surface", "body"), DOORS)
def test_f9_what_tells_more_than_text_is_refused(surface: Surface, body: dict[str, Any]) -> None:
    """A line of a batch is the same body, and goes the same way."""
    refused = refusal_of(surface, **body)
    assert refused is not None
    assert (refused.status, refused.code) == (400, "sealed_parameter")
    assert refused.param in {*body, "model"}


@given(
    st.sampled_from(["chat", "completions", "messages"]),
    st.sets(st.sampled_from(sorted(checks.REVEALING)), min_size=1),
    st.sampled_from([True, 1, 0.5, "a", [1], {"7": 1}, [{"id": 0}]]),
)
def test_f9_no_revealing_field_passes_in_any_company(
    surface: Surface, names: set[str], value: Any
) -> None:
    text: dict[str, Any] = {"prompt": "The"} if surface == "completions" else {**CHAT}
    if surface == "messages":
        text["max_tokens"] = 1
    assert refusal_of(surface, **text) is None
    assert refusal_of(surface, **text, **dict.fromkeys(names, value)) is not None


def test_f9_the_list_of_models_tells_nothing_of_its_inside() -> None:
    shown = dialects.model_object(sealed_models.route(is_sealed=True))
    assert b"muse-tiny" in shown
    for inside in (b"sealed", b"sha256", b".gguf", b"n_embd", b"192", b"2048", b"path", b"socket"):
        assert inside not in shown, inside


# -- placement


def test_f9_a_strangers_shell_is_never_placed_beside_it(worlds: Callable[..., World]) -> None:
    """On one node: refused with the instant at which it may come, and then served."""
    world = worlds(seed=9)
    stranger = world.sign_up()
    server = compute.ServerSpec(argv=("serve",), env={}, read_only=(), lock_memory=True)
    with world.store.work(Actor.system("models")) as work:
        replica = compute.rent_replica(
            work,
            deployment_id="dep_1",
            pool_id=world.pool_id,
            devices=1,
            memory_bytes=None,
            is_filler=True,
            drain_seconds=20,
            value_micros=50_000,
            server=server,
            organisation_id=world.owner.organisation_id,
            is_sealed=True,
        )
    world.run_for(10)
    with pytest.raises(compute.SealedNode) as refused:
        stranger.rent("gpu-spot")
    assert refused.value.code == "sealed_node"
    assert refused.value.details["earliest_at"] is not None
    with world.store.work(Actor.system("models")) as work:
        compute.stop_for(work, replica.id, compute.Reason.DRAINED)
    world.run_for(30)
    instance = stranger.rent("gpu-spot")
    world.run_for(10)
    assert stranger.state(instance) == "running"
    gone = world.read(compute.location, replica.id).workload
    assert gone.ended_at is not None
    assert gone.ended_at < stranger.runs(instance)[-1].started_at


# -- the page


def test_f9_the_page_says_who_can_read_it_and_names_tests_that_exist() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "sealed.md").read_text()
    assert "Root of the host can read the weights." in page
    named = set(re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", page))
    assert len(named) > 10
    for path, name in named:
        text = (root / path).read_text()
        assert not name or f"def {name}(" in text, f"{path} has no {name}"
