"""The supervisor: one process per run, alone with it until every process of it is gone.

One thread, one loop. Everything that could make it wait (the init inside, metadata clients, the
control plane, a full disk) is asked without waiting or with a limit, because the loop is also
what keeps the deadline. If it dies, the kernel ends the sandbox with it (`--die-with-parent`).
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from . import cgroups, netns, outbound, records, sandbox, usage, wire
from .control import ControlServer, Refused
from .logs import LogWriter
from .metadata import MetadataServer
from .records import Evidence, Plan, State, boot_ns
from .run import SECOND, Run

MS = 1_000_000
_HELLO_NS = 15 * SECOND
_ROUTE_NS = 8 * SECOND
_TERM_ACK_NS = SECOND
_SWEEP_EVERY_NS = SECOND
_SWEEP_REST = 20
"""Times as long as a count took does it rest before the next."""
_SWEEP_SLICE_NS = 20 * MS
_LOG_BURST = 256 * 1024
_LOG_EVERY_NS = 50 * MS
_MEMORY_GRACE_SECONDS = 5
_MOST_FAULTS = 100
_BASE_ENV = {
    "USER": "tenant",
    "LOGNAME": "tenant",
    "SHELL": "/bin/sh",
    "LANG": "C.UTF-8",
    "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
}


class Supervisor:
    def __init__(self, folder: str, plan: Plan, state: State, ready: int) -> None:
        self.folder = folder
        self.plan = plan
        self.run = Run(plan, state)
        self.selector = selectors.DefaultSelector()
        self.log = LogWriter(folder, plan.log_bytes)
        self.evidence_fd = records.open_evidence(folder)
        self.meter = usage.Meter(plan, [])
        self.sweep = usage.DiskSweep([plan.home, plan.scratch])
        self.unsaved = True
        self.save()
        self.control = ControlServer(self, folder)
        os.write(ready, b"ok")
        os.close(ready)
        self.wakeup, poke = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(poke, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)
        self.selector.register(self.wakeup, selectors.EVENT_READ, self._on_signal)
        self.launched: sandbox.Launched | None = None
        self.init_pid: int | None = None
        self.watched: dict[int, int] = {}  # pidfd -> pid, of what must be gone at the end
        self.network_pid: int | None = None
        self.metadata: MetadataServer | None = None
        self.requests: dict[int, Callable[[dict[str, Any], list[int]], None]] = {}
        self.exits: dict[int, Callable[[int], None]] = {}
        self.last_request = 0
        self.main_id: int | None = None
        self.exit_code: int | None = None
        self.failure: str | None = None
        self.faults = 0
        self.killed = False
        self.term_acknowledged_by: int | None = None
        self.log_pipe, self.log_sink = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(self.log_sink, True)
        self.log_polled = False
        self.next_log_ns = 0
        self.next_tick_ns = 0
        self.next_sweep_ns = 0
        self.next_slice_ns = 0
        self.sweep_began_ns = 0
        self.hello_by_ns: int | None = None
        self.route_by_ns: int | None = None
        self.oom_kills = 0
        self.warned_disk = False

    # -- the loop

    def serve(self) -> None:
        try:
            self._launch()
        except OSError as error:
            self.fail(f"the sandbox could not be started: {error}")
        while not self._is_gone():
            for key, mask in self.selector.select(self._pause()):
                self._handle(key.data, mask)
            self._keep_time(boot_ns())
        self._finish()

    def _handle(self, handler: Callable[[int], None], mask: int) -> None:
        """A fault in one conversation ends neither the others nor the deadline."""
        try:
            handler(mask)
        except Exception:
            self.faults += 1
            traceback.print_exc()
            if self.faults >= _MOST_FAULTS:
                self.fail("the supervisor gave up after too many faults")

    def _pause(self) -> float:
        now = boot_ns()
        instants = [self.next_tick_ns, self.run.next_due_ns(), self.hello_by_ns]
        if not self.log_polled:
            instants.append(self.next_log_ns)
        if self.next_slice_ns:
            instants.append(self.next_slice_ns)
        if self.route_by_ns is not None:
            instants.append(now + 10 * MS)
        if self.term_acknowledged_by is not None:
            instants.append(self.term_acknowledged_by)
        soonest = min(instant for instant in instants if instant is not None)
        return max(0.0, (soonest - now) / SECOND)

    def _keep_time(self, now: int) -> None:
        due = self.run.due(now)
        if due is not None:
            self.terminate(*due)
        if self.run.must_kill(now) and not self.killed:
            self.kill()
        if self.term_acknowledged_by is not None and now >= self.term_acknowledged_by:
            self.term_acknowledged_by = None
            self._signal_from_outside(signal.SIGTERM)
        if self.hello_by_ns is not None and now >= self.hello_by_ns:
            self.fail("the sandbox did not answer in time")
        if self.route_by_ns is not None:
            self._await_route(now)
        if not self.log_polled and now >= self.next_log_ns:
            self.selector.register(self.log_pipe, selectors.EVENT_READ, self._on_log)
            self.log_polled = True
        if now >= self.next_tick_ns:
            self.next_tick_ns = now + SECOND
            self._tick(now)
        if self.next_slice_ns and now >= self.next_slice_ns:
            self._sweep_slice(now)

    def _tick(self, now: int) -> None:
        """About every second: evidence, limits that nobody else keeps, clients that linger."""
        self.meter.sample(self.init_pid)
        evidence = Evidence(now, self.meter.cpu_ms, self.meter.memory_bytes, self.sweep.disk_bytes)
        try:
            records.write_evidence(self.evidence_fd, evidence)
        except OSError:
            self.unsaved = True
        if self.unsaved:
            self.save()
        if self.metadata is not None:
            self.metadata.expire()
        kills = cgroups.oom_kills(self.plan.cgroups)
        if kills > self.oom_kills:
            self.oom_kills = kills
            self.say(f"a process was ended: the limit is {self.plan.memory_bytes} bytes of memory")
        too_much = self.meter.memory_bytes > self.plan.memory_bytes
        if too_much and not self.meter.is_enforced and self.run.state.phase == "running":
            self.say(f"ended: {self.meter.memory_bytes} bytes of memory are over the limit")
            self.terminate("memory", min(self.plan.stop_grace_seconds, _MEMORY_GRACE_SECONDS))
        if now >= self.next_sweep_ns and not self.next_slice_ns:
            self.next_slice_ns = self.sweep_began_ns = now

    def _sweep_slice(self, now: int) -> None:
        stop = now + _SWEEP_SLICE_NS
        while not self.sweep.slice():
            now = boot_ns()
            if now >= stop:
                self.next_slice_ns = now + 9 * _SWEEP_SLICE_NS  # a tenth of one CPU at most
                return
        self.next_slice_ns = 0
        took = boot_ns() - self.sweep_began_ns
        self.next_sweep_ns = boot_ns() + max(_SWEEP_EVERY_NS, _SWEEP_REST * took)
        plan, used = self.plan, self.sweep.disk_bytes
        files = max(100_000, plan.disk_bytes // 4096)
        if self.run.state.phase == "running" and (
            used > plan.disk_bytes or self.sweep.entries > files
        ):
            self.say(
                f"ended: {used} bytes in {self.sweep.entries} files are over the limit of "
                f"{plan.disk_bytes} bytes in {files} files"
            )
            self.terminate("disk", plan.stop_grace_seconds)
        volume = os.statvfs(self.folder)
        is_short = volume.f_bavail * volume.f_frsize < plan.disk_reserve_bytes
        if is_short and used > plan.disk_share_bytes and not self.warned_disk:
            self.say(f"the disk is nearly full and {used} bytes are more than this run's share")
        self.warned_disk = is_short

    # -- writing down

    def save(self) -> bool:
        """False where the disk is full, most likely: then the tick tries again."""
        state = self.run.state
        state.cpu_ms = self.meter.cpu_ms
        state.memory_bytes = self.meter.memory_bytes
        state.disk_bytes = self.sweep.disk_bytes
        try:
            records.write_state(self.folder, state)
        except OSError:
            self.unsaved = True
            return False
        self.unsaved = False
        return True

    def say(self, text: str) -> None:
        try:
            self.log.say(text)
        except OSError:
            return

    def _on_log(self, _mask: int) -> None:
        """Pass output on, at most a burst at a time, so that a flood slows only its author."""
        taken = 0
        while taken < _LOG_BURST:
            try:
                data = os.read(self.log_pipe, 65536)
            except BlockingIOError:
                return
            if not data:
                break
            taken += len(data)
            try:
                self.log.write(data)
            except OSError:
                continue  # no room for it: output is lost, the run is not
        self.selector.unregister(self.log_pipe)
        self.log_polled = False
        self.next_log_ns = boot_ns() + _LOG_EVERY_NS

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
        self.launched.control.setblocking(False)
        self.hello_by_ns = boot_ns() + _HELLO_NS
        self.selector.register(self.launched.control, selectors.EVENT_READ, self._on_init)

    def _watch(self, pid: int) -> None:
        fd = os.pidfd_open(pid)
        self.watched[fd] = pid
        self.selector.register(fd, selectors.EVENT_READ, lambda _mask: self._on_gone(fd))

    def _on_hello(self, message: dict[str, Any], fds: list[int]) -> None:
        assert self.launched is not None
        self.hello_by_ns = None
        self.meter = usage.Meter(self.plan, fds)
        if self.launched.info >= 0:
            said = os.read(self.launched.info, 4096)
            os.close(self.launched.info)
            self.init_pid = int(json.loads(said)["child-pid"])
            self._watch(self.init_pid)
        else:
            self.init_pid = self.launched.pid
        self.run.state.init_pid = self.init_pid
        if self.plan.cpus and message.get("cpus") != self.plan.cpus:
            self.fail(f"the sandbox sees CPUs {message.get('cpus')}, not {self.plan.cpus}")
        elif message.get("missing"):
            self.fail(f"devices are not visible inside: {message['missing']}")
        else:
            self._open_network()

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
            self.selector,
            boot_ns,
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
        if outbound.is_ready(self.init_pid):
            self.route_by_ns = None
            try:
                outbound.close_doors(self.plan, self.init_pid)
            except OSError as error:
                self.fail(f"the host's own addresses could not be closed off: {error}")
                return
            self._begin()
        elif now >= self.route_by_ns or self.network_pid is None:
            self.route_by_ns = None
            self.fail(f"{self.plan.outbound} opened no way out")

    def _begin(self) -> None:
        """Start the job's command or the instance's script; an instance runs without one too."""
        plan = self.plan
        if plan.kind == "job":
            argv = plan.command
        elif plan.script:
            argv = ["/bin/sh", "-c", plan.script]
        else:
            self._started()
            return
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)

        def began(answer: dict[str, Any], _fds: list[int]) -> None:
            if answer.get("ok"):
                self._started()
            else:
                number = int(answer.get("errno", 0))
                self.fail(f"the command could not be started: {argv[0]}: {os.strerror(number)}")

        try:
            self.main_id = self.ask_to_spawn(
                {"argv": argv, "env": {}},
                [null, self.log_sink, self.log_sink],
                began,
                self._on_main,
            )
        finally:
            os.close(null)

    def _started(self) -> None:
        if self.run.state.phase == "starting" and not self.killed:
            self.run.started(boot_ns())
            self.save()

    def _on_main(self, code: int) -> None:
        if self.plan.kind == "job":
            self.exit_code = code
            if self.run.state.phase == "running":
                self.kill()  # what the command left behind ends with it
        elif code:
            self.say(f"the start-up script ended with exit code {code}")

    # -- the init inside

    def ask(
        self,
        request: dict[str, Any],
        answered: Callable[[dict[str, Any], list[int]], None],
        fds: list[int] | None = None,
    ) -> int:
        """Send a request inside; `answered` is called for each answer. Raises OSError."""
        if self.launched is None or self.hello_by_ns is not None or self.killed:
            raise Refused("not_attachable")
        self.last_request += 1
        ident = self.last_request
        wire.send(self.launched.control, {**request, "id": ident}, fds or [])
        self.requests[ident] = answered
        return ident

    def ask_to_spawn(
        self,
        request: dict[str, Any],
        fds: list[int],
        answered: Callable[[dict[str, Any], list[int]], None],
        exited: Callable[[int], None],
    ) -> int:
        places = sandbox.places(self.plan)
        env = {
            **_BASE_ENV,
            "HOME": places.home,
            **self.plan.env,
            **request["env"],
            usage.MARK: self.plan.mark,
            "SUBLET_RUN_ID": self.plan.run_id,
            "SUBLET_WORKLOAD_ID": self.plan.workload_id,
            "SUBLET_DEVICES": ",".join(self.plan.devices),
            "SUBLET_METADATA_URL": self.run.state.metadata_url,
            "SUBLET_SCRATCH": places.scratch,
        }
        if self.plan.gpus:
            visible = ",".join(self.plan.gpu_ids)
            env |= {"CUDA_VISIBLE_DEVICES": visible, "NVIDIA_VISIBLE_DEVICES": visible}
        spawn = {**request, "op": "spawn", "env": env, "cwd": places.home}
        ident = self.ask(spawn, answered, fds)
        self.exits[ident] = exited
        return ident

    def _on_init(self, _mask: int) -> None:
        assert self.launched is not None
        while True:
            try:
                message, fds = wire.receive(self.launched.control)
            except BlockingIOError:
                return
            except OSError:
                message, fds = None, []
            if message is None:
                self.selector.unregister(self.launched.control)
                self.kill()
                return
            kept = False
            try:
                kept = self._on_message(message, fds)
            except (TypeError, ValueError, KeyError, OSError) as error:
                if self.run.state.phase == "starting":
                    self.fail(f"the sandbox could not be set up: {error}")
            finally:
                if not kept:
                    wire.close_all(fds)

    def _on_message(self, message: dict[str, Any], fds: list[int]) -> bool:
        """One message of a program that is not believed. True: the descriptors were kept."""
        event = message.get("event")
        if event == "hello" and self.hello_by_ns is not None:
            self._on_hello(message, fds)
            return True
        if event == "exit":
            exited = self.exits.pop(int(message["of"]), None)
            if exited is not None:
                exited(max(0, min(255, int(message["code"]))))
        elif event == "empty":
            if self.run.state.phase == "stopping":
                self.kill(128 + signal.SIGTERM)
        elif event is None:
            answered = self.requests.get(message["id"])
            if answered is not None:
                if not message.get("more"):
                    del self.requests[message["id"]]
                if "ok" not in message:
                    self.exits.pop(message["id"], None)
                answered(message, fds)
        return False

    # -- ending

    def terminate(self, reason: str, grace_seconds: int) -> None:
        """SIGTERM to every process, now; SIGKILL after the grace. Also before it runs."""
        now = boot_ns()
        first = self.run.terminate(reason, grace_seconds, now)
        if self.run.state.phase == "starting":
            self.kill()
        elif first:
            self.term_acknowledged_by = now + _TERM_ACK_NS
            try:
                self.ask({"op": "signal", "signum": int(signal.SIGTERM)}, self._on_term_sent)
                self.ask({"op": "drain"}, lambda _answer, _fds: None)
            except OSError:
                self.term_acknowledged_by = now
        self.save()

    def _on_term_sent(self, answer: dict[str, Any], _fds: list[int]) -> None:
        if answer.get("ok"):
            self.term_acknowledged_by = None

    def _signal_from_outside(self, number: int) -> None:
        """Where the init inside does not do it: every process below it, one by one."""
        if self.init_pid is None:
            return
        for process in usage.tree(self.init_pid):
            if process.pid != self.init_pid:
                _send_signal(process.pid, number)

    def signal_all(
        self, number: int, answered: Callable[[dict[str, Any], list[int]], None]
    ) -> None:
        self.ask({"op": "signal", "signum": number}, answered)

    def fail(self, why: str) -> None:
        """Give up: it never ran, or can no longer be kept."""
        if self.failure is None:
            self.failure = why
            self.say(why)
        self.kill()

    def kill(self, exit_code: int = 128 + signal.SIGKILL) -> None:
        """SIGKILL to everything. With process 1 of the sandbox the kernel ends all the others."""
        self.hello_by_ns = self.route_by_ns = self.term_acknowledged_by = None
        if not self.killed and self.exit_code is None:
            self.exit_code = exit_code
        self.killed = True
        if self.launched is None:
            return
        for _ in range(200 if self.plan.rung == "bare" else 1):
            below = [process.pid for process in usage.tree(self.launched.pid)]
            orphans = [process.pid for process in usage.tree(os.getpid())]
            left = [p for p in {*below, *orphans} if p not in (os.getpid(), self.network_pid)]
            for pid in left:
                _send_signal(pid, signal.SIGKILL)
            self._reap()
            if not left:
                break
        for pid in self.watched.values():
            _send_signal(pid, signal.SIGKILL)

    def _on_gone(self, fd: int) -> None:
        self.selector.unregister(fd)
        del self.watched[fd]
        os.close(fd)
        self._reap()
        if not self.killed:
            self.failure = self.failure or self._last_words()
            self.kill()

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
            if self.launched is not None and pid == self.launched.pid and not self.plan.cgroups:
                self.meter.add_cpu(int((used.ru_utime + used.ru_stime) * 1000))
            if pid == self.network_pid:
                self.network_pid = None

    def _is_gone(self) -> bool:
        """Nothing is left: its first process is gone, and with it its namespace or its tree."""
        if not self.killed or self.watched:
            return False
        left = cgroups.processes(self.plan.cgroups)
        if self.plan.rung == "bare":
            left |= {p.pid for p in usage.tree(os.getpid())} - {os.getpid(), self.network_pid or 0}
        for pid in left:
            _send_signal(pid, signal.SIGKILL)
        if left:
            self._reap()
            self.next_tick_ns = min(self.next_tick_ns, boot_ns() + 20 * MS)
        return not left

    def _finish(self) -> None:
        now = boot_ns()
        if self.network_pid is not None:
            _send_signal(self.network_pid, signal.SIGKILL)
            os.waitpid(self.network_pid, 0)
        self.meter.sample(None)
        os.close(self.log_sink)
        try:
            while data := os.read(self.log_pipe, 65536):
                self.log.write(data)
        except OSError:
            pass
        self.run.gone(now, self.exit_code, self.failure)
        for exited in self.exits.values():
            exited(128 + signal.SIGKILL)
        try:
            records.write_evidence(
                self.evidence_fd, Evidence(now, self.meter.cpu_ms, 0, self.sweep.disk_bytes)
            )
        except OSError:
            pass
        cgroups.remove(self.plan.cgroups)
        while not self.save():  # the only thing left to do is to say that it is over
            self.selector.select(1.0)
        self.control.close()

    # -- signals to the supervisor itself

    def _on_signal(self, _mask: int) -> None:
        received = os.read(self.wakeup, 4096)
        if signal.SIGTERM in received:  # the machine goes down
            self.terminate("stop:shutdown", self.plan.stop_grace_seconds)
        self._reap()


def _send_signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass


def _detach(folder: str, kept: set[int]) -> None:
    """Away from whoever started us: another parent, no terminal, no descriptors, no folder."""
    if os.fork():
        os._exit(0)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                continue
    for fd in kept:
        os.set_inheritable(fd, False)
    null = os.open("/dev/null", os.O_RDWR)
    errors = os.open(os.path.join(folder, "supervisor.err"), os.O_WRONLY | os.O_CREAT, 0o600)
    for number, fd in ((0, null), (1, null), (2, errors)):
        os.dup2(fd, number)
    os.chdir("/")
    os.umask(0o077)
    sandbox.libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphans of a bare run come here


def main() -> None:
    folder, lock, ready = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _detach(folder, {lock, ready})
    try:
        plan = records.read_plan(folder)
        if plan is None or plan.v != records.PROTOCOL:
            raise records.Damaged("the plan is not one this supervisor can read")
        if records.read_state(folder) is not None:
            os.write(ready, b"known")  # a supervisor has been here: a run has one life
            return
        state = State(
            run_id=plan.run_id,
            workload_id=plan.workload_id,
            boot_id=plan.boot_id,
            phase="starting",
            runway_ns=plan.runway_ns,
            metadata=plan.metadata,
        )
        Supervisor(folder, plan, state, ready).serve()
    except BaseException:
        traceback.print_exc()
        raise
