"""The supervisor: one process per run, alone with it until every process of it is gone.

One thread, one loop. Everything that could make it wait (the init inside, metadata clients, the
control plane, a full disk) is asked without waiting or with a limit, because the loop is also
what keeps the deadline. If it dies, the kernel ends the sandbox with it (`--die-with-parent`).
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Container, Sequence
from typing import Any

from . import cgroups, disk, netns, outbound, records, sandbox, usage
from .control import ControlServer
from .inner import Answered, Exited, Inner
from .logs import LogPump, LogWriter
from .loop import SECOND, Loop
from .metadata import MetadataServer
from .records import Evidence, Plan, State, boot_ns
from .run import CONTROL_LOST, Refused, Run

MS = 1_000_000
_HELLO_NS = 15 * SECOND
_ROUTE_NS = 8 * SECOND
_TERM_ACK_NS = SECOND
_MEMORY_GRACE_SECONDS = 5
_FULL_GRACE_SECONDS = 5
_MOST_FAULTS = 100
_KILLED = 128 + signal.SIGKILL
_TERMINATED = 128 + signal.SIGTERM


class Supervisor:
    def __init__(self, folder: str, plan: Plan) -> None:
        """On record when this returns: the state is written and orders are taken."""
        self.folder = folder
        self.plan = plan
        self.run = Run(
            plan,
            State(
                run_id=plan.run_id,
                workload_id=plan.workload_id,
                boot_id=plan.boot_id,
                phase="starting",
                runway_ns=plan.runway_ns,
                metadata=plan.metadata,
            ),
        )
        self.loop = Loop()
        self.log = LogPump(self.loop, LogWriter(folder, plan.log_bytes))
        self.evidence = records.open_evidence(folder)
        self.meter = usage.Meter(plan, [])
        self.disk = disk.DiskWatch(plan, folder)
        self.is_saved = False
        records.write_state(folder, self.run.state)
        self.control = ControlServer(self, folder)
        self.wakeup, poke = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(poke, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self.loop.watch(self.wakeup, self._on_signal)
        self.launched: sandbox.Launched | None = None
        self.inner: Inner | None = None
        self.init_pid: int | None = None
        self.watched: dict[int, int] = {}
        """Descriptor → pid of what must be seen gone: bubblewrap, and the init inside."""
        self.network_pid: int | None = None
        self.doors: outbound.Doors | None = None
        self.metadata: MetadataServer | None = None
        self.exit_code: int | None = None
        self.failure: str | None = None
        self.killed = False
        self.next_tick_ns = 0
        self.hello_by_ns: int | None = None
        self.route_by_ns: int | None = None
        self.term_heard_by_ns: int | None = None
        self.oom_kills = 0

    # -- time

    def serve(self) -> None:
        try:
            self._launch()
        except OSError as error:
            self.fail(f"the sandbox could not be started: {error}")
        while not self._is_gone():
            self.loop.turn(self._next_ns())
            self._keep_time(boot_ns())
        self._finish()

    def _next_ns(self) -> int:
        """When to look at the clock next."""
        instants = [self.next_tick_ns, self.disk.next_ns]
        if not self.killed:
            waits = (self.run.next_due_ns(), self.hello_by_ns, self.term_heard_by_ns)
            instants += [instant for instant in waits if instant is not None]
        if self.route_by_ns is not None:
            instants.append(boot_ns() + 10 * MS)
        return min(instants)

    def _keep_time(self, now: int) -> None:
        if not self.killed:
            due = self.run.due(now)
            if due is not None:
                self.terminate(*due)
            if self.run.must_kill(now):
                self.kill()
            if self.term_heard_by_ns is not None and now >= self.term_heard_by_ns:
                self.term_heard_by_ns = None
                self._signal_from_outside(signal.SIGTERM)
            if self.hello_by_ns is not None and now >= self.hello_by_ns:
                self.fail("the sandbox did not answer in time")
            if self.route_by_ns is not None:
                self._await_route(now)
            if self.loop.faults >= _MOST_FAULTS:
                self.fail("the supervisor gave up after too many faults")
        if now >= self.next_tick_ns:
            self.next_tick_ns = now + SECOND
            self.loop.guard(self._tick, now)
        if now >= self.disk.next_ns:
            self.loop.guard(self._watch_disk)

    def _tick(self, now: int) -> None:
        """About every second: evidence, limits that nobody else keeps, clients that linger."""
        self.meter.sample(self.init_pid)
        self._write_evidence(now)
        if not self.is_saved:
            self.save()
        if self._runs() and self.run.state.deadline_ns is None and not self._has_folder():
            self.terminate(CONTROL_LOST, self.plan.stop_grace_seconds)
        if self.metadata is not None:
            self.metadata.expire()
        if self.doors is not None and self._runs():
            self.loop.guard(self.doors.look, now, self.log.say)
        self._look_for_oom()
        used = self.meter.memory_bytes
        if used > self.plan.memory_bytes and not self.meter.is_enforced and self._runs():
            self.log.say(f"ended: {used} bytes of memory, {self.plan.memory_bytes} are allowed")
            self.terminate("memory", min(self.plan.stop_grace_seconds, _MEMORY_GRACE_SECONDS))

    def _has_folder(self) -> bool:
        """Whoever deletes it has given the run up: nobody can ever ask for it again."""
        return os.path.exists(os.path.join(self.folder, records.PLAN))

    def _look_for_oom(self) -> None:
        kills = cgroups.oom_kills(self.plan.cgroups)
        if kills > self.oom_kills:
            self.oom_kills = kills
            allowed = self.plan.memory_bytes
            self.log.say(f"the kernel ended a process: {allowed} bytes of memory are allowed")

    def _watch_disk(self) -> None:
        warning = self.disk.step(self.init_pid)
        if warning is not None:
            self.log.say(warning)
        if self.disk.excess is not None and self._runs():
            self.log.say(f"ended: {self.disk.excess}")
            self.terminate("disk", self.plan.stop_grace_seconds)
        if self.disk.emergency is not None and not self.killed:
            self.log.say(f"ended: {self.disk.emergency}")
            self.terminate("disk", min(self.plan.stop_grace_seconds, _FULL_GRACE_SECONDS))

    def _runs(self) -> bool:
        return self.run.state.phase == "running" and not self.killed

    # -- writing down

    def save(self) -> bool:
        """False where the disk is full, most likely: then the tick tries again."""
        state = self.run.state
        state.cpu_ms = self.meter.cpu_ms
        state.memory_bytes = self.meter.memory_bytes
        state.disk_bytes = self.disk.disk_bytes
        try:
            records.write_state(self.folder, state)
        except OSError:
            self.is_saved = False
        else:
            self.is_saved = True
        return self.is_saved

    def _write_evidence(self, now: int) -> None:
        meter = self.meter
        seen = Evidence(now, meter.cpu_ms, meter.memory_bytes, self.disk.disk_bytes)
        try:
            records.write_evidence(self.evidence, seen)
        except OSError:
            return  # the file has its size from the first time on, so this is not for lack of room

    # -- starting

    def _launch(self) -> None:
        plan = self.plan
        if plan.cgroups:
            cgroups.create(
                plan.cgroups,
                cpus=plan.cpus,
                cpu_percent=plan.cpu_percent,
                memory_bytes=plan.memory_bytes,
                pids=plan.pids,
            )
        with open(os.path.join(os.path.dirname(__file__), "init.py"), "rb") as source:
            init_source = source.read()
        resolver = outbound.RESOLVER.get(plan.outbound) if plan.own_network else None
        self.launched = sandbox.launch(plan, init_source, resolver)
        self._watch(self.launched.pid)
        self.hello_by_ns = boot_ns() + _HELLO_NS
        self.inner = Inner(
            self.launched.control,
            self.loop,
            plan,
            on_hello=self._on_hello,
            on_empty=self._on_empty,
            on_lost=self._on_lost,
        )

    def _watch(self, pid: int) -> None:
        fd = os.pidfd_open(pid)
        self.watched[fd] = pid
        self.loop.watch(fd, lambda _events: self._on_gone(fd))

    def _on_hello(self, message: dict[str, Any], fds: list[int]) -> None:
        """The init inside is up; nothing of the tenant's has run yet, so this much is believed."""
        self.hello_by_ns = None
        self.meter = usage.Meter(self.plan, fds)
        plan = self.plan
        try:
            self._find_init()
            if plan.cpus and message.get("cpus") != plan.cpus:
                self.fail(f"the sandbox sees CPUs {message.get('cpus')}, not {plan.cpus}")
            elif message.get("missing"):
                self.fail(f"devices are not visible inside: {message['missing']}")
            else:
                self._open_network()
        except (OSError, ValueError, KeyError) as error:
            self.fail(f"the sandbox could not be set up: {error}")

    def _find_init(self) -> None:
        assert self.launched is not None
        if self.launched.info < 0:
            self.init_pid = self.launched.pid
        else:
            said = os.read(self.launched.info, 4096)
            os.close(self.launched.info)
            self.init_pid = int(json.loads(said)["child-pid"])
            self._watch(self.init_pid)
        self.run.state.init_pid = self.init_pid
        self.run.state.init_ticks = usage.started_ticks(self.init_pid)

    def _open_network(self) -> None:
        assert self.init_pid is not None
        if self.plan.own_network:
            listener, url = netns.metadata_listener(self.init_pid)
        else:
            listener = netns.listen("127.0.0.1", 0)
            url = "http://{}:{}".format(*listener.getsockname())
        self.run.state.metadata_url = url
        self.metadata = MetadataServer(
            listener,
            self.loop,
            lambda: self.run.state.metadata,
            lambda: self.run.interruption(boot_ns()),
        )
        if self.plan.own_network and self.plan.outbound != "none":
            self.network_pid = outbound.start(self.plan, self.init_pid)
            self.route_by_ns = boot_ns() + _ROUTE_NS
            self._await_route(boot_ns())
        else:
            self._begin()

    def _await_route(self, now: int) -> None:
        assert self.init_pid is not None
        assert self.route_by_ns is not None
        if self.network_pid is not None and outbound.is_ready(self.init_pid):
            self.route_by_ns = None
            try:
                self.doors = outbound.Doors(self.plan, self.init_pid, self.network_pid)
            except OSError as error:
                self.fail(f"what is not public could not be closed off: {error}")
            else:
                self._begin()
        elif now >= self.route_by_ns or self.network_pid is None:
            self.route_by_ns = None
            self.fail(f"{self.plan.outbound} opened no way out")

    def _begin(self) -> None:
        """Start the command, or the instance's script; an instance runs without one too."""
        plan = self.plan
        if plan.kind != "instance":
            argv = plan.command
        elif plan.script:
            argv = ["/bin/sh", "-c", plan.script]
        else:
            self._started()
            return

        def began(answer: dict[str, Any], _fds: list[int]) -> None:
            if answer.get("ok"):
                self._started()
            else:
                why = os.strerror(int(answer.get("errno", 0)))
                self.fail(f"the command could not be started: {argv[0]}: {why}")

        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fds = [null, self.log.sink, self.log.sink]
            self._spawn({"argv": argv, "env": {}}, fds, began, self._on_main)
        except OSError as error:
            self.fail(f"the command could not be started: {argv[0]}: {error.strerror}")
        finally:
            os.close(null)

    def _started(self) -> None:
        if self.run.state.phase == "starting" and not self.killed:
            self.run.started(boot_ns())
            self.save()

    def _on_main(self, code: int) -> None:
        if self.plan.kind == "instance":
            if code:
                self.log.say(f"the start-up script ended with exit code {code}")
        elif self.exit_code is None:
            self.exit_code = code
            if self.run.state.phase != "stopping":
                self.kill()  # what the command left behind ends with it

    # -- reaching in

    def ask(self, request: dict[str, Any], answered: Answered, fds: Sequence[int] = ()) -> int:
        """A request to the init inside. Raises Refused where there is none, OSError."""
        if self.inner is None or self.hello_by_ns is not None or self.killed:
            raise Refused("not_attachable")
        return self.inner.ask(request, answered, fds)

    def spawn(
        self, request: dict[str, Any], fds: Sequence[int], answered: Answered, exited: Exited
    ) -> int:
        """Add a process. Raises Refused, OSError."""
        if not self._runs():
            raise Refused("not_attachable")
        return self._spawn(request, fds, answered, exited)

    def _spawn(
        self, request: dict[str, Any], fds: Sequence[int], answered: Answered, exited: Exited
    ) -> int:
        assert self.inner is not None
        return self.inner.spawn(request, fds, self.run.state.metadata_url, answered, exited)

    def waiting_for_exit(self) -> Container[int]:
        return self.inner.exits if self.inner is not None else ()

    # -- ending

    def terminate(self, reason: str, grace_seconds: int) -> None:
        """SIGTERM to every process, now; SIGKILL after the grace. Also before it runs."""
        if self.killed:
            return
        now = boot_ns()
        is_first = self.run.terminate(reason, grace_seconds, now)
        if self.run.state.phase == "starting":
            self.kill()
        elif is_first:
            self.term_heard_by_ns = now + _TERM_ACK_NS
            try:
                self.ask({"op": "signal", "signum": int(signal.SIGTERM)}, self._on_term_sent)
                self.ask({"op": "drain"}, lambda _answer, _fds: None)
            except OSError:
                self.term_heard_by_ns = now
        self.save()

    def _on_term_sent(self, answer: dict[str, Any], _fds: list[int]) -> None:
        if answer.get("ok"):
            self.term_heard_by_ns = None

    def _signal_from_outside(self, number: int) -> None:
        """Where the init inside does not do it: every process below it, one by one."""
        if self.init_pid is None:
            return
        for process in usage.tree(self.init_pid):
            if process.pid != self.init_pid:
                _send_signal(process.pid, number)

    def _on_empty(self) -> None:
        """No process is left inside but the init."""
        if self.run.state.phase == "stopping":
            self.kill(_TERMINATED)

    def _on_lost(self) -> None:
        """The init inside is gone, or no longer talks."""
        self.kill()

    def fail(self, why: str) -> None:
        """Give up: it never ran, or can no longer be kept."""
        if self.failure is None:
            self.failure = why
            self.log.say(why)
        self.kill()

    def kill(self, exit_code: int = _KILLED) -> None:
        """SIGKILL to everything. With process 1 of the sandbox the kernel ends all the others."""
        self.hello_by_ns = self.route_by_ns = self.term_heard_by_ns = None
        if not self.killed and self.exit_code is None:
            self.exit_code = exit_code
        self.killed = True
        self.next_tick_ns = boot_ns()  # evidence of the end, and a look at what is left
        for pid in self.watched.values():
            _send_signal(pid, signal.SIGKILL)
        for pid in self._left():
            _send_signal(pid, signal.SIGKILL)

    def _left(self) -> set[int]:
        """Processes of the run, as the host sees them."""
        left = cgroups.processes(self.plan.cgroups)
        left |= {process.pid for process in usage.tree(os.getpid())}
        return left - {os.getpid(), self.network_pid}

    def _on_gone(self, fd: int) -> None:
        self.loop.forget(fd)
        del self.watched[fd]
        os.close(fd)
        if not self.killed:
            self.kill()
        self._reap()

    def _last_words(self) -> str | None:
        if self.run.state.phase != "starting" or self.launched is None:
            return None
        words = os.pread(self.launched.errors, 2000, 0).decode(errors="replace").strip()
        return f"the sandbox did not start: {words}" if words else None

    def _reap(self) -> None:
        while True:
            try:
                pid, _, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self.launched is not None and pid == self.launched.pid:
                self.meter.add_waited(int((used.ru_utime + used.ru_stime) * 1000))
            if pid == self.network_pid:
                self.network_pid = None

    def _is_gone(self) -> bool:
        """Nothing is left: its first process is gone, and with it its namespace or its tree."""
        if not self.killed or self.watched:
            return False
        self._reap()
        left = self._left()
        for pid in left:
            _send_signal(pid, signal.SIGKILL)
        if left:
            self.next_tick_ns = min(self.next_tick_ns, boot_ns() + 20 * MS)
        return not left

    def _finish(self) -> None:
        now = boot_ns()
        if self.network_pid is not None:
            _send_signal(self.network_pid, signal.SIGKILL)
            os.waitpid(self.network_pid, 0)
        self._look_for_oom()
        self.log.finish()
        self.meter.sample(None)
        self.run.gone(now, self.exit_code, self.failure or self._last_words())
        if self.inner is not None:
            for exited in list(self.inner.exits.values()):
                exited(_KILLED)
        self._write_evidence(now)
        cgroups.remove(self.plan.cgroups)
        # With a full disk, all that is left to do is to say that it is over.
        while not self.save() and self._has_folder():
            self.loop.turn(boot_ns() + SECOND)
        self.control.close()

    def _on_signal(self, _events: int) -> None:
        received = os.read(self.wakeup, 4096)
        if signal.SIGTERM in received:  # the machine goes down
            self.terminate("stop:shutdown", self.plan.stop_grace_seconds)
        self._reap()


def _send_signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return
