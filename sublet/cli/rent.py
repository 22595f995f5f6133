"""What is for sale, at which price, and taking it: offers, prices, quote, rent, run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sublet.cli import values
from sublet.cli.commands import RENT, Json, Yes, client, command, kind_of
from sublet.cli.errors import FAILED, CliError, UsageError
from sublet.cli.screen import confirm, facts, poll, progress, say, show, show_json, table
from sublet.cli.workloads import OVER, SSH_FOLDER, follow, own_public_keys

if TYPE_CHECKING:
    from sublet.base.wire import rest
    from sublet.sdk import Client

OfferId = Annotated[str, typer.Argument(metavar="OFFER", help="From `sublet offers`.")]
Count = Annotated[int, typer.Option("--count", min=1, help="Units of the offer.")]
Duration = Annotated[
    str | None, typer.Option("--for", help="How long at most, such as 10m; default: open-ended.")
]
Notice = Annotated[
    str | None, typer.Option("--notice", help="Notice before an interruption, such as 2m.")
]
MaxPrice = Annotated[
    str | None, typer.Option("--max-price", help="Spot: most per device-hour, such as 0.05.")
]
Grace = Annotated[str, typer.Option("--grace", help="Between SIGTERM and SIGKILL.")]
Project = Annotated[str | None, typer.Option("--project", help="Charged to this project.")]
QuoteId = Annotated[str | None, typer.Option("--quote", help="Accept this quote.")]
Name = Annotated[str | None, typer.Option("--name", help="A name of your own for it.")]
Env = Annotated[
    list[str] | None, typer.Option("--env", "-e", metavar="NAME=VALUE", help="May be repeated.")
]
Outbound = Annotated[bool, typer.Option("--outbound", help="With a network to the outside.")]
Queue = Annotated[bool, typer.Option("--queue", help="Without room now, wait for it.")]
NoticeSignal = Annotated[
    str | None, typer.Option("--notice-signal", help="Signal sent at the notice, e.g. SIGUSR1.")
]


def add_to(app: typer.Typer) -> None:
    command(app, "sublet offers", "sublet offers --json", panel=RENT)(offers)
    command(app, "sublet prices", panel=RENT)(prices)
    command(
        app,
        "sublet quote cpu-spot",
        "sublet quote cpu-on-demand --count 2 --for 2h",
        panel=RENT,
    )(quote)
    command(
        app,
        "sublet rent cpu-spot --name box --wait",
        "sublet rent cpu-spot --ssh-key ~/.ssh/id_ed25519.pub --notice 2m --yes",
        panel=RENT,
    )(rent)
    command(
        app,
        "sublet run cpu-spot -- python3 -c 'print(6 * 7)'",
        "sublet run cpu-spot --name train --follow --yes -- bash train.sh",
        panel=RENT,
    )(run)


def offers(as_json: Json = False) -> None:
    """What is for sale: spot and on-demand, at which notice and price."""
    with client() as cloud:
        found = list(cloud.offers.list())
    if as_json:
        show_json(found)
        return
    rows = [
        (
            offer.id,
            offer.product,
            f"{offer.devices} × {offer.device_model}",
            values.size(offer.devices * offer.memory_bytes_per_device),
            values.an_hour(offer.price_micros_per_device_hour, offer.currency),
            ", ".join(_notice(offer, choice) for choice in offer.notices),
            values.length(offer.firm_seconds) if offer.firm_seconds else "-",
            offer.outbound,
        )
        for offer in found
    ]
    columns = ("offer", "product", "devices", ">memory", ">a device", "notices", "firm", "outbound")
    table(columns, rows, empty="nothing is for sale now")
    if any(offer.trusted_tenants for offer in found):
        missing = sorted({fence for offer in found for fence in offer.missing_fences})
        say(f"This cloud serves trusted tenants: not fenced here: {', '.join(missing) or 'none'}.")


def _notice(offer: rest.Offer, choice: rest.NoticeChoice) -> str:
    shown = values.length(choice.notice_seconds)
    if choice.price_micros_per_device_hour == offer.price_micros_per_device_hour:
        return shown
    return f"{shown} at {values.money(choice.price_micros_per_device_hour, offer.currency)}"


def prices(as_json: Json = False) -> None:
    """The posted spot prices: of this hour, and of the hours already posted."""
    with client() as cloud:
        found = list(cloud.offers.spot_prices())
    if as_json:
        show_json(found)
        return
    rows = [
        (
            price.pool_id,
            values.when(price.starts_at),
            values.an_hour(price.price_micros_per_device_hour, price.currency),
            values.an_hour(price.floor_micros_per_device_hour, price.currency),
            values.when(price.posted_at),
        )
        for price in found
    ]
    table(("pool", "hour from", ">a device", ">floor", "posted"), rows)


def quote(
    offer: OfferId,
    count: Count = 1,
    duration: Duration = None,
    notice: Notice = None,
    max_price: MaxPrice = None,
    grace: Grace = "30s",
    project: Project = None,
    as_json: Json = False,
) -> None:
    """A price that stands for five minutes. It costs nothing and takes nothing."""
    with client() as cloud:
        found = cloud.quotes.create(
            _terms(offer, count, notice, max_price, grace, project, duration)
        )
    if as_json:
        show_json(found)
        return
    _show_quote(found)
    show(f"accept  sublet rent {found.offer_id} --quote {found.id}")


def _terms(
    offer: str,
    count: int,
    notice: str | None,
    max_price: str | None,
    grace: str,
    project: str | None,
    duration: str | None = None,
) -> rest.QuoteCreate:
    from sublet.base.wire import rest

    given: dict[str, Any] = {
        "offer_id": offer,
        "count": count,
        "stop_grace_seconds": values.seconds(grace, "--grace"),
    }
    if duration is not None:
        given["duration_seconds"] = values.seconds(duration, "--for")
    if notice is not None:
        given["notice_seconds"] = values.seconds(notice, "--notice")
    if project is not None:
        given["project_id"] = project
    if max_price is not None:
        given["max_price_micros_per_device_hour"] = values.micros(max_price, "--max-price")
    return rest.QuoteCreate(**given)


def _show_quote(found: rest.Quote) -> None:
    of = values.length(found.duration_seconds) if found.duration_seconds else "one hour"
    exact = "exactly what the invoice will say" if found.is_exact else "an estimate"
    facts(
        (
            ("quote", f"{found.id}, stands until {values.when(found.expires_at)}"),
            ("for", f"{found.count} × {found.offer_id} ({found.count * found.devices} devices)"),
            ("price", " then ".join(_price(point) for point in found.prices)),
            ("total", f"{values.money(found.total.micros)} for {of}: {exact}"),
            (
                "hold",
                f"{values.money(found.hold.micros)} of your credit for "
                f"{values.length(found.hold_seconds)}; given back as far as it is not used",
            ),
            ("notice", f"{values.length(found.notice_seconds)} before an interruption"),
            ("firm", values.length(found.firm_seconds) if found.firm_seconds else ""),
            ("credit", found.credit_rule),
        )
    )


def _price(point: rest.PricePoint) -> str:
    price = values.an_hour(point.price_micros_per_device_hour)
    return f"{price} a device from {point.starts_at:%H:%M}Z"


def _agree(cloud: Client, quote_id: str | None, terms: rest.QuoteCreate, yes: bool) -> rest.Quote:
    """The quote to accept, shown and agreed to."""
    with progress("asking for a price"):
        found = cloud.quotes.get(quote_id) if quote_id else cloud.quotes.create(terms)
    if not yes:
        from contextlib import redirect_stdout
        from sys import stderr

        # The price belongs to the question, which stands on stderr: stdout holds the answer.
        with redirect_stdout(stderr):
            _show_quote(found)
    confirm("Accept this price?", yes=yes)
    return found


def rent(
    offer: OfferId,
    name: Name = None,
    ssh_key: Annotated[
        list[Path] | None,
        typer.Option("--ssh-key", help="Public key file; default: yours in ~/.ssh."),
    ] = None,
    no_ssh: Annotated[bool, typer.Option("--no-ssh", help="Nobody logs in.")] = False,
    script: Annotated[
        Path | None, typer.Option("--script", help="Start-up script, run by /bin/sh inside.")
    ] = None,
    auto_resume: Annotated[
        bool, typer.Option("--auto-resume", help="After an interruption start again.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it runs.")] = False,
    count: Count = 1,
    notice: Notice = None,
    max_price: MaxPrice = None,
    grace: Grace = "30s",
    project: Project = None,
    quote_id: QuoteId = None,
    env: Env = None,
    outbound: Outbound = False,
    queue: Queue = False,
    notice_signal: NoticeSignal = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Rent an instance: a machine to log in to, by the second, until you stop it."""
    from sublet.base.wire import rest as shapes

    keys = [] if no_ssh else _public_keys(ssh_key)
    rest_of_it = _common(name, env, outbound, queue, notice_signal)
    if script is not None:
        rest_of_it["script"] = _text(script)
    terms = _terms(offer, count, notice, max_price, grace, project)
    with client(quiet=True) as cloud:
        agreed = _agree(cloud, quote_id, terms, yes)
        body = shapes.InstanceCreate(
            quote_id=agreed.id, ssh_keys=keys, auto_resume=auto_resume, **rest_of_it
        )
        with progress("renting"):
            found = cloud.instances.create(body)
        if wait:
            found = wait_until(cloud, found, {"running"})
    if as_json:
        show_json(found)
        return
    _show_rented(found)


