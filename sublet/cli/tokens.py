"""Tokens: talk to a model, measure what a device makes, see what was used."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer

from sublet.base.kernel.clock import read_boot_ns
from sublet.cli import profile, values
from sublet.cli.commands import MODELS, Json, client, command
from sublet.cli.errors import CliError, UsageError
from sublet.cli.screen import facts, progress, show, show_json, table

if TYPE_CHECKING:
    from sublet.sdk import Client, Gateway

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Its name: `sublet models list`.")]
BENCH_PROMPT = "Write a long story about a river, a mill and the people who live beside them."
BENCH_OUTPUT = 128


def add_to(app: typer.Typer) -> None:
    command(
        app,
        "sublet chat smollm2-135m-instruct 'Name three rivers.'",
        "sublet chat smollm2-135m-instruct",
        "echo 'Hello' | sublet chat muse-tiny -",
        panel=MODELS,
    )(chat)
    command(
        app,
        "sublet bench smollm2-135m-instruct",
        "sublet bench smollm2-135m-instruct --seconds 60 --requests 8 --keep",
        panel=MODELS,
    )(bench)
    command(
        app,
        "sublet tokens",
        "sublet tokens --last 50 --project prj_…",
        "sublet tokens --json",
        panel=MODELS,
    )(tokens)


def gateway_of(cloud: Client) -> Gateway:
    """The gateway of this cloud, with the same key. Raises CliError where there is none."""
    from sublet.sdk import Gateway

    url = cloud.status().gateway_url
    key = profile.load().key
    if url is None or key is None:
        raise CliError("this cloud has no gateway now: is it still starting?")
    return Gateway(url, key)


# ---- chat ---------------------------------------------------------------------------------------


def chat(
    name: ModelName,
    prompt: Annotated[
        str | None, typer.Argument(help="One question; `-` reads it; default: a conversation.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", min=1, help="Of each answer, at most.")
    ] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, max=2)] = None,
    tier: Annotated[str | None, typer.Option("--tier", help="default or flex.")] = None,
    as_json: Json = False,
) -> None:
    """Talk to a model. The answer comes as it is made; what it used is said at the end."""
    with client(quiet=True) as cloud, gateway_of(cloud) as gateway:
        talk = _Talk(gateway, name, max_tokens, temperature, tier)
        if system:
            talk.messages.append({"role": "system", "content": system})
        if prompt is not None:
            talk.ask(sys.stdin.read() if prompt == "-" else prompt, as_json=as_json)
            return
        if not sys.stdin.isatty():
            raise UsageError("say what to ask, or `-` to read it.")
        show(f"{name}: end with an empty line or Ctrl-D.")
        while True:
            try:
                asked = input("> ").strip()
            except EOFError:
                return
            if not asked:
                return
            talk.ask(asked)


@dataclass(slots=True)
class _Talk:
    """A conversation, with all that was said."""

    gateway: Gateway
    model: str
    max_tokens: int | None
    temperature: float | None
    tier: str | None
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str, *, as_json: bool = False) -> None:
        self.messages.append({"role": "user", "content": text})
        more = {} if self.temperature is None else {"temperature": self.temperature}
        begun, first = read_boot_ns(), 0
        said, used = [], (0, 0)
        try:
            for piece in self.gateway.chat(
                self.model, self.messages, max_tokens=self.max_tokens, tier=self.tier, **more
            ):
                if piece.text:
                    first = first or read_boot_ns()
                    said.append(piece.text)
                    if not as_json:
                        print(piece.text, end="", flush=True)
                if piece.completion_tokens or piece.prompt_tokens:
                    used = (piece.prompt_tokens, piece.completion_tokens)
        finally:
            # What went wrong is said on a line of its own.
            if said and not as_json:
                print(flush=True)
        answer = "".join(said)
        self.messages.append({"role": "assistant", "content": answer})
        seconds = (read_boot_ns() - begun) / 1e9
        if as_json:
            print(
                json.dumps(
                    {
                        "model": self.model,
                        "answer": answer,
                        "input_tokens": used[0],
                        "output_tokens": used[1],
                        "seconds": round(seconds, 3),
                    }
                )
            )
            return
        wait = f", first after {(first - begun) / 1e6:.0f} ms" if first else ""
        print(
            f"[{used[0]} tokens in, {used[1]} out, {seconds:.1f} s{wait}]",
            file=sys.stderr,
            flush=True,
        )


# ---- bench --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Count:
    """What all asking threads found together."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    requests: int = 0
    output: int = 0
    prompt: int = 0
    first_ms: list[float] = field(default_factory=list)
    failure: Exception | None = None


