"""The supervisor's end of the channel to the init inside, which it does not believe.

Every request has a number; answers and events name one. Whatever does not fit is dropped, and
a talkative tenant makes the channel rest: it has a budget of the supervisor's time.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from . import usage, wire
from .loop import Budget, Loop
from .records import Plan, boot_ns
from .sandbox import places

_MOST_OPEN = 2000
_BURST = 32
_BASE_ENV = {
    "USER": "tenant",
    "LOGNAME": "tenant",
    "SHELL": "/bin/bash" if os.path.exists("/usr/bin/bash") else "/bin/sh",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
}

Answered = Callable[[dict[str, Any], list[int]], None]
Exited = Callable[[int], None]


class Inner:
    def __init__(
        self,
        channel: socket.socket,
        loop: Loop,
        plan: Plan,
        *,
        on_hello: Answered,
        on_empty: Callable[[], None],
        on_lost: Callable[[], None],
    ) -> None:
        self._channel = channel
        self._loop = loop
        self._plan = plan
        self._on_hello = on_hello
        self._on_empty = on_empty
        self._on_lost = on_lost
        self._greeted = False
        self._budget = Budget()
        self._requests: dict[int, Answered] = {}
        self._last = 0
        self.exits: dict[int, Exited] = {}
        """Who waits for the end of which spawned process."""
        channel.setblocking(False)
        loop.watch(channel, self._receive)

    def ask(self, request: dict[str, Any], answered: Answered, fds: Sequence[int] = ()) -> int:
        """Send a request; `answered` is called for every answer to it. Raises OSError."""
        if len(self._requests) >= _MOST_OPEN:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self._last += 1
        wire.send(self._channel, {**request, "id": self._last}, fds)
        self._requests[self._last] = answered
        return self._last

    def spawn(
        self,
        request: dict[str, Any],
        fds: Sequence[int],
        metadata_url: str,
        answered: Answered,
        exited: Exited,
    ) -> int:
        """Start a process; its own environment comes over the plan's, Sublet's over both."""
        where, plan = places(self._plan), self._plan
        env = {
            **_BASE_ENV,
            "HOME": where.home,
            **plan.env,
            **request["env"],
            usage.MARK: plan.mark,
            "SUBLET_RUN_ID": plan.run_id,
            "SUBLET_WORKLOAD_ID": plan.workload_id,
            "SUBLET_DEVICES": ",".join(plan.devices),
            "SUBLET_METADATA_URL": metadata_url,
            "SUBLET_SCRATCH": where.scratch,
        }
        if plan.gpus:
            visible = ",".join(plan.gpu_ids)
            env |= {"CUDA_VISIBLE_DEVICES": visible, "NVIDIA_VISIBLE_DEVICES": visible}
        spawn = {**request, "op": "spawn", "env": env, "cwd": where.home}
        ident = self.ask(spawn, answered, fds)
        self.exits[ident] = exited
        return ident

    def _receive(self, _events: int) -> None:
        began_ns = boot_ns()
        if not self._take():
            self._loop.forget(self._channel)
            self._on_lost()
        elif rest_ns := self._budget.rest_after(began_ns):
            self._loop.rest(self._channel, rest_ns)

    def _take(self) -> bool:
        """Handle a few messages; False at the end of the channel."""
        for _ in range(_BURST):
            try:
                message, fds = wire.receive(self._channel)
            except BlockingIOError:
                return True
            except OSError:
                return False
            if message is None:
                return False
            if message.get("event") == "hello" and not self._greeted:
                self._greeted = True
                self._on_hello(message, fds)  # keeps the descriptors
                continue
            try:
                self._on_message(message, fds)
            except (TypeError, ValueError, KeyError):
                continue  # not a message of our init
            finally:
                wire.close_all(fds)
        return True

    def _on_message(self, message: dict[str, Any], fds: list[int]) -> None:
        event = message.get("event")
        if event == "exit":
            exited = self.exits.pop(int(message["of"]), None)
            if exited is not None:
                exited(max(0, min(255, int(message["code"]))))
        elif event == "empty":
            self._on_empty()
        elif event is None:
            ident = int(message["id"])
            answered = self._requests.get(ident)
            if answered is None:
                return
            if not message.get("more"):
                del self._requests[ident]
            if "ok" not in message:
                self.exits.pop(ident, None)
            answered(message, fds)
