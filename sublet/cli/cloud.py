"""The cloud on this machine: open it, close it, look after it."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sublet.cli import profile
from sublet.cli.commands import CLOUD, Json, client, command
from sublet.cli.errors import FAILED, CliError
from sublet.cli.screen import poll, progress, show, show_json
from sublet.cli.values import when

if TYPE_CHECKING:
    from sublet.app.folder import Folder
    from sublet.base.wire import rest

Data = Annotated[Path | None, typer.Option("--data", help="The data folder; default: .sublet")]
READY_LOOK_SECONDS = 0.2


def add_to(app: typer.Typer) -> None:
    command(
        app,
        "sublet up",
        "sublet up --tour --data /srv/sublet --port 0 --ssh-port 0 --ready-file ready.json",
        panel=CLOUD,
    )(up)
    command(app, "sublet setup", panel=CLOUD)(setup)
    command(app, "sublet tour", "sublet tour --url http://127.0.0.1:8700", panel=CLOUD)(tour)
    command(app, "sublet audit-books", "sublet audit-books --data .sublet", panel=CLOUD)(
        audit_books
    )
    command(app, "sublet recover-owner --data .sublet", panel=CLOUD)(recover_owner)
    command(app, "sublet down", "sublet down --data /srv/sublet", panel=CLOUD)(down)


def up(
    with_tour: Annotated[
        bool, typer.Option("--tour", help="Walk the tour on the first start of the folder.")
    ] = False,
    data: Data = None,
    host: Annotated[str | None, typer.Option("--host", help="Default: 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option("--port", help="Of the API; default: 8700")] = None,
    gateway_port: Annotated[
        int | None, typer.Option("--gateway-port", help="Of the model gateway; default: 8701")
    ] = None,
    gateways: Annotated[
        int | None, typer.Option("--gateways", help="Gateway processes on that port; default: 1")
    ] = None,
    ssh_port: Annotated[int | None, typer.Option("--ssh-port", help="Default: 2222")] = None,
    ready_file: Annotated[
        Path | None, typer.Option("--ready-file", help="Addresses and key, once all serves.")
    ] = None,
    trusted_tenants: Annotated[
        bool, typer.Option("--trusted-tenants", help="Serve although a fence is missing.")
    ] = False,
    api_workers: Annotated[
        int | None, typer.Option("--api-workers", help="Processes that answer the API; default: 1")
    ] = None,
    key_stdin: Annotated[
        bool,
        typer.Option("--key-stdin", help="The key that seals models is one line of stdin."),
    ] = False,
) -> None:
    """Open the cloud on this machine; Ctrl-C ends all it started and credits who was running."""
    from sublet.app import keyfile
    from sublet.app import up as opening
    from sublet.app.settings import read_settings
    from sublet.cli.tour import main as walk

    settings = read_settings(
        {
            "data": data,
            "host": host,
            "port": port,
            "gateway_port": gateway_port,
            "gateways": gateways,
            "ssh_port": ssh_port,
            "trusted_tenants": trusted_tenants or None,
            "api_workers": api_workers,
        }
    )
    key = keyfile.read_line(sys.stdin) if key_stdin else None
    kept = ready_file or profile.folder() / f"ready-{os.getpid()}.json"
    threading.Thread(
        target=_keep_profile, args=(kept, ready_file is None), name="profile", daemon=True
    ).start()
    code = opening.main(
        settings,
        tour=with_tour,
        ready_file=kept,
        say=say_at_once,
        run_tour=walk,
        key=key,
    )
    raise typer.Exit(code)


def _keep_profile(ready: Path, is_ours: bool) -> None:
    """Once the cloud serves, keep its address and a new owner's key for the other commands."""
    # A convenience: the key is printed too, so nothing is lost where the folder is not writable.
    with suppress(OSError, ValueError, CliError):
        ready.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        before, pause = _written_at(ready), threading.Event()
        while _written_at(ready) == before:
            pause.wait(READY_LOOK_SECONDS)
        facts = json.loads(ready.read_text())
        if is_ours:
            ready.unlink()
        if facts["owner_key"]:
            profile.save_owner(facts["api_url"], facts["owner_key"])


