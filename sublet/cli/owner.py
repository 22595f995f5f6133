"""For the owner: nodes, pools, the firm shelf, prices and costs, the books, customers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sublet.cli import values
from sublet.cli.commands import (
    OWNER,
    End,
    Json,
    Organisation,
    PoolWord,
    Start,
    Yes,
    client,
    command,
    group,
    only_node,
    only_pool,
)
from sublet.cli.errors import UsageError
from sublet.cli.money import window
from sublet.cli.screen import confirm, facts, say, show, show_json, table

if TYPE_CHECKING:
    from sublet.base.wire import rest

rate_card = group(
    "The rate card: what is sold, and at which price.",
    "sublet rate-card show > card.toml",
    "sublet rate-card set card.toml",
)
costs = group(
    "Cost facts: what the devices cost you, and where the figures come from.",
    "sublet costs show",
    "sublet costs set costs.toml",
)

NodeWord = Annotated[
    str | None, typer.Argument(metavar="[NODE]", help="Its id or name; default: the one.")
]
Text = Annotated[Path, typer.Argument(metavar="FILE", help="TOML; - reads standard input.")]


def add_to(app: typer.Typer) -> None:
    command(app, "sublet nodes", panel=OWNER)(nodes)
    command(app, "sublet devices", panel=OWNER)(devices)
    command(app, "sublet cordon", "sublet cordon node-1 --immediate --break-notice", panel=OWNER)(
        cordon
    )
    command(app, "sublet uncordon", panel=OWNER)(uncordon)
    command(app, "sublet drain node-1", panel=OWNER)(drain)
    command(app, "sublet pools", panel=OWNER)(pools)
    command(app, "sublet excess", panel=OWNER)(excess)
    command(app, "sublet firm-shelf", "sublet firm-shelf 2 --until 30d", panel=OWNER)(firm_shelf)
    command(rate_card, "sublet rate-card show > rates.toml", name="show")(show_rate_card)
    command(
        rate_card,
        "sublet rate-card set rates.toml",
        "sublet rate-card set rates.toml --from 2026-12-01",
        name="set",
    )(set_rate_card)
    app.add_typer(rate_card, name="rate-card", rich_help_panel=OWNER)
    command(costs, "sublet costs show", name="show")(show_costs)
    command(costs, "sublet costs set costs.toml", name="set")(set_costs)
    app.add_typer(costs, name="costs", rich_help_panel=OWNER)
    command(app, "sublet statement", "sublet statement --from 1d", panel=OWNER)(statement)
    command(app, "sublet orgs", panel=OWNER)(orgs)
    command(app, "sublet standing org_… suspended --why 'abuse report 12'", panel=OWNER)(standing)
    command(app, "sublet credit org_… 5.00 --reference welcome-1", panel=OWNER)(credit)
    command(app, "sublet payment org_… 100 --reference bank-2026-118", panel=OWNER)(payment)
    command(app, "sublet audit", "sublet audit --organisation org_…", panel=OWNER, name="audit")(
        audit
    )


# Nodes and pools.


def nodes(as_json: Json = False) -> None:
    """The nodes, their state, and how strong their fences are."""
    with client() as cloud:
        found = list(cloud.nodes.list())
    if as_json:
        show_json(found)
        return
    if not found:
        show("no nodes")
    for node in found:
        trusted = ", trusted tenants" if node.trusted_tenants else ""
        show(
            f"{node.name} ({node.id})  {node.state}, {node.devices} devices, {node.engine}{trusted}"
        )
        table(
            ("fence", "strength", "by", "shown by", "way to more"),
            [(f.fence, f.strength, f.by, f.evidence, f.remedy) for f in node.fences],
        )
        if node.missing_for_strangers:
            show(f"  missing for strangers: {', '.join(node.missing_for_strangers)}")


def devices(as_json: Json = False) -> None:
    """Every device: who holds it, by which right, until when."""
    with client() as cloud:
        found = list(cloud.devices.list())
    if as_json:
        show_json(found)
        return
    rows = [
        (
            d.name,
            d.kind,
            d.use if d.healthy else f"{d.use} (unhealthy)",
            d.holder or "-",
            d.organisation_id or "-",
            d.rank or "-",
            values.when(d.free_by),
        )
        for d in found
    ]
    table(("device", "kind", "use", "holder", "organisation", "right", "free by"), rows)


def cordon(
    node: NodeWord = None,
    immediate: Annotated[
        bool, typer.Option("--immediate", help="Also end what runs now; needs --break-notice.")
    ] = False,
    break_notice: Annotated[
        bool,
        typer.Option("--break-notice", help="Break promised notices: audited, penalty posted."),
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Let nothing new start on a node; what runs goes on."""
    from sublet.base.wire import rest as shapes

    if break_notice:
        confirm("End what runs without its notice, and pay the penalty?", yes=yes)
    body = shapes.CordonCreate(
        mode="immediate" if immediate else "cordon", break_notice=break_notice
    )
    with client(quiet=True) as cloud:
        found = cloud.nodes.cordon(only_node(cloud, node).id, body)
    _show_node(found, as_json)


