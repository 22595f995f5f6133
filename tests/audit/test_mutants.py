"""Every invariant sees its mutant, and no other cries out."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from sublet.audit import INVARIANTS, Violation

mutants = sys.modules["audit_mutants"]


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(books: Any, mutant: Any) -> None:
    books.change(mutant.mutate)
    found: list[Violation] = books.violations()
    assert {violation.name for violation in found} == {mutant.breaks, *mutant.also}, found
    statement = INVARIANTS[mutant.breaks].statement
    assert statement in {violation.statement for violation in found}
    assert all(violation.detail for violation in found)


def test_every_invariant_has_a_mutant() -> None:
    assert {mutant.breaks for mutant in mutants.MUTANTS} == set(INVARIANTS)


def test_every_invariant_has_a_mutant_of_its_own() -> None:
    """Those that always fall with another are named here, with the reason."""
    alone = {mutant.breaks for mutant in mutants.MUTANTS if not mutant.also}
    # Balances that do not sum to zero cannot all be the sums of transfers with two sides.
    assert set(INVARIANTS) - alone == {"transfers_balance"}


def test_mutants_say_what_they_change() -> None:
    assert [mutant.name for mutant in mutants.MUTANTS if not mutant.said.endswith(".")] == []
