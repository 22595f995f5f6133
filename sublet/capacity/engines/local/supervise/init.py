"""Process 1 of a sandbox: starts, reaps and reports processes, opens files and connections.

It runs inside, as the tenant, with nothing the tenant has not: whoever takes it over gains no
power but that over their own workload, and the supervisor believes none of it beyond that. It is
not dumpable, so that a tenant's process cannot read its memory or reach its control channel by
/proc. One file, standard library, Python 3.9: it is copied into the sandbox and run by the
Python found there. `bare` is the mode without a sandbox: a subreaper instead of process 1.

Arguments: descriptor of the control channel, mode (`sandbox` or `bare`), process limit (0: none),
GPU nodes that must be there (comma separated).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import resource
import selectors
import signal
import socket
import stat
import sys
import termios
import time

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes as long to import as half of what is above
    from collections.abc import Callable, Iterable, Sequence
    from typing import Any, NoReturn

LARGEST = 128 * 1024
PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 4, 36
HANG_UP_SECONDS = 1.0
CONNECT_SECONDS = 15
MOST_CONNECTING = 64
VOLATILE = ("/tmp", "/run", "/dev/shm")  # noqa: S108 - the sandbox's own, which live in memory
TENANT_OOM_ADJ = b"300"  # the kernel then ends a tenant's process first, and init reports it


class Init:
    def __init__(self, control_fd: int, bare: bool) -> None:
        self.control = socket.socket(fileno=control_fd)
        self.bare = bare
        self.spawned: dict[int, int] = {}  # pid -> id of the request that started it
        self.running: dict[int, int] = {}  # id -> pid
        self.connecting: set[int] = set()
        self.draining = False
        self.hang_ups: list[tuple[float, int]] = []  # when, session
        self.proc_dev = os.stat("/proc").st_dev

    # -- the loop

    def serve(self, wakeup: int) -> NoReturn:
        selector = selectors.DefaultSelector()
        selector.register(self.control, selectors.EVENT_READ)
        selector.register(wakeup, selectors.EVENT_READ)
        while True:
            pause = None
            if self.hang_ups:
                pause = max(0.0, self.hang_ups[0][0] - time.monotonic())
            for key, _ in selector.select(pause):
                if key.fileobj is self.control:
                    self.receive()
                else:
                    os.read(wakeup, 4096)
                    self.reap()
            while self.hang_ups and self.hang_ups[0][0] <= time.monotonic():
                self.signal_session(self.hang_ups.pop(0)[1], signal.SIGKILL)

    def receive(self) -> None:
        data, fds, _, _ = socket.recv_fds(self.control, LARGEST, 4)
        for fd in fds:
            # The flag for it is dropped by Python's recv_fds (seen in 3.11). A program that kept a
            # writing end beside its own output would hold its session open as long as it lives.
            os.set_inheritable(fd, False)
        if not data:
            self.end()
        request = json.loads(data)
        try:
            self.answer(request, fds)
        except OSError as error:
            self.reply(request, errno=error.errno or errno.EIO)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            self.reply(request, errno=errno.EINVAL, detail=str(error))
        finally:
            for fd in fds:
                os.close(fd)

    def answer(self, request: dict[str, Any], fds: Sequence[int]) -> None:
        op = request["op"]
        if op == "spawn":
            self.spawn(request, fds)
        elif op == "file":
            self.file(request)
        elif op == "connect":
            self.connect(request)
        elif op == "signal":
            self.signal(request)
        elif op == "hangup":
            self.hang_up(request["to"])
        elif op == "drain":
            self.draining = True
            self.reap()
        else:
            self.reply(request, errno=errno.ENOSYS)

    def send(self, message: dict[str, Any], fds: Iterable[int] = ()) -> None:
        data = json.dumps(message, separators=(",", ":")).encode("ascii")
        socket.send_fds(self.control, [data], list(fds))

    def reply(self, request: dict[str, Any], fds: Iterable[int] = (), **fields: Any) -> None:
        fields["id"] = request.get("id")
        try:
            self.send(fields, fds)
        except OSError:
            self.send({"id": request.get("id"), "errno": errno.EMSGSIZE})

    def end(self) -> NoReturn:
        """The supervisor is gone: nothing here may outlive it."""
        for _ in range(50 if self.bare else 1):
            self.signal_all(signal.SIGKILL)
            if not self.bare or not descendants(os.getpid()):
                break
            time.sleep(0.02)
        os._exit(0)

    # -- processes

    def spawn(self, request: dict[str, Any], fds: Sequence[int]) -> None:
        if len(fds) != 3:
            raise OSError(errno.EINVAL, "three descriptors are needed")
        started, tell = os.pipe()
        pid = os.fork()
        if pid == 0:
            become(request, fds, tell)
        os.close(tell)
        self.spawned[pid] = request["id"]
        self.running[request["id"]] = pid
        failure = os.read(started, 64)  # nothing: closed by a successful exec
        os.close(started)
        if failure:
            os.waitpid(pid, 0)
            del self.spawned[pid], self.running[request["id"]]
            self.reply(request, errno=int(failure))
        else:
            self.reply(request, ok=True)

    def reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                if self.draining:
                    self.draining = False
                    self.send({"event": "empty"})
                return
            if pid == 0:
                return
            self.connecting.discard(pid)
            ident = self.spawned.pop(pid, None)
            if ident is not None:
                self.running.pop(ident, None)
                code = os.waitstatus_to_exitcode(status)
                self.send({"event": "exit", "of": ident, "code": code if code >= 0 else 128 - code})

    def signal(self, request: dict[str, Any]) -> None:
        number = int(request["signum"])
        if request.get("to") is None:
            self.signal_all(number)
            if number == signal.SIGTERM:  # a stopped process would not notice it
                self.signal_all(signal.SIGCONT)
        elif request["to"] in self.running:
            os.killpg(self.running[request["to"]], number)
        self.reply(request, ok=True)

    def signal_all(self, number: int) -> None:
        if self.bare:
            for pid in descendants(os.getpid()):
                send_signal(pid, number)
        else:
            send_signal(-1, number)  # from process 1: everyone else, and nobody forks meanwhile

    def hang_up(self, ident: int) -> None:
        session = self.running.get(ident)
        if session is not None:
            self.signal_session(session, signal.SIGHUP)
            self.signal_session(session, signal.SIGCONT)
            self.hang_ups.append((time.monotonic() + HANG_UP_SECONDS, session))

    def signal_session(self, session: int, number: int) -> None:
        for pid, (_, its_session) in processes().items():
            if its_session == session:
                send_signal(pid, number)

    # -- the network

    def connect(self, request: dict[str, Any]) -> None:
        if len(self.connecting) >= MOST_CONNECTING:
            raise OSError(errno.EAGAIN, "too many connections are being opened")
        host, port = str(request["host"]), int(request["port"])
        pid = os.fork()  # names are resolved and peers waited for: not by process 1
        if pid:
            self.connecting.add(pid)
            return
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(CONNECT_SECONDS + 5)
        try:
            peer = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
            peer.setblocking(True)
            self.reply(request, [peer.fileno()], ok=True)
        except socket.gaierror:
            self.reply(request, errno=errno.EHOSTUNREACH)
        except socket.timeout:  # noqa: UP041 - its own class before Python 3.10
            self.reply(request, errno=errno.ETIMEDOUT)
        except OSError as error:
            self.reply(request, errno=error.errno or errno.EIO)
        finally:
            os._exit(0)

    # -- files

    def file(self, request: dict[str, Any]) -> None:
        operation, args = request["operation"], request["args"]
        if operation == "open":
            fd = self.open(*args)
            try:
                self.reply(request, [fd], ok=True)
            finally:
                os.close(fd)
        elif operation == "listdir":
            self.listdir(request, *args)
        elif operation in FILE_OPERATIONS:
            self.reply(request, ok=True, value=FILE_OPERATIONS[operation](*args))
        else:
            raise OSError(errno.ENOSYS, operation)

    def open(self, path: str, flags: int, mode: int) -> int:
        """A regular file or /dev/null: whoever gets the descriptor must never wait on it."""
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, mode)
        found = os.fstat(fd)
        plain = stat.S_ISREG(found.st_mode) and found.st_dev != self.proc_dev
        null = stat.S_ISCHR(found.st_mode) and found.st_rdev == os.makedev(1, 3)
        if not plain and not null:
            os.close(fd)
            wrong = errno.EISDIR if stat.S_ISDIR(found.st_mode) else errno.EACCES
            raise OSError(wrong, os.strerror(wrong))
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        return fd

    def listdir(self, request: dict[str, Any], path: str) -> None:
        batch: list[Any] = []
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    batch.append([entry.name, numbers(entry.stat(follow_symlinks=False))])
                except FileNotFoundError:
                    continue
                if len(batch) == 200:  # a name has at most 255 bytes, six characters each in JSON
                    self.reply(request, ok=True, value=batch, more=True)
                    batch = []
        self.reply(request, ok=True, value=batch)


def numbers(found: os.stat_result) -> list[int]:
    return [
        *found[:7],
        found.st_atime_ns,
        found.st_mtime_ns,
        found.st_ctime_ns,
    ]


FILE_OPERATIONS: dict[str, Callable[..., Any]] = {
    "stat": lambda path: numbers(os.stat(path)),
    "lstat": lambda path: numbers(os.lstat(path)),
    "fstatvfs": lambda path: list(os.statvfs(path)),
    "mkdir": lambda path, mode=0o777: os.mkdir(path, mode),
    "rmdir": os.rmdir,
    "unlink": os.unlink,
    "rename": os.rename,
    "readlink": os.readlink,
    "symlink": os.symlink,
    "link": os.link,
    "chmod": os.chmod,
    "utime": lambda path, atime_ns, mtime_ns: os.utime(path, ns=(atime_ns, mtime_ns)),
    "truncate": os.truncate,
    "realpath": os.path.realpath,
}


def become(request: dict[str, Any], fds: Sequence[int], tell: int) -> NoReturn:
    """In the forked child: turn into the program asked for, or say the errno and end."""
    code = 126
    try:
        os.setsid()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        if request.get("terminal"):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number in range(1, signal.NSIG):
            if number not in (signal.SIGKILL, signal.SIGSTOP):
                try:
                    signal.signal(number, signal.SIG_DFL)
                except (OSError, ValueError):
                    continue  # 32 and 33 belong to the C library
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        os.umask(0o022)
        try:
            with open("/proc/self/oom_score_adj", "wb") as sink:
                sink.write(TENANT_OOM_ADJ)
        except OSError:
            pass
        os.chdir(request["cwd"])
        argv = [os.fsencode(word) for word in request["argv"]]
        env = {os.fsencode(k): os.fsencode(v) for k, v in request["env"].items()}
        os.execvpe(argv[0], argv, env)  # every other descriptor closes on exec
    except OSError as error:
        code = 127 if error.errno == errno.ENOENT else 126
        os.write(tell, b"%d" % (error.errno or errno.EIO))
    except BaseException:
        os.write(tell, b"%d" % errno.EINVAL)
    finally:
        os._exit(code)


def processes() -> dict[int, tuple[int, int]]:
    """Every process seen in /proc: pid -> (parent, session)."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open("/proc/" + name + "/stat", "rb") as source:
                    words = source.read().rpartition(b")")[2].split()
            except OSError:
                continue
            found[int(name)] = (int(words[1]), int(words[3]))
    return found


