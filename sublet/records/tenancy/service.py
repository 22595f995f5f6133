"""What others call: organisations and their people, keys, standing, budgets."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, TypeVar, get_args

from sqlalchemy import ColumnElement, Connection

from sublet.base.kernel.errors import Invalid, Unauthenticated
from sublet.base.kernel.interval import Period
from sublet.base.store import Work
from sublet.records.tenancy import store
from sublet.records.tenancy.journal import audit
from sublet.records.tenancy.model import (
    NO_LIMITS,
    Budget,
    EmailTaken,
    Key,
    KeyChange,
    KeyChanged,
    KeyNotFound,
    LastAdmin,
    Limits,
    LimitsChanged,
    NameTaken,
    Organisation,
    OrganisationKind,
    OrganisationNotFound,
    OwnerExists,
    Principal,
    PrincipalKind,
    PrincipalNotFound,
    Project,
    ProjectNotFound,
    Role,
    ScopeKind,
    ScopeLimits,
    Standing,
    StandingChanged,
    ValidKey,
)
from sublet.records.tenancy.policy import Identity

NAME_LENGTH = 120
EMAIL_LENGTH = 254
PREFIX_LENGTH = 8
_EMAIL = re.compile(r"[^\s@<>,;\"']+@[^\s@<>,;\"']+")


def create_organisation(
    work: Work,
    *,
    name: str,
    kind: OrganisationKind | str = OrganisationKind.CONSUMER,
    standing: Standing | str = Standing.UNVERIFIED,
) -> Organisation:
    """Raises Invalid (`name`), OwnerExists for a second owner."""
    kind, standing = OrganisationKind(kind), Standing(standing)
    if kind is OrganisationKind.OWNER and find_owner(work.tx) is not None:
        raise OwnerExists()
    values: dict[str, Any] = {
        "id": work.ids.new("org"),
        "name": _name(name, "name"),
        "kind": kind,
        "standing": standing,
        "currency": "USD",
        "created_at": work.now,
        "version": 1,
    }
    return Organisation(**values, seq=store.insert(work.tx, store.organisations, values))


def create_project(work: Work, organisation_id: str, name: str) -> Project:
    """Raises OrganisationNotFound, Invalid (`name`), NameTaken."""
    get_organisation(work.tx, organisation_id)
    name = _name(name, "name")
    projects = store.projects.c
    if store.find_project(
        work.tx, projects.organisation_id == organisation_id, projects.name == name
    ):
        raise NameTaken(f"This organisation has a project named {name!r}.", param="name")
    values: dict[str, Any] = {
        "id": work.ids.new("prj"),
        "organisation_id": organisation_id,
        "name": name,
        "created_at": work.now,
    }
    return Project(**values, seq=store.insert(work.tx, store.projects, values))


def create_principal(
    work: Work,
    organisation_id: str,
    *,
    kind: PrincipalKind | str,
    name: str,
    email: str | None = None,
    role: Role | str,
) -> Principal:
    """Add a user or a service account. Raises OrganisationNotFound, Invalid, EmailTaken."""
    get_organisation(work.tx, organisation_id)
    kind, role = _choice(PrincipalKind, kind, "kind"), _choice(Role, role, "role")
    address = None if email is None else valid_email(email)
    if address is not None and kind is PrincipalKind.SERVICE_ACCOUNT:
        raise Invalid("A service account has no email address.", param="email")
    principals = store.principals.c
    if address is not None and store.list_principals(
        work.tx,
        principals.organisation_id == organisation_id,
        principals.email == address,
        limit=1,
    ):
        raise EmailTaken(param="email")
    values: dict[str, Any] = {
        "id": work.ids.new("usr" if kind is PrincipalKind.USER else "sac"),
        "organisation_id": organisation_id,
        "kind": kind,
        "email": address,
        "name": _name(name, "name"),
        "role": role,
        "created_at": work.now,
        "removed_at": None,
        "version": 1,
    }
    return Principal(**values, seq=store.insert(work.tx, store.principals, values))


def change_role(work: Work, principal_id: str, role: Role | str) -> Principal:
    """Takes effect with the next request. Raises PrincipalNotFound, Invalid, LastAdmin."""
    role = _choice(Role, role, "role")
    principal = get_principal(work.tx, principal_id)
    if role is principal.role:
        return principal
    _keep_an_admin(work, principal)
    changed = dataclasses.replace(principal, role=role, version=principal.version + 1)
    store.update_principal(work.tx, changed)
    for key in store.list_keys(work.tx, *_live_keys_of(principal_id), limit=None):
        _tell(work, key, KeyChange.ROLE)
    return changed


def remove_principal(work: Work, principal_id: str) -> Principal:
    """Remove a user or service account and revoke its keys. PrincipalNotFound, LastAdmin."""
    principal = get_principal(work.tx, principal_id)
    _keep_an_admin(work, principal)
    _revoke_all(work, principal_id)
    removed = dataclasses.replace(principal, removed_at=work.now, version=principal.version + 1)
    store.update_principal(work.tx, removed)
    return removed


def _live_keys_of(principal_id: str) -> tuple[ColumnElement[bool], ...]:
    return (store.keys.c.principal_id == principal_id, store.keys.c.revoked_at.is_(None))


def _revoke_all(work: Work, principal_id: str) -> None:
    live = _live_keys_of(principal_id)
    found = store.list_keys(work.tx, *live, limit=None)
    store.revoke_keys(work.tx, work.now, *live)
    for key in found:
        _tell(work, key, KeyChange.REVOKED)


def _tell(work: Work, key: Key, change: KeyChange) -> None:
    work.emit(KeyChanged(key_id=key.id, organisation_id=key.organisation_id, change=change.value))


def _keep_an_admin(work: Work, principal: Principal) -> None:
    """Refuse to take this one's admin role if nobody else has it."""
    organisations, principals = store.organisations.c, store.principals.c
    # The organisation's row is the lock: two admins removing each other would leave none.
    store.find_organisation(work.tx, organisations.id == principal.organisation_id, lock=True)
    admins = store.list_principals(
        work.tx,
        principals.organisation_id == principal.organisation_id,
        principals.role == Role.ADMIN,
        limit=2,
    )
    if [admin.id for admin in admins] == [principal.id]:
        raise LastAdmin()


