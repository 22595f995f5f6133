"""Tokens become money: usage events are kept, rated by line and posted, all in one Work.

    to post = rate(everything of the line so far) − what stands

One transfer a line and batch, never one an event. A crash leaves either all of a batch or nothing
of it, and the spool is read again from the mark that the same Work moves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta

from sqlalchemy import Connection

from sublet.base.kernel.interval import EPOCH, from_micros, micros_since_epoch, period_start
from sublet.base.kernel.money import Money
from sublet.base.store import Work
from sublet.base.store.installation import find_fact, keep_fact
from sublet.base.wire.gateway import PER_TOKENS, Price, UsageEvent
from sublet.money.billing import allowances, token_store
from sublet.money.billing.means import Payer, means
from sublet.money.billing.model import TokenGapFound
from sublet.money.billing.token_lines import (
    CACHED,
    CLASSES,
    DAY_US,
    INPUT,
    OUTPUT,
    TOKEN_LOSS,
    TOKEN_USAGE,
    Group,
    LineKey,
    Step,
    Tally,
    TokenLine,
    deemed_spent,
    price_of_class,
    step,
    tally,
)
from sublet.money.billing.token_store import AllowanceRow
from sublet.records import ledger, metering, tenancy
from sublet.records.metering import Gap, Reading, TokenUsage
from sublet.rights import market
from sublet.shops import models

CURRENCY = "USD"
PRODUCT = "tokens"
FIRST_PARTY = "first_party"
"""The owner's own use is priced, and no revenue: as of compute."""
SUBJECT_LENGTH = 80
"""A transfer's subject has room for so much of a model's name; `detail` has the whole."""
RECONCILED_TO = "billing_reconciled_to"
"""The installation's fact: readings before this instant are set against the records."""


def ingest_usage(
    work: Work,
    *,
    gateway: str,
    epoch: int,
    events: Sequence[UsageEvent],
    file: int,
    offset: int,
) -> int:
    """Keep a batch of a spool, charge for it, shrink the holds by what it spent: all or nothing.

    Returns how many events were new; what is known already changes nothing. What the engine made
    beyond what is billed is posted as the owner's loss.
    """
    fresh = metering.ingest(
        work, gateway=gateway, epoch=epoch, events=events, file=file, offset=offset
    )
    _book(work, gateway, epoch, fresh)
    return len(fresh)


def close_epoch(work: Work, *, gateway: str, epoch: int, lost: Sequence[UsageEvent]) -> None:
    """A gateway's life is over and its spool was read to the end: free what it still held.

    `lost`: what was open as it died, free to the consumer and the owner's loss. Twice is once.
    """
    fresh = metering.close_epoch(work, gateway, epoch, lost)
    if fresh is None:
        return
    _book(work, gateway, epoch, fresh)
    allowances.close(work, gateway, epoch)


def _book(work: Work, gateway: str, epoch: int, events: Sequence[UsageEvent]) -> None:
    if not events:
        return
    book = tally(events, _price_of(work))
    rows = token_store.find_allowances(work.tx, gateway, epoch, book.spending)
    by_key: dict[str, list[TokenLine]] = {key_id: [] for key_id in rows}
    for line in _grown(work, book.lines):
        by_key.setdefault(line.key.key_id, []).append(line)
    posted: list[TokenLine] = []
    settled: list[AllowanceRow] = []
    for key_id in sorted(by_key):
        row = rows.get(key_id)
        if row is None:
            posted += _post(work, by_key[key_id])
            continue
        spent = book.spending[key_id]
        covered = min(spent.micros, row.unsettled_micros)
        posted += _post(work, by_key[key_id], covered)
        settled.append(allowances.settled(work, row, spent))
    token_store.update_lines(work.tx, posted)
    token_store.update_allowances(work.tx, settled)


def _price_of(work: Work) -> Callable[[str], Price]:
    return lambda version: models.price_of(work.tx, version)


def _grown(work: Work, tallies: dict[LineKey, Tally]) -> list[TokenLine]:
    """The lines with what has come to them; a line that is new is made."""
    known = token_store.find_lines(work.tx, tallies)
    prices: dict[str, Price] = {}
    grown = []
    for key, came in tallies.items():
        line = known.get(key)
        if line is None:
            price = prices.get(key.version) or prices.setdefault(
                key.version, models.price_of(work.tx, key.version)
            )
            line = _new(work, key, price_of_class(price, key.token_class))
        grown.append(
            dataclasses.replace(
                line,
                quantity=line.quantity + came.quantity,
                spent_micros=line.spent_micros + came.spent_micros,
            )
        )
    return grown


