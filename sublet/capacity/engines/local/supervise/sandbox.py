"""How a run's first process is started: by bubblewrap in namespaces of its own, or bare.

As root the child gives up root before bubblewrap runs, to a host uid that belongs to the run's
home alone, so even a hole in the namespaces ends at somebody without rights. That uid may not be
able to walk to the data folder (a home of mode 0700 is common), so home and scratch are first
bound to a place everyone can reach, in a mount namespace that only this child sees. As an
ordinary user the tenant has that user's uid outside, and a user namespace is the wall.

GPUs: only the nodes of the run's own devices and the driver's control nodes are bound. This part
follows the driver's documentation and has not been tried on a machine with GPUs by its tests.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import signal
import socket
import stat
from collections.abc import Iterable
from dataclasses import dataclass

from . import cgroups, seccomp, usage
from .records import Plan

TENANT_ID = 1000
HOME, SCRATCH = "/home/tenant", "/scratch"
INIT = "/etc/sublet/init.py"
_NEWNS = 0x20000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_SLAVE = 2, 4, 4096, 0x4000, 0x80000
_PR_SET_PDEATHSIG = 1
CONTROL_NODES = (
    "/dev/nvidiactl",
    "/dev/nvidia-uvm",
    "/dev/nvidia-uvm-tools",
    "/dev/nvidia-modeset",
)
_SHARED_ETC = (
    "/etc/alternatives",
    "/etc/ld.so.cache",
    "/etc/ld.so.conf",
    "/etc/ld.so.conf.d",
    "/etc/localtime",
    "/etc/protocols",
    "/etc/services",
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/ca-certificates",
    "/etc/pki/tls/certs",
    "/etc/pki/ca-trust/extracted",
)
_VOLATILE_RUN_BYTES = 16 << 20

libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Places:
    """Paths as the workload sees them."""

    home: str
    scratch: str


@dataclass(frozen=True)
class Launched:
    pid: int
    control: socket.socket
    info: int
    """Where bubblewrap says the host's pid of process 1; -1 without a sandbox."""
    errors: int
    """A memory file with what was said on stderr."""


def places(plan: Plan) -> Places:
    if plan.rung == "sandbox":
        return Places(HOME, SCRATCH)
    if plan.uid is not None:
        stage = _stage()
        return Places(f"{stage}/home", f"{stage}/scratch")
    return Places(plan.home, plan.scratch)


