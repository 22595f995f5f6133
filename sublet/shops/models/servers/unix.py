"""HTTP over a Unix socket: small questions to a model server, with limits on time and size."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import socket
import stat
from collections.abc import Iterator
from typing import Any

LONGEST_ADDRESS = 107
"""Bytes of a path that a socket's address holds on Linux."""
MOST_BYTES = 4 << 20
CONNECT_SECONDS = 2.0


def connect(path: str, seconds: float = CONNECT_SECONDS) -> socket.socket:
    """A connection to a Unix socket at any path, however long. Raises OSError.

    What lies there was made by the server's sandbox, so a link or anything else is not followed.
    """
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ConnectionRefusedError(f"{path} is no socket")
    folder, name = os.path.split(path)
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.settimeout(seconds)
        short = len(os.fsencode(path)) <= LONGEST_ADDRESS
        made.connect(path if short else f"/proc/self/fd/{fd}/{name}")
    except BaseException:
        made.close()
        raise
    finally:
        os.close(fd)
    return made


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self._path = path
        self._seconds = seconds

    def connect(self) -> None:
        self.sock = connect(self._path)
        self.sock.settimeout(self._seconds)


def post(path: str, target: str, body: Any, *, seconds: float) -> Any | None:
    """The JSON of a 200; None for anything else, and where nobody answers in time."""
    with _answered(path, "POST", target, json.dumps(body), seconds) as data:
        try:
            return None if data is None else json.loads(data)
        except ValueError:
            return None


def get(path: str, target: str, *, seconds: float) -> bytes | None:
    """The body of a 200; None for anything else, and where nobody answers in time."""
    with _answered(path, "GET", target, None, seconds) as data:
        return data


@contextlib.contextmanager
def _answered(
    path: str, method: str, target: str, body: str | None, seconds: float
) -> Iterator[bytes | None]:
    connection = _Connection(path, seconds)
    try:
        connection.request(method, target, body, {"content-type": "application/json"})
        response = connection.getresponse()
        data = response.read(MOST_BYTES)
        found = data if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        found = None
    finally:
        connection.close()
    yield found


def read_metrics(text: bytes) -> dict[str, float]:
    """A Prometheus page: each name with the sum of its samples. What cannot be read is left out."""
    found: dict[str, float] = {}
    for line in text.decode(errors="replace").splitlines():
        if line.startswith("#"):
            continue
        name, _, value = line.rpartition(" ")
        name = name.partition("{")[0]
        try:
            found[name] = found.get(name, 0.0) + float(value)
        except ValueError:
            continue
    return found
