"""Billing's loop: keep what runs paid for, let holds lapse, reconcile tokens, issue what is due."""

from __future__ import annotations

from datetime import datetime, timedelta

from sublet.base.store import Actor, Store, Work
from sublet.money.billing import store as rows
from sublet.money.billing.allowances import held_subjects
from sublet.money.billing.invoice import closes_at
from sublet.money.billing.invoices import issue_due, next_to_close
from sublet.money.billing.keeping import keep
from sublet.money.billing.tokens import is_reconciliation_due, reconcile_tokens
from sublet.records import ledger, metering
from sublet.shops import compute

ACTOR = Actor.system("billing")
IDLE = timedelta(seconds=60)
MONTHS_A_STEP = 12
"""After a long time down, what is left of the backlog waits for the next step."""


def step(store: Store, now: datetime) -> datetime:
    """One pass; returns when the next is due. Each organisation has a Work of its own.

    A failure at one organisation keeps none of the others waiting; all failures are raised at the
    end, and the next pass tries them again.
    """
    failures: list[Exception] = []
    for organisation_id in _due(store, now):
        try:
            with store.work(ACTOR) as work:
                look(work, organisation_id)
        except Exception as error:
            error.add_note(f"while keeping {organisation_id} paid for")
            failures.append(error)
    with store.work(ACTOR) as work:
        lapse(work)
    with store.read() as tx:
        is_due = is_reconciliation_due(tx, now)
    if is_due:
        with store.work(ACTOR) as work:
            reconcile_tokens(work, work.now)
    for _ in range(MONTHS_A_STEP):
        with store.read() as tx:
            month = next_to_close(tx)
        if month is None or closes_at(month) > now:
            break
        with store.work(ACTOR) as work:
            issue_due(work)
    if failures:
        raise ExceptionGroup("billing could not keep every organisation paid for", failures)
    with store.read() as tx:
        return min([now + IDLE, *rows.next_looks(tx).values()])


def _due(store: Store, now: datetime) -> list[str]:
    """Organisations with a metered run that is new or due, or one whose meter has closed."""
    with store.read() as tx:
        looks = rows.next_looks(tx)
        meters = {meter.run_id: meter for meter in metering.list_open_meters(tx)}
        due = {m.organisation_id for m in meters.values() if looks.get(m.run_id, now) <= now}
        return sorted(due | rows.organisations_watching(tx, looks.keys() - meters.keys()))


def look(work: Work, organisation_id: str) -> None:
    """Keep one organisation's runs paid for, and note when to look again."""
    meters = [
        meter
        for meter in metering.list_open_meters(work.tx)
        if meter.organisation_id == organisation_id
    ]
    next_at = keep(work, organisation_id, meters)
    rows.set_looks(work.tx, organisation_id, [meter.run_id for meter in meters], next_at)


def lapse(work: Work) -> list[ledger.Hold]:
    """Release holds that have expired, but for those of workloads with a run or an open meter, and
    those of gateways whose spool may still say what was spent of them."""
    keep_held = {meter.workload_id for meter in metering.list_open_meters(work.tx)}
    keep_held |= {run.workload_id for run in compute.list_live_runs(work.tx)}
    keep_held |= held_subjects(work.tx)
    return ledger.lapse(work, work.now, keep_held)
