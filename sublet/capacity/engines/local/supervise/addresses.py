"""Which IPv4 networks a workload's way out does not lead to: this machine and what is not public.

Asked of the kernel by netlink, which names secondary addresses and whole local networks too.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterator

NOT_PUBLIC = (
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",  # between a provider and its customers; overlay networks live there too
    "127.0.0.0/8",
    "169.254.0.0/16",  # other people's metadata services
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/4",
    "240.0.0.0/4",
)
"""Private, link-local, shared, set aside, for groups: what nobody on the public internet has."""

_GET_ADDRESS, _GET_ROUTE = 22, 26
_REQUEST_DUMP = 0x1 | 0x300
_DONE, _ERROR = 3, 2
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTA_DESTINATION = 1
_LOCAL = 2
_LOOPBACK = ipaddress.IPv4Network("127.0.0.0/8")


def of_host() -> list[str]:
    """Every IPv4 network that ends at this machine, beside its loopback's own. Raises OSError."""
    found: set[ipaddress.IPv4Network] = set()
    for body in _dump(_GET_ADDRESS, struct.pack("=BBBBI", socket.AF_INET, 0, 0, 0, 0)):
        given = _attributes(body, 8)
        raw = given.get(_IFA_LOCAL) or given.get(_IFA_ADDRESS)
        if raw is not None:
            found.add(ipaddress.IPv4Network(raw))
    # Networks may be made the machine's own without any address ("ip route add local").
    for body in _dump(_GET_ROUTE, struct.pack("=BBBBBBBBI", socket.AF_INET, *[0] * 8)):
        raw = _attributes(body, 12).get(_RTA_DESTINATION)
        if body[7] == _LOCAL and raw is not None:
            found.add(ipaddress.IPv4Network((raw, body[1])))
    return [str(network) for network in sorted(found) if not network.subnet_of(_LOOPBACK)]


def _dump(kind: int, header: bytes) -> Iterator[bytes]:
    """What the kernel lists, message by message without their netlink headers."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as channel:
        channel.bind((0, 0))
        channel.settimeout(3)
        length = 16 + len(header)
        channel.send(struct.pack("=IHHII", length, kind, _REQUEST_DUMP, 1, 0) + header)
        while True:
            data = channel.recv(1 << 18)
            at = 0
            while at + 16 <= len(data):
                length, said = struct.unpack_from("=IH", data, at)
                body = data[at + 16 : at + length]
                if said == _DONE:
                    return
                if said == _ERROR:
                    raise OSError(-struct.unpack_from("=i", body)[0], "addresses are not listed")
                yield body
                at += (length + 3) & ~3


def _attributes(body: bytes, at: int) -> dict[int, bytes]:
    found = {}
    while at + 4 <= len(body):
        length, kind = struct.unpack_from("=HH", body, at)
        if length < 4:
            break
        found[kind] = body[at + 4 : at + length]
        at += (length + 3) & ~3
    return found
