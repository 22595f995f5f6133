"""One session channel: a shell, a command, or the files of a workload."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import asyncssh
from asyncssh.channel import SSHChannel
from asyncssh.sftp import run_sftp_server
from asyncssh.stream import SSHReader, SSHServerStreamSession, SSHWriter

from sublet.base.kernel.errors import SubletError
from sublet.capacity.engines.port import Spawned, SpawnSpec
from sublet.edge.bastion.descriptor import PIECE_BYTES, Descriptor
from sublet.edge.bastion.files import TenantFiles
from sublet.edge.bastion.terminal import set_modes, set_size

if TYPE_CHECKING:
    from sublet.edge.bastion.server import Login

FAILED = 255
"""What a client sees where the bastion itself failed, as OpenSSH has it."""
QUIET_SECONDS = 0.2
"""How long a terminal must be silent, once its process ended, to count as drained: a child left in
the background may hold it open for ever."""
ENV_LIMIT = 64
ENV_VALUE_LIMIT = 4096
_ENV_NAME = re.compile(r"^[A-Za-z_][A-Za-z0-9_]{0,127}$")
_SCP = re.compile(r"^scp\s+(-\S+\s+)*-[A-Za-z]*[tf](\s|$)")
_SIGNALS = frozenset(
    [
        "ABRT",
        "ALRM",
        "CONT",
        "FPE",
        "HUP",
        "ILL",
        "INT",
        "KILL",
        "PIPE",
        "QUIT",
        "SEGV",
        "STOP",
        "TERM",
        "TSTP",
        "USR1",
        "USR2",
        "WINCH",
    ]
)
_LOGIN_SHELL = "if [ -x /bin/bash ]; then exec /bin/bash -l; fi; exec /bin/sh -l"
_COMMAND = 'if [ -x /bin/bash ]; then exec /bin/bash -c "$1"; fi; exec /bin/sh -c "$1"'


class TenantSession(SSHServerStreamSession[bytes]):
    """A session of one login. Its process is the engine's; it lives no longer than the channel."""

    def __init__(self, login: Login) -> None:
        super().__init__(self._serve, self._open_files, 3, allow_scp=True)
        self._login = login
        self._gone = asyncio.Event()
        self._spawned: Spawned | None = None
        self._terminal: Descriptor | None = None
        self._streams: tuple[SSHWriter[bytes], SSHWriter[bytes]] | None = None

    # What asyncssh calls.

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._login.channels.discard(self)
        self._gone.set()

    def pty_requested(
        self,
        term_type: str,
        term_size: tuple[int, int, int, int],
        term_modes: Mapping[int, int],
    ) -> bool:
        return True

    def exec_requested(self, command: str) -> bool:
        # Only the remote half of an old scp is served here; the tenant's own `scp a b:` is theirs.
        self._allow_scp = bool(_SCP.match(command))
        return "\0" not in command

    def subsystem_requested(self, subsystem: str) -> bool:
        return subsystem == "sftp"

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        if self._terminal is not None and self._terminal.fileno() >= 0:
            with suppress(OSError):
                set_size(self._terminal.fileno(), (width, height, pixwidth, pixheight))

    def signal_received(self, signal: str) -> None:
        spawned = self._spawned
        if spawned is not None and signal in _SIGNALS:
            self._login.bastion.spawn_task(self._send_signal(spawned, f"SIG{signal}"))

    def break_received(self, msec: int) -> bool:
        return False

    async def read(self, datatype: int | None, n: int, exact: bool) -> bytes:
        # Before the next request is read, the answers to those before it must have drained:
        # sftp's own code writes answers without waiting.
        await self.drain(None)
        await self._login.settled()
        return await super().read(datatype, n, exact)

    def session_started(self) -> None:
        chan = self._chan
        assert isinstance(chan, asyncssh.SSHServerChannel)
        if chan.get_subsystem() == "sftp":
            # As the base class does it, but with an exit status at the end: scp waits for one.
            reader, writer = SSHReader[bytes](self, chan), _FilesWriter(self, chan)
            work = run_sftp_server(self._open_files(chan), reader, writer, 3)
            chan.get_connection().create_task(work, reader.logger)
        else:
            super().session_started()

    # What the bastion calls.

    def tell(self, line: str) -> None:
        """Show one line to a person at a terminal; others have the metadata endpoint."""
        if self._terminal is not None and not self._write_paused:
            self.write_line(line)

    def write_line(self, line: str) -> bool:
        """Say it where a shell or command of this session would; False if there is none."""
        if self._streams is None or self._gone.is_set():
            return False
        with suppress(OSError):
            if self._has_terminal:
                self._streams[0].write(f"\r\n{line}\r\n".encode())
            else:
                self._streams[1].write(f"{line}\n".encode())
        return True

    # The work.

    def _open_files(self, chan: SSHChannel[bytes]) -> TenantFiles:
        assert isinstance(chan, asyncssh.SSHServerChannel)
        return TenantFiles(chan, self._login)

    async def _send_signal(self, spawned: Spawned, name: str) -> None:
        with suppress(SubletError, OSError):
            await self._login.bastion.call(spawned.signal, name)

    async def _serve(
        self, stdin: SSHReader[bytes], stdout: SSHWriter[bytes], stderr: SSHWriter[bytes]
    ) -> None:
        assert self._chan is not None
        self._streams = (stdout, stderr)
        with self._login.bastion.at_work():
            try:
                if self._login.refused_remote_forwarding:
                    self.write_line(f"sublet: {self._login.refused_remote_forwarding}")
                code = await self._run(stdin, stdout, stderr)
            except (SubletError, OSError) as error:
                code = FAILED
                if not self._gone.is_set():
                    self.write_line(f"sublet: {await self._login.reason(error)}")
            if code is not None and not self._gone.is_set():
                with suppress(OSError):
                    self._chan.exit(code)  # type: ignore[attr-defined]

    @property
    def _has_terminal(self) -> bool:
        assert self._chan is not None
        return self._chan.get_terminal_type() is not None  # type: ignore[attr-defined]

    async def _run(
        self, stdin: SSHReader[bytes], stdout: SSHWriter[bytes], stderr: SSHWriter[bytes]
    ) -> int | None:
        """Run the process to its end; None where the client went away first."""
        chan = self._chan
        assert isinstance(chan, asyncssh.SSHServerChannel)
        command = chan.get_command()
        argv = (
            ("/bin/sh", "-c", _LOGIN_SHELL)
            if command is None
            else ("/bin/sh", "-c", _COMMAND, "sh", command)
        )
        env = _environment(chan.get_environment())
        term = chan.get_terminal_type()
        if term is not None:
            env["TERM"] = term if term.isprintable() and term else "dumb"
            ends, inner = _open_terminal(chan)
            self._terminal = ends[0]
        else:
            ends, inner = _open_pipes()
        try:
            spec = SpawnSpec(argv=argv, env=env, terminal=term is not None)
            engine, run_id = self._login.bastion.engine, self._login.run_id
            try:
                spawned = await self._login.bastion.call(engine.spawn, run_id, spec, inner)
            finally:
                for fd in set(inner):
                    os.close(fd)
            self._spawned = spawned
            outputs = {_copy_out(ends[1], stdout, self)}
            if term is None:
                outputs.add(_copy_out(ends[2], stderr, self))
            return await self._attend(spawned, stdin, ends[0], outputs)
        finally:
            self._spawned = None
            for end in ends:
                end.close()

    async def _attend(
        self,
        spawned: Spawned,
        stdin: SSHReader[bytes],
        inward: Descriptor,
        outputs: set[asyncio.Task[None]],
    ) -> int | None:
        feeding = asyncio.create_task(self._feed(stdin, inward))
        gone = asyncio.create_task(self._gone.wait())
        ended = self._login.bastion.ended(spawned)
        either: set[asyncio.Future[Any]] = {ended, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                with suppress(SubletError, OSError):
                    await self._login.bastion.call(spawned.close)
                return None
            # Like sshd: with pipes until every writer is gone, so that nothing said is lost;
            # with a terminal until it is silent.
            if self._terminal is not None:
                await self._until_quiet(outputs, gone)
            else:
                while (still := {t for t in outputs if not t.done()}) and not gone.done():
                    await asyncio.wait({*still, gone}, return_when=asyncio.FIRST_COMPLETED)
            return None if gone.done() else ended.result()
        finally:
            for task in (feeding, gone, *outputs):
                task.cancel()
            await asyncio.gather(feeding, gone, *outputs, return_exceptions=True)

    async def _until_quiet(
        self, outputs: set[asyncio.Task[None]], gone: asyncio.Task[bool]
    ) -> None:
        seen = -1
        while seen != self._said and not gone.done():
            seen = self._said
            done, _ = await asyncio.wait(outputs, timeout=QUIET_SECONDS)
            if outputs <= done:
                return

    _said = 0
    """Bytes read from the process so far."""

    def count(self, size: int) -> None:
        self._said += size

    async def settled(self) -> None:
        await self._login.settled()

    async def _feed(self, stdin: SSHReader[bytes], inward: Descriptor) -> None:
        """Client → process, piece by piece, until either closes."""
        with suppress(OSError, asyncssh.Error):
            while data := await stdin.read(PIECE_BYTES):
                await inward.write(data)
        # A terminal has no end of file of its own: what it reads it also writes.
        if self._terminal is None:
            inward.close()


class _FilesWriter(SSHWriter[bytes]):
    """Where the answers of sftp go; closing it is a good end."""

    def close(self) -> None:
        with suppress(OSError):
            self.channel.exit(0)  # type: ignore[attr-defined]


def _copy_out(
    source: Descriptor, sink: SSHWriter[bytes], session: TenantSession
) -> asyncio.Task[None]:
    async def copy() -> None:
        with suppress(OSError, asyncssh.Error):
            while data := await source.read():
                session.count(len(data))
                sink.write(data)
                await sink.drain()
                await session.settled()

    return asyncio.create_task(copy())


def _open_terminal(
    chan: asyncssh.SSHServerChannel[bytes],
) -> tuple[tuple[Descriptor, ...], tuple[int, int, int]]:
    outer, inner = os.openpty()
    try:
        set_modes(inner, chan.get_terminal_modes())
        set_size(outer, chan.get_terminal_size())
    except OSError:
        os.close(outer)
        os.close(inner)
        raise
    # The same end is read and written, so that there is one thing to close.
    end = Descriptor(outer)
    return (end, end), (inner, inner, inner)


def _open_pipes() -> tuple[tuple[Descriptor, ...], tuple[int, int, int]]:
    in_read, in_write = os.pipe()
    out_read, out_write = os.pipe()
    err_read, err_write = os.pipe()
    ends = (Descriptor(in_write), Descriptor(out_read), Descriptor(err_read))
    return ends, (in_read, out_write, err_write)


def _environment(asked: Mapping[str, str]) -> dict[str, str]:
    """What the client sends along (`SendEnv`): the tenant's own, so only its size is limited."""
    fit = {
        name: value
        for name, value in asked.items()
        if _ENV_NAME.match(name) and "\0" not in value and len(value) <= ENV_VALUE_LIMIT
    }
    return dict(list(fit.items())[:ENV_LIMIT])
