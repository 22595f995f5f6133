"""For the owner: recalls, nodes, pools, the firm shelf, prices and costs, the books, customers."""

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
from sublet.cli.screen import confirm, facts, poll, progress, say, show, show_json, table

if TYPE_CHECKING:
    from sublet.base.wire import rest
    from sublet.sdk import Client

recall = group("Take devices back: first a plan, then the deed.")
rate_card = group("The rate card: what is sold, and at which price.")
costs = group("Cost facts: what the devices cost you, and where the figures come from.")

PoolWord = Annotated[str | None, typer.Option("--pool", help="Its id or name; default: the one.")]
NodeWord = Annotated[
    str | None, typer.Argument(metavar="[NODE]", help="Its id or name; default: the one.")
]
RecallId = Annotated[str, typer.Argument(metavar="RECALL", help="Its id.")]
Text = Annotated[Path, typer.Argument(metavar="FILE", help="TOML; - reads standard input.")]
DONE = {"delivered", "returned", "cancelled", "expired"}


def add_to(app: typer.Typer) -> None:
    command(
        recall,
        "sublet recall plan --devices 2",
        "sublet recall plan --devices 8 --shape 4 --by 10m --until 2h",
        name="plan",
    )(plan)
    command(
        recall, "sublet recall accept rec_…", "sublet recall accept rec_… --wait", name="accept"
    )(accept)
    command(recall, "sublet recall cancel rec_…", name="cancel")(cancel)
    command(recall, "sublet recall return rec_…", name="return")(give_back)
    command(recall, "sublet recall list", name="list")(list_recalls)
    command(recall, "sublet recall show rec_…", name="show")(show_recall)
    command(recall, "sublet recall shortfalls", name="shortfalls")(shortfalls)
    app.add_typer(recall, name="recall", rich_help_panel=OWNER)
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
    command(app, "sublet trail", "sublet trail --organisation org_…", panel=OWNER)(trail)


# Recalls.


