"""Who: sign-up, organisations, projects, principals, keys, budgets, the audit trail."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StringConstraints

from sublet.base.wire.rest.common import (
    EMAIL,
    Body,
    Identifier,
    Instant,
    Micros,
    Money,
    Name,
    Reason,
    Shape,
    Whole,
    storable,
)

Role = Literal["admin", "member", "viewer"]
Standing = Literal["unverified", "good", "warned", "suspended", "closing"]
Period = Literal["day", "week", "month", "lifetime"]
ScopeKind = Literal["organisation", "project", "key"]
Email = Annotated[str, StringConstraints(pattern=EMAIL)]
TokenCount = Annotated[Whole, Field(ge=1, le=10**12)]
ModelNames = Annotated[
    list[
        Annotated[str, StringConstraints(min_length=1, max_length=200), BeforeValidator(storable)]
    ],
    Field(max_length=500),
]


class Organisation(Shape):
    id: str
    name: str
    kind: Literal["owner", "consumer"]
    standing: Standing
    currency: str
    created_at: Instant
    version: int


class StandingPut(Body):
    """The owner's word on an organisation; `why` is kept in the audit trail."""

    standing: Standing
    why: Reason


class StopWorkloads(Body):
    """Why the owner ends what an organisation runs; the consumer reads it on each workload."""

    reason: Literal["abuse", "legal_order"]


class StoppedWorkloads(Shape):
    """All that held devices, and now ends. What waits for devices goes on waiting."""

    organisation_id: str
    reason: Literal["abuse", "legal_order"]
    workload_ids: list[str]


class Project(Shape):
    id: str
    organisation_id: str
    name: str
    created_at: Instant


class ProjectCreate(Body):
    name: Name


class Principal(Shape):
    id: str
    organisation_id: str
    kind: Literal["user", "service_account"]
    name: str
    email: str | None = None
    role: Role
    created_at: Instant
    version: int


class PrincipalPatch(Body):
    role: Role


class PrincipalCreate(Body):
    kind: Literal["user", "service_account"]
    name: Name
    email: Email | None = None
    role: Role = "member"


class KeyLimits(Shape):
    """What one key may use at most; null: as much as its organisation."""

    max_devices: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    tokens_per_day: int | None = None
    """Input, cached and output together; the day is UTC."""
    models: list[str] | None = None
    """Those that it may call; null: all."""


class KeyLimitsBody(Body):
    """A field left out, or null, is no limit."""

    max_devices: Annotated[Whole, Field(ge=0, le=1_000_000)] | None = None
    requests_per_minute: Annotated[Whole, Field(ge=1, le=1_000_000)] | None = None
    tokens_per_minute: TokenCount | None = None
    tokens_per_day: TokenCount | None = None
    models: ModelNames | None = None


class Key(Shape):
    """A key without its secret, which is kept only as a digest."""

    id: str
    organisation_id: str
    principal_id: str
    project_id: str | None
    name: str
    prefix: str
    role: Role | None
    """None: that of its principal."""
    limits: KeyLimits
    created_at: Instant
    expires_at: Instant | None
    revoked_at: Instant | None


class KeyCreate(Body):
    """`principal_id` left out: the caller's own. `project_id` left out: all of the organisation."""

    name: Name
    principal_id: Identifier | None = None
    project_id: Identifier | None = None
    role: Role | None = None
    limits: KeyLimitsBody = KeyLimitsBody()
    expires_at: Instant | None = None


class KeyCreated(Shape):
    """The only time that `secret` is shown; a repeated request gets null there."""

    id: str
    key: Key
    secret: str | None


class SignUpCreate(Body):
    email: Email
    organisation_name: Name


class SignUp(Shape):
    organisation: Organisation
    project: Project
    principal: Principal
    key: Key
    secret: str | None
    """Shown this once; a repeated request gets null there."""
    trial_credit: Money
    note: str | None = None
    """Why there is no trial credit where there usually is, and what to do."""


class Me(Shape):
    """Who the key speaks for, and what it may spend."""

    organisation: Organisation
    principal: Principal
    key: Key
    role: Role
    """What the key may do after key, principal and standing are taken together."""
    is_owner: bool
    actions: list[str]
    available: Money


class Budget(Shape):
    """A cap over one window of UTC time: posted spending and open holds count."""

    scope_kind: ScopeKind
    scope_id: str
    period: Period
    limit: Money
    spent: Money
    resets_at: Instant | None


class BudgetPut(Body):
    scope_kind: ScopeKind
    scope_id: Identifier
    period: Period
    limit_micros: Micros


class AuditEntry(Shape):
    seq: int
    at: Instant
    actor: str
    address: str
    organisation_id: str | None
    action: str
    target: str
    result: str
    """`ok`, or the code of the refusal."""
    detail: dict[str, Any] | None = None
