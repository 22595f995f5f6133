"""The tour's act on models: tokens sold from the same devices that are rented.

An open and a sealed model are called side by side; the sealed one leaves before a stranger's
instance comes to its node; the open one leaves for the owner's recall while it is being asked.
"""

from __future__ import annotations

import hashlib
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING

from sublet.base.kernel.clock import read_boot_ns
from sublet.base.wire import rest
from sublet.cli import values
from sublet.cli.tour import work
from sublet.cli.tour.stage import Scene, StoryBroken, Tour
from sublet.sdk import ApiError, Client, ClientError, Gateway

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

OPEN, SEALED = "smollm2-135m-instruct", "muse-tiny"
READY_SECONDS = 60
DRAIN_SECONDS = 20
BOOKED_SECONDS = 20
LOAD = 3
LOAD_TOKENS = 64
OWN_STEPS = 4
QUESTION = [{"role": "user", "content": "Say in one sentence why rivers meander."}]
TEXT = [{"role": "user", "content": "The assignment statement"}]


@dataclass(slots=True)
class Asked:
    """What a stream came to, as its client saw it."""

    is_whole: bool = False
    output: int = 0
    failure: str = ""


@dataclass(slots=True)
class Models:
    """Owner and consumer, and what they deploy and ask."""

    tour: Tour
    scene: Scene
    consumer: Client
    key: str
    deployed: dict[str, rest.Deployment] = field(default_factory=dict)
    recall: rest.Recall | None = None
    served: str | None = None
    """The device that the open model was served on."""

    def play(self) -> None:
        """The whole act. Raises StoryBroken."""
        url = self.tour.owner.status().gateway_url
        if url is None:
            raise StoryBroken("this cloud has no gateway")
        missing = self._missing()
        if missing:
            self.tour.note(f"no model is sold in this tour: {missing}")
            return
        with Gateway(url, self.key) as gateway:
            self._deploy(gateway)
            self._ask_both(gateway)
            self._weights()
            self._sealed_leaves()
            self._leave_under_load(gateway)

    def _missing(self) -> str:
        found = {model.name: model for model in self.tour.owner.catalogue.list()}
        for name in (OPEN, SEALED):
            if name not in found or not found[name].may_be_deployed:
                hint = found[name].hint if name in found else None
                return hint or f"{name} is not on the catalogue"
        return ""

    # ---- deploy and ask --------------------------------------------------------------------

    def _deploy(self, gateway: Gateway) -> None:
        tour = self.tour
        together = self.scene.pool.free_devices >= 2
        tour.begin("The owner serves models from the same devices")
        for name in (SEALED, OPEN) if together else (SEALED,):
            self._serve(name)
        names = sorted(gateway.models())
        tour.promise(
            "who has a key sees what may be called, with OpenAI's and Anthropic's clients",
            f"{', '.join(names)} at {gateway.url}/v1",
            set(self.deployed) <= set(names),
        )

    def _serve(self, name: str) -> None:
        deployment = self.tour.owner.deployments.create(
            rest.DeploymentCreate(
                model=name,
                pool_id=self.scene.pool.id,
                drain_seconds=DRAIN_SECONDS,
                idle_seconds=600,
            )
        )
        self.deployed[name] = deployment
        taken = self.tour.wait(
            lambda: self._ready(name) is not None, f"a replica of {name}", READY_SECONDS
        )
        self.tour.note(f"{name} answers after {taken:.1f} s: filler, on one idle device")

    def _fresh(self, name: str) -> rest.Deployment:
        return self.tour.owner.deployments.get(self.deployed[name].id)

    def _ready(self, name: str) -> rest.Replica | None:
        found = self._fresh(name)
        if found.failure and found.replicas == [] and found.retry_at is None:
            raise StoryBroken(f"{name}: {found.failure}")
        return next((r for r in found.replicas if r.state == "ready"), None)

    def _ask_both(self, gateway: Gateway) -> None:
        tour = self.tour
        tour.begin("She calls them")
        before = self._billed()
        used = []
        for name, messages, most in ((OPEN, QUESTION, 40), (SEALED, TEXT, 24)):
            if name not in self.deployed:
                continue
            begun = read_boot_ns()
            prompt, output, first, text = _stream(gateway, name, messages, most)
            used.append((name, prompt, output))
            tour.note(f"{name}: {text.strip()[:90]!r}")
            tour.note(
                f"{prompt} tokens in, {output} out; first after {(first - begun) / 1e6:.0f} ms"
            )
        wanted = {(name, prompt, output) for name, prompt, output in used}

        def booked() -> bool:
            return len(self._billed()) >= len(before) + len(used)

        with suppress(StoryBroken):
            tour.wait(booked, "the usage in the books", BOOKED_SECONDS)
        found = {
            (u.model, u.input_uncached + u.cache_read, u.output)
            for u in self._billed()[len(before) :]
        }
        tour.promise(
            "the usage that the books hold is the usage that the answers told",
            f"{len(found & wanted)} of {len(wanted)} agree to the token",
            found == wanted,
        )

    def _billed(self) -> list[rest.TokenUsage]:
        return list(self.consumer.token_usage.list())

    def _weights(self) -> None:
        tour = self.tour
        tour.begin("One gives its weights away, the other keeps them")
        model = self.consumer.catalogue.get(OPEN)
        digest, size = hashlib.sha256(), 0
        for piece in self.consumer.catalogue.weights(OPEN):
            digest.update(piece)
            size += len(piece)
        refused = _code(lambda: b"".join(self.consumer.catalogue.weights(SEALED)))
        tour.promise(
            "open weights are downloaded, by their sha256; sealed ones are refused",
            f"{values.size(size)}, {model.licence}, sha256 "
            f"{'as listed' if digest.hexdigest() == model.sha256 else 'DIFFERENT'}; "
            f"{SEALED}: {refused}",
            digest.hexdigest() == model.sha256 and refused == "weights_sealed",
        )
        url = self.tour.owner.status().gateway_url
        assert url is not None
        with Gateway(url, self.key) as gateway:
            asked = _code(
                lambda: list(
                    gateway.chat(SEALED, TEXT, max_tokens=1, logprobs=True, top_logprobs=5)
                )
            )
        tour.promise(
            "nor does it tell its logits", f"top_logprobs: {asked}", asked == "sealed_parameter"
        )

    # ---- the sealed one leaves ---------------------------------------------------------------

    def _sealed_leaves(self) -> None:
        tour = self.tour
        tour.begin("No stranger's shell beside sealed weights")
        replica = self._ready(SEALED)
        quote = self.consumer.quotes.create(rest.QuoteCreate(offer_id=self.scene.spot.id))
        answer, near = self._knock(quote.id)
        holder = None if replica is None else replica.id
        stands = any(d.holder == holder for d in tour.owner.devices.list())
        is_beside = near is not None and stands and self._is_running(near)
        tour.promise(
            "while they are served, no instance comes to their node",
            "ONE RUNS THERE" if is_beside else answer,
            not is_beside,
        )
        if near is not None:
            self.consumer.instances.terminate(near)
        self._retire(SEALED)
        holders = {device.holder for device in tour.owner.devices.list()}
        is_gone = replica is None or replica.id not in holders
        tour.promise(
            "then they are stopped, and their device is scrubbed before anybody gets it",
            "the device is free" if is_gone else "STILL HELD",
            is_gone,
        )

    def _knock(self, quote_id: str) -> tuple[str, str | None]:
        """Ask for an instance there: refused, or admitted for when the node is empty."""
        body = rest.InstanceCreate(
            name="near", quote_id=quote_id, ssh_keys=[self.tour.visitor.public_key]
        )
        try:
            made = self.consumer.instances.create(body)
        except ApiError as error:
            if error.code != "sealed_node":
                raise
            return f"refused: {error.code}, earliest {error.details.get('earliest_at')}", None
        return "admitted, but not started before they have left", made.id

    def _is_running(self, instance_id: str) -> bool:
        return self.consumer.instances.get(instance_id).state == "running"

    def _retire(self, name: str) -> None:
        deployment = self.deployed.pop(name)
        self.tour.owner.deployments.retire(deployment.id)
        replicas = {r.id for r in self.tour.owner.deployments.replicas(deployment.id)}

        def is_gone() -> bool:
            held = {device.holder for device in self.tour.owner.devices.list()}
            return self.tour.owner.deployments.get(deployment.id).state == "retired" and not (
                held & replicas
            )

        taken = self.tour.wait(is_gone, f"the end of {name}", DRAIN_SECONDS + 40)
        self.tour.note(f"{name} was drained, stopped and scrubbed in {taken:.1f} s")

    # ---- the open one leaves under load ------------------------------------------------------

    def _leave_under_load(self, gateway: Gateway) -> None:
        tour = self.tour
        if OPEN not in self.deployed:
            self._serve(OPEN)
        tour.begin("The owner recalls the device while the model is being asked")
        replica = self._ready(OPEN)
        assert replica is not None
        self.served = next(
            (d.id for d in tour.owner.devices.list() if d.holder == replica.id), None
        )
        before = len(self._billed())
        done, stop, threads = self._load(gateway)
        pool = tour.owner.pools.get(self.scene.pool.id)
        planned = tour.owner.recalls.plan(
            rest.RecallCreate(pool_id=pool.id, devices=1, count=pool.sellable_devices)
        )
        begun = read_boot_ns()
        self.recall = tour.owner.recalls.accept(planned.id)
        stop.set()
        for thread in threads:
            thread.join(DRAIN_SECONDS + 60)
        limit = DRAIN_SECONDS + self.scene.pool.scrub_seconds + 60
        tour.wait(lambda: self._recall().state == "delivered", "the hand-over", limit)
        taken = (read_boot_ns() - begun) / 1e9
        broken = [asked.failure for asked in done if not asked.is_whole]
        tour.promise(
            "no request is dropped",
            f"{len(done)} streams were open or made meanwhile, {len(broken)} broke off; the device "
            f"was the owner's {taken:.1f} s after the notice"
            + (f" ({broken[0]})" if broken else ""),
            bool(done) and not broken,
        )
        made = sum(asked.output for asked in done)

        def billed() -> int:
            return sum(u.output for u in self._billed()[before:])

        with suppress(StoryBroken):
            tour.wait(lambda: billed() >= made, "the usage in the books", BOOKED_SECONDS)
        tour.promise(
            "and none is unbilled",
            f"{billed()} tokens billed of {made} delivered",
            billed() == made,
        )
        self._own_work()

    def _load(
        self, gateway: Gateway
    ) -> tuple[list[Asked], threading.Event, list[threading.Thread]]:
        done: list[Asked] = []
        stop, lock = threading.Event(), threading.Lock()

        def ask() -> None:
            while not stop.is_set():
                asked = Asked()
                try:
                    _, asked.output, _, _ = _stream(gateway, OPEN, QUESTION, LOAD_TOKENS)
                    asked.is_whole = True
                except ClientError as error:
                    asked.failure = str(error)
                with lock:
                    done.append(asked)

        threads = [threading.Thread(target=ask, daemon=True) for _ in range(LOAD)]
        for thread in threads:
            thread.start()
        self.tour.wait(lambda: len(done) >= LOAD, "the first answers under load", READY_SECONDS)
        return done, stop, threads

    def _own_work(self) -> None:
        """The owner's own job on the device that was a replica; then it goes back to sale."""
        tour = self.tour
        own = tour.owner.jobs.create(
            rest.JobCreate(
                name="first",
                offer_id=self.scene.spot.id,
                command=work.chain_command(OWN_STEPS),
            )
        )
        tour.wait(
            lambda: tour.owner.jobs.get(own.id).state in ("completed", "failed"),
            "the owner's job",
            60,
        )
        assert self.recall is not None
        tour.owner.recalls.give_back(self.recall.id)
        self._retire(OPEN)

    def _recall(self) -> rest.Recall:
        assert self.recall is not None
        return self.tour.owner.recalls.get(self.recall.id)

    def one_device(self, start: datetime, end: datetime, device_ids: Iterable[str]) -> None:
        """At the tour's end: the device that was a replica, the owner's, and an instance's."""
        if self.served is None:
            return
        tour = self.tour
        found = tour.owner.devices.time(start=start, end=end, device_id=self.served)
        uses = {use: ms for use, ms in found.milliseconds_by_use.items() if ms}
        whole = sum(uses.values())
        length = round((found.end - found.start).total_seconds() * 1000)
        was_rented = self.served in set(device_ids)
        told = ", ".join(f"{use} {ms} ms" for use, ms in sorted(uses.items()))
        wanted = {"serving", "first_party"} | ({"sold_used"} if was_rented else set())
        tour.promise(
            "one device was a replica, the owner's own, and rented, and its time adds up",
            f"{self.served}: {told}; {whole} of {length} ms",
            wanted <= set(uses) and abs(whole - length) <= 1,
        )

    def leave(self) -> None:
        """Leave nothing behind, however the act ended."""
        with suppress(ClientError):
            if self.recall is not None and self._recall().state not in ("returned", "cancelled"):
                recalls = self.tour.owner.recalls
                is_delivered = self._recall().state == "delivered"
                (recalls.give_back if is_delivered else recalls.cancel)(self.recall.id)
        for deployment in self.deployed.values():
            with suppress(ClientError):
                self.tour.owner.deployments.retire(deployment.id)


def _stream(
    gateway: Gateway, model: str, messages: list[dict[str, str]], most: int
) -> tuple[int, int, int, str]:
    """Input and output tokens as told, when the first text came, and the text."""
    prompt = output = first = 0
    said = []
    for piece in gateway.chat(model, messages, max_tokens=most, temperature=0.7):
        if piece.text:
            first = first or read_boot_ns()
            said.append(piece.text)
        if piece.prompt_tokens:
            prompt, output = piece.prompt_tokens, piece.completion_tokens
    return prompt, output, first or read_boot_ns(), "".join(said)


def _code(act: Callable[[], object]) -> str:
    """The code under which it is refused; or that it is not."""
    try:
        act()
    except ApiError as error:
        return error.code
    return "NOT REFUSED"
