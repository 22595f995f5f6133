"""Tables of tenancy, and rows ↔ values."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.store import Instant, Json, metadata
from sublet.records.tenancy.model import (
    AuditRow,
    Budget,
    Key,
    Limits,
    Organisation,
    OrganisationKind,
    Principal,
    PrincipalKind,
    Project,
    Role,
    ScopeKind,
    ScopeLimits,
    Standing,
    ValidKey,
)

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

organisations = sa.Table(
    "tenancy_organisation",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("name", sa.String(120), nullable=False),
    sa.Column("kind", sa.String(24), nullable=False),
    sa.Column("standing", sa.String(24), nullable=False),
    sa.Column("currency", sa.String(3), nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    # One installation serves one owner.
    sa.Index(
        "uq_tenancy_organisation_owner",
        "kind",
        unique=True,
        sqlite_where=sa.text("kind = 'owner'"),
        postgresql_where=sa.text("kind = 'owner'"),
    ),
    sqlite_autoincrement=True,
)

projects = sa.Table(
    "tenancy_project",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("name", sa.String(120), nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.UniqueConstraint("organisation_id", "name"),
    sqlite_autoincrement=True,
)

principals = sa.Table(
    "tenancy_principal",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("organisation_id", sa.String(40), nullable=False, index=True),
    sa.Column("kind", sa.String(24), nullable=False),
    sa.Column("email", sa.String(254), nullable=True, index=True),
    sa.Column("name", sa.String(120), nullable=False),
    sa.Column("role", sa.String(24), nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("removed_at", Instant, nullable=True),
    sa.Column("version", sa.Integer, nullable=False),
    sqlite_autoincrement=True,
)

keys = sa.Table(
    "tenancy_key",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("principal_id", sa.String(40), nullable=False, index=True),
    sa.Column("organisation_id", sa.String(40), nullable=False, index=True),
    sa.Column("project_id", sa.String(40), nullable=True),
    sa.Column("name", sa.String(120), nullable=False),
    sa.Column("digest", sa.String(64), nullable=False, unique=True),
    sa.Column("prefix", sa.String(8), nullable=False),
    sa.Column("role", sa.String(24), nullable=True),
    sa.Column("limits", Json, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("expires_at", Instant, nullable=True),
    sa.Column("revoked_at", Instant, nullable=True),
    sqlite_autoincrement=True,
)

budgets = sa.Table(
    "tenancy_budget",
    metadata,
    sa.Column("scope_kind", sa.String(24), primary_key=True),
    sa.Column("scope_id", sa.String(40), primary_key=True),
    sa.Column("period", sa.String(24), primary_key=True),
    sa.Column("organisation_id", sa.String(40), nullable=False, index=True),
    sa.Column("limit_micros", sa.BigInteger, nullable=False),
)

limits = sa.Table(
    "tenancy_limit",
    metadata,
    sa.Column("scope_kind", sa.String(24), primary_key=True),
    sa.Column("scope_id", sa.String(40), primary_key=True),
    sa.Column("organisation_id", sa.String(40), nullable=False, index=True),
    sa.Column("limits", Json, nullable=False),
    sa.Column("changed_at", Instant, nullable=False),
)
"""Of organisations and projects; those of a key stand in its own row."""

audit = sa.Table(
    "tenancy_audit",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("at", Instant, nullable=False),
    sa.Column("actor_id", sa.String(80), nullable=False),
    sa.Column("organisation_id", sa.String(40), nullable=True),
    sa.Column("address", sa.String(80), nullable=False),
    sa.Column("action", sa.String(80), nullable=False),
    sa.Column("target", sa.String(200), nullable=False),
    sa.Column("result", sa.String(80), nullable=False),
    sa.Column("detail", Json, nullable=False),
    sa.Index(None, "organisation_id", "seq"),
    sqlite_autoincrement=True,
)

answers = sa.Table(
    "tenancy_idempotency",
    metadata,
    sa.Column("scope", sa.String(255), primary_key=True),
    sa.Column("key", sa.String(255), primary_key=True),
    sa.Column("organisation_id", sa.String(40), nullable=True),
    sa.Column("body_digest", sa.String(64), nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("at", Instant, nullable=False, index=True),
)


def insert(tx: Connection, table: sa.Table, values: dict[str, Any]) -> int:
    """Append a row; returns the sequence number given."""
    key = tx.execute(table.insert(), values).inserted_primary_key
    assert key is not None
    return int(key[0])


def update_organisation(tx: Connection, organisation: Organisation) -> None:
    tx.execute(
        organisations.update()
        .where(organisations.c.id == organisation.id)
        .values(standing=organisation.standing, version=organisation.version)
    )


def find_organisation(
    tx: Connection, *where: sa.ColumnElement[bool], lock: bool = False
) -> Organisation | None:
    query = sa.select(organisations).where(*where)
    row = tx.execute(query.with_for_update() if lock else query).one_or_none()
    return None if row is None else _organisation(row._mapping)


def list_organisations(tx: Connection, after: int | None, limit: int) -> list[Organisation]:
    query = sa.select(organisations).where(organisations.c.seq > (after or 0))
    rows = tx.execute(query.order_by(organisations.c.seq).limit(limit))
    return [_organisation(row._mapping) for row in rows]


def find_nth_last_consumer(tx: Connection, n: int) -> Organisation | None:
    query = sa.select(organisations).where(organisations.c.kind == OrganisationKind.CONSUMER)
    query = query.order_by(organisations.c.seq.desc()).offset(n - 1).limit(1)
    row = tx.execute(query).one_or_none()
    return None if row is None else _organisation(row._mapping)


def find_project(tx: Connection, *where: sa.ColumnElement[bool]) -> Project | None:
    row = tx.execute(sa.select(projects).where(*where)).one_or_none()
    return None if row is None else Project(**row._asdict())


def list_projects(
    tx: Connection, organisation_id: str, after: int | None, limit: int
) -> list[Project]:
    rows = tx.execute(
        sa.select(projects)
        .where(projects.c.organisation_id == organisation_id, projects.c.seq > (after or 0))
        .order_by(projects.c.seq)
        .limit(limit)
    )
    return [Project(**row._asdict()) for row in rows]


def update_principal(tx: Connection, principal: Principal) -> None:
    tx.execute(
        principals.update()
        .where(principals.c.id == principal.id)
        .values(role=principal.role, removed_at=principal.removed_at, version=principal.version)
    )


def list_principals(
    tx: Connection, *where: sa.ColumnElement[bool], after: int | None = None, limit: int
) -> list[Principal]:
    """Those not removed, oldest first."""
    rows = tx.execute(
        sa.select(principals)
        .where(principals.c.removed_at.is_(None), principals.c.seq > (after or 0), *where)
        .order_by(principals.c.seq)
        .limit(limit)
    )
    return [_principal(row._mapping) for row in rows]


def find_key(tx: Connection, key_id: str) -> Key | None:
    row = tx.execute(sa.select(keys).where(keys.c.id == key_id)).one_or_none()
    return None if row is None else _key(row._mapping)


def list_keys(
    tx: Connection, *where: sa.ColumnElement[bool], after: int | None = None, limit: int | None
) -> list[Key]:
    rows = tx.execute(
        sa.select(keys).where(keys.c.seq > (after or 0), *where).order_by(keys.c.seq).limit(limit)
    )
    return [_key(row._mapping) for row in rows]


def revoke_keys(tx: Connection, at: datetime, *where: sa.ColumnElement[bool]) -> None:
    """Those of the keys chosen that are not revoked yet."""
    tx.execute(keys.update().where(keys.c.revoked_at.is_(None), *where).values(revoked_at=at))


def set_key_limits(tx: Connection, key_id: str, limits_: Limits) -> None:
    tx.execute(keys.update().where(keys.c.id == key_id).values(limits=dataclasses.asdict(limits_)))


_VALID_KEYS = (
    sa.select(
        keys.c.digest,
        keys.c.id,
        keys.c.organisation_id,
        organisations.c.kind,
        organisations.c.standing,
        keys.c.project_id,
        keys.c.role,
        principals.c.role.label("most"),
        keys.c.expires_at,
        keys.c.limits,
    )
    .join_from(keys, principals, principals.c.id == keys.c.principal_id)
    .join(organisations, organisations.c.id == keys.c.organisation_id)
    .where(
        keys.c.revoked_at.is_(None),
        keys.c.expires_at.is_(None) | (keys.c.expires_at > sa.bindparam("now", type_=Instant)),
        principals.c.removed_at.is_(None),
    )
    .order_by(keys.c.seq)
)
_VALID_KEY = _VALID_KEYS.where(keys.c.id == sa.bindparam("of"))


def list_valid_keys(tx: Connection, now: datetime) -> list[ValidKey]:
    return [_valid_key(row) for row in tx.execute(_VALID_KEYS, {"now": now})]


def find_valid_key(tx: Connection, key_id: str, now: datetime) -> ValidKey | None:
    row = tx.execute(_VALID_KEY, {"now": now, "of": key_id}).one_or_none()
    return None if row is None else _valid_key(row)


def _valid_key(row: Any) -> ValidKey:
    most = Role(row.most)
    return ValidKey(
        digest=row.digest,
        key_id=row.id,
        organisation_id=row.organisation_id,
        organisation_kind=OrganisationKind(row.kind),
        standing=Standing(row.standing),
        project_id=row.project_id,
        role=most if row.role is None else most.up_to(Role(row.role)),
        expires_at=row.expires_at,
        limits=Limits(**row.limits),
    )


def find_bearer(tx: Connection, digest: str) -> tuple[Organisation, Principal, Key] | None:
    """Whom a secret's digest names, in one query: this runs on every request."""
    row = tx.execute(_BEARER, {"digest": digest}).one_or_none()
    if row is None:
        return None
    organisation, principal, key = (
        {column.name: row._mapping[column] for column in table.c}
        for table in (organisations, principals, keys)
    )
    return _organisation(organisation), _principal(principal), _key(key)


