"""A data folder with real books, a real link process, real gateways, and a mock behind them.

What `sublet up` starts, less the loops, the API and the bastion: so that a test may kill, stop or
cut off any of them at any time, and count again what the books then say.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import sqlalchemy as sa

from sublet.app.child import ORDERS, Orders
from sublet.app.clockwork import anchored
from sublet.app.runner import Nudger
from sublet.app.settings import Settings
from sublet.audit import Violation, check
from sublet.base.kernel.clock import SystemClock
from sublet.base.kernel.ids import SystemIds
from sublet.base.kernel.interval import micros_since_epoch
from sublet.base.kernel.money import Money
from sublet.base.store import Actor, Store, metadata, open_store
from sublet.base.store.installation import find_fact, keep_fact
from sublet.base.wire.gateway import Outcome, UsageEvent, frame, read_snapshot
from sublet.base.wire.gateway.spool import file_name
from sublet.money import billing
from sublet.money.billing.token_store import list_open
from sublet.records import ledger, metering, tenancy
from sublet.records.metering.token_store import tokens as token_rows
from sublet.shops import models
from sublet.shops.models import store as model_rows
from sublet.shops.models.servers import SERVERS

SYSTEM = Actor.system("test")
MODEL = "mock"
START_SECONDS = 30.0


def wait_until(happened: Callable[[], Any], seconds: float, what: str) -> Any:
    """Look every 20 ms; fails naming what did not happen."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found = happened()
        if found:
            return found
        threading.Event().wait(0.02)
    raise AssertionError(f"{what}: not within {seconds} s")


@dataclass
class LinkedBooks:
    """The books of a data folder, on the system's clock."""

    data: Path
    settings: Settings
    store: Store
    customer: billing.SignedUp
    owner: billing.SignedUp
    version: str
    """Of the mock's price."""
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def folder(self) -> Path:
        return self.data / "gateway"

    @property
    def org(self) -> str:
        return self.customer.organisation.id

    def pay(self, amount: str) -> None:
        with self.store.work(SYSTEM) as work:
            reference = f"bank-{next(self._numbers)}"
            billing.record_payment(work, self.org, Money.parse(amount), reference=reference)

    def add_key(self) -> tuple[str, str]:
        """Its id and its secret."""
        with self.store.work(SYSTEM) as work:
            key, secret = tenancy.create_key(work, self.customer.principal.id, name="more")
        return key.id, secret

    def set_replica(self, replica_id: str, path: Path, slots: int) -> None:
        """A model server that compute knows nothing of; `slots` are its deployment's."""
        with self.store.work(SYSTEM) as work:
            now = work.now
            if not model_rows.list_deployments(work.tx):
                model_rows.insert_deployment(
                    work.tx,
                    {
                        "id": "dep_mock", "model": MODEL, "pool_id": "pol_none", "devices": 1,
                        "min_replicas": 1, "max_replicas": 1, "slots": slots, "target": slots,
                        "drain_seconds": 5, "idle_seconds": 300, "state": "active", "wanted": 1,
                        "last_asked_at": now, "failures": 0, "created_at": now, "version": 1,
                    },
                )  # fmt: skip
            model_rows.insert_replica(
                work.tx,
                models.Replica(
                    id=replica_id, deployment_id="dep_mock", model=MODEL, is_filler=False,
                    state=models.ReplicaState.READY, door=str(path), has_key=False, created_at=now,
                    ready_at=now, draining_at=None, gone_at=None, reason=None,
                ),
            )  # fmt: skip
            work.emit(models.ReplicaChanged(replica_id, "dep_mock", "ready"))

    # ---- what they say -------------------------------------------------------------------------

    def usage(self) -> list[metering.TokenUsage]:
        with self.store.read() as tx:
            return metering.list_token_usage(tx, limit=1_000_000)

    def count(self) -> int:
        """Records of usage."""
        with self.store.read() as tx:
            return tx.execute(sa.select(sa.func.count()).select_from(token_rows)).scalar_one()

    def posted(self, *kinds: str) -> int:
        """Micros of token transfers of these kinds, of the customer."""
        with self.store.read() as tx:
            far = self.store.clock.now().replace(year=2100)
            found = ledger.list_transfers(tx, None, far.replace(year=1970), far)
        return sum(t.amount.micros for t in found if t.kind in kinds)

    def balance(self) -> int:
        with self.store.read() as tx:
            return ledger.balance(tx, ledger.customer_account(self.org)).micros

    def available(self) -> int:
        with self.store.read() as tx:
            return ledger.available(tx, self.org).micros

    def epochs(self, state: str | None = None) -> list[metering.Epoch]:
        with self.store.read() as tx:
            return metering.list_epochs(tx, state)

    def open_allowances(self) -> list[Any]:
        with self.store.read() as tx:
            return list_open(tx, "organisation_id", self.org)

    def fact(self, name: str) -> str | None:
        with self.store.read() as tx:
            return find_fact(tx, name)

    def violations(self) -> list[Violation]:
        with self.store.read() as tx:
            return check(tx, self.store.clock.now())

    def snapshot_number(self) -> int:
        return read_snapshot((self.folder / "snapshot").read_bytes()).number

    def event(self, number: int, output: int = 5, **changes: Any) -> UsageEvent:
        """A request as a gateway writes it down: 10 tokens in, `output` out."""
        now = micros_since_epoch(self.store.clock.now())
        values: dict[str, Any] = {
            "id": f"req_{number}", "key_id": self.customer.key.id, "organisation_id": self.org,
            "project_id": None, "is_first_party": False, "model": MODEL,
            "deployment_id": "dep_mock", "replica_id": "rep_mock", "surface": "chat",
            "tier": "default", "price_version": self.version, "outcome": Outcome.OK,
            "started_us": now, "ended_us": now + 10, "first_us": now + 5, "input_uncached": 10,
            "cache_read": 0, "output": output, "made": output, "micros": 10 + output,
        }  # fmt: skip
        return UsageEvent(**{**values, **changes})


