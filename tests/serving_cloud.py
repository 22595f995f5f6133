"""A real cloud that sells tokens: `sublet up`, model servers in their sandboxes, clients that stream."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from system.conftest import SUBLET, RunningCloud, children_of, processes_naming, wait_until

from sublet.base.wire import rest
from sublet.sdk import ApiError, Client, ClientError, Gateway

SMOL, MUSE, PLAIN = "smollm2-135m-instruct", "muse-tiny", "muse-plain"
CARRIED = Path(str(files("sublet.shops.models").joinpath("carried/muse-tiny.gguf")))
QUESTION = [{"role": "user", "content": "Say in some sentences why rivers meander."}]
ENDLESS = {"0": -100, "2": -100}
"""Of SMOL: it never comes to its end by itself, but makes as many tokens as it may."""
READY_SECONDS = 60.0
BOOKED_SECONDS = 20.0
RETRY_SECONDS = 5
WHOLE_MICROS = rest.TokenPriceCreate(
    tier="default", input_micros=2_000_000, cached_micros=1_000_000, output_micros=3_000_000
)
"""A million tokens' price in micros, such that no token of any class is lost in rounding."""


@dataclass(slots=True)
class Stream:
    """One streamed answer as its client saw it."""

    prompt: int = 0
    output: int = 0
    texts: int = 0
    began_at: float = 0.0
    first_at: float = 0.0
    ended_at: float = 0.0
    failure: ClientError | None = None

    @property
    def is_whole(self) -> bool:
        return self.failure is None

    @property
    def is_refused(self) -> bool:
        """With a code that says to come again, before anything was sent."""
        refused = self.failure
        return (
            isinstance(refused, ApiError)
            and not self.texts
            and refused.status == 503
            and refused.retry_after_seconds is not None
        )

    @property
    def code(self) -> str:
        return self.failure.code if isinstance(self.failure, ApiError) else str(self.failure)


