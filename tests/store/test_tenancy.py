"""Tenancy: keys, roles, standings, budgets, the audit, repeated requests."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.errors import Forbidden, Invalid, NotFound, SubletError, Unauthenticated
from sublet.base.kernel.ids import SeededIds
from sublet.base.store import Actor, Store, Work, metadata, open_store, pending
from sublet.records import tenancy
from sublet.records.tenancy import Action, Role, Standing
from sublet.records.tenancy import store as rows
from sublet.records.tenancy.policy import OWNERS_ACTS, ROLES, STANDINGS

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
SYSTEM = Actor.system("test")


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(NOON)


@pytest.fixture
def store(tmp_path: Path, clock: VirtualClock) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path}/tenancy.db", clock, SeededIds(1))
    metadata.create_all(opened.engine)
    yield opened
    opened.close()


def an_organisation(work: Work, name: str = "Acme", **more: Any) -> tenancy.Organisation:
    return tenancy.create_organisation(work, name=name, **{"standing": "good", **more})


def an_admin(work: Work, organisation: tenancy.Organisation, **more: Any) -> tenancy.Principal:
    fields = {"kind": "user", "name": "Ada", "role": "admin", **more}
    return tenancy.create_principal(work, organisation.id, **fields)


def sign_in(work: Work, secret: str) -> tenancy.Identity:
    return tenancy.authenticate(work.tx, secret, work.now)


def an_identity(
    work: Work,
    *,
    kind: str = "consumer",
    standing: str = "good",
    role: str = "admin",
    project: str | None = None,
    **key: Any,
) -> tenancy.Identity:
    organisation = an_organisation(work, kind=kind, standing=standing)
    bound = None
    if project is not None:
        bound = tenancy.create_project(work, organisation.id, project).id
    principal = an_admin(work, organisation, role=role)
    _, secret = tenancy.create_key(work, principal.id, name="k", project_id=bound, **key)
    return sign_in(work, secret)


def _refusal(identity: tenancy.Identity, action: Action, *thing: str | None) -> str | None:
    """The code with which the act is refused; None: it is allowed."""
    try:
        tenancy.require(identity, action, *thing)
    except SubletError as refused:
        return refused.code
    return None


# Keys


def test_a_secret_is_shown_once_and_kept_as_its_digest(store: Store) -> None:
    with store.work(SYSTEM) as work:
        organisation = an_organisation(work, " Acme  ")
        admin = an_admin(work, organisation, email=" Ada@Example.ORG ")
        key, secret = tenancy.create_key(
            work, admin.id, name="laptop", limits=tenancy.Limits(max_devices=2)
        )
    assert secret.startswith("sk_")
    assert key.prefix == secret[:8]
    assert key.digest == hashlib.sha256(secret.encode()).hexdigest()
    with store.read() as tx:
        dump = [
            tuple(row) for table in (rows.keys, rows.audit) for row in tx.execute(sa.select(table))
        ]
        assert secret not in repr(dump)
        identity = tenancy.authenticate(tx, secret, NOON)
        assert tenancy.list_keys(tx, organisation.id) == [key]
    assert identity.organisation == organisation
    assert identity.organisation.name == "Acme"
    assert identity.principal.email == "ada@example.org"
    assert identity.key == key
    assert (identity.role, identity.project_id, identity.is_owner) == (Role.ADMIN, None, False)
    assert identity.limits == tenancy.Limits(max_devices=2, requests_per_minute=None)
    actor = identity.actor("10.0.0.7")
    assert (actor.id, actor.organisation_id, actor.address) == (
        key.id,
        organisation.id,
        "10.0.0.7",
    )


def test_a2_a_revoked_key_is_refused_from_the_next_request_on(store: Store) -> None:
    with store.work(SYSTEM) as work:
        admin = an_admin(work, an_organisation(work))
        key, secret = tenancy.create_key(work, admin.id, name="k")
        other, other_secret = tenancy.create_key(work, admin.id, name="other")
    with store.work(SYSTEM) as work:
        revoked = tenancy.revoke_key(work, key.id)
        assert tenancy.revoke_key(work, key.id) == revoked
        assert revoked.revoked_at == NOON
        with pytest.raises(tenancy.KeyNotFound):
            tenancy.revoke_key(work, "key_none")
    with store.read() as tx:
        with pytest.raises(Unauthenticated) as refused:
            tenancy.authenticate(tx, secret, NOON)
        assert refused.value.code == "invalid_api_key"
        assert tenancy.authenticate(tx, other_secret, NOON).key == other


def test_a_key_expires_at_its_instant_and_not_before(store: Store) -> None:
    ends = NOON + timedelta(hours=1)
    with store.work(SYSTEM) as work:
        admin = an_admin(work, an_organisation(work))
        _, secret = tenancy.create_key(work, admin.id, name="k", expires_at=ends)
        with pytest.raises(Invalid) as refused:
            tenancy.create_key(work, admin.id, name="k", expires_at=NOON)
        assert refused.value.param == "expires_at"
    with store.read() as tx:
        tenancy.authenticate(tx, secret, ends - MICROSECOND)
        with pytest.raises(Unauthenticated):
            tenancy.authenticate(tx, secret, ends)


@pytest.mark.parametrize("secret", ["", "sk_", "sk_nobody", "Bearer x", "\udcff\x00é"])
def test_what_is_no_key_is_refused(store: Store, secret: str) -> None:
    with store.read() as tx, pytest.raises(Unauthenticated):
        tenancy.authenticate(tx, secret, NOON)


def test_removing_a_user_or_taking_a_role_works_at_once(store: Store) -> None:
    with store.work(SYSTEM) as work:
        organisation = an_organisation(work)
        an_admin(work, organisation)
        bob = an_admin(work, organisation, name="Bob", role="member", email="bob@example.org")
        _, secret = tenancy.create_key(work, bob.id, name="k")
    with store.work(SYSTEM) as work:
        tenancy.change_role(work, bob.id, "viewer")
        with pytest.raises(Forbidden):
            tenancy.require(sign_in(work, secret), Action.RENT)
        tenancy.remove_principal(work, bob.id)
        with pytest.raises(Unauthenticated):
            sign_in(work, secret)
        with pytest.raises(tenancy.PrincipalNotFound):
            tenancy.create_key(work, bob.id, name="again")
        assert [p.name for p in tenancy.list_principals(work.tx, organisation.id)] == ["Ada"]
        an_admin(work, organisation, email="bob@example.org")  # the address is free again


def test_a_key_of_a_removed_user_is_dead_even_if_it_were_not_revoked(store: Store) -> None:
    with store.work(SYSTEM) as work:
        organisation = an_organisation(work)
        an_admin(work, organisation)
        bob = an_admin(work, organisation, role="member")
        key, secret = tenancy.create_key(work, bob.id, name="k")
        tenancy.remove_principal(work, bob.id)
        work.tx.execute(rows.keys.update().where(rows.keys.c.id == key.id).values(revoked_at=None))
        with pytest.raises(Unauthenticated):
            sign_in(work, secret)


def test_an_organisation_keeps_an_admin(store: Store) -> None:
    with store.work(SYSTEM) as work:
        organisation = an_organisation(work)
        ada = an_admin(work, organisation)
        an_admin(work, organisation, name="Bob", role="member")
        an_admin(work, an_organisation(work, "Other"))
        for act in (
            lambda: tenancy.remove_principal(work, ada.id),
            lambda: tenancy.change_role(work, ada.id, Role.MEMBER),
        ):
            with pytest.raises(tenancy.LastAdmin):
                act()
        assert tenancy.change_role(work, ada.id, Role.ADMIN) == ada
        eve = an_admin(work, organisation, kind="service_account", name="Eve")
        assert tenancy.change_role(work, ada.id, "viewer").version == 2
        with pytest.raises(tenancy.LastAdmin):
            tenancy.remove_principal(work, eve.id)


def test_recovery_revokes_the_owners_keys_and_makes_one(store: Store) -> None:
    with store.work(SYSTEM) as work, pytest.raises(tenancy.OrganisationNotFound):
        tenancy.recover_owner(work)
    with store.work(SYSTEM) as work:
        owner = an_organisation(work, kind="owner")
        admin = an_admin(work, owner)
        old = [tenancy.create_key(work, admin.id, name=f"k{n}")[1] for n in range(2)]
        robot = an_admin(work, owner, kind="service_account", role="viewer")
        _, robots = tenancy.create_key(work, robot.id, name="robot")
        _, strangers = tenancy.create_key(work, an_admin(work, an_organisation(work)).id, name="k")
    with store.work(Actor.system("recover-owner")) as work:
        key, secret = tenancy.recover_owner(work)
        for lost in old:
            with pytest.raises(Unauthenticated):
                sign_in(work, lost)
        identity = sign_in(work, secret)
        assert (identity.key, identity.is_owner, identity.role) == (key, True, Role.ADMIN)
        tenancy.require(identity, Action.RECALL)
        sign_in(work, robots)
        sign_in(work, strangers)
        [row] = tenancy.list_audit(work.tx, owner.id)
    assert (row.action, row.target, row.actor_id) == (
        "recover_owner",
        admin.id,
        "system:recover-owner",
    )


# Policy


def test_each_role_may_do_what_the_lesser_ones_may() -> None:
    for kind in tenancy.OrganisationKind:
        for lesser, greater in itertools.pairwise(Role):
            assert ROLES[kind, lesser] < ROLES[kind, greater]
    for role in Role:
        consumer = ROLES[tenancy.OrganisationKind.CONSUMER, role]
        assert consumer < ROLES[tenancy.OrganisationKind.OWNER, role]
        assert not consumer & OWNERS_ACTS
    assert ROLES[tenancy.OrganisationKind.OWNER, Role.ADMIN] == set(Action)
    assert set(STANDINGS) == set(Standing)


@pytest.mark.parametrize("principal", list(Role))
@pytest.mark.parametrize("own", [None, *Role])
def test_a_keys_role_is_the_lesser_of_its_own_and_its_principals(
    store: Store, principal: Role, own: Role | None
) -> None:
    with store.work(SYSTEM) as work:
        organisation = an_organisation(work)
        an_admin(work, organisation)
        user = an_admin(work, organisation, name="U", role=principal)
        if own is not None and own.rank > principal.rank:
            with pytest.raises(Invalid) as refused:
                tenancy.create_key(work, user.id, name="k", role=own)
            assert refused.value.param == "role"
            return
        _, secret = tenancy.create_key(work, user.id, name="k", role=own)
        assert sign_in(work, secret).role is (own or principal)
        tenancy.change_role(work, user.id, "viewer")
        assert sign_in(work, secret).role is Role.VIEWER


def test_a_viewer_reads_a_member_rents_an_admin_manages(store: Store) -> None:
    expected = {
        "viewer": {Action.READ, Action.READ_MONEY},
        "member": {
            Action.READ,
            Action.READ_MONEY,
            Action.RENT,
            Action.STOP,
            Action.ATTACH,
            Action.CALL_MODELS,
        },
        "admin": set(Action) - OWNERS_ACTS,
    }
    with store.work(SYSTEM) as work:
        for role, allowed in expected.items():
            identity = an_identity(work, role=role)
            assert identity.actions == allowed
            assert {a for a in Action if not _refusal(identity, a)} == allowed
            assert {_refusal(identity, a) for a in set(Action) - allowed} == {"forbidden"}


def test_the_owners_acts_are_the_owners_alone(store: Store) -> None:
    with store.work(SYSTEM) as work:
        consumer = an_identity(work)
        owner = an_identity(work, kind="owner")
        with pytest.raises(Forbidden, match="Only the owner"):
            tenancy.require(consumer, Action.RECALL)
        for action in OWNERS_ACTS:
            assert _refusal(consumer, action) == "forbidden"
            tenancy.require(owner, action)
            tenancy.require(owner, action, consumer.organisation.id)


def test_anothers_things_do_not_exist_but_for_what_the_owner_administers(store: Store) -> None:
    with store.work(SYSTEM) as work:
        ada, bob = an_identity(work), an_identity(work)
        owner = an_identity(work, kind="owner")
        for action in set(Action) - OWNERS_ACTS:
            tenancy.require(ada, action, ada.organisation.id)
            assert _refusal(ada, action, bob.organisation.id) == "organisation_not_found"
        crossing = {a for a in Action if not _refusal(owner, a, bob.organisation.id)}
        assert crossing - OWNERS_ACTS == {Action.READ_MONEY, Action.READ_AUDIT}
        admin_id = owner.principal.id
        second = an_admin(work, owner.organisation)
        tenancy.change_role(work, admin_id, "member")
        assert second.role is Role.ADMIN
        _, secret = tenancy.create_key(work, admin_id, name="k")
        assert (
            _refusal(sign_in(work, secret), Action.READ_MONEY, bob.organisation.id)
            == "organisation_not_found"
        )


def test_a_key_bound_to_a_project_does_what_concerns_that_project(store: Store) -> None:
    with store.work(SYSTEM) as work:
        identity = an_identity(work, project="training")
        other = tenancy.create_project(work, identity.organisation.id, "other")
        mine = identity.project_id
        assert identity.actions == {
            Action.READ,
            Action.READ_MONEY,
            Action.RENT,
            Action.STOP,
            Action.ATTACH,
            Action.CALL_MODELS,
        }
        for action in identity.actions:
            assert _refusal(identity, action, None, mine) is None
            assert _refusal(identity, action, None, other.id) == "project_not_found"
        assert _refusal(identity, Action.READ) is None
        assert _refusal(identity, Action.READ_MONEY) == "forbidden"
        assert _refusal(identity, Action.MANAGE_KEYS, None, mine) == "forbidden"
        with pytest.raises(tenancy.ProjectNotFound):
            tenancy.create_key(
                work, an_admin(work, an_organisation(work)).id, name="k", project_id=other.id
            )


@pytest.mark.parametrize("standing", ["suspended", "closing"])
def test_who_is_suspended_or_closing_reads_and_stops_but_starts_nothing(
    store: Store, standing: str
) -> None:
    with store.work(SYSTEM) as work:
        identity = an_identity(work, standing=standing)
        for action in (Action.READ, Action.READ_MONEY, Action.STOP, Action.READ_AUDIT):
            tenancy.require(identity, action)
        for action in (Action.RENT, Action.ATTACH, Action.MANAGE_MEMBERS):
            with pytest.raises(tenancy.StandingForbids) as refused:
                tenancy.require(identity, action)
            assert refused.value.status == 403
            assert refused.value.details["standing"] == standing


def test_the_unverified_hold_one_spot_device(store: Store) -> None:
    with store.work(SYSTEM) as work:
        identity = an_identity(work, standing="unverified")
        tenancy.require(identity, Action.RENT)
        tenancy.require_devices(identity, is_spot=True, held=0, asked=1)
        for wrong in ((True, 0, 2), (True, 1, 1), (False, 0, 1)):
            with pytest.raises(tenancy.QuotaExceeded) as refused:
                tenancy.require_devices(identity, is_spot=wrong[0], held=wrong[1], asked=wrong[2])
            assert refused.value.code == "quota_exceeded"
        good = an_identity(work)
        assert good.max_devices is None
        tenancy.require_devices(good, is_spot=False, held=1000, asked=1000)


def test_limits_intersect(store: Store) -> None:
    with store.work(SYSTEM) as work:
        few = an_identity(work, limits=tenancy.Limits(max_devices=3))
        tenancy.require_devices(few, is_spot=False, held=1, asked=2)
        with pytest.raises(tenancy.QuotaExceeded) as refused:
            tenancy.require_devices(few, is_spot=False, held=2, asked=2)
        assert refused.value.details == {"limit": 3, "held": 2, "asked": 2}
        none = an_identity(work, standing="unverified", limits=tenancy.Limits(max_devices=0))
        assert none.max_devices == 0
        many = an_identity(work, standing="unverified", limits=tenancy.Limits(max_devices=9))
        assert many.max_devices == 1
        for wrong in (tenancy.Limits(max_devices=-1), tenancy.Limits(requests_per_minute=-1)):
            with pytest.raises(Invalid):
                tenancy.create_key(work, few.principal.id, name="k", limits=wrong)


def test_a_change_of_standing_is_told_and_audited_once(store: Store) -> None:
    with store.work(SYSTEM) as work:
        organisation = an_organisation(work)
        owner = an_organisation(work, "Owner", kind="owner")
    with store.work(SYSTEM) as work:
        changed = tenancy.set_standing(work, organisation.id, "suspended", "unpaid")
        assert (changed.standing, changed.version) == (Standing.SUSPENDED, 2)
        assert tenancy.set_standing(work, organisation.id, "suspended", "again") == changed
        with pytest.raises(Invalid):
            tenancy.set_standing(work, owner.id, "suspended", "no")
        with pytest.raises(Invalid) as refused:
            tenancy.set_standing(work, organisation.id, "excellent", "no")
        assert refused.value.param == "standing"
        with pytest.raises(tenancy.OrganisationNotFound):
            tenancy.set_standing(work, "org_none", "good", "no")
    with store.read() as tx:
        assert tenancy.get_organisation(tx, organisation.id) == changed
        [told] = pending(tx, "test", [tenancy.StandingChanged])
        assert told.read(tenancy.StandingChanged) == tenancy.StandingChanged(
            organisation_id=organisation.id, before="good", after="suspended", why="unpaid"
        )
        [row] = tenancy.list_audit(tx, organisation.id)
        assert row.detail == {"before": "good", "after": "suspended", "why": "unpaid"}


# Names, addresses, uniqueness


@pytest.mark.parametrize("name", ["", "   ", "x" * 121, "a\nb", "a\x00b", "a\u202eb"])
def test_names_are_short_and_printable(store: Store, name: str) -> None:
    with store.work(SYSTEM) as work:
        organisation = an_organisation(work)
        admin = an_admin(work, organisation)
        for act in (
            lambda: tenancy.create_organisation(work, name=name),
            lambda: tenancy.create_project(work, organisation.id, name),
            lambda: an_admin(work, organisation, name=name),
            lambda: tenancy.create_key(work, admin.id, name=name),
        ):
            with pytest.raises(Invalid) as refused:
                act()
            assert refused.value.param == "name"


@pytest.mark.parametrize(
    "email", ["", "ada", "@example.org", "ada@", "a b@example.org", "a@b@c", "a@b\n.org", "a" * 260]
)
def test_addresses_are_checked_simply(store: Store, email: str) -> None:
    with store.work(SYSTEM) as work, pytest.raises(Invalid) as refused:
        an_admin(work, an_organisation(work), email=email)
    assert refused.value.param == "email"


def test_names_and_addresses_are_taken_within_an_organisation(store: Store) -> None:
    with store.work(SYSTEM) as work:
        acme, other = an_organisation(work), an_organisation(work)
        tenancy.create_project(work, acme.id, "training")
        with pytest.raises(tenancy.NameTaken):
            tenancy.create_project(work, acme.id, " training ")
        tenancy.create_project(work, other.id, "training")
        ada = an_admin(work, acme, email="ada@example.org")
        with pytest.raises(tenancy.EmailTaken):
            an_admin(work, acme, email="ADA@example.org")
        twin = an_admin(work, other, email="ada@example.org")
        assert tenancy.list_users_by_email(work.tx, "Ada@example.org") == [ada, twin]
        with pytest.raises(Invalid):
            an_admin(work, acme, kind="service_account", email="bot@example.org")
        with pytest.raises(Invalid) as refused:
            an_admin(work, acme, role="king")
        assert refused.value.param == "role"
        assert "viewer, member, admin" in refused.value.message
        with pytest.raises(tenancy.OrganisationNotFound):
            tenancy.create_project(work, "org_none", "x")


def test_an_installation_has_one_owner(store: Store) -> None:
    with store.work(SYSTEM) as work:
        assert tenancy.find_owner(work.tx) is None
        owner = an_organisation(work, kind="owner")
        with pytest.raises(tenancy.OwnerExists):
            an_organisation(work, kind="owner")
        an_organisation(work, "Second")
        assert tenancy.find_owner(work.tx) == owner
        assert [o.name for o in tenancy.list_organisations(work.tx)] == ["Acme", "Second"]
        assert [o.name for o in tenancy.list_organisations(work.tx, after=owner.seq)] == ["Second"]


# Budgets


def test_budgets_that_apply_are_those_of_each_scope(store: Store) -> None:
    with store.work(SYSTEM) as work:
        identity = an_identity(work, project="training")
        org, prj, key = identity.organisation.id, identity.project_id, identity.key.id
        assert prj is not None
        month = tenancy.Budget(
            scope_kind=tenancy.ScopeKind.ORGANISATION, scope_id=org, period="month", limit_micros=9
        )
        day = tenancy.Budget(
            scope_kind=tenancy.ScopeKind.PROJECT, scope_id=prj, period="day", limit_micros=5
        )
        life = tenancy.Budget(
            scope_kind=tenancy.ScopeKind.KEY, scope_id=key, period="lifetime", limit_micros=7
        )
        for budget in (month, day, life):
            tenancy.set_budget(work, budget)
        listed = tenancy.list_budgets(work.tx, organisation_id=org, project_id=prj, key_id=key)
        assert listed == [life, month, day]
        assert tenancy.list_budgets(work.tx, organisation_id=org) == [month]
        assert tenancy.list_budgets(work.tx) == []
        more = tenancy.set_budget(
            work,
            tenancy.Budget(
                scope_kind=tenancy.ScopeKind.PROJECT, scope_id=prj, period="day", limit_micros=6
            ),
        )
        assert tenancy.list_budgets(work.tx, project_id=prj) == [more]
        tenancy.clear_budget(work, more)
        tenancy.clear_budget(work, more)
        assert tenancy.list_budgets(work.tx, project_id=prj) == []


@pytest.mark.parametrize(
    ("wrong", "param"),
    [({"period": "hour"}, "period"), ({"limit_micros": -1}, "limit_micros")],
)
def test_a_budget_that_makes_no_sense_is_refused(
    store: Store, wrong: dict[str, Any], param: str
) -> None:
    with store.work(SYSTEM) as work:
        organisation = an_organisation(work)
        fields: dict[str, Any] = {
            "scope_kind": tenancy.ScopeKind.ORGANISATION,
            "scope_id": organisation.id,
            "period": "day",
            "limit_micros": 1,
        }
        with pytest.raises(Invalid) as refused:
            tenancy.set_budget(work, tenancy.Budget(**{**fields, **wrong}))
        assert refused.value.param == param
        for kind in tenancy.ScopeKind:
            with pytest.raises(NotFound):
                tenancy.set_budget(
                    work, tenancy.Budget(**{**fields, "scope_kind": kind, "scope_id": "none"})
                )


# The audit


def test_the_audit_keeps_every_act_in_order(store: Store, clock: VirtualClock) -> None:
    ada = Actor(id="key_ada", organisation_id="org_a", address="10.0.0.7")
    with store.work(ada) as work:
        tenancy.audit(work, action=Action.RENT, target="ins_1", result="ok", detail={"n": 1})
    with contextlib.suppress(tenancy.KeyNotFound), store.work(ada) as work:
        tenancy.audit(work, action=Action.STOP, target="ins_2", result="ok")
        raise tenancy.KeyNotFound()
    clock.advance_to(NOON + MICROSECOND)
    with store.work(ada) as work:
        tenancy.audit(work, action=Action.STOP, target="ins_2", result="key_not_found")
        tenancy.audit(
            work.acting(Actor.system("billing")),
            action="issue_invoice",
            target="inv_1",
            result="ok",
            organisation_id="org_b",
        )
    with store.read() as tx:
        first, second, third = tenancy.list_audit(tx, None)
        assert tenancy.list_audit(tx, "org_a") == [first, second]
        assert tenancy.list_audit(tx, "org_a", after=first.seq) == [second]
        assert tenancy.list_audit(tx, None, limit=1) == [first]
    assert first == tenancy.AuditRow(
        seq=first.seq,
        at=NOON,
        actor_id="key_ada",
        organisation_id="org_a",
        address="10.0.0.7",
        action="rent",
        target="ins_1",
        result="ok",
        detail={"n": 1},
    )
    assert (second.result, second.at) == ("key_not_found", NOON + MICROSECOND)
    assert (third.actor_id, third.organisation_id) == ("system:billing", "org_b")


# Repeated requests (A1)

SCOPE = "prj_1 POST /v1/instances"


def test_a1_a_repeated_request_gets_the_first_answer(store: Store) -> None:
    with store.work(SYSTEM) as work:
        assert tenancy.find_answer(work, SCOPE, "k", "body-1") is None
        tenancy.keep_answer(work, SCOPE, "k", "body-1", 201, '{"id":"ins_1"}')
    with store.work(SYSTEM) as work:
        answer = tenancy.find_answer(work, SCOPE, "k", "body-1")
        assert answer == tenancy.Answer(status=201, body='{"id":"ins_1"}')
        with pytest.raises(tenancy.IdempotencyKeyReused) as refused:
            tenancy.find_answer(work, SCOPE, "k", "body-2")
        assert (refused.value.status, refused.value.code) == (422, "idempotency_key_reused")
        assert tenancy.find_answer(work, "prj_1 POST /v1/quotes", "k", "body-3") is None
        assert tenancy.find_answer(work, SCOPE, "other", "body-1") is None


@pytest.mark.parametrize("status", [199, 300, 402, 409, 422, 503])
def test_a1_what_failed_is_not_kept(store: Store, status: int) -> None:
    with store.work(SYSTEM) as work:
        tenancy.keep_answer(work, SCOPE, "k", "body-1", status, "{}")
        assert tenancy.find_answer(work, SCOPE, "k", "body-2") is None


def test_a1_an_answer_of_a_work_that_was_rolled_back_is_not_kept(store: Store) -> None:
    with contextlib.suppress(tenancy.KeyNotFound), store.work(SYSTEM) as work:
        tenancy.keep_answer(work, SCOPE, "k", "body-1", 201, "{}")
        raise tenancy.KeyNotFound()
    with store.work(SYSTEM) as work:
        assert tenancy.find_answer(work, SCOPE, "k", "body-2") is None


def test_a1_answers_are_kept_for_24_hours(store: Store, clock: VirtualClock) -> None:
    with store.work(SYSTEM) as work:
        tenancy.keep_answer(work, SCOPE, "k", "body-1", 201, "first")
        tenancy.keep_answer(work, SCOPE, "j", "body-1", 201, "first")
    clock.advance_to(NOON + timedelta(hours=24) - MICROSECOND)
    with store.work(SYSTEM) as work:
        assert tenancy.find_answer(work, SCOPE, "k", "body-1") is not None
    clock.advance_to(NOON + timedelta(hours=24))
    with store.work(SYSTEM) as work:
        assert tenancy.find_answer(work, SCOPE, "k", "body-2") is None
        tenancy.keep_answer(work, SCOPE, "k", "body-2", 200, "second")
        assert tenancy.find_answer(work, SCOPE, "k", "body-2") is not None
        kept = work.tx.execute(sa.select(sa.func.count()).select_from(rows.answers)).scalar_one()
        assert kept == 1, "what is older is swept"
