"""Books, link, gateway and mocks as real processes, which a test may kill; and what they all say
afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from linked import SYSTEM, GatewayProcess, LinkedBooks, LinkProcess, open_linked, wait_until

from sublet.base.kernel.money import Money
from sublet.base.wire.gateway import Price, SpoolReader, UsageEvent
from sublet.money import billing
from sublet.records import ledger, metering, tenancy
from sublet.shops import models
from sublet.shops.models import store as model_rows

from .counting import Made, read_counts
from .crowd import Key

COUNTING = Path(__file__).with_name("counting.py")
PLAIN, ODD = "mock", "odd"
REPLICAS = {"rep_1": PLAIN, "rep_2": ODD, "rep_3": PLAIN, "rep_4": ODD}
SLOTS = 24
CREDIT = "1000"
POOR_CREDIT = "0.001500"
"""Some forty small answers, of several hundred asked for."""
ODD_MICROS = (333_333, 77_777, 1_234_567)
"""For a million tokens of input, of cached input, of output."""
WIDE = tenancy.Limits(requests_per_minute=10_000_000, tokens_per_minute=10_000_000_000)
"""No limit is to be reached here."""
LOOK_SECONDS = 0.01
WRITTEN_SECONDS = 1.1


class Mock:
    """One model server, and the file of its counts."""

    def __init__(self, folder: Path, name: str) -> None:
        self.door = folder / f"{name}.sock"
        self.counts = folder / f"{name}.counts"
        self._log = folder / f"{name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.door.unlink(missing_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(COUNTING), str(self.door), str(self.counts)],
                stdout=log,
                stderr=log,
            )
        wait_until(self.door.exists, 20, f"{self.door.name} listens")

    def kill(self) -> None:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        self._process.kill()
        self._process.wait()

    def rows(self) -> list[Made]:
        return list(read_counts(self.counts))


class Copies:
    """Second names for all spool files: the link deletes what it has read."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self._folder, self._copies = folder, copies
        copies.mkdir()
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._is_ending.wait(LOOK_SECONDS):
            self._look()

    def _look(self) -> None:
        for path in self._folder.glob("gw-*/*/*.spool"):
            copy = self._copies / path.parent.name / path.name
            copy.parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError, FileNotFoundError):
                os.link(path, copy)

    def end(self) -> None:
        self._is_ending.set()
        self._thread.join()
        self._look()

    def events(self) -> list[UsageEvent]:
        return [
            UsageEvent.from_json(body)
            for folder in sorted(self._copies.iterdir())
            for body in SpoolReader(folder).frames()
        ]


@dataclass
class Stage:
    books: LinkedBooks
    link: LinkProcess
    gateway: GatewayProcess
    mocks: dict[str, Mock]
    copies: Copies
    keys: list[Key]
    poor: Key
    poor_organisation: str
    prices: dict[str, Price]
    starter: ThreadPoolExecutor
    """Its one thread lives as long as the stage: a child's death signal comes with the end of the
    thread that started it."""
    killed: dict[int, int] = field(default_factory=dict)
    open_at_death: list[UsageEvent] = field(default_factory=list)
    one_at_a_time: asyncio.Lock = field(default_factory=asyncio.Lock)

    # ---- what is done to them ------------------------------------------------------------------

    async def kill_gateway(self) -> None:
        """kill -9, and up again on the same folder and port; not before what it has open was
        written down."""
        async with self.one_at_a_time:
            await asyncio.sleep(WRITTEN_SECONDS)
            (epoch,) = [life for life in self._lives() if life not in self.killed]
            self.gateway.kill()
            self.killed[epoch] = time.time_ns() // 1000
            self.open_at_death += self._open_rows(epoch)
            await self._start(self.gateway.start)

    def _open_rows(self, epoch: int) -> list[UsageEvent]:
        path = self.books.folder / self.gateway.name / str(epoch) / "inflight.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        return [UsageEvent.from_json(json.dumps(row).encode()) for row in rows]

    async def kill_link(self) -> None:
        self.link.kill()
        await asyncio.sleep(0.3)
        await self._start(self.link.start)

    async def kill_mock(self, name: str) -> None:
        self.mocks[name].kill()
        await asyncio.sleep(0.2)
        await self._start(self.mocks[name].start)

    async def _start(self, start: Callable[[], object]) -> None:
        await asyncio.get_running_loop().run_in_executor(self.starter, start)

    def _lives(self) -> list[int]:
        return [int(path.name) for path in (self.books.folder / self.gateway.name).iterdir()]

    def settle(self) -> None:
        """Everybody ends in order, and the books have read all there is."""
        self.gateway.end()
        assert self.gateway.process is not None
        assert self.gateway.process.returncode == 0
        wait_until(lambda: not self.books.epochs("open"), 60, "every life is closed in the books")
        status = self.link.end()
        assert status == 0, f"{status}\n{self.link.said()}"
        self.copies.end()

    # ---- what they say -------------------------------------------------------------------------

    def made(self) -> dict[str, list[Made]]:
        """By request."""
        found: dict[str, list[Made]] = defaultdict(list)
        for mock in self.mocks.values():
            for row in mock.rows():
                found[row.id].append(row)
        return found

    def booked(self) -> list[UsageEvent]:
        names = [field.name for field in dataclasses.fields(UsageEvent) if field.name != "id"]
        return [
            UsageEvent(
                id=row.event_id,
                **{name: getattr(row, name) for name in names},
            )
            for row in self.books.usage()
        ]

    def taken(self, organisation_id: str) -> int:
        """What the ledger took from an organisation for tokens."""
        account = ledger.customer_account(organisation_id)
        far = self.books.store.clock.now()
        with self.books.store.read() as tx:
            found = ledger.list_transfers(tx, None, far.replace(year=1970), far.replace(year=2100))
        micros = 0
        for transfer in found:
            if transfer.kind == billing.TOKEN_USAGE:
                micros += transfer.amount.micros * (
                    (transfer.debit == account) - (transfer.credit == account)
                )
        return micros

    def reconcile(self) -> dict[str, int]:
        """Each mock's own count, set against the books: what nobody has a row for is a loss."""
        for name, mock in self.mocks.items():
            rows = mock.rows()
            with self.books.store.work(SYSTEM) as work:
                metering.keep_reading(
                    work,
                    name,
                    prompt=sum(row.prompt for row in rows),
                    cached=None,
                    predicted=sum(row.made for row in rows),
                )
        with self.books.store.work(SYSTEM) as work:
            gaps = billing.reconcile_tokens(work, work.now)
        return {gap.replica_id: gap.output for gap in gaps}

    def lost_tokens(self) -> int:
        """Output tokens on the books' lines of losses."""
        with self.books.store.read() as tx:
            lines = billing.list_token_lines(tx, limit=100_000)
        return sum(
            line.quantity
            for line in lines
            if line.key.kind == billing.TOKEN_LOSS and line.key.token_class == "output"
        )


