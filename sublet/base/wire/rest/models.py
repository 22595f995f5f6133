"""What may be called: catalogue, prices, grants, deployments; what was called: tokens, limits."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from sublet.base.wire.rest.common import (
    GRANTEE,
    HOST_PATH,
    SHA256,
    Body,
    Identifier,
    Instant,
    Name,
    Shape,
    Whole,
    text_of_one_line,
    wrong_field,
)
from sublet.base.wire.rest.people import KeyLimits, KeyLimitsBody, ScopeKind

EVERYONE = "*"
"""In place of an organisation's id: all of them."""

Tier = Literal["default", "flex"]
Lifecycle = Literal["active", "legacy", "end_of_life"]
Access = Literal["open", "sealed"]
ModelKind = Literal["generate", "embed"]
Sha256 = Annotated[str, StringConstraints(pattern=SHA256)]
Grantee = Annotated[str, StringConstraints(pattern=GRANTEE)]
HostPath = Annotated[
    str,
    StringConstraints(max_length=4096, pattern=HOST_PATH),
    BeforeValidator(text_of_one_line),
]
OneLine = Annotated[str, StringConstraints(max_length=500), BeforeValidator(text_of_one_line)]
MicrosPerMillion = Annotated[Whole, Field(ge=0, le=10**12)]
Tokens = Annotated[Whole, Field(ge=1, le=10_000_000)]
Replicas = Annotated[Whole, Field(ge=0, le=1_000)]
FewOrMany = Annotated[Whole, Field(ge=1, le=1_000)]


# ---- the catalogue --------------------------------------------------------------------------------


class TokenPrice(Shape):
    """One version of one tier's price, by class, in micros for a million tokens. Never changed."""

    model: str
    tier: Tier
    version: str
    effective_from: Instant
    input_micros: int
    cached_micros: int
    output_micros: int


class TokenPriceCreate(Body):
    """A new version. `effective_from` left out: from now on. What has begun keeps its price."""

    tier: Tier
    input_micros: MicrosPerMillion
    cached_micros: MicrosPerMillion
    output_micros: MicrosPerMillion
    effective_from: Instant | None = None


class CatalogueModel(Shape):
    """A model, its terms, and whether it can be called and deployed now."""

    name: str
    provider: str
    access: Access
    kind: ModelKind
    licence: str
    may_be_downloaded: bool
    source: str
    sha256: str
    """Of the plaintext; empty while its weights are not here."""
    size_bytes: int
    quantization: str
    context: int
    max_output: int
    server: str
    tokens_per_device_hour: int
    """Output tokens, as measured here; 0: nobody did yet."""
    lifecycle: Lifecycle
    """As of today."""
    legacy_on: date | None
    end_of_life_on: date | None
    prices: list[TokenPrice]
    """In force now."""
    deployment_id: str | None
    """What serves it; null: it cannot be called now."""
    may_be_called: bool
    """By the caller's organisation: an open one by all, a sealed one by grant."""
    may_be_deployed: bool
    hint: str | None
    """Why it cannot be deployed, and what to do."""
    created_at: Instant
    version: int


class ModelCreate(Body):
    """Puts a file of this cloud's machine on the catalogue. It is read through once, for its digest.

    A sealed one is encrypted on the way in; the plain file stays where it was, and is the owner's
    to remove.
    """

    name: Identifier
    provider: Name
    is_third_party: bool = False
    """The weights are not the owner's own: sealed, they need attested hardware to be served."""
    access: Access = "open"
    kind: ModelKind = "generate"
    licence: Name
    licence_allows_download: bool = False
    source: OneLine = ""
    path: HostPath
    """A GGUF file."""
    sha256: Sha256 | None = None
    """What it should be; another one is refused."""
    quantization: Annotated[Name, StringConstraints(max_length=40)]
    context: Tokens
    max_output: Tokens | None = None
    """Left out: the context."""
    server: Name = "llama.cpp"
    template: OneLine = ""


class ModelPatch(Body):
    """A field left out stays as it is. Dates that are announced come true by themselves."""

    lifecycle: Lifecycle | None = None
    legacy_on: date | None = None
    end_of_life_on: date | None = None
    tokens_per_device_hour: Annotated[Whole, Field(ge=0, le=10**15)] | None = None

    @model_validator(mode="after")
    def _has_something(self) -> ModelPatch:
        for name in ("lifecycle", "tokens_per_device_hour"):
            if name in self.model_fields_set and getattr(self, name) is None:
                raise wrong_field(name, "must not be null; leave it out: as it is")
        return self


class ModelGrant(Shape):
    """Who may call a sealed model. `organisation_id` `*`: everyone."""

    model: str
    organisation_id: str
    granted_at: Instant


class ModelGrantCreate(Body):
    organisation_id: Grantee = EVERYONE


# ---- deployments ----------------------------------------------------------------------------------


