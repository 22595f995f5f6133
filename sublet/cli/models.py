"""Models: the catalogue, what is deployed, who may call what."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sublet.cli import values
from sublet.cli.commands import (
    MODELS,
    OWNER,
    Json,
    PoolWord,
    Yes,
    client,
    command,
    group,
    only_pool,
)
from sublet.cli.errors import CliError, UsageError
from sublet.cli.screen import confirm, facts, poll, progress, say, show, show_json, table

if TYPE_CHECKING:
    from sublet.base.wire import rest
    from sublet.sdk import Client

models = group(
    "What models there are, what they cost, who may call them.",
    "sublet models list",
    "sublet models show muse-tiny",
    "sublet models download smollm2-135m-instruct",
)
deployments = group(
    "What is served, and by how many replicas.",
    "sublet deployments list",
    "sublet deployments scale dep_… --max 3",
    "sublet deployments retire dep_…",
)

ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="Its name: `sublet models list`.")]
DeploymentWord = Annotated[
    str, typer.Argument(metavar="DEPLOYMENT", help="Its id, or the name of its model.")
]
Everyone = Annotated[
    str, typer.Option("--to", help="An organisation's id; default: everyone.", metavar="ORG")
]
READY_SECONDS = 120.0
SPOOL_FAULT_WAYS = """\
What it held of credit stays held, and nothing behind the fault is billed, until you do one of these:
  mend the cause, or the file: it is read again by itself within 30 seconds
  or close the cloud, move that folder out of `gateway/` in the data folder, and open the cloud:
  what it held comes free, and what was not read is never billed
