"""From the ledger to an invoice. Pure.

An invoice is a set of the ledger's transfers, grouped and explained; so its total is the ledger's
change for that customer, to the micro, by construction. Which invoice a transfer belongs to
follows from two instants and nothing else: when the use was, and when it was posted.

    its own month           if it was posted before that month closed (72 h after its end)
    else the first month    that had not closed when it was posted: a correction, which keeps its
                            own service dates

Once a month has closed, nothing that is posted later can belong to it: that is what freezes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from fractions import Fraction

from sublet.base.kernel.interval import month_of, next_month
from sublet.base.kernel.money import Money, apportion
from sublet.base.kernel.price import DEVICE_HOUR_MS
from sublet.money.billing.model import Charge, ChargeClass, Invoice, InvoiceLine

CLOSE_AFTER = timedelta(hours=72)


def closes_at(month: datetime) -> datetime:
    """When a month is frozen: 72 h after its end."""
    return next_month(month) + CLOSE_AFTER


def billing_month(service_start: datetime, posted_at: datetime) -> datetime:
    """The month on whose invoice a transfer stands."""
    month = month_of(service_start)
    while posted_at >= closes_at(month):
        month = next_month(month)
    return month


def lines_of(month: datetime, currency: str, charges: Iterable[Charge]) -> tuple[InvoiceLine, ...]:
    """The lines of a month's invoice: one for each contract, kind, price and service month; of
    tokens one for each project, model, class, tier, price and service month.

    Order: corrections of earlier months first, then by service start. Shown minor units are
    apportioned over all lines, so that they add up to the total that is shown.
    """
    groups: dict[tuple[object, ...], list[Charge]] = {}
    for charge in charges:
        if billing_month(charge.starts_at, charge.posted_at) == month:
            groups.setdefault(_key(charge), []).append(charge)
    drafts = sorted(
        (_line(month, currency, group) for group in groups.values()),
        key=lambda line: (
            line.starts_at,
            line.contract_id or "",
            line.kind,
            line.project_id or "",
            line.subject or "",
            line.product,
            line.version,
        ),
    )
    # What was charged and taken back whole, quantity and all, says nothing to a reader.
    kept = [line for line in drafts if line.amount_micros or line.quantity]
    shown = apportion([line.amount_micros for line in kept])
    return tuple(
        line.numbered(number, minor)
        for number, (line, minor) in enumerate(zip(kept, shown, strict=True), start=1)
    )


def _key(charge: Charge) -> tuple[object, ...]:
    # What has no price is a sum of its own, such as the credit of one interruption.
    own = charge.transfer_id if charge.price_micros is None else ""
    service = month_of(charge.starts_at)
    price = (charge.price_micros, charge.per, charge.version)
    what = (charge.contract_id, charge.subject, charge.kind, charge.product)
    # A contract has one project. Tokens have no contract, and those of two projects stand apart.
    return (charge.project_id, *what, service, *price, own)


def _line(month: datetime, currency: str, group: Sequence[Charge]) -> InvoiceLine:
    first = group[0]
    corrects = month_of(first.starts_at) < month
    line = InvoiceLine(
        number=0,
        kind=first.kind,
        product=first.product,
        charge_class=ChargeClass.CORRECTION if corrects else ChargeClass.REGULAR,
        contract_id=first.contract_id,
        project_id=first.project_id,
        subject=first.subject,
        starts_at=min(charge.starts_at for charge in group),
        ends_at=max(charge.ends_at for charge in group),
        quantity=sum(charge.quantity for charge in group),
        price_micros=first.price_micros,
        per=first.per,
        version=first.version,
        amount_micros=sum(charge.amount_micros for charge in group),
        shown_minor=0,
        text="",
    )
    return dataclasses.replace(line, text=explain(line, currency, first.note))


def draft(
    *, organisation_id: str, month: datetime, currency: str, charges: Iterable[Charge]
) -> Invoice:
    """An invoice as it stands by these charges; only `issue` freezes it."""
    lines = lines_of(month, currency, charges)
    total = sum(line.amount_micros for line in lines)
    return Invoice(
        id=None,
        seq=None,
        organisation_id=organisation_id,
        month=month,
        currency=currency,
        closes_at=closes_at(month),
        issued_at=None,
        total_micros=total,
        total_minor=Money(total, currency).minor(),
        lines=lines,
    )


def explain(line: InvoiceLine, currency: str, note: str) -> str:
    """The line in words: what was used, when, at which price, and what that makes."""
    amount = Money(line.amount_micros, currency)
    head = "Correction: " if line.charge_class is ChargeClass.CORRECTION else ""
    window = f"{_instant(line.starts_at)} to {_instant(line.ends_at)}"
    if line.price_micros is None or line.per is None:
        return f"{head}{note or line.kind}, {window}: {amount}"
    price = Money(line.price_micros, currency)
    head += line.product if line.per == DEVICE_HOUR_MS else _of_tokens(line)
    units = "device-ms" if line.per == DEVICE_HOUR_MS else "tokens"
    unit = "device-hour" if line.per == DEVICE_HOUR_MS else f"{line.per} tokens"
    # Rounded once to micros; a correction is a difference of two such amounts.
    exact = Fraction(line.quantity * line.price_micros, line.per)
    equals = "=" if exact == line.amount_micros else "≈"
    return (
        f"{head}, {window}: {line.quantity} {units} "
        f"× {price} per {unit} (price {line.version}) {equals} {amount}"
    )


def _of_tokens(line: InvoiceLine) -> str:
    """Tokens' product names class and tier, their subject is the model."""
    _, token_class, tier = line.product.split(":")
    return f"{line.subject}, {token_class} tokens, tier {tier}"


def _instant(at: datetime) -> str:
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