def uncordon(node: NodeWord = None, as_json: Json = False) -> None:
    """Let new work start on a node again."""
    with client() as cloud:
        found = cloud.nodes.uncordon(only_node(cloud, node).id)
    _show_node(found, as_json)


def drain(node: NodeWord = None, as_json: Json = False) -> None:
    """Let nothing new start, and end what runs, each by its own notice."""
    with client() as cloud:
        found = cloud.nodes.drain(only_node(cloud, node).id)
    _show_node(found, as_json)


def _show_node(found: rest.Node, as_json: bool) -> None:
    if as_json:
        show_json(found)
        return
    show(f"{found.name} ({found.id})  {found.state}")


def pools(as_json: Json = False) -> None:
    """The pools: devices sold, first-party, free."""
    with client() as cloud:
        found = list(cloud.pools.list())
    if as_json:
        show_json(found)
        return
    rows = [
        (
            p.name,
            p.id,
            p.device_model,
            str(p.sellable_devices),
            str(p.sold_devices),
            str(p.first_party_devices),
            str(p.free_devices),
            str(p.firm_shelf.devices),
            values.length(p.return_promise_seconds),
        )
        for p in found
    ]
    columns = ("pool", "id", "device", ">sellable", ">sold", ">own", ">free", ">shelf", "promise")
    table(columns, rows)


def excess(pool: PoolWord = None, as_json: Json = False) -> None:
    """The excess curve: what can be lent now and be back so long after asking."""
    with client() as cloud:
        found = only_pool(cloud, pool)
    if as_json:
        show_json(found.excess)
        return
    rows = [(values.length(point.notice_seconds), str(point.devices)) for point in found.excess]
    table(("notice", ">devices"), rows)


def firm_shelf(
    count: Annotated[
        int | None, typer.Argument(metavar="[DEVICES]", min=0, help="Default: show it.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", help="A time, or from now such as 30d.")
    ] = None,
    pool: PoolWord = None,
    as_json: Json = False,
) -> None:
    """What you have decided to sell for longer than forecasts vouch for: show or set it."""
    from sublet.base.wire import rest as shapes

    with client() as cloud:
        found = only_pool(cloud, pool)
        if count is not None:
            end = values.instant(until, "--until") if until else None
            body = shapes.FirmShelfPut(devices=count, until=end)
            found = cloud.pools.set_firm_shelf(found.id, body, version=found.version)
    if as_json:
        show_json(found)
        return
    shelf = found.firm_shelf
    end_of_it = f"until {values.when(shelf.until)}" if shelf.until else "until changed"
    show(f"{found.name}: {shelf.devices} of {found.sellable_devices} devices, {end_of_it}")


# Prices, costs, books.


def show_rate_card(as_json: Json = False) -> None:
    """The rate card in force, as TOML."""
    with client() as cloud:
        found = cloud.rate_card.get()
    if as_json:
        show_json(found)
        return
    say(f"# version {found.version}, in force from {values.when(found.effective_from)}")
    sys.stdout.write(found.text)


