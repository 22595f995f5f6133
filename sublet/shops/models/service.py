"""What others call: the catalogue, its prices and grants, deployments, and what gateways say."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from datetime import date, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from sublet.base.kernel.errors import Conflict, Invalid, Stale
from sublet.base.store import Work
from sublet.base.wire import gateway as wire
from sublet.capacity import fleet
from sublet.records import tenancy
from sublet.records.tenancy import Action, Identity
from sublet.shops.models import store
from sublet.shops.models.model import (
    EVERYONE,
    TIERS,
    Access,
    CatalogueChanged,
    Deployment,
    DeploymentExists,
    DeploymentState,
    Grant,
    GrantNotFound,
    LicenceForbids,
    Lifecycle,
    Model,
    ModelEnded,
    ModelExists,
    ModelInvalid,
    NewModel,
    TierPrice,
    WeightsChanged,
    WeightsMissing,
    WeightsSealed,
)
from sublet.shops.models.servers import SERVERS

DRAIN_SECONDS = (1, 60)
MOST_REPLICAS = 1000
SNAPSHOTS_KEPT = 200
_HASH_BYTES = 1 << 20


# ---- the catalogue ------------------------------------------------------------------------------


def add_model(work: Work, new: NewModel) -> Model:
    """Put a model on the catalogue. Raises ModelExists, ModelInvalid naming the field."""
    check(new)
    if store.find_model(work.tx, new.name) is not None:
        raise ModelExists(f"{new.name} is on the catalogue already.")
    store.insert_model(
        work.tx,
        {
            "name": new.name,
            "provider": new.provider,
            "is_third_party": new.is_third_party,
            "access": new.access,
            "kind": new.kind,
            "licence": new.licence,
            "licence_allows_download": new.licence_allows_download,
            "source": new.source,
            "path": new.path,
            "sha256": new.sha256,
            "size_bytes": new.size_bytes,
            "quantization": new.quantization,
            "context": new.context,
            "max_output": new.max_output,
            "server": new.server,
            "template": new.template,
            "tokens_per_device_hour": 0,
            "lifecycle": Lifecycle.ACTIVE,
            "legacy_on": None,
            "end_of_life_on": None,
            "created_at": work.now,
            "version": 1,
        },
    )
    work.emit(CatalogueChanged(new.name))
    return store.get_model(work.tx, new.name)


def check(new: NewModel) -> None:
    """Raises ModelInvalid naming the field."""
    name = new.name
    if not name or len(name) > 200 or not all(c.isalnum() or c in "-_./:" for c in name):
        raise ModelInvalid("`name` is of letters, digits and -_./: only.", param="name")
    if new.server not in SERVERS:
        raise ModelInvalid(f"`server` is one of {', '.join(SERVERS)}.", param="server")
    if new.access is Access.SEALED and not SERVERS[new.server].takes_sealed:
        raise ModelInvalid(f"{new.server} cannot serve sealed weights.", param="server")
    if new.access is Access.SEALED and new.kind == "embed":
        raise ModelInvalid("A sealed model generates: embeddings tell too much.", param="kind")
    if new.context < 16 or not 0 < new.max_output <= new.context:
        raise ModelInvalid("`context` is at least 16, `max_output` within it.", param="context")


def place_weights(work: Work, name: str, *, path: str, sha256: str, size_bytes: int) -> Model:
    """Where the model's file is now, and which it is."""
    model = store.get_model(work.tx, name)
    work.emit(CatalogueChanged(name))
    return store.update_model(work.tx, model, path=path, sha256=sha256, size_bytes=size_bytes)


def set_lifecycle(
    work: Work,
    name: str,
    lifecycle: Lifecycle,
    *,
    legacy_on: date | None = None,
    end_of_life_on: date | None = None,
) -> Model:
    """Where the model stands, with the dates that are announced. At its end it is served no more."""
    model = store.get_model(work.tx, name)
    if legacy_on and end_of_life_on and end_of_life_on < legacy_on:
        raise Invalid("A model is legacy before its end of life.", param="end_of_life_on")
    work.emit(CatalogueChanged(name))
    return store.update_model(
        work.tx, model, lifecycle=lifecycle, legacy_on=legacy_on, end_of_life_on=end_of_life_on
    )


