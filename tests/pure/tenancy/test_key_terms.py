"""A key passes on at most what it may do itself."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.errors import Forbidden
from sublet.records.tenancy import (
    Identity,
    Key,
    KeyTerms,
    Limits,
    Organisation,
    OrganisationKind,
    Principal,
    PrincipalKind,
    Role,
    Standing,
    inherited,
)

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
LIMITS = st.builds(
    Limits,
    max_devices=st.sampled_from([None, 0, 1, 2]),
    requests_per_minute=st.sampled_from([None, 1, 2]),
    tokens_per_day=st.sampled_from([None, 0, 5]),
    models=st.sampled_from([None, (), ("a",), ("a", "b")]),
)
TERMS = st.builds(
    KeyTerms,
    project_id=st.sampled_from([None, "prj_a", "prj_b"]),
    role=st.sampled_from([None, *Role]),
    expires_at=st.sampled_from([None, NOON, NOON + timedelta(days=1)]),
    limits=LIMITS,
)


def a_principal(role: Role) -> Principal:
    return Principal(
        id="usr_1",
        seq=1,
        organisation_id="org_1",
        kind=PrincipalKind.USER,
        email=None,
        name="Ada",
        role=role,
        created_at=NOON,
        removed_at=None,
        version=1,
    )


def a_maker(terms: KeyTerms, role: Role = Role.ADMIN) -> Identity:
    return Identity(
        organisation=Organisation(
            id="org_1",
            seq=1,
            name="Acme",
            kind=OrganisationKind.CONSUMER,
            standing=Standing.GOOD,
            currency="USD",
            created_at=NOON,
            version=1,
        ),
        principal=a_principal(role),
        key=Key(
            id="key_1",
            seq=1,
            principal_id="usr_1",
            organisation_id="org_1",
            project_id=terms.project_id,
            name="k",
            digest="",
            prefix="sk_",
            role=terms.role,
            limits=terms.limits,
            created_at=NOON,
            expires_at=terms.expires_at,
            revoked_at=None,
        ),
    )


@given(own=TERMS, asked=TERMS, maker_is=st.sampled_from(Role), heir_is=st.sampled_from(Role))
def test_no_key_makes_one_that_may_do_more(
    own: KeyTerms, asked: KeyTerms, maker_is: Role, heir_is: Role
) -> None:
    maker, heir = a_maker(own, maker_is), a_principal(heir_is)
    try:
        made = inherited(maker, heir, asked)
    except Forbidden as refused:
        made, param = None, refused.param or ""
    if made is None:
        # It names a field that was asked for.
        name, _, limit = param.partition(".")
        wanted = getattr(asked, name)
        assert (getattr(wanted, limit) if limit else wanted) is not None
        return
    assert own.project_id in (None, made.project_id)
    assert (heir_is if made.role is None else heir_is.up_to(made.role)).rank <= maker.role.rank
    if own.expires_at is not None:
        assert made.expires_at is not None
        assert made.expires_at <= own.expires_at
    for field in dataclasses.fields(Limits):
        most, given_ = getattr(own.limits, field.name), getattr(made.limits, field.name)
        within = set(given_ or ()) <= set(most or ()) if field.name == "models" else None
        assert most is None or (
            given_ is not None and (given_ <= most if within is None else within)
        )
    # What was asked for and granted is had as it was asked for.
    for name in ("project_id", "role", "expires_at"):
        assert getattr(asked, name) in (None, getattr(made, name))


@pytest.mark.parametrize(
    ("param", "asked"),
    [
        ("project_id", KeyTerms(project_id="prj_b")),
        ("role", KeyTerms(role=Role.ADMIN)),
        ("expires_at", KeyTerms(expires_at=NOON + timedelta(seconds=1))),
        ("limits.max_devices", KeyTerms(limits=Limits(max_devices=2))),
        ("limits.models", KeyTerms(limits=Limits(models=("a", "c")))),
    ],
)
def test_asking_for_more_names_the_field(param: str, asked: KeyTerms) -> None:
    own = KeyTerms(
        project_id="prj_a",
        role=Role.MEMBER,
        expires_at=NOON,
        limits=Limits(max_devices=1, models=("a", "b")),
    )
    with pytest.raises(Forbidden) as refused:
        inherited(a_maker(own), a_principal(Role.ADMIN), asked)
    assert refused.value.param == param


def test_an_unlimited_key_passes_on_what_it_is_asked_for() -> None:
    asked = KeyTerms(limits=Limits(max_devices=5), expires_at=NOON)
    assert inherited(a_maker(KeyTerms()), a_principal(Role.VIEWER), asked) == asked
