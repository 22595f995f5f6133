"""Invariants of tokens: each request billed once, at its rate, out of what was set aside for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import sqlalchemy as sa

from sublet.audit.registry import Look, invariant
from sublet.base.kernel.price import cover_quantity, rate_quantity
from sublet.base.wire.gateway import PER_TOKENS, Outcome
from sublet.money.billing.token_lines import CLASSES, DAY_US, OUTPUT, TOKEN_LOSS, TOKEN_USAGE
from sublet.money.billing.token_store import (
    AllowanceState,
    allowances,
    subject_of,
    token_lines,
)
from sublet.records.ledger.store import holds, transfers
from sublet.records.metering.token_model import EpochState
from sublet.records.metering.token_store import spools, tokens

Group = tuple[str, str, str, str, int]
"""Key, model, tier, version, day."""
Line = tuple[str, str, str, str, int, str, str]
"""Key, model, tier, version, day, class, kind."""


# Written out: with a parameter in it, PostgreSQL does not know the grouped expression again.
_DAY = (tokens.c.started_us // sa.literal_column(str(DAY_US), sa.BigInteger)).label("day")
_GROUP = (tokens.c.key_id, tokens.c.model, tokens.c.tier, tokens.c.price_version, _DAY)


def _group(row: sa.Row[Any]) -> Group:
    return row.key_id, row.model, row.tier, row.price_version, int(row.day)


def _sum(column: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(column), 0)


def _recorded(look: Look) -> dict[Line, int]:
    """Tokens by line, as the requests' records say."""
    query = sa.select(
        *_GROUP,
        tokens.c.outcome,
        _sum(tokens.c.input_uncached).label("uncached"),
        _sum(tokens.c.cache_read).label("cached"),
        _sum(tokens.c.output).label("output"),
        _sum(tokens.c.made).label("made"),
    ).group_by(*_GROUP, tokens.c.outcome)
    found: dict[Line, int] = defaultdict(int)
    for row in look.tx.execute(query):
        group = _group(row)
        is_free = row.outcome in (Outcome.FAILED, Outcome.LOST)
        billed = (0, 0, 0) if is_free else (row.uncached, row.cached, row.output)
        for token_class, count in zip(CLASSES, billed, strict=True):
            found[(*group, token_class, TOKEN_USAGE)] += int(count)
        found[(*group, OUTPUT, TOKEN_LOSS)] += int(row.made) - int(billed[2])
    return found


@invariant("Every request is on the lines of tokens once: a line counts what its records count.")
def token_lines_count_requests(look: Look) -> Iterator[str]:
    recorded = _recorded(look)
    booked: dict[Line, int] = {}
    for row in look.tx.execute(sa.select(token_lines).where(token_lines.c.replica_id == "")):
        line = (row.key_id, row.model, row.tier, row.version, row.day, row.token_class, row.kind)
        booked[line] = row.quantity
    for line in recorded.keys() | booked.keys():
        if recorded.get(line, 0) != booked.get(line, 0):
            yield f"{line}: {recorded.get(line, 0)} tokens recorded, {booked.get(line, 0)} billed"


@invariant(
    "What is posted and lost for a line of tokens is its price times its tokens, rounded once."
)
def token_postings_are_rated(look: Look) -> Iterator[str]:
    posted: dict[tuple[int, bool], int] = defaultdict(int)
    query = sa.select(transfers.c.key, transfers.c.credit, transfers.c.amount_micros).where(
        transfers.c.kind.in_([TOKEN_USAGE, TOKEN_LOSS])
    )
    for row in look.tx.execute(query):
        _, seq, _, *suffix = row.key.split(":")
        sign = 1 if row.credit.startswith("revenue:") else -1
        posted[int(seq), suffix == ["lost"]] += sign * row.amount_micros
    for line in look.tx.execute(sa.select(token_lines)):
        rated = rate_quantity(line.quantity, line.price_micros, PER_TOKENS)
        paid, lost = posted[line.seq, False], posted[line.seq, True]
        if paid + lost != rated:
            yield f"line {line.seq}: rated {rated}, posted {paid}, lost {lost} micros"
        elif (paid, lost) != (line.posted_micros, line.lost_micros):
            yield f"line {line.seq} says {line.posted_micros} and {line.lost_micros}, not {paid}, {lost}"


