"""Requests per minute of a key, sign-ups of an address: counted in memory, by this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime, timedelta

from sublet.base.kernel.errors import TooMany

MINUTE = timedelta(minutes=1)
NAMES_REMEMBERED = 100_000


class Pace:
    """A window of one minute a name, opened by its first request."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._windows: dict[str, tuple[datetime, int]] = {}

    def take(
        self, name: str, per_minute: int, what: str = "This key may send {} requests a minute"
    ) -> None:
        """Count one request under that name. Raises TooMany, which counts nothing."""
        now = self._now()
        with self._lock:
            opened, used = self._windows.get(name, (now, 0))
            if now - opened >= MINUTE:
                opened, used = now, 0
            if used >= per_minute:
                left = opened + MINUTE - now
                raise TooMany(
                    f"{what.format(per_minute)}: wait as long as `retry-after` says.",
                    limit=per_minute,
                    resets_at=opened + MINUTE,
                    retry_after_seconds=max(1, -(-left // timedelta(seconds=1))),
                )
            if len(self._windows) >= NAMES_REMEMBERED:
                self._windows = {k: w for k, w in self._windows.items() if now - w[0] < MINUTE}
            self._windows[name] = (opened, used + 1)
