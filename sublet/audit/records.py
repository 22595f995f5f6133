"""Invariants of what was recorded: money that moved, use that happened, who acted."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

import sqlalchemy as sa

from sublet.audit.registry import Look, invariant
from sublet.base.kernel.interval import millis
from sublet.capacity.fleet.store import devices
from sublet.records import ledger
from sublet.records.ledger.store import accounts, holds
from sublet.records.metering.store import meters, spans, usage
from sublet.records.tenancy.store import keys, organisations
from sublet.rights.market.model import Product
from sublet.rights.market.store import contracts


@invariant("Every transfer has two sides: debits equal credits over all accounts.")
def transfers_balance(look: Look) -> Iterator[str]:
    total = ledger.trial_balance(look.tx)
    if total:
        yield f"the trial balance is {total}, not zero"


@invariant("An account's balance is the sum of its transfers, what is held the sum of its holds.")
def balances_are_sums(look: Look) -> Iterator[str]:
    for drift in ledger.recount(look.tx):
        yield str(drift)


@invariant("No customer's credit is below zero, and none is promised twice: balance ≥ open holds.")
def credit_is_never_negative(look: Look) -> Iterator[str]:
    query = sa.select(accounts).where(accounts.c.name.like("customer:%"))
    for row in look.tx.execute(query):
        if row.balance_micros < 0 or row.balance_micros < row.held_micros:
            yield f"{row.name}: balance {row.balance_micros}, held {row.held_micros} micros"


@invariant("A sale whose meter is open has an open hold on credit.")
def open_meter_has_a_hold(look: Look) -> Iterator[str]:
    held = sa.select(holds.c.subject).where(holds.c.state == "open")
    # What serves models is sold by the token, and its devices cost nobody anything.
    serving = sa.select(contracts.c.id).where(contracts.c.product == Product.SERVING)
    query = sa.select(meters.c.run_id, meters.c.workload_id).where(
        meters.c.closed_at.is_(None),
        meters.c.party == "sale",
        meters.c.workload_id.not_in(held),
        sa.func.coalesce(meters.c.contract_id, "").not_in(serving),
    )
    for row in look.tx.execute(query):
        yield f"{row.run_id} of {row.workload_id} runs without a hold"


@invariant("Usage of a run lies end to end from its meter's opening to where it is metered.")
def usage_is_contiguous(look: Look) -> Iterator[str]:
    by_run: dict[str, list[sa.Row[tuple[object, ...]]]] = defaultdict(list)
    corrected: dict[str, int] = defaultdict(int)
    query = sa.select(usage).where(usage.c.kind == "held").order_by(usage.c.starts_at, usage.c.seq)
    for row in look.tx.execute(query):
        if row.corrects is None:
            by_run[row.run_id].append(row)
        else:
            corrected[row.run_id] += 1
    for meter in look.tx.execute(sa.select(meters)):
        at = meter.opened_at
        for row in by_run.pop(meter.run_id, []):
            if row.starts_at != at or row.devices != meter.devices or row.ends_at < at:
                yield f"{meter.run_id}: a record begins at {row.starts_at}, due was {at}"
            at = row.ends_at
        # A close before what was metered is a correction, not a shorter record.
        if at != meter.metered_to and not corrected[meter.run_id]:
            yield f"{meter.run_id}: records end at {at}, the meter stands at {meter.metered_to}"
    for run_id in by_run:
        yield f"{run_id}: usage without a meter"


@invariant("No meter passes the last evidence of its run, nor its own close.")
def meter_stays_within_evidence(look: Look) -> Iterator[str]:
    for row in look.tx.execute(sa.select(meters)):
        if row.metered_to > row.last_evidence_at:
            yield f"{row.run_id}: metered to {row.metered_to}, seen until {row.last_evidence_at}"
        if row.closed_at is not None and row.metered_to > row.closed_at:
            yield f"{row.run_id}: metered to {row.metered_to}, closed at {row.closed_at}"
        if row.metered_to < row.opened_at:
            yield f"{row.run_id}: metered to before its opening"


@invariant(
    "A run is metered once: usage less corrections never exceeds its devices, nor goes below none."
)
def nothing_is_metered_twice(look: Look) -> Iterator[str]:
    edges: dict[str, list[tuple[int, int]]] = defaultdict(list)
    limits = {row.run_id: row.devices for row in look.tx.execute(sa.select(meters))}
    for row in look.tx.execute(sa.select(usage).where(usage.c.kind == "held")):
        edges[row.run_id].append((millis(row.starts_at), row.devices))
        edges[row.run_id].append((millis(row.ends_at), -row.devices))
    for run_id, steps in edges.items():
        level = 0
        by_instant: dict[int, int] = defaultdict(int)
        for at, change in steps:
            by_instant[at] += change
        for at in sorted(by_instant):
            level += by_instant[at]
            if not 0 <= level <= limits.get(run_id, 0):
                yield f"{run_id}: {level} devices metered at {at} ms, it holds {limits.get(run_id)}"
                break


@invariant("The uses of a device partition its time: end to end, in whole milliseconds, one open.")
def device_time_partitions(look: Look) -> Iterator[str]:
    seen: dict[str, object] = {}
    query = sa.select(spans).order_by(spans.c.device_id, spans.c.seq)
    for row in look.tx.execute(query):
        if row.device_id in seen:
            due = seen[row.device_id]
            if due is None:
                yield f"{row.device_id}: a use follows one that has not ended"
            elif row.starts_at != due:
                yield f"{row.device_id}: a use begins at {row.starts_at}, due was {due}"
        if row.ends_at is not None and row.ends_at < row.starts_at:
            yield f"{row.device_id}: a use ends before it begins"
        if row.starts_at.microsecond % 1000:
            yield f"{row.device_id}: a use begins within a millisecond"
        seen[row.device_id] = row.ends_at
    for device_id in look.tx.execute(sa.select(devices.c.id)).scalars():
        if device_id not in seen:
            yield f"{device_id}: nothing says what it was used for"
        elif seen[device_id] is not None:
            yield f"{device_id}: nothing says what it is used for since {seen[device_id]}"


@invariant("Keys are kept as digests and nothing else.")
def secrets_are_digests(look: Look) -> Iterator[str]:
    for row in look.tx.execute(sa.select(keys.c.id, keys.c.digest, keys.c.prefix)):
        if not re.fullmatch(r"[0-9a-f]{64}", row.digest) or len(row.prefix) > 8:
            yield f"{row.id}: its secret is not a digest"


@invariant("There is one owner.")
def one_owner(look: Look) -> Iterator[str]:
    query = sa.select(sa.func.count()).where(organisations.c.kind == "owner")
    count = look.tx.execute(query).scalar_one()
    if count > 1:
        yield f"{count} organisations own this cloud"