How a file is mended stands in docs/operate.md under "Usage that is not booked"."""


def add_to(app: typer.Typer) -> None:
    command(models, "sublet models list", "sublet models list --json", name="list")(list_models)
    command(models, "sublet models show muse-tiny", name="show")(show_model)
    command(
        models,
        "sublet models download smollm2-135m-instruct",
        "sublet models download all-minilm-l6-v2 --out mini.gguf",
        name="download",
    )(download)
    command(
        models,
        "sublet models add mine --file mine.gguf --licence MIT --quantization Q8_0 --context 4096",
        "sublet models add secret --file s.gguf --licence own --quantization F16 --context 512 --sealed",
        name="add",
    )(add)
    command(
        models,
        "sublet models price mine --input 0.04 --cached 0.02 --output 0.16",
        "sublet models price mine --tier flex --input 0.02 --cached 0.01 --output 0.08",
        name="price",
    )(price)
    command(models, "sublet models grant muse-tiny --to org_…", name="grant")(grant)
    command(models, "sublet models revoke muse-tiny --to org_…", name="revoke")(revoke)
    command(
        models,
        "sublet models lifecycle mine legacy --end-of-life-on 2027-06-01",
        name="lifecycle",
    )(lifecycle)
    app.add_typer(models, name="models", rich_help_panel=MODELS)
    command(
        app,
        "sublet deploy smollm2-135m-instruct --wait",
        "sublet deploy smollm2-135m-instruct --min 1 --max 3",
        panel=MODELS,
    )(deploy)
    command(deployments, "sublet deployments list", name="list")(list_deployments)
    command(deployments, "sublet deployments show muse-tiny", name="show")(show_deployment)
    command(
        deployments, "sublet deployments scale muse-tiny --min 0 --max 2 --idle 10m", name="scale"
    )(scale)
    command(deployments, "sublet deployments retire muse-tiny", name="retire")(retire)
    app.add_typer(deployments, name="deployments", rich_help_panel=MODELS)
    command(app, "sublet gateways", panel=OWNER)(gateways)


# ---- the catalogue ------------------------------------------------------------------------------


def list_models(as_json: Json = False) -> None:
    """Every model, its price and whether it can be called now."""
    with client() as cloud:
        found = list(cloud.catalogue.list())
    if as_json:
        show_json(found)
        return
    table(
        ("model", "makes", "weights", "context", ">in", ">cached", ">out, per million", "now"),
        [
            (
                m.name,
                "text" if m.kind == "generate" else "embeddings",
                m.access,
                m.context,
                *_costs(m),
                _now(m),
            )
            for m in found
        ],
        empty="no model is on the catalogue: `sublet models add`.",
    )


def _costs(model: rest.CatalogueModel) -> tuple[str, str, str]:
    price = next((p for p in model.prices if p.tier == "default"), None)
    if price is None:
        return ("-", "-", "not for sale")
    return (
        values.money(price.input_micros),
        values.money(price.cached_micros),
        values.money(price.output_micros),
    )


def _now(model: rest.CatalogueModel) -> str:
    if model.lifecycle == "end_of_life":
        return "ended"
    if not model.may_be_called:
        return "no grant"
    if model.deployment_id is not None:
        return "deployed" if model.lifecycle == "active" else f"deployed, {model.lifecycle}"
    return "not deployed" if model.may_be_deployed else "weights missing"


def show_model(name: ModelName, as_json: Json = False) -> None:
    """One model: licence, weights, prices by tier, lifecycle."""
    with client() as cloud:
        found = cloud.catalogue.get(name)
    if as_json:
        show_json(found)
        return
    facts(
        [
            ("model", found.name),
            ("provider", found.provider),
            ("licence", found.licence),
            ("weights", f"{found.access}, {found.quantization}, {values.size(found.size_bytes)}"),
            ("sha256", found.sha256),
            ("from", found.source),
            ("context", f"{found.context} tokens, output at most {found.max_output}"),
            ("lifecycle", _lifecycle(found)),
            ("download", "allowed" if found.may_be_downloaded else "refused"),
            ("a device-hour", _throughput(found)),
            ("deployed as", found.deployment_id),
            ("deployable", "yes" if found.may_be_deployed else found.hint),
        ]
    )
    table(
        ("tier", ">input", ">cached", ">output", "since"),
        [
            (
                p.tier,
                values.money(p.input_micros),
                values.money(p.cached_micros),
                values.money(p.output_micros),
                values.when(p.effective_from),
            )
            for p in found.prices
        ],
        title="per million tokens",
        empty="no price is set: `sublet models price`.",
    )


def _lifecycle(model: rest.CatalogueModel) -> str:
    told: list[str] = [model.lifecycle]
    if model.legacy_on is not None:
        told.append(f"legacy on {model.legacy_on}")
    if model.end_of_life_on is not None:
        told.append(f"ends on {model.end_of_life_on}")
    return ", ".join(told)


def _throughput(model: rest.CatalogueModel) -> str:
    if not model.tokens_per_device_hour:
        return f"not measured: `sublet bench {model.name} --keep`"
    return f"{model.tokens_per_device_hour:,} output tokens"


def download(
    name: ModelName,
    out: Annotated[
        Path | None, typer.Option("--out", help="Where to; default: MODEL.gguf.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download a model's weights, where its licence allows; checked by their sha256."""
    target = out or Path(f"{name.replace('/', '_')}.gguf")
    partial = target.with_name(f"{target.name}.part")
    with client(quiet=True) as cloud:
        model = cloud.catalogue.get(name)
        digest, done = hashlib.sha256(), 0
        try:
            with partial.open("wb") as sink, progress(f"downloading {name}") as shown:
                for piece in cloud.catalogue.weights(name):
                    sink.write(piece)
                    digest.update(piece)
                    done += len(piece)
                    shown.update(f"{values.size(done)} of {values.size(model.size_bytes)}")
            if digest.hexdigest() != model.sha256:
                raise CliError(f"what came is not {name}: its sha256 differs. Try again.")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    if as_json:
        show_json(model)
        return
    show(f"{target}  {values.size(done)}  sha256 {model.sha256}  licence {model.licence}")