def note_throughput(work: Work, name: str, tokens_per_device_hour: int) -> Model:
    """Output tokens that a device makes in an hour, as measured here: what prices come from."""
    if tokens_per_device_hour < 0:
        raise Invalid("A throughput is not negative.", param="tokens_per_device_hour")
    model = store.get_model(work.tx, name)
    return store.update_model(work.tx, model, tokens_per_device_hour=tokens_per_device_hour)


def get_model(tx: Connection, name: str) -> Model:
    return store.get_model(tx, name)


def list_models(tx: Connection, *, after: int | None = None, limit: int = 1000) -> list[Model]:
    return store.list_models(tx, after, limit)


def stage_on(model: Model, day: date) -> Lifecycle:
    """Where it stands on a day: announced dates come true by themselves."""
    if model.lifecycle is Lifecycle.END_OF_LIFE or (
        model.end_of_life_on is not None and day >= model.end_of_life_on
    ):
        return Lifecycle.END_OF_LIFE
    if model.legacy_on is not None and day >= model.legacy_on:
        return Lifecycle.LEGACY
    return model.lifecycle


def open_weights(tx: Connection, name: str) -> Path:
    """The file of a model that may be passed on. Raises WeightsSealed, LicenceForbids,
    WeightsMissing, WeightsChanged."""
    model = store.get_model(tx, name)
    if model.is_sealed:
        raise WeightsSealed(f"The weights of {name} are sealed: call it through the gateway.")
    if not model.licence_allows_download:
        raise LicenceForbids(f"{model.licence} does not allow to pass {name} on.")
    path = Path(model.path)
    if not are_here(model):
        raise WeightsMissing(f"The weights of {name} are not on this machine: `make setup`.")
    if path.stat().st_size != model.size_bytes:
        raise WeightsChanged(f"The file of {name} is not the one that was added.")
    return path


def are_here(model: Model) -> bool:
    """Its weights lie where they should."""
    return bool(model.path) and Path(model.path).is_file()


def why_not_deployable(model: Model, day: date) -> str | None:
    """In a sentence, with what to do; None: it can be deployed."""
    if stage_on(model, day) is Lifecycle.END_OF_LIFE:
        return "It has come to its end of life: deploy another one."
    if not are_here(model):
        return "Its weights are not on this machine: `make setup` brings those that come along."
    return None


def digest(path: Path) -> tuple[str, int]:
    """sha256 and size of a file. Slow: outside a Work."""
    found, size = hashlib.sha256(), 0
    with path.open("rb") as source:
        while block := source.read(_HASH_BYTES):
            found.update(block)
            size += len(block)
    return found.hexdigest(), size


# ---- prices -------------------------------------------------------------------------------------


def set_price(
    work: Work,
    name: str,
    *,
    tier: str,
    input_micros: int,
    cached_micros: int,
    output_micros: int,
    effective_from: datetime | None = None,
) -> TierPrice:
    """A new version of a tier's price, in micros per million tokens. Old ones stay: what began
    under them is rated by them. Raises Invalid."""
    store.get_model(work.tx, name)
    if tier not in TIERS:
        raise Invalid(f"`tier` is one of {', '.join(TIERS)}.", param="tier")
    if not 0 <= cached_micros <= input_micros or output_micros < 0:
        raise Invalid(
            "Prices are not negative, and cached input costs no more than other input.",
            param="cached_micros",
        )
    start = effective_from or work.now
    if start < work.now:
        raise Invalid("A price holds from now on or later.", param="effective_from")
    version = work.ids.new("tpr")
    store.insert_price(
        work.tx,
        {
            "model": name,
            "tier": tier,
            "version": version,
            "effective_from": start,
            "input_micros": input_micros,
            "cached_micros": cached_micros,
            "output_micros": output_micros,
        },
    )
    work.emit(CatalogueChanged(name))
    found = store.find_price(work.tx, version)
    assert found is not None
    return found


def price_of(tx: Connection, version: str) -> wire.Price:
    """The price of a version, for rating. A version that is not there is a LookupError."""
    found = store.find_price(tx, version)
    if found is None:
        raise LookupError(f"no price version {version}")
    return as_wire(found)


def as_wire(price: TierPrice) -> wire.Price:
    return wire.Price(
        version=price.version,
        input_micros=price.input_micros,
        cached_micros=price.cached_micros,
        output_micros=price.output_micros,
    )


