"""What it came to: usage, balance, invoices."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer

from sublet.base.kernel.interval import month_of
from sublet.cli import values
from sublet.cli.commands import MONEY, End, Json, Organisation, Start, client, command
from sublet.cli.errors import UsageError
from sublet.cli.screen import facts, show, show_json, table

if TYPE_CHECKING:
    from sublet.base.wire import rest


def add_to(app: typer.Typer) -> None:
    command(app, "sublet usage", "sublet usage --from 2026-11-01 --to 2026-12-01", panel=MONEY)(
        usage
    )
    command(app, "sublet balance", panel=MONEY)(balance)
    command(app, "sublet invoice", "sublet invoice inv_…", panel=MONEY)(invoice)
    command(app, "sublet invoices", panel=MONEY)(invoices)


def window(start: str | None, end: str | None) -> tuple[datetime, datetime]:
    """`--from` and `--to`; this month so far where they are left out."""
    until = values.instant(end, "--to", ago=True) if end else values.now()
    since = values.instant(start, "--from", ago=True) if start else month_of(until)
    if since >= until:
        raise UsageError(f"--from ({values.when(since)}) lies before --to ({values.when(until)}).")
    return since, until


def usage(
    start: Start = None, end: End = None, organisation: Organisation = None, as_json: Json = False
) -> None:
    """What each workload held and ran, and what was charged for it."""
    since, until = window(start, end)
    with client() as cloud:
        found = list(cloud.money.usage(start=since, end=until, organisation_id=organisation))
    if as_json:
        show_json(found)
        return
    rows = [
        (
            line.name or line.workload_id,
            line.workload_id,
            values.device_hours(line.held_device_ms),
            values.device_hours(line.ran_device_ms),
            values.money(line.charged.micros, line.charged.currency),
        )
        for line in found
    ]
    columns = ("name", "id", ">held, device-hours", ">ran, device-hours", ">charged")
    table(columns, rows, empty=f"nothing was used from {values.when(since)}")


def balance(organisation: Organisation = None, as_json: Json = False) -> None:
    """Your credit: what there is, what is held, how long it lasts."""
    with client() as cloud:
        found = cloud.money.balance(organisation_id=organisation)
    if as_json:
        show_json(found)
        return
    currency = found.balance.currency
    facts(
        (
            ("balance", values.money(found.balance.micros, currency)),
            ("held", values.money(found.held.micros, currency)),
            ("available", values.money(found.available.micros, currency)),
            ("now", values.an_hour(found.burn_micros_per_hour, currency)),
            ("runs out", values.when(found.runs_out_at) if found.runs_out_at else ""),
        )
    )


def invoice(
    invoice_id: Annotated[
        str | None, typer.Argument(metavar="[INVOICE]", help="Default: this month so far.")
    ] = None,
    organisation: Organisation = None,
    as_json: Json = False,
) -> None:
    """An invoice, line by line; without an id this month's, so far."""
    with client() as cloud:
        found = (
            cloud.money.invoice(invoice_id)
            if invoice_id
            else cloud.money.invoice_so_far(organisation_id=organisation)
        )
    if as_json:
        show_json(found)
        return
    state = f"issued {values.when(found.issued_at)}" if found.issued_at else "so far"
    show(f"{found.number or 'Invoice'} of {found.month:%B %Y}, {state}")
    table(
        ("", "kind", "what", ">amount"),
        [_line(line) for line in found.lines],
        empty="no lines yet",
    )
    show(f"total  {values.money(found.total.micros, found.total.currency)}")


def _line(line: rest.InvoiceLine) -> tuple[str, ...]:
    correction = " (correction)" if line.charge_class == "correction" else ""
    return (
        str(line.number),
        line.kind.replace("_", " ") + correction,
        line.text,
        values.money(line.amount.micros, line.amount.currency),
    )


def invoices(organisation: Organisation = None, as_json: Json = False) -> None:
    """The invoices issued so far."""
    with client() as cloud:
        found = list(cloud.money.invoices(organisation_id=organisation))
    if as_json:
        show_json(found)
        return
    rows = [
        (
            i.id,
            i.number,
            f"{i.month:%Y-%m}",
            values.when(i.issued_at),
            values.money(i.total.micros, i.total.currency),
        )
        for i in found
    ]
    columns = ("id", "number", "month", "issued", ">total")
    table(columns, rows, empty="none issued yet: `sublet invoice` shows this month so far")
