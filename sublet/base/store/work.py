"""One Work: one transaction, one `now`, one actor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, ClassVar

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.kernel.ids import Ids
from sublet.base.kernel.interval import from_micros, micros_since_epoch
from sublet.base.store.types import Instant, Json, metadata

outbox = sa.Table(
    "base_outbox",
    metadata,
    sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
    sa.Column("kind", sa.String(64), nullable=False, index=True),
    sa.Column("payload", Json, nullable=False),
    sa.Column("at", Instant, nullable=False),
    sqlite_autoincrement=True,
)

_TELL = outbox.insert()


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who does it, as the audit will name them. `system` acts for nobody's organisation."""

    id: str
    organisation_id: str | None = None
    address: str = ""

    @classmethod
    def system(cls, name: str) -> Actor:
        return cls(id=f"system:{name}")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. Subclasses live in the package that emits them.

    Fields are strings, integers, booleans, None, instants, or lists of strings.
    """

    kind: ClassVar[str]

    def payload(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            found[item.name] = micros_since_epoch(value) if isinstance(value, datetime) else value
        return found


@dataclass(slots=True)
class Work:
    """What a shell function gets first. Its owner commits or rolls back; nobody else does."""

    tx: Connection
    now: datetime
    ids: Ids
    actor: Actor
    emitted: list[Event] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    """Scratch of this one transaction, such as a pool's book after its changes."""

    def emit(self, event: Event) -> None:
        """Tell the packages above; the row commits with the Work."""
        self.tx.execute(_TELL, {"kind": event.kind, "payload": event.payload(), "at": self.now})
        self.emitted.append(event)

    def acting(self, actor: Actor) -> Work:
        """The same Work in another's name."""
        return dataclasses.replace(self, actor=actor)


def restore(event_type: type[Event], payload: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an event as they were given, instants included."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(event_type):
        value = payload[item.name]
        is_instant = "datetime" in str(item.type) and value is not None
        found[item.name] = from_micros(value) if is_instant else value
    return found
