"""Cover: how far ahead a running workload is paid for, and when its money ends. Pure.

A hold covers a run from its meter's last reading to an instant, `until`. The rules, from the
product page:

    ahead    max(15 min, notice + grace + scrub and two minutes): how far a renewal reaches; the
             two minutes keep a long notice from being renewed at every moment
    renew    a look before less than max(5 min, notice + grace + scrub) is left
    runway   the engine may run to `until` − scrub: a SIGTERM that comes late is still paid for
    stop     when the money reaches no further than grace + scrub + a look: the workload is
             stopped then, without notice, while the hold still covers its grace
    silence  neither hold nor runway grows for a run whose last evidence is older than 3 minutes
    end      a run whose SIGTERM is fixed, by notice or by purchase, needs cover to that SIGTERM
             + grace + scrub and no further

What a hold must cover is exact: `rate(used + the stretch ahead) − rate(used)`. Since posting is
always `rate(used) − already posted`, that difference is to the micro what will still be posted if
the run goes on to `until`, and each posting lowers it by exactly what it posts. So a balance that
has once covered its holds covers them until they end, and cannot become negative.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from sublet.base.kernel.interval import millis_between
from sublet.base.kernel.price import Terms, Window, rate

AHEAD_SECONDS = 900
RENEW_SECONDS = 300
LOOK_SECONDS = 10
"""How late a look may come without breaking a promise."""
SLACK_SECONDS = 120
SILENT_SECONDS = 180
"""A run that gave no evidence for this long is renewed no further until it does: its own supervisor
ends it at its runway, and its hold must not grow with a silence that is perhaps never billed."""

WARN_SECONDS = (86_400, 3_600, 900)
"""Credit ÷ burn at which a consumer is warned: 24 h, 1 h, 15 min."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """What of a contract decides how far it is covered."""

    notice_seconds: int
    grace_seconds: int
    scrub_seconds: int

    @property
    def _ending(self) -> int:
        return self.notice_seconds + self.grace_seconds + self.scrub_seconds

    @property
    def ahead(self) -> timedelta:
        return timedelta(seconds=max(AHEAD_SECONDS, self._ending + SLACK_SECONDS))

    @property
    def renew(self) -> timedelta:
        return timedelta(seconds=max(RENEW_SECONDS, self._ending) + LOOK_SECONDS)

    @property
    def stop(self) -> timedelta:
        return timedelta(seconds=self.grace_seconds + self.scrub_seconds + LOOK_SECONDS)

    def end(self, term_at: datetime) -> datetime:
        """Up to when a run with that SIGTERM has to be covered."""
        return term_at + timedelta(seconds=self.grace_seconds + self.scrub_seconds)

    def runway(self, until: datetime) -> datetime:
        return until - timedelta(seconds=self.scrub_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cover:
    """The hold as it should stand. `falls_short`: the money ends before a full renewal.

    `stop_at` is when the workload has to be stopped if no money comes; None while it need not.
    `look_at` is when to decide again; None where nothing will have to be renewed.
    """

    until: datetime
    amount_micros: int
    stop_at: datetime | None
    look_at: datetime | None

    @property
    def falls_short(self) -> bool:
        return self.stop_at is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """A contract in use: its terms, all it has used so far, and what it uses from here on."""

    terms: Terms
    used: tuple[Window, ...]
    devices: int
    metered_to: datetime

    def still_to_post(self, until: datetime) -> int:
        """Micros that posting adds if the run goes on to `until`."""
        if until <= self.metered_to:
            return 0
        ahead = Window(start=self.metered_to, end=until, units=self.devices)
        total = rate(self.terms, [*self.used, ahead]).amount.micros
        return total - rate(self.terms, self.used).amount.micros

    def reach(self, latest: datetime, affordable_micros: int) -> datetime:
        """How far the money carries, to the millisecond, at most to `latest`."""
        if self.still_to_post(latest) <= affordable_micros:
            return latest
        low, high = 0, max(0, millis_between(self.metered_to, latest))
        while low < high:
            middle = (low + high + 1) // 2
            then = self.metered_to + timedelta(milliseconds=middle)
            if self.still_to_post(then) <= affordable_micros:
                low = middle
            else:
                high = middle - 1
        return self.metered_to + timedelta(milliseconds=low)


def cover(
    ahead: Ahead,
    running: Running,
    *,
    held_until: datetime | None,
    term_at: datetime | None,
    affordable_micros: int,
    now: datetime,
) -> Cover:
    """How the hold of a run should stand now.

    `term_at`: its SIGTERM, where that is fixed. `affordable_micros` is the most the hold may be:
    what is available plus what it holds already, and no more than its budgets leave. While the
    money suffices a hold never becomes shorter.
    """
    wanted = now + ahead.ahead
    if term_at is not None:
        wanted = min(wanted, ahead.end(term_at))
    if held_until is not None and held_until - now >= ahead.renew:
        wanted = held_until
    elif held_until is not None:
        wanted = max(wanted, held_until)
    until = running.reach(wanted, affordable_micros)
    stop_at: datetime | None = None
    look_at: datetime | None = None
    if until < wanted:
        stop_at = look_at = until - ahead.stop
    elif term_at is None or until < ahead.end(term_at):
        look_at = until - ahead.renew
    return Cover(
        until=until,
        amount_micros=running.still_to_post(until),
        stop_at=stop_at,
        look_at=look_at,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Burn:
    """What one running contract costs an hour at the price in force."""

    devices: int
    price_micros: int
    per: int


def burn_micros_per_hour(burns: Iterable[Burn]) -> int:
    """Rounded up, so that a runway is never said to be longer than it is."""
    return sum(-(-b.devices * b.price_micros * 3_600_000 // b.per) for b in burns)


def runs_out_at(credit_micros: int, burn_micros: int, now: datetime) -> datetime | None:
    """When the credit ends at this burn; None where nothing burns. At most 100 years ahead."""
    if burn_micros <= 0:
        return None
    seconds = max(0, credit_micros) * 3600 // burn_micros
    return now + timedelta(seconds=min(seconds, 100 * 365 * 86_400))


@dataclass(frozen=True, slots=True, kw_only=True)
class Warnings:
    """Thresholds to say now, and thresholds said before that a top-up has put out of force."""

    say: tuple[int, ...]
    rearm: tuple[int, ...]
    next_at: datetime | None


def warnings(ends_at: datetime | None, said: Collection[int], now: datetime) -> Warnings:
    """Which warnings are due. Each is said once; what has passed already is said at once.

    A threshold counts again only when the runway is a tenth above it: a price that goes up and
    down by a little must not warn twice.
    """
    if ends_at is None:
        return Warnings(say=(), rearm=(), next_at=None)
    left_ms = millis_between(now, ends_at)
    say = tuple(t for t in WARN_SECONDS if left_ms <= t * 1000 and t not in said)
    rearm = tuple(t for t in sorted(said) if left_ms > t * 1100)
    ahead = [ends_at - timedelta(seconds=t) for t in WARN_SECONDS if left_ms > t * 1000]
    return Warnings(say=say, rearm=rearm, next_at=min(ahead, default=None))