def create_key(
    work: Work,
    principal_id: str,
    *,
    name: str,
    project_id: str | None = None,
    role: Role | str | None = None,
    expires_at: datetime | None = None,
    limits: Limits = NO_LIMITS,
) -> tuple[Key, str]:
    """A key and its secret, which is shown now and never again.

    Raises PrincipalNotFound, ProjectNotFound, Invalid: a key's role does not exceed its
    principal's, and it expires in the future.
    """
    principal = get_principal(work.tx, principal_id)
    if project_id is not None:
        project = get_project(work.tx, project_id)
        if project.organisation_id != principal.organisation_id:
            raise ProjectNotFound(param="project_id")
    own = None if role is None else _choice(Role, role, "role")
    if own is not None and own.rank > principal.role.rank:
        raise Invalid(
            f"A key's role may not exceed its principal's, which is {principal.role.value}.",
            param="role",
        )
    if expires_at is not None and expires_at <= work.now:
        raise Invalid("A key expires in the future, or never.", param="expires_at")
    _check_limits(limits)
    secret = work.ids.secret("sk")
    values: dict[str, Any] = {
        "id": work.ids.new("key"),
        "principal_id": principal_id,
        "organisation_id": principal.organisation_id,
        "project_id": project_id,
        "name": _name(name, "name"),
        "digest": digest_of(secret),
        "prefix": secret[:PREFIX_LENGTH],
        "role": own,
        "limits": limits,
        "created_at": work.now,
        "expires_at": expires_at,
        "revoked_at": None,
    }
    row = {**values, "limits": dataclasses.asdict(limits)}
    key = Key(**values, seq=store.insert(work.tx, store.keys, row))
    _tell(work, key, KeyChange.MADE)
    return key, secret


def _check_limits(limits: Limits) -> None:
    for field in dataclasses.fields(limits):
        value = getattr(limits, field.name)
        if isinstance(value, int) and value < 0:
            raise Invalid("A limit is a whole number from 0 up, or null.", param=field.name)
    for name in limits.models or ():
        _name(name, "models")


def revoke_key(work: Work, key_id: str) -> Key:
    """Refused from the next request on. Revoking twice is revoking once; raises KeyNotFound."""
    key = get_key(work.tx, key_id)
    if key.revoked_at is not None:
        return key
    store.revoke_keys(work.tx, work.now, store.keys.c.id == key_id)
    _tell(work, key, KeyChange.REVOKED)
    return dataclasses.replace(key, revoked_at=work.now)


def recover_owner(work: Work) -> tuple[Key, str]:
    """Revoke every key of the owner's first admin user and make a new one; audited.

    For whoever can read the data folder. Raises OrganisationNotFound before there is an owner.
    """
    owner = find_owner(work.tx)
    if owner is None:
        raise OrganisationNotFound("This installation has no owner yet: start it once first.")
    principals = store.principals.c
    [admin] = store.list_principals(
        work.tx,
        principals.organisation_id == owner.id,
        principals.kind == PrincipalKind.USER,
        principals.role == Role.ADMIN,
        limit=1,
    )
    _revoke_all(work, admin.id)
    key, secret = create_key(work, admin.id, name="recovered")
    audit(
        work,
        action="recover_owner",
        target=admin.id,
        result="ok",
        detail={"key_id": key.id},
        organisation_id=owner.id,
    )
    return key, secret


