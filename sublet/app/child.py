"""The processes that `sublet up` starts: `api`, `loops`, `bastion`, `link`.

Each gets its settings and inherited descriptors as JSON in its environment (a database address may
hold a password, and a command line is public), says that it serves by one byte on the ready pipe,
and ends when its parent does.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import resource
import signal
import socket
import sys
import threading
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import structlog
import uvicorn

from sublet.app import loops, sealing
from sublet.app.clockwork import ClockLoop
from sublet.app.link import Link
from sublet.app.runner import LINK, Loop, Nudger, Runner
from sublet.app.serving import bastion_of, create_app
from sublet.app.settings import Settings
from sublet.app.wiring import App, log_to, open_app
from sublet.base.kernel.clock import SystemClock
from sublet.edge.api.guard import guarded

log = structlog.get_logger()

ORDERS = "SUBLET_CHILD_ORDERS"
PR_SET_PDEATHSIG = 1
DESCRIPTORS_AT_MOST = 65_536
"""Where the machine sets no limit we do: a fault should be met before the memory is gone."""
SHUTDOWN_LIMIT = timedelta(minutes=15)


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What the parent tells a child."""

    role: str
    settings: str
    parent: int
    ready_fd: int
    lock_fd: int
    socket_fd: int | None
    ssh_address: tuple[str, int] | None
    number: int = 0
    key_fd: int | None = None
    """A pipe with the key that seals models, where it came by stdin."""

    def text(self) -> str:
        return json.dumps(asdict(self))


def main() -> int:
    orders = Orders(**json.loads(os.environ.pop(ORDERS)))
    _end_with(orders.parent)
    _raise_descriptor_limit()
    settings = Settings.model_validate_json(orders.settings)
    log_to(
        Path(settings.data).resolve() / "sublet.log",
        settings.log_level,
        f"{orders.role}-{orders.number}",
    )
    app = open_app(settings)
    try:
        return _ROLES[orders.role](app, orders)
    finally:
        app.close()


def _end_with(parent: int) -> None:
    """Ask the kernel for SIGTERM when the parent dies; it may be dead already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    # The terminal's Ctrl-C is the parent's business: it ends its children in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if os.getppid() != parent:
        sys.exit(1)


def _raise_descriptor_limit() -> int:
    """As many descriptors as we may have; the usual 1024 is for programs that call select."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS_AT_MOST
    if most != resource.RLIM_INFINITY:
        wanted = min(wanted, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    return wanted


def _ready(orders: Orders) -> None:
    os.write(orders.ready_fd, b"1")
    os.close(orders.ready_fd)


def _inherited(orders: Orders) -> socket.socket:
    assert orders.socket_fd is not None
    return socket.socket(fileno=orders.socket_fd)


def _ssh_address(orders: Orders) -> tuple[str, int] | None:
    return None if orders.ssh_address is None else (orders.ssh_address[0], orders.ssh_address[1])


def _follow_clock(app: App, stopping: threading.Event) -> threading.Thread:
    """Take over clock anchors that the loops write."""
    assert isinstance(app.clock, SystemClock)
    follower = ClockFollower(app, stopping)
    thread = threading.Thread(target=follower.run, name="clock", daemon=True)
    thread.start()
    return thread


class ClockFollower:
    """Reads the anchors every two seconds: an anchor takes effect five seconds after it is written."""

    def __init__(self, app: App, stopping: threading.Event) -> None:
        self._app = app
        self._stopping = stopping

    def run(self) -> None:
        while not self._stopping.wait(2.0):
            try:
                loops.adopt_anchors(self._app)
            except Exception:
                log.exception("clock_not_followed")


def _api(app: App, orders: Orders) -> int:
    stopping = threading.Event()
    _follow_clock(app, stopping)
    config = uvicorn.Config(
        create_app(app, _ssh_address(orders), orders.key_fd),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=3,
        lifespan="off",
        http=guarded(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    )
    server = uvicorn.Server(config)
    # uvicorn installs its own handlers for SIGINT and SIGTERM when it serves.
    _ready(orders)
    server.run(sockets=[_inherited(orders)])
    stopping.set()
    return 0


def _bastion(app: App, orders: Orders) -> int:
    stopping = threading.Event()
    _follow_clock(app, stopping)

    async def serve() -> None:
        ended = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
        bastion = bastion_of(app, _inherited(orders))
        await bastion.start()
        _ready(orders)
        await ended.wait()
        await bastion.stop()

    asyncio.run(serve())
    stopping.set()
    return 0


def _loops(app: App, orders: Orders) -> int:
    """Run the loops until SIGTERM; on SIGUSR1 end every workload first (`shutdown`)."""
    assert isinstance(app.clock, SystemClock)
    wanted: list[str] = []
    woken = threading.Event()

    def want(number: int, _frame: object) -> None:
        wanted.append("shutdown" if number == signal.SIGUSR1 else "stop")
        woken.set()

    signal.signal(signal.SIGTERM, want)
    signal.signal(signal.SIGUSR1, want)
    clock_loop = ClockLoop(app.store, app.clock)
    key = sealing.key_of_child(app, orders.key_fd)
    runner = Runner(
        [
            *loops.cloud_loops(app.store, app.engine, key=key),
            Loop("clock", clock_loop.step, nudged=False),
        ],
        app.clock,
        app.installation_id,
    )
    tell_link = Nudger(app.installation_id, [LINK])

    def committed() -> None:
        runner.nudge()
        tell_link()

    app.store.on_commit = committed
    runner.start()
    _ready(orders)
    while not wanted:
        woken.wait()
    if wanted[0] == "shutdown":
        _end_all(app, runner, wanted)
    runner.stop()
    return 0


def _end_all(app: App, runner: Runner, wanted: list[str]) -> None:
    loops.begin_shutdown(app)
    runner.nudge()
    limit = app.clock.now() + SHUTDOWN_LIMIT
    pause = threading.Event()
    while loops.count_live(app) and app.clock.now() < limit and "stop" not in wanted:
        pause.wait(0.1)
    loops.last_books(app)


def _link(app: App, orders: Orders) -> int:
    """Serve gateways until SIGTERM, then read the last of their spools."""
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    _follow_clock(app, ended)
    link = Link(
        app.store,
        app.folder.gateway,
        gateways=app.settings.gateways,
        stale=timedelta(seconds=app.settings.gateway_stale_seconds),
        installation_id=app.installation_id,
    )
    link.start()
    _ready(orders)
    ended.wait()
    link.stop()
    return 0


_ROLES = {"api": _api, "loops": _loops, "bastion": _bastion, "link": _link}

if __name__ == "__main__":
    sys.exit(main())