def _written_at(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def say_at_once(text: str) -> None:
    print(text, flush=True)


def setup() -> None:
    """Make ready what the cloud needs on this machine, where this user may."""
    from sublet.app.setup import main as make_ready

    raise typer.Exit(make_ready())


def tour(
    url: Annotated[
        str | None, typer.Option("--url", help="The cloud; default: SUBLET_URL or the profile.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Walk the whole story on a running cloud, and check every promise. Needs the owner's key."""
    from sublet.cli.tour import main as walk

    if url is not None:
        os.environ["SUBLET_URL"] = url
    chosen = profile.load()
    if not chosen.key:
        raise CliError("the tour acts as the owner too: set SUBLET_KEY to the owner's key.")
    raise typer.Exit(walk(chosen.url, chosen.key, as_json=as_json))


def audit_books(data: Data = None, as_json: Json = False) -> None:
    """Check every invariant, on the live cloud or on a closed one's folder; 1 if one is broken."""
    if data is None:
        with client() as cloud:
            found = cloud.audit_books()
    else:
        with progress("auditing"):
            found = _audit_folder(data)
    if as_json:
        show_json(found)
    elif found.sound:
        show(f"The books are sound: {len(found.invariants)} invariants hold at {when(found.at)}.")
    else:
        for violation in found.violations:
            show(f"BROKEN  {violation.name}: {violation.statement}\n        {violation.detail}")
    if not found.sound:
        raise typer.Exit(FAILED)


def _audit_folder(data: Path) -> rest.AuditBooks:
    """Read the folder's database, changing nothing in it."""
    from sublet import audit
    from sublet.app.settings import read_settings
    from sublet.base.kernel.clock import SystemClock
    from sublet.base.kernel.ids import SystemIds
    from sublet.base.store import open_store
    from sublet.base.store.installation import last_seen
    from sublet.base.wire import rest as shapes

    settings = read_settings({"data": _folder(data).root})
    store = open_store(settings.database, SystemClock.unanchored(), SystemIds())
    if store.is_sqlite and not Path(store.url.database or "").is_file():
        raise CliError(f"there are no books in {settings.data}: name the data folder with --data.")
    try:
        with store.read() as tx:
            # A closed cloud is judged at its last moment: nothing could be done since.
            at = last_seen(tx) or store.clock.now()
            violations = audit.check(tx, at)
    finally:
        store.close()
    return shapes.AuditBooks(
        at=at,
        sound=not violations,
        invariants=sorted(audit.INVARIANTS),
        violations=[
            shapes.Violation(name=v.name, statement=v.statement, detail=v.detail)
            for v in violations
        ],
    )


def recover_owner(data: Data = None, as_json: Json = False) -> None:
    """Make a new owner's key and revoke the old ones. For the user of the data folder."""
    from sublet.app import first
    from sublet.app.settings import read_settings

    secret = first.recover_owner(read_settings({"data": _folder(data).root}))
    if as_json:
        show(json.dumps({"owner_key": secret}))
    else:
        show(f"The owner's key, shown this once; the old ones are revoked:\n{secret}")


def down(data: Data = None, as_json: Json = False) -> None:
    """Close the cloud of a data folder: workloads get SIGTERM now and their grace."""
    folder = _folder(data)
    facts = folder.read_running()
    if facts is None or _is_free(folder):
        raise CliError(f"no cloud runs on {folder.root}.")
    pid = int(facts["pid"])
    try:
        os.kill(pid, signal.SIGINT)
    except ProcessLookupError:
        raise CliError(
            f"process {pid} of {folder.root} is gone, but a child of it still holds the folder: "
            "it ends by itself shortly."
        ) from None
    except PermissionError:
        raise CliError(f"process {pid} belongs to another user: ask them, or root.") from None
    with progress("closing: workloads have their grace"):
        poll(lambda: _is_free(folder), every_seconds=0.1)
    if as_json:
        show(json.dumps({"closed": str(folder.root)}))
    else:
        show(f"Closed: nothing runs on {folder.root}.")


def _folder(data: Path | None) -> Folder:
    """An existing data folder."""
    from sublet.app.folder import Folder
    from sublet.app.settings import DEFAULT_DATA

    root = (data or DEFAULT_DATA).resolve()
    if not root.is_dir():
        raise CliError(f"there is no data folder {root}: name it with --data.")
    return Folder(root)


def _is_free(folder: Folder) -> bool:
    """Does nobody hold the folder's lock?"""
    from sublet.app.folder import FolderInUse

    try:
        os.close(folder.acquire())
    except FolderInUse:
        return False
    return True
