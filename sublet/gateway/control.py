"""The way to the control plane: one Unix socket, one JSON object a line.

Either side may vanish at any time: then this connects again, and repeats for each key the last that
was asked and not answered. A repeated ask is harmless (its serial is the same), and one that is lost
on a standing connection is asked anew by its purse.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import orjson

from sublet.base.wire.gateway import Allowance, AllowanceRequest, Gauge, Malformed
from sublet.gateway.log import say
from sublet.gateway.upstream import LONGEST_SOCKET_PATH

GAUGE_SECONDS = 1.0
BACK_OFF_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)
LINE_LIMIT = 1 << 20
SEND_LIMIT = 4 << 20
"""Bytes that may wait for a link that does not read: beyond, it is taken for gone."""


class Control:
    """The client of the link's socket."""

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        epoch: int,
        gauge: Callable[[], Gauge],
        on_snapshot: Callable[[], None],
        on_allowance: Callable[[Allowance], None],
    ) -> None:
        self._path = path
        self._name = name
        self._epoch = epoch
        self._gauge = gauge
        self._on_snapshot = on_snapshot
        self._on_allowance = on_allowance
        self._writer: asyncio.StreamWriter | None = None
        self._asked: dict[str, AllowanceRequest] = {}
        """By key the last request that has no answer yet."""
        self._tasks: list[asyncio.Task[None]] = []
        self.is_connected = False

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._stay()), loop.create_task(self._report())]

    async def stop(self) -> None:
        """Say how it stands a last time, and go."""
        self._send(b"gauge", self._gauge().to_json())
        writer = self._writer
        if writer is not None:
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.drain(), 1)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def ask(self, request: AllowanceRequest) -> None:
        """Send it, now or when there is a connection; a newer one of the same key replaces it."""
        self._asked[request.key_id] = request
        self._send(b"ask", request.to_json())

    def report(self) -> None:
        """How this gateway stands now, without waiting for the second to end."""
        self._send(b"gauge", self._gauge().to_json())

    def _send(self, kind: bytes, message: bytes) -> None:
        writer = self._writer
        if writer is None:
            return
        if writer.transport.get_write_buffer_size() > SEND_LIMIT:
            writer.transport.abort()
            return
        writer.write(b'{"type":"%b",%b\n' % (kind, message[1:]))

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(GAUGE_SECONDS)
            self.report()

    async def _stay(self) -> None:
        failures = 0
        while True:
            try:
                reader = await self._connect()
            except OSError:
                await self._back_off(failures)
                failures += 1
                continue
            try:
                await self._listen(reader)
            except Exception as error:
                # Whatever one message did, the next connection may do better; without one this
                # gateway would be cut off for ever.
                say("control_connection_ended", error=f"{type(error).__name__}: {error}")
            finally:
                failures = 0 if self.is_connected else failures + 1
                self.is_connected = False
                writer, self._writer = self._writer, None
                if writer is not None:
                    writer.close()
            await self._back_off(failures)

    @staticmethod
    async def _back_off(failures: int) -> None:
        await asyncio.sleep(BACK_OFF_SECONDS[min(failures, len(BACK_OFF_SECONDS) - 1)])

    async def _connect(self) -> asyncio.StreamReader:
        path, descriptor = os.fspath(self._path), -1
        if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
            descriptor = os.open(self._path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            path = f"/proc/self/fd/{descriptor}/{self._path.name}"
        try:
            reader, self._writer = await asyncio.open_unix_connection(path, limit=LINE_LIMIT)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        hello = {"gateway": self._name, "epoch": self._epoch, "pid": os.getpid()}
        self._send(b"hello", orjson.dumps(hello))
        return reader

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = orjson.loads(line)
            kind = message.get("type") if isinstance(message, dict) else None
            if kind == "welcome":
                self.is_connected = True
                for request in self._asked.values():
                    self._send(b"ask", request.to_json())
                self._on_snapshot()
                self.report()
            elif kind == "snapshot":
                self._on_snapshot()
                self.report()
            elif kind == "allowance":
                self._answered(line)

    def _answered(self, line: bytes) -> None:
        try:
            allowance = Allowance.from_json(line)
        except Malformed as error:
            say("allowance_not_read", error=str(error))
            return
        asked = self._asked.get(allowance.key_id)
        if asked is not None and allowance.answers >= asked.serial:
            del self._asked[allowance.key_id]
        self._on_allowance(allowance)
