"""Port forwarding: a channel joined to a connection that the engine opened inside the workload."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from asyncssh.stream import SSHReader, SSHTCPStreamSession, SSHWriter

from sublet.edge.bastion.descriptor import PIECE_BYTES

if TYPE_CHECKING:
    from sublet.edge.bastion.server import Login


class Forward(SSHTCPStreamSession[bytes]):
    """One forwarded connection. Owns the socket from the start."""

    def __init__(self, login: Login, fd: int) -> None:
        super().__init__(self._serve)
        self._login = login
        self._gone = asyncio.Event()
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(False)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._login.channels.discard(self)
        self._gone.set()

    async def _serve(self, reader: SSHReader[bytes], writer: SSHWriter[bytes]) -> None:
        with self._login.bastion.at_work():
            ways = {
                asyncio.create_task(self._inward(reader)),
                asyncio.create_task(self._outward(writer)),
            }
            gone = asyncio.create_task(self._gone.wait())
            try:
                # Each way may end by itself: a client that has sent its request still reads.
                while (open_ways := {way for way in ways if not way.done()}) and not gone.done():
                    done, _ = await asyncio.wait(
                        {*open_ways, gone}, return_when=asyncio.FIRST_COMPLETED
                    )
                    if any(way.exception() for way in done & ways):
                        break
            finally:
                for task in (*ways, gone):
                    task.cancel()
                await asyncio.gather(*ways, gone, return_exceptions=True)
                self._socket.close()
                writer.close()

    async def _inward(self, reader: SSHReader[bytes]) -> None:
        loop = asyncio.get_running_loop()
        while data := await reader.read(PIECE_BYTES):
            await loop.sock_sendall(self._socket, data)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    async def _outward(self, writer: SSHWriter[bytes]) -> None:
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._socket, PIECE_BYTES):
            writer.write(data)
            await writer.drain()
            await self._login.settled()
        with suppress(OSError):
            writer.write_eof()
