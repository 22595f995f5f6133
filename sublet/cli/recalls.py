"""For the owner: recalls, from the plan to the hand-back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sublet.cli import values
from sublet.cli.commands import OWNER, Json, PoolWord, client, command, group, only_pool
from sublet.cli.errors import CliError, UsageError
from sublet.cli.screen import facts, poll, progress, show, show_json, table

if TYPE_CHECKING:
    from sublet.base.wire import rest
    from sublet.sdk import Client

recall = group(
    "Take devices back: first a plan, then the deed.",
    "sublet recall plan --all",
    "sublet recall accept",
    "sublet recall wait",
    "sublet recall return",
)

RecallId = Annotated[
    str | None, typer.Argument(metavar="RECALL", help="Its id; default: the newest that fits.")
]
UNDER_WAY = {"accepted", "noticing", "draining"}
DONE = {"delivered", "returned", "cancelled", "expired"}


def add_to(app: typer.Typer) -> None:
    command(
        recall,
        "sublet recall plan --devices 2",
        "sublet recall plan --all",
        "sublet recall plan --devices 8 --shape 4 --by 10m --until 2h",
        name="plan",
    )(plan)
    command(recall, "sublet recall accept", "sublet recall accept rec_… --wait", name="accept")(
        accept
    )
    command(recall, "sublet recall wait", name="wait")(wait_for)
    command(recall, "sublet recall cancel", "sublet recall cancel rec_…", name="cancel")(cancel)
    command(recall, "sublet recall return", "sublet recall return rec_…", name="return")(give_back)
    command(recall, "sublet recall list", name="list")(list_recalls)
    command(recall, "sublet recall show", "sublet recall show rec_…", name="show")(show_recall)
    command(recall, "sublet recall shortfalls", name="shortfalls")(shortfalls)
    app.add_typer(recall, name="recall", rich_help_panel=OWNER)


def plan(
    count: Annotated[int | None, typer.Option("--devices", min=1, help="How many devices.")] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All that first-party work does not hold yet.")
    ] = False,
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

    if (count is None) != everything:
        raise UsageError("say how many with --devices, or --all; not both.")
    if count is not None and count % shape:
        raise UsageError(f"--devices {count} is no multiple of --shape {shape}.")
    with client() as cloud:
        chosen = only_pool(cloud, pool)
        count = count or max(chosen.sellable_devices - chosen.first_party_devices, shape)
        given: dict[str, Any] = {
            "pool_id": chosen.id,
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


def _chosen(cloud: Client, recall_id: str | None, states: set[str], what: str) -> str:
    """The id given, or the newest recall in one of these states."""
    if recall_id is not None:
        return recall_id
    fitting = [found.id for found in cloud.recalls.list() if found.state in states]
    if not fitting:
        raise CliError(f"there is no recall {what}: `sublet recall list` shows all.")
    return fitting[-1]


def accept(
    recall_id: RecallId = None,
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
            chosen = _chosen(cloud, recall_id, {"planned"}, "that is planned and not accepted")
            found = cloud.recalls.accept(chosen, body)
        if wait:
            found = _wait(cloud, found)
    if as_json:
        show_json(found)
        return
    _show(found)
    if found.state != "returned":
        show(f"give back  sublet recall return {found.id}")


def wait_for(recall_id: RecallId = None, as_json: Json = False) -> None:
    """Wait until a recall is delivered, or over."""
    with client(quiet=True) as cloud:
        chosen = _chosen(cloud, recall_id, UNDER_WAY | {"delivered"}, "under way")
        found = _wait(cloud, cloud.recalls.get(chosen))
    _shown(found, as_json)


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


def cancel(recall_id: RecallId = None, as_json: Json = False) -> None:
    """Cancel a recall: notices not yet due are withdrawn."""
    with client() as cloud:
        chosen = _chosen(cloud, recall_id, UNDER_WAY | {"planned"}, "to be called off")
        _shown(cloud.recalls.cancel(chosen), as_json)


def give_back(recall_id: RecallId = None, as_json: Json = False) -> None:
    """Give the devices back to sale: who was queued again starts."""
    with client() as cloud:
        chosen = _chosen(cloud, recall_id, {"delivered"}, "that is delivered")
        _shown(cloud.recalls.give_back(chosen), as_json)


def show_recall(recall_id: RecallId = None, as_json: Json = False) -> None:
    """One recall: its schedule, victims, progress."""
    with client() as cloud:
        states = {*UNDER_WAY, *DONE, "planned"}
        _shown(cloud.recalls.get(_chosen(cloud, recall_id, states, "yet")), as_json)


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
            else "no date: when they come free is not known"
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
