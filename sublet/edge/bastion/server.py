"""Who may come in, how many, and for how long."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import asyncssh
import structlog

from sublet.base.kernel.clock import Clock, SystemClock
from sublet.base.kernel.errors import SubletError
from sublet.capacity.engines.port import Attachable, Notice, Spawned
from sublet.edge.bastion import hostkey
from sublet.edge.bastion.forward import Forward
from sublet.edge.bastion.session import TenantSession

log = structlog.get_logger()

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a login leads: the live run of a workload, and the public keys that its spec names."""

    run_id: str
    keys: tuple[str, ...]


Lookup = Callable[[str], Target | str | None]
"""Login name → target. A text says why there is none, for the person: state, reason, what to do.
It is shown before the key is checked, to whoever knows the workload's id. None: no such workload.
Called in a thread, again every second while the login has a connection."""

NoticeOf = Callable[[str], Notice | None]
"""The interruption published for a run, if any. Called in a thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of the bastion. A channel holds at most a window and a few pieces in memory."""

    login_grace_seconds: float = 30.0
    key_attempts: int = 10
    names_tried: int = 3
    connections: int = 512
    unauthenticated: int = 64
    unauthenticated_per_address: int = 8
    channels_per_workload: int = 64
    window_bytes: int = 1 << 20
    outgoing_bytes: int = 1 << 20
    keepalive_seconds: float = 15.0
    keepalive_missed: int = 4
    watch_seconds: float = 1.0
    stop_seconds: float = 5.0
    threads: int = 64


NO_REMOTE_FORWARDING = (
    "forwarding from the workload back to you (-R) is not offered; "
    "use -L to reach a port inside the workload."
)