def bench(
    name: ModelName,
    seconds: Annotated[int, typer.Option("--seconds", min=2, help="How long to ask.")] = 20,
    requests: Annotated[
        int | None, typer.Option("--requests", min=1, help="Side by side; default: all slots.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Write the figure into the catalogue (the owner).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure what a device makes: output tokens per device-hour, the figure that prices come from."""
    from sublet.cli.models import find_deployment

    with client(quiet=True) as cloud, gateway_of(cloud) as gateway:
        deployment = find_deployment(cloud, name)
        ready = sum(r.state == "ready" for r in deployment.replicas)
        if not ready:
            raise CliError(
                f"{name} has no replica that is ready: `sublet deployments show {name}`."
            )
        side = requests or ready * deployment.slots
        with progress(f"asking {name} for {seconds} s, {side} side by side"):
            count, taken = _measure(lambda: _ask_once(gateway, name), seconds, side)
        if count.failure is not None:
            raise count.failure  # What the others made is no measure of a device.
        hourly = int(count.output / taken * 3600 / (ready * deployment.devices))
        price = next((p for p in cloud.catalogue.get(name).prices if p.tier == "default"), None)
        earns = 0 if price is None else hourly * price.output_micros // 1_000_000
        if keep:
            from sublet.base.wire import rest as shapes

            version = cloud.catalogue.get(name).version
            patch = shapes.ModelPatch(tokens_per_device_hour=hourly)
            cloud.catalogue.change(name, patch, version=version)
    first = sorted(count.first_ms)
    found = {
        "model": name,
        "replicas": ready,
        "devices_each": deployment.devices,
        "side_by_side": side,
        "seconds": round(taken, 2),
        "requests": count.requests,
        "input_tokens": count.prompt,
        "output_tokens": count.output,
        "output_tokens_per_device_hour": hourly,
        "output_revenue_micros_per_device_hour": earns,
        "first_token_p50_ms": round(first[len(first) // 2], 1) if first else None,
        "first_token_p99_ms": round(first[int(len(first) * 0.99)], 1) if first else None,
    }
    if as_json:
        print(json.dumps(found))
        return
    facts(
        [
            ("model", f"{name}, replicas: {ready}, each with {values.devices(deployment.devices)}"),
            ("asked", f"{count.requests} times in {taken:.1f} s, {side} side by side"),
            ("made", f"{count.output} tokens from {count.prompt}"),
            ("a device-hour", f"{hourly:,} output tokens"),
            ("worth", f"{values.money(earns)} of output at today's price"),
            (
                "first token",
                f"p50 {found['first_token_p50_ms']} ms, p99 {found['first_token_p99_ms']} ms",
            ),
        ]
    )
    if keep:
        show("kept in the catalogue")


def _ask_once(gateway: Gateway, name: str) -> tuple[int, int, float]:
    begun, first = read_boot_ns(), 0
    prompt = output = 0
    messages = [{"role": "user", "content": BENCH_PROMPT}]
    for piece in gateway.chat(name, messages, max_tokens=BENCH_OUTPUT, temperature=1.0):
        if piece.text and not first:
            first = read_boot_ns()
        if piece.completion_tokens:
            prompt, output = piece.prompt_tokens, piece.completion_tokens
    return prompt, output, (first - begun) / 1e6


def _measure(
    ask: Callable[[], tuple[int, int, float]], seconds: int, side: int
) -> tuple[_Count, float]:
    count = _Count()
    begun = read_boot_ns()
    until = begun + seconds * 1_000_000_000

    def go() -> None:
        while read_boot_ns() < until and count.failure is None:
            try:
                prompt, output, first = ask()
            except Exception as error:
                with count.lock:
                    count.failure = error
                return
            with count.lock:
                count.requests += 1
                count.prompt += prompt
                count.output += output
                count.first_ms.append(first)

    threads = [threading.Thread(target=go, daemon=True) for _ in range(side)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count, (read_boot_ns() - begun) / 1e9


# ---- what was used ------------------------------------------------------------------------------


def tokens(
    last: Annotated[int, typer.Option("--last", min=1, help="So many requests.")] = 20,
    project: Annotated[str | None, typer.Option("--project", help="Of this project only.")] = None,
    as_json: Json = False,
) -> None:
    """What was called: request by request, the newest last."""
    with client() as cloud:
        found = cloud.token_usage.last(last, project_id=project)
    if as_json:
        show_json(found)
        return
    table(
        ("request", "model", "tier", ">input", ">cached", ">output", "outcome", "at"),
        [
            (
                u.id,
                u.model,
                u.tier,
                u.input_uncached,
                u.cache_read,
                u.output,
                u.outcome,
                values.when(u.started_at),
            )
            for u in found
        ],
        empty="no model was called yet: `sublet chat MODEL 'Hello'`.",
    )
