"""Organisations, projects, principals, keys and the audit trail as they are shown."""

from __future__ import annotations

from datetime import datetime

from sublet.base.kernel.interval import period_end
from sublet.base.kernel.money import Money
from sublet.base.wire import rest
from sublet.records import tenancy


def organisation(found: tenancy.Organisation) -> rest.Organisation:
    return rest.Organisation(
        id=found.id,
        name=found.name,
        kind=found.kind.value,
        standing=found.standing.value,
        currency=found.currency,
        created_at=found.created_at,
        version=found.version,
    )


def project(found: tenancy.Project) -> rest.Project:
    return rest.Project(
        id=found.id,
        organisation_id=found.organisation_id,
        name=found.name,
        created_at=found.created_at,
    )


def principal(found: tenancy.Principal) -> rest.Principal:
    return rest.Principal(
        id=found.id,
        organisation_id=found.organisation_id,
        kind=found.kind.value,
        name=found.name,
        email=found.email,
        role=found.role.value,
        created_at=found.created_at,
        version=found.version,
    )


def key(found: tenancy.Key) -> rest.Key:
    return rest.Key(
        id=found.id,
        organisation_id=found.organisation_id,
        principal_id=found.principal_id,
        project_id=found.project_id,
        name=found.name,
        prefix=found.prefix,
        role=None if found.role is None else found.role.value,
        limits=limits(found.limits),
        created_at=found.created_at,
        expires_at=found.expires_at,
        revoked_at=found.revoked_at,
    )


def limits(found: tenancy.Limits) -> rest.KeyLimits:
    return rest.KeyLimits(
        max_devices=found.max_devices,
        requests_per_minute=found.requests_per_minute,
        tokens_per_minute=found.tokens_per_minute,
        tokens_per_day=found.tokens_per_day,
        models=None if found.models is None else list(found.models),
    )


def scope_limits(kind: str, scope_id: str, found: tenancy.Limits) -> rest.ScopeLimits:
    return rest.ScopeLimits(
        scope_kind=tenancy.ScopeKind(kind).value, scope_id=scope_id, **limits(found).model_dump()
    )


def limits_of(body: rest.KeyLimitsBody) -> tenancy.Limits:
    """As they were asked for."""
    return tenancy.Limits(
        max_devices=body.max_devices,
        requests_per_minute=body.requests_per_minute,
        tokens_per_minute=body.tokens_per_minute,
        tokens_per_day=body.tokens_per_day,
        models=None if body.models is None else tuple(body.models),
    )


def budget(found: tenancy.Budget, spent: Money, now: datetime) -> rest.Budget:
    return rest.Budget(
        scope_kind=found.scope_kind.value,
        scope_id=found.scope_id,
        period=found.period,
        limit=rest.Money.of(Money(found.limit_micros, spent.currency)),
        spent=rest.Money.of(spent),
        resets_at=period_end(now, found.period),
    )


def audit_entry(row: tenancy.AuditRow) -> rest.AuditEntry:
    return rest.AuditEntry(
        seq=row.seq,
        at=row.at,
        actor=row.actor_id,
        address=row.address,
        organisation_id=row.organisation_id,
        action=row.action,
        target=row.target,
        result=row.result,
        detail=dict(row.detail),
    )
