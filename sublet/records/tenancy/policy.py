"""What a key may do: one table of roles, one of standings, and their intersection. Pure.

    action                        viewer member admin     owner's organisation only
    read                            ×      ×     ×
    read_money                      ×      ×     ×
    rent, stop, attach                     ×     ×
    call_models                            ×     ×
    manage_projects … read_audit                 ×
    read_fleet, read_books          ×      ×     ×        ×
    use_first_party, deploy                ×     ×        ×
    administer_fleet … manage_models             ×        ×

A key bound to a project does what concerns that project, and nothing of the whole organisation.
Another organisation's things do not exist for a key, but for the money and the audit of consumers,
which the owner's admins read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from sublet.base.kernel.errors import Forbidden
from sublet.base.store import Actor
from sublet.records.tenancy.model import (
    NO_LIMITS,
    Key,
    Limits,
    Organisation,
    OrganisationKind,
    OrganisationNotFound,
    Principal,
    ProjectNotFound,
    QuotaExceeded,
    Role,
    Standing,
    StandingForbids,
)


class Action(StrEnum):
    """An act of the product that is allowed or refused as a whole."""

    READ = "read"
    """See offers, quotes, workloads and their logs, recalls that concern one."""
    READ_MONEY = "read_money"
    """Balance, usage, invoices, budgets."""
    RENT = "rent"
    """Quote, create, start, change."""
    STOP = "stop"
    """Stop, cancel, terminate."""
    ATTACH = "attach"
    """Log in, run commands, copy files."""
    CALL_MODELS = "call_models"
    """Send requests to models and be charged for their tokens."""
    MANAGE_PROJECTS = "manage_projects"
    MANAGE_KEYS = "manage_keys"
    MANAGE_MEMBERS = "manage_members"
    MANAGE_BUDGETS = "manage_budgets"
    READ_AUDIT = "read_audit"
    READ_FLEET = "read_fleet"
    """Nodes, devices by holder, claims, recalls, shortfalls, metrics."""
    READ_BOOKS = "read_books"
    """The owner's statement."""
    USE_FIRST_PARTY = "use_first_party"
    """File the owner's own claims and run on them."""
    DEPLOY = "deploy"
    """Put models on the fleet's devices, scale and retire them."""
    ADMINISTER_FLEET = "administer_fleet"
    """Cordon and drain, costs, firm shelf, broken notices."""
    RECALL = "recall"
    """Plan, accept, cancel and return recalls."""
    SET_PRICES = "set_prices"
    ADMINISTER_ORGANISATIONS = "administer_organisations"
    """Standing, credit, payments, all organisations' lists."""
    MANAGE_MODELS = "manage_models"
    """The catalogue: models, their prices and lifecycle, who is granted a sealed one."""


_VIEWER = frozenset({Action.READ, Action.READ_MONEY})
_MEMBER = _VIEWER | {Action.RENT, Action.STOP, Action.ATTACH, Action.CALL_MODELS}
_ADMIN = _MEMBER | {
    Action.MANAGE_PROJECTS,
    Action.MANAGE_KEYS,
    Action.MANAGE_MEMBERS,
    Action.MANAGE_BUDGETS,
    Action.READ_AUDIT,
}
_OWNER_VIEWER = frozenset({Action.READ_FLEET, Action.READ_BOOKS})
_OWNER_MEMBER = _OWNER_VIEWER | {Action.USE_FIRST_PARTY, Action.DEPLOY}
_OWNER_ADMIN = _OWNER_MEMBER | {
    Action.ADMINISTER_FLEET,
    Action.RECALL,
    Action.SET_PRICES,
    Action.ADMINISTER_ORGANISATIONS,
    Action.MANAGE_MODELS,
}
ROLES: Mapping[tuple[OrganisationKind, Role], frozenset[Action]] = {
    (OrganisationKind.CONSUMER, Role.VIEWER): _VIEWER,
    (OrganisationKind.CONSUMER, Role.MEMBER): _MEMBER,
    (OrganisationKind.CONSUMER, Role.ADMIN): _ADMIN,
    (OrganisationKind.OWNER, Role.VIEWER): _VIEWER | _OWNER_VIEWER,
    (OrganisationKind.OWNER, Role.MEMBER): _MEMBER | _OWNER_MEMBER,
    (OrganisationKind.OWNER, Role.ADMIN): _ADMIN | _OWNER_ADMIN,
}
OWNERS_ACTS = _OWNER_ADMIN