def open_linked(
    folder: Path, *, credit: str = "10", price: int = 1_000_000, **more: Any
) -> LinkedBooks:
    """Owner, customer, and the model `mock` at so many micros a million tokens of each class."""
    data = folder / "data"
    (data / "gateway").mkdir(parents=True, mode=0o700)
    settings = Settings(data=data, **more)
    store = open_store(settings.database, SystemClock.unanchored(), SystemIds())
    metadata.create_all(store.engine)
    store.clock = anchored(store.engine)
    with store.work(SYSTEM) as work:
        keep_fact(work, "installation_id", work.ids.new("cloud"))
        owner = billing.open_owner(work, name="Owner")
        assert owner is not None
        customer = billing.sign_up(
            work, email="a@example.org", organisation_name="Acme", trial=Money(0)
        )
        models.add_model(
            work,
            models.NewModel(
                name=MODEL, provider="test", licence="none", path="", sha256="", size_bytes=0,
                quantization="none", context=8192, max_output=4096, server="llama.cpp",
            ),
        )  # fmt: skip
        version = models.set_price(
            work, MODEL, tier="default", input_micros=price, cached_micros=price,
            output_micros=price,
        ).version  # fmt: skip
    books = LinkedBooks(data, settings, store, customer, owner, version)
    if Money.parse(credit).micros:
        books.pay(credit)
    assert SERVERS["llama.cpp"].splits_n
    return books


# ---- the link -----------------------------------------------------------------------------------


