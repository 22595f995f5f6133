"""What a hostile workload tries. Run inside a sandbox by the probes; says what it reached.

One attempt a run: `walls` (files, processes, devices, host network), `bomb`, `memory`, `cpu`,
`disk`, `outbound`, or `victim`, which only waits to be found by the others. The arguments are a
JSON object; the answer is one JSON object on standard output. Standard library, Python 3.9: it
runs on whatever Python the sandbox has.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import mmap
import os
import signal
import socket
import stat
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

CLONE_NEWUSER = 0x10000000
AF_VSOCK = 40
MIB = 1 << 20


def walls(given: dict[str, Any]) -> dict[str, Any]:
    return {
        "files": read_files(given["files"]) + write_system(),
        "processes": reach_processes(given["pids"], given["mark"]),
        "devices": open_devices(given["nodes"]),
        "network": reach_network(given["addresses"], given["abstract"]),
        "namespaces": make_namespace(),
    }


def read_files(paths: Sequence[str]) -> list[str]:
    """Each path as it is, and through the root of any process that shows one."""
    reached = []
    pids = [name for name in os.listdir("/proc") if name.isdigit()]
    roots = ["", *("/proc/" + pid + "/root" for pid in pids[:64])]
    for path in paths:
        for root in roots:
            try:
                with open(root + path, "rb") as source:
                    source.read(1)
            except OSError:
                continue
            reached.append(path)
            break
    return reached


def write_system() -> list[str]:
    reached = []
    for path in ("/usr/sublet-probe", "/sublet-probe", "/etc/sublet-probe", "/dev/sublet-probe"):
        try:
            with open(path, "w"):
                reached.append("writing " + path)
            os.unlink(path)
        except OSError:
            continue
    return reached


def reach_processes(pids: Sequence[int], mark: str) -> list[str]:
    """Is any process of the host or of another workload to be seen or signalled?"""
    reached = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/" + name + "/cmdline", "rb") as source:
                    if mark.encode() in source.read() and int(name) in pids:
                        reached.append(f"process {name} is visible")
            except OSError:
                continue
    for pid in pids:
        try:
            os.kill(pid, 0)
            with open(f"/proc/{pid}/cmdline", "rb") as source:
                if mark.encode() in source.read():  # else it is one of our own with that number
                    reached.append(f"process {pid} can be signalled")
        except OSError:
            continue
    return reached


def open_devices(nodes: Sequence[str]) -> list[str]:
    reached = []
    for node in nodes:
        try:
            os.close(os.open(node, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY))
            reached.append(node)
        except OSError:
            continue
    for name, number in (("memory", os.makedev(1, 1)), ("disk", os.makedev(8, 0))):
        kind = stat.S_IFCHR if name == "memory" else stat.S_IFBLK
        try:
            os.mknod("probe-node", 0o600 | kind, number)
            os.close(os.open("probe-node", os.O_RDONLY | os.O_NONBLOCK))
            reached.append("a node made for " + name)
        except OSError:
            pass
        with contextlib.suppress(OSError):
            os.unlink("probe-node")
    return reached


def reach_network(addresses: Sequence[tuple[str, int]], abstract: str) -> list[str]:
    reached = []
    for host, port in addresses:
        try:
            socket.create_connection((host, port), timeout=1).close()
            reached.append(f"{host}:{port}")
        except OSError:
            continue
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        try:
            peer.connect("\0" + abstract)
            reached.append("an abstract socket of the host")
        except OSError:
            pass
    try:
        socket.socket(AF_VSOCK, socket.SOCK_STREAM).close()
        reached.append("the hypervisor's sockets (vsock)")
    except OSError:
        pass
    return reached


def make_namespace() -> str:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWUSER) == 0:
        return "allowed"
    return os.strerror(ctypes.get_errno())


def bomb(given: dict[str, Any]) -> dict[str, Any]:
    """Fork until refused, or clearly past the limit."""
    children: list[int] = []
    refused: str | None = None
    read_end, write_end = os.pipe()
    while len(children) < given["most"]:
        try:
            pid = os.fork()
        except OSError as error:
            refused = errno.errorcode.get(error.errno or 0, "refused")
            break
        if pid == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
        children.append(pid)
    os.close(write_end)
    for pid in children:
        os.waitpid(pid, 0)
    return {"forked": len(children), "refused": refused}


def memory(given: dict[str, Any]) -> dict[str, Any]:
    """Write to private and then to shared memory past the limit, saying how far it went."""
    held: list[mmap.mmap] = []
    for kind, flags in (("private", mmap.MAP_PRIVATE), ("shared", mmap.MAP_SHARED)):
        while len(held) * 4 * MIB < given["most"]:
            try:
                piece = mmap.mmap(-1, 4 * MIB, flags=flags | mmap.MAP_ANONYMOUS)
            except (OSError, MemoryError):
                break
            for offset in range(0, len(piece), 4096):
                piece[offset] = 1
            held.append(piece)
            print(json.dumps({"touched": len(held) * 4 * MIB, "kind": kind}), flush=True)
    time.sleep(given["stay"])
    return {"kept": len(held) * 4 * MIB}


def cpu(given: dict[str, Any]) -> dict[str, Any]:
    """Take every CPU that can be had and spin; how much time was burnt a second?"""
    try:
        os.sched_setaffinity(0, range(given["host_cpus"]))
        widened = "asked"
    except OSError as error:
        widened = errno.errorcode.get(error.errno or 0, "refused")
    allowed = len(os.sched_getaffinity(0))
    begin = time.monotonic()
    children: list[int] = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            while time.monotonic() < begin + given["seconds"]:
                pass
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    used = os.times()
    burnt = used.children_user + used.children_system
    rate = burnt / (time.monotonic() - begin)
    return {"allowed": allowed, "widened": widened, "rate": round(rate, 3)}


def disk(given: dict[str, Any]) -> dict[str, Any]:
    """Write files that are allowed one by one, and too much together; keep some deleted."""
    kept = []
    for number in range(given["files"]):
        sink = open(f"probe-{number}", "wb", buffering=0)  # noqa: SIM115 - open to the end
        sink.write(b"x" * given["each"])
        kept.append(sink)
        if number:
            os.unlink(sink.name)
    time.sleep(given["stay"])
    return {"written": given["files"] * given["each"]}


def outbound(given: dict[str, Any]) -> dict[str, Any]:
    """The host as it is, then past its routes, and is there a way to what is not public?"""
    reached = reach_network(given["addresses"], given["abstract"])
    reached += reach_bound(given["bound"]) + find_ways(given["private"])
    return {"network": reached}


def reach_bound(addresses: Sequence[tuple[str, int]]) -> list[str]:
    """From a socket bound to the way out: then Linux takes everybody for a neighbour."""
    reached = []
    for _, name in socket.if_nameindex():
        for host, port in addresses if name != "lo" else ():
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as peer:
                peer.settimeout(0.5)
                try:
                    peer.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode())
                    peer.connect((host, port))
                    reached.append(f"{host}:{port} by {name}")
                except OSError:
                    continue
    return reached


def find_ways(addresses: Sequence[str]) -> list[str]:
    """Connecting a datagram socket looks for a route and sends nothing."""
    reached = []
    for host in addresses:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            try:
                peer.connect((host, 9))
                reached.append("a way to " + host)
            except OSError:
                continue
    return reached


def victim(given: dict[str, Any]) -> dict[str, Any]:
    with open("secret", "w") as sink:
        sink.write("of another workload")
    print(json.dumps({"ready": given["mark"]}), flush=True)
    signal.pause()
    return {}


if __name__ == "__main__":
    attempts = {
        attempt.__name__: attempt for attempt in (walls, bomb, memory, cpu, disk, outbound, victim)
    }
    print(json.dumps(attempts[sys.argv[1]](json.loads(sys.argv[2]))), flush=True)