def add(
    name: ModelName,
    file: Annotated[Path, typer.Option("--file", help="A GGUF file on the cloud's machine.")],
    licence: Annotated[str, typer.Option("--licence", help="Such as Apache-2.0.")],
    quantization: Annotated[str, typer.Option("--quantization", help="Such as Q8_0.")],
    context: Annotated[int, typer.Option("--context", min=16, help="Tokens of one request.")],
    sealed: Annotated[
        bool, typer.Option("--sealed", help="Encrypt it; served, never given.")
    ] = False,
    embeds: Annotated[bool, typer.Option("--embed", help="It makes embeddings.")] = False,
    downloadable: Annotated[
        bool, typer.Option("--downloadable", help="The licence allows to pass it on.")
    ] = False,
    provider: Annotated[str, typer.Option("--provider", help="Whose it is.")] = "owner",
    as_json: Json = False,
) -> None:
    """Put a model on the catalogue. Its file is read through once; a sealed one is encrypted."""
    from sublet.base.wire import rest as shapes

    body = shapes.ModelCreate(
        name=name,
        provider=provider,
        access="sealed" if sealed else "open",
        kind="embed" if embeds else "generate",
        licence=licence,
        licence_allows_download=downloadable,
        path=str(file.resolve()),
        quantization=quantization,
        context=context,
    )
    with client(quiet=True) as cloud, progress("reading the file"):
        found = cloud.catalogue.add(body)
    if as_json:
        show_json(found)
        return
    show(f"{found.name}  {values.size(found.size_bytes)}  sha256 {found.sha256}")
    show(f"price it  sublet models price {found.name} --input … --cached … --output …")


