"""File descriptors that do not block, awaited one piece at a time.

asyncssh's own redirection is not used: it queues without a bound and leaves a coroutine unawaited
when a connection goes away first.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from contextlib import suppress

PIECE_BYTES = 1 << 16


class Descriptor:
    """One end of a pipe or a terminal, owned: `close` closes it, once."""

    def __init__(self, fd: int) -> None:
        os.set_blocking(fd, False)
        self._fd = fd
        self._loop = asyncio.get_running_loop()

    async def read(self) -> bytes:
        """The next piece; empty at the end (a terminal without an inner end counts as ended)."""
        while self._fd >= 0:
            try:
                return os.read(self._fd, PIECE_BYTES)
            except BlockingIOError:
                await self._ready(self._loop.add_reader, self._loop.remove_reader)
            except OSError as error:
                if error.errno == errno.EIO:
                    return b""
                raise
        return b""

    async def write(self, data: bytes) -> None:
        """Write all of it. Raises BrokenPipeError where nobody reads any more."""
        rest = memoryview(data)
        while rest:
            if self._fd < 0:
                raise BrokenPipeError(errno.EPIPE, "closed")
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:
                await self._ready(self._loop.add_writer, self._loop.remove_writer)
            except OSError as error:
                if error.errno == errno.EIO:
                    raise BrokenPipeError(errno.EPIPE, "the terminal is gone") from error
                raise

    async def _ready(self, add: Callable[..., None], remove: Callable[[int], bool]) -> None:
        fd = self._fd
        waiter: asyncio.Future[None] = self._loop.create_future()

        def wake() -> None:
            if not waiter.done():
                waiter.set_result(None)

        add(fd, wake)
        try:
            await waiter
        finally:
            # After `close` the number may belong to another file already.
            if self._fd == fd:
                remove(fd)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
            with suppress(OSError):
                os.close(fd)