@invariant("No more is posted for tokens than gateways took for them, each request rounded up.")
def no_more_is_posted_than_spent(look: Look) -> Iterator[str]:
    prices: dict[tuple[str, str], int] = {}
    spent: dict[Group, int] = defaultdict(int)
    for line in look.tx.execute(sa.select(token_lines).where(token_lines.c.kind == TOKEN_USAGE)):
        prices[line.version, line.token_class] = line.price_micros
        group = (line.key_id, line.model, line.tier, line.version, line.day)
        spent[group] += line.spent_micros
        if not line.is_first_party and line.posted_micros > line.spent_micros:
            yield f"line {line.seq}: posted {line.posted_micros}, spent {line.spent_micros} micros"
    taken: dict[Group, int] = defaultdict(int)
    for row in look.tx.execute(
        sa.select(*_GROUP, _sum(tokens.c.micros).label("micros")).group_by(*_GROUP)
    ):
        taken[_group(row)] += int(row.micros)
    for row in look.tx.execute(sa.select(tokens, _DAY).where(tokens.c.corrects.is_not(None))):
        counts = (row.input_uncached, row.cache_read, row.output)
        for token_class, count in zip(CLASSES, counts, strict=True):
            price = prices.get((row.price_version, token_class), 0)
            taken[_group(row)] += cover_quantity(max(count, 0), price, PER_TOKENS)
    for group, micros in spent.items():
        if micros > taken[group]:
            yield f"{group}: {micros} micros count as spent, gateways took {taken[group]}"


@invariant(
    "A gateway's events spend no more than its allowance grants, and what is read is settled."
)
def spending_stays_granted(look: Look) -> Iterator[str]:
    read: dict[tuple[object, ...], int] = defaultdict(int)
    query = sa.select(tokens.c.gateway, tokens.c.epoch, tokens.c.key_id, tokens.c.micros).where(
        tokens.c.is_first_party.is_(False), tokens.c.corrects.is_(None)
    )
    for row in look.tx.execute(query):
        read[row.gateway, row.epoch, row.key_id] += row.micros
    for row in look.tx.execute(sa.select(allowances)):
        spent = read.pop((row.gateway, row.epoch, row.key_id), 0)
        if spent != row.settled_micros:
            yield f"{row.key_id} at {row.gateway}: read {spent}, settled {row.settled_micros} micros"
        if spent > row.granted_micros:
            yield f"{row.key_id} at {row.gateway}: granted {row.granted_micros}, spent {spent} micros"
    for (gateway, _, key_id), spent in read.items():
        if spent:
            yield f"{key_id} at {gateway}: spent {spent} micros, and nothing was granted"


@invariant("Behind an open allowance is a hold of all that may still come of it.")
def allowances_are_held(look: Look) -> Iterator[str]:
    held = {
        row.subject: row.amount_micros
        for row in look.tx.execute(
            sa.select(holds).where(holds.c.state == "open", holds.c.subject.like("allowance:%"))
        )
    }
    query = sa.select(allowances).where(allowances.c.state == AllowanceState.OPEN)
    for row in look.tx.execute(query):
        due = row.granted_micros - row.settled_micros
        found = held.get(subject_of(row.gateway, row.epoch, row.key_id), 0)
        if found < due:
            yield f"{row.key_id} at {row.gateway}: {due} micros may come, {found} are held"


@invariant("A gateway's life that is over holds nothing.")
def closed_gateways_hold_nothing(look: Look) -> Iterator[str]:
    over = {
        (row.gateway, row.epoch)
        for row in look.tx.execute(sa.select(spools).where(spools.c.state == EpochState.CLOSED))
    }
    still = {
        row.subject
        for row in look.tx.execute(
            sa.select(holds.c.subject).where(
                holds.c.state == "open", holds.c.subject.like("allowance:%")
            )
        )
    }
    for row in look.tx.execute(sa.select(allowances)):
        is_over = (row.gateway, row.epoch) in over
        if is_over and subject_of(row.gateway, row.epoch, row.key_id) in still:
            yield f"{row.key_id} at {row.gateway}: its life is over, its hold is not"
        if is_over != (row.state == AllowanceState.CLOSED):
            yield f"{row.key_id} at {row.gateway}: the allowance is {row.state}"
