"""Your instances and jobs: look, log in, run a command inside, stop, end."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sublet.cli import profile, values
from sublet.cli.commands import WORK, Json, Named, Yes, client, command, find_workload, kind_of
from sublet.cli.errors import FAILED, CliError, UsageError
from sublet.cli.screen import confirm, facts, say, show, show_json, table

if TYPE_CHECKING:
    from sublet.base.wire import rest
    from sublet.sdk import Client

OVER = {"terminated", "completed", "failed"}
LIVE = {"running", "interrupting"}
SSH_FOLDER = "~/.ssh"
KEY_NAMES = ("id_ed25519.pub", "id_ecdsa.pub", "id_rsa.pub", "id_ed25519_sk.pub")


def add_to(app: typer.Typer) -> None:
    command(app, "sublet ls", "sublet ls --all --json", panel=WORK)(ls)
    command(app, "sublet show box", panel=WORK, name="show")(show_one)
    command(
        app,
        "sublet ssh box",
        "sublet ssh box -- nproc",
        "sublet ssh box -i ~/.ssh/other -L 8888:localhost:8888",
        panel=WORK,
    )(ssh)
    command(
        app,
        "sublet exec box -- uname -a",
        "sublet exec --timeout 5m box -- make",
        panel=WORK,
        name="exec",
    )(exec_)
    command(app, "sublet logs train", "sublet logs -f train", panel=WORK)(logs)
    command(app, "sublet stop box", "sublet stop box --yes", panel=WORK)(stop)
    command(app, "sublet start box", panel=WORK)(start)
    command(app, "sublet terminate box", "sublet terminate box --yes", panel=WORK)(terminate)
    command(app, "sublet cancel train", "sublet cancel train --yes", panel=WORK)(cancel)


def rows_of(found: list[rest.Workload]) -> list[tuple[str, ...]]:
    return [
        (
            w.name or w.id,
            w.id,
            w.kind,
            w.state + (f" ({w.reason})" if w.reason and w.state not in LIVE else ""),
            f"{w.devices} {w.product.replace('_', '-')}",
            values.an_hour(w.burn_micros_per_hour, w.cost.currency),
            values.money(w.cost.micros, w.cost.currency),
            _interruption(w.interruption) if w.interruption else "",
        )
        for w in found
    ]


COLUMNS = ("name", "id", "kind", "state", "devices", ">now", ">so far", "notice")


def _interruption(found: rest.Interruption) -> str:
    return f"{found.action} at {found.at:%H:%M:%S}Z ({found.reason})"


def ls(
    everything: Annotated[
        bool, typer.Option("--all", "-a", help="Also those that are over.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Your instances and jobs, what they cost now and so far."""
    with client() as cloud:
        found = [*cloud.instances.list(), *cloud.jobs.list()]
    if not everything:
        found = [w for w in found if w.state not in OVER]
    if as_json:
        show_json(found)
        return
    table(COLUMNS, rows_of(found), empty="nothing is rented: `sublet offers` shows what there is")


def show_one(word: Named, as_json: Json = False) -> None:
    """One instance or job: state, price, runs, and what has happened to it."""
    with client() as cloud:
        found = find_workload(cloud, word)
        if as_json:
            show_json(found)
            return
        past = list(kind_of(cloud, found.id).transitions(found.id))
    run = found.run
    facts(
        (
            ("id", found.id),
            ("name", found.name),
            ("state", f"{found.state}{f' ({found.reason})' if found.reason else ''}"),
            ("notice", _interruption(found.interruption) if found.interruption else ""),
            ("devices", f"{found.devices}, {found.product.replace('_', '-')}"),
            ("runs on", ", ".join(run.device_ids) if run else ""),
            ("starts", values.when(found.starts_at) if found.starts_at else ""),
            ("since", values.when(run.started_at) if run and run.started_at else ""),
            ("price", _price(found)),
            ("now", values.an_hour(found.burn_micros_per_hour)),
            ("so far", values.money(found.cost.micros, found.cost.currency)),
            ("exit code", found.exit_code),
            ("failure", found.failure),
            ("log in", f"sublet ssh {found.name or found.id}" if found.ssh else ""),
        )
    )
    rows = [
        (
            values.when(t.at),
            t.event,
            f"{t.from_state or ''} → {t.to_state}",
            t.reason or "",
            t.actor,
        )
        for t in past
    ]
    table(("at", "event", "state", "reason", "by"), rows)


