"""Work in a sandbox's network namespace, done by a short-lived child of the supervisor.

The child enters the namespace from outside, where the owner of a user namespace has every power
over it, so that nothing inside ever needs a capability. It gives the loopback the address that
clouds have taught everyone to ask for metadata, opens the listening socket there and hands it out;
and it closes the doors of a way out: routes, and who may be spoken to on its link.
"""

from __future__ import annotations

import ctypes
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence

from . import wire
from .sandbox import die_with, libc

METADATA_ADDRESS = "169.254.169.254"
_ENTER_SECONDS = 3.0
_NEWUSER, _NEWNET = 0x10000000, 0x40000000
_GET_USERNS = 0xB701
_NEWADDR, _NEWROUTE, _NEWNEIGH, _SETNEIGHTBL = 20, 24, 28, 67
_REQUEST_ACK_CREATE_REPLACE = 0x1 | 0x4 | 0x400 | 0x100
_UNREACHABLE, _MAIN_TABLE, _STATIC = 7, 254, 4
_PERMANENT = 0x80
_TABLE_NAME, _TABLE_PARAMETERS = 1, 6
_DEVICE_INDEX, _PROBES = 1, (9, 10, 11)  # by a program, to one, to all


def inside(
    pid: int, work: Callable[[], tuple[dict[str, object], Sequence[int]]]
) -> tuple[dict[str, object], list[int]]:
    """Run `work` in the user and network namespace of `pid`; its answer and its descriptors.

    Raises OSError, also when it takes too long.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            die_with(parent)
            _enter(pid)
            answer, fds = work()
            wire.send(theirs, answer, fds)
        except OSError as error:
            wire.send(theirs, {"errno": error.errno, "detail": str(error)})
        finally:
            os._exit(0)
    theirs.close()
    ours.settimeout(_ENTER_SECONDS)
    try:
        with ours:
            message, fds = wire.receive(ours)
    except TimeoutError as error:
        os.kill(child, 9)
        raise OSError("the sandbox's network did not answer") from error
    finally:
        os.waitpid(child, 0)
    if message is None:
        raise OSError("nobody came back from the sandbox's network")
    if "errno" in message:
        raise OSError(message["errno"], message["detail"])
    return message, fds


def metadata_listener(pid: int) -> tuple[socket.socket, str]:
    """A socket listening inside, and its URL. Raises OSError."""

    def work() -> tuple[dict[str, object], Sequence[int]]:
        address, port = METADATA_ADDRESS, 80
        try:
            add_loopback_address(address)
            listener = listen(address, port)
        except OSError:
            listener = listen("127.0.0.1", 0)
            address, port = listener.getsockname()
        where = address if port == 80 else f"{address}:{port}"
        return {"url": f"http://{where}"}, [listener.detach()]

    message, fds = inside(pid, work)
    return socket.socket(fileno=fds[0]), str(message["url"])


def refuse_routes(pid: int, routes: Sequence[str]) -> None:
    """Make networks unreachable from inside. Raises OSError."""

    def work() -> tuple[dict[str, object], Sequence[int]]:
        for route in routes:
            add_unreachable(route)
        return {}, []

    inside(pid, work)


def fix_neighbours(pid: int, device: str, known: Mapping[str, bytes]) -> None:
    """Only these addresses can ever be the next hop on a link. Raises OSError.

    Routes alone hold nobody: for a socket bound to a device (SO_BINDTODEVICE, IP_PKTINFO, which
    take no power) Linux answers "no route" with "then it must be on this link", and asks the
    link for the address itself. Here it does not get to ask.
    """

    def work() -> tuple[dict[str, object], Sequence[int]]:
        index = socket.if_nametoindex(device)
        for address, hardware in known.items():
            add_neighbour(index, address, hardware)
        stop_asking(index)
        return {}, []

    inside(pid, work)


def listen(address: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((address, port))
    listener.listen(128)
    listener.setblocking(False)
    return listener


def add_loopback_address(address: str) -> None:
    raw = socket.inet_aton(address)
    body = struct.pack("=BBBBI", socket.AF_INET, 32, 0, 254, socket.if_nametoindex("lo"))
    _ask_kernel(_NEWADDR, body + _attribute(2, raw) + _attribute(1, raw))


def add_unreachable(network: str) -> None:
    parsed = ipaddress.ip_network(network)
    family = socket.AF_INET if parsed.version == 4 else socket.AF_INET6
    header = struct.pack(
        "=BBBBBBBBI", family, parsed.prefixlen, 0, 0, _MAIN_TABLE, _STATIC, 0, _UNREACHABLE, 0
    )
    _ask_kernel(_NEWROUTE, header + _attribute(1, parsed.network_address.packed))


def add_neighbour(index: int, address: str, hardware: bytes) -> None:
    header = struct.pack("=BBHiHBB", socket.AF_INET, 0, 0, index, _PERMANENT, 0, 0)
    body = header + _attribute(1, socket.inet_aton(address)) + _attribute(2, hardware)
    _ask_kernel(_NEWNEIGH, body)


def stop_asking(index: int) -> None:
    """No question who has an address, so nobody but known neighbours is found."""
    none = b"".join(_attribute(kind, struct.pack("=I", 0)) for kind in _PROBES)
    parameters = _attribute(_DEVICE_INDEX, struct.pack("=I", index)) + none
    table = _attribute(_TABLE_NAME, b"arp_cache\0") + _attribute(_TABLE_PARAMETERS, parameters)
    _ask_kernel(_SETNEIGHTBL, struct.pack("=BBH", socket.AF_INET, 0, 0) + table)


def owner_of_network(pid: int) -> int:
    """The user namespace that owns the network of `pid`, opened. Raises OSError.

    It is not the one that `pid` is in: bubblewrap sets the sandbox up in one user namespace and
    runs what it starts in another one below, to have the uid that was asked for.
    """
    network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(network, _GET_USERNS)
    finally:
        os.close(network)


def _enter(pid: int) -> None:
    network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    if os.geteuid() != 0:
        _set_namespace(owner_of_network(pid), _NEWUSER)
    _set_namespace(network, _NEWNET)


def _set_namespace(fd: int, kind: int) -> None:
    if libc.setns(fd, kind) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + b"\0" * (-len(data) % 4)


def _ask_kernel(kind: int, body: bytes) -> None:
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as channel:
        channel.bind((0, 0))
        length = 16 + len(body)
        header = struct.pack("=IHHII", length, kind, _REQUEST_ACK_CREATE_REPLACE, 1, 0)
        channel.send(header + body)
        answer = channel.recv(65536)
    (error,) = struct.unpack_from("=i", answer, 16)
    if error:
        raise OSError(-error, os.strerror(-error))
