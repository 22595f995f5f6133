"""Messages over a Unix socket that keeps them apart: one JSON object a packet, with descriptors.

Both ends of both channels speak it: engine to supervisor (`control.sock`) and supervisor to the
init inside. A packet is bounded, so a reader never collects parts, and a peer cannot make it
hold more than one. What does not fit is answered in several packets marked `more`.
"""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

LARGEST = 128 * 1024
"""Of a packet: under the kernel's default socket buffer of 208 KiB."""
MOST_FDS = 4


def send(channel: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Raises OSError: EMSGSIZE for a message too large, EAGAIN where the peer does not read."""
    data = json.dumps(message, separators=(",", ":")).encode("ascii")
    if len(data) > LARGEST:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    if fds:
        socket.send_fds(channel, [data], list(fds))
    else:
        channel.send(data)


def receive(channel: socket.socket) -> tuple[dict[str, Any] | None, list[int]]:
    """The next message and its descriptors; None at the end of the channel.

    What is not an object comes back empty: the receiver refuses it like any unknown request.
    """
    data, fds, _flags, _address = socket.recv_fds(channel, LARGEST, MOST_FDS)
    for fd in fds:
        # The flag that would do this is dropped by Python's recv_fds (seen in 3.11).
        os.set_inheritable(fd, False)
    if not data:
        close_all(fds)
        return None, []
    try:
        message = json.loads(data)
    except ValueError:
        message = {}
    return (message if isinstance(message, dict) else {}), list(fds)


def close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def address(folder: str, name: str) -> tuple[str, int]:
    """An address for a socket in a folder whose path may be longer than the 107 bytes allowed.

    The descriptor that comes with it keeps the short path valid; close it after use.
    """
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    return f"/proc/self/fd/{fd}/{name}", fd