def _show_rented(found: rest.Workload) -> None:
    named = found.name if found.name and found.name != found.id else found.id
    show(f"{found.id}  {found.name}  {found.state}")
    if found.kind == "instance":
        show(f"  log in   sublet ssh {named}")
        show(f"  stop     sublet stop {named}      end  sublet terminate {named}")
    else:
        show(f"  output   sublet logs -f {named}")
        show(f"  end      sublet cancel {named}")


def run(
    offer: OfferId,
    words: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="The command and its words.")
    ],
    name: Name = None,
    follow_logs: Annotated[
        bool, typer.Option("--follow", "-f", help="Show its output; exit as it exits.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when it is over.")] = False,
    retries: Annotated[
        int, typer.Option("--retries", min=0, max=100, help="After failures; never counts recalls.")
    ] = 0,
    requeue: Annotated[
        bool, typer.Option("--requeue/--no-requeue", help="Queue again after an interruption.")
    ] = True,
    count: Count = 1,
    duration: Duration = None,
    notice: Notice = None,
    max_price: MaxPrice = None,
    grace: Grace = "30s",
    project: Project = None,
    quote_id: QuoteId = None,
    env: Env = None,
    outbound: Outbound = False,
    queue: Queue = False,
    notice_signal: NoticeSignal = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Run a job: a command to its end, queued again when it is interrupted."""
    from sublet.base.wire import rest as shapes

    terms = _terms(offer, count, notice, max_price, grace, project, duration)
    rest_of_it = _common(name, env, outbound, queue, notice_signal)
    if duration is not None:
        rest_of_it["max_run_seconds"] = values.seconds(duration, "--for")
    with client(quiet=True) as cloud:
        agreed = _agree(cloud, quote_id, terms, yes)
        body = shapes.JobCreate(
            quote_id=agreed.id, command=words, max_retries=retries, requeue=requeue, **rest_of_it
        )
        with progress("renting"):
            found = cloud.jobs.create(body)
        if follow_logs:
            say(f"{found.id} {found.state}; its output follows")
            follow(cloud, found)
        if wait or follow_logs:
            found = wait_until(cloud, found, OVER)
    if as_json:
        show_json(found)
    elif not (wait or follow_logs):
        _show_rented(found)
    if wait or follow_logs:
        if not as_json:
            say(f"{found.id} {found.state}, exit code {found.exit_code}, {_cost(found)}")
        if found.state != "completed" or found.exit_code:
            raise typer.Exit(FAILED)


def _cost(found: rest.Workload) -> str:
    return f"cost {values.money(found.cost.micros, found.cost.currency)}"


def _common(
    name: str | None,
    env: list[str] | None,
    outbound: bool,
    queue: bool,
    notice_signal: str | None,
) -> dict[str, Any]:
    given: dict[str, Any] = {
        "env": values.environment(env or []),
        "outbound": outbound,
        "wait": queue,
    }
    if name is not None:
        given["name"] = name
    if notice_signal is not None:
        given["notice_signal"] = notice_signal
    return given


def _public_keys(given: list[Path] | None) -> list[str]:
    """The lines of the files given, else of those in ~/.ssh."""
    paths = given or own_public_keys()
    if not paths:
        raise UsageError(
            f"there is no public key in {SSH_FOLDER}: make one with `ssh-keygen -t ed25519`, "
            "name a file with --ssh-key, or give --no-ssh."
        )
    lines = []
    for path in paths:
        text = _text(path).strip()
        if "PRIVATE KEY" in text:
            raise UsageError(f"{path} is a private key: give the file that ends in .pub.")
        lines += [line for line in text.splitlines() if line and not line.startswith("#")]
    return lines


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}.") from None


def wait_until(cloud: Client, found: rest.Workload, states: set[str]) -> rest.Workload:
    """Wait for one of the states. Raises CliError where it ended otherwise."""
    kind, latest = kind_of(cloud, found.id), found

    def look() -> bool:
        nonlocal latest
        latest = kind.get(found.id)
        shown.update(f"{latest.name or latest.id}: {latest.state}{_why(latest)}")
        return latest.state in states or latest.state in OVER

    with progress(f"{found.name or found.id}: {found.state}{_why(found)}") as shown:
        poll(look)
    if latest.state not in states:
        raise CliError(
            f"{latest.id} is {latest.state}{_why(latest)}: "
            f"`sublet show {latest.id}` and `sublet logs {latest.id}` say more."
        )
    return latest


def _why(found: rest.Workload) -> str:
    return f" ({found.reason})" if found.reason else ""
