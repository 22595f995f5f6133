"""What an organisation, a project and a key may still spend: credit and budgets, as one answer.

Runs and tokens are held out of the same means, so both ask here.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection

from sublet.base.kernel.interval import period_end, period_start
from sublet.base.store import Work
from sublet.money.billing.model import Cause
from sublet.records import ledger, tenancy
from sublet.records.ledger import Hold
from sublet.records.tenancy import Budget, ScopeKind

SCOPES = {
    ScopeKind.ORGANISATION: "organisation_id",
    ScopeKind.PROJECT: "project_id",
    ScopeKind.KEY: "key_id",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Payer:
    """Who pays: what budgets and credit are looked up by."""

    organisation_id: str
    project_id: str | None
    key_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """The most that one hold may be now, and what sets it. `budget` None: the credit.

    `window_ends_at`: when the first of all windows that were looked at ends: a hold that is renewed
    then counts in the next one.
    """

    micros: int
    cause: Cause
    budget: Budget | None = None
    resets_at: datetime | None = None
    window_ends_at: datetime | None = None


def means(work: Work, payer: Payer, held: Hold | None) -> Means:
    """The means of a payer for one hold; what `held` holds already is part of them."""
    own = 0 if held is None else held.amount_micros
    credit = ledger.available(work.tx, payer.organisation_id).micros + own
    found = Means(micros=max(0, credit), cause=Cause.CREDIT)
    ends: list[datetime] = []
    for budget in budgets_of(work.tx, payer):
        spent = spent_of(work.tx, budget, work.now, without_hold=None if held is None else held.id)
        end = period_end(work.now, budget.period)
        if end is not None:
            ends.append(end)
        left = max(0, budget.limit_micros - spent)
        if left < found.micros:
            found = Means(micros=left, cause=Cause.BUDGET, budget=budget, resets_at=end)
    return Means(
        micros=found.micros,
        cause=found.cause,
        budget=found.budget,
        resets_at=found.resets_at,
        window_ends_at=min(ends, default=None),
    )


def budgets_of(tx: Connection, payer: Payer) -> list[Budget]:
    return tenancy.list_budgets(
        tx,
        organisation_id=payer.organisation_id,
        project_id=payer.project_id,
        key_id=payer.key_id,
    )


def spent_of(
    tx: Connection, budget: Budget, now: datetime, *, without_hold: str | None = None
) -> int:
    """What counts against a budget in the window of `now`: posted in it, or held since."""
    scope = {SCOPES[budget.scope_kind]: budget.scope_id}
    spent = ledger.spent(
        tx,
        start=period_start(now, budget.period),
        end=period_end(now, budget.period),
        without_hold=without_hold,
        **scope,
    )
    return spent.micros
