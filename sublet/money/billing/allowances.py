"""Allowances: slices of a key's credit that gateways spend by themselves.

Behind each stands a ledger hold of what may still come of it, so all gateways together never spend
what is not there. A gateway and we keep the same two running totals, and neither a message lost nor
one that comes twice or late makes the gateway's the larger: the rules are on the page of decision
0002, "The rules of an allowance", and in `gateway.purse`.

No clock lowers an allowance: nobody knows what a gateway that is cut off spends meanwhile. Its hold
ends when its spool was read to the end, and not before.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import Connection

from sublet.base.kernel.interval import micros_since_epoch, period_end
from sublet.base.kernel.money import Money
from sublet.base.store import Work
from sublet.base.wire.gateway import Allowance, AllowanceRequest
from sublet.money.billing import token_store
from sublet.money.billing.means import SCOPES, Means, Payer, means
from sublet.money.billing.model import Cause
from sublet.money.billing.token_lines import DAY_US, Spending
from sublet.money.billing.token_store import AllowanceRow, AllowanceState
from sublet.records import ledger, metering, tenancy
from sublet.records.metering import EpochClosed, EpochState
from sublet.records.tenancy import Action, ScopeKind, ValidKey

LASTS = timedelta(seconds=60)
"""How long a gateway may begin on an allowance without a word from us."""
LEAST_MICROS = 10_000
LEAST_TOKENS = 1_000
"""What is left below this is given whole to who asks first: halves of it serve nobody."""
CURRENCY = "USD"


@dataclass(frozen=True, slots=True)
class _Denial:
    code: str
    why: str
    resets_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class _Given:
    """How much more was granted, and why not all that was wanted."""

    more: int
    denial: _Denial | None = None


def grant_allowance(
    work: Work, *, gateway: str, epoch: int, request: AllowanceRequest
) -> Allowance:
    """Act on what a gateway asks for a key, once a serial, and say how the allowance stands.

    A want is met as far as credit, every budget and every limit of tokens a day go; with several
    gateways at work none is given more than half of what is left, unless that is little. `denied`
    is said where the means are used up: insufficient_quota, budget_exceeded, quota_exceeded,
    standing_forbids. The owner's own keys need no allowance; asked for one, all is granted and
    nothing held. Raises KeyNotFound, EpochClosed.
    """
    if request.epoch != epoch:
        raise ValueError("a request of another life of the gateway")
    life = metering.open_epoch(work, gateway, epoch)
    if life.state is EpochState.CLOSED:
        raise EpochClosed(gateway=gateway, epoch=epoch)
    key = tenancy.find_valid_key(work.tx, request.key_id, work.now)
    if key is not None and key.is_first_party:
        return _free(work, request)
    row = _row(work, gateway, epoch, request.key_id)
    if request.serial <= row.serial:
        return _said(row, work.now)
    row = dataclasses.replace(row, serial=request.serial)
    if request.wanted_micros <= 0:
        return _said(_taken_back(work, row, request), work.now)
    return _wanted(work, row, request, key)


def _free(work: Work, request: AllowanceRequest) -> Allowance:
    return Allowance(
        key_id=request.key_id,
        epoch=request.epoch,
        granted_micros=request.spent_micros + request.held_micros + request.wanted_micros,
        granted_tokens=None,
        expires_us=micros_since_epoch(work.now + LASTS),
        answers=request.serial,
    )


def _row(work: Work, gateway: str, epoch: int, key_id: str) -> AllowanceRow:
    known = token_store.find_allowance(work.tx, gateway, epoch, key_id)
    if known is not None:
        return known
    key = tenancy.get_key(work.tx, key_id)
    row = AllowanceRow(
        gateway=gateway,
        epoch=epoch,
        key_id=key_id,
        organisation_id=key.organisation_id,
        project_id=key.project_id,
        serial=0,
        granted_micros=0,
        settled_micros=0,
        granted_tokens=None,
        settled_tokens=0,
        hold_id=None,
        expires_at=work.now,
        state=AllowanceState.OPEN,
    )
    token_store.insert_allowance(work.tx, row)
    return row


def _taken_back(work: Work, row: AllowanceRow, request: AllowanceRequest) -> AllowanceRow:
    tokens = row.granted_tokens
    if tokens is not None:
        tokens = min(tokens, request.spent_tokens + request.held_tokens)
    lower = dataclasses.replace(
        row,
        granted_micros=min(row.granted_micros, request.spent_micros + request.held_micros),
        granted_tokens=tokens,
    )
    return _kept(work, lower)


def _wanted(
    work: Work, row: AllowanceRow, request: AllowanceRequest, key: ValidKey | None
) -> Allowance:
    """Raise the totals as far as the means go, and renew."""
    refused = _refused(key)
    if refused is not None:
        stands = dataclasses.replace(row, expires_at=work.now)
        return _said(_kept(work, stands), work.now, refused)
    assert key is not None
    others = len(metering.list_epochs(work.tx, EpochState.OPEN)) > 1
    found = means(work, _payer(row), ledger.find_hold(work.tx, row.subject))
    target = request.spent_micros + request.held_micros + request.wanted_micros
    usable = row.settled_micros + min(row.unsettled_micros, found.micros)
    micros = _micros(row, target - usable, found, others=others)
    limits = _day_limits(work.tx, key)
    tokens, granted_tokens = _tokens(work, row, request, limits, others=others)
    ends = [work.now + LASTS, found.window_ends_at]
    if limits:
        ends.append(period_end(work.now, "day"))
    higher = dataclasses.replace(
        row,
        granted_micros=row.granted_micros + micros.more,
        granted_tokens=granted_tokens,
        # What is begun in the next window must be held in the next window.
        expires_at=min(end for end in ends if end is not None),
    )
    kept = _kept(work, higher)
    said = _said(kept, work.now, micros.denial or tokens.denial)
    if found.micros >= row.unsettled_micros:
        return said
    # More is held than this window's budgets allow, out of one that has ended. A total that was
    # granted is never lowered here, but what the gateway let go at the window's end it does not get
    # again; and what it has not let go yet it shall let go now.
    return dataclasses.replace(said, granted_micros=usable, expires_us=micros_since_epoch(work.now))


def _refused(key: ValidKey | None) -> _Denial | None:
    if key is None:
        return _Denial("standing_forbids", "This key has expired or was revoked.")
    if not tenancy.may(
        key.organisation_kind, key.standing, key.role, key.project_id, Action.CALL_MODELS
    ):
        return _Denial(
            "standing_forbids",
            f"A key of the role {key.role.value} in an organisation that is {key.standing.value} "
            "may not call models.",
        )
    return None


def _payer(row: AllowanceRow) -> Payer:
    return Payer(organisation_id=row.organisation_id, project_id=row.project_id, key_id=row.key_id)


def _micros(row: AllowanceRow, wanted: int, found: Means, *, others: bool) -> _Given:
    if wanted <= 0:
        return _Given(0)
    left = max(found.micros - row.unsettled_micros, 0)
    more = min(wanted, _share(left, LEAST_MICROS, others=others))
    if more == wanted or more < left:
        return _Given(more)
    if found.cause is Cause.CREDIT or found.budget is None:
        why = "The organisation's credit is used up: add credit."
        return _Given(more, _Denial("insufficient_quota", why))
    budget = found.budget
    resets = "never" if found.resets_at is None else found.resets_at.isoformat()
    why = (
        f"The {budget.period} budget of this {budget.scope_kind.value} is "
        f"{Money(budget.limit_micros, CURRENCY)} and is used up: it resets {resets}."
    )
    return _Given(more, _Denial("budget_exceeded", why, found.resets_at))


def _share(left: int, least: int, *, others: bool) -> int:
    """How much of what is left one gateway may be given now; it may ask again at once."""
    if not others or left <= least:
        return left
    return max(left // 2, least)


def _day_limits(tx: Connection, key: ValidKey) -> list[tuple[ScopeKind, str, int]]:
    """The limits of tokens a day that bind a key."""
    found = [(ScopeKind.KEY, key.key_id, key.limits.tokens_per_day)]
    scopes = [key.organisation_id, *([key.project_id] if key.project_id else [])]
    found += [
        (scope.scope_kind, scope.scope_id, scope.limits.tokens_per_day)
        for scope in tenancy.list_limits(tx, scopes)
    ]
    return [(kind, scope_id, limit) for kind, scope_id, limit in found if limit is not None]


def _tokens(
    work: Work,
    row: AllowanceRow,
    request: AllowanceRequest,
    limits: list[tuple[ScopeKind, str, int]],
    *,
    others: bool,
) -> tuple[_Given, int | None]:
    """How many tokens more, and the running total then; None: no limit binds."""
    if not limits:
        return _Given(0), None
    begun = request.spent_tokens + request.held_tokens
    base = begun if row.granted_tokens is None else row.granted_tokens
    own = max(base - row.settled_tokens, 0)
    lefts = []
    for kind, scope_id, limit in limits:
        used = token_store.used_tokens(
            work.tx, SCOPES[kind], scope_id, micros_since_epoch(work.now) // DAY_US
        )
        held = sum(
            other.unsettled_tokens
            for other in token_store.list_open(work.tx, SCOPES[kind], scope_id)
            if (other.gateway, other.epoch, other.key_id) != (row.gateway, row.epoch, row.key_id)
        )
        lefts.append((max(limit - used - held - own, 0), kind, limit))
    left, kind, limit = min(lefts, key=lambda found: found[0])
    wanted = max(begun + request.wanted_tokens - base, 0)
    more = min(wanted, _share(left, LEAST_TOKENS, others=others))
    if more == wanted or more < left:
        return _Given(more), base + more
    resets_at = period_end(work.now, "day")
    assert resets_at is not None
    why = (
        f"The {limit} tokens that this {kind.value} may use a day are used up: it resets "
        f"{resets_at.isoformat()}."
    )
    return _Given(more, _Denial("quota_exceeded", why, resets_at)), base + more


def _kept(work: Work, row: AllowanceRow) -> AllowanceRow:
    """Write it down with the hold that stands behind it: of what may still come of it."""
    amount = Money(row.unsettled_micros, CURRENCY)
    hold_id = row.hold_id
    if hold_id is not None:
        ledger.resize_hold(work, hold_id, amount=amount, expires_at=row.expires_at)
    elif amount.micros > 0:
        hold_id = ledger.hold(
            work,
            organisation_id=row.organisation_id,
            account=ledger.customer_account(row.organisation_id),
            amount=amount,
            subject=row.subject,
            project_id=row.project_id,
            key_id=row.key_id,
            expires_at=row.expires_at,
        ).id
    kept = dataclasses.replace(row, hold_id=hold_id)
    token_store.update_allowances(work.tx, [kept])
    return kept


def _said(row: AllowanceRow, now: datetime, denial: _Denial | None = None) -> Allowance:
    resets_at = None if denial is None else denial.resets_at
    return Allowance(
        key_id=row.key_id,
        epoch=row.epoch,
        granted_micros=row.granted_micros,
        granted_tokens=row.granted_tokens,
        expires_us=micros_since_epoch(max(row.expires_at, now)),
        answers=row.serial,
        denied=None if denial is None else denial.code,
        denied_why="" if denial is None else denial.why,
        resets_us=None if resets_at is None else micros_since_epoch(resets_at),
    )


def settled(work: Work, row: AllowanceRow, spent: Spending) -> AllowanceRow:
    """What was spent is read: the hold shrinks by exactly that much, what was rounded up to comes
    free. Call it after the key's charges are posted and before another's are: until then they are
    paid out of this hold. The row is the caller's to write."""
    after = dataclasses.replace(
        row,
        settled_micros=row.settled_micros + spent.micros,
        settled_tokens=row.settled_tokens + spent.tokens,
    )
    if row.hold_id is not None and after.unsettled_micros != row.unsettled_micros:
        amount = Money(after.unsettled_micros, CURRENCY)
        ledger.resize_hold(work, row.hold_id, amount=amount, expires_at=row.expires_at)
    return after


def close(work: Work, gateway: str, epoch: int) -> None:
    """Release what a gateway's life held. Only after its spool was read to the end."""
    closed = []
    for row in token_store.list_open_at(work.tx, gateway, epoch):
        if row.hold_id is not None:
            ledger.release_hold(work, row.hold_id)
        closed.append(dataclasses.replace(row, state=AllowanceState.CLOSED))
    token_store.update_allowances(work.tx, closed)


def held_subjects(tx: Connection) -> set[str]:
    """Holds that no clock ends."""
    return {row.subject for row in token_store.list_open(tx)}
