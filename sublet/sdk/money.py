"""What it came to."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from sublet.base.wire import rest
from sublet.sdk.transport import Transport


class Money:
    """Usage, balance, credits, payments, invoices, the owner's statement."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def usage(
        self, *, start: datetime, end: datetime, organisation_id: str | None = None
    ) -> Iterator[rest.UsageLine]:
        return self._transport.pages(
            "/v1/usage", rest.UsageLine, start=start, end=end, organisation_id=organisation_id
        )

    def balance(self, *, organisation_id: str | None = None) -> rest.Balance:
        return self._transport.get("/v1/balance", rest.Balance, organisation_id=organisation_id)

    def grant(
        self, body: rest.CreditCreate, *, idempotency_key: str | None = None
    ) -> rest.Transfer:
        return self._transport.post(
            "/v1/credits", rest.Transfer, body, idempotency_key=idempotency_key
        )

    def record_payment(
        self, body: rest.PaymentCreate, *, idempotency_key: str | None = None
    ) -> rest.Transfer:
        return self._transport.post(
            "/v1/payments", rest.Transfer, body, idempotency_key=idempotency_key
        )

    def transfers(
        self, *, start: datetime, end: datetime, organisation_id: str | None = None
    ) -> Iterator[rest.Transfer]:
        return self._transport.pages(
            "/v1/transfers", rest.Transfer, start=start, end=end, organisation_id=organisation_id
        )

    def invoice_so_far(self, *, organisation_id: str | None = None) -> rest.Invoice:
        return self._transport.get(
            "/v1/invoices/so-far", rest.Invoice, organisation_id=organisation_id
        )

    def invoices(self, *, organisation_id: str | None = None) -> Iterator[rest.InvoiceSummary]:
        return self._transport.pages(
            "/v1/invoices", rest.InvoiceSummary, organisation_id=organisation_id
        )

    def invoice(self, invoice_id: str) -> rest.Invoice:
        return self._transport.get(f"/v1/invoices/{invoice_id}", rest.Invoice)

    def statement(self, *, start: datetime, end: datetime) -> rest.Statement:
        return self._transport.get("/v1/statement", rest.Statement, start=start, end=end)