def descendants(root: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for pid, (parent, _) in processes().items():
        children.setdefault(parent, []).append(pid)
    found: list[int] = []
    queue = [root]
    while queue:
        below = children.get(queue.pop(), [])
        found.extend(below)
        queue.extend(below)
    return found


def send_signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def main() -> None:
    control_fd, mode, limit, nodes = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
    bare = mode == "bare"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if bare:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != control_fd:
            with contextlib.suppress(OSError):
                os.close(int(name))
    os.set_inheritable(control_fd, False)
    os.umask(0o022)
    if limit:
        resource.setrlimit(resource.RLIMIT_NPROC, (limit, limit))
    wakeup, poke = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(poke, warn_on_full_buffer=False)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGTTOU, signal.SIGTTIN):
        signal.signal(number, signal.SIG_IGN)
    init = Init(control_fd, bare)
    paths = () if bare else VOLATILE
    volatile = [os.open(path, os.O_PATH | os.O_DIRECTORY) for path in paths]
    init.send(
        {
            "event": "hello",
            "pid": os.getpid(),
            "cpus": sorted(os.sched_getaffinity(0)),
            "missing": [n for n in nodes.split(",") if n and not os.path.exists(n)],
        },
        volatile,
    )
    for fd in volatile:
        os.close(fd)
    init.serve(wakeup)


if __name__ == "__main__":
    main()
