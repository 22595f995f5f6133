"""Rows: the database, the Work that changes it, the outbox that tells others.

Owns     the engine settings of both dialects, `Work`, the outbox and its cursors, the
         installation's identity and its clock anchors.
Always   one Work is one transaction with one `now`, read after the write lock is held; an event is
         written in the transaction of what it tells; a reader never waits for the writer.
Callers  every package's `store`; edges and loops open Works, services never commit.
"""

from sublet.base.store.database import Store, StoreUnavailable, bare_engine, open_store
from sublet.base.store.outbox import Envelope, advance, pending
from sublet.base.store.types import Instant, Json, metadata
from sublet.base.store.work import Actor, Event, Work

__all__ = [
    "Actor",
    "Envelope",
    "Event",
    "Instant",
    "Json",
    "Store",
    "StoreUnavailable",
    "Work",
    "advance",
    "bare_engine",
    "metadata",
    "open_store",
    "pending",
]