def _new(work: Work, key: LineKey, price_micros: int) -> TokenLine:
    line = TokenLine(seq=0, key=key, price_micros=price_micros)
    return dataclasses.replace(line, seq=token_store.insert_line(work.tx, line))


def _post(work: Work, lines: Sequence[TokenLine], covered: int = 0) -> list[TokenLine]:
    """Bring the lines of one key to where they should stand; returns them as they stand then.

    `covered`: what its hold pays for now.
    """
    purse = _purse(work, [line for line in lines if line.is_capped], covered)
    posted = []
    for line in lines:
        taken = step(line, purse if line.is_capped else line.due_micros)
        if line.is_capped:
            purse -= taken.pay_micros
        posted.append(_transferred(work, line, taken))
    return posted


def _purse(work: Work, lines: Sequence[TokenLine], covered: int) -> int:
    """The most that may be charged for a key now: what is held for it, else what it may spend.

    The hold nearly always suffices. It does not for a correction, nor by one micro where a half that
    was rounded down before is made good.
    """
    due = sum(line.due_micros for line in lines)
    if due <= covered or not lines:
        return covered
    key = lines[0].key
    payer = Payer(organisation_id=key.organisation_id, project_id=key.project_id, key_id=key.key_id)
    return covered + min(means(work, payer, None).micros, due - covered)


def _transferred(work: Work, line: TokenLine, taken: Step) -> TokenLine:
    if not (taken.pay_micros or taken.lose_micros):
        return line
    after = dataclasses.replace(line, number=line.number + 1)
    if taken.pay_micros:
        _charge(work, after, taken)
        after = dataclasses.replace(
            after,
            posted_micros=after.posted_micros + taken.pay_micros,
            posted_quantity=after.posted_quantity + taken.pay_quantity,
        )
    if taken.lose_micros:
        revenue = _revenue(line.key)
        _move(
            work,
            after,
            TOKEN_LOSS,
            ":lost",
            ledger.LOSSES,
            revenue,
            taken.lose_micros,
            taken.lose_quantity,
        )
        after = dataclasses.replace(
            after,
            lost_micros=after.lost_micros + taken.lose_micros,
            lost_quantity=after.lost_quantity + taken.lose_quantity,
        )
    return after


def _charge(work: Work, line: TokenLine, taken: Step) -> None:
    key, pay, quantity = line.key, taken.pay_micros, taken.pay_quantity
    revenue = _revenue(key)
    if key.kind == TOKEN_LOSS:
        _move(work, line, TOKEN_LOSS, "", ledger.LOSSES, revenue, pay, quantity)
    elif key.is_first_party:
        own = ledger.first_party_account(key.organisation_id)
        _move(work, line, TOKEN_USAGE, "", own, revenue, pay, quantity)
        credit = market.FIRST_PARTY_CREDIT
        _move(work, line, credit, ":credit", ledger.CREDITS, own, pay, quantity)
    else:
        customer = ledger.customer_account(key.organisation_id)
        _move(work, line, TOKEN_USAGE, "", customer, revenue, pay, quantity)


def _revenue(key: LineKey) -> str:
    return ledger.revenue_account(FIRST_PARTY if key.is_first_party else PRODUCT)


def _move(
    work: Work,
    line: TokenLine,
    kind: str,
    suffix: str,
    debit: str,
    credit: str,
    micros: int,
    quantity: int,
) -> None:
    key = line.key
    if micros < 0:
        debit, credit = credit, debit
    starts_at = EPOCH + timedelta(days=key.day)
    ledger.post(
        work,
        key=f"tokens:{line.seq}:{line.number}{suffix}",
        debit=debit,
        credit=credit,
        amount=Money(abs(micros), CURRENCY),
        kind=kind,
        organisation_id=key.organisation_id,
        project_id=key.project_id,
        key_id=key.key_id or None,
        subject=key.model[:SUBJECT_LENGTH],
        starts_at=starts_at,
        ends_at=starts_at + timedelta(days=1),
        detail={
            "product": f"{PRODUCT}:{key.token_class}:{key.tier}",
            "model": key.model,
            "class": key.token_class,
            "tier": key.tier,
            "quantity": quantity,
            "price_micros": line.price_micros,
            "per": PER_TOKENS,
            "version": key.version,
            **({"why": "unattributed", "replica_id": key.replica_id} if key.replica_id else {}),
        },
    )