class LinkProcess:
    """`python -m sublet.app.child link`, as `sublet up` starts it."""

    def __init__(self, books: LinkedBooks) -> None:
        self._books = books
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> LinkProcess:
        ready, told = os.pipe()
        orders = Orders(
            role="link",
            settings=self._books.settings.model_dump_json(),
            parent=os.getpid(),
            ready_fd=told,
            lock_fd=told,
            socket_fd=None,
            ssh_address=None,
        )
        with (self._books.data / "link.out").open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sublet.app.child", "link"],
                env={**os.environ, ORDERS: orders.text()},
                stdout=output,
                stderr=output,
                pass_fds=[told],
            )
        os.close(told)
        assert select.select([ready], [], [], START_SECONDS)[0], self.said()
        assert os.read(ready, 1) == b"1", self.said()
        os.close(ready)
        return self

    def said(self) -> str:
        log = self._books.data / "sublet.log"
        return (self._books.data / "link.out").read_text() + (
            log.read_text() if log.exists() else ""
        )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60)

    def __enter__(self) -> LinkProcess:
        """Started, and told of what is committed here, as it is by the API's processes."""
        self._nudger = Nudger(self._books.fact("installation_id") or "")
        self._books.store.on_commit = self._nudger
        return self.start()

    def __exit__(self, *_: object) -> None:
        self._books.store.on_commit = None
        self._nudger.close()
        if self.process is not None and self.process.poll() is None:
            self.end()


# ---- a gateway of the test's own ----------------------------------------------------------------


class ScriptedGateway:
    """A client of the control socket that says what it is told to say."""

    def __init__(self, folder: Path, name: str, epoch: int) -> None:
        self.name, self.epoch = name, epoch
        self._folder = folder
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._came = b""

    def connect(self, seconds: float = 10.0) -> ScriptedGateway:
        self.socket.settimeout(seconds)
        folder = os.open(self._folder, os.O_PATH | os.O_DIRECTORY)
        try:
            self.socket.connect(f"/proc/self/fd/{folder}/control.sock")
        finally:
            os.close(folder)
        return self

    def say(self, kind: str, **values: Any) -> None:
        self.socket.sendall(orjson.dumps({"type": kind, **values}) + b"\n")

    def hello(self) -> dict[str, Any]:
        self.say("hello", gateway=self.name, epoch=self.epoch, pid=os.getpid())
        return self.hear("welcome")

    def hear(self, kind: str) -> dict[str, Any]:
        """The next line of this kind. Raises TimeoutError, ConnectionError at its end."""
        while True:
            line, found, rest = self._came.partition(b"\n")
            if not found:
                more = self.socket.recv(65536)
                if not more:
                    raise ConnectionError("hung up")
                self._came += more
                continue
            self._came = rest
            said: dict[str, Any] = orjson.loads(line)
            if said["type"] == kind:
                return said

    def gauge(self, **values: Any) -> None:
        usual: dict[str, Any] = {
            "gateway": self.name, "epoch": self.epoch, "snapshot": 0, "is_cut_off": False,
            "in_flight": {}, "waiting": {}, "refusals": {}, "requests": 0, "spool_file": 1,
            "spool_offset": 0,
        }  # fmt: skip
        self.say("gauge", **{**usual, **values})

    def ask(self, key_id: str, wanted: int, serial: int, *, spent: int = 0, held: int = 0) -> None:
        self.say(
            "ask", key_id=key_id, epoch=self.epoch, wanted_micros=wanted, wanted_tokens=0,
            spent_micros=spent, held_micros=held, spent_tokens=0, held_tokens=0, serial=serial,
        )  # fmt: skip

    def shout(self, data: bytes) -> None:
        """Bytes as they are, and wait for a welcome."""
        self.socket.sendall(data)
        self.hear("welcome")

    def close(self) -> None:
        self.socket.close()


