"""Outbound network for a sandbox, through a user-mode stack where one is installed.

`pasta` or `slirp4netns` runs beside the sandbox as the tenant's host uid and ends with it. It leads
to the public internet alone: either is told to keep the host's own loopback out of reach, and the
host's other addresses and all that is not public (the owner's LAN) get no route inside and no
neighbour (see `netns`). The one exception is the resolver: the stack itself passes questions for
names on to the one that the host asks. The sandbox's own address is of a block that is nobody's,
so that no route of its link leads into a LAN, and the owner's addresses are not told. IPv4 only:
one family to keep shut. Nothing inside has the power to change any of it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import signal
import struct
from collections.abc import Callable, Sequence

from . import addresses, netns, sandbox, usage
from .records import Plan

RESOLVER = {"pasta": "198.51.100.53", "slirp4netns": "198.51.100.3"}
"""Where names are asked for inside: addresses of the documentation block."""
_PASTA_ADDRESS, _PASTA_PREFIX = "198.51.100.54", "30"
_SLIRP_NETWORK = "198.51.100.0/25"
_NEXT_HOPS = {
    "pasta": {"198.51.100.53": bytes.fromhex("0200c6336435")},
    "slirp4netns": {
        "198.51.100.2": bytes.fromhex("5255c6336402"),
        "198.51.100.3": bytes.fromhex("5255c6336403"),
    },
}
"""All that is on the link. Either stack takes a frame whatever address it is sent to."""
_DEVICE = "sublet0"
_PIDFD_GETFD = 438
_TUNSETTXFILTER = 0x400454D1
_LOOK_NS = 5_000_000_000


def start(plan: Plan, pid: int) -> int:
    """Start the stack for the namespace of `pid`; returns its own pid. Raises OSError."""
    program = shutil.which(plan.outbound)
    if program is None:
        raise FileNotFoundError(plan.outbound)
    owner = netns.owner_of_network(pid)
    parent = os.getpid()
    try:
        child = os.fork()
        if child == 0:
            _become(plan, program, pid, owner, parent)
        return child
    finally:
        os.close(owner)


def _become(plan: Plan, program: str, pid: int, owner: int, parent: int) -> None:
    """In the fork: the tenant's uid, no files, and the program. Never returns."""
    try:
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        for ignored in (signal.SIGHUP, signal.SIGINT):
            signal.signal(ignored, signal.SIG_IGN)
        # pasta takes an ignored SIGPIPE for an error of signal(2) and ends.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        if plan.uid is not None:
            namespace = sandbox.prepare_helper(owner)
            os.setgroups([])
            os.setresgid(plan.uid, plan.uid, plan.uid)
            os.setresuid(plan.uid, plan.uid, plan.uid)
        else:
            os.set_inheritable(owner, True)
            namespace = f"/proc/self/fd/{owner}"
        sandbox.die_with(parent)
        os.chdir("/")
        environment = {"PATH": os.environ.get("PATH", ""), usage.MARK: plan.mark}
        os.execve(program, _arguments(plan.outbound, pid, namespace), environment)
    finally:
        os._exit(127)


def _arguments(name: str, pid: int, namespace: str) -> list[str]:
    if name == "pasta":
        argv = ["pasta", "--foreground", "--quiet", "--ipv4-only", "--config-net"]
        argv += ["--ns-ifname", _DEVICE, "--no-map-gw", "--dns-forward", RESOLVER["pasta"]]
        argv += ["--address", _PASTA_ADDRESS, "--netmask", _PASTA_PREFIX]
        argv += ["--gateway", RESOLVER["pasta"]]
        argv += ["-t", "none", "-u", "none", "-T", "none", "-U", "none"]
        return [*argv, "--userns", namespace, str(pid)]
    argv = ["slirp4netns", "--configure", "--disable-host-loopback", "--mtu=65520"]
    argv += [f"--cidr={_SLIRP_NETWORK}", "--netns-type=path", f"--userns-path={namespace}"]
    return [*argv, f"/proc/{pid}/ns/net", _DEVICE]


def is_ready(pid: int) -> bool:
    """Is there a way out of the namespace of `pid` by now?"""
    try:
        with open(f"/proc/{pid}/net/route") as source:
            routes = [line.split() for line in source.read().splitlines()[1:]]
    except OSError:
        return False
    return any(words[0] == _DEVICE and words[1] == "00000000" for words in routes)


class Doors:
    """What a way out must not lead to, kept shut while the run lives."""

    def __init__(self, plan: Plan, pid: int, stack: int) -> None:
        """Shut when this returns; `stack` is the pid of what `start` started. Raises OSError."""
        self._pid = pid
        self._shut = {*plan.blocked_routes, *addresses.of_host()}
        netns.refuse_routes(pid, sorted(self._shut))
        known = _NEXT_HOPS[plan.outbound]
        netns.fix_neighbours(pid, _DEVICE, known)
        _drop_frames_to_others(stack, list(known.values()))
        self._next_ns = 0

    def look(self, now: int, say: Callable[[str], None]) -> None:
        """Every few seconds: an address that the host was given meanwhile is shut too.

        One that it lost stays shut until the run ends. Raises OSError.
        """
        if now < self._next_ns:
            return
        self._next_ns = now + _LOOK_NS
        fresh = sorted(set(addresses.of_host()) - self._shut)
        if fresh:
            netns.refuse_routes(self._pid, fresh)
            self._shut.update(fresh)
            say(f"the way out is closed to {len(fresh)} new addresses of the host")


def _drop_frames_to_others(stack: int, known: Sequence[bytes]) -> None:
    """Nothing leaves the sandbox for a group or for all, whatever routes say. Raises OSError.

    A socket bound to a device or an address reaches groups past every route, and the stack would
    pass it on into the LAN. The tunnel's own filter holds them; it is set on the stack's descriptor.
    """
    pidfd = os.pidfd_open(stack)
    try:
        tunnel = int(sandbox.libc.syscall(_PIDFD_GETFD, pidfd, _find_tunnel(stack), 0))
    finally:
        os.close(pidfd)
    if tunnel < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    try:
        fcntl.ioctl(tunnel, _TUNSETTXFILTER, struct.pack("=HH", 0, len(known)) + b"".join(known))
    finally:
        os.close(tunnel)


def _find_tunnel(stack: int) -> int:
    for name in os.listdir(f"/proc/{stack}/fdinfo"):
        with open(f"/proc/{stack}/fdinfo/{name}") as source:
            if any(line.split() == ["iff:", _DEVICE] for line in source):
                return int(name)
    raise FileNotFoundError(errno.ENOENT, "the tunnel is not open")
