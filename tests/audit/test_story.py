"""The database that the mutants break is sound, and holds something of everything."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from sublet.capacity.allocation.store import claims, placements
from sublet.records.metering.store import meters
from sublet.rights.owner.store import recall_rows, shortfalls
from sublet.shops.compute.store import runs, workloads


def test_story_is_sound(books: Any) -> None:
    assert books.violations() == []


def test_story_has_what_the_mutants_need(books: Any) -> None:
    with books.store.read() as tx:
        states = {row.spec["name"]: row.state for row in tx.execute(sa.select(workloads)).all()}
        assert states == {
            "done": "completed",
            "box": "interrupting",
            "train": "awaiting_capacity",
            "firm": "running",
            "also-firm": "running",
            "mine": "running",
        }
        assert tx.execute(sa.select(sa.func.count()).where(placements.c.level == 1)).scalar()
        delivered = tx.execute(sa.select(recall_rows.c.delivered_at)).scalars().all()
        assert [at is not None for at in delivered] == [True, False]
        assert len(tx.execute(sa.select(shortfalls)).all()) == 1
        assert tx.execute(sa.select(sa.func.max(runs.c.number))).scalar() == 2
        assert tx.execute(sa.select(claims.c.id).where(claims.c.noticed_at.is_not(None))).all()
        assert tx.execute(sa.select(meters).where(meters.c.party == "first_party")).all()