def launch(plan: Plan, init_source: bytes, resolver: str | None) -> Launched:
    """Fork the run's first process, in its cgroup and with its limits. Raises OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    info, tell_info = os.pipe2(os.O_CLOEXEC)
    errors = os.memfd_create("errors", os.MFD_CLOEXEC)
    files = {INIT: init_source}
    for name, text in _etc(plan, resolver).items():
        files[f"/etc/{name}"] = text.encode()
    kept = {path: _memory_file(data) for path, data in files.items()}
    filter_fd = -1
    if plan.seccomp:
        pin = bool(plan.cpus) and "cpuset" not in plan.cgroups
        filter_fd = _memory_file(seccomp.program(pin_affinity=pin))
    limit = process_limit(plan)
    if plan.rung == "sandbox":
        nodes = [f"/dev/nvidia{minor}" for minor in plan.gpus]
        argv = _bwrap(plan, kept, theirs.fileno(), tell_info, filter_fd, limit, nodes)
    else:
        script = f"/proc/self/fd/{kept[INIT]}"
        argv = [plan.python, "-I", "-S", script, str(theirs.fileno()), "bare", str(limit), ""]
    pid = os.fork()
    if pid == 0:
        _child(plan, argv, errors, [theirs.fileno(), tell_info, filter_fd, *kept.values()])
    theirs.close()
    for fd in (tell_info, filter_fd, *kept.values()):
        if fd >= 0:
            os.close(fd)
    if plan.rung != "sandbox":
        os.close(info)
        info = -1
    return Launched(pid, ours, info, errors)


def _child(plan: Plan, argv: list[str], errors: int, kept: Iterable[int]) -> None:
    """In the fork: limits first, then privileges away, then the program. Never returns."""
    try:
        os.dup2(errors, 1)
        os.dup2(errors, 2)
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        if plan.cgroups:
            cgroups.join(plan.cgroups)
        if plan.cpus:
            os.sched_setaffinity(0, plan.cpus)
        _set_limits(plan)
        write_oom_adjust("0")
        if plan.uid is not None:
            _stage_folders(plan)
            if plan.rung != "sandbox":
                _open_ways([source for source, _ in plan.read_only])
            os.setgroups([])
            os.setresgid(plan.uid, plan.uid, plan.uid)
            os.setresuid(plan.uid, plan.uid, plan.uid)
            os.chdir("/")
        if plan.rung != "sandbox":
            os.setsid()
            os.chdir(places(plan).home)
        for fd in kept:
            if fd >= 0:
                os.set_inheritable(fd, True)
        os.execvpe(argv[0], argv, {"PATH": _PATH, usage.MARK: plan.mark})
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(125)


_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"


def _set_limits(plan: Plan) -> None:
    limits = {
        resource.RLIMIT_CORE: 0,
        # A memory file counts as a file here, and what is locked may lie in one.
        resource.RLIMIT_FSIZE: max(plan.disk_bytes, plan.memory_bytes if plan.lock_memory else 0),
        resource.RLIMIT_NOFILE: 65_536,
    }
    if "memory" not in plan.cgroups and not plan.gpus:
        # Not the address space: programs reserve far more of it than they ever use. What is
        # written to counts here, process by process; the watcher adds them up.
        limits[resource.RLIMIT_DATA] = plan.memory_bytes
    for name, wanted in limits.items():
        _, hard = resource.getrlimit(name)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(name, (value, value))
    if plan.lock_memory:
        _let_lock(plan.memory_bytes)


def _let_lock(wanted: int) -> None:
    """All that the run may use; where that takes more power than we have, what we may."""
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (wanted, wanted))
    except (ValueError, OSError):
        _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))


def process_limit(plan: Plan) -> int:
    """RLIMIT_NPROC for inside, where no cgroup counts processes; 0: none needed.

    Since Linux 5.14 it counts per user namespace. Before, and without a namespace, it counts all
    of the uid's processes on the host, so those that are there already come on top.
    """
    if "pids" in plan.cgroups:
        return 0
    release = re.match(r"(\d+)\.(\d+)", os.uname().release)
    kernel = (int(release[1]), int(release[2])) if release else (0, 0)
    if plan.rung == "sandbox" and kernel >= (5, 14):
        return plan.pids
    uid = os.geteuid() if plan.uid is None else plan.uid
    here = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == uid:
                    here += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue
    return plan.pids + here


def write_oom_adjust(value: str) -> None:
    try:
        with open("/proc/self/oom_score_adj", "w") as sink:
            sink.write(value)
    except OSError:
        pass


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _stage() -> str:
    return next((path for path in ("/mnt", "/media", "/srv") if os.path.isdir(path)), "/tmp")  # noqa: S108


def _stage_folders(plan: Plan) -> None:
    stage = _stage()
    _own_mounts()
    _check(
        libc.mount(b"tmpfs", stage.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"mode=0755,size=1m")
    )
    shown = [("home", plan.home), ("scratch", plan.scratch)]
    if plan.rung == "sandbox":
        shown += [(_staged(number), source) for number, (source, _) in enumerate(plan.read_only)]
    for name, source in shown:
        _bind(source, f"{stage}/{name}")


def _staged(number: int) -> str:
    return f"shown-{number}"


def _bind(source: str, target: str) -> None:
    """Let a file or a folder be met at a place made for it."""
    if not os.path.exists(target):
        is_folder = os.path.isdir(source)
        os.makedirs(target if is_folder else os.path.dirname(target), mode=0o755, exist_ok=True)
        if not is_folder:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644))
    _check(libc.mount(os.fsencode(source), os.fsencode(target), None, _MS_BIND, None))


def _open_ways(paths: list[str]) -> None:
    """Without a sandbox what is shown lies where it lies, perhaps under a folder that is closed to
    the run's uid. Such a folder is covered by an empty one with nothing in it but the way there:
    of the rest that uid could see nothing before either."""
    os.umask(0o022)
    held = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in paths}
    covered: set[str] = set()
    for path, fd in held.items():
        above = _closed_above(path)
        if above is not None:
            options = b"mode=0755,size=1m"
            _check(libc.mount(b"tmpfs", os.fsencode(above), b"tmpfs", _MS_NOSUID, options))
            covered.add(above)
        if any(path.startswith(f"{folder}/") for folder in covered):
            _bind(f"/proc/self/fd/{fd}", path)
    for fd in held.values():
        os.close(fd)


def _closed_above(path: str) -> str | None:
    """The first folder on the way to it that not everybody may pass through."""
    parts = path.split("/")
    for end in range(2, len(parts)):
        folder = "/".join(parts[:end])
        if not os.path.isdir(folder):
            return None
        if not os.stat(folder).st_mode & 0o001:
            return folder
    return None


def _own_mounts() -> None:
    """A mount namespace of this process's own: what it mounts, nobody else sees."""
    _check(libc.unshare(_NEWNS))
    _check(libc.mount(None, b"/", None, _MS_REC | _MS_SLAVE, None))