def authenticate(tx: Connection, secret: str, now: datetime) -> Identity:
    """Whose key this is, if it is valid at `now`; read afresh on every request.

    Raises Unauthenticated, with one code for unknown, expired and revoked alike.
    """
    found = store.find_bearer(tx, digest_of(secret))
    if found is None:
        raise Unauthenticated()
    organisation, principal, key = found
    if not key.is_valid_at(now) or principal.removed_at is not None:
        raise Unauthenticated("This key has expired or was revoked: use a new one.")
    return Identity(organisation=organisation, principal=principal, key=key)


def digest_of(secret: str) -> str:
    # One round is enough: a secret has 160 bits of chance, so there is nothing to guess.
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def set_standing(
    work: Work, organisation_id: str, standing: Standing | str, why: str
) -> Organisation:
    """Change what an organisation may do; audited, and told by StandingChanged.

    Raises OrganisationNotFound, Invalid for the owner, which is always in good standing.
    """
    standing = _choice(Standing, standing, "standing")
    organisations = store.organisations.c
    before = store.find_organisation(work.tx, organisations.id == organisation_id, lock=True)
    if before is None:
        raise OrganisationNotFound()
    if before.kind is OrganisationKind.OWNER:
        raise Invalid("The owner's standing does not change.", param="organisation_id")
    if standing is before.standing:
        return before
    after = dataclasses.replace(before, standing=standing, version=before.version + 1)
    store.update_organisation(work.tx, after)
    work.emit(
        StandingChanged(
            organisation_id=organisation_id,
            before=before.standing.value,
            after=standing.value,
            why=why,
        )
    )
    audit(
        work,
        action="set_standing",
        target=organisation_id,
        result="ok",
        detail={"before": before.standing.value, "after": standing.value, "why": why},
        organisation_id=organisation_id,
    )
    return after


def set_budget(work: Work, budget: Budget) -> Budget:
    """Limit a scope's spending by period; replaces the limit of that period.

    Raises Invalid, and NotFound where the scope does not exist.
    """
    _choice(ScopeKind, budget.scope_kind, "scope_kind")
    if budget.period not in get_args(Period):
        raise Invalid(f"`period` is one of {', '.join(get_args(Period))}.", param="period")
    if budget.limit_micros < 0:
        raise Invalid("A budget is not negative.", param="limit_micros")
    organisation_id = _organisation_of(work.tx, budget.scope_kind, budget.scope_id)
    store.set_budget(work.tx, organisation_id, budget)
    return budget


def clear_budget(work: Work, budget: Budget) -> None:
    """Take the limit of that scope and period away; none: no effect."""
    store.delete_budget(work.tx, budget)


def _organisation_of(tx: Connection, scope_kind: ScopeKind, scope_id: str) -> str:
    if scope_kind is ScopeKind.ORGANISATION:
        return get_organisation(tx, scope_id).id
    if scope_kind is ScopeKind.PROJECT:
        return get_project(tx, scope_id).organisation_id
    return get_key(tx, scope_id).organisation_id


def list_budgets(
    tx: Connection,
    *,
    organisation_id: str | None = None,
    project_id: str | None = None,
    key_id: str | None = None,
) -> list[Budget]:
    """The budgets set on these scopes: a purchase must fit each of them."""
    return store.list_budgets(
        tx,
        {
            ScopeKind.ORGANISATION: organisation_id,
            ScopeKind.PROJECT: project_id,
            ScopeKind.KEY: key_id,
        },
    )


def set_limits(work: Work, scope_kind: ScopeKind | str, scope_id: str, limits: Limits) -> Limits:
    """Limit a key, a project or an organisation; replaces the limits that it had.

    Told by KeyChanged or LimitsChanged. Raises Invalid, and NotFound where the scope does not
    exist.
    """
    scope_kind = _choice(ScopeKind, scope_kind, "scope_kind")
    _check_limits(limits)
    organisation_id = _organisation_of(work.tx, scope_kind, scope_id)
    if scope_kind is ScopeKind.KEY:
        store.set_key_limits(work.tx, scope_id, limits)
        _tell(work, get_key(work.tx, scope_id), KeyChange.LIMITS)
        return limits
    if limits.max_devices is not None:
        raise Invalid("`max_devices` is a limit of keys.", param="max_devices")
    found = ScopeLimits(
        scope_kind=scope_kind, scope_id=scope_id, organisation_id=organisation_id, limits=limits
    )
    store.set_limits(work.tx, found, work.now)
    work.emit(
        LimitsChanged(
            scope_kind=scope_kind.value, scope_id=scope_id, organisation_id=organisation_id
        )
    )
    return limits