def post_correction(work: Work, usage: TokenUsage) -> None:
    """Bring the lines of a corrected request to what its records now say. Twice is once.

    It is posted under the request's own day and price version, so after its month has closed it
    stands on the next invoice as a correction. What is added and no means cover is lost.
    """
    day = usage.started_us // DAY_US
    group = Group(
        usage.organisation_id,
        usage.project_id,
        usage.key_id,
        usage.is_first_party,
        usage.model,
        usage.tier,
        usage.price_version,
        day,
    )
    sums = metering.token_sums(
        work.tx,
        key_id=usage.key_id,
        model=usage.model,
        tier=usage.tier,
        price_version=usage.price_version,
        start_us=day * DAY_US,
        end_us=(day + 1) * DAY_US,
    )
    wanted = {
        group.key(TOKEN_USAGE, INPUT): sums.input_uncached,
        group.key(TOKEN_USAGE, CACHED): sums.cache_read,
        group.key(TOKEN_USAGE, OUTPUT): sums.output,
        group.key(TOKEN_LOSS, OUTPUT): sums.lost,
    }
    known = token_store.find_lines(work.tx, wanted)
    price = models.price_of(work.tx, usage.price_version)
    changes: dict[LineKey, Tally] = {}
    for key, quantity in wanted.items():
        line = known.get(key)
        more = quantity - (0 if line is None else line.quantity)
        if more:
            spent = deemed_spent(more, price_of_class(price, key.token_class))
            changes[key] = Tally(more, spent if key.kind == TOKEN_USAGE else 0)
    token_store.update_lines(work.tx, _post(work, _grown(work, changes)))


def is_reconciliation_due(tx: Connection, now: datetime) -> bool:
    """Once a UTC day, with the first step after midnight."""
    done_to = find_fact(tx, RECONCILED_TO)
    midnight = micros_since_epoch(period_start(now, "day"))
    return done_to is None or int(done_to) < midnight


def reconcile_tokens(work: Work, now: datetime) -> list[Gap]:
    """Set what engines counted against what is recorded, for every reading since the last time.

    Each gap names its replica, and is told by TokenGapFound. What the engine made and nobody asked
    for, as far as is recorded, is posted as the owner's loss, at the price of the replica's last
    request; what is recorded beyond the engine's count is left for a correction: it says who was
    billed. Twice is once.
    """
    done_to = find_fact(work.tx, RECONCILED_TO)
    since = EPOCH if done_to is None else from_micros(int(done_to))
    gaps = []
    for reading in metering.list_readings(work.tx, since):
        gap = reading.gap
        _book_gap(work, reading)
        if gap.is_none:
            continue
        gaps.append(gap)
        work.emit(
            TokenGapFound(
                replica_id=gap.replica_id,
                input_tokens=gap.input_uncached,
                cached_tokens=gap.cache_read,
                output_tokens=gap.output,
            )
        )
    keep_fact(work, RECONCILED_TO, str(micros_since_epoch(now)))
    return gaps


def _book_gap(work: Work, reading: Reading) -> None:
    """Bring what is booked as made for nobody by a replica to what its reading says."""
    gap = reading.gap
    wanted = {INPUT: gap.input_uncached, CACHED: gap.cache_read, OUTPUT: gap.output}
    booked = dict.fromkeys(CLASSES, 0)
    for line in token_store.list_lines_of_replica(work.tx, reading.replica_id):
        booked[line.key.token_class] += line.quantity
    changes = {name: max(wanted[name], 0) - booked[name] for name in CLASSES}
    served = metering.find_last_served(work.tx, reading.replica_id)
    owner = tenancy.find_owner(work.tx)
    if not any(changes.values()) or served is None or owner is None:
        # One that never served a request has no price: what it made is named and comes to nothing.
        return
    tallies = {
        LineKey(
            kind=TOKEN_LOSS,
            organisation_id=owner.id,
            project_id=None,
            key_id="",
            replica_id=reading.replica_id,
            is_first_party=False,
            model=served.model,
            tier=served.tier,
            version=served.price_version,
            day=micros_since_epoch(reading.read_at) // DAY_US,
            token_class=name,
        ): Tally(more)
        for name, more in changes.items()
        if more
    }
    token_store.update_lines(work.tx, _post(work, _grown(work, tallies)))


def list_token_lines(
    tx: Connection,
    *,
    organisation_id: str | None = None,
    first_day: int = 0,
    end_day: int = 1 << 30,
    after: int | None = None,
    limit: int = 100,
) -> list[TokenLine]:
    """Lines of these days (counted from the epoch, the last not among them); None: of all."""
    return token_store.list_lines(
        tx,
        organisation_id=organisation_id,
        first_day=first_day,
        end_day=end_day,
        after=after,
        limit=limit,
    )
