"""Requests and tokens a minute: buckets that refill continuously, in exact integers.

A limit is shared by the gateways: each grants its share, rounded up. What one charges on an
estimate is put right when the truth is known; a bucket may so fall below zero and pays that back
before it grants again.
"""

from __future__ import annotations

MINUTE_NS = 60_000_000_000


class Bucket:
    """One limit of one scope, in this gateway. `limit` is the scope's own, `share` this gateway's.

    The level is kept in units of 1/60,000,000,000, so that a nanosecond refills exactly `share`.
    """

    __slots__ = ("_at_ns", "_full", "_level", "gateways", "limit", "share")

    def __init__(self, limit: int, gateways: int) -> None:
        self.limit = limit
        self.gateways = gateways
        self.share = max(-(-limit // gateways), 1)
        self._full = self._level = self.share * MINUTE_NS
        self._at_ns = 0

    def resize(self, limit: int, gateways: int) -> None:
        """Another limit, or another number of gateways: what was used stays used."""
        self.limit = limit
        self.gateways = gateways
        self.share = max(-(-limit // gateways), 1)
        full = self.share * MINUTE_NS
        self._level = min(self._level + max(full - self._full, 0), full)
        self._full = full

    def take(self, n: int, now_ns: int) -> bool:
        """Charge `n`, or change nothing and say so.

        More than this gateway's share, up to the whole limit, is granted from a full bucket and
        owed; more than the whole limit is never granted.
        """
        level = self._level + (now_ns - self._at_ns) * self.share
        if level > self._full:
            level = self._full
        self._at_ns = now_ns
        need = n * MINUTE_NS
        if level < need and (level < self._full or n > self.limit):
            self._level = level
            return False
        self._level = level - need
        return True

    def give_back(self, n: int) -> None:
        """Undo a charge, of a request that another limit refused."""
        self._level += n * MINUTE_NS

    def settle(self, difference: int) -> None:
        """Charge what came on top of the estimate; below zero: give it back."""
        self._level -= difference * MINUTE_NS

    def remaining(self, now_ns: int) -> int:
        """Of this gateway's share; never below zero."""
        level = self._level + (now_ns - self._at_ns) * self.share
        if level >= self._full:
            return self.share
        return level // MINUTE_NS if level > 0 else 0

    def told(self, now_ns: int) -> tuple[int, bytes]:
        """What remains, and the duration until the bucket is full if nothing more is taken."""
        level = self._level + (now_ns - self._at_ns) * self.share
        lacks = self._full - level
        if lacks <= 0:
            return self.share, b"0s"
        return level // MINUTE_NS if level > 0 else 0, duration(-(-lacks // self.share))

    def wait_ns(self, n: int, now_ns: int) -> int | None:
        """Until `n` would be granted; None: it never is."""
        if n > self.limit:
            return None
        level = self._level + (now_ns - self._at_ns) * self.share
        lacks = min(n * MINUTE_NS, self._full) - level
        return -(-lacks // self.share) if lacks > 0 else 0


def duration(ns: int) -> bytes:
    """As OpenAI writes durations: `6m0s`, `8.64s`, `1s`, `20ms`. To the millisecond, rounded up."""
    if ns <= 999_000_000:
        return b"%dms" % -(-ns // 1_000_000) if ns > 0 else b"0s"
    ms = -(-ns // 1_000_000)
    seconds, ms = divmod(ms, 1000)
    tail = b"s" if ms == 0 else (b".%03d" % ms).rstrip(b"0") + b"s"
    if seconds < 60:
        return b"%d%b" % (seconds, tail)
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return b"%dm%d%b" % (minutes, seconds, tail)
    hours, minutes = divmod(minutes, 60)
    return b"%dh%dm%d%b" % (hours, minutes, seconds, tail)