class Bastion:
    """An SSH server for all workloads of one engine.

    `listening` is a bound socket to serve on instead of host and port. Port 0 picks a free one;
    `port` says which, once started.
    """

    def __init__(
        self,
        engine: Attachable,
        lookup: Lookup,
        *,
        host_key_dir: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        listening: socket.socket | None = None,
        notice: NoticeOf | None = None,
        clock: Clock | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.engine = engine
        self.lookup = lookup
        self.host = host
        self.port = port
        self.limits = limits or Limits()
        self._host_key_dir = host_key_dir
        self._listening = listening
        self._notice = notice
        self._clock = clock or SystemClock.unanchored()
        self._logins: dict[Login, None] = {}
        """In the order in which they came."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._working = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._told: dict[str, Notice] = {}

    async def start(self) -> None:
        """Listen and serve. Raises OSError where the port is taken or the key cannot be made."""
        logging.getLogger("asyncssh").setLevel(logging.WARNING)
        limits = self.limits
        self._pool = ThreadPoolExecutor(limits.threads, thread_name_prefix="bastion")
        key = await self.call(hostkey.load, self._host_key_dir)
        where: dict[str, Any] = {"host": self.host, "port": self.port}
        if self._listening is not None:
            where = {"sock": self._listening}
        self._acceptor = await asyncssh.create_server(
            partial(Login, self),
            **where,
            server_host_keys=[key],
            server_version="Sublet",
            encoding=None,
            line_editor=False,
            # asyncssh would listen on the host for these two, so they stay off.
            agent_forwarding=False,
            x11_forwarding=False,
            password_auth=False,
            kbdint_auth=False,
            host_based_auth=False,
            gss_host=None,
            # No compression: a small packet could unfold into a large one.
            compression_algs=None,
            login_timeout=limits.login_grace_seconds,
            keepalive_interval=limits.keepalive_seconds,
            keepalive_count_max=limits.keepalive_missed,
            window=limits.window_bytes,
        )
        self.port = self._acceptor.get_port()
        self.spawn_task(self._watch())

    async def stop(self) -> None:
        """Close the door, hang up every session, and wait (bounded) until their processes know."""
        self._acceptor.close()
        for login in list(self._logins):
            login.leave("this SSH door is closing; your workload goes on: come back shortly.")
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._idle.wait(), self.limits.stop_seconds)
        for login in list(self._logins):
            login.abort()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        # One turn of the loop, so that aborted connections are cleaned up in it.
        await asyncio.sleep(0)
        await self._acceptor.wait_closed()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # For logins and sessions.

    async def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a call that may block in a thread of its own pool."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, partial(function, *args, **kwargs))

    def ended(self, spawned: Spawned) -> asyncio.Future[int]:
        """The exit code, when there is one. The waiting thread never keeps this process alive."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()

        def tell(code: int) -> None:
            if not future.done():
                future.set_result(code)

        def wait() -> None:
            try:
                code = spawned.wait()
            except (SubletError, OSError):
                code = 255
            with suppress(RuntimeError):  # the loop is closed: nobody wants to know
                loop.call_soon_threadsafe(tell, code)

        threading.Thread(target=wait, name="bastion-wait", daemon=True).start()
        return future

    def spawn_task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """`stop` waits for what runs inside."""
        self._working += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._working -= 1
            if not self._working:
                self._idle.set()

    def enrol(self, login: Login) -> bool:
        """Take a new connection in. False where the door is full of people who have logged in.

        Where too many have not logged in yet, the oldest of them makes room: were the newcomer
        refused instead, a few silent connections would shut the door on everybody.
        """
        limits = self.limits
        waiting = [known for known in self._logins if not known.run_id]
        nearby = [known for known in waiting if known.address == login.address]
        if len(nearby) >= limits.unauthenticated_per_address:
            self._drop(nearby[0])
        elif len(waiting) >= limits.unauthenticated:
            self._drop(waiting[0])
        elif len(self._logins) >= limits.connections:
            if not waiting:
                return False
            self._drop(waiting[0])
        self._logins[login] = None
        return True

    def _drop(self, login: Login) -> None:
        log.warning("ssh_login_dropped", address=login.address)
        self.dismiss(login)
        asyncio.get_running_loop().call_soon(login.abort)

    def dismiss(self, login: Login) -> None:
        self._logins.pop(login, None)

    def has_room(self, name: str) -> bool:
        """May this workload have one more channel?"""
        held = sum(len(login.channels) + login.opening for login in self._logins_of(name))
        return held < self.limits.channels_per_workload

    def _logins_of(self, name: str) -> list[Login]:
        return [login for login in self._logins if login.run_id and login.name == name]

    async def _watch(self) -> None:
        """Tell people of interruptions, and end connections whose run is over."""
        while True:
            await asyncio.sleep(self.limits.watch_seconds)
            names = {login.name for login in self._logins if login.run_id}
            for name in names:
                try:
                    await self._look(name)
                except Exception:
                    log.exception("ssh_watch_failed", login=name)
            live = {login.run_id for login in self._logins}
            self._told = {run_id: n for run_id, n in self._told.items() if run_id in live}

    async def _look(self, name: str) -> None:
        found = await self.call(self.lookup, name)
        run_id = found.run_id if isinstance(found, Target) else ""
        for login in self._logins_of(name):
            if login.run_id != run_id:
                login.leave(found if isinstance(found, str) else "this run of it has ended.")
        if run_id:
            await self._tell(name, run_id)

    async def _tell(self, name: str, run_id: str) -> None:
        if self._notice is None:
            return
        notice = await self.call(self._notice, run_id)
        before = self._told.get(run_id)
        if notice == before:
            return
        if notice is None:
            del self._told[run_id]
            line = "sublet: the interruption is withdrawn; this workload goes on."
        else:
            self._told[run_id] = notice
            line = self._notice_line(notice)
        for login in self._logins_of(name):
            for channel in list(login.channels):
                if isinstance(channel, TenantSession):
                    channel.tell(line)

    def _notice_line(self, notice: Notice) -> str:
        seconds = max(0, round((notice.term_at - self._clock.now()).total_seconds()))
        then = "is queued again" if notice.action == "requeue" else "stops"
        return (
            f"sublet: interruption ({notice.reason}): SIGTERM in {seconds} s, at "
            f"{notice.term_at:%H:%M:%S} UTC; then this workload {then}. Save your work."
        )


class Login(asyncssh.SSHServer):
    """One connection: who it is, what it may open."""

    def __init__(self, bastion: Bastion) -> None:
        self.bastion = bastion
        self.name = ""
        self.address = ""
        self.run_id = ""
        """Set once the key was accepted."""
        self.channels: set[TenantSession | Forward] = set()
        self.opening = 0
        self.refused_remote_forwarding = ""
        self._target: Target | None = None
        self._accepted: set[bytes] = set()
        self._names_tried = 0
        self._keys_tried = 0

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._conn = conn
        self.address = conn.get_extra_info("peername", ("",))[0]
        if not self.bastion.enrol(self):
            log.warning("ssh_too_many_connections")
            asyncio.get_running_loop().call_soon(conn.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self.bastion.dismiss(self)

    async def begin_auth(self, username: str) -> bool:
        """Always True: every login needs a key."""
        self._accepted, self._target, self.name = set(), None, username
        self._names_tried += 1
        if self._names_tried > self.bastion.limits.names_tried:
            self._conn.disconnect(asyncssh.DISC_BY_APPLICATION, "too many login names tried.")
            return True
        try:
            found = await self.bastion.call(self.bastion.lookup, username)
        except SubletError as error:
            found = error.message
        except Exception:
            log.exception("ssh_lookup_failed", login=username)
            found = "Sublet cannot look this workload up now: try again shortly."
        if username != self.name:
            # A second name came while this one was looked up: its keys must not open that door.
            return True
        if isinstance(found, str):
            self._conn.send_auth_banner(f"sublet: {found}\n")
        elif found is not None:
            self._target = found
            self._accepted = _public_data(found.keys)
            if not self._accepted:
                self._conn.send_auth_banner(
                    f"sublet: {username} was rented without an SSH key, so nobody can log in.\n"
                )
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        self._keys_tried += 1
        if self._keys_tried > self.bastion.limits.key_attempts:
            self._conn.disconnect(
                asyncssh.DISC_NO_MORE_AUTH_METHODS_AVAILABLE,
                "too many keys tried: name the one to use with `ssh -o IdentitiesOnly=yes -i`.",
            )
            return False
        return username == self.name and key.public_data in self._accepted

    def auth_completed(self) -> None:
        assert self._target is not None, "no login without an accepted key"
        self.run_id = self._target.run_id
        log.info("ssh_login", login=self.name, run_id=self.run_id, address=self.address)

    def session_requested(self) -> TenantSession:
        self._need_room()
        session = TenantSession(self)
        # Counted from the request on: a client may ask for many before the first is open.
        self.channels.add(session)
        return session

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> tuple[asyncssh.SSHTCPChannel[bytes], Coroutine[Any, Any, Forward]]:
        self._need_room()
        channel = self._conn.create_tcp_channel(window=self.bastion.limits.window_bytes)
        self.opening += 1
        return channel, self._connect(dest_host, dest_port)

    async def _connect(self, host: str, port: int) -> Forward:
        try:
            fd = await self.bastion.call(self.bastion.engine.connect, self.run_id, host, port)
        except (SubletError, OSError) as error:
            why = await self.reason(error)
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, why) from error
        finally:
            self.opening -= 1
        if self._conn.is_closed():
            os.close(fd)
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "the client is gone")
        forward = Forward(self, fd)
        self.channels.add(forward)
        return forward

    def server_requested(self, listen_host: str, listen_port: int) -> bool:
        self.refused_remote_forwarding = NO_REMOTE_FORWARDING
        self._conn.send_debug(f"sublet: {NO_REMOTE_FORWARDING}", always_display=True)
        return False

    # For the bastion and the sessions.

    def leave(self, reason: str) -> None:
        """End this connection, saying why.

        Twice where a session is open: a client ends either at the close of its channel, before it
        reads why it is disconnected, or at the disconnect, before it shows what the session said.
        """
        for channel in self.channels:
            if isinstance(channel, TenantSession):
                channel.write_line(f"sublet: {reason}")
        self._conn.disconnect(asyncssh.DISC_BY_APPLICATION, f"sublet: {reason}")

    def abort(self) -> None:
        self._conn.abort()

    async def reason(self, error: Exception) -> str:
        """What to tell the person: the workload's state where that is why, else the error."""
        if isinstance(error, OSError):
            return error.strerror or str(error)
        with suppress(Exception):
            found = await self.bastion.call(self.bastion.lookup, self.name)
            if isinstance(found, str):
                return found
        return str(error)

    async def settled(self) -> None:
        """Wait while the client does not take what it was sent.

        asyncssh ignores the transport's back-pressure: a client that opens a huge window and
        reads nothing would make this process keep everything for it.
        """
        transport = getattr(self._conn, "_transport", None)
        while transport is not None and not self._conn.is_closed():
            if transport.get_write_buffer_size() <= self.bastion.limits.outgoing_bytes:
                return
            await asyncio.sleep(0.02)

    def _need_room(self) -> None:
        if not self.bastion.has_room(self.name):
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_RESOURCE_SHORTAGE,
                f"{self.bastion.limits.channels_per_workload} sessions and forwarded connections "
                "are open to this workload already: close one.",
            )


def _public_data(keys: tuple[str, ...]) -> set[bytes]:
    """The keys as compared; a line that is no public key opens nothing."""
    found = set()
    for line in keys:
        with suppress(asyncssh.KeyImportError):
            found.add(asyncssh.import_public_key(line).public_data)
    return found
