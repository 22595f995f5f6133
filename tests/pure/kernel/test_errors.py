"""The families of errors are what their page says, and each says what to do next."""

from __future__ import annotations

import re

import pytest

from sublet.base.kernel import errors
from sublet.base.kernel.errors import Invalid, SubletError

FAMILIES = [
    found
    for found in vars(errors).values()
    if isinstance(found, type) and issubclass(found, SubletError) and found is not SubletError
]


def test_the_tree_drawn_is_the_tree_there_is() -> None:
    drawn = re.findall(r"[├└]── (\w+) +(\d{3})", errors.__doc__ or "")
    assert {(name, int(status)) for name, status in drawn} == {
        (family.__name__, family.status) for family in FAMILIES
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_a_code_of_its_own_and_a_message(family: type[SubletError]) -> None:
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", family.code)
    assert [other for other in FAMILIES if other.code == family.code] == [family]
    assert family.__doc__
    assert family().message == family.__doc__.strip()


def test_an_error_carries_what_an_answer_needs() -> None:
    error = Invalid("`count` is a whole number.", param="count", earliest_at=None)
    assert (str(error), error.param) == ("`count` is a whole number.", "count")
    assert error.details == {"earliest_at": None}