def list_prices(tx: Connection, name: str) -> list[TierPrice]:
    return store.list_prices(tx, name)


def prices_in_force(tx: Connection, now: datetime) -> dict[tuple[str, str], TierPrice]:
    """By model and tier."""
    return store.prices_in_force(tx, now)


# ---- grants -------------------------------------------------------------------------------------


def grant(work: Work, name: str, organisation_id: str = EVERYONE) -> Grant:
    """Let an organisation (or everyone) call a sealed model. Twice is once."""
    model = store.get_model(work.tx, name)
    if not model.is_sealed:
        raise Invalid(f"{name} is open: everyone may call it.", param="model")
    if organisation_id != EVERYONE:
        tenancy.get_organisation(work.tx, organisation_id)
    known = [g for g in store.list_grants(work.tx, name) if g.organisation_id == organisation_id]
    if not known:
        store.insert_grant(work.tx, name, organisation_id, work.now)
        work.emit(CatalogueChanged(name))
        known = [
            g for g in store.list_grants(work.tx, name) if g.organisation_id == organisation_id
        ]
    return known[0]


def revoke_grant(work: Work, name: str, organisation_id: str = EVERYONE) -> None:
    """Calls are refused from the next snapshot on; with the last grant its replicas end as well."""
    for found in store.list_grants(work.tx, name):
        if found.organisation_id == organisation_id:
            store.end_grant(work.tx, found.seq, work.now)
            work.emit(CatalogueChanged(name))
            return
    raise GrantNotFound(f"{organisation_id} has no grant on {name}.")


def list_grants(tx: Connection, name: str | None = None) -> list[Grant]:
    """Those in force, of one model or of all."""
    return store.list_grants(tx, name)


def is_granted(tx: Connection, name: str) -> bool:
    """Somebody may call it: only then a sealed model is served at all."""
    return bool(store.list_grants(tx, name))


# ---- deployments --------------------------------------------------------------------------------


def deploy(
    work: Work,
    identity: Identity,
    *,
    model: str,
    pool_id: str | None = None,
    devices: int = 1,
    min_replicas: int = 0,
    max_replicas: int = 1,
    slots: int = 4,
    target: int = 4,
    drain_seconds: int = 30,
    idle_seconds: int = 300,
) -> Deployment:
    """Serve a model. The autoscaler starts its replicas: at once those of the minimum and, above
    it, one to begin with. Raises DeploymentExists, ModelEnded, WeightsMissing, Invalid."""
    tenancy.require(identity, Action.DEPLOY)
    found = store.get_model(work.tx, model)
    if stage_on(found, work.now.date()) is Lifecycle.END_OF_LIFE:
        raise ModelEnded(f"{model} has come to its end of life: deploy another one.")
    if not are_here(found):
        raise WeightsMissing(f"The weights of {model} are not on this machine: `make setup`.")
    if any(d.model == model for d in store.list_deployments(work.tx)):
        raise DeploymentExists(f"{model} is deployed already: `sublet deployments` shows it.")
    pool = _pool(work.tx, pool_id)
    values = {
        "devices": devices,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "slots": slots,
        "target": target,
        "drain_seconds": drain_seconds,
        "idle_seconds": idle_seconds,
    }
    _check_scale(values)
    deployment_id = work.ids.new("dep")
    store.insert_deployment(
        work.tx,
        {
            "id": deployment_id,
            "model": model,
            "pool_id": pool,
            **values,
            "state": DeploymentState.ACTIVE,
            "wanted": min(max(min_replicas, 1), max_replicas),
            "lower_since": None,
            "last_asked_at": work.now,
            "failure": None,
            "failures": 0,
            "retry_at": None,
            "created_at": work.now,
            "version": 1,
        },
    )
    work.emit(CatalogueChanged(model))
    return store.get_deployment(work.tx, deployment_id)


SCALES = ("min_replicas", "max_replicas", "target", "drain_seconds", "idle_seconds")


