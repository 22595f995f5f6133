"""A Snapshot made ready for look-up. Replaced whole; what has a life of its own lives on.

Purses live by key, buckets by scope, models by name and replicas by id: a new snapshot changes what
it says of them, never what they hold.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable
from typing import Any

from sublet.base.wire.gateway import (
    Allowance,
    AllowanceRequest,
    KeyPolicy,
    ModelRoute,
    ReplicaRoute,
    Snapshot,
)
from sublet.gateway.limits import Bucket
from sublet.gateway.purse import Purse

WHOLE = b"content-type: application/json\r\ncontent-length: "
STREAM = b"content-type: text/event-stream\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
SECRETS_KEPT = 4096
"""Secrets of valid keys whose digest is known."""


class Known:
    """Who a key is, and what binds it. `payer`: how its usage events name it."""

    __slots__ = (
        "key_id", "models", "organisation_id", "payer", "policy", "project_id", "purse",
        "request_buckets", "token_buckets",
    )  # fmt: skip

    def __init__(
        self,
        policy: KeyPolicy,
        purse: Purse,
        request_buckets: tuple[Bucket, ...],
        token_buckets: tuple[Bucket, ...],
    ) -> None:
        self.policy = policy
        self.purse = purse
        self.key_id = policy.id
        self.organisation_id = policy.organisation_id
        self.project_id = policy.project_id
        self.models = None if policy.models is None else frozenset(policy.models)
        self.request_buckets = request_buckets
        self.token_buckets = token_buckets
        self.payer = {
            "key_id": policy.id,
            "organisation_id": policy.organisation_id,
            "project_id": policy.project_id,
            "is_first_party": policy.is_first_party,
        }


class Model:
    """One model and the requests that wait for a replica of it."""

    __slots__ = ("first_bytes", "first_us", "heads", "name", "replicas", "route", "waiting")

    def __init__(self, route: ModelRoute) -> None:
        self.name = route.name
        self.waiting: deque[Any] = deque()
        self.first_bytes = [0] * 64
        """Requests by the time to their first byte: at k, less than 2^k ms and not less than half."""
        self.first_us = 0
        """All of that time."""
        self.replicas: list[Any] = []
        self.take(route)

    def take(self, route: ModelRoute) -> None:
        self.route = route
        self.heads = {tier: _heads(route, tier) for tier in route.prices}
        """By tier: what an answer in one piece and a stream are headed with."""


def _heads(route: ModelRoute, tier: str) -> tuple[bytes, bytes]:
    """The headers that name what answered, and what kind of answer it is."""
    lines = [f"x-sublet-tier: {tier}", f"x-sublet-deployment: {route.deployment_id}"]
    lines.append(f"x-sublet-quantization: {route.quantization}")
    if route.lifecycle != "active":
        lines.append(f"x-sublet-lifecycle: {route.lifecycle}")
    head = "".join(f"{line}\r\n" for line in lines).encode()
    return head + WHOLE, head + STREAM


class Routes:
    """What one snapshot says, with everything that lives on beneath it.

    Purses and buckets come into being with a key's first use. A purse lives as long as the process,
    even when its key is gone: it may still pay for what runs, and its totals are the epoch's.
    """

    def __init__(self, snapshot: Snapshot, epoch: int) -> None:
        self.number = snapshot.number
        self.made_us = snapshot.made_us
        self.models: dict[str, Model] = {}
        self.replicas: dict[str, Any] = {}
        """All of this snapshot, by id."""
        self.leaving: list[Any] = []
        """Replicas that are not in this snapshot and still had something in flight."""
        self.gone: list[Model] = []
        """Models that are not in this snapshot and were in the one before."""
        self.purses: dict[str, Purse] = {}
        self._epoch = epoch
        self._policies = snapshot.keys
        self._limits = snapshot.limits
        self._gateways = snapshot.gateways
        self._is_free = snapshot.first_party_free
        self._known: dict[str, Known] = {}
        self._secrets: dict[bytes, Known] = {}
        self._buckets: dict[tuple[str, str], Bucket] = {}

    @classmethod
    def build(
        cls,
        snapshot: Snapshot,
        previous: Routes | None,
        epoch: int,
        make_replica: Callable[[ReplicaRoute, str], Any],
    ) -> Routes:
        """The routes of a newer snapshot. Costs little for keys that nobody uses.

        What lives on is changed in place, so that the previous routes are not to be used again.
        """
        routes = cls(snapshot, epoch)
        old: dict[str, Any] = {}
        models: dict[str, Model] = {}
        if previous is not None:
            routes.purses = previous.purses
            for (scope, unit), bucket in previous._buckets.items():
                limit = routes._limit(scope, unit)
                if limit is not None:
                    if bucket.limit != limit or bucket.gateways != snapshot.gateways:
                        bucket.resize(limit, snapshot.gateways)
                    routes._buckets[scope, unit] = bucket
            old = {r.id: r for r in (*previous.leaving, *previous.replicas.values())}
            models = previous.models
        routes._take_models(snapshot, models, old, make_replica)
        return routes

    def _limit(self, scope: str, unit: str) -> int | None:
        limits = self._limits.get(scope)
        if limits is None:
            return None
        return limits.requests_per_minute if unit == "requests" else limits.tokens_per_minute

    def _know(self, policy: KeyPolicy) -> Known:
        purse = self.purses.get(policy.id)
        if purse is None:
            purse = self.purses[policy.id] = Purse(policy.id, self._epoch)
        purse.is_first_party = policy.is_first_party
        purse.is_free = policy.is_first_party and self._is_free
        return Known(policy, purse, self._bind(policy, "requests"), self._bind(policy, "tokens"))

    def _bind(self, policy: KeyPolicy, unit: str) -> tuple[Bucket, ...]:
        """The buckets of all scopes that limit this key."""
        found = []
        for scope in policy.scopes:
            limit = self._limit(scope, unit)
            if limit is not None:
                bucket = self._buckets.get((scope, unit))
                if bucket is None:
                    bucket = self._buckets[scope, unit] = Bucket(limit, self._gateways)
                found.append(bucket)
        return tuple(found)

    def _take_models(
        self,
        snapshot: Snapshot,
        models: dict[str, Model],
        old: dict[str, Any],
        make_replica: Callable[[ReplicaRoute, str], Any],
    ) -> None:
        for name, route in snapshot.models.items():
            model = models.get(name)
            if model is None:
                model = Model(route)
            else:
                model.take(route)
            model.replicas = []
            for found in route.replicas:
                replica = old.get(found.id)
                if replica is None:
                    replica = make_replica(found, route.server)
                else:
                    replica.take(found)
                replica.is_leaving = False
                model.replicas.append(replica)
                self.replicas[found.id] = replica
            self.models[name] = model
        for replica in old.values():
            if replica.id not in self.replicas:
                replica.is_leaving = True
                replica.close_idle()
                if replica.inflight:
                    self.leaving.append(replica)
        for name, model in models.items():
            if name not in self.models:
                model.replicas = []
                self.gone.append(model)

    # ---- look-up -----------------------------------------------------------------------------

    def find_key(self, secret: bytes) -> Known | None:
        """Who sent this secret. The digest of one that was found before is not made again."""
        known = self._secrets.get(secret)
        return known if known is not None else self._find(secret)

    def _find(self, secret: bytes) -> Known | None:
        policy = self._policies.get(hashlib.sha256(secret).hexdigest())
        if policy is None:
            return None  # Not kept: what strangers send must not fill the memory.
        known = self._known.get(policy.id)
        if known is None:
            known = self._known[policy.id] = self._know(policy)
        if len(self._secrets) >= SECRETS_KEPT:
            self._secrets.clear()
        self._secrets[secret] = known
        return known

    def in_flight(self) -> dict[str, int]:
        """By replica, those included that are on their way out."""
        found = {replica.id: replica.inflight for replica in self.replicas.values()}
        self.leaving = [replica for replica in self.leaving if replica.inflight]
        for replica in self.leaving:
            found[replica.id] = replica.inflight
        return found

    def may_call(self, known: Known, name: str) -> bool:
        return known.models is None or name in known.models

    def list_names(self, known: Known) -> list[str]:
        """The models that a key may call, by name."""
        return sorted(name for name in self.models if self.may_call(known, name))

    # ---- purses ------------------------------------------------------------------------------

    def grant(self, allowance: Allowance, now_ns: int, now_us: int) -> Purse | None:
        """Take over an Allowance; the purse it was for, if it counted."""
        purse = self.purses.get(allowance.key_id)
        if purse is None or not purse.grant(allowance, now_ns, now_us):
            return None
        return purse

    def sweep(self, now_ns: int) -> list[AllowanceRequest]:
        """Once a second: what idle purses give back, and what is asked anew."""
        found = [purse.sweep(now_ns) for purse in self.purses.values() if purse.is_awake]
        return [request for request in found if request is not None]
