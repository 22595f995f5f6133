"""One gateway process: its orders, its socket, its end.

On SIGTERM it takes no new requests, lets the open ones end for a while, writes the last of its
spool and goes. `kill -9` costs its open streams, and nothing that was answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import orjson
import uvloop

from sublet.base.kernel.clock import SystemClock, read_boot_ns
from sublet.base.kernel.interval import micros_since_epoch
from sublet.base.wire.gateway import Allowance, Malformed, Snapshot, read_snapshot
from sublet.gateway.control import Control
from sublet.gateway.edge import Downstream
from sublet.gateway.log import say
from sublet.gateway.routes import Routes
from sublet.gateway.spool import Spool
from sublet.gateway.state import Gateway
from sublet.gateway.upstream import Replica

ORDERS = "SUBLET_GATEWAY_ORDERS"
DRAIN_SECONDS = 10.0
CLOCK_TOLERANCE_US = 1_500_000
"""How far the books' clock may seem to be from ours: a file is looked for once a second."""
FLUSH_SECONDS = 1.0
PR_SET_PDEATHSIG = 1
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
HEAP_KEPT = 8 << 20
MAPPED = 1 << 20
"""Bytes: what is larger has pages of its own, given back at once."""
DESCRIPTORS_AT_MOST = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a gateway is told at its start, as JSON in its environment."""

    name: str
    folder: str
    """`<data>/gateway`: the snapshot, the control socket, and the folder of its own spools."""
    socket_fd: int
    """A listening socket."""
    ready_fd: int | None = None
    """One byte is written here once it serves."""
    parent: int | None = None
    """It ends when this process does."""
    ack: bool = True
    """The last bytes of an answer wait until its row is on disk."""
    body_limit: int = 16 << 20
    stale_seconds: int = 60


def main() -> int:
    text = os.environ.pop(ORDERS, None)
    if text is None:
        sys.stderr.write(f"The gateway is started by `sublet up`: {ORDERS} is not set.\n")
        return 2
    orders = Orders(**orjson.loads(text))
    if orders.parent is not None:
        _end_with(orders.parent)
    _keep_heap()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = (
        DESCRIPTORS_AT_MOST if most == resource.RLIM_INFINITY else min(DESCRIPTORS_AT_MOST, most)
    )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    uvloop.run(serve(orders))
    return 0


def _end_with(parent: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if os.getppid() != parent:
        sys.exit(1)


def _keep_heap() -> None:
    """Bodies of some 64 KiB come and go: glibc would give their pages back and take them anew for
    each, with a page fault for every 4 KiB. So it keeps what is free up to HEAP_KEPT."""
    with contextlib.suppress(AttributeError):  # Another C library has its own ways.
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, HEAP_KEPT)
        mallopt(M_MMAP_THRESHOLD, MAPPED)


async def serve(orders: Orders) -> None:
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        if orders.parent is None or number is not signal.SIGINT:
            loop.add_signal_handler(number, ended.set)
    g, keeper, server = await begin(orders)
    # What lives now lives for ever: the collector need not walk it again and again.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    if orders.ready_fd is not None:
        os.write(orders.ready_fd, b"1")
        os.close(orders.ready_fd)
    while not ended.is_set():
        try:
            await asyncio.wait_for(ended.wait(), 1.0)
        except TimeoutError:
            keeper.look()
            g.sweep()
    await drain(g, server)


async def begin(orders: Orders) -> tuple[Gateway, Keeper, asyncio.Server]:
    """A gateway that serves. Its caller looks for snapshots and sweeps once a second, and drains it
    at the end."""
    loop = asyncio.get_running_loop()
    epoch = micros_since_epoch(SystemClock.unanchored().now())
    g = Gateway(name=orders.name, epoch=epoch, loop=loop)
    g.body_limit = orders.body_limit
    g.stale_ns = orders.stale_seconds * 1_000_000_000
    folder = Path(orders.folder)
    own = folder / orders.name / str(epoch)
    own.mkdir(mode=0o700, parents=True)
    g.spool = Spool(own, loop, ack=orders.ack, rows=g.open_rows)
    keeper = Keeper(g, folder / "snapshot")
    g.control = Control(
        folder / "control.sock",
        name=orders.name,
        epoch=epoch,
        gauge=g.gauge,
        on_snapshot=keeper.look,
        on_allowance=keeper.granted,
    )
    keeper.look()
    g.control.start()
    listening = socket.socket(fileno=orders.socket_fd)
    listening.setblocking(False)
    server = await loop.create_server(lambda: Downstream(g), sock=listening, backlog=4096)
    return g, keeper, server


async def drain(g: Gateway, server: asyncio.Server) -> None:
    """No new requests; the open ones have ten seconds; then the last of the spool."""
    g.is_draining = True
    server.close()
    for connection in list(g.connections):
        connection.end()
    until = read_boot_ns() + int(DRAIN_SECONDS * 1e9)
    while any(connection.exchange for connection in g.connections) and read_boot_ns() < until:
        await asyncio.sleep(0.05)
    for connection in list(g.connections):
        if connection.exchange is not None:
            connection.exchange.shut()
    await g.spool.finish()
    # The last bytes leave before the process does; who does not read them is not waited for.
    until = read_boot_ns() + int(FLUSH_SECONDS * 1e9)
    while g.connections and read_boot_ns() < until:
        await asyncio.sleep(0.01)
    await g.control.stop()
    g.spool.close()


class Keeper:
    """Takes over snapshots and allowances as they come."""

    def __init__(self, g: Gateway, path: Path) -> None:
        self._g = g
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._said = ""
        g.routes = Routes.build(_empty(), None, g.epoch, Replica)
        g.fresh_ns = -g.stale_ns

    def look(self) -> None:
        """Read the file if it is another one; a file that cannot be read changes nothing."""
        g = self._g
        try:
            found = os.stat(self._path)
            mark = (found.st_mtime_ns, found.st_ino)
            if mark == self._seen:
                return
            snapshot = read_snapshot(self._path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, Malformed) as error:
            if str(error) != self._said:
                self._said = str(error)
                say("snapshot_not_read", error=self._said)
            return
        is_watched = self._seen is not None
        self._seen = mark
        if snapshot.number > g.routes.number:
            g.adopt(Routes.build(snapshot, g.routes, g.epoch, Replica))
        elif snapshot.number < g.routes.number:
            return
        else:
            g.routes.made_us = snapshot.made_us
        now_ns = read_boot_ns()
        if is_watched:
            # It was replaced under our eyes, so it is new; and it says what time the books have.
            offset_us = snapshot.made_us - now_ns // 1000
            if abs(offset_us - g.offset_us) > CLOCK_TOLERANCE_US:
                g.offset_us = offset_us
            g.follows_books = True
            g.fresh_ns = now_ns
        else:
            # By the wall: its age is how long we may not have heard.
            g.fresh_ns = now_ns - max(g.now_us() - snapshot.made_us, 0) * 1000

    def granted(self, allowance: Allowance) -> None:
        g = self._g
        purse = g.routes.grant(allowance, read_boot_ns(), g.now_us())
        if purse is not None and purse.waiting:
            g.granted(purse)


def _empty() -> Snapshot:
    return Snapshot(number=0, made_us=0, gateways=1, keys={}, limits={}, models={})
