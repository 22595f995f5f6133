"""Who acts, as values: organisations, projects, principals, keys, budgets, audit rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, ClassVar

from sublet.base.kernel.errors import Conflict, Forbidden, Invalid, NotFound
from sublet.base.kernel.interval import Period
from sublet.base.store import Event


class OrganisationKind(StrEnum):
    """The one owner of the capacity, or a consumer of it."""

    OWNER = "owner"
    CONSUMER = "consumer"


class Standing(StrEnum):
    """What an organisation may do at present; the policy page says what each allows."""

    UNVERIFIED = "unverified"
    GOOD = "good"
    WARNED = "warned"
    SUSPENDED = "suspended"
    CLOSING = "closing"


class PrincipalKind(StrEnum):
    USER = "user"
    SERVICE_ACCOUNT = "service_account"


class Role(StrEnum):
    """Each role may do what those before it may."""

    VIEWER = "viewer"
    MEMBER = "member"
    ADMIN = "admin"

    @property
    def rank(self) -> int:
        return list(Role).index(self)

    def up_to(self, other: Role) -> Role:
        """The lesser of two: policies intersect."""
        return self if self.rank <= other.rank else other


class ScopeKind(StrEnum):
    ORGANISATION = "organisation"
    PROJECT = "project"
    KEY = "key"


@dataclass(frozen=True, slots=True, kw_only=True)
class Organisation:
    id: str
    seq: int
    name: str
    kind: OrganisationKind
    standing: Standing
    currency: str
    created_at: datetime
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Project:
    id: str
    seq: int
    organisation_id: str
    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """A user or a service account. Removed ones stay, for the audit."""

    id: str
    seq: int
    organisation_id: str
    kind: PrincipalKind
    email: str | None
    name: str
    role: Role
    created_at: datetime
    removed_at: datetime | None
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one key, project or organisation may use at most; None: no limit of its own.

    They bind together: a call must fit its key's, its project's and its organisation's.
    """

    max_devices: int | None = None
    """Of keys only."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    """Input, cached and output together; the day is UTC."""
    models: tuple[str, ...] | None = None
    """Names of models that may be called; None: all that there are."""

    def __post_init__(self) -> None:
        if self.models is not None:
            # A list, as it comes from JSON, or names twice and in any order: one form of it.
            object.__setattr__(self, "models", tuple(sorted(set(self.models))))


NO_LIMITS = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """An API key. The secret itself is not kept. `role` None: that of its principal."""

    id: str
    seq: int
    principal_id: str
    organisation_id: str
    project_id: str | None
    name: str
    digest: str
    prefix: str
    role: Role | None
    limits: Limits
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None

    def is_valid_at(self, now: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """At most `limit_micros` a period (UTC; weeks from Monday) for one scope."""

    scope_kind: ScopeKind
    scope_id: str
    period: Period
    limit_micros: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRow:
    """One act or one refused attempt, in the order of `seq`."""

    seq: int
    at: datetime
    actor_id: str
    organisation_id: str | None
    address: str
    action: str
    target: str
    result: str
    detail: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What an idempotent request was answered, byte for byte."""

    status: int
    body: str


@dataclass(frozen=True, slots=True)
class StandingChanged(Event):
    """An organisation may now do more or less; who runs things for it acts on this."""

    kind: ClassVar[str] = "tenancy.standing_changed"

    organisation_id: str
    before: str
    after: str
    why: str


class KeyChange(StrEnum):
    """What happened to a key."""

    MADE = "made"
    REVOKED = "revoked"
    LIMITS = "limits"
    ROLE = "role"


@dataclass(frozen=True, slots=True)
class KeyChanged(Event):
    """A key was made or revoked, or may now do more or less: snapshots of keys are stale."""

    kind: ClassVar[str] = "tenancy.key_changed"

    key_id: str
    organisation_id: str
    change: str


@dataclass(frozen=True, slots=True)
class LimitsChanged(Event):
    """A project or an organisation has other limits now: snapshots of limits are stale."""

    kind: ClassVar[str] = "tenancy.limits_changed"

    scope_kind: str
    scope_id: str
    organisation_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidKey:
    """What a snapshot says of one key that is valid now. `role`: what it and its principal share."""

    digest: str
    key_id: str
    organisation_id: str
    organisation_kind: OrganisationKind
    standing: Standing
    project_id: str | None
    role: Role
    expires_at: datetime | None
    limits: Limits

    @property
    def is_first_party(self) -> bool:
        return self.organisation_kind is OrganisationKind.OWNER


@dataclass(frozen=True, slots=True, kw_only=True)
class ScopeLimits:
    """The limits of one project or organisation."""

    scope_kind: ScopeKind
    scope_id: str
    organisation_id: str
    limits: Limits


class OrganisationNotFound(NotFound):
    """There is no such organisation, or this key may not see it."""

    code = "organisation_not_found"


class ProjectNotFound(NotFound):
    """There is no such project, or this key may not see it."""

    code = "project_not_found"


class PrincipalNotFound(NotFound):
    """There is no such user or service account, or this key may not see it."""

    code = "principal_not_found"


class KeyNotFound(NotFound):
    """There is no such key, or this key may not see it."""

    code = "key_not_found"


class OwnerExists(Conflict):
    """This installation has its owner already: it serves one."""

    code = "owner_exists"


class NameTaken(Conflict):
    """This organisation has one of that name: choose another name."""

    code = "name_taken"


class EmailTaken(Conflict):
    """A user with that email address exists in this organisation: change that one."""

    code = "email_taken"


class LastAdmin(Conflict):
    """An organisation keeps at least one admin: make another one first."""

    code = "last_admin"


class StandingForbids(Forbidden):
    """The organisation's standing does not allow this: settle what is open with the owner."""

    code = "standing_forbids"


class QuotaExceeded(Forbidden):
    """This is more than the organisation or the key may hold: stop something or ask for less."""

    code = "quota_exceeded"


class IdempotencyKeyReused(Invalid):
    """This Idempotency-Key was used with another body: use a new key for a new request."""

    code = "idempotency_key_reused"
