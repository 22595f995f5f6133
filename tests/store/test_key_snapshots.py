"""What a snapshot is made of: valid keys, limits of every scope, and the events that stale it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.errors import Invalid
from sublet.base.kernel.ids import SeededIds
from sublet.base.store import Actor, Store, Work, metadata, open_store, pending
from sublet.records import tenancy
from sublet.records.tenancy import Action, KeyChanged, Limits, LimitsChanged, Role

START = datetime(2026, 11, 2, 12, tzinfo=UTC)
SYSTEM = Actor.system("test")


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(START)


@pytest.fixture
def store(tmp_path: Path, clock: VirtualClock) -> Iterator[Store]:
    made = open_store(f"sqlite:///{tmp_path / 'sublet.db'}", clock, SeededIds(1))
    metadata.create_all(made.engine)
    yield made
    made.close()


def a_principal(work: Work, role: str = "admin", **organisation: Any) -> tenancy.Principal:
    made = tenancy.create_organisation(work, **{"name": "Acme", "standing": "good", **organisation})
    return tenancy.create_principal(work, made.id, kind="user", name="Ada", role=role)


def valid(store: Store, now: datetime) -> list[str]:
    with store.read() as tx:
        return [key.key_id for key in tenancy.list_valid_keys(tx, now)]


def test_valid_keys_say_what_a_snapshot_needs(store: Store) -> None:
    with store.work(SYSTEM) as work:
        ada = a_principal(work)
        project = tenancy.create_project(work, ada.organisation_id, "chat")
        limits = Limits(tokens_per_minute=7, models=("b", "a", "b"))
        until = START + timedelta(hours=1)
        key, secret = tenancy.create_key(
            work,
            ada.id,
            name="k",
            project_id=project.id,
            role="member",
            expires_at=until,
            limits=limits,
        )
        owner = a_principal(work, kind="owner", role="viewer")
        tenancy.create_key(work, owner.id, name="o")
        identity = tenancy.authenticate(work.tx, secret, work.now)
    with store.read() as tx:
        mine, owners = tenancy.list_valid_keys(tx, START)
        assert tenancy.find_valid_key(tx, key.id, START) == mine
    assert mine == tenancy.ValidKey(
        digest=key.digest,
        key_id=key.id,
        organisation_id=ada.organisation_id,
        organisation_kind=tenancy.OrganisationKind.CONSUMER,
        standing=tenancy.Standing.GOOD,
        project_id=project.id,
        role=Role.MEMBER,
        expires_at=until,
        limits=Limits(tokens_per_minute=7, models=("a", "b")),
    )
    assert identity.limits == mine.limits
    assert (owners.is_first_party, mine.is_first_party) == (True, False)
    assert (owners.role, owners.project_id, owners.expires_at) == (Role.VIEWER, None, None)


def test_a_key_that_is_dead_by_any_cause_is_not_among_them(
    store: Store, clock: VirtualClock
) -> None:
    with store.work(SYSTEM) as work:
        ada = a_principal(work)
        bob = tenancy.create_principal(
            work, ada.organisation_id, kind="user", name="Bob", role="member"
        )
        stays, _ = tenancy.create_key(work, ada.id, name="stays")
        until = START + timedelta(seconds=1)
        expires, _ = tenancy.create_key(work, ada.id, name="expires", expires_at=until)
        revoked, _ = tenancy.create_key(work, ada.id, name="revoked")
        of_bob, _ = tenancy.create_key(work, bob.id, name="of bob")
    made = [stays.id, expires.id, revoked.id, of_bob.id]
    assert valid(store, START) == made
    assert valid(store, until) == [stays.id, revoked.id, of_bob.id]
    clock.advance_to(until)
    with store.work(SYSTEM) as work:
        tenancy.revoke_key(work, revoked.id)
        tenancy.remove_principal(work, bob.id)
    assert valid(store, until) == [stays.id]
    with store.read() as tx:
        assert tenancy.find_valid_key(tx, of_bob.id, until) is None


@pytest.mark.parametrize("kind", ["consumer", "owner"])
def test_whether_a_valid_key_may_call_is_what_its_identity_may(store: Store, kind: str) -> None:
    with store.work(SYSTEM) as work:
        for standing in tenancy.Standing if kind == "consumer" else [tenancy.Standing.GOOD]:
            made = tenancy.create_organisation(work, name="A", kind=kind, standing=standing)
            project = tenancy.create_project(work, made.id, "p")
            for role in Role:
                who = tenancy.create_principal(
                    work, made.id, kind="service_account", name="S", role=role
                )
                for bound in (None, project.id):
                    key, secret = tenancy.create_key(work, who.id, name="k", project_id=bound)
                    found = tenancy.find_valid_key(work.tx, key.id, work.now)
                    assert found is not None
                    identity = tenancy.authenticate(work.tx, secret, work.now)
                    for action in (Action.CALL_MODELS, Action.DEPLOY, Action.MANAGE_MODELS):
                        may = tenancy.may(
                            found.organisation_kind,
                            found.standing,
                            found.role,
                            found.project_id,
                            action,
                        )
                        assert may == (action in identity.actions)


def test_what_makes_a_snapshot_stale_is_told(store: Store) -> None:
    with store.work(SYSTEM) as work:
        ada = a_principal(work)
        bob = tenancy.create_principal(
            work, ada.organisation_id, kind="user", name="Bob", role="member"
        )
        first, _ = tenancy.create_key(work, ada.id, name="first")
        second, _ = tenancy.create_key(work, bob.id, name="second")
        third, _ = tenancy.create_key(work, bob.id, name="third")
        tenancy.set_limits(work, "key", first.id, Limits(tokens_per_day=5))
        tenancy.revoke_key(work, third.id)
        tenancy.revoke_key(work, third.id)
        tenancy.change_role(work, bob.id, "viewer")
        tenancy.change_role(work, bob.id, "viewer")
        tenancy.remove_principal(work, bob.id)
        tenancy.set_limits(work, "organisation", ada.organisation_id, Limits(tokens_per_day=9))
    with store.read() as tx:
        told = [
            (event.key_id, event.change)
            for event in (e.read(KeyChanged) for e in pending(tx, "test", [KeyChanged]))
        ]
        [limits] = [e.read(LimitsChanged) for e in pending(tx, "test", [LimitsChanged])]
    assert told == [
        (first.id, "made"),
        (second.id, "made"),
        (third.id, "made"),
        (first.id, "limits"),
        (third.id, "revoked"),
        (second.id, "role"),
        (second.id, "revoked"),
    ]
    assert (limits.scope_kind, limits.scope_id) == ("organisation", ada.organisation_id)


def test_limits_are_kept_by_scope_and_replaced(store: Store) -> None:
    with store.work(SYSTEM) as work:
        ada = a_principal(work)
        org = ada.organisation_id
        project = tenancy.create_project(work, org, "chat")
        key, _ = tenancy.create_key(work, ada.id, name="k", limits=Limits(max_devices=1))
        assert tenancy.get_limits(work.tx, "organisation", org) == tenancy.NO_LIMITS
        tenancy.set_limits(work, "organisation", org, Limits(tokens_per_day=5))
        tenancy.set_limits(work, "organisation", org, Limits(requests_per_minute=6))
        tenancy.set_limits(work, "project", project.id, Limits(models=("a",)))
        tenancy.set_limits(work, "key", key.id, Limits(max_devices=2))
    with store.read() as tx:
        assert tenancy.get_limits(tx, "organisation", org) == Limits(requests_per_minute=6)
        assert tenancy.get_limits(tx, "project", project.id) == Limits(models=("a",))
        assert tenancy.get_limits(tx, "key", key.id) == Limits(max_devices=2)
        everywhere = tenancy.list_limits(tx)
        assert [found.scope_id for found in everywhere] == [org, project.id]
        assert {found.organisation_id for found in everywhere} == {org}
        assert tenancy.list_limits(tx, [project.id, "prj_none"]) == everywhere[1:]


def test_wrong_limits_are_refused_by_name(store: Store) -> None:
    with store.work(SYSTEM) as work:
        org = a_principal(work).organisation_id
        for param, limits in {
            "max_devices": Limits(max_devices=1),
            "tokens_per_day": Limits(tokens_per_day=-1),
            "models": Limits(models=("",)),
        }.items():
            with pytest.raises(Invalid) as refused:
                tenancy.set_limits(work, "organisation", org, limits)
            assert refused.value.param == param
        with pytest.raises(Invalid):
            tenancy.set_limits(work, "planet", org, Limits())
        with pytest.raises(tenancy.ProjectNotFound):
            tenancy.set_limits(work, "project", "prj_none", Limits())
        with pytest.raises(tenancy.KeyNotFound):
            tenancy.get_limits(work.tx, "key", "key_none")
