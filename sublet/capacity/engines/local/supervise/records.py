"""The files of one run: what was asked, what has become of it, and the proof of life.

A run's folder is the only thing that control plane and supervisor share, and each may be killed
at any instruction, so every file has one writer at a time and is read with doubt:

    plan.json   what to run; written once by the engine, before anything else happens
    lock        held by the supervisor as long as it lives (an open-file-description lock)
    state.json  phases, deadlines and instants; replaced whole and synced at each change
    evidence    one line, overwritten about every second: alive at this instant, used so much
    log, log.N  output, in pieces named by the offset they begin at
    control.sock  where the supervisor listens

Instants are nanoseconds of CLOCK_BOOTTIME and mean something only together with the boot id.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import struct
import time
import zlib
from dataclasses import asdict, dataclass, field, fields
from typing import Any

PROTOCOL = 1
"""Of the files and the control socket. A supervisor lives longer than the code that started it, so
who comes later reads what is older, and asks a supervisor for nothing newer than itself."""

PLAN, STATE, EVIDENCE, LOCK, SOCKET = (
    "plan.json",
    "state.json",
    "evidence",
    "lock",
    "control.sock",
)


def boot_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)  # noqa: TID251 - no kernel package in here


def boot_id() -> str:
    with open("/proc/sys/kernel/random/boot_id") as source:
        return source.read().strip()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a supervisor needs to know; instants on the boot clock of `boot_id`."""

    run_id: str
    workload_id: str
    organisation_id: str
    mark: str
    """In the environment of every process of this run, and of no other on this machine."""
    kind: str
    boot_id: str
    planned_ns: int
    planned_us: int
    """UTC at `planned_ns`, in microseconds: tells the instants of this boot after the next one."""
    devices: list[str]
    cpus: list[int]
    """Logical CPUs the run may use; empty: no pinning."""
    cpu_percent: int
    """Of one CPU, as a quota where there is a cgroup; 0: none."""
    gpus: list[int]
    """Minor numbers of the GPUs whose nodes are bound."""
    gpu_ids: list[str]
    memory_bytes: int
    disk_bytes: int
    disk_share_bytes: int
    disk_reserve_bytes: int
    pids: int
    command: list[str]
    script: str
    env: dict[str, str]
    home: str
    scratch: str
    hostname: str
    uid: int | None
    """The host uid the tenant gets; None: the engine's own (no root)."""
    stop_grace_seconds: int
    notice_signal: str | None
    metadata: dict[str, Any]
    runway_ns: int
    log_bytes: int
    rung: str
    """`sandbox` (bubblewrap) or `bare` (a session of its own, for trusted tenants)."""
    bubblewrap: str
    cgroups: dict[str, str]
    """Folder of this run by controller; empty: no cgroup."""
    own_network: bool
    seccomp: bool
    outbound: str
    """`pasta`, `slirp4netns` or `none`."""
    blocked_routes: list[str]
    """Networks that the way out does not lead to, beside the host's own addresses."""
    python: str
    read_only: list[list[str]] = field(default_factory=list)
    """Pairs of a path of the host and the path inside."""
    lock_memory: bool = False
    v: int = PROTOCOL


@dataclass(kw_only=True)
class State:
    """What has become of a run. `phase` is one of the port's words, without `silent`."""

    run_id: str
    workload_id: str
    boot_id: str
    phase: str
    runway_ns: int
    started_ns: int | None = None
    term_ns: int | None = None
    term_reason: str | None = None
    kill_ns: int | None = None
    exited_ns: int | None = None
    exit_code: int | None = None
    deadline_ns: int | None = None
    notice: dict[str, Any] | None = None
    """`action`, `reason` and `time` (UTC, as it was published)."""
    failure: str | None = None
    cpu_ms: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    init_pid: int | None = None
    init_ticks: int | None = None
    """When it was started, as /proc says: tells it from a later process with its number."""
    metadata: dict[str, Any] = field(default_factory=dict)
    metadata_url: str = ""
    changed_ns: int = 0
    scrubbed_ns: int | None = None
    v: int = PROTOCOL

    @property
    def is_over(self) -> bool:
        return self.phase in ("exited", "failed")


