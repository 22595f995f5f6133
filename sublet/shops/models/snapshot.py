"""What gateways are to know, composed from the books: keys, limits, models, replicas."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime

from sqlalchemy import Connection

from sublet.base.kernel.interval import micros_since_epoch
from sublet.base.wire.gateway import (
    KeyPolicy,
    ModelRoute,
    Price,
    ReplicaRoute,
    ScopeLimits,
    Snapshot,
)
from sublet.records import tenancy
from sublet.records.tenancy import Action, Standing, ValidKey
from sublet.shops.models import service, store
from sublet.shops.models.model import (
    EVERYONE,
    TIERS,
    CatalogueChanged,
    Deployment,
    DeploymentState,
    Lifecycle,
    Model,
    Replica,
    ReplicaState,
    TierPrice,
)
from sublet.shops.models.servers import SERVERS

REQUESTS_PER_MINUTE = 6_000
TOKENS_PER_MINUTE = 6_000_000
"""Of an organisation that has no limits of its own: so every answer can say what is left."""
MAX_N = 8


STALING = (
    tenancy.KeyChanged,
    tenancy.LimitsChanged,
    tenancy.StandingChanged,
    CatalogueChanged,
)
"""What changes the part of a snapshot that says who may call what."""


def compose(tx: Connection, *, number: int, now: datetime, gateways: int) -> Snapshot:
    """The whole truth for gateways at this moment. `gateways` share the limits."""
    return Composer().compose(tx, number=number, now=now, gateways=gateways)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Callers:
    """Who may call what, and what it was made of."""

    seen: int
    """The last event that could have changed it."""
    sealed: frozenset[str]
    open: frozenset[str]
    until: datetime | None
    """Then a key expires."""
    keys: dict[str, KeyPolicy]
    limits: dict[str, ScopeLimits]

    def holds(self, seen: int, routes: dict[str, ModelRoute], now: datetime) -> bool:
        return (self.seen, self.sealed, self.open) == (seen, *_names(routes)) and (
            self.until is None or now < self.until
        )


class Composer:
    """Composes one database's snapshots again and again: what is said of keys is made anew only
    when something of them has changed. With 10,000 keys that is nearly all of the time it takes."""

    def __init__(self) -> None:
        self._callers: _Callers | None = None

    def compose(self, tx: Connection, *, number: int, now: datetime, gateways: int) -> Snapshot:
        """As the function of that name does."""
        routes = _routes(tx, now)
        seen = store.last_event(tx, STALING)
        callers = self._callers
        if callers is None or not callers.holds(seen, routes, now):
            self._callers = callers = _callers(tx, seen, routes, now)
        return Snapshot(
            number=number,
            made_us=micros_since_epoch(now),
            gateways=max(gateways, 1),
            keys=callers.keys,
            limits=callers.limits,
            models=routes,
        )


def _names(routes: dict[str, ModelRoute]) -> tuple[frozenset[str], frozenset[str]]:
    sealed = frozenset(name for name, route in routes.items() if route.is_sealed)
    return sealed, frozenset(routes) - sealed


def _callers(tx: Connection, seen: int, routes: dict[str, ModelRoute], now: datetime) -> _Callers:
    valid = tenancy.list_valid_keys(tx, now)
    sealed, unsealed = _names(routes)
    return _Callers(
        seen=seen,
        sealed=sealed,
        open=unsealed,
        until=min((k.expires_at for k in valid if k.expires_at is not None), default=None),
        keys=_policies(tx, valid, routes),
        limits=_limits(tx, valid),
    )


def _limits(tx: Connection, valid: list[ValidKey]) -> dict[str, ScopeLimits]:
    found = {
        key.organisation_id: ScopeLimits(
            requests_per_minute=REQUESTS_PER_MINUTE, tokens_per_minute=TOKENS_PER_MINUTE
        )
        for key in valid
    }
    scopes = set(found) | {key.project_id for key in valid if key.project_id}
    for scope in tenancy.list_limits(tx, sorted(scopes)):
        before = found.get(scope.scope_id, ScopeLimits())
        limits = scope.limits
        found[scope.scope_id] = ScopeLimits(
            requests_per_minute=limits.requests_per_minute or before.requests_per_minute,
            tokens_per_minute=limits.tokens_per_minute or before.tokens_per_minute,
        )
    for key in valid:
        if key.limits.requests_per_minute or key.limits.tokens_per_minute:
            found[key.key_id] = ScopeLimits(
                requests_per_minute=key.limits.requests_per_minute,
                tokens_per_minute=key.limits.tokens_per_minute,
            )
    return found


def _policies(
    tx: Connection, valid: list[ValidKey], routes: dict[str, ModelRoute]
) -> dict[str, KeyPolicy]:
    sealed = {name for name, route in routes.items() if route.is_sealed}
    callers: dict[str, set[str]] = {name: set() for name in sealed}
    for grant in store.list_grants(tx):
        if grant.model in callers:
            callers[grant.model].add(grant.organisation_id)
    by_scope = {
        scope.scope_id: scope.limits.models
        for scope in tenancy.list_limits(
            tx, sorted({k.organisation_id for k in valid} | {k.project_id or "" for k in valid})
        )
    }
    policies = {}
    for key in valid:
        denied = {
            name
            for name in sealed
            if not key.is_first_party and not callers[name] & {key.organisation_id, EVERYONE}
        }
        allowed = _allowed(key, by_scope, routes, denied)
        refused, why = _standing(key)
        scopes = (key.key_id, key.project_id, key.organisation_id)
        policies[key.digest] = KeyPolicy(
            id=key.key_id,
            organisation_id=key.organisation_id,
            project_id=key.project_id,
            is_first_party=key.is_first_party,
            expires_us=None if key.expires_at is None else micros_since_epoch(key.expires_at),
            models=allowed,
            scopes=tuple(scope for scope in scopes if scope),
            refused=refused,
            refused_why=why,
        )
    return policies


def _allowed(
    key: ValidKey,
    by_scope: dict[str, tuple[str, ...] | None],
    routes: dict[str, ModelRoute],
    denied: set[str],
) -> tuple[str, ...] | None:
    """The names that it may call: what its own list, its project's and its organisation's share."""
    lists = [
        key.limits.models,
        by_scope.get(key.project_id or ""),
        by_scope.get(key.organisation_id),
    ]
    bound = [set(names) for names in lists if names is not None]
    if not bound and not denied:
        return None
    allowed = set(routes) - denied
    for names in bound:
        allowed &= names
    return tuple(sorted(allowed))


def _standing(key: ValidKey) -> tuple[str | None, str]:
    if key.standing in (Standing.SUSPENDED, Standing.CLOSING):
        return (
            "standing_forbids",
            f"The organisation is {key.standing}: settle what is open with the owner.",
        )
    if not tenancy.may(
        key.organisation_kind, key.standing, key.role, key.project_id, Action.CALL_MODELS
    ):
        return "standing_forbids", f"A {key.role}'s key may not call models: use another one."
    return None, ""


def _routes(tx: Connection, now: datetime) -> dict[str, ModelRoute]:
    models = {model.name: model for model in store.list_models(tx)}
    prices = store.prices_in_force(tx, now)
    ready: dict[str, list[Replica]] = {}
    for replica in store.list_replicas(tx, states=[ReplicaState.READY]):
        ready.setdefault(replica.deployment_id, []).append(replica)
    routes = {}
    for deployment in store.list_deployments(tx):
        if deployment.state is not DeploymentState.ACTIVE:
            continue  # No call begins any more; those that run end where they are.
        model = models[deployment.model]
        route = _route(model, deployment, ready.get(deployment.id, []), prices, now.date())
        if route is not None:
            routes[model.name] = route
    return routes


def _route(
    model: Model,
    deployment: Deployment,
    replicas: list[Replica],
    prices: dict[tuple[str, str], TierPrice],
    today: date,
) -> ModelRoute | None:
    """None: it is not for sale, for want of a price or since it has ended."""
    stage = service.stage_on(model, today)
    tiers: dict[str, Price] = {
        tier: service.as_wire(prices[model.name, tier])
        for tier in TIERS
        if (model.name, tier) in prices
    }
    if stage is Lifecycle.END_OF_LIFE or "default" not in tiers:
        return None
    server = SERVERS[model.server]
    hidden = server.revealing if model.is_sealed else frozenset()
    return ModelRoute(
        name=model.name,
        kind=model.kind,
        deployment_id=deployment.id,
        server=server.normaliser,
        context=model.context,
        max_output=model.max_output,
        quantization=model.quantization,
        owned_by=model.provider,
        created_s=micros_since_epoch(model.created_at) // 1_000_000,
        lifecycle=stage,
        is_sealed=model.is_sealed,
        max_n=MAX_N,
        splits_n=server.splits_n,
        stops_unstreamed=server.stops_unstreamed,
        counters=server.counters,
        fields={
            surface: tuple(name for name in names if name not in hidden)
            for surface, names in server.fields.items()
        },
        prices=tiers,
        replicas=tuple(
            ReplicaRoute(
                id=replica.id,
                path=replica.door,
                slots=deployment.slots,
                is_filler=replica.is_filler,
            )
            for replica in replicas
        ),
    )