class HandSpool:
    """The folder of one life, written by hand; its lock is held until `die`."""

    def __init__(self, folder: Path, name: str, epoch: int) -> None:
        self.folder = folder / name / str(epoch)
        self.folder.parent.mkdir(exist_ok=True)
        self.number = 1
        # Locked before it can be seen: a life of long ago without a lock is taken for dead at once.
        made = folder.parent / f"making-{name}-{epoch}"
        made.mkdir()
        self._lock = os.open(made / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        made.rename(self.folder)

    @property
    def path(self) -> Path:
        return self.folder / file_name(self.number)

    def write(self, *events: UsageEvent) -> None:
        with self.path.open("ab") as file:
            file.write(b"".join(frame(event.to_json()) for event in events))

    def write_raw(self, data: bytes) -> None:
        with self.path.open("ab") as file:
            file.write(data)

    def roll(self) -> None:
        self.number += 1

    def inflight(self, *events: UsageEvent) -> None:
        rows = b"[" + b",".join(event.to_json() for event in events) + b"]"
        (self.folder / "inflight.json").write_bytes(rows)

    def die(self) -> None:
        """As a process that is gone."""
        os.close(self._lock)


# ---- real gateways ------------------------------------------------------------------------------


class GatewayProcess:
    """`python -m sublet.gateway` on a port of its own."""

    def __init__(self, folder: Path, name: str, **orders: Any) -> None:
        self.folder = folder
        self.name = name
        self.orders = orders
        self.listening = socket.socket()
        self.listening.bind(("127.0.0.1", 0))
        self.listening.listen(1024)
        self.port = self.listening.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> GatewayProcess:
        ready, told = os.pipe()
        orders = {
            "name": self.name, "folder": str(self.folder), "socket_fd": self.listening.fileno(),
            "ready_fd": told, "parent": os.getpid(), "ack": True, **self.orders,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sublet.gateway"],
            env={**os.environ, "SUBLET_GATEWAY_ORDERS": json.dumps(orders)},
            pass_fds=[told, self.listening.fileno()],
        )
        os.close(told)
        assert select.select([ready], [], [], START_SECONDS)[0], f"{self.name} does not start"
        assert os.read(ready, 1) == b"1", f"{self.name} ended"
        os.close(ready)
        return self

    def page(self, path: str) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path)
            return connection.getresponse().read().decode()
        finally:
            connection.close()

    def health(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.page("/health"))
        return found

    def until_serving(self, replica_id: str) -> None:
        """It knows that server."""
        wait_until(
            lambda: f'replica="{replica_id}"' in self.page("/metrics"), 20,
            f"{self.name} knows {replica_id}",
        )  # fmt: skip

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)

    def close(self) -> None:
        self.end()
        self.listening.close()


@contextlib.contextmanager
def gateways(folder: Path, count: int, **orders: Any) -> Iterator[list[GatewayProcess]]:
    made = [GatewayProcess(folder, f"gw-{number}", **orders) for number in range(count)]
    try:
        for gateway in made:
            gateway.start()
        yield made
    finally:
        for gateway in made:
            gateway.close()


class Leash:
    """A folder of its own for one gateway, through which it sees the real one, until it is cut off.

    Its spools lie in the real folder all along, as those of a gateway that is cut off do.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._real = folder
        self._name = name
        self.folder = folder.parent / f"leash-{name}"
        self.folder.mkdir()
        (folder / name).mkdir()
        (self.folder / name).symlink_to(folder / name)
        self.tie()

    def tie(self) -> None:
        for what in ("snapshot", "control.sock"):
            (self.folder / what).unlink(missing_ok=True)
            (self.folder / what).symlink_to(self._real / what)

    def cut(self) -> None:
        """It keeps what it has, hears nothing more, and nobody hears it."""
        # The same file that it has seen, which the link's next one will not replace here.
        kept = self.folder / ".kept"
        os.link(self._real / "snapshot", kept)
        kept.replace(self.folder / "snapshot")
        (self.folder / "control.sock").unlink()
        # Whoever takes its name has the link hang up on it.
        other = ScriptedGateway(self._real, self._name, 1).connect()
        other.hello()
        other.close()
