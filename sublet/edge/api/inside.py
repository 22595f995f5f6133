"""Reaching into a workload: one command with bounds, and its log as it grows."""

from __future__ import annotations

import os
import selectors
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import anyio
import anyio.to_thread

from sublet.base.kernel.clock import read_boot_ns
from sublet.capacity.engines.port import (
    Attachable,
    Engine,
    EngineError,
    RunNotFound,
    Spawned,
    SpawnSpec,
)

OUTPUT_BYTES = 256 * 1024
"""Of each stream of a command; what comes after it is read and dropped."""
CHUNK_BYTES = 1 << 16
NS = 1_000_000_000


@dataclass(slots=True)
class Output:
    """One stream of a command, bounded."""

    data: bytearray = field(default_factory=bytearray)
    is_truncated: bool = False

    def take(self, chunk: bytes) -> None:
        room = OUTPUT_BYTES - len(self.data)
        self.data += chunk[:room]
        self.is_truncated |= len(chunk) > room

    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """How a command ended. `exit_code` None: it was ended at its time limit."""

    exit_code: int | None
    stdout: Output
    stderr: Output


class _Pipes:
    """The ends that are ours to close, each exactly once: a number may belong to another by then."""

    def __init__(self) -> None:
        self._open: set[int] = set()

    def make(self) -> tuple[int, int]:
        pair = os.pipe2(os.O_CLOEXEC)
        self._open.update(pair)
        return pair

    def close(self, *fds: int) -> None:
        for fd in fds:
            if fd in self._open:
                self._open.remove(fd)
                os.close(fd)

    def close_all(self) -> None:
        self.close(*tuple(self._open))


def run_inside(
    engine: Attachable, run_id: str, spec: SpawnSpec, stdin: bytes, timeout_seconds: int
) -> Ran:
    """Run a command in a live workload and wait for it, at most `timeout_seconds`.

    Blocks: for a thread that holds no transaction. Raises NotAttachable where the
    workload is gone by now, OSError where the program cannot be run.
    """
    pipes = _Pipes()
    try:
        (in_read, in_write), (out_read, out_write), (err_read, err_write), (over, tell) = (
            pipes.make() for _ in range(4)
        )
        spawned = engine.spawn(run_id, spec, (in_read, out_write, err_write))
        # Ours would keep the pipes open after the command has closed its own.
        pipes.close(in_read, out_write, err_write)
        waiter = _Waiter(spawned, tell)
        talk = _Talk(pipes, in_write, stdin, {out_read: Output(), err_read: Output()}, over)
        is_done = talk.go_on(read_boot_ns() + timeout_seconds * NS)
        if not is_done:
            spawned.close()
        waiter.thread.join()
    finally:
        pipes.close_all()
    return Ran(
        exit_code=waiter.code if is_done else None,
        stdout=talk.outputs[out_read],
        stderr=talk.outputs[err_read],
    )


class _Waiter:
    """Waits for the command in a thread of its own and then writes to a pipe."""

    def __init__(self, spawned: Spawned, tell: int) -> None:
        self.code: int | None = None
        self._spawned = spawned
        self._tell = tell
        self.thread = threading.Thread(target=self._wait, daemon=True, name="exec-wait")
        self.thread.start()

    def _wait(self) -> None:
        try:
            self.code = self._spawned.wait()
        finally:
            os.write(self._tell, b".")


class _Talk:
    """Feeds a command and reads what it says, without ever blocking on either."""

    def __init__(
        self, pipes: _Pipes, stdin_fd: int, stdin: bytes, outputs: dict[int, Output], over: int
    ) -> None:
        self._pipes = pipes
        self._stdin_fd = stdin_fd
        self._left = memoryview(stdin)
        self.outputs = outputs
        self._over = over
        for fd in (stdin_fd, *outputs):
            os.set_blocking(fd, False)

    def go_on(self, deadline_ns: int) -> bool:
        """Until the command has ended, then what is left in its pipes. False: time was up."""
        with selectors.DefaultSelector() as selector:
            for fd in (*self.outputs, self._over):
                selector.register(fd, selectors.EVENT_READ)
            if self._left:
                selector.register(self._stdin_fd, selectors.EVENT_WRITE)
            else:
                self._pipes.close(self._stdin_fd)
            while (wait_ns := deadline_ns - read_boot_ns()) > 0:
                ready = {key.fd for key, _ in selector.select(wait_ns / NS)}
                if self._stdin_fd in ready:
                    self._feed(selector)
                for fd in ready & self.outputs.keys():
                    if self._read(fd) == b"":
                        selector.unregister(fd)
                if self._over in ready:
                    break
            else:
                return False
        for fd in self.outputs:
            while self._read(fd):
                pass
        return True

    def _read(self, fd: int) -> bytes | None:
        """Take a piece; None: there is none now, empty: there will be none."""
        try:
            chunk = os.read(fd, CHUNK_BYTES)
        except BlockingIOError:
            return None
        self.outputs[fd].take(chunk)
        return chunk

    def _feed(self, selector: selectors.BaseSelector) -> None:
        try:
            sent = os.write(self._stdin_fd, self._left[:CHUNK_BYTES])
            self._left = self._left[sent:]
        except BlockingIOError:
            return
        except BrokenPipeError:
            # A command need not read all that it is given.
            self._left = self._left[len(self._left) :]
        if not self._left:
            selector.unregister(self._stdin_fd)
            self._pipes.close(self._stdin_fd)


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Where a workload's log is now. `run_id` None: it has not run yet."""

    run_id: str | None
    is_over: bool


async def follow(
    engine: Engine,
    look: Callable[[], Look],
    *,
    offset: int,
    is_followed: bool,
    poll_seconds: float,
    polls: int,
) -> AsyncIterator[bytes]:
    """The log from a byte offset of its present run on, and then of the runs after it.

    Between looks nothing is held: no thread, no connection. Ends with the present end of the
    log, or if followed when the workload is over, or after so many looks.
    """
    run_id: str | None = None
    for _ in range(polls):
        # Looked at before reading: what an ended run wrote last is read after its end is known.
        seen = await anyio.to_thread.run_sync(look)
        if seen.run_id is not None and run_id is not None and seen.run_id != run_id:
            async for chunk in _to_the_end(engine, run_id, offset):
                yield chunk
            offset = 0
        run_id = seen.run_id or run_id
        if run_id is not None:
            async for chunk in _to_the_end(engine, run_id, offset):
                offset += len(chunk)
                yield chunk
        if seen.is_over or not is_followed:
            return
        await anyio.sleep(poll_seconds)


async def _to_the_end(engine: Engine, run_id: str, offset: int) -> AsyncIterator[bytes]:
    """Pieces until there is no more now; a log that is no longer kept has none."""
    while True:
        try:
            data, after = await anyio.to_thread.run_sync(_read, engine, run_id, offset)
        except (RunNotFound, EngineError):
            return
        if not data or after <= offset:
            return
        offset = after
        yield data


def _read(engine: Engine, run_id: str, offset: int) -> tuple[bytes, int]:
    return engine.logs(run_id, offset=offset, limit=CHUNK_BYTES)
