"""`sublet status` and `sublet top`: what runs, what it costs, who holds which devices."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sublet.cli import values
from sublet.cli.commands import CLOUD, Json, client, command
from sublet.cli.screen import console, facts, show, show_json, table
from sublet.cli.workloads import COLUMNS, rows_of

if TYPE_CHECKING:
    from rich.console import Group

    from sublet.base.wire import rest

BAR_WIDTH = 40
COLOURS = {
    "sold_used": "green",
    "sold_unused": "bright_green",
    "first_party": "blue",
    "serving": "cyan",
    "overhead": "yellow",
    "down": "red",
    "idle": "bright_black",
}
WORDS = {"sold_used": "sold", "sold_unused": "sold, unused", "first_party": "yours"}
UNDER_WAY = {"accepted", "noticing", "draining", "delivered"}


def add_to(app: typer.Typer) -> None:
    command(app, "sublet status", "sublet status --json", panel=CLOUD)(status)
    command(app, "sublet top", "sublet top --once", panel=CLOUD)(top)


def status(as_json: Json = False) -> None:
    """What runs and what it costs now; for the owner the whole cloud."""
    with client() as cloud:
        found = cloud.status()
    if as_json:
        show_json(found)
        return
    trusted = ", trusted tenants" if found.trusted_tenants else ""
    show(f"Sublet {found.version}{trusted}, {values.when(found.now)}")
    if found.owner is not None:
        _show_owner(found.owner)
    table(COLUMNS, rows_of(found.workloads), empty="nothing runs")
    facts(
        (
            ("now", values.an_hour(found.burn_micros_per_hour, found.available.currency)),
            ("available", values.money(found.available.micros, found.available.currency)),
            ("runs out", values.when(found.runs_out_at) if found.runs_out_at else ""),
        )
    )


def _show_owner(owner: rest.OwnerStatus) -> None:
    for pool in owner.pools:
        parts = ", ".join(f"{use.devices} {WORDS.get(use.use, use.use)}" for use in pool.by_use)
        show(f"{pool.name}: {pool.devices} devices: {parts or 'none'}")
    show(
        f"earning {values.an_hour(owner.earning_micros_per_hour)} "
        f"against {values.an_hour(owner.cost_micros_per_hour)} of cost"
    )
    for recall in owner.recalls:
        show(f"recall {recall.id}  {recall.state}: {_progress(recall)}")


def _progress(recall: rest.Recall) -> str:
    planned = sum(row.devices for row in recall.rows)
    free = sum(row.devices for row in recall.rows if row.delivered_at)
    due = max((row.free_by for row in recall.rows), default=None)
    late = ", LATE" if recall.late else ""
    return f"{free} of {planned} devices, all by {values.when(due)}{late}"


def top(
    every: Annotated[float, typer.Option("--every", min=0.2, help="Seconds between looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="One picture, then end.")] = False,
    as_json: Json = False,
) -> None:
    """A live picture: devices by holder, earnings against cost, recalls under way. Ctrl-C ends it."""
    with client(quiet=True) as cloud:
        if as_json:
            show_json(cloud.status())
            return
        if once or not sys.stdout.isatty():
            console().print(picture(cloud.status()))
            return
        from rich.live import Live

        pause = threading.Event()
        # Ctrl-C is how a person ends it, so it is no failure.
        with (
            suppress(KeyboardInterrupt),
            Live(picture(cloud.status()), screen=True, auto_refresh=False) as live,
        ):
            while True:
                pause.wait(every)
                live.update(picture(cloud.status()), refresh=True)


def picture(found: rest.Status) -> Group:
    """One frame."""
    from rich.console import Group
    from rich.text import Text

    trusted = "   trusted tenants" if found.trusted_tenants else ""
    parts: list[Any] = [Text(f"Sublet   {values.when(found.now)}{trusted}", style="bold"), Text()]
    owner = found.owner
    if owner is not None:
        for pool in owner.pools:
            parts += _pool(pool)
        parts += [_earnings(owner), Text()]
        under_way = [recall for recall in owner.recalls if recall.state in UNDER_WAY]
        for recall in under_way:
            style = "bold red" if recall.late else "yellow"
            parts.append(Text(f"recall {recall.state:<9} {_progress(recall)}", style=style))
        if not under_way:
            parts.append(Text("no recall under way", style="dim"))
        parts.append(Text())
    parts.append(_workloads(found.workloads))
    if owner is None:
        parts.append(
            Text(
                f"now {values.an_hour(found.burn_micros_per_hour)}   "
                f"available {values.money(found.available.micros)}"
            )
        )
    return Group(*parts)


def _pool(pool: rest.PoolStatus) -> list[Any]:
    from rich.text import Text

    total = max(pool.devices, 1)
    bar = Text()
    drawn = done = 0
    for use in pool.by_use:
        done += use.devices
        # Cells by running total, so that the parts fill the bar exactly.
        cells = done * BAR_WIDTH // total - drawn
        drawn += cells
        bar.append("█" * cells, style=COLOURS.get(use.use, "white"))
    bar.append("░" * (BAR_WIDTH - drawn), style="dim")
    legend = Text("  ")
    for use in pool.by_use:
        legend.append("■ ", style=COLOURS.get(use.use, "white"))
        legend.append(f"{WORDS.get(use.use, use.use)} {use.devices}   ")
    lines: list[Any] = [Text(f"{pool.name}  {pool.devices} devices"), bar, legend]
    for held in pool.holders:
        right = held.rank if held.party == "sale" else "first-party"
        lines.append(Text(f"    {held.devices:>4}  {right:<12} {held.organisation_id}"))
    return [*lines, Text()]


def _earnings(owner: rest.OwnerStatus) -> Any:
    from rich.text import Text

    margin = owner.earning_micros_per_hour - owner.cost_micros_per_hour
    text = Text(
        f"earning {values.an_hour(owner.earning_micros_per_hour)}   "
        f"cost {values.an_hour(owner.cost_micros_per_hour)}   margin "
    )
    text.append(values.an_hour(margin), style="green" if margin >= 0 else "red")
    return text


def _workloads(found: list[rest.Workload]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not found:
        return Text("nothing runs", style="dim")
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        drawn.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left"
        )
    for row in rows_of(found):
        drawn.add_row(*row)
    return drawn