def plan(
    count: Annotated[int, typer.Option("--devices", min=1, help="How many devices.")],
    shape: Annotated[
        int, typer.Option("--shape", min=1, help="So many of them together on one node.")
    ] = 1,
    pool: PoolWord = None,
    by: Annotated[
        str | None, typer.Option("--by", help="A time, or from now such as 10m; default: soonest.")
    ] = None,
    until: Annotated[
        str | None, typer.Option("--until", help="When you give them back; default: when you say.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Plan to take devices back. Nothing happens until the plan is accepted, within a minute."""
    from sublet.base.wire import rest as shapes

    if count % shape:
        raise UsageError(f"--devices {count} is no multiple of --shape {shape}.")
    with client() as cloud:
        given: dict[str, Any] = {
            "pool_id": only_pool(cloud, pool).id,
            "devices": shape,
            "count": count // shape,
        }
        if by is not None:
            given["by"] = values.instant(by, "--by")
        if until is not None:
            given["until"] = values.instant(until, "--until")
        found = cloud.recalls.plan(shapes.RecallCreate(**given))
    if as_json:
        show_json(found)
        return
    _show(found)
    show(f"accept  sublet recall accept {found.id}   (until {values.when(found.expires_at)})")


def accept(
    recall_id: RecallId,
    rows: Annotated[
        list[int] | None, typer.Option("--row", help="Only this row; may be repeated.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it is delivered.")] = False,
    as_json: Json = False,
) -> None:
    """Accept a plan: notices go out at the last responsible moment, devices come by the schedule."""
    from sublet.base.wire import rest as shapes

    body = shapes.RecallAccept(rows=rows) if rows else None
    with client(quiet=True) as cloud:
        with progress("accepting"):
            found = cloud.recalls.accept(recall_id, body)
        if wait:
            found = _wait(cloud, found)
    if as_json:
        show_json(found)
        return
    _show(found)
    if found.state != "returned":
        show(f"give back  sublet recall return {found.id}")


def _wait(cloud: Client, found: rest.Recall) -> rest.Recall:
    latest = found

    def look() -> bool:
        nonlocal latest
        latest = cloud.recalls.get(found.id)
        free = sum(row.devices for row in latest.rows if row.delivered_at)
        shown.update(f"recall {latest.state}: {free} of {_planned(latest)} devices are yours")
        return latest.state in DONE

    with progress(f"recall {found.state}") as shown:
        poll(look)
    return latest


def _planned(found: rest.Recall) -> int:
    return sum(row.devices for row in found.rows)


def cancel(recall_id: RecallId, as_json: Json = False) -> None:
    """Cancel a recall: notices not yet due are withdrawn."""
    with client() as cloud:
        _shown(cloud.recalls.cancel(recall_id), as_json)


def give_back(recall_id: RecallId, as_json: Json = False) -> None:
    """Give the devices back to sale: who was queued again starts."""
    with client() as cloud:
        _shown(cloud.recalls.give_back(recall_id), as_json)


def show_recall(recall_id: RecallId, as_json: Json = False) -> None:
    """One recall: its schedule, victims, progress."""
    with client() as cloud:
        _shown(cloud.recalls.get(recall_id), as_json)


def _shown(found: rest.Recall, as_json: bool) -> None:
    if as_json:
        show_json(found)
    else:
        _show(found)


def _show(found: rest.Recall) -> None:
    late = ", LATE against its own schedule" if found.late else ""
    facts(
        (
            ("recall", f"{found.id}  {found.state}{late}"),
            ("wanted", f"{found.devices * found.count} devices of {found.pool_id}"),
            ("by", values.when(found.by) if found.by else "as soon as notices allow"),
            ("until", values.when(found.until) if found.until else "given back"),
            ("lost revenue", values.money(found.lost_revenue.micros)),
            ("credits", values.money(found.credits.micros)),
        )
    )
    rows = [
        (
            str(row.number),
            row.state,
            str(row.devices),
            values.when(row.free_by),
            values.when(row.delivered_at),
            "; ".join(_victim(victim) for victim in row.victims) or "idle",
        )
        for row in found.rows
    ]
    table(("row", "state", ">devices", "yours by", "yours at", "from"), rows, empty="no rows")
    if found.shortfall_devices:
        earliest = (
            f"earliest {values.when(found.shortfall_earliest_at)}"
            if found.shortfall_earliest_at
            else "no date: firm rights without an end stand in the way"
        )
        bought = f", or bought back for {found.buy_back.text}" if found.buy_back else ""
        show(f"shortfall  {found.shortfall_devices} devices: {earliest}{bought}")


def _victim(victim: rest.RecallVictim) -> str:
    return (
        f"{victim.workload_id} (notice {victim.notice_at:%H:%M:%S}Z, "
        f"SIGTERM {victim.term_at:%H:%M:%S}Z)"
    )


def list_recalls(as_json: Json = False) -> None:
    """All recalls, oldest first."""
    with client() as cloud:
        found = list(cloud.recalls.list())
    if as_json:
        show_json(found)
        return
    rows = [
        (
            r.id,
            r.state + (" late" if r.late else ""),
            str(r.devices * r.count),
            values.when(r.planned_at),
            values.when(r.by) if r.by else "soonest",
            values.when(r.delivered_at),
            values.when(r.until) if r.until else "given back",
        )
        for r in found
    ]
    columns = ("id", "state", ">devices", "planned", "by", "delivered", "until")
    table(columns, rows, empty="no recalls yet: `sublet recall plan --devices 1`")


def shortfalls(as_json: Json = False) -> None:
    """Devices that you needed and did not get by the date."""
    with client() as cloud:
        found = list(cloud.recalls.shortfalls())
    if as_json:
        show_json(found)
        return
    rows = [
        (
            s.id,
            str(s.devices),
            values.when(s.needed_at),
            values.when(s.earliest_at),
            values.when(s.recorded_at),
            values.when(s.ended_at),
        )
        for s in found
    ]
    columns = ("id", ">devices", "needed", "earliest", "recorded", "ended")
    table(columns, rows, empty="none: every need was met by its date")


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
            ("  of it credits", money(found.credits.micros)),
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


def trail(organisation: Organisation = None, as_json: Json = False) -> None:
    """The audit trail: who did what, from where, and what was refused."""
    with client() as cloud:
        found = list(cloud.audit.list(organisation_id=organisation))
    if as_json:
        show_json(found)
        return
    rows = [(values.when(e.at), e.actor, e.address, e.action, e.target, e.result) for e in found]
    table(("at", "by", "from", "act", "on", "result"), rows)