_BEARER = (
    sa.select(organisations, principals, keys)
    .join_from(keys, principals, principals.c.id == keys.c.principal_id)
    .join(organisations, organisations.c.id == keys.c.organisation_id)
    .where(keys.c.digest == sa.bindparam("digest"))
)


def set_budget(tx: Connection, organisation_id: str, budget: Budget) -> None:
    changed = tx.execute(
        budgets.update().where(*_budget_is(budget)).values(limit_micros=budget.limit_micros)
    )
    if changed.rowcount == 0:
        tx.execute(
            budgets.insert().values(organisation_id=organisation_id, **dataclasses.asdict(budget))
        )


def delete_budget(tx: Connection, budget: Budget) -> None:
    tx.execute(budgets.delete().where(*_budget_is(budget)))


def _budget_is(budget: Budget) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        budgets.c.scope_kind == budget.scope_kind,
        budgets.c.scope_id == budget.scope_id,
        budgets.c.period == budget.period,
    )


_BUDGETS = (
    sa.select(budgets.c.scope_kind, budgets.c.scope_id, budgets.c.period, budgets.c.limit_micros)
    .where(
        # A scope that is not asked for is NULL here, and equals nothing.
        sa.or_(
            *(
                (budgets.c.scope_kind == kind) & (budgets.c.scope_id == sa.bindparam(kind.value))
                for kind in ScopeKind
            )
        )
    )
    .order_by(budgets.c.scope_kind, budgets.c.scope_id, budgets.c.period)
)


