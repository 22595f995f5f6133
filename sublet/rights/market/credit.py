"""What a run that the owner ended gets back. Pure.

Which causes are the owner's, what of the run is then free, and the sentence that says so in the
quote. How much it is, `price.rate` says over the free part of what was metered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sublet.base.kernel.interval import Interval
from sublet.base.kernel.price import Window
from sublet.capacity.allocation import Displacement, DisplacementRule
from sublet.rights.market.model import Closed, Product

YOUNG_RUN_SECONDS = 600
RULES = {
    Product.SPOT: DisplacementRule.YOUNG_RUN,
    Product.ON_DEMAND: DisplacementRule.RUNNING_HOUR,
    Product.FIRST_PARTY: DisplacementRule.NONE,
    Product.SERVING: DisplacementRule.NONE,
}
SENTENCES = {
    DisplacementRule.YOUNG_RUN: (
        "If the owner ends it and gave the notice in the first 10 minutes of its meter, the whole "
        "run is free, also when you stop it after the notice. Not when the posted price passed "
        "your limit, and not if the notice was withdrawn."
    ),
    DisplacementRule.RUNNING_HOUR: (
        "If the owner ends it, the hour that ran when the notice was given is free, counted from "
        "the opening of its meter."
    ),
    DisplacementRule.NONE: "The owner's own use is credited in full.",
}

OWNERS_CAUSES = frozenset({"owner_recall", "spot_interruption", "maintenance", "shutdown"})
"""`price` has its own limit, set by the consumer; faults, abuse, law and money are not the
owner's will."""
NEVER_CREDITED = frozenset({"abuse", "legal_order"})
RUNS_OWN_ENDS = frozenset({"user", "completed", "failed"})
"""The consumer stopped it, or it came to its own end."""


def is_credited(rule: DisplacementRule, closed: Closed) -> bool:
    """Whether this end earns a credit."""
    if rule is DisplacementRule.NONE or closed.reason in NEVER_CREDITED:
        return False
    if closed.reason == "shutdown":
        return True
    if closed.t0 is None or closed.t0 > closed.closed_at:
        return False
    cause = closed.notice_reason or closed.reason
    if rule is DisplacementRule.YOUNG_RUN:
        # Once the notice stands, it does not matter who is quicker to end the run.
        return cause in OWNERS_CAUSES | RUNS_OWN_ENDS
    return cause in OWNERS_CAUSES and closed.reason in OWNERS_CAUSES


def free_intervals(displacement: Displacement, closed: Closed) -> tuple[Interval, ...]:
    """Which part of the run is free. A shutdown counts as a notice given at its SIGTERM."""
    if not is_credited(displacement.rule, closed):
        return ()
    t0 = closed.closed_at if closed.t0 is None else closed.t0
    return displacement.free_windows(closed.opened_at, t0, closed.closed_at)


def clip(windows: Iterable[Window], free: Sequence[Interval]) -> list[Window]:
    """What of the metered windows lies in the free intervals, which do not overlap."""
    found = []
    for window in windows:
        for part in free:
            start = max(window.start, part.start)
            end = window.end if part.end is None else min(window.end, part.end)
            if start < end:
                found.append(Window(start=start, end=end, units=window.units))
    return found
