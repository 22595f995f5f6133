"""`sublet up`: opens the cloud on this machine and stays until it is told to end.

Ctrl-C, SIGHUP and `sublet down` shut the cloud: gateways let what streams end, workloads get
SIGTERM, their grace, and their consumers a credit; a second Ctrl-C kills. SIGTERM is a service
restart: gateways and the control plane end, supervisors stay, each with a printed deadline.

Gateways always end before the link, so that it reads the last of their spools.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sublet.app import first
from sublet.app.child import ORDERS, Orders
from sublet.app.folder import Folder, write_private
from sublet.app.settings import Settings
from sublet.app.wiring import rotate_log
from sublet.base.kernel.clock import read_boot_ns
from sublet.base.kernel.errors import SubletError, Unavailable

Say = Callable[[str], None]

READY_SECONDS = 60.0
READY_LOOK_SECONDS = 0.25
RESTARTS_ALLOWED = 5
RESTARTS_WITHIN_SECONDS = 600.0
"""More restarts of one process than that, in so long, and the cloud is closed by hand."""
CHILD_GRACE_SECONDS = 10.0
GATEWAY_GRACE_SECONDS = 20.0
"""A gateway lets its streams end for ten, and then writes the last of its spool."""
LINK_GRACE_SECONDS = 60.0
"""To read what spools hold, however busy the database is."""
GATEWAY = "gateway"
KEY_HOLDERS = ("loops", "api")
"""Who unseals models, and who seals new ones."""
GATEWAY_ORDERS = "SUBLET_GATEWAY_ORDERS"


class PortInUse(Unavailable):
    """The port is taken: give another, or 0 for a free one."""

    code = "port_in_use"


@dataclass(slots=True)
class Child:
    orders: Orders
    process: subprocess.Popen[bytes]
    restarted_at: tuple[float, ...] = ()
    """Boot seconds of its restarts that still count."""


@dataclass(slots=True)
class Cloud:
    """A running cloud, as its parent process sees it."""

    settings: Settings
    folder: Folder
    lock_fd: int
    sockets: dict[str, socket.socket]
    """By name: `api`, `ssh`, and for each gateway its own on the one port."""
    key: bytes | None = None
    """What seals models, where it came by stdin."""
    children: list[Child] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    woken: threading.Event = field(default_factory=threading.Event)

    def url(self) -> str:
        return _url("http", self.sockets["api"])

    def gateway_url(self) -> str:
        return _url("http", self.sockets[_socket_name(GATEWAY, 0)])


def main(
    settings: Settings,
    *,
    tour: bool = False,
    ready_file: Path | None = None,
    say: Say = print,
    run_tour: Callable[[str, str], int] | None = None,
    key: bytes | None = None,
) -> int:
    """Run a cloud in the foreground. Returns the exit code; errors are one sentence on `say`.

    `key`: what seals models, where it does not come from its file.
    `run_tour(url, owner_key)` walks the tour; it is called on the first start of a data folder.
    """
    _reenter_with_delegated_cgroup(say)
    folder = Folder(settings.data.resolve())
    try:
        folder.make()
        lock_fd = folder.acquire()
        rotate_log(folder.log)
        sockets = {
            "api": _listen(settings.host, settings.port, "--port"),
            "ssh": _listen(settings.host, settings.ssh_port, "--ssh-port"),
            **_listen_side_by_side(settings),
        }
        opened = first.open_folder(settings, folder, tour=tour, say=say, key=key)
    except SubletError as error:
        say(f"sublet: {error.message}")
        return 1
    cloud = Cloud(opened.settings, folder, lock_fd, sockets, key)
    _forget(ready_file)
    _catch_signals(cloud)
    try:
        _start_all(cloud)
    except SubletError as error:
        say(f"sublet: {error.message}")
        _end_in_order(cloud)
        return 1
    facts = _facts(cloud, opened.owner_key)
    folder.write_running({**facts, "owner_key": None})
    if ready_file is not None:
        write_private(ready_file, json.dumps(facts))
    _greet(cloud, opened, say)
    if tour and opened.owner_key and run_tour is not None:
        walk = threading.Thread(
            target=run_tour, args=(cloud.url(), opened.owner_key), name="tour", daemon=True
        )
        walk.start()
    elif tour and not opened.owner_key:
        say("The tour ran on the first start of this data folder: again with `sublet tour`.")
    code = _watch(cloud, say)
    _forget(folder.running)
    _forget(ready_file)
    return code


def _forget(path: Path | None) -> None:
    """Addresses of a cloud that is not open mislead whoever waits for them."""
    if path is not None:
        with suppress(OSError):
            path.unlink()


def _facts(cloud: Cloud, owner_key: str | None) -> dict[str, Any]:
    host, port = cloud.sockets["ssh"].getsockname()[:2]
    return {
        "api_url": cloud.url(),
        "gateway_url": cloud.gateway_url(),
        "console_url": None,
        "ssh": {"host": host, "port": port},
        "owner_key": owner_key,
        "pid": os.getpid(),
    }


def _greet(cloud: Cloud, opened: first.Opened, say: Say) -> None:
    host, port = cloud.sockets["ssh"].getsockname()[:2]
    say("")
    say(f"The cloud is open.  API {cloud.url()}   SSH {host} port {port}")
    say(f"  models {cloud.gateway_url()}/v1   for OpenAI's and Anthropic's clients")
    say(f"  data   {cloud.folder.root}   log {cloud.folder.log.name}")
    if opened.owner_key:
        say("  owner  this key is shown once (a new one: sublet recover-owner):")
        say(f"         export SUBLET_URL={cloud.url()} SUBLET_KEY={opened.owner_key}")
    say("  stop   Ctrl-C ends everything that was started, and credits running consumers")
    say("")


def _url(scheme: str, listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{scheme}://{shown}:{port}"


def _listen(host: str, port: int, option: str, *, is_shared: bool = False) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise PortInUse(
            f"{host} is no address of this machine ({error.strerror}): give another with --host."
        ) from error
    try:
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((host, port))
        listening.listen(512)
    except OSError as error:
        raise PortInUse(
            f"{host}:{port} cannot be listened on ({error.strerror or error}): "
            f"give another with {option}, or {option} 0 for a free one."
        ) from error
    return listening


def _listen_side_by_side(settings: Settings) -> dict[str, socket.socket]:
    """One listening socket for each gateway, all on one port: the kernel shares out connections.

    We keep them, so that what comes while a gateway is started again waits for it. A port that
    somebody else listens on must be refused by ourselves: a second cloud of the same user could
    join it, and would get some of its connections.
    """
    host, port = settings.host, settings.gateway_port
    if port:
        _listen(host, port, "--gateway-port").close()
    sockets = {}
    for number in range(settings.gateways):
        listening = _listen(host, port, "--gateway-port", is_shared=True)
        port = listening.getsockname()[1]
        sockets[_socket_name(GATEWAY, number)] = listening
    return sockets


def _socket_name(role: str, number: int) -> str:
    return f"{role}-{number}"


def _catch_signals(cloud: Cloud) -> None:
    def caught(number: int, _frame: object) -> None:
        cloud.signals.append(number)
        cloud.woken.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, caught)


def _start_all(cloud: Cloud) -> None:
    """Gateways last: when they are ready there is a snapshot, and who grants allowances."""
    roles = [("loops", 0), ("bastion", 0), ("link", 0)]
    roles += [("api", number) for number in range(cloud.settings.api_workers)]
    _start(cloud, roles)
    _start(cloud, [(GATEWAY, number) for number in range(cloud.settings.gateways)])


def _start(cloud: Cloud, roles: list[tuple[str, int]]) -> None:
    waiting = [_spawn(cloud, role, number) for role, number in roles]
    for (role, _), ready in zip(roles, waiting, strict=True):
        _await_ready(role, ready, cloud)


def _spawn(cloud: Cloud, role: str, number: int) -> int:
    """Start one process; returns where it says that it is ready."""
    ready_out, ready_in = os.pipe()
    shared = {"api": "api", "bastion": "ssh", GATEWAY: _socket_name(GATEWAY, number)}
    name = shared.get(role)
    key_fd = _key_pipe(cloud.key) if role in KEY_HOLDERS and cloud.key is not None else None
    orders = Orders(
        role=role,
        settings=cloud.settings.model_dump_json(),
        parent=os.getpid(),
        ready_fd=ready_in,
        lock_fd=cloud.lock_fd,
        socket_fd=None if name is None else cloud.sockets[name].fileno(),
        ssh_address=cloud.sockets["ssh"].getsockname()[:2],
        number=number,
        key_fd=key_fd,
    )
    command, environment = _command(cloud, orders)
    passed = [ready_in, cloud.lock_fd, orders.socket_fd, key_fd]
    errors = cloud.folder.log.open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        pass_fds=[descriptor for descriptor in passed if descriptor is not None],
        start_new_session=True,
    )
    errors.close()
    os.close(ready_in)
    if key_fd is not None:
        os.close(key_fd)
    cloud.children.append(Child(orders, process))
    return ready_out


def _command(cloud: Cloud, orders: Orders) -> tuple[list[str], dict[str, str]]:
    """A gateway knows nothing of the house: it has its own entry, and orders in its own words."""
    if orders.role != GATEWAY:
        return ["sublet.app.child", orders.role], {ORDERS: orders.text()}
    told = {
        "name": f"gw-{orders.number}",
        "folder": str(cloud.folder.gateway),
        "socket_fd": orders.socket_fd,
        "ready_fd": orders.ready_fd,
        "parent": orders.parent,
        "ack": True,
        "body_limit": cloud.settings.body_limit,
        "stale_seconds": cloud.settings.gateway_stale_seconds,
    }
    return ["sublet.gateway"], {GATEWAY_ORDERS: json.dumps(told)}


def _key_pipe(key: bytes) -> int:
    out, into = os.pipe()
    os.write(into, key)
    os.close(into)
    return out


def _await_ready(role: str, ready: int, cloud: Cloud) -> None:
    """Wait for the child's word. Its end ends the wait, and so does a signal to us; but the loops
    are waited for all the same, since they alone can end what runs."""
    answered = False
    may_leave = role != "loops"
    with selectors.DefaultSelector() as selector:
        selector.register(ready, selectors.EVENT_READ)
        for _ in range(int(READY_SECONDS / READY_LOOK_SECONDS)):
            answered = bool(selector.select(READY_LOOK_SECONDS))
            if answered or (may_leave and cloud.signals):
                break
    said = os.read(ready, 1) if answered else b""
    os.close(ready)
    if not said and not (may_leave and cloud.signals):
        raise Unavailable(
            f"The {role} process did not start: the last lines of {cloud.folder.log} say why."
        )


def _watch(cloud: Cloud, say: Say) -> int:
    """Wait for a signal; start again what dies by itself."""
    while not cloud.signals:
        cloud.woken.wait(0.5)
        if cloud.signals:
            break
        for child in list(cloud.children):
            if child.process.poll() is not None and not _restarted(cloud, child, say):
                _leave(cloud, say)
                return 1
    if cloud.signals[0] == signal.SIGTERM:
        return _leave(cloud, say)
    return _shut(cloud, say)


def _restarted(cloud: Cloud, child: Child, say: Say) -> bool:
    orders = child.orders
    cloud.children.remove(child)
    now = read_boot_ns() / 1e9
    lately = tuple(at for at in child.restarted_at if now - at < RESTARTS_WITHIN_SECONDS)
    if len(lately) >= RESTARTS_ALLOWED:
        say(f"sublet: the {orders.role} process keeps ending; its log is {cloud.folder.log}.")
        return False
    say(f"The {orders.role} process ended ({child.process.returncode}); starting it again.")
    # A little longer each time: what fails at once should not fill the log.
    cloud.woken.wait(len(lately))
    ready = _spawn(cloud, orders.role, orders.number)
    cloud.children[-1].restarted_at = (*lately, now)
    try:
        _await_ready(orders.role, ready, cloud)
    except SubletError as error:
        say(f"sublet: {error.message}")
    return True


def _shut(cloud: Cloud, say: Say) -> int:
    say(
        "\nClosing the cloud: what streams may end, workloads get SIGTERM and their grace; "
        "their consumers a credit."
    )
    loops = [c for c in cloud.children if c.orders.role == "loops"]
    # Nothing new may come in while what runs is being ended.
    killed = _end_in_order(cloud, keep=loops, is_watched=True)
    if not killed:
        for child in loops:
            with suppress(ProcessLookupError):
                child.process.send_signal(signal.SIGUSR1)
        killed = not _ended(cloud, loops, None)
    if killed:
        say("Killing what still runs.")
        first.kill_everything(cloud.settings, cloud.folder)
        _end(cloud, cloud.children, signal.SIGKILL, 1.0)
        return 130
    say("Closed: nothing is left running.")
    return 0


def _leave(cloud: Cloud, say: Say) -> int:
    say("Stopping the control plane; gateways end too, as soon as what streams has ended.")
    _end_in_order(cloud)
    for line in first.left_running(cloud.settings, cloud.folder):
        say(line)
    return 0


def _end_in_order(
    cloud: Cloud, keep: list[Child] | None = None, *, is_watched: bool = False
) -> bool:
    """Gateways, then the link, then the others. `is_watched`: a second signal ends the patience;
    True is returned then, with processes left."""
    for name, listening in cloud.sockets.items():
        if name.startswith(GATEWAY):
            # Else connections would wait for a gateway that never comes.
            listening.close()
    left = [c for c in cloud.children if c not in (keep or [])]
    gateways = [child for child in left if child.orders.role == GATEWAY]
    links = [child for child in left if child.orders.role == "link"]
    others = [child for child in left if child not in [*gateways, *links]]
    for ending, seconds in (
        (gateways, GATEWAY_GRACE_SECONDS),
        (links, LINK_GRACE_SECONDS),
        (others, CHILD_GRACE_SECONDS),
    ):
        if not _end(cloud, ending, signal.SIGTERM, seconds, is_watched=is_watched):
            return True
    return False


def _end(
    cloud: Cloud, ending: list[Child], number: int, seconds: float, *, is_watched: bool = False
) -> bool:
    """Signal these, and wait; who does not end is killed. False: a second signal came before."""
    for child in ending:
        with suppress(ProcessLookupError):
            child.process.send_signal(number)
    if not _ended(cloud, ending, seconds, is_watched=is_watched):
        return False
    for child in ending:
        if child.process.poll() is None:
            child.process.kill()
            child.process.wait()
    return True


def _ended(
    cloud: Cloud, ending: list[Child], seconds: float | None, *, is_watched: bool = True
) -> bool:
    """Wait until these have ended or the time is over. False: a second signal came before."""
    end_ns = None if seconds is None else read_boot_ns() + int(seconds * 1e9)
    while any(child.process.poll() is None for child in ending):
        cloud.woken.clear()
        if is_watched and len(cloud.signals) > 1:
            return False
        if end_ns is not None and read_boot_ns() >= end_ns:
            break
        cloud.woken.wait(0.05)
    return True


def _reenter_with_delegated_cgroup(say: Say) -> None:
    """As an ordinary user, run again inside a scope whose cgroup is ours, where systemd offers it."""
    if os.geteuid() == 0 or os.environ.get("SUBLET_SCOPED") or not _user_systemd():
        return
    say("Running inside a delegated cgroup of the user's systemd, so that memory and CPU hold.")
    command = ["systemd-run", "--user", "--scope", "--quiet", "-p", "Delegate=yes", "--"]
    os.environ["SUBLET_SCOPED"] = "1"
    os.execvp(command[0], [*command, sys.executable, "-m", "sublet", *sys.argv[1:]])


def _user_systemd() -> bool:
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if not runtime or not Path(runtime, "systemd", "private").exists():
        return False
    try:
        probe = ["systemd-run", "--user", "--scope", "--quiet", "-p", "Delegate=yes", "true"]
        return subprocess.run(probe, capture_output=True, timeout=10, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False
