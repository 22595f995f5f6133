"""The five messages as values, and their JSON."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Self, TypeVar

import orjson

PER_TOKENS = 1_000_000
"""Tokens that a price is for."""


class Malformed(ValueError):
    """Bytes that are not the message they should be."""


class Outcome(StrEnum):
    """How a request ended. Only what reached an engine has an outcome; refusals are counted."""

    OK = "ok"
    CLIENT_GONE = "client_gone"
    """The client went away: billed to the last counter received, within what was held."""
    INTERRUPTED = "interrupted"
    """The engine ended after its first byte."""
    CREDIT_EXHAUSTED = "credit_exhausted"
    """No more could be held while it ran."""
    FAILED = "failed"
    """The engine answered with an error, or not at all: nothing is billed."""
    LOST = "lost"
    """The gateway died in the middle: free to the consumer, the owner's loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Of one tier: micros per million tokens by class, under a version's name."""

    version: str
    input_micros: int
    cached_micros: int
    output_micros: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaRoute:
    """One model server. `path`: its Unix socket, absolute; else `host` and `port`."""

    id: str
    path: str = ""
    host: str = ""
    port: int = 0
    slots: int = 1
    """Requests it works on side by side; more wait in the gateway."""
    is_filler: bool = False
    """Above the deployment's minimum: where flex may run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRoute:
    """How a model is served. What a dialect may pass on travels here as data."""

    name: str
    """What clients ask for; the model server's alias is the same."""
    kind: str
    """`generate` (chat, completions, messages) or `embed`."""
    deployment_id: str
    server: str
    """The adapter: `llama.cpp` or `vllm`; names the usage normaliser."""
    context: int
    max_output: int
    """Output tokens where the request does not say, and at most."""
    quantization: str
    owned_by: str
    created_s: int
    lifecycle: str
    is_sealed: bool
    max_n: int
    splits_n: bool
    """The server under-reports `n`: the gateway asks n times and joins the answers."""
    counters: str
    """Asked of the server so that each event tells its count: `timings_per_token`,
    `continuous_usage_stats`, or empty: events are counted."""
    fields: Mapping[str, tuple[str, ...]]
    """By surface (`chat`, `completions`, `messages`, `embeddings`): request fields that are passed
    on as they are. All others are known to the dialect, or refused by name."""
    prices: Mapping[str, Price]
    """By tier: `default`, `flex`."""
    replicas: tuple[ReplicaRoute, ...] = ()
    queue_seconds: int = 30
    """How long a request may wait for a replica (scale from zero included)."""
    queue_length: int = 1000
    stops_unstreamed: bool = True
    """It ends a generation that is not streamed when its asker goes. Else it is heard out: its slot
    is not free before, and what it made is billed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScopeLimits:
    """What one key, project or organisation may do in a minute; None: no limit of its own."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPolicy:
    """What stands behind a key's digest. A key that is absent is no valid key."""

    id: str
    organisation_id: str
    project_id: str | None
    is_first_party: bool
    """The owner's own: priced, credited in full, and never out of credit."""
    expires_us: int | None
    models: tuple[str, ...] | None
    """Names allowed; None: all that are listed. Sealed models are in `grants` besides."""
    scopes: tuple[str, ...]
    """Ids in `Snapshot.limits` that bind it: its own, its project's, its organisation's."""
    refused: str | None = None
    """A code under which all its calls are refused: `standing_forbids`, `budget_exceeded`."""
    refused_why: str = ""
    resets_us: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that a gateway needs to know, whole. A newer number replaces an older one."""

    number: int
    made_us: int
    gateways: int
    """How many share the limits: each grants its share."""
    keys: Mapping[str, KeyPolicy]
    """By sha256 of the secret, hexadecimal."""
    limits: Mapping[str, ScopeLimits]
    models: Mapping[str, ModelRoute]
    first_party_free: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """The slice of a key's credit that one gateway may spend, as a running total.

    Both bound spent + held, counted from the epoch's start. They grow, but for what the gateway gave
    back itself. A message lost, repeated or late changes nothing: gateway.purse tells the rules.
    `denied` says why less was granted than wanted.
    """

    key_id: str
    epoch: int
    granted_micros: int
    granted_tokens: int | None
    """Of a tokens-a-day limit; None: there is none."""
    expires_us: int
    """Nothing new is begun on it later; what runs goes on."""
    answers: int
    """The highest serial of this key and epoch that the control plane has acted on."""
    denied: str | None = None
    """`insufficient_quota` | `budget_exceeded` | `quota_exceeded`."""
    denied_why: str = ""
    resets_us: int | None = None

    def to_json(self) -> bytes:
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises Malformed; fields of a newer version are left out."""
        return _read(cls, data)


