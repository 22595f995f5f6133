"""Keeps the installation's clock: one anchor per boot, steps of the wall recorded and slewed."""

from __future__ import annotations

from datetime import datetime, timedelta

import sqlalchemy as sa
import structlog

from sublet.base.kernel import clock as kernel_clock
from sublet.base.kernel.clock import Anchor, SystemClock
from sublet.base.kernel.interval import from_micros, micros_since_epoch
from sublet.base.store import Actor, Store
from sublet.base.store.installation import (
    keep_anchor,
    keep_fact,
    last_seen,
    list_anchors,
)

log = structlog.get_logger()

LEAD_NS = 5_000_000_000
"""An anchor takes effect this much later, so that every process has read it by then."""
ALIVE_EVERY = timedelta(seconds=5)


def anchored(engine: sa.Engine) -> SystemClock:
    """The clock of this installation and boot; makes the first anchor of a new boot.

    UTC never runs backwards: a boot whose wall clock lies before the last instant seen begins there.
    """
    boot_id, boot_ns = kernel_clock.read_boot_id(), kernel_clock.read_boot_ns()
    with engine.begin() as tx:
        found = list_anchors(tx, boot_id)
        if not found:
            wall_us = kernel_clock.read_wall_us()
            seen = last_seen(tx)
            seen_us = None if seen is None else micros_since_epoch(seen)
            anchor = kernel_clock.first_anchor(boot_id, boot_ns, wall_us, seen_us)
            keep_anchor(tx, anchor, wall_us=wall_us)
            found = [anchor]
    return SystemClock(found)


class ClockLoop:
    """Says that the loops are alive, and disciplines the clock."""

    def __init__(self, store: Store, clock: SystemClock) -> None:
        self._store = store
        self._clock = clock

    def step(self, now: datetime) -> datetime:
        with self._store.work(Actor.system("clock")) as work:
            keep_fact(work, "alive", "loops")
            anchors = list_anchors(work.tx, self._clock.boot_id())
            added = self._discipline(anchors)
            if added is not None:
                keep_anchor(work.tx, added, wall_us=kernel_clock.read_wall_us())
                anchors = [*anchors, added]
        if added is not None:
            log.warning(
                "clock_slewed",
                rate_ppm=added.rate_ppm,
                wall=str(from_micros(kernel_clock.read_wall_us())),
                clock=str(self._clock.now()),
            )
        self._clock.adopt(anchors)
        return now + ALIVE_EVERY

    def _discipline(self, anchors: list[Anchor]) -> Anchor | None:
        here = kernel_clock.read_boot_ns()
        if anchors[-1].boot_ns > here:
            return None
        effective = here + LEAD_NS
        wall_us = kernel_clock.read_wall_us() + LEAD_NS // 1000
        return kernel_clock.discipline(anchors, effective, wall_us)
