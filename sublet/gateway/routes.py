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

SECRETS_KEPT = 4096
"""Secrets whose digest is known; so many strange ones at most are kept meanwhile."""


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

    __slots__ = ("name", "prices", "replicas", "route", "waiting")

    def __init__(self, route: ModelRoute) -> None:
        self.name = route.name
        self.waiting: deque[Any] = deque()
        self.replicas: list[Any] = []
        self.take(route)

    def take(self, route: ModelRoute) -> None:
        self.route = route
        self.prices = route.prices


class Routes:
    """What one snapshot says, with everything that lives on beneath it."""

    def __init__(self, number: int, made_us: int) -> None:
        self.number = number
        self.made_us = made_us
        self.models: dict[str, Model] = {}
        self.replicas: dict[str, Any] = {}
        self.purses: dict[str, Purse] = {}
        self.leaving: list[Any] = []
        """Replicas that are not in this snapshot and still have something in flight."""
        self._known: dict[str, Known] = {}
        self._secrets: dict[bytes, Known | None] = {}
        self._buckets: dict[tuple[str, str], Bucket] = {}

    @classmethod
    def build(
        cls,
        snapshot: Snapshot,
        previous: Routes | None,
        epoch: int,
        make_replica: Callable[[ReplicaRoute, str], Any],
    ) -> Routes:
        """The routes of a newer snapshot."""
        routes = cls(snapshot.number, snapshot.made_us)
        old = previous if previous is not None else cls(0, 0)
        for scope, limits in snapshot.limits.items():
            for unit, limit in (
                ("requests", limits.requests_per_minute),
                ("tokens", limits.tokens_per_minute),
            ):
                if limit is not None:
                    bucket = old._buckets.get((scope, unit))
                    if bucket is None:
                        bucket = Bucket(limit, snapshot.gateways)
                    elif bucket.limit != limit or bucket.gateways != snapshot.gateways:
                        bucket.resize(limit, snapshot.gateways)
                    routes._buckets[scope, unit] = bucket
        # A purse that a snapshot does not name may still pay for what runs.
        routes.purses = dict(old.purses)
        for digest, policy in snapshot.keys.items():
            routes._known[digest] = routes._know(policy, snapshot, epoch)
        routes._take_models(snapshot, old, make_replica)
        return routes

    def _know(self, policy: KeyPolicy, snapshot: Snapshot, epoch: int) -> Known:
        purse = self.purses.get(policy.id)
        if purse is None:
            purse = self.purses[policy.id] = Purse(policy.id, epoch)
        purse.is_first_party = policy.is_first_party
        purse.is_free = policy.is_first_party and snapshot.first_party_free
        found = {
            unit: tuple(
                self._buckets[scope, unit]
                for scope in policy.scopes
                if (scope, unit) in self._buckets
            )
            for unit in ("requests", "tokens")
        }
        return Known(policy, purse, found["requests"], found["tokens"])

    def _take_models(
        self, snapshot: Snapshot, old: Routes, make_replica: Callable[[ReplicaRoute, str], Any]
    ) -> None:
        for name, route in snapshot.models.items():
            model = old.models.get(name)
            if model is None:
                model = Model(route)
            else:
                model.take(route)
            model.replicas = []
            for found in route.replicas:
                replica = old.replicas.get(found.id)
                if replica is None:
                    replica = make_replica(found, route.server)
                else:
                    replica.take(found)
                replica.is_leaving = False
                model.replicas.append(replica)
                self.replicas[found.id] = replica
            self.models[name] = model
        gone = [r for i, r in old.replicas.items() if i not in self.replicas]
        for replica in gone:
            replica.is_leaving = True
            replica.close_idle()
        self.leaving = [r for r in (*old.leaving, *gone) if r.inflight]
        for name, model in old.models.items():
            if name not in self.models:
                model.replicas = []

    # ---- look-up -----------------------------------------------------------------------------

    def find_key(self, secret: bytes) -> Known | None:
        """Who sent this secret. The digest of one that was seen before is not made again."""
        secrets = self._secrets
        try:
            return secrets[secret]
        except KeyError:
            if len(secrets) >= SECRETS_KEPT:
                secrets.clear()
            known = self._known.get(hashlib.sha256(secret).hexdigest())
            secrets[secret] = known
            return known

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
        found = [purse.sweep(now_ns) for purse in self.purses.values()]
        return [request for request in found if request is not None]
