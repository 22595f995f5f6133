"""Keeping what runs paid for: one organisation at a time, in one Work.

For each open meter: settle what is metered, set the hold to what is still to be posted, extend
hold and runway while the money suffices, stop the workload while its hold still covers its grace.
Then the warnings, by credit ÷ burn over all that the organisation runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from sublet.base.kernel.interval import period_end, period_start
from sublet.base.kernel.money import Money
from sublet.base.store import Work
from sublet.money.billing import store
from sublet.money.billing.cover import (
    LOOK_SECONDS,
    SILENT_SECONDS,
    Ahead,
    Burn,
    Cover,
    Running,
    burn_micros_per_hour,
    cover,
    runs_out_at,
    warnings,
)
from sublet.money.billing.means import SCOPES, Payer, budgets_of, means, spent_of
from sublet.money.billing.model import Cause, Runway, RunwayWarned
from sublet.records import ledger, metering
from sublet.records.ledger import Hold
from sublet.records.metering import Meter
from sublet.records.tenancy import Budget
from sublet.rights import market
from sublet.rights.market import Contract
from sublet.shops import compute

SETTLE_EVERY = timedelta(seconds=60)
SOONEST = timedelta(seconds=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Case:
    """An open meter with all that decides about it."""

    meter: Meter
    contract: Contract
    burn: Burn
    running: Running
    ahead: Ahead

    @property
    def workload_id(self) -> str:
        return self.meter.workload_id


def keep(work: Work, organisation_id: str, meters: Sequence[Meter]) -> datetime:
    """One look at an organisation's open meters; returns when to look again.

    Afterwards everything metered is posted, and what may still be posted up to each hold's expiry
    is held: the balance cannot become negative.
    """
    cases = [_settled(work, meter) for meter in meters]
    sold = [case for case in cases if case.contract.takes_hold]
    # Whose cover ends first takes first of credit that does not suffice for all.
    looks = [work.now + SETTLE_EVERY]
    looks += [_hold(work, case) for case in sorted(sold, key=lambda c: _held_until(work, c))]
    looks += _warn(work, organisation_id, sold)
    return max(min(looks), work.now + SOONEST)


def _settled(work: Work, meter: Meter) -> _Case:
    assert meter.contract_id is not None, f"{meter.run_id} is metered without a contract"
    contract = market.get_contract(work.tx, meter.contract_id)
    market.settle(work, contract.id)
    ahead = Ahead(
        notice_seconds=contract.notice_seconds,
        grace_seconds=contract.stop_grace_seconds,
        scrub_seconds=contract.scrub_seconds,
    )
    reach = max(work.now + ahead.ahead, meter.metered_to)
    terms = market.terms_of(work.tx, contract, reach)
    price = terms.point_at(work.now)
    return _Case(
        meter=meter,
        contract=contract,
        burn=Burn(devices=meter.devices, price_micros=price.micros, per=terms.per),
        running=Running(
            terms=terms,
            used=tuple(metering.windows(work.tx, contract.id)),
            devices=meter.devices,
            metered_to=meter.metered_to,
        ),
        ahead=ahead,
    )


def _held_until(work: Work, case: _Case) -> datetime:
    found = ledger.find_hold(work.tx, case.workload_id)
    return work.now if found is None else found.expires_at


def _hold(work: Work, case: _Case) -> datetime:
    """Bring one hold and its runway to where they should stand, or stop the workload."""
    held = ledger.find_hold(work.tx, case.workload_id)
    run = compute.find_live_run(work.tx, case.workload_id)
    assert run is not None, f"{case.meter.run_id} is metered and no live run"
    silence = (work.now - case.meter.last_evidence_at).total_seconds()
    if held is not None and silence > SILENT_SECONDS:
        # Heard again within its runway, it has its whole cover at the next look.
        return work.now + timedelta(seconds=LOOK_SECONDS)
    if run.stop_reason is not None:
        # It is being ended: what it still uses is held already and needs no renewal.
        if held is not None:
            _shrink(work, case, held)
        return work.now + SETTLE_EVERY
    limit = means(work, _payer(case.contract), held)
    wanted = cover(
        case.ahead,
        case.running,
        held_until=None if held is None else held.expires_at,
        term_at=run.term_at or run.ends_at,
        affordable_micros=limit.micros,
        now=work.now,
    )
    if wanted.stop_at is not None and wanted.stop_at <= work.now:
        if held is not None:
            _shrink(work, case, held)
        compute.stop_for(work, case.workload_id, reason=limit.cause.value)
        return work.now + SETTLE_EVERY
    _apply(work, case, held, wanted)
    return wanted.look_at or work.now + SETTLE_EVERY


def _shrink(work: Work, case: _Case, held: Hold) -> None:
    """Give back what has been posted since, and hold the rest to the end that was agreed."""
    rest = min(case.running.still_to_post(held.expires_at), held.amount_micros)
    if rest != held.amount_micros:
        amount = Money(rest, held.currency)
        ledger.resize_hold(work, held.id, amount=amount, expires_at=held.expires_at)


def _apply(work: Work, case: _Case, held: Hold | None, wanted: Cover) -> None:
    amount = Money(wanted.amount_micros, case.contract.currency)
    if held is None:
        ledger.hold(
            work,
            organisation_id=case.meter.organisation_id,
            account=ledger.customer_account(case.meter.organisation_id),
            amount=amount,
            subject=case.workload_id,
            project_id=case.contract.project_id,
            key_id=case.contract.key_id,
            expires_at=wanted.until,
        )
    elif wanted.until < held.expires_at:
        # A budget was lowered. The engine may run to the end that was agreed, so that stays held.
        _shrink(work, case, held)
    elif (amount.micros, wanted.until) != (held.amount_micros, held.expires_at):
        ledger.resize_hold(work, held.id, amount=amount, expires_at=wanted.until)
    if held is None or wanted.until > held.expires_at:
        compute.extend_runway(work, case.workload_id, case.ahead.runway(wanted.until))


def _payer(contract: Contract) -> Payer:
    return Payer(
        organisation_id=contract.organisation_id,
        project_id=contract.project_id,
        key_id=contract.key_id,
    )


def _warn(work: Work, organisation_id: str, cases: Sequence[_Case]) -> list[datetime]:
    """Say what is due about each workload; returns when the next threshold is passed."""
    balance = ledger.balance(work.tx, ledger.customer_account(organisation_id)).micros
    burn = burn_micros_per_hour(case.burn for case in cases)
    by_credit = runs_out_at(balance, burn, work.now)
    looks = []
    for case in cases:
        by_budget = _budget_ends(work, case, cases)
        for cause, ends_at in ((Cause.CREDIT, by_credit), (Cause.BUDGET, by_budget)):
            said = {
                found.threshold_seconds
                for found in store.list_warnings(work.tx, case.workload_id, in_force=True)
                if found.cause is cause
            }
            due = warnings(ends_at, said, work.now)
            if due.rearm:
                store.clear_warnings(work.tx, case.workload_id, cause, due.rearm, work.now)
            for threshold in due.say:
                assert ends_at is not None
                _say(work, case, cause, threshold, ends_at)
            if due.next_at is not None:
                looks.append(due.next_at)
    return looks


def _say(work: Work, case: _Case, cause: Cause, threshold: int, ends_at: datetime) -> None:
    store.insert_warning(
        work.tx,
        organisation_id=case.meter.organisation_id,
        workload_id=case.workload_id,
        cause=cause,
        threshold_seconds=threshold,
        ends_at=ends_at,
        now=work.now,
    )
    work.emit(
        RunwayWarned(
            organisation_id=case.meter.organisation_id,
            workload_id=case.workload_id,
            cause=cause.value,
            threshold_seconds=threshold,
            ends_at=ends_at,
        )
    )


def _budget_ends(work: Work, case: _Case, cases: Sequence[_Case]) -> datetime | None:
    """When the tightest budget of a workload is used up; None where it renews itself first."""
    found: datetime | None = None
    for budget in budgets_of(work.tx, _payer(case.contract)):
        inside = [other for other in cases if _is_inside(other.contract, budget)]
        burn = burn_micros_per_hour(other.burn for other in inside)
        start = period_start(work.now, budget.period)
        held = sum(
            hold.amount_micros
            for other in inside
            if (hold := ledger.find_hold(work.tx, other.workload_id)) and hold.admitted_at >= start
        )
        left = budget.limit_micros - spent_of(work.tx, budget, work.now) + held
        ends_at = runs_out_at(left, burn, work.now)
        renews_at = period_end(work.now, budget.period)
        if ends_at is None or (renews_at is not None and ends_at >= renews_at):
            continue
        found = ends_at if found is None else min(found, ends_at)
    return found


def _is_inside(contract: Contract, budget: Budget) -> bool:
    return bool(getattr(contract, SCOPES[budget.scope_kind]) == budget.scope_id)


def runway(tx: Connection, organisation_id: str, now: datetime) -> Runway:
    """Credit, burn and when the one ends by the other, as of what is settled."""
    burns = []
    for meter in metering.list_open_meters(tx):
        if meter.organisation_id != organisation_id or meter.contract_id is None:
            continue
        contract = market.get_contract(tx, meter.contract_id)
        if not contract.takes_hold:
            continue
        terms = market.terms_of(tx, contract, now)
        price = terms.point_at(now)
        burns.append(Burn(devices=meter.devices, price_micros=price.micros, per=terms.per))
    burn = burn_micros_per_hour(burns)
    credit = ledger.balance(tx, ledger.customer_account(organisation_id))
    return Runway(
        organisation_id=organisation_id,
        credit=credit,
        burn_micros_per_hour=burn,
        ends_at=runs_out_at(credit.micros, burn, now),
    )
