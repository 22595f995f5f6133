"""What an invariant is, and the list of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection


@dataclass(frozen=True, slots=True)
class Look:
    """One consistent view of the database, and when it was taken."""

    tx: Connection
    now: datetime


Predicate = Callable[[Look], Iterator[str]]
"""Yields one sentence for each place where the invariant does not hold."""


@dataclass(frozen=True, slots=True)
class Invariant:
    name: str
    statement: str
    predicate: Predicate


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    """An invariant that does not hold, and where."""

    name: str
    statement: str
    detail: str


INVARIANTS: dict[str, Invariant] = {}


def invariant(statement: str) -> Callable[[Predicate], Predicate]:
    """Register a predicate under its function's name."""

    def keep(predicate: Predicate) -> Predicate:
        name = predicate.__name__
        assert name not in INVARIANTS
        INVARIANTS[name] = Invariant(name, statement, predicate)
        return predicate

    return keep