class Serving:
    """The cloud, its owner, and one consumer who calls models."""

    def __init__(self, folder: Path, *options: str, **settings: int) -> None:
        lines = [f"{name} = {value}\n" for name, value in settings.items()]
        (folder / "sublet.toml").write_text("".join(lines))
        self.folder = folder
        self.cloud = RunningCloud(folder, "--trusted-tenants", "--gateway-port", "0", *options)
        self.cloud.start()
        self.owner: Client = self.cloud.owner()
        self.consumer: Client = self.cloud.consumer("ada")
        self.key: str = self.cloud.keys["ada"]
        self.organisation = self.consumer.me().organisation.id
        self.owner.money.grant(
            rest.CreditCreate(
                organisation_id=self.organisation, amount_micros=50_000_000, reference="for tests"
            )
        )
        self.asked: list[Stream] = []
        """Every answer that was asked for, in the order of their ends."""
        url = self.owner.status().gateway_url
        assert url is not None
        self.url: str = url
        self.pool: rest.Pool = next(iter(self.owner.pools.list()))

    @property
    def devices(self) -> int:
        return self.pool.sellable_devices

    # ---- the owner ------------------------------------------------------------------------

    def add_plain(
        self, name: str = PLAIN, *, data: bytes | None = None, **fields: Any
    ) -> rest.CatalogueModel:
        """The model that comes along, unsealed, from a file of its own; at a price without rounding."""
        path = self.folder / f"{name}.gguf"
        path.write_bytes(data or CARRIED.read_bytes())
        values: dict[str, Any] = {
            "name": name,
            "provider": "Tests",
            "licence": "PSF-2.0",
            "path": str(path),
            "quantization": "Q8_0",
            "context": 512,
        }
        made = self.owner.catalogue.add(rest.ModelCreate(**{**values, **fields}))
        self.price(name)
        return made

    def price(self, name: str) -> None:
        self.owner.catalogue.set_price(name, WHOLE_MICROS)

    def deploy(self, model: str, ready: int = 1, **fields: Any) -> rest.Deployment:
        """Deployed, and so many replicas of it ready."""
        values = {"drain_seconds": 30, "idle_seconds": 3600, **fields}
        made = self.owner.deployments.create(rest.DeploymentCreate(model=model, **values))
        self.until_ready(made.id, ready)
        return made

    def seen(self, deployment_id: str) -> rest.Deployment:
        return self.owner.deployments.get(deployment_id)

    def ready(self, deployment_id: str) -> list[rest.Replica]:
        return [r for r in self.seen(deployment_id).replicas if r.state == "ready"]

    def until_ready(self, deployment_id: str, count: int = 1) -> list[rest.Replica]:
        def are_ready() -> list[rest.Replica] | None:
            found = self.ready(deployment_id)
            return found if len(found) >= count else None

        try:
            found: list[rest.Replica] = wait_until(are_ready, READY_SECONDS, f"{count} replicas")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.seen(deployment_id)}") from None
        return found

    def retire(self, deployment_id: str) -> None:
        """Ended, and its devices free again."""
        self.owner.deployments.retire(deployment_id)
        replicas = {r.id for r in self.owner.deployments.replicas(deployment_id)}

        def is_gone() -> bool:
            held = {device.holder for device in self.owner.devices.list()}
            return self.seen(deployment_id).state == "retired" and not held & replicas

        wait_until(is_gone, 60, f"{deployment_id} is gone")

    # ---- its callers ----------------------------------------------------------------------

    def stream(
        self, model: str, most: int, seen: Stream | None = None, *, patience: float = 120.0
    ) -> Stream:
        """Ask, and read the answer to its end, whatever that is."""
        seen = seen or Stream()
        seen.began_at = time.monotonic()
        try:
            with Gateway(self.url, self.key, timeout_seconds=patience) as gateway:
                more: dict[str, Any] = {"logit_bias": ENDLESS} if model == SMOL else {}
                for piece in gateway.chat(
                    model, QUESTION, max_tokens=most, temperature=0.7, **more
                ):
                    if piece.text:
                        seen.first_at = seen.first_at or time.monotonic()
                        seen.texts += 1
                    if piece.prompt_tokens:
                        seen.prompt, seen.output = piece.prompt_tokens, piece.completion_tokens
        except ClientError as error:
            seen.failure = error
        seen.ended_at = time.monotonic()
        self.asked.append(seen)
        return seen

    @contextmanager
    def streams(self, model: str, count: int, most: int) -> Iterator[list[Stream]]:
        """So many at once, all of which have begun to answer; joined at the end."""
        open_ones = [Stream() for _ in range(count)]
        threads = [
            threading.Thread(target=self.stream, args=(model, most, one)) for one in open_ones
        ]
        for thread in threads:
            thread.start()
        try:
            wait_until(
                lambda: all(one.texts or one.failure for one in open_ones), 30, "first tokens"
            )
            yield open_ones
        finally:
            for thread in threads:
                thread.join(120)

    # ---- the books ------------------------------------------------------------------------

    def billed(self) -> list[rest.TokenUsage]:
        return list(self.consumer.token_usage.list())

    def invoiced(self) -> dict[str, int]:
        """Tokens by class, as the invoice so far has them."""
        found = {"input": 0, "cached": 0, "output": 0}
        for line in self.consumer.money.invoice_so_far().lines:
            if line.kind == "token_usage":
                found[line.product.split(":")[1]] += line.quantity
        return found

    def await_books(self, *, lost: int = 0) -> None:
        """All that was ever asked is billed once, and nothing else: what clients were told, the
        records and the invoice agree to the token. What was cut is billed as far as it was
        delivered; `lost` answers went with a gateway, and are billed to nobody."""
        told = sorted((one.prompt, one.output) for one in self.asked if one.is_whole)
        cut = {
            one.failure.request_id: one
            for one in self.asked
            if isinstance(one.failure, ApiError) and one.texts
        }

        def rows() -> list[rest.TokenUsage] | None:
            found = [u for u in self.billed() if u.outcome != "failed"]
            return found if len(found) >= len(told) + len(cut) + lost else None

        found: list[rest.TokenUsage] = wait_until(rows, BOOKED_SECONDS, "the usage in the books")
        whole = [u for u in found if u.outcome == "ok"]
        assert sorted((u.input_uncached + u.cache_read, u.output) for u in whole) == told
        broken = {u.id: u for u in found if u.outcome == "interrupted"}
        assert set(broken) == set(cut)
        for request_id, one in cut.items():
            # A token may be a part of a character, and then shows with the next one.
            assert one.texts <= broken[request_id].output <= one.texts + 3
        free = [u for u in found if u.outcome == "lost"]
        assert len(free) == lost == len(found) - len(whole) - len(broken)
        assert not any(u.input_uncached or u.cache_read or u.output for u in free)
        assert self.invoiced() == {
            "input": sum(u.input_uncached for u in found),
            "cached": sum(u.cache_read for u in found),
            "output": sum(u.output for u in found),
        }
        self.audit()

    def audit(self) -> None:
        verdict = self.owner.audit_books()
        assert verdict.sound, verdict.violations

    def audit_command(self) -> None:
        """`sublet audit-books` on the folder of a cloud, as its owner would."""
        done = self.command("audit-books", "--data", str(self.cloud.data))
        assert done.returncode == 0, done.stdout + done.stderr

    # ---- its processes --------------------------------------------------------------------

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """A command of the owner's."""
        return subprocess.run(
            [SUBLET, *words],
            capture_output=True,
            text=True,
            timeout=60,
            env={
                **os.environ,
                "XDG_CONFIG_HOME": str(self.folder / "config"),
                "SUBLET_URL": self.cloud.url,
                "SUBLET_KEY": self.cloud.owner_key,
                "COLUMNS": "200",
            },
            check=False,
        )

    def pid_of(self, role: str) -> int:
        """`loops`, `link`, `api`, or `gateway`."""
        assert self.cloud.process is not None
        words = ["-m", "sublet.gateway"] if role == "gateway" else ["sublet.app.child", role]
        [pid] = [p for p in children_of(self.cloud.process.pid) if _command(p)[-2:] == words]
        return pid

    def kill(self, role: str) -> None:
        """kill -9, and wait until another one was started in its place."""
        before = self.pid_of(role)
        os.kill(before, signal.SIGKILL)

        def is_new() -> bool:
            try:
                return self.pid_of(role) != before
            except ValueError:
                return False

        wait_until(is_new, 20, f"another {role}")

    def server_pids(self, model: str) -> list[int]:
        """The model servers of this cloud that serve it, as the host numbers them."""
        found: list[int] = []
        for entry in Path("/proc").iterdir():
            words = _command(int(entry.name)) if entry.name.isdigit() else []
            if any(str(self.cloud.data / "engine") in word for word in words):
                found += [p for p in _below(int(entry.name)) if _serves(p, model)]
        return sorted(set(found))


