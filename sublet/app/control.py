"""The control socket's listening end: which gateways are connected, what they say and ask.

One thread waits for all connections, and does nothing that can wait for anything else: questions
go into a queue, answers come back from other threads. A gateway that talks nonsense, does not read
or sends lines without end is hung up on; it connects again by itself.
"""

from __future__ import annotations

import os
import re
import selectors
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import orjson
import structlog

from sublet.base.wire.gateway import AllowanceRequest, Gauge, Malformed

log = structlog.get_logger()

SOCKET = "control.sock"
LONGEST_ADDRESS = 107
"""Bytes of a path that a socket's address holds on Linux."""
LINE_LIMIT = 1 << 20
SEND_LIMIT = 4 << 20
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
"""Of a gateway; it names a folder, too."""
READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """What the other threads are told; each must return at once."""

    hello: Callable[[str, int], None]
    gauge: Callable[[Gauge], None]
    ask: Callable[[str, AllowanceRequest], None]


@dataclass(slots=True, eq=False)
class Peer:
    """One connection. Unnamed until its hello."""

    connection: socket.socket
    gateway: str = ""
    epoch: int = 0
    came: bytearray = field(default_factory=bytearray)
    leaving: bytearray = field(default_factory=bytearray)


class ControlServer:
    """Listens from its making to `stop`. Only one may on a folder: the data folder's lock says so."""

    def __init__(self, folder: Path, heard: Heard, number: Callable[[], int]) -> None:
        self._path = folder / SOCKET
        self._heard = heard
        self._number = number
        self._lock = threading.Lock()
        """Over peers and what leaves: other threads send."""
        self._peers: dict[str, Peer] = {}
        self._is_stopping = False
        self._selector = selectors.DefaultSelector()
        self._woken, self._wakes = socket.socketpair()
        self._woken.setblocking(False)
        self._wakes.setblocking(False)
        self._listening = _listen(self._path)
        self._selector.register(self._listening, selectors.EVENT_READ, None)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._thread = threading.Thread(target=self._run, name="control")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping = True
        self._wake()
        self._thread.join()
        for peer in [key.data for key in self._selector.get_map().values() if key.data]:
            peer.connection.close()
        self._selector.close()
        self._listening.close()
        self._woken.close()
        self._wakes.close()
        self._path.unlink(missing_ok=True)

    def tell_snapshot(self, number: int) -> None:
        """Every gateway: there is a new file."""
        with self._lock:
            for peer in self._peers.values():
                self._send(peer, b'{"type":"snapshot","number":%d}\n' % number)
        self._wake()

    def answer(self, gateway: str, epoch: int, allowance: bytes) -> None:
        """To that life of a gateway, if it is still there: else it asks again."""
        with self._lock:
            peer = self._peers.get(gateway)
            if peer is not None and peer.epoch == epoch:
                self._send(peer, b'{"type":"allowance",' + allowance[1:] + b"\n")
        self._wake()

    def connected(self) -> dict[str, int]:
        """The epoch of each gateway that is connected."""
        with self._lock:
            return {name: peer.epoch for name, peer in self._peers.items()}

    def _wake(self) -> None:
        with suppress(OSError):  # Full: it will wake all the same.
            self._wakes.send(b"1")

    def _send(self, peer: Peer, line: bytes) -> None:
        """Under the lock. At once if it can be: the thread that waits need not be woken first."""
        if not peer.leaving:
            with suppress(OSError):
                line = line[peer.connection.send(line) :]
        peer.leaving += line

    # ---- in the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                for key, events in self._selector.select(1.0):
                    self._serve(key, events)
                self._watch_writers()
            except Exception:
                log.exception("control_socket_failed")

    def _serve(self, key: selectors.SelectorKey, events: int) -> None:
        if key.fileobj is self._listening:
            self._accept()
        elif key.fileobj is self._woken:
            with suppress(OSError):
                self._woken.recv(4096)
        else:
            peer: Peer = key.data
            if events & selectors.EVENT_WRITE:
                self._flush(peer)
            if events & selectors.EVENT_READ:
                self._read(peer)

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError as error:
            log.warning("control_not_accepted", why=str(error))
            return
        connection.setblocking(False)
        self._selector.register(connection, selectors.EVENT_READ, Peer(connection))

    def _watch_writers(self) -> None:
        """Wait for room only where something waits to leave; who does not read is let go."""
        with self._lock:
            waiting = {id(peer): len(peer.leaving) for peer in self._peers.values()}
        for key in list(self._selector.get_map().values()):
            peer = key.data
            if peer is None:
                continue
            length = waiting.get(id(peer), 0)
            if length > SEND_LIMIT:
                self._hang_up(peer, "it does not read")
                continue
            wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if length else 0)
            if key.events != wanted:
                self._selector.modify(peer.connection, wanted, peer)

    def _flush(self, peer: Peer) -> None:
        with self._lock:
            try:
                del peer.leaving[: peer.connection.send(peer.leaving)]
            except BlockingIOError:
                return
            except OSError:
                peer.leaving.clear()  # It is gone: reading will say so.

    def _read(self, peer: Peer) -> None:
        try:
            data = peer.connection.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._hang_up(peer)
            return
        peer.came += data
        *lines, rest = bytes(peer.came).split(b"\n")
        peer.came = bytearray(rest)
        for line in lines:
            try:
                self._hear(peer, line)
            except (Malformed, ValueError, TypeError, KeyError) as error:
                self._hang_up(peer, str(error) or type(error).__name__)
                return
            if peer.connection.fileno() < 0:
                return
        if len(rest) > LINE_LIMIT:
            self._hang_up(peer, "a line without end")

    def _hear(self, peer: Peer, line: bytes) -> None:
        said = orjson.loads(line)
        kind = said["type"]
        if kind == "hello":
            self._greet(peer, said["gateway"], said["epoch"])
        elif not peer.gateway:
            raise ValueError("it says no hello first")
        elif kind == "gauge":
            gauge = Gauge.from_json(line)
            if (gauge.gateway, gauge.epoch) != (peer.gateway, peer.epoch):
                raise ValueError("it speaks for another gateway")
            self._heard.gauge(gauge)
        elif kind == "ask":
            request = AllowanceRequest.from_json(line)
            if request.epoch != peer.epoch:
                raise ValueError("it asks for another life")
            self._heard.ask(peer.gateway, request)
        # A word of a newer version is none of ours.

    def _greet(self, peer: Peer, gateway: str, epoch: int) -> None:
        if not NAME.fullmatch(gateway) or type(epoch) is not int:
            raise ValueError("it gives no name")
        with self._lock:
            before = self._peers.get(gateway)
        if before is not None and before is not peer:
            self._hang_up(before, "a newer one of its name is here")
        peer.gateway, peer.epoch = gateway, epoch
        with self._lock:
            self._peers[gateway] = peer
            self._send(peer, b'{"type":"welcome","snapshot":%d}\n' % self._number())
        log.info("gateway_came", gateway=gateway, epoch=epoch)
        self._heard.hello(gateway, epoch)

    def _hang_up(self, peer: Peer, why: str = "") -> None:
        with self._lock:
            if self._peers.get(peer.gateway) is peer:
                del self._peers[peer.gateway]
        with suppress(KeyError, ValueError):
            self._selector.unregister(peer.connection)
        peer.connection.close()
        if why:
            log.warning("gateway_hung_up_on", gateway=peer.gateway, why=why)
        elif peer.gateway:
            log.info("gateway_went", gateway=peer.gateway, epoch=peer.epoch)


def _listen(path: Path) -> socket.socket:
    """At any path, however long; readable by its user alone from the first moment."""
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    before = os.umask(0o177)
    try:
        is_short = len(os.fsencode(path)) <= LONGEST_ADDRESS
        listening.bind(os.fspath(path) if is_short else f"/proc/self/fd/{folder}/{path.name}")
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(before)
        os.close(folder)
    listening.listen(64)
    listening.setblocking(False)
    return listening
