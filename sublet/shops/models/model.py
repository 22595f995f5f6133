"""The values of the models shop, its events and its errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime
from enum import StrEnum
from typing import ClassVar, Literal

from sublet.base.kernel.errors import Conflict, Forbidden, Invalid, NotFound
from sublet.base.kernel.interval import from_micros
from sublet.base.store import Event

Tier = Literal["default", "flex"]
TIERS: tuple[Tier, ...] = ("default", "flex")
EVERYONE = "*"
"""The organisation of a grant that is for all."""
ModelKind = Literal["generate", "embed"]


class Access(StrEnum):
    OPEN = "open"
    """Its weights may be deployed, and downloaded where the licence allows."""
    SEALED = "sealed"
    """Its weights exist in the clear only in a serving process; calls need a grant."""


class Lifecycle(StrEnum):
    ACTIVE = "active"
    LEGACY = "legacy"
    """Still served, and answers say so; no reason to begin with it."""
    END_OF_LIFE = "end_of_life"
    """Served no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model of the catalogue."""

    seq: int
    name: str
    """What clients ask for; unique, for ever."""
    provider: str
    is_third_party: bool
    """The weights are not the owner's own: sealed, they need an attestation verifier."""
    access: Access
    kind: ModelKind
    licence: str
    licence_allows_download: bool
    source: str
    """Where the weights come from, for people."""
    path: str
    """The file on this machine: plaintext of an open model, ciphertext of a sealed one; empty while
    it is not here."""
    sha256: str
    """Of the plaintext."""
    size_bytes: int
    quantization: str
    context: int
    max_output: int
    server: str
    template: str
    """A chat template of ours, by name; empty: the model's own."""
    tokens_per_device_hour: int
    """Output tokens, as `sublet bench` measured them here; 0: nobody did yet."""
    lifecycle: Lifecycle
    legacy_on: date | None
    end_of_life_on: date | None
    created_at: datetime
    version: int

    @property
    def is_sealed(self) -> bool:
        return self.access is Access.SEALED


@dataclass(frozen=True, slots=True, kw_only=True)
class NewModel:
    """What it takes to put a model on the catalogue."""

    name: str
    provider: str
    is_third_party: bool = False
    access: Access = Access.OPEN
    kind: ModelKind = "generate"
    licence: str
    licence_allows_download: bool = False
    source: str = ""
    path: str
    sha256: str
    size_bytes: int
    quantization: str
    context: int
    max_output: int
    server: str = "llama.cpp"
    template: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPrice:
    """Of a model's tier from an instant on, in micros per million tokens. Never changed."""

    seq: int
    model: str
    tier: Tier
    version: str
    effective_from: datetime
    input_micros: int
    cached_micros: int
    output_micros: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Who may call a sealed model. `organisation_id` EVERYONE: all."""

    seq: int
    model: str
    organisation_id: str
    granted_at: datetime
    revoked_at: datetime | None


class DeploymentState(StrEnum):
    ACTIVE = "active"
    RETIRING = "retiring"
    """Its replicas drain; then it is gone."""
    RETIRED = "retired"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A model served in a pool by between `min_replicas` and `max_replicas` replicas.

    The first `min_replicas` are firm claims, those above them filler: they take idle devices, and
    leave by drain for whoever pays more.
    """

    seq: int
    id: str
    model: str
    pool_id: str
    devices: int
    """A replica's."""
    min_replicas: int
    max_replicas: int
    slots: int
    """Requests that a replica works on side by side."""
    target: int
    """Requests, running and waiting, for which one more replica is wanted."""
    drain_seconds: int
    idle_seconds: int
    """Without a request for so long it goes down to `min_replicas`, to none if that is 0."""
    state: DeploymentState
    wanted: int
    """Replicas, as the autoscaler last decided."""
    lower_since: datetime | None
    """Since when fewer would do."""
    last_asked_at: datetime
    failure: str | None
    """Why the last replica did not start."""
    failures: int
    retry_at: datetime | None
    created_at: datetime
    version: int


class ReplicaState(StrEnum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    GONE = "gone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replica:
    """One model server of a deployment: a workload of that id in compute."""

    id: str
    deployment_id: str
    model: str
    is_filler: bool
    state: ReplicaState
    door: str
    """The host's path of its socket, once it is known."""
    has_key: bool
    """A sealed one was given its data key."""
    created_at: datetime
    ready_at: datetime | None
    draining_at: datetime | None
    gone_at: datetime | None
    reason: str | None
    """Why it drains or is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayStanding:
    """What a gateway last said of itself."""

    gateway: str
    epoch: int
    snapshot: int
    is_alive: bool
    is_cut_off: bool
    in_flight: Mapping[str, int]
    waiting: Mapping[str, int]
    refusals: Mapping[str, int]
    requests: int
    ejected: tuple[str, ...]
    at: datetime

    @classmethod
    def silent(cls, gateway: str, epoch: int) -> GatewayStanding:
        """One that has died without a word, as far as is known."""
        return cls(
            gateway=gateway,
            epoch=epoch,
            snapshot=0,
            is_alive=False,
            is_cut_off=True,
            in_flight={},
            waiting={},
            refusals={},
            requests=0,
            ejected=(),
            at=from_micros(epoch),
        )


@dataclass(frozen=True, slots=True)
class CatalogueChanged(Event):
    """What may be called, by whom or for how much is another: snapshots are stale."""

    kind: ClassVar[str] = "models.catalogue_changed"

    model: str


@dataclass(frozen=True, slots=True)
class ReplicaChanged(Event):
    """A replica serves now, or does no more: snapshots are stale."""

    kind: ClassVar[str] = "models.replica_changed"

    replica_id: str
    deployment_id: str
    state: str


class ModelNotFound(NotFound):
    """There is no such model: `sublet models` lists them."""

    code = "model_not_found"


class ModelExists(Conflict):
    """A model of that name is on the catalogue already: names are never used again."""

    code = "model_exists"


class ModelInvalid(Invalid):
    """This cannot be put on the catalogue: `param` names the field."""

    code = "model_invalid"


class WeightsMissing(Conflict):
    """The model's weights are not on this machine: `make setup` fetches those that come along."""

    code = "weights_missing"


class WeightsChanged(Conflict):
    """The model's file is not the one that was added (its sha256 differs): put it back, or add it anew."""

    code = "weights_changed"


class WeightsSealed(Forbidden):
    """The weights of a sealed model are not for download: call it through the gateway."""

    code = "weights_sealed"


class LicenceForbids(Forbidden):
    """The model's licence does not allow its weights to be passed on: call it through the gateway."""

    code = "licence_forbids"


class ModelEnded(Conflict):
    """This model has come to its end of life: deploy another one."""

    code = "model_ended"


class DeploymentNotFound(NotFound):
    """There is no such deployment: `sublet deployments` lists them."""

    code = "deployment_not_found"


class DeploymentExists(Conflict):
    """This model is deployed already: change that deployment."""

    code = "deployment_exists"


class GrantNotFound(NotFound):
    """There is no such grant in force."""

    code = "grant_not_found"
