"""Transfers, invoices and the statement as they are shown."""

from __future__ import annotations

from sublet.base.kernel.money import Money
from sublet.base.wire import rest
from sublet.money import billing, economics
from sublet.records import ledger


def transfer(found: ledger.Transfer) -> rest.Transfer:
    return rest.Transfer(
        id=found.id,
        seq=found.seq,
        at=found.at,
        kind=found.kind,
        debit=found.debit,
        credit=found.credit,
        amount=rest.Money.of(found.amount),
        organisation_id=found.organisation_id,
        project_id=found.project_id,
        subject=found.subject,
        contract_id=found.contract_id,
        starts_at=found.starts_at,
        ends_at=found.ends_at,
        detail=dict(found.detail),
    )


def invoice(found: billing.Invoice) -> rest.Invoice:
    return rest.Invoice(
        id=found.id,
        number=found.number,
        organisation_id=found.organisation_id,
        month=found.month,
        closes_at=found.closes_at,
        issued_at=found.issued_at,
        lines=[_line(line, found.currency) for line in found.lines],
        total=rest.Money.of(found.total),
        total_minor=found.total_minor,
    )


def _line(line: billing.InvoiceLine, currency: str) -> rest.InvoiceLine:
    return rest.InvoiceLine(
        number=line.number,
        kind=line.kind,
        product=line.product,
        charge_class=line.charge_class.value,
        text=line.text,
        subject=line.subject,
        contract_id=line.contract_id,
        project_id=line.project_id,
        starts_at=line.starts_at,
        ends_at=line.ends_at,
        quantity=line.quantity,
        price_micros=line.price_micros,
        per=line.per,
        version=line.version,
        amount=rest.Money.of(Money(line.amount_micros, currency)),
        shown_minor=line.shown_minor,
    )


def invoice_summary(found: billing.Invoice) -> rest.InvoiceSummary:
    assert found.id is not None
    assert found.seq is not None
    assert found.number is not None
    assert found.issued_at is not None
    return rest.InvoiceSummary(
        id=found.id,
        seq=found.seq,
        number=found.number,
        organisation_id=found.organisation_id,
        month=found.month,
        issued_at=found.issued_at,
        total=rest.Money.of(found.total),
        total_minor=found.total_minor,
    )


def statement(found: economics.Statement) -> rest.Statement:
    return rest.Statement(
        start=found.start,
        end=found.end,
        revenue_by_product={
            product: rest.Money.of(amount) for product, amount in found.revenue_by_product.items()
        },
        revenue=rest.Money.of(found.revenue),
        credits=rest.Money.of(found.credits),
        trial=rest.Money.of(found.trial),
        payments=rest.Money.of(found.payments),
        first_party=rest.Money.of(found.first_party),
        depreciation=rest.Money.of(found.depreciation),
        power=rest.Money.of(found.power),
        margin=rest.Money.of(found.margin),
        device_ms_by_use=dict(found.device_ms_by_use),
        idle_cost=rest.Money.of(found.idle_cost),
        idle_cost_micros_per_device_hour=found.idle_cost_micros_per_device_hour,
        revenue_micros_per_device_hour=found.revenue_micros_per_device_hour,
        utilisation_permille=found.utilisation_permille,
        pools_without_costs=list(found.pools_without_costs),
        figures=[
            rest.Figure(
                name=figure.name, value=figure.value, unit=figure.unit, formula=figure.formula
            )
            for figure in found.figures
        ],
    )
