"""Outbound network for a sandbox, through a user-mode stack where one is installed.

`pasta` or `slirp4netns` runs beside the sandbox as the tenant's host uid and ends with it. Either
is told to keep the host's own loopback out of reach; the host's other addresses and link-local
networks get no route inside (see `netns`), so what listens on this machine is not reached through
its outer addresses either. IPv4 only: one family to keep shut.
"""

from __future__ import annotations

import os
import shutil
import signal

from . import netns, sandbox, usage
from .records import Plan

RESOLVER = {"pasta": "198.51.100.53", "slirp4netns": "10.0.2.3"}
"""Where names are asked for inside: an address of the documentation block, and slirp's own."""
_DEVICE = "sublet0"


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
        argv += ["-t", "none", "-u", "none", "-T", "none", "-U", "none"]
        return [*argv, "--userns", namespace, str(pid)]
    argv = ["slirp4netns", "--configure", "--disable-host-loopback", "--mtu=65520"]
    argv += ["--netns-type=path", f"--userns-path={namespace}"]
    return [*argv, f"/proc/{pid}/ns/net", _DEVICE]


def is_ready(pid: int) -> bool:
    """Is there a way out of the namespace of `pid` by now?"""
    try:
        with open(f"/proc/{pid}/net/route") as source:
            routes = [line.split() for line in source.read().splitlines()[1:]]
    except OSError:
        return False
    return any(words[0] == _DEVICE and words[1] == "00000000" for words in routes)


def close_doors(plan: Plan, pid: int) -> None:
    """No route to the host's own addresses nor to link-local networks. Raises OSError."""
    netns.refuse_routes(pid, plan.blocked_routes)
