"""The edges of one process: the API application and the bastion, wired to the shops."""

from __future__ import annotations

import socket
import threading
from datetime import datetime

from starlette.types import ASGIApp

from sublet import __version__
from sublet.app.publish import await_published
from sublet.app.sealing import key_of_child
from sublet.app.wiring import App, trial_credit
from sublet.base.kernel.errors import SubletError
from sublet.base.store.installation import last_seen
from sublet.capacity.engines.port import Attachable, Notice
from sublet.edge.api import Deps, create_api
from sublet.edge.bastion import Bastion, Target
from sublet.records import tenancy
from sublet.shops import compute
from sublet.shops.compute.reconcile import would_requeue
from sublet.shops.compute.store import find_run, get_workload

WAIT_LOOK_SECONDS = 0.02
WAIT_LOOKS = 500
"""A login waits up to ten seconds for a workload that is being started."""


def create_app(app: App, ssh_address: tuple[str, int] | None, key_fd: int | None = None) -> ASGIApp:
    def lag() -> dict[str, float]:
        with app.store.read() as tx:
            seen: datetime | None = last_seen(tx)
        return {} if seen is None else {"clock": (app.clock.now() - seen).total_seconds()}

    return create_api(
        Deps(
            store=app.store,
            engine=app.engine,
            version=__version__,
            trial_credit=trial_credit(app.settings),
            trials_per_day=app.settings.trials_per_day,
            trusted_tenants=app.settings.trusted_tenants,
            currency=app.settings.currency,
            ssh_host=None if ssh_address is None else ssh_address[0],
            ssh_port=None if ssh_address is None else ssh_address[1],
            gateway_url=lambda: (app.folder.read_running() or {}).get("gateway_url"),
            models_folder=app.folder.models,
            sealing_key=key_of_child(app, key_fd),
            loop_lag_seconds=lag,
            await_snapshot=lambda after: await_published(app.folder.gateway, after),
        )
    )


def bastion_of(app: App, listening: socket.socket) -> Bastion:
    assert isinstance(app.engine, Attachable)
    door = Door(app)
    return Bastion(
        app.engine,
        door.lookup,
        host_key_dir=app.folder.bastion,
        notice=door.notice_of,
        listening=listening,
        clock=app.clock,
    )


class Door:
    """What the bastion asks: who may enter where, and is an interruption under way."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._pause = threading.Event()

    def lookup(self, login: str) -> Target | str | None:
        """The live run behind a login, or in words why there is none.

        Who knocks while the workload is being started waits at the door, for a while. What an
        organisation may not attach to stays shut, though it runs; the bastion looks again every
        second, and so hangs up who is inside.
        """
        found = self._find(login)
        for _ in range(WAIT_LOOKS):
            if not isinstance(found, compute.Location):
                return found
            if found.workload.state is not compute.State.PROVISIONING:
                break
            self._pause.wait(WAIT_LOOK_SECONDS)
            found = self._find(login)
        if not isinstance(found, compute.Location):
            return found
        place, workload = found, found.workload
        if place.run_id is not None and place.is_running:
            return Target(run_id=place.run_id, keys=workload.spec.ssh_keys)
        because = f" ({workload.reason})" if workload.reason else ""
        way = {
            compute.State.AWAITING_CAPACITY: "it starts when devices are free: try again then",
            compute.State.PROVISIONING: "it is being started: try again in a moment",
            compute.State.STOPPED: f"start it again with `sublet start {login}`",
        }.get(workload.state, "it is over: rent a new one")
        return f"{login} is {workload.state}{because}: {way}."

    def _find(self, login: str) -> compute.Location | str | None:
        with self._app.store.read() as tx:
            try:
                place = compute.location(tx, login)
            except SubletError:
                return None
            owner = tenancy.get_organisation(tx, place.workload.organisation_id)
        if not tenancy.may_under(owner.standing, tenancy.Action.ATTACH):
            return (
                f"{login}: its organisation is {owner.standing} and may not log in; what runs "
                "goes on. Read its logs, stop it, or settle with the owner of this cloud."
            )
        return place

    def notice_of(self, run_id: str) -> Notice | None:
        with self._app.store.read() as tx:
            run = find_run(tx, run_id)
            if run is None or run.published_at is None or run.term_at is None or run.t0 is None:
                return None
            workload = get_workload(tx, run.workload_id)
        reason = run.notice_reason or compute.Reason.OWNER_RECALL
        returns = would_requeue(workload, reason)
        return Notice(
            term_at=run.term_at, action="requeue" if returns else "stop", reason=str(reason)
        )