def list_budgets(tx: Connection, scopes: dict[ScopeKind, str | None]) -> list[Budget]:
    rows = tx.execute(_BUDGETS, {kind.value: scopes.get(kind) for kind in ScopeKind})
    return [Budget(**{**row._asdict(), "scope_kind": ScopeKind(row.scope_kind)}) for row in rows]


def set_limits(tx: Connection, found: ScopeLimits, at: datetime) -> None:
    values = {"limits": dataclasses.asdict(found.limits), "changed_at": at}
    changed = tx.execute(
        limits.update()
        .where(limits.c.scope_kind == found.scope_kind, limits.c.scope_id == found.scope_id)
        .values(**values)
    )
    if changed.rowcount == 0:
        tx.execute(
            limits.insert().values(
                scope_kind=found.scope_kind,
                scope_id=found.scope_id,
                organisation_id=found.organisation_id,
                **values,
            )
        )


_LIMITS = sa.select(
    limits.c.scope_kind, limits.c.scope_id, limits.c.organisation_id, limits.c.limits
).order_by(limits.c.scope_kind, limits.c.scope_id)
_LIMITS_OF = _LIMITS.where(limits.c.scope_id.in_(sa.bindparam("of", expanding=True)))


def list_limits(tx: Connection, scope_ids: Sequence[str] | None = None) -> list[ScopeLimits]:
    """All that are set, or those of the scopes named."""
    rows = (
        tx.execute(_LIMITS)
        if scope_ids is None
        else tx.execute(_LIMITS_OF, {"of": list(scope_ids)})
    )
    return [
        ScopeLimits(
            scope_kind=ScopeKind(row.scope_kind),
            scope_id=row.scope_id,
            organisation_id=row.organisation_id,
            limits=Limits(**row.limits),
        )
        for row in rows
    ]


_ANSWER = sa.select(answers).where(
    answers.c.scope == sa.bindparam("in_scope"),
    answers.c.key == sa.bindparam("under_key"),
    answers.c.at > sa.bindparam("after"),
)
_SWEEP = answers.delete().where(answers.c.at <= sa.bindparam("until"))


def find_answer(tx: Connection, scope: str, key: str, after: datetime) -> sa.Row[Any] | None:
    """What was kept for this key after that instant."""
    values = {"in_scope": scope, "under_key": key, "after": after}
    return tx.execute(_ANSWER, values).one_or_none()


def sweep_answers(tx: Connection, until: datetime) -> None:
    tx.execute(_SWEEP, {"until": until})


def list_audit(
    tx: Connection, organisation_id: str | None, after: int | None, limit: int
) -> list[AuditRow]:
    query = sa.select(audit).where(audit.c.seq > (after or 0))
    if organisation_id is not None:
        query = query.where(audit.c.organisation_id == organisation_id)
    return [
        AuditRow(**row._asdict()) for row in tx.execute(query.order_by(audit.c.seq).limit(limit))
    ]


def _organisation(row: Any) -> Organisation:
    return Organisation(
        **{
            **row,
            "kind": OrganisationKind(row["kind"]),
            "standing": Standing(row["standing"]),
        }
    )


def _principal(row: Any) -> Principal:
    return Principal(**{**row, "kind": PrincipalKind(row["kind"]), "role": Role(row["role"])})


def _key(row: Any) -> Key:
    role = row["role"]
    return Key(
        **{
            **row,
            "role": None if role is None else Role(role),
            "limits": Limits(**row["limits"]),
        }
    )