def scale(
    work: Work, identity: Identity, deployment_id: str, *, version: int, **changes: int
) -> Deployment:
    """Change how a deployment scales. Raises Stale where `version` is not the present one."""
    tenancy.require(identity, Action.DEPLOY)
    deployment = store.get_deployment(work.tx, deployment_id)
    if deployment.version != version:
        raise Stale(version=deployment.version)
    unknown = [name for name in changes if name not in SCALES]
    if unknown:
        raise Invalid(f"{unknown[0]} cannot be changed: deploy anew.", param=unknown[0])
    values = {name: getattr(deployment, name) for name in (*SCALES, "devices", "slots")} | changes
    _check_scale(values)
    return store.update_deployment(
        work.tx, deployment, **changes, failure=None, failures=0, retry_at=None
    )


def retire(work: Work, identity: Identity, deployment_id: str) -> Deployment:
    """Let its replicas drain, and end it. Twice is once."""
    tenancy.require(identity, Action.DEPLOY)
    deployment = store.get_deployment(work.tx, deployment_id)
    if deployment.state is not DeploymentState.ACTIVE:
        return deployment
    work.emit(CatalogueChanged(deployment.model))
    return store.update_deployment(work.tx, deployment, state=DeploymentState.RETIRING)


def _pool(tx: Connection, pool_id: str | None) -> str:
    if pool_id is not None:
        return fleet.get_pool(tx, pool_id).id
    pools = fleet.list_pools(tx)
    if len(pools) != 1:
        raise Invalid("There are several pools: name one.", param="pool_id")
    return pools[0].id


def _check_scale(values: dict[str, Any]) -> None:
    least, most = values["min_replicas"], values["max_replicas"]
    if not 0 <= least <= most <= MOST_REPLICAS or most < 1:
        raise Invalid(
            f"Replicas are 0 ≤ min ≤ max ≤ {MOST_REPLICAS}, and max at least 1.",
            param="max_replicas",
        )
    low, high = DRAIN_SECONDS
    if not low <= values["drain_seconds"] <= high:
        raise Invalid(f"`drain_seconds` is {low} to {high}.", param="drain_seconds")
    for name in ("devices", "slots", "target", "idle_seconds"):
        if values[name] < 1:
            raise Invalid(f"`{name}` is a whole number from 1.", param=name)


# ---- what gateways say --------------------------------------------------------------------------


def keep_gauge(work: Work, gauge: wire.Gauge) -> None:
    """How a gateway stands: it is alive, and holds that snapshot."""
    store.keep_gauge(
        work.tx,
        {
            "gateway": gauge.gateway,
            "epoch": gauge.epoch,
            "snapshot": gauge.snapshot,
            "is_alive": True,
            "is_cut_off": gauge.is_cut_off,
            "in_flight": dict(gauge.in_flight),
            "waiting": dict(gauge.waiting),
            "refusals": dict(gauge.refusals),
            "requests": gauge.requests,
            "ejected": list(gauge.ejected),
            "at": work.now,
        },
    )


def set_gateways(work: Work, alive: Iterable[str]) -> None:
    """Those that live; the others are dead, so nobody waits for what they hold."""
    store.set_alive(work.tx, alive)


def keep_snapshot(work: Work, snapshot: wire.Snapshot) -> None:
    """This one is about to be published: what it names is known by its number.

    Raises Conflict where it names a replica that has begun to leave since it was composed: no
    gateway may be told of it after that. Compose it anew.
    """
    names = sorted(r.id for model in snapshot.models.values() for r in model.replicas)
    left = store.not_ready(work.tx, names)
    if left:
        raise Conflict(f"{', '.join(left)} has left since snapshot {snapshot.number} was composed.")
    store.keep_snapshot(work.tx, snapshot.number, names, work.now, SNAPSHOTS_KEPT)


def last_snapshot(tx: Connection) -> int:
    """The highest number that was ever published; 0: none."""
    return store.last_snapshot(tx)


def is_dropped(tx: Connection, replica_id: str) -> bool:
    """Every gateway that lives acts by a snapshot later than the last that names the replica, so
    that none sends to it, now or later. For one that is draining: it is named in no new one."""
    # What one older than the oldest that is still known names, is not known any more.
    least = max(store.last_naming(tx, replica_id) + 1, store.oldest_snapshot(tx))
    return all(gateway.snapshot >= least for gateway in store.list_gateways(tx) if gateway.is_alive)


def in_flight(tx: Connection, replica_id: str) -> int:
    """Requests that gateways which live have on it, as they last said."""
    return sum(
        gateway.in_flight.get(replica_id, 0)
        for gateway in store.list_gateways(tx)
        if gateway.is_alive
    )