def price(
    name: ModelName,
    given: Annotated[str, typer.Option("--input", help="Per million input tokens, USD.")],
    cached: Annotated[str, typer.Option("--cached", help="Of those met in the cache.")],
    made: Annotated[str, typer.Option("--output", help="Per million output tokens.")],
    tier: Annotated[str, typer.Option("--tier", help="default or flex.")] = "default",
    start: Annotated[
        str | None, typer.Option("--from", help="A time, or from now such as 1d; default: now.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Set a tier's price from now (or later) on. What has begun keeps its price."""
    from sublet.base.wire import rest as shapes

    body: dict[str, Any] = {
        "tier": tier,
        "input_micros": _price(given, "--input"),
        "cached_micros": _price(cached, "--cached"),
        "output_micros": _price(made, "--output"),
    }
    if start is not None:
        body["effective_from"] = values.instant(start, "--from")
    with client() as cloud:
        found = cloud.catalogue.set_price(name, shapes.TokenPriceCreate(**body))
    if as_json:
        show_json(found)
        return
    show(f"{found.version}  {name} {found.tier} from {values.when(found.effective_from)}")


def _price(text: str, option: str) -> int:
    # Nothing may be the price, but only where it is said: not by a variable that is not set.
    return 0 if re.fullmatch(r"0+(\.0*)?", text) else values.micros(text, option)


def grant(name: ModelName, to: Everyone = "*", as_json: Json = False) -> None:
    """Let an organisation (or everyone) call a sealed model."""
    with client() as cloud:
        found = cloud.catalogue.grant(name, to)
    if as_json:
        show_json(found)
        return
    whom = "everyone" if found.organisation_id == "*" else found.organisation_id
    show(f"{whom} may call {name}")


def revoke(name: ModelName, to: Everyone = "*", as_json: Json = False) -> None:
    """Take a grant back. With the last one the model's replicas end as well."""
    with client() as cloud:
        cloud.catalogue.revoke(name, to)
        grants = list(cloud.catalogue.grants(name))
    if as_json:
        show_json(grants)
        return
    left = [found.organisation_id for found in grants]
    show(f"revoked; left: {', '.join(left) or 'none, so its replicas end'}")


def lifecycle(
    name: ModelName,
    stage: Annotated[str, typer.Argument(help="active, legacy or end_of_life.")],
    legacy_on: Annotated[str | None, typer.Option("--legacy-on", help="A date.")] = None,
    end_of_life_on: Annotated[str | None, typer.Option("--end-of-life-on", help="A date.")] = None,
    as_json: Json = False,
) -> None:
    """Say where a model stands, and announce dates: they come true by themselves."""
    from sublet.base.wire import rest as shapes

    body: dict[str, Any] = {"lifecycle": stage}
    for key, text in (("legacy_on", legacy_on), ("end_of_life_on", end_of_life_on)):
        if text is not None:
            body[key] = values.instant(text, f"--{key.replace('_', '-')}").date()
    with client() as cloud:
        version = cloud.catalogue.get(name).version
        found = cloud.catalogue.change(name, shapes.ModelPatch(**body), version=version)
    if as_json:
        show_json(found)
        return
    show(f"{name}: {_lifecycle(found)}")


# ---- deployments --------------------------------------------------------------------------------


def deploy(
    name: ModelName,
    least: Annotated[int, typer.Option("--min", min=0, help="Firm replicas: they stay.")] = 0,
    most: Annotated[
        int | None, typer.Option("--max", min=1, help="Above the minimum they are filler.")
    ] = None,
    devices: Annotated[int, typer.Option("--devices", min=1, help="A replica's.")] = 1,
    slots: Annotated[int, typer.Option("--slots", min=1, help="Requests side by side.")] = 4,
    drain: Annotated[str, typer.Option("--drain", help="How long it may take to leave.")] = "30s",
    idle: Annotated[
        str, typer.Option("--idle", help="Unused for so long: down to the minimum.")
    ] = "5m",
    pool: PoolWord = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it answers.")] = False,
    as_json: Json = False,
) -> None:
    """Serve a model on devices of a pool. It leaves for whoever pays more, and for your recall."""
    from sublet.base.wire import rest as shapes

    with client(quiet=True) as cloud:
        found = cloud.deployments.create(
            shapes.DeploymentCreate(
                model=name,
                pool_id=None if pool is None else only_pool(cloud, pool).id,
                devices=devices,
                min_replicas=least,
                max_replicas=most or max(least, 1),
                slots=slots,
                target=slots,
                drain_seconds=values.seconds(drain, "--drain"),
                idle_seconds=values.seconds(idle, "--idle"),
            )
        )
        if wait:
            found = await_ready(cloud, found)
    if as_json:
        show_json(found)
        return
    _show_deployment(found)
    show(f"call it  sublet chat {name} 'Hello'")


def await_ready(cloud: Client, found: rest.Deployment) -> rest.Deployment:
    """Until a replica answers. Raises CliError with why none started."""
    with progress(f"starting {found.model}") as shown:

        def is_ready() -> bool:
            nonlocal found
            found = cloud.deployments.get(found.id)
            if found.failure and any(r.state == "ready" for r in found.replicas) is False:
                shown.update(f"not yet: {found.failure}")
            return any(r.state == "ready" for r in found.replicas)

        poll(is_ready, every_seconds=0.2)
    return found


def list_deployments(as_json: Json = False) -> None:
    """Every deployment with its replicas."""
    with client() as cloud:
        found = list(cloud.deployments.list())
    if as_json:
        show_json(found)
        return
    table(
        ("deployment", "model", "state", ">ready", ">wanted", "min–max", ">waiting", "note"),
        [
            (
                d.id,
                d.model,
                d.state,
                sum(r.state == "ready" for r in d.replicas),
                d.wanted,
                f"{d.min_replicas}–{d.max_replicas}",
                d.waiting,
                d.failure or "",
            )
            for d in found
        ],
        empty="nothing is deployed: `sublet deploy MODEL`.",
    )


def find_deployment(cloud: Client, word: str) -> rest.Deployment:
    """By id, or by its model's name."""
    for found in cloud.deployments.list():
        if word in (found.id, found.model):
            return found
    raise CliError(f"{word} is not deployed: `sublet deployments list` shows what is.")


def show_deployment(word: DeploymentWord, as_json: Json = False) -> None:
    """One deployment, replica by replica."""
    with client() as cloud:
        found = find_deployment(cloud, word)
    if as_json:
        show_json(found)
        return
    _show_deployment(found)


def _show_deployment(found: rest.Deployment) -> None:
    facts(
        [
            ("deployment", found.id),
            ("model", found.model),
            ("state", found.state),
            ("replicas", f"{found.min_replicas}–{found.max_replicas}, now {found.wanted} wanted"),
            ("each", f"{values.devices(found.devices)}, {found.slots} requests side by side"),
            ("leaves in", values.length(found.drain_seconds)),
            ("idle after", values.length(found.idle_seconds)),
            ("waiting", found.waiting or None),
            ("last failure", found.failure),
        ]
    )
    table(
        ("replica", "state", "claim", ">in flight", "ready since", "why"),
        [
            (
                r.id,
                r.state,
                "filler" if r.is_filler else "firm",
                r.in_flight,
                values.when(r.ready_at),
                r.reason or "",
            )
            for r in found.replicas
        ],
        empty="no replica yet",
    )


def scale(
    word: DeploymentWord,
    least: Annotated[int | None, typer.Option("--min", min=0, help="Firm replicas.")] = None,
    most: Annotated[int | None, typer.Option("--max", min=1, help="Replicas at most.")] = None,
    target: Annotated[
        int | None, typer.Option("--target", min=1, help="Requests for one more replica.")
    ] = None,
    drain: Annotated[str | None, typer.Option("--drain", help="Of new replicas.")] = None,
    idle: Annotated[str | None, typer.Option("--idle", help="Until it goes down.")] = None,
    as_json: Json = False,
) -> None:
    """Change how a deployment scales."""
    from sublet.base.wire import rest as shapes

    body: dict[str, Any] = {"min_replicas": least, "max_replicas": most, "target": target}
    if drain is not None:
        body["drain_seconds"] = values.seconds(drain, "--drain")
    if idle is not None:
        body["idle_seconds"] = values.seconds(idle, "--idle")
    body = {name: value for name, value in body.items() if value is not None}
    if not body:
        raise UsageError("say what to change: --min, --max, --target, --drain or --idle.")
    with client() as cloud:
        found = find_deployment(cloud, word)
        found = cloud.deployments.change(
            found.id, shapes.DeploymentPatch(**body), version=found.version
        )
    if as_json:
        show_json(found)
        return
    _show_deployment(found)


def retire(word: DeploymentWord, yes: Yes = False, as_json: Json = False) -> None:
    """End a deployment: its replicas drain, and no request is dropped."""
    with client(quiet=True) as cloud:
        found = find_deployment(cloud, word)
        confirm(f"End {found.model} ({found.id})?", yes=yes)
        cloud.deployments.retire(found.id)
        found = cloud.deployments.get(found.id)
    if as_json:
        show_json(found)
        return
    say(f"{found.id} drains")


def gateways(as_json: Json = False) -> None:
    """How the gateways stand: what they act by, what they have in hand, what they refuse."""
    with client() as cloud:
        found = list(cloud.gateways.list())
    if as_json:
        show_json(found)
        return
    table(
        ("gateway", "state", ">snapshot", ">in flight", ">waiting", ">requests", "refused"),
        [
            (
                g.name,
                "dead" if not g.is_alive else "cut off" if g.is_cut_off else "alive",
                f"{g.snapshot} of {g.newest_snapshot}",
                g.in_flight,
                sum(g.waiting.values()),
                g.requests,
                ", ".join(f"{code} {count}" for code, count in sorted(g.refusals.items())),
            )
            for g in found
        ],
        empty="no gateway has said anything yet",
    )
    faults = [fault for g in found for fault in g.spool_faults]
    for fault in faults:
        show(f"usage of {fault.life} (since {values.when(fault.started_at)}) is not booked on:")
        show(f"  {fault.why}")
    if faults:
        show(SPOOL_FAULT_WAYS)
