"""Invariants of what it came to: posted is rated, credits within usage, invoices equal the ledger."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta

import sqlalchemy as sa

from sublet.audit.registry import Look, invariant
from sublet.base.kernel.interval import EPOCH, millis
from sublet.base.kernel.price import DEVICE_HOUR_MS
from sublet.base.store.installation import find_fact
from sublet.money.billing.invoice import billing_month
from sublet.money.billing.invoices import CLOSED_TO, charge_of
from sublet.money.billing.store import invoices, lines
from sublet.records import ledger
from sublet.records.metering.store import meters, usage
from sublet.rights import market
from sublet.rights.market.model import Product
from sublet.rights.market.store import contracts, postings

LATELY = timedelta(hours=1)
"""Contracts that ended longer ago are checked by their quantities, no longer by rating them again."""


@invariant(
    "What was posted or lost for a contract without an open meter is for what was metered, but for "
    "what rounds to nothing."
)
def posted_quantity_is_metered(look: Look) -> Iterator[str]:
    opened = set(
        look.tx.execute(sa.select(meters.c.contract_id).where(meters.c.closed_at.is_(None)))
        .scalars()
        .all()
    )
    metered: dict[str, int] = defaultdict(int)
    for row in look.tx.execute(sa.select(usage).where(usage.c.kind == "held")):
        metered[row.contract_id] += row.devices * (millis(row.ends_at) - millis(row.starts_at))
    posted: dict[str, int] = defaultdict(int)
    for row in look.tx.execute(
        sa.select(postings).where(postings.c.kind.in_([market.USAGE, market.LOSS]))
    ):
        posted[row.contract_id] += row.quantity
    # What serves models is sold by the token: its contract's price is what it is taken to earn.
    prices = {
        row.id: row.price_micros
        for row in look.tx.execute(
            sa.select(contracts.c.id, contracts.c.price_micros).where(
                contracts.c.product != Product.SERVING
            )
        )
    }
    for contract_id in metered.keys() | posted.keys():
        if contract_id in opened or (contract_id not in prices and not posted[contract_id]):
            continue
        left = metered[contract_id] - posted[contract_id]
        # Less than a micro more is no transfer. Two, since spot's price is another every hour.
        if left < 0 or left * prices.get(contract_id, 0) > 2 * DEVICE_HOUR_MS:
            yield (
                f"{contract_id}: metered {metered[contract_id]} device-ms, "
                f"posted or lost for {posted[contract_id]}"
            )


@invariant(
    "What was posted and lost for a contract is its price times what was metered, rounded once a "
    "line."
)
def posted_is_rated(look: Look) -> Iterator[str]:
    opened = sa.select(meters.c.contract_id).where(meters.c.closed_at.is_(None))
    metered = sa.select(meters.c.contract_id)
    lately = sa.or_(contracts.c.ended_at.is_(None), contracts.c.ended_at > look.now - LATELY)
    query = sa.select(contracts.c.id).where(
        lately, contracts.c.id.in_(metered), contracts.c.id.not_in(opened)
    )
    for contract_id in look.tx.execute(query).scalars().all():
        rated = market.rate_so_far(look.tx, market.get_contract(look.tx, contract_id)).amount
        posted = ledger.posted(look.tx, contract_id, market.USAGE)
        lost = ledger.lost(look.tx, contract_id)
        if rated != posted + lost:
            yield f"{contract_id}: rated {rated}, posted {posted}, lost {lost}"


@invariant("Nobody is given back more for a contract than was charged for it.")
def credits_stay_within_usage(look: Look) -> Iterator[str]:
    charged: dict[str, int] = defaultdict(int)
    for transfer in ledger.list_transfers(look.tx, None, EPOCH, look.now + LATELY):
        if transfer.contract_id is not None:
            charged[transfer.contract_id] += transfer.charge_micros
    for contract_id, micros in charged.items():
        if micros < 0:
            yield f"{contract_id}: {-micros} micros more were given back than charged"


@invariant("An issued invoice's lines sum to its total, and all of them to the ledger's change.")
def invoices_equal_the_ledger(look: Look) -> Iterator[str]:
    totals = {row.id: row for row in look.tx.execute(sa.select(invoices))}
    if not totals:
        return
    sums: dict[str, int] = defaultdict(int)
    for row in look.tx.execute(sa.select(lines.c.invoice_id, lines.c.amount_micros)):
        sums[row.invoice_id] += row.amount_micros
    months: dict[tuple[str, object], int] = defaultdict(int)
    for invoice_id, row in totals.items():
        months[(row.organisation_id, row.month)] += row.total_micros
        if sums[invoice_id] != row.total_micros:
            yield f"{invoice_id}: lines sum to {sums[invoice_id]}, its total is {row.total_micros}"
    closed_to = int(find_fact(look.tx, CLOSED_TO) or 0)
    owed: dict[tuple[str, object], int] = defaultdict(int)
    for transfer in ledger.list_transfers(look.tx, None, EPOCH, look.now + LATELY):
        charge = charge_of(transfer)
        if charge is None:
            continue
        month = billing_month(charge.starts_at, charge.posted_at)
        if millis(month) * 1000 < closed_to:
            owed[(charge.organisation_id, month)] += charge.amount_micros
    for key in owed.keys() | months.keys():
        if owed[key] != months[key]:
            yield f"{key[0]} {key[1]}: charged {owed[key]} micros, invoiced {months[key]}"
