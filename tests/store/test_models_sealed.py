"""How a sealed replica gets its key from the loop: once, written down, or not at all."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from models_cloud import Cloud, Gateway, clouds

from sublet.records import tenancy
from sublet.shops import models
from sublet.shops.models import keys, starts
from sublet.shops.models.servers.child import unseal

KEK = keys.KeyEncryptionKey(bytes(range(32)))
Make = Callable[..., Cloud]


@pytest.fixture
def make_cloud(tmp_path: Path) -> Iterator[Make]:
    yield from clouds(tmp_path)


@dataclass
class Door:
    """Where sealed replicas await their key, one after the other."""

    home: Path
    breaks_off: bool = False
    got: list[bytes] = field(default_factory=list)
    came: threading.Event = field(default_factory=threading.Event)

    @property
    def path(self) -> str:
        return str(self.home / "key.sock")

    def answer(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                caller, _ = listener.accept()
                with caller:
                    caller.sendall(unseal.GREETING)
                    key = caller.recv(unseal.KEY_BYTES)
                    if key and not self.breaks_off:
                        self.got.append(key)
                        caller.sendall(unseal.THANKS)
                    self.came.set()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    made = Door(home)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(made.path)
    os.chmod(made.path, 0o600)
    listener.listen()
    thread = threading.Thread(target=made.answer, args=(listener,), daemon=True)
    thread.start()
    yield made
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(5)


def sealed(make_cloud: Make, door: Door, key: Any = KEK, **differs: Any) -> Cloud:
    """A cloud with a sealed model `s` that everybody may call, whose replicas knock there."""
    cloud = make_cloud()
    cloud.add_model("s", access=models.Access.SEALED, **differs)
    with cloud.books.work(cloud.owner.actor()) as work:
        keys.keep(work, KEK.wrap(bytearray(range(32)), key_id="key_1", model="s"))
        models.grant(work, "s")
    cloud.engine.door = lambda run_id, name: str(door.home / name)  # type: ignore[method-assign]
    cloud.models = cloud.loop(key=lambda: key)
    return cloud


def audited(cloud: Cloud) -> list[str]:
    rows = cloud.see(tenancy.list_audit, None, after=None, limit=100)
    return [row.result for row in rows if row.action == keys.RELEASE]


def test_it_gets_its_key_once_and_serves(make_cloud: Make, door: Door) -> None:
    cloud = sealed(make_cloud, door)
    cloud.deploy("s")
    cloud.run(5)
    [ready] = cloud.ready()
    assert ready.has_key
    assert door.got == [bytes(range(32))]
    [release] = cloud.see(keys.list_releases)
    assert (release.replica_id, release.model, release.key_id) == (ready.id, "s", "key_1")
    assert release.peer == keys.Peer(pid=os.getpid(), uid=os.geteuid())
    assert audited(cloud) == ["ok"]
    cloud.run(30)
    assert len(door.got) == 1


def test_a_key_that_does_not_arrive_ends_the_replica_and_the_next_one_gets_its_own(
    make_cloud: Make, door: Door
) -> None:
    cloud = sealed(make_cloud, door)
    door.breaks_off = True
    made = cloud.deploy("s")
    cloud.run(2)
    seen = cloud.deployment(made)
    assert "its key did not reach it" in (seen.failure or "")
    assert seen.failures == 1
    door.breaks_off = False
    cloud.run(30)
    [ready] = cloud.ready()
    assert len(cloud.replicas("gone")) >= 1
    assert door.got == [bytes(range(32))]
    assert len(cloud.see(keys.list_releases)) == len(cloud.replicas("gone")) + 1
    assert ready.has_key


def test_without_the_key_that_wraps_it_stays_closed_and_says_so(
    make_cloud: Make, door: Door
) -> None:
    cloud = sealed(make_cloud, door, key=None)
    made = cloud.deploy("s")
    cloud.run(3)
    assert door.got == []
    assert cloud.see(keys.list_releases) == []
    assert "without the key that opens sealed models" in (cloud.deployment(made).failure or "")
    assert audited(cloud)[0] == "sealing_key_missing"
    assert cloud.ready() == []


def test_a_third_partys_weights_are_not_loaded_without_a_verifier(
    make_cloud: Make, door: Door
) -> None:
    cloud = sealed(make_cloud, door, is_third_party=True)
    made = cloud.deploy("s")
    cloud.run(3)
    assert door.got == []
    assert "no verifier" in (cloud.deployment(made).failure or "")
    assert audited(cloud)[0] == "attestation_required"


def test_a_key_that_another_life_was_to_bring_is_not_awaited_for_ever(
    make_cloud: Make, door: Door
) -> None:
    cloud = sealed(make_cloud, door)
    cloud.server.is_up = False
    cloud.deploy("s")
    cloud.run(1)
    [replica] = cloud.replicas()
    with cloud.books.work(cloud.owner.actor()) as work:
        # Released and committed; then the process died.
        models.store.update_replica(work.tx, replica, has_key=True)
    cloud.models = cloud.loop(key=lambda: KEK)
    cloud.run(starts.UNLOCKED_LIMIT.total_seconds() + 10)
    gone = cloud.replicas("gone")
    assert [one.id for one in gone][:1] == [replica.id]
    assert gone[0].reason == "its key was lost on the way"
    cloud.server.is_up = True
    cloud.gateways["gw-0"] = Gateway(waiting={"s": 1})
    cloud.run(30)
    assert [one.id for one in cloud.ready()] != [replica.id]
    assert cloud.ready()


def test_it_is_told_to_lock_its_memory_and_takes_the_ciphertext(
    make_cloud: Make, door: Door
) -> None:
    cloud = sealed(make_cloud, door)
    cloud.deploy("s")
    cloud.run(5)
    [ready] = cloud.ready()
    assert cloud.workload(ready).spec.is_sealed
    server = cloud.workload(ready).spec.server
    assert server is not None
    assert server.lock_memory
