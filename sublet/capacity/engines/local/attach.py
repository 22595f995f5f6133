"""Reaching into a running workload: processes, connections and files, from outside.

The supervisor passes requests to the init inside and descriptors back. What comes back was chosen
by a program that a tenant may have taken over, so a descriptor is looked at before it is handed
on: a file must be one that never blocks, a connection must be a TCP socket.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Sequence
from typing import Any

from sublet.capacity.engines.local.channel import Channel, NoSupervisor
from sublet.capacity.engines.local.supervise import wire
from sublet.capacity.engines.port import NotAttachable, SpawnSpec

CONNECT_SECONDS = 25.0
"""The init inside gives up after 15."""
_KILLED = 137


class LocalSpawned:
    """A process inside, held by its connection: closing that hangs up."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._code: int | None = None
        self._waiting = threading.Lock()

    def wait(self) -> int:
        with self._waiting:
            if self._code is None:
                self._code = self._await()
            return self._code

    def _await(self) -> int:
        try:
            answer, fds = self._channel.receive(None)
        except (NoSupervisor, OSError):
            return _KILLED  # the workload ended, and the process with it
        wire.close_all(fds)
        return int(answer["exit"])

    def signal(self, name: str) -> None:
        self._tell({"op": "spawn_signal", "signum": int(signal.Signals[name])})

    def close(self) -> None:
        """Hang up. `wait` then says how the process ended; closing twice does nothing."""
        self._tell({"op": "spawn_hangup"})

    def __del__(self) -> None:
        self._channel.close()

    def _tell(self, order: dict[str, Any]) -> None:
        try:
            self._channel.send(order)
        except (NoSupervisor, OSError):
            return  # over already


def spawn(folder: str, spec: SpawnSpec, fds: Sequence[int]) -> LocalSpawned:
    channel = _channel(folder)
    order = {
        "op": "spawn",
        "argv": list(spec.argv),
        "env": dict(spec.env),
        "terminal": spec.terminal,
    }
    try:
        channel.ask(order, fds)
    except NoSupervisor:
        channel.close()
        raise NotAttachable from None
    except BaseException:
        channel.close()
        raise
    return LocalSpawned(channel)


def connect(folder: str, host: str, port: int) -> int:
    with _channel(folder) as channel:
        fd = _one(channel, {"op": "connect", "host": host, "port": port}, CONNECT_SECONDS)
    with socket.socket(fileno=os.dup(fd)) as peer:
        is_tcp = peer.family in (socket.AF_INET, socket.AF_INET6) and (
            peer.type == socket.SOCK_STREAM
        )
    if not is_tcp:
        os.close(fd)
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
    return fd


def file(folder: str, operation: str, args: Sequence[Any]) -> Any:
    """One file operation inside; see the port for the names and what they answer."""
    plain = [os.fsdecode(arg) if isinstance(arg, bytes) else arg for arg in args]
    order = {"op": "file", "operation": operation, "args": plain}
    with _channel(folder) as channel:
        if operation == "open":
            return _checked_file(_one(channel, order))
        values: list[Any] = []
        try:
            channel.send(order)
            while True:
                answer, fds = channel.receive()
                wire.close_all(fds)
                if operation != "listdir":
                    return _READ_AS.get(operation, _as_is)(answer.get("value"))
                values += [(name, _stat_result(found)) for name, found in answer["value"]]
                if not answer.get("more"):
                    return values
        except NoSupervisor:
            raise NotAttachable from None


def _channel(folder: str) -> Channel:
    try:
        return Channel(folder)
    except NoSupervisor:
        raise NotAttachable from None


def _one(channel: Channel, order: dict[str, Any], seconds: float = 5.0) -> int:
    """The one descriptor that an order is answered with."""
    try:
        channel.send(order)
        _, fds = channel.receive(seconds)
    except NoSupervisor:
        raise NotAttachable from None
    if len(fds) != 1:
        wire.close_all(fds)
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
    return fds[0]


def _checked_file(fd: int) -> int:
    found = os.fstat(fd)
    null = stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)
    if stat.S_ISREG(found.st_mode) or null:
        return fd
    os.close(fd)
    raise OSError(errno.EACCES, os.strerror(errno.EACCES))


def _as_is(value: Any) -> Any:
    return value


def _stat_result(numbers: Sequence[int]) -> os.stat_result:
    *plain, atime_ns, mtime_ns, ctime_ns = numbers
    times = {"st_atime_ns": atime_ns, "st_mtime_ns": mtime_ns, "st_ctime_ns": ctime_ns}
    seconds = [value // 1_000_000_000 for value in times.values()]
    exact = {name.removesuffix("_ns"): value / 1e9 for name, value in times.items()}
    return os.stat_result([*plain, *seconds], {**exact, **times})


_READ_AS: dict[str, Callable[[Any], Any]] = {
    "stat": _stat_result,
    "lstat": _stat_result,
    "fstatvfs": os.statvfs_result,
}