class Replica(Shape):
    """One model server on devices of its own: a workload of that id."""

    id: str
    is_filler: bool
    """Above the minimum: it leaves, by drain, for whoever pays more."""
    state: Literal["starting", "ready", "draining", "gone"]
    in_flight: int
    """Requests on it, as gateways last said."""
    created_at: Instant
    ready_at: Instant | None
    draining_at: Instant | None
    gone_at: Instant | None
    reason: str | None


class Deployment(Shape):
    """A model served in a pool by between `min_replicas` and `max_replicas` replicas."""

    id: str
    model: str
    pool_id: str
    devices: int
    min_replicas: int
    max_replicas: int
    slots: int
    target: int
    drain_seconds: int
    idle_seconds: int
    state: Literal["active", "retiring", "retired"]
    wanted: int
    """Replicas, as the autoscaler last decided."""
    replicas: list[Replica]
    """Those that are not gone."""
    waiting: int
    """Requests that no replica has yet, as gateways last said."""
    failure: str | None
    """Why the last replica did not start."""
    retry_at: Instant | None
    created_at: Instant
    version: int


class DeploymentCreate(Body):
    """`pool_id` left out: the only pool. A model is deployed once."""

    model: Identifier
    pool_id: Identifier | None = None
    devices: FewOrMany = 1
    """A replica's."""
    min_replicas: Replicas = 0
    """Firm: they stay. Those above them are filler."""
    max_replicas: Annotated[Replicas, Field(ge=1)] = 1
    slots: FewOrMany = 4
    """Requests that a replica works on side by side."""
    target: FewOrMany = 4
    """Requests, running and waiting, for which one more replica is wanted."""
    drain_seconds: Annotated[Whole, Field(ge=1, le=60)] = 30
    idle_seconds: Annotated[Whole, Field(ge=1, le=7 * 86_400)] = 300
    """Without a request for so long: down to the minimum, to none if that is 0."""

    @model_validator(mode="after")
    def _in_order(self) -> DeploymentCreate:
        if self.max_replicas < self.min_replicas:
            raise wrong_field("max_replicas", "must be at least `min_replicas`")
        return self


class DeploymentPatch(Body):
    """A field left out stays as it is; it holds from the next look on."""

    min_replicas: Replicas | None = None
    max_replicas: Annotated[Replicas, Field(ge=1)] | None = None
    target: FewOrMany | None = None
    drain_seconds: Annotated[Whole, Field(ge=1, le=60)] | None = None
    """Of replicas that start from now on."""
    idle_seconds: Annotated[Whole, Field(ge=1, le=7 * 86_400)] | None = None

    @model_validator(mode="after")
    def _has_something(self) -> DeploymentPatch:
        for name in self.model_fields_set:
            if getattr(self, name) is None:
                raise wrong_field(name, "must not be null; leave it out: as it is")
        return self


# ---- what gateways and their callers do -----------------------------------------------------------


class SpoolFault(Shape):
    """A life of a gateway whose usage is not booked any further. What it held stays held until the
    fault is mended, or its folder is taken away while the cloud is closed."""

    life: str
    """Its folder below `gateway/` in the data folder."""
    started_at: Instant
    why: str


class Gateway(Shape):
    """How a gateway stands, as it last said of itself."""

    name: str
    started_at: Instant
    is_alive: bool
    is_cut_off: bool
    """It has not heard from the control plane for long, and lives on what it was allowed."""
    snapshot: int
    """The number that it acts by; `newest_snapshot` is the last that was published."""
    newest_snapshot: int
    requests: int
    """Begun since it started."""
    in_flight: int
    waiting: dict[str, int]
    """By model: requests that no replica has yet."""
    refusals: dict[str, int]
    """By code, since it started."""
    ejected: list[str]
    """Replicas that it does not reach."""
    spool_faults: list[SpoolFault]
    """Of this life and of earlier ones; none: all its usage is booked."""
    at: Instant


UsageOrder = Literal["oldest", "newest"]
"""Which records come first: by when they were recorded."""


class TokenUsage(Shape):
    """One request as it ended. One that `corrects` another holds differences to it."""

    id: str
    """The request id that its caller saw."""
    organisation_id: str
    project_id: str | None
    key_id: str
    model: str
    deployment_id: str
    surface: str
    tier: str
    price_version: str
    outcome: str
    started_at: Instant
    ended_at: Instant
    first_byte_at: Instant | None
    input_uncached: int
    cache_read: int
    output: int
    corrects: str | None


class ScopeLimits(KeyLimits):
    """What a scope may use at most; null: no limit of its own. Those of key, project and
    organisation bind together; `max_devices` is of keys only."""

    scope_kind: ScopeKind
    scope_id: str


class LimitsPut(KeyLimitsBody):
    """Replaces what was set; a field left out, or null, is no limit."""
