"""The metadata endpoint: what a workload may ask about itself, over HTTP.

    GET /v1/metadata                the public document, with the interruption or null
    GET /v1/metadata/interruption   404 when there is none, else action, time, seconds_left, reason

Served by the supervisor on a socket that lies in the workload's own network, so it works without
any other network and nobody else can reach it. The client is a stranger: few at a time, a small
request, little patience, one answer, and never a wait for it.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping
from typing import Any

from .loop import WRITE, Budget, Loop
from .records import boot_ns

_MOST_CLIENTS = 16
_LARGEST_REQUEST = 4096
_PATIENCE_NS = 2_000_000_000


Document = Callable[[], Mapping[str, Any]]
Interruption = Callable[[], Mapping[str, Any] | None]


class _Client:
    def __init__(self, channel: socket.socket, gives_up_ns: int) -> None:
        self.channel = channel
        self.gives_up_ns = gives_up_ns
        self.request = b""
        self.answer = b""


class MetadataServer:
    def __init__(
        self, listener: socket.socket, loop: Loop, document: Document, interruption: Interruption
    ) -> None:
        self._listener = listener
        self._loop = loop
        self._document = document
        self._interruption = interruption
        self._clients: set[_Client] = set()
        self._budget = Budget()
        loop.watch(listener, self._accept)

    def expire(self) -> None:
        """Drop clients that took too long."""
        now = boot_ns()
        for client in [c for c in self._clients if c.gives_up_ns <= now]:
            self._drop(client)

    def _accept(self, _events: int) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError:
            return
        channel.setblocking(False)
        if len(self._clients) >= _MOST_CLIENTS:
            self._drop(min(self._clients, key=lambda client: client.gives_up_ns))
        client = _Client(channel, boot_ns() + _PATIENCE_NS)
        self._clients.add(client)
        self._loop.watch(channel, lambda events: self._serve(client, events))

    def _serve(self, client: _Client, events: int) -> None:
        """Whoever asks too much finds the door shut for a while; those inside are served."""
        began_ns = boot_ns()
        self._advance(client, events)
        if rest_ns := self._budget.rest_after(began_ns):
            self._loop.rest(self._listener, rest_ns)

    def _drop(self, client: _Client) -> None:
        self._clients.discard(client)
        self._loop.forget(client.channel)
        client.channel.close()

    def _advance(self, client: _Client, events: int) -> None:
        try:
            if events & WRITE:
                sent = client.channel.send(client.answer)
                client.answer = client.answer[sent:]
                if not client.answer:
                    client.channel.shutdown(socket.SHUT_WR)
                    self._drop(client)
                return
            data = client.channel.recv(_LARGEST_REQUEST)
        except BlockingIOError:
            return
        except OSError:
            self._drop(client)
            return
        client.request += data
        if not data or len(client.request) > _LARGEST_REQUEST:
            self._drop(client)
        elif b"\r\n\r\n" in client.request:
            client.answer = self._answer(client.request)
            self._loop.watch(client.channel, lambda events: self._serve(client, events), WRITE)

    def _answer(self, request: bytes) -> bytes:
        method, _, rest = request.partition(b" ")
        path = rest.partition(b" ")[0].partition(b"?")[0].rstrip(b"/")
        if method not in (b"GET", b"HEAD"):
            status, body = "405 Method Not Allowed", _error("only GET", "method_not_allowed")
        elif path == b"/v1/metadata/interruption":
            found = self._interruption()
            if found is None:
                status = "404 Not Found"
                body = _error("no interruption is announced", "no_interruption")
            else:
                status, body = "200 OK", dict(found)
        elif path == b"/v1/metadata":
            status = "200 OK"
            body = {**self._document(), "interruption": self._interruption()}
        else:
            status, body = "404 Not Found", _error("no such path", "not_found")
        data = json.dumps(body).encode() + b"\n"
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == b"HEAD" else data)


def _error(message: str, code: str) -> dict[str, Any]:
    return {
        "error": {"message": message, "type": "invalid_request_error", "code": code, "param": None}
    }