_EVERYTHING = frozenset(Action)
# Who may not start anything must still end it, see what it cost, and revoke a key that leaked.
_WIND_DOWN = frozenset(
    {Action.READ, Action.READ_MONEY, Action.READ_AUDIT, Action.STOP, Action.MANAGE_KEYS}
)
STANDINGS: Mapping[Standing, frozenset[Action]] = {
    Standing.UNVERIFIED: _EVERYTHING,
    Standing.GOOD: _EVERYTHING,
    Standing.WARNED: _EVERYTHING,
    Standing.SUSPENDED: _WIND_DOWN,
    Standing.CLOSING: _WIND_DOWN,
}
UNVERIFIED_DEVICES = 1

_IN_A_PROJECT = _MEMBER | {Action.USE_FIRST_PARTY}
"""What a key bound to a project may do; its money only where the project is named."""
_ACROSS = frozenset({Action.READ_MONEY, Action.READ_AUDIT})
"""What the owner's admins may do in a consumer's organisation, beside the owner's own acts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who sent a request, as far as the key shows, and what the key may do."""

    organisation: Organisation
    principal: Principal
    key: Key

    @property
    def project_id(self) -> str | None:
        """The project the key is bound to; None: all of the organisation."""
        return self.key.project_id

    @property
    def role(self) -> Role:
        role = self.principal.role
        return role if self.key.role is None else role.up_to(self.key.role)

    @property
    def is_owner(self) -> bool:
        return self.organisation.kind is OrganisationKind.OWNER

    @property
    def limits(self) -> Limits:
        return self.key.limits

    @property
    def max_devices(self) -> int | None:
        """Devices this key may hold at a time: the least of its own and its standing's limit."""
        limits = [
            self.limits.max_devices,
            UNVERIFIED_DEVICES if self.is_unverified else None,
        ]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def is_unverified(self) -> bool:
        return self.organisation.standing is Standing.UNVERIFIED

    @property
    def actions(self) -> frozenset[Action]:
        """Role ∩ standing ∩ what the key is bound to."""
        by_role = ROLES[self.organisation.kind, self.role]
        found = by_role & STANDINGS[self.organisation.standing]
        return found if self.project_id is None else found & _IN_A_PROJECT

    def actor(self, address: str = "") -> Actor:
        """As the audit names it."""
        return Actor(id=self.key.id, organisation_id=self.organisation.id, address=address)


def may_under(standing: Standing, action: Action) -> bool:
    """Whether an organisation of that standing may do it at all, whoever asks."""
    return action in STANDINGS[standing]


