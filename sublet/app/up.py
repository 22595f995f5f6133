"""`sublet up`: opens the cloud on this machine and stays until it is told to end.

Ctrl-C, SIGHUP and `sublet down` shut the cloud: workloads get SIGTERM at once, their grace, and
their consumers a credit; a second Ctrl-C kills. SIGTERM is a service restart: the control plane
ends, supervisors stay, each with a printed deadline.
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
    children: list[Child] = field(default_factory=list)
    signals: list[int] = field(default_factory=list)
    woken: threading.Event = field(default_factory=threading.Event)

    def url(self) -> str:
        return _url("http", self.sockets["api"])


def main(
    settings: Settings,
    *,
    tour: bool = False,
    ready_file: Path | None = None,
    say: Say = print,
    run_tour: Callable[[str, str], int] | None = None,
) -> int:
    """Run a cloud in the foreground. Returns the exit code; errors are one sentence on `say`.

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
        }
        opened = first.open_folder(settings, folder, tour=tour, say=say)
    except SubletError as error:
        say(f"sublet: {error.message}")
        return 1
    cloud = Cloud(opened.settings, folder, lock_fd, sockets)
    _forget(ready_file)
    _catch_signals(cloud)
    try:
        _start_all(cloud)
    except SubletError as error:
        say(f"sublet: {error.message}")
        _end_children(cloud, signal.SIGTERM)
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
        "gateway_url": None,
        "console_url": None,
        "ssh": {"host": host, "port": port},
        "owner_key": owner_key,
        "pid": os.getpid(),
    }


def _greet(cloud: Cloud, opened: first.Opened, say: Say) -> None:
    host, port = cloud.sockets["ssh"].getsockname()[:2]
    say("")
    say(f"The cloud is open.  API {cloud.url()}   SSH {host} port {port}")
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


def _listen(host: str, port: int, option: str) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except socket.gaierror as error:
        raise PortInUse(
            f"{host} is no address of this machine ({error.strerror}): give another with --host."
        ) from error
    try:
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(512)
    except OSError as error:
        raise PortInUse(
            f"{host}:{port} cannot be listened on ({error.strerror or error}): "
            f"give another with {option}, or {option} 0 for a free one."
        ) from error
    return listening


def _catch_signals(cloud: Cloud) -> None:
    def caught(number: int, _frame: object) -> None:
        cloud.signals.append(number)
        cloud.woken.set()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, caught)


def _start_all(cloud: Cloud) -> None:
    roles: list[tuple[str, str | None, int]] = [("loops", None, 0), ("bastion", "ssh", 0)]
    roles += [("api", "api", number) for number in range(cloud.settings.api_workers)]
    waiting = [_spawn(cloud, role, listening, number) for role, listening, number in roles]
    for (role, _, _), ready in zip(roles, waiting, strict=True):
        _await_ready(role, ready, cloud)


def _spawn(cloud: Cloud, role: str, listening: str | None, number: int) -> int:
    ready_out, ready_in = os.pipe()
    socket_fd = None if listening is None else cloud.sockets[listening].fileno()
    orders = Orders(
        role=role,
        settings=cloud.settings.model_dump_json(),
        parent=os.getpid(),
        ready_fd=ready_in,
        lock_fd=cloud.lock_fd,
        socket_fd=socket_fd,
        ssh_address=cloud.sockets["ssh"].getsockname()[:2],
        number=number,
    )
    inherited = [ready_in, cloud.lock_fd] + ([] if socket_fd is None else [socket_fd])
    errors = cloud.folder.log.open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", "sublet.app.child", role],
        env={**os.environ, ORDERS: orders.text()},
        stdin=subprocess.DEVNULL,
        stdout=errors,
        stderr=errors,
        pass_fds=inherited,
        start_new_session=True,
    )
    errors.close()
    os.close(ready_in)
    cloud.children.append(Child(orders, process))
    return ready_out


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
    listening = {"api": "api", "bastion": "ssh"}.get(orders.role)
    ready = _spawn(cloud, orders.role, listening, orders.number)
    cloud.children[-1].restarted_at = (*lately, now)
    try:
        _await_ready(orders.role, ready, cloud)
    except SubletError as error:
        say(f"sublet: {error.message}")
    return True


def _shut(cloud: Cloud, say: Say) -> int:
    say("\nClosing the cloud: workloads get SIGTERM now and their grace; their consumers a credit.")
    loops = [c for c in cloud.children if c.orders.role == "loops"]
    # Nothing new may come in while what runs is being ended.
    _end_children(cloud, signal.SIGTERM, keep=loops)
    for child in loops:
        with suppress(ProcessLookupError):
            child.process.send_signal(signal.SIGUSR1)
    while any(child.process.poll() is None for child in loops):
        cloud.woken.clear()
        if len(cloud.signals) > 1:
            say("Killing what still runs.")
            first.kill_everything(cloud.settings, cloud.folder)
            _end_children(cloud, signal.SIGKILL)
            return 130
        cloud.woken.wait(0.1)
    say("Closed: nothing is left running.")
    return 0


def _leave(cloud: Cloud, say: Say) -> int:
    _end_children(cloud, signal.SIGTERM)
    for line in first.left_running(cloud.settings, cloud.folder):
        say(line)
    return 0


def _end_children(cloud: Cloud, number: int, keep: list[Child] | None = None) -> None:
    ending = [c for c in cloud.children if c not in (keep or [])]
    for child in ending:
        with suppress(ProcessLookupError):
            child.process.send_signal(number)
    for child in ending:
        try:
            child.process.wait(CHILD_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()


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