def get_limits(tx: Connection, scope_kind: ScopeKind | str, scope_id: str) -> Limits:
    """A scope's own limits; NO_LIMITS where none are set. NotFound where it does not exist."""
    scope_kind = _choice(ScopeKind, scope_kind, "scope_kind")
    if scope_kind is ScopeKind.KEY:
        return get_key(tx, scope_id).limits
    _organisation_of(tx, scope_kind, scope_id)
    found = store.list_limits(tx, [scope_id])
    return found[0].limits if found else NO_LIMITS


def list_limits(tx: Connection, scope_ids: Sequence[str] | None = None) -> list[ScopeLimits]:
    """The limits set on these projects and organisations; None: on all of them."""
    return store.list_limits(tx, scope_ids)


def list_valid_keys(tx: Connection, now: datetime) -> list[ValidKey]:
    """Every key that is valid at `now`, oldest first: what a snapshot says of them."""
    return store.list_valid_keys(tx, now)


def find_valid_key(tx: Connection, key_id: str, now: datetime) -> ValidKey | None:
    """One of them; None: it is revoked, expired, its principal's gone, or there is none."""
    return store.find_valid_key(tx, key_id, now)


def find_owner(tx: Connection) -> Organisation | None:
    return store.find_organisation(tx, store.organisations.c.kind == OrganisationKind.OWNER)


def get_organisation(tx: Connection, organisation_id: str) -> Organisation:
    found = store.find_organisation(tx, store.organisations.c.id == organisation_id)
    if found is None:
        raise OrganisationNotFound()
    return found


def list_organisations(
    tx: Connection, *, after: int | None = None, limit: int = 100
) -> list[Organisation]:
    return store.list_organisations(tx, after, limit)


def find_nth_last_consumer(tx: Connection, n: int) -> Organisation | None:
    """The consumer that came n-th last (1: the last); None: so many have not come."""
    return store.find_nth_last_consumer(tx, n)


def get_project(tx: Connection, project_id: str) -> Project:
    found = store.find_project(tx, store.projects.c.id == project_id)
    if found is None:
        raise ProjectNotFound()
    return found


def list_projects(
    tx: Connection, organisation_id: str, *, after: int | None = None, limit: int = 100
) -> list[Project]:
    return store.list_projects(tx, organisation_id, after, limit)


def get_principal(tx: Connection, principal_id: str) -> Principal:
    """One that has not been removed."""
    found = store.list_principals(tx, store.principals.c.id == principal_id, limit=1)
    if not found:
        raise PrincipalNotFound()
    return found[0]


def list_principals(
    tx: Connection, organisation_id: str, *, after: int | None = None, limit: int = 100
) -> list[Principal]:
    return store.list_principals(
        tx, store.principals.c.organisation_id == organisation_id, after=after, limit=limit
    )


def list_users_by_email(tx: Connection, email: str, *, limit: int = 100) -> list[Principal]:
    """Users with that address in any organisation, so that sign-up can tell a second one."""
    return store.list_principals(tx, store.principals.c.email == valid_email(email), limit=limit)


def get_key(tx: Connection, key_id: str) -> Key:
    found = store.find_key(tx, key_id)
    if found is None:
        raise KeyNotFound()
    return found


def list_keys(
    tx: Connection, organisation_id: str, *, after: int | None = None, limit: int = 100
) -> list[Key]:
    """Keys of an organisation, revoked ones too, oldest first."""
    return store.list_keys(
        tx, store.keys.c.organisation_id == organisation_id, after=after, limit=limit
    )


def valid_email(text: str) -> str:
    """The address trimmed and in lower case. Raises Invalid (`email`)."""
    address = text.strip().lower()
    if len(address) > EMAIL_LENGTH or not _EMAIL.fullmatch(address) or not address.isprintable():
        raise Invalid("An email address looks like name@example.org.", param="email")
    return address


def _name(text: str, param: str) -> str:
    name = text.strip()
    if not 0 < len(name) <= NAME_LENGTH or not name.isprintable():
        raise Invalid(f"A name is 1 to {NAME_LENGTH} printable characters.", param=param)
    return name


E = TypeVar("E", bound=StrEnum)


def _choice(kinds: type[E], value: str, param: str) -> E:
    try:
        return kinds(value)
    except ValueError:
        choices = ", ".join(kind.value for kind in kinds)
        raise Invalid(f"`{param}` is one of {choices}.", param=param) from None