@dataclass(frozen=True, slots=True, kw_only=True)
class AllowanceRequest:
    """A gateway asks for more of a key's credit, or gives back what it does not use.

    `wanted_micros`: how much it wants to have in hand beyond what is spent and held, at least 1.
    0: it gives back; the granted total is now spent + held. `spent_*` are running totals of the
    epoch, `held_*` present holds, both as of this message.
    """

    key_id: str
    epoch: int
    wanted_micros: int
    wanted_tokens: int
    spent_micros: int
    held_micros: int
    spent_tokens: int
    held_tokens: int
    serial: int
    """1, 2, 3 … by key and epoch, new for each message."""

    def to_json(self) -> bytes:
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises Malformed; fields of a newer version are left out."""
        return _read(cls, data)


@dataclass(frozen=True, slots=True, kw_only=True)
class UsageEvent:
    """One request as it ended: a line of the spool. Immutable; `id` is unique for ever."""

    id: str
    """The request id that the client saw."""
    key_id: str
    organisation_id: str
    project_id: str | None
    is_first_party: bool
    model: str
    deployment_id: str
    replica_id: str
    surface: str
    tier: str
    price_version: str
    outcome: str
    started_us: int
    ended_us: int
    first_us: int | None
    """When the engine's first byte came."""
    input_uncached: int
    cache_read: int
    output: int
    """Billed tokens by class."""
    made: int
    """Output tokens that the engine is known to have made: made − output is the owner's loss."""
    micros: int
    """What was taken from the allowance: each class rounded up. Billing never posts more."""
    is_inconsistent: bool = False
    """The engine's counters contradict each other: `usage_inconsistent`."""

    def to_json(self) -> bytes:
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises Malformed; fields of a newer version are left out."""
        return _read(cls, data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauge:
    """How a gateway stands, once a second; it is its acknowledgement, too."""

    gateway: str
    epoch: int
    snapshot: int
    """The number it acts by."""
    is_cut_off: bool
    in_flight: Mapping[str, int]
    """By replica."""
    waiting: Mapping[str, int]
    """By model: requests without a replica yet."""
    refusals: Mapping[str, int]
    """By code, since the epoch began."""
    requests: int
    """Begun since the epoch began."""
    spool_file: int
    spool_offset: int
    """All of the spool before it is on disk."""
    ejected: tuple[str, ...] = ()
    """Replicas that it does not reach."""

    def to_json(self) -> bytes:
        return orjson.dumps(self)

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises Malformed; fields of a newer version are left out."""
        return _read(cls, data)


_T = TypeVar("_T")


def _read(kind: type[_T], data: bytes) -> _T:
    try:
        made: _T = _make(kind, orjson.loads(data))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Malformed(f"not a {kind.__name__}: {error}") from error
    return made


@cache
def _names(kind: Any) -> frozenset[str]:
    return frozenset(field.name for field in dataclasses.fields(kind))


def _make(kind: Any, values: Any) -> Any:
    known = _names(kind)
    if values.keys() <= known:
        return kind(**values)
    return kind(**{name: value for name, value in values.items() if name in known})


def write_snapshot(snapshot: Snapshot) -> bytes:
    """A line with the digest of the rest, then JSON: a file cut short is known for one."""
    body = orjson.dumps(snapshot, option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def read_snapshot(data: bytes) -> Snapshot:
    """Raises Malformed: the gateway keeps the one that it has."""
    digest, _, body = data.partition(b"\n")
    if hashlib.sha256(body).hexdigest().encode() != digest:
        raise Malformed("the snapshot is cut short or damaged")
    try:
        raw = orjson.loads(body)
        return Snapshot(
            number=raw["number"],
            made_us=raw["made_us"],
            gateways=raw["gateways"],
            first_party_free=raw["first_party_free"],
            keys={digest: _policy(values) for digest, values in raw["keys"].items()},
            limits={scope: _make(ScopeLimits, values) for scope, values in raw["limits"].items()},
            models={name: _route(values) for name, values in raw["models"].items()},
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Malformed(f"not a Snapshot: {error}") from error


def _policy(values: dict[str, Any]) -> KeyPolicy:
    models = values["models"]
    values["models"] = None if models is None else tuple(models)
    values["scopes"] = tuple(values["scopes"])
    policy: KeyPolicy = _make(KeyPolicy, values)
    return policy


def _route(values: dict[str, Any]) -> ModelRoute:
    values["fields"] = {surface: tuple(names) for surface, names in values["fields"].items()}
    values["prices"] = {tier: _make(Price, price) for tier, price in values["prices"].items()}
    values["replicas"] = tuple(_make(ReplicaRoute, replica) for replica in values["replicas"])
    route: ModelRoute = _make(ModelRoute, values)
    return route
