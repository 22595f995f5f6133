"""Where the supervisor takes orders: `control.sock` in the run's folder.

The socket has mode 0600 in a folder of mode 0700, and the kernel tells who connects: only root
and the supervisor's own user are heard. An order is answered when it is written down. A process
that was spawned over a connection lives as long as that connection: whoever opened the terminal
and dies hangs up.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
from typing import TYPE_CHECKING, Any

from . import records, wire
from .records import PROTOCOL, boot_ns
from .run import Refused

if TYPE_CHECKING:
    from .supervisor import Supervisor

_MOST_PEERS = 256


class _Peer:
    def __init__(self, channel: socket.socket, pid: int) -> None:
        self.channel = channel
        self.pid = pid
        self.spawned: int | None = None
        self.is_open = True


class ControlServer:
    def __init__(self, supervisor: Supervisor, folder: str) -> None:
        self._supervisor = supervisor
        self._loop = supervisor.loop
        self._peers: set[_Peer] = set()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        address, fd = wire.address(folder, records.SOCKET)
        try:
            self._listener.bind(address)
        finally:
            os.close(fd)
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._loop.watch(self._listener, self._accept)

    def close(self) -> None:
        for peer in list(self._peers):
            self._close(peer)
        self._loop.forget(self._listener)
        self._listener.close()

    def _accept(self, _events: int) -> None:
        try:
            channel, _ = self._listener.accept()
        except OSError:
            return
        credentials = channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _ = struct.unpack("iII", credentials)
        if uid not in (0, os.geteuid()) or len(self._peers) >= _MOST_PEERS:
            channel.close()
            return
        channel.setblocking(False)
        peer = _Peer(channel, pid)
        self._peers.add(peer)
        self._loop.watch(channel, lambda _events: self._receive(peer))

    def _close(self, peer: _Peer) -> None:
        if not peer.is_open:
            return
        peer.is_open = False
        self._peers.discard(peer)
        self._loop.forget(peer.channel)
        peer.channel.close()
        if self._lives(peer):
            self._ask_quietly({"op": "hangup", "to": peer.spawned})

    def _lives(self, peer: _Peer) -> bool:
        return peer.spawned is not None and peer.spawned in self._supervisor.waiting_for_exit()

    def _ask_quietly(self, request: dict[str, Any]) -> None:
        try:
            self._supervisor.ask(request, lambda _answer, _fds: None)
        except (OSError, Refused):
            return

    def _receive(self, peer: _Peer) -> None:
        try:
            request, fds = wire.receive(peer.channel)
        except BlockingIOError:
            return
        except OSError:
            request, fds = None, []
        if request is None:
            self._close(peer)
            return
        try:
            self._obey(peer, request, fds)
        except Refused as refusal:
            self._answer(peer, {"refused": str(refusal)})
        except OSError as error:
            self._answer(peer, {"errno": error.errno or errno.EIO})
        except (KeyError, TypeError, ValueError) as error:
            self._answer(peer, {"errno": errno.EINVAL, "detail": repr(error)})
        finally:
            wire.close_all(fds)

    def _answer(self, peer: _Peer, message: dict[str, Any], fds: list[int] | None = None) -> None:
        if not peer.is_open:
            return
        try:
            wire.send(peer.channel, message, fds or [])
        except OSError:
            self._close(peer)  # it does not read: it will notice, and ask again

    def _hand_out(self, peer: _Peer, answer: dict[str, Any], fds: list[int]) -> None:
        """Files that are held outside still count as the run's when they have been deleted."""
        for fd in fds:
            self._supervisor.disk.handed.add(fd, peer.pid)
        self._answer(peer, answer, fds)

    # -- orders

    def _obey(self, peer: _Peer, request: dict[str, Any], fds: list[int]) -> None:
        if int(request["v"]) > PROTOCOL:
            raise Refused(f"protocol {PROTOCOL}")
        supervisor, run = self._supervisor, self._supervisor.run
        op = request["op"]
        if op == "notice":
            self._notice(peer, request)
        elif op == "withdraw":
            run.withdraw()
            self._saved(peer)
        elif op == "extend":
            run.extend(int(request["until_ns"]))
            self._saved(peer)
        elif op == "metadata":
            run.state.metadata = dict(request["document"])
            self._saved(peer)
        elif op == "stop":
            supervisor.terminate(f"stop:{request['reason']}", int(request["grace_seconds"]))
            self._saved(peer)
        elif op == "signal":
            self._must_be("running", "stopping")
            supervisor.ask(
                {"op": "signal", "signum": int(request["signum"])},
                lambda answer, _fds: self._answer(peer, answer),
            )
        elif op == "spawn":
            self._must_be("running")
            self._spawn(peer, request, fds)
        elif op in ("spawn_signal", "spawn_hangup"):
            self._to_spawned(peer, request)
        elif op in ("file", "connect"):
            self._must_be("running", "stopping")
            inner = {key: value for key, value in request.items() if key != "v"}
            supervisor.ask(inner, lambda answer, out: self._hand_out(peer, answer, out))
        else:
            raise Refused("unknown order")

    def _must_be(self, *phases: str) -> None:
        if self._supervisor.run.state.phase not in phases:
            raise Refused("not_attachable")

    def _saved(self, peer: _Peer) -> None:
        if self._supervisor.save():
            self._answer(peer, {"ok": True})
        else:
            self._answer(peer, {"errno": errno.ENOSPC, "detail": "it could not be written down"})

    def _notice(self, peer: _Peer, request: dict[str, Any]) -> None:
        supervisor, run = self._supervisor, self._supervisor.run
        is_first = run.state.deadline_ns is None
        fixed = run.notice(int(request["at_ns"]), dict(request["notice"]), boot_ns())
        if not supervisor.save():
            self._answer(peer, {"errno": errno.ENOSPC, "detail": "it could not be written down"})
            return
        self._answer(peer, {"ok": True, "at_ns": fixed})
        if is_first and run.state.phase == "running":
            shown = run.state.notice or {}
            supervisor.log.say(
                f"interruption announced: {shown.get('reason')}, {shown.get('time')}"
            )
            name = run.plan.notice_signal
            if name is not None:
                self._ask_quietly({"op": "signal", "signum": int(signal.Signals[name])})

    def _spawn(self, peer: _Peer, request: dict[str, Any], fds: list[int]) -> None:
        if peer.spawned is not None or len(fds) != 3:
            raise OSError(errno.EINVAL, "one process and three descriptors to a connection")

        def answered(answer: dict[str, Any], _fds: list[int]) -> None:
            if "ok" not in answer:
                peer.spawned = None
            self._answer(peer, answer)
            if not peer.is_open and peer.spawned is not None:  # it left meanwhile
                self._ask_quietly({"op": "hangup", "to": peer.spawned})

        def exited(code: int) -> None:
            self._answer(peer, {"exit": code})

        inner = {
            "argv": [str(word) for word in request["argv"]],
            "env": {str(name): str(value) for name, value in request["env"].items()},
            "terminal": bool(request["terminal"]),
        }
        peer.spawned = self._supervisor.spawn(inner, fds, answered, exited)

    def _to_spawned(self, peer: _Peer, request: dict[str, Any]) -> None:
        if not self._lives(peer):
            return
        if request["op"] == "spawn_hangup":
            self._ask_quietly({"op": "hangup", "to": peer.spawned})
        else:
            self._ask_quietly(
                {"op": "signal", "to": peer.spawned, "signum": int(request["signum"])}
            )