def _command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def _below(pid: int) -> list[int]:
    found = []
    for child in children_of(pid):
        found += [child, *_below(child)]
    return found


def _serves(pid: int, model: str) -> bool:
    words = _command(pid)
    return any(word.endswith("/serve.py") for word in words) and f'"alias": "{model}"' in words[-1]


@dataclass
class Steady:
    """Clients that stream all the time, each with one answer after the other."""

    serving: Serving
    model: str
    most: int
    count: int
    done: list[Stream] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _threads: list[threading.Thread] = field(default_factory=list)

    def __enter__(self) -> Steady:
        self._threads = [threading.Thread(target=self._go_on) for _ in range(self.count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)

    def _go_on(self) -> None:
        while not self._stop.is_set():
            one = self.serving.stream(self.model, self.most)
            with self._lock:
                self.done.append(one)
            if one.failure is not None:
                self._stop.wait(0.5)

    def whole(self) -> list[Stream]:
        return [one for one in self.done if one.is_whole]

    def broken(self) -> list[str]:
        """Those that neither ended well nor were refused with a time to come again."""
        return [
            f"{one.code} after {one.texts} texts"
            for one in self.done
            if not (one.is_whole or one.is_refused)
        ]

    def until_answered(self, more: int) -> None:
        """So many answers more have come to their end."""
        aim = len(self.whole()) + more
        wait_until(lambda: len(self.whole()) >= aim, 90, f"{more} answers more")


@contextmanager
def serving(folder: Path, *options: str, **settings: int) -> Iterator[Serving]:
    """Opened, and at the end audited and closed with nothing left."""
    made = Serving(folder, *options, **settings)
    try:
        yield made
    finally:
        made.cloud.forget_clients()
        code = made.cloud.close(signal.SIGINT, 90)
        for line in processes_naming(str(folder)):
            sys.stderr.write(f"left running: {line}\n")
    assert code == 0, made.cloud.said()
    made.audit_command()


def needs_weights(made: Serving) -> None:
    """For a model that takes its time over an answer."""
    model = made.owner.catalogue.get(SMOL)
    if not model.may_be_deployed:
        pytest.skip(f"{SMOL} is not here: {model.hint}")