def prepare_helper(user_namespace: int) -> str:
    """As root, before a network helper gives up root: what it needs and could not open itself.

    Many machines keep /dev/net/tun for root. What it takes to use it is power over a network
    namespace, which the helper has over the sandbox's and no other. Returns a path to the user
    namespace, in mounts that only this process sees.
    """
    _own_mounts()
    _check(libc.mount(b"tmpfs", b"/dev/net", b"tmpfs", _MS_NOSUID, b"mode=0755,size=64k"))
    os.mknod("/dev/net/tun", 0o600 | stat.S_IFCHR, os.makedev(10, 200))
    os.chmod("/dev/net/tun", 0o666)  # noqa: S103
    path = "/dev/net/user"
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))
    source = f"/proc/self/fd/{user_namespace}"
    _check(libc.mount(source.encode(), path.encode(), None, _MS_BIND, None))
    return path


def die_with(parent: int) -> None:
    """For helpers forked by the supervisor: end when it does, also if it just did."""
    _check(libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    if os.getppid() != parent:
        os._exit(1)


def _memory_file(data: bytes) -> int:
    fd = os.memfd_create("sublet", os.MFD_CLOEXEC)
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _bwrap(
    plan: Plan,
    files: dict[str, int],
    control: int,
    info: int,
    filter_fd: int,
    limit: int,
    nodes: list[str],
) -> list[str]:
    stage = _stage()
    home = f"{stage}/home" if plan.uid is not None else plan.home
    scratch = f"{stage}/scratch" if plan.uid is not None else plan.scratch
    half = max(plan.memory_bytes // 2, 1 << 20)
    argv = [plan.bubblewrap, "--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts"]
    argv += ["--unshare-cgroup-try", "--disable-userns"]
    if plan.own_network:
        argv += ["--unshare-net"]
    argv += ["--uid", str(TENANT_ID), "--gid", str(TENANT_ID), "--hostname", plan.hostname]
    argv += ["--cap-drop", "ALL", "--die-with-parent", "--new-session", "--as-pid-1"]
    argv += ["--clearenv", "--setenv", "PATH", _PATH, "--setenv", usage.MARK, plan.mark]
    argv += ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if os.path.islink(f"/{name}"):
            argv += ["--symlink", f"usr/{name}", f"/{name}"]
        elif os.path.isdir(f"/{name}"):
            argv += ["--ro-bind", f"/{name}", f"/{name}"]
    for path in _SHARED_ETC:
        argv += ["--ro-bind-try", path, path]
    for path, fd in files.items():
        argv += ["--perms", "0444", "--file", str(fd), path]
    argv += ["--proc", "/proc", "--dev", "/dev"]
    if nodes:
        for node in (*nodes, *CONTROL_NODES):
            argv += ["--dev-bind-try", node, node]
        argv += ["--ro-bind-try", "/sys/bus/pci", "/sys/bus/pci"]
        argv += ["--ro-bind-try", "/sys/devices", "/sys/devices"]
    argv += ["--perms", "1777", "--size", str(half), "--tmpfs", "/dev/shm"]  # noqa: S108
    argv += ["--remount-ro", "/dev"]
    argv += ["--perms", "1777", "--size", str(half), "--tmpfs", "/tmp"]  # noqa: S108
    argv += ["--perms", "0755", "--size", str(_VOLATILE_RUN_BYTES), "--tmpfs", "/run"]
    argv += ["--dir", "/var", "--symlink", "/tmp", "/var/tmp", "--symlink", "/run", "/var/run"]  # noqa: S108
    argv += ["--bind", home, HOME, "--bind", scratch, SCRATCH]
    for number, (source, target) in enumerate(plan.read_only):
        shown = f"{stage}/{_staged(number)}" if plan.uid is not None else source
        argv += ["--ro-bind", shown, target]
    argv += ["--remount-ro", "/"]
    argv += ["--chdir", HOME, "--info-fd", str(info)]
    if filter_fd >= 0:
        argv += ["--seccomp", str(filter_fd)]
    argv += ["--", plan.python, "-I", "-S", INIT]
    return [*argv, str(control), "sandbox", str(limit), ",".join(nodes)]


def _etc(plan: Plan, resolver: str | None) -> dict[str, str]:
    shell = "/bin/bash" if os.path.exists("/usr/bin/bash") else "/bin/sh"
    files = {
        "passwd": (
            "root:x:0:0:root:/:/usr/sbin/nologin\n"
            f"tenant:x:{TENANT_ID}:{TENANT_ID}:tenant:{HOME}:{shell}\n"
            "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n"
        ),
        "group": f"root:x:0:\ntenant:x:{TENANT_ID}:\nnogroup:x:65534:\n",
        "hosts": f"127.0.0.1 localhost {plan.hostname}\n::1 localhost\n",
        "hostname": f"{plan.hostname}\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    }
    if resolver is not None:
        files["resolv.conf"] = f"nameserver {resolver}\n"
    return files
