"""Slow and silent callers over real sockets: others are served, and they are put out in time."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import anyio
import pytest
import uvicorn
from starlette.testclient import TestClient

from sublet.edge.api.envelope import Envelope
from sublet.edge.api.guard import guarded, places

HEAD = b"GET /healthz HTTP/1.1\r\nhost: a\r\n"
BODY = b'POST /v1/signup HTTP/1.1\r\nhost: a\r\ncontent-length: 50\r\n\r\n{"email": '
DESCRIPTORS = 40
HEAD_SECONDS = 0.5
SOON = 4.0


@pytest.fixture
def port(world) -> Iterator[int]:
    """The API served by uvicorn, as a process with few descriptors would."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=512)
    config = uvicorn.Config(
        world.http.app,
        log_config=None,
        lifespan="off",
        http=guarded(DESCRIPTORS, head_seconds=HEAD_SECONDS),
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    yield listening.getsockname()[1]
    server.should_exit = True
    thread.join()
    listening.close()


def opened(port: int, said: bytes) -> socket.socket:
    made = socket.create_connection(("127.0.0.1", port), timeout=SOON)
    made.sendall(said)
    return made


def answer_of(made: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Until the other side closes."""
    found = b""
    while piece := made.recv(65_536):
        found += piece
    made.close()
    if not found:
        raise ConnectionResetError
    head, _, body = found.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, body


def ask(made: socket.socket) -> None:
    made.sendall(HEAD + b"\r\n")
    found = b""
    while not found.endswith(b"}"):
        piece = made.recv(65_536)
        assert piece
        found += piece
    assert found.startswith(b"HTTP/1.1 200")


def code_of(body: bytes) -> str:
    return str(json.loads(body)["error"]["code"])


def test_two_hundred_unfinished_requests_stop_nobody(port: int) -> None:
    slow = [opened(port, HEAD if number % 2 else BODY) for number in range(200)]
    began = time.perf_counter()
    for _ in range(5):
        status, _, _ = answer_of(opened(port, HEAD + b"connection: close\r\n\r\n"))
        assert status == 200
    ends: list[str] = []
    for one in slow:
        try:
            status, _, body = answer_of(one)
        except ConnectionResetError:
            one.close()
            ends.append("dropped")
            continue
        assert (status, code_of(body)) == (408, "request_timeout")
        ends.append("answered")
    assert time.perf_counter() - began < SOON
    # Room was made for newcomers by the oldest; those that were left were told.
    assert ends.count("dropped") >= 200 - places(DESCRIPTORS)
    assert ends.count("answered") >= 1


def test_a_head_that_comes_by_drops_is_too_late(port: int) -> None:
    made = opened(port, b"GET /healthz HTTP/1.1\r\n")
    for _ in range(int(HEAD_SECONDS / 0.05)):
        made.sendall(b"a: b\r\n")
        time.sleep(0.05)
    assert answer_of(made)[0] == 408


def test_a_second_request_of_a_connection_has_a_deadline_too(port: int) -> None:
    made = opened(port, b"")
    ask(made)
    made.sendall(HEAD)
    assert answer_of(made)[0] == 408


def test_a_quick_request_is_kept_alive(port: int) -> None:
    made = opened(port, b"")
    for _ in range(20):
        ask(made)
    made.close()


def test_what_is_no_http_is_told_so_in_the_one_shape(port: int) -> None:
    status, headers, body = answer_of(opened(port, b"SSH-2.0-OpenSSH\r\n\r\n"))
    assert (status, code_of(body)) == (400, "invalid_http")
    assert headers["content-type"] == "application/json"
    huge = HEAD + b"a: " + b"b" * (1 << 20)
    made = opened(port, b"")
    with suppress(BrokenPipeError, ConnectionResetError):
        made.sendall(huge)
        assert answer_of(made)[0] == 400
        return
    # It was closed while we were still talking; then its answer may be lost.
    made.close()


def test_a_process_keeps_descriptors_for_its_own_work() -> None:
    assert places(1024) == 768
    assert places(65_536) == 4000
    for few in (16, 64, 256, 1024, 20_000):
        assert 8 <= places(few) <= few * 3 // 4


def test_who_would_wait_too_long_is_refused_but_health_is_told(world) -> None:
    """The bound counts requests that have no answer yet."""
    arrived, go_on = threading.Event(), threading.Event()

    async def slow(scope, receive, send) -> None:
        if scope["path"] == "/slow":
            arrived.set()
            while not go_on.is_set():
                await anyio.sleep(0.01)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    envelope = Envelope(
        slow,
        new_id=lambda: "req_1",
        counted=lambda *_: None,
        standing={},
        body_seconds=1,
        waiting_at_most=1,
    )
    http = TestClient(envelope)
    first = threading.Thread(target=http.get, args=("/slow",))
    first.start()
    arrived.wait(SOON)
    refused = http.get("/other")
    assert (refused.status_code, code_of(refused.content)) == (503, "too_busy")
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["x-request-id"] == "req_1"
    assert http.get("/healthz").status_code == 200
    go_on.set()
    first.join()
    assert http.get("/other").status_code == 200
