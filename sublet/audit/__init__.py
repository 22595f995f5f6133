"""The auditor: what must always be true, checked on live state.

Owns     the invariants by name; docs/invariants.md lists each with the mutant that breaks it.
Always   it only reads; one look is one consistent view; a violation names the place.
Callers  `sublet audit-books`, the API for the owner, the tour, the rehearsal after every step.
"""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection

from sublet.audit import book, money, records, tokens, work
from sublet.audit.registry import INVARIANTS, Invariant, Look, Violation

_MODULES = (book, money, records, tokens, work)
MOST_DETAILS = 20
"""Places named for one invariant."""


def check(tx: Connection, now: datetime) -> list[Violation]:
    """Every invariant on one view of the database; empty: all hold."""
    look = Look(tx, now)
    found: list[Violation] = []
    for item in INVARIANTS.values():
        for number, detail in enumerate(item.predicate(look)):
            if number >= MOST_DETAILS:
                break
            found.append(Violation(name=item.name, statement=item.statement, detail=detail))
    return found


__all__ = ["INVARIANTS", "Invariant", "Violation", "check"]
