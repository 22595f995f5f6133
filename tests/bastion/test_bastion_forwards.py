"""Port forwarding, with OpenSSH's client."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import asyncssh
import pytest

from .conftest import LOGIN, Door

HOST = "127.0.0.1"


@contextmanager
def echo_server() -> Iterator[int]:
    """Inside: reads to the end, then answers with all of it and closes."""
    server = socket.create_server((HOST, 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                said = b""
                while data := connection.recv(1 << 16):
                    said += data
                connection.sendall(said)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def test_a_forwarded_connection_carries_all_and_may_be_half_closed(door: Door) -> None:
    data = bytes(range(256)) * 8000
    with echo_server() as port:
        done = door.ssh("-W", f"{HOST}:{port}", HOST, stdin=data)
    assert done.stdout == data, done.stderr
    assert done.returncode == 0


def test_a_local_port_leads_inside(door: Door) -> None:
    with socket.create_server((HOST, 0)) as free:
        local = free.getsockname()[1]
    with echo_server() as port:
        argv = door.ssh_argv(
            *("-o", "ExitOnForwardFailure=yes", "-L", f"{local}:localhost:{port}"),
            *(HOST, "echo ready; cat"),
        )
        client = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert client.stdout is not None
        assert client.stdout.readline() == b"ready\n"
        for word in (b"one", b"two"):
            with socket.create_connection((HOST, local), timeout=10) as connection:
                connection.sendall(word)
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(100) == word
        client.communicate(timeout=10)


def test_a_port_that_nobody_serves_is_refused_with_the_reason(door: Door) -> None:
    with socket.create_server((HOST, 0)) as free:
        port = free.getsockname()[1]
    done = door.ssh("-W", f"{HOST}:{port}", HOST)
    assert done.returncode == 255
    assert b"Connection refused" in done.stderr


def test_forwarding_back_is_refused_in_words(door: Door) -> None:
    done = door.ssh("-R", "0:localhost:1", HOST, "echo on")
    assert done.stdout == b"on\n"
    assert b"(-R) is not offered" in done.stderr
    assert b"use -L" in done.stderr


def test_nothing_of_the_host_is_forwarded(door: Door) -> None:
    done = door.ssh("-A", "-X", HOST, 'echo "${SSH_AUTH_SOCK:-none} ${DISPLAY:-none}"')
    assert done.stdout == b"none none\n"

    async def reach_a_socket() -> None:
        async with asyncssh.connect(
            HOST, door.port, username=LOGIN, client_keys=[str(door.key)], known_hosts=None
        ) as connection:
            await connection.open_unix_connection("/run/socket")

    with pytest.raises(asyncssh.ChannelOpenError):
        asyncio.run(reach_a_socket())