def _price(found: rest.Workload) -> str:
    price = found.price_micros_per_device_hour
    return "" if price is None else f"{values.an_hour(price, found.cost.currency)} a device"


def ssh(
    word: Named,
    words: Annotated[list[str] | None, typer.Argument(metavar="[-- COMMAND...]")] = None,
    identity: Annotated[
        Path | None, typer.Option("--identity", "-i", help="Private key file.")
    ] = None,
    forward: Annotated[
        list[str] | None,
        typer.Option(
            "--forward", "-L", metavar="PORT:HOST:PORT", help="A local port that leads in."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print how to log in instead of doing it.")
    ] = False,
) -> None:
    """Log in, or run a command inside, with your system's ssh."""
    with client() as cloud:
        found = find_workload(cloud, word)
    if found.ssh is None:
        raise CliError(_no_ssh(found))
    if as_json:
        show_json(found.ssh)
        return
    argv = ssh_argv(found.ssh, identity=identity, forward=forward or [])
    try:
        os.execvp(argv[0], [*argv, *(words or [])])
    except FileNotFoundError:
        raise CliError("there is no `ssh` here: apt-get install openssh-client.") from None


def own_public_keys() -> list[Path]:
    """The person's own, in their home."""
    folder = Path(SSH_FOLDER).expanduser()
    return [path for name in KEY_NAMES if (path := folder / name).is_file()]


def ssh_argv(
    ssh: rest.Ssh, *, identity: Path | None = None, forward: list[str] | None = None
) -> list[str]:
    """The words that log in to one workload.

    Each workload has a place of its own among the known hosts: its id is never used again, so
    that another cloud on the same port is no stranger with a changed key.
    """
    folder = profile.folder()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    argv = ["ssh", "-p", str(ssh.port), "-l", ssh.user]
    for option in (
        f"HostKeyAlias={ssh.user}",
        f"UserKnownHostsFile={folder / 'known_hosts'}",
        "StrictHostKeyChecking=accept-new",
        "ServerAliveInterval=15",
    ):
        argv += ["-o", option]
    if identity is not None:
        argv += ["-i", str(identity), "-o", "IdentitiesOnly=yes"]
    else:
        # The keys that `rent` takes by itself, wherever ssh would look.
        for public in own_public_keys():
            argv += ["-i", str(public.with_suffix(""))]
    for way in forward or []:
        argv += ["-L", way]
    return [*argv, ssh.host]


def _no_ssh(found: rest.Workload) -> str:
    named = found.name or found.id
    if found.state in OVER:
        return f"{named} is {found.state}: there is nothing left to log in to."
    if found.state == "stopped":
        return f"{named} is stopped: start it with `sublet start {named}`."
    if found.state in LIVE:
        return f"{named} was rented without an SSH key: `sublet exec {named} -- …` works."
    return f"{named} is {found.state}: log in once it runs (`sublet show {named}`)."


def exec_(
    word: Named,
    words: Annotated[list[str], typer.Argument(metavar="-- COMMAND...")],
    timeout: Annotated[str, typer.Option("--timeout", help="At most 5m.")] = "30s",
    stdin: Annotated[
        bool, typer.Option("--stdin", help="Send what comes on standard input (text).")
    ] = False,
    as_json: Json = False,
) -> None:
    """Run a command inside, without a login. Exits as the command exits."""
    from sublet.base.wire import rest as shapes

    body = shapes.ExecCreate(
        argv=words,
        stdin=sys.stdin.read() if stdin else "",
        timeout_seconds=values.seconds(timeout, "--timeout"),
    )
    with client() as cloud:
        found = find_workload(cloud, word)
        done = kind_of(cloud, found.id).exec(found.id, body)
    if as_json:
        show_json(done)
    else:
        sys.stdout.write(done.stdout)
        sys.stdout.flush()
        sys.stderr.write(done.stderr)
        if done.truncated:
            say("sublet: more output than 256 KiB; the rest was dropped.")
        if done.timed_out:
            say(f"sublet: still going after {timeout}, so it was ended: --timeout allows up to 5m.")
    raise typer.Exit(FAILED if done.exit_code is None else done.exit_code)


def follow(cloud: Client, found: rest.Workload, *, offset: int = 0) -> None:
    """Show the output as it comes, until the workload is over."""
    for text in kind_of(cloud, found.id).logs(found.id, offset=offset, follow=True):
        sys.stdout.write(text)
        sys.stdout.flush()


def logs(
    word: Named,
    follow_logs: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on as it comes, until it is over.")
    ] = False,
    offset: Annotated[int, typer.Option("--offset", min=0, help="From this byte on.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with the output so far.")
    ] = False,
) -> None:
    """The output of a job, or of an instance's start-up script."""
    import json

    if as_json and follow_logs:
        raise UsageError("--json prints the output so far: leave --follow out.")
    with client(quiet=True) as cloud:
        found = find_workload(cloud, word)
        if follow_logs:
            follow(cloud, found, offset=offset)
            return
        text = "".join(kind_of(cloud, found.id).logs(found.id, offset=offset))
    if as_json:
        show(json.dumps({"id": found.id, "offset": offset, "text": text}))
    else:
        sys.stdout.write(text)