def set_rate_card(
    file: Text,
    start: Annotated[
        str | None, typer.Option("--from", help="In force from then; default: from now on.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Put a new rate card in force. Prices that were quoted stand."""
    from sublet.base.wire import rest as shapes

    given: dict[str, Any] = {"text": _read(file)}
    if start is not None:
        given["effective_from"] = values.instant(start, "--from")
    with client() as cloud:
        version = cloud.rate_card.get().version
        found = cloud.rate_card.put(shapes.RateCardPut(**given), version=version)
    if as_json:
        show_json(found)
        return
    show(f"version {found.version}, in force from {values.when(found.effective_from)}")


def _read(file: Path) -> str:
    if str(file) == "-":
        return sys.stdin.read()
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file} cannot be read: {error}.") from None


def show_costs(as_json: Json = False) -> None:
    """What a device costs you, and the floor below which nothing is sold."""
    with client() as cloud:
        found = list(cloud.cost_facts.list())
    if as_json:
        show_json(found)
        return
    _show_costs(found)


def _show_costs(found: list[rest.CostFacts]) -> None:
    if not found:
        show("no cost facts: `sublet costs set FILE`")
    for cost in found:
        facts(
            (
                ("pool", f"{cost.name} ({cost.pool_id})"),
                ("bought for", f"{values.money(cost.purchase_micros_per_device)} a device"),
                ("residual", values.money(cost.residual_micros_per_device)),
                ("in service", f"{cost.in_service_on}, {cost.life_months} months"),
                ("power", f"{cost.idle_watts} W idle, {cost.busy_watts} W busy"),
                ("wear", values.an_hour(cost.wear_micros_per_device_hour)),
                ("floor", values.an_hour(cost.floor_micros_per_device_hour)),
                ("source", cost.source),
            )
        )


def set_costs(file: Text, as_json: Json = False) -> None:
    """Take over cost facts from a TOML file."""
    from sublet.base.wire import rest as shapes

    with client() as cloud:
        found = cloud.cost_facts.put(shapes.CostFactsPut(text=_read(file)))
    if as_json:
        show_json(found)
        return
    _show_costs(found.data)


def statement(start: Start = None, end: End = None, as_json: Json = False) -> None:
    """Revenue, depreciation, power and margin; the device time; what idling costs."""
    since, until = window(start, end)
    with client() as cloud:
        found = cloud.money.statement(start=since, end=until)
    if as_json:
        show_json(found)
        return
    show_statement(found)


def show_statement(found: rest.Statement) -> None:
    show(f"Statement from {values.when(found.start)} to {values.when(found.end)}")
    money = values.money
    facts(
        (
            *((f"revenue, {p}", money(m.micros)) for p, m in found.revenue_by_product.items()),
            ("revenue", money(found.revenue.micros)),
            ("credits", money(found.credits.micros)),
            ("first-party, at its price", money(found.first_party.micros)),
            ("depreciation", money(found.depreciation.micros)),
            ("power", money(found.power.micros)),
            ("margin", money(found.margin.micros)),
            ("idle cost", money(found.idle_cost.micros)),
            ("idle cost a device-hour", _optional(found.idle_cost_micros_per_device_hour)),
            ("revenue a device-hour", _optional(found.revenue_micros_per_device_hour)),
            (
                "utilisation",
                ""
                if found.utilisation_permille is None
                else f"{found.utilisation_permille / 10:.1f} %",
            ),
        )
    )
    rows = [(use, values.device_hours(ms)) for use, ms in found.device_ms_by_use.items()]
    table(("device time", ">device-hours"), rows)
    if found.pools_without_costs:
        show(f"without cost facts: {', '.join(found.pools_without_costs)}")


def _optional(micros: int | None) -> str:
    return "" if micros is None else values.an_hour(micros)


# Customers.


def orgs(as_json: Json = False) -> None:
    """The organisations and their standing."""
    with client() as cloud:
        found = list(cloud.organisations.list())
    if as_json:
        show_json(found)
        return
    rows = [(o.id, o.name, o.kind, o.standing, values.when(o.created_at)) for o in found]
    table(("id", "name", "kind", "standing", "since"), rows)


def standing(
    organisation: Annotated[str, typer.Argument(metavar="ORGANISATION", help="Its id.")],
    value: Annotated[
        str,
        typer.Argument(metavar="STANDING", help="unverified, good, warned, suspended, closing."),
    ],
    why: Annotated[str, typer.Option("--why", help="Kept in the audit trail.")],
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Set an organisation's standing: what it may do."""
    from sublet.base.wire import rest as shapes

    confirm(f"Set {organisation} to {value}?", yes=yes)
    body = shapes.StandingPut.model_validate({"standing": value, "why": why})
    with client() as cloud:
        version = cloud.organisations.get(organisation).version
        found = cloud.organisations.set_standing(organisation, body, version=version)
    if as_json:
        show_json(found)
        return
    show(f"{found.id}  {found.name}  {found.standing}")


Amount = Annotated[str, typer.Argument(metavar="AMOUNT", help="Such as 5.00.")]
Reference = Annotated[
    str, typer.Option("--reference", help="Makes it once: the same again is not another.")
]
Note = Annotated[str, typer.Option("--note", help="For people.")]
Payer = Annotated[str, typer.Argument(metavar="ORGANISATION", help="Its id.")]


def credit(
    organisation: Payer,
    amount: Amount,
    reference: Reference,
    note: Note = "",
    as_json: Json = False,
) -> None:
    """Give an organisation credit."""
    from sublet.base.wire import rest as shapes

    body = shapes.CreditCreate(
        organisation_id=organisation,
        amount_micros=values.micros(amount, "amount"),
        reference=reference,
        note=note,
    )
    with client() as cloud:
        found = cloud.money.grant(body)
    _show_transfer(found, as_json)


def payment(
    organisation: Payer,
    amount: Amount,
    reference: Reference,
    note: Note = "",
    as_json: Json = False,
) -> None:
    """Record money that came in."""
    from sublet.base.wire import rest as shapes

    body = shapes.PaymentCreate(
        organisation_id=organisation,
        amount_micros=values.micros(amount, "amount"),
        reference=reference,
        note=note,
    )
    with client() as cloud:
        found = cloud.money.record_payment(body)
    _show_transfer(found, as_json)


def _show_transfer(found: rest.Transfer, as_json: bool) -> None:
    if as_json:
        show_json(found)
        return
    show(f"{found.id}  {found.kind}  {values.money(found.amount.micros, found.amount.currency)}")


def audit(organisation: Organisation = None, as_json: Json = False) -> None:
    """The audit trail: who did what, from where, and what was refused."""
    with client() as cloud:
        found = list(cloud.audit.list(organisation_id=organisation))
    if as_json:
        show_json(found)
        return
    rows = [(values.when(e.at), e.actor, e.address, e.action, e.target, e.result) for e in found]
    table(("at", "by", "from", "act", "on", "result"), rows)