class Damaged(Exception):
    """A file of a run cannot be read for what it should be."""


def read_plan(folder: str) -> Plan | None:
    """The plan, or None where none was written. Raises Damaged."""
    data = _read_json(os.path.join(folder, PLAN))
    return None if data is None else _build(Plan, data)


def read_state(folder: str) -> State | None:
    """The state, or None where no supervisor has written one. Raises Damaged."""
    data = _read_json(os.path.join(folder, STATE))
    return None if data is None else _build(State, data)


def write_plan(folder: str, plan: Plan) -> None:
    write_whole(folder, PLAN, json.dumps(asdict(plan)).encode())


def write_state(folder: str, state: State) -> None:
    state.changed_ns = boot_ns()
    write_whole(folder, STATE, json.dumps(asdict(state)).encode())


def write_whole(folder: str, name: str, data: bytes) -> None:
    """Replace a file so that a reader, or a power cut, meets the old one or the new one."""
    path = os.path.join(folder, name)
    passing = f"{path}.{os.getpid()}.new"
    fd = os.open(passing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(fd, "wb") as sink:
            sink.write(data)
            sink.flush()
            os.fsync(sink.fileno())
        os.replace(passing, path)
    except BaseException:
        os.unlink(passing)
        raise
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read_json(path: str) -> Any:
    try:
        with open(path, "rb") as source:
            return json.loads(source.read(1 << 22))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise Damaged(f"{os.path.basename(path)}: {error}") from None


def _build(cls: Any, data: Any) -> Any:
    """Unknown fields of a newer writer are left out; a missing one is damage."""
    if not isinstance(data, dict):
        raise Damaged(f"{cls.__name__}: not an object")
    names = {item.name for item in fields(cls)}
    try:
        return cls(**{name: value for name, value in data.items() if name in names})
    except TypeError as error:
        raise Damaged(str(error)) from None


# The proof of life. One line of fixed width, written in place: it costs no sync, survives the
# death of every process, and a torn one is told by its checksum. After a power cut what the
# kernel had not written is missing: then the run is billed for less, never for more.

_WIDTH = 96


@dataclass(frozen=True)
class Evidence:
    at_ns: int
    cpu_ms: int
    memory_bytes: int
    disk_bytes: int


def open_evidence(folder: str) -> int:
    return os.open(os.path.join(folder, EVIDENCE), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def write_evidence(fd: int, evidence: Evidence) -> None:
    text = (
        f"{evidence.at_ns} {evidence.cpu_ms} {evidence.memory_bytes} {evidence.disk_bytes}".encode()
    )
    line = b"%s %08x" % (text, zlib.crc32(text))
    os.pwrite(fd, line.ljust(_WIDTH - 1) + b"\n", 0)


def read_evidence(folder: str) -> Evidence | None:
    path = os.path.join(folder, EVIDENCE)
    for _ in range(3):  # a torn read is rare and the next one is whole
        try:
            with open(path, "rb") as source:
                text, _, check = source.read(_WIDTH).strip().rpartition(b" ")
        except OSError:
            return None
        try:
            if int(check, 16) == zlib.crc32(text):
                return Evidence(*(int(number) for number in text.split()))
        except (ValueError, TypeError):
            continue
    return None


# The lock. An open-file-description lock passes from the engine to the supervisor through fork
# and exec, so there is no moment between "meant to start" and "ended" at which nobody holds it;
# and F_OFD_GETLK can ask about it without taking it.

_FLOCK = "hhqqi0q"


def _lock_request() -> bytes:
    return struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)


def open_lock(folder: str) -> int:
    return os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def take_lock(fd: int) -> bool:
    """Try to hold the run. It is let go when the last copy of this descriptor is closed."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock_request())
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def is_locked(folder: str) -> bool:
    try:
        fd = os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock_request())
    finally:
        os.close(fd)
    return bool(struct.unpack(_FLOCK, answer)[0] != fcntl.F_UNLCK)