def require(
    identity: Identity,
    action: Action,
    organisation_id: str | None = None,
    project_id: str | None = None,
) -> None:
    """Pass if this key may do `action` to a thing of that organisation and project.

    Raises OrganisationNotFound or ProjectNotFound where the thing is another's, StandingForbids
    where only the standing is in the way, Forbidden otherwise. Without `organisation_id` it is
    the key's own. The owner's acts concern no organisation's things.
    """
    own = organisation_id in (None, identity.organisation.id)
    by_role = ROLES[identity.organisation.kind, identity.role]
    if not own and action not in OWNERS_ACTS:
        may_cross = Action.ADMINISTER_ORGANISATIONS in identity.actions and action in _ACROSS
        if not may_cross:
            raise OrganisationNotFound()
    if own and identity.project_id is not None and project_id not in (None, identity.project_id):
        raise ProjectNotFound()
    if action not in by_role:
        raise Forbidden(
            f"The role {identity.role.value} may not {_words(action)}: ask an admin of the "
            "organisation."
            if action not in OWNERS_ACTS or identity.is_owner
            else "Only the owner of this cloud may do that.",
            action=action.value,
        )
    if not may_under(identity.organisation.standing, action):
        raise StandingForbids(
            f"The organisation is {identity.organisation.standing.value} and may not "
            f"{_words(action)}: it can read and stop what it has.",
            action=action.value,
            standing=identity.organisation.standing.value,
        )
    is_whole = action not in _IN_A_PROJECT or (action is Action.READ_MONEY and project_id is None)
    if identity.project_id is not None and is_whole:
        raise Forbidden(
            "This key is bound to a project and this concerns the whole organisation: use a key "
            "that is not bound.",
            action=action.value,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTerms:
    """What a new key is to be bound to; None: not bound in that way."""

    project_id: str | None = None
    role: Role | None = None
    expires_at: datetime | None = None
    limits: Limits = NO_LIMITS


def inherited(maker: Identity, principal: Principal, asked: KeyTerms) -> KeyTerms:
    """The terms of a key that `maker` makes for `principal`: what is left open is as the maker's own
    key is.

    Raises Forbidden naming the field where more is asked for than the maker's key may do itself:
    a limited key must not make its way out of its limits.
    """
    own = maker.key
    if own.project_id is not None and asked.project_id not in (None, own.project_id):
        raise _beyond("project_id", f"this key is bound to {own.project_id}")
    if asked.role is not None and asked.role.rank > maker.role.rank:
        raise _beyond("role", f"this key's role is {maker.role.value}")
    if own.expires_at is not None and (asked.expires_at or own.expires_at) > own.expires_at:
        raise _beyond("expires_at", f"this key expires at {own.expires_at.isoformat()}")
    limits: dict[str, Any] = {}
    for field in dataclasses.fields(Limits):
        most, wanted = getattr(own.limits, field.name), getattr(asked.limits, field.name)
        if most is not None and wanted is not None and _exceeds(wanted, most):
            raise _beyond(f"limits.{field.name}", f"this key's limit is {most}")
        limits[field.name] = most if wanted is None else wanted
    role = asked.role
    # A key without a role has its principal's, now and later, which may be more than the maker's.
    if role is None and (own.role is not None or principal.role.rank > maker.role.rank):
        role = maker.role.up_to(principal.role)
    return KeyTerms(
        project_id=asked.project_id or own.project_id,
        role=role,
        expires_at=asked.expires_at or own.expires_at,
        limits=Limits(**limits),
    )


def _exceeds(wanted: Any, most: Any) -> bool:
    """Numbers are limits from above, lists of names what there is to choose from."""
    if isinstance(most, tuple):
        return not set(wanted) <= set(most)
    return bool(wanted > most)


def may(
    kind: OrganisationKind, standing: Standing, role: Role, project_id: str | None, action: Action
) -> bool:
    """Whether a key of that role, bound to that project or to none, may do it."""
    in_scope = project_id is None or action in _IN_A_PROJECT
    return action in ROLES[kind, role] and may_under(standing, action) and in_scope


def _beyond(param: str, why: str) -> Forbidden:
    return Forbidden(
        f"{param}: a key makes no key that may do more than itself; {why}.", param=param
    )


def require_devices(identity: Identity, *, is_spot: bool, held: int, asked: int) -> None:
    """Pass if this key, whose organisation holds `held` devices, may have `asked` more.

    Raises QuotaExceeded with the limit.
    """
    if identity.is_unverified and not is_spot:
        raise QuotaExceeded(
            "An unverified organisation may rent spot only: add credit, or ask the owner.",
            standing=identity.organisation.standing.value,
        )
    limit = identity.max_devices
    if limit is not None and held + asked > limit:
        raise QuotaExceeded(
            f"At most {limit} devices at a time; {held} are held and {asked} more were asked for.",
            limit=limit,
            held=held,
            asked=asked,
        )


def _words(action: Action) -> str:
    return action.value.replace("_", " ")