@contextlib.contextmanager
def a_stage(folder: Path) -> Iterator[Stage]:
    books = open_linked(folder, credit=CREDIT)
    # Not pytest's own folder: a socket's address is short.
    doors = Path(tempfile.mkdtemp(prefix="sublet-mocks-"))
    mocks = {name: Mock(doors, name) for name in REPLICAS}
    with contextlib.ExitStack() as stack:
        stack.callback(books.store.close)
        stack.callback(shutil.rmtree, doors)
        poor, odd = _more_books(books)
        for name, mock in mocks.items():
            mock.start()
            stack.callback(mock.kill)
            _replica(books, name, mock.door)
        copies = Copies(books.folder, folder / "copies")
        stack.callback(copies.end)
        keys = [Key(books.customer.key.id, books.customer.secret)]
        keys += [Key(*books.add_key()) for _ in range(3)]
        link = stack.enter_context(LinkProcess(books))
        gateway = GatewayProcess(books.folder, "gw-0")
        stack.callback(gateway.close)
        gateway.start()
        prices = {
            version: Price(
                version=version, input_micros=uncached, cached_micros=cached, output_micros=output
            )
            for version, (uncached, cached, output) in {
                books.version: (10**6, 10**6, 10**6),
                odd: ODD_MICROS,
            }.items()
        }
        starter = stack.enter_context(ThreadPoolExecutor(1))
        yield Stage(
            books,
            link,
            gateway,
            mocks,
            copies,
            keys,
            Key(poor.key.id, poor.secret),
            poor.organisation.id,
            prices,
            starter,
        )


def _more_books(books: LinkedBooks) -> tuple[billing.SignedUp, str]:
    """A customer with next to no credit, and a model whose price is in fractions of a micro."""
    with books.store.work(SYSTEM) as work:
        poor = billing.sign_up(
            work, email="poor@example.org", organisation_name="Poor", trial=Money(0)
        )
        models.add_model(
            work,
            models.NewModel(
                name=ODD, provider="test", licence="none", path="", sha256="", size_bytes=0,
                quantization="none", context=8192, max_output=4096, server="llama.cpp",
            ),
        )  # fmt: skip
        uncached, cached, output = ODD_MICROS
        version = models.set_price(
            work, ODD, tier="default", input_micros=uncached, cached_micros=cached,
            output_micros=output,
        ).version  # fmt: skip
        for organisation_id in (books.org, poor.organisation.id):
            tenancy.set_limits(work, tenancy.ScopeKind.ORGANISATION, organisation_id, WIDE)
        billing.record_payment(
            work, poor.organisation.id, Money.parse(POOR_CREDIT), reference="bank-poor"
        )
    return poor, version


def _replica(books: LinkedBooks, name: str, door: Path) -> None:
    """A model server that compute knows nothing of."""
    model = REPLICAS[name]
    deployment = f"dep_{model}"
    with books.store.work(SYSTEM) as work:
        now = work.now
        if all(found.id != deployment for found in model_rows.list_deployments(work.tx)):
            model_rows.insert_deployment(
                work.tx,
                {
                    "id": deployment, "model": model, "pool_id": "pol_none", "devices": 1,
                    "min_replicas": 2, "max_replicas": 2, "slots": SLOTS, "target": SLOTS,
                    "drain_seconds": 5, "idle_seconds": 300, "state": "active", "wanted": 2,
                    "last_asked_at": now, "failures": 0, "created_at": now, "version": 1,
                },
            )  # fmt: skip
        model_rows.insert_replica(
            work.tx,
            models.Replica(
                id=name, deployment_id=deployment, model=model, is_filler=False,
                state=models.ReplicaState.READY, door=str(door), has_key=False, created_at=now,
                ready_at=now, draining_at=None, gone_at=None, reason=None,
            ),
        )  # fmt: skip
        work.emit(models.ReplicaChanged(name, deployment, "ready"))