def stop(word: Named, yes: Yes = False, as_json: Json = False) -> None:
    """Stop an instance: its devices go back, its home stays."""
    with client(quiet=True) as cloud:
        found = find_workload(cloud, word)
        if found.kind == "job":
            raise UsageError(f"a job is ended with `sublet cancel {word}`.")
        price = found.stopped_costs_per_hour
        cost = values.an_hour(price.micros, price.currency)
        confirm(
            f"{found.name or found.id}: stop it? Its devices go, its home stays; "
            f"stopped it costs {cost}.",
            yes=yes,
        )
        done = cloud.instances.stop(found.id)
    if as_json:
        show_json(done)
        return
    _show_state(done.workload, as_json)
    show(f"  {done.explanation}")


def start(
    word: Named,
    queue: Annotated[bool, typer.Option("--queue", help="Without room now, wait for it.")] = False,
    as_json: Json = False,
) -> None:
    """Start a stopped instance again, where there is room."""
    from sublet.base.wire import rest as shapes

    with client() as cloud:
        found = find_workload(cloud, word)
        if found.kind == "job":
            raise UsageError("a job is run anew with `sublet run`.")
        found = cloud.instances.start(found.id, shapes.StartCreate(wait=queue))
    _show_state(found, as_json)


def terminate(word: Named, yes: Yes = False, as_json: Json = False) -> None:
    """End an instance with all it holds."""
    with client(quiet=True) as cloud:
        found = find_workload(cloud, word)
        if found.kind == "job":
            raise UsageError(f"a job is ended with `sublet cancel {word}`.")
        confirm(f"{found.name or found.id}: End this instance and delete its home?", yes=yes)
        found = cloud.instances.terminate(found.id)
    _show_state(found, as_json)


def cancel(word: Named, yes: Yes = False, as_json: Json = False) -> None:
    """End a job, wherever it stands."""
    with client(quiet=True) as cloud:
        found = find_workload(cloud, word)
        if found.kind != "job":
            raise UsageError(f"an instance is ended with `sublet terminate {word}`.")
        confirm(f"{found.name or found.id}: Cancel this job?", yes=yes)
        found = cloud.jobs.cancel(found.id)
    _show_state(found, as_json)


def _show_state(found: rest.Workload, as_json: bool) -> None:
    if as_json:
        show_json(found)
        return
    show(f"{found.id}  {found.name}  {found.state}")
