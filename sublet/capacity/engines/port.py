"""The engines port: what every engine can do, in values.

An engine knows metal, not the domain: a *run* is one life of a workload on given devices. All calls
are idempotent by `run_id`: doing one twice is doing it once. Nothing here may be called inside
a database transaction. Instants are aware UTC; an engine that keeps deadlines keeps them on the
boot clock from the moment it is told, and never moves them earlier.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Protocol, runtime_checkable

from sublet.base.kernel.errors import Conflict, NotFound, SubletError, Unavailable

Strength = Literal["enforced", "watched", "none"]
FENCES = ("cpu", "memory", "files", "disk", "network", "processes", "devices")
STRANGERS_NEED = ("files", "processes", "network", "memory", "devices")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fence:
    """One row of a node's fence table: how strong, shown by which probe, and the way to more."""

    strength: Strength
    by: str
    evidence: str
    remedy: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What the engine can fence: a whole GPU, or a logical CPU (`kind` cpu, never called GPU)."""

    name: str
    kind: Literal["cpu", "gpu"]
    model: str
    memory_bytes: int
    healthy: bool = True
    detail: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inventory:
    """One node as the engine finds it. `memory_bytes` of a CPU device is its share of RAM."""

    node: str
    devices: tuple[Device, ...]
    disk_bytes: int
    fences: Mapping[str, Fence]
    outbound: Literal["pasta", "slirp4netns", "none"]
    boot_id: str

    def missing_for_strangers(self) -> tuple[str, ...]:
        return tuple(f for f in STRANGERS_NEED if self.fences[f].strength != "enforced")


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSpec:
    """All that an engine needs to start one run. `home` names a private persistent folder."""

    run_id: str
    workload_id: str
    organisation_id: str
    kind: Literal["instance", "job", "replica"]
    """A replica is run like a job: it ends with its command, which does not end by itself."""
    devices: tuple[str, ...]
    memory_bytes: int
    disk_bytes: int
    command: tuple[str, ...]
    """The argv of a job or a replica; empty for an instance."""
    script: str
    """Start-up script of an instance, run by /bin/sh as the tenant; may be empty."""
    env: Mapping[str, str]
    home: str
    hostname: str
    outbound: bool
    stop_grace_seconds: int
    notice_signal: str | None
    """Signal name sent to the workload at the notice, e.g. "SIGUSR1"; default none."""
    metadata: Mapping[str, Any]
    runway_until: datetime
    """Without `extend` past it, the supervisor ends the run then (`control_lost`)."""
    read_only: tuple[tuple[str, str], ...] = ()
    """Files and folders of the host that it may read: (path there, absolute path inside). Those
    without a sandbox of their own are met under the host's path, so both are best the same. What
    lies there is readable by everybody; the folders above may be closed."""
    lock_memory: bool = False
    """It keeps what it reads in `read_only` files in locked memory, in a memory file perhaps:
    refused where they are more than may be locked and the machine swaps."""


class Phase(StrEnum):
    STARTING = "starting"
    RUNNING = "running"
    """Checked by the engine: devices visible, the sandbox answers, a job's command started."""
    STOPPING = "stopping"
    """SIGTERM was sent (`term_at`)."""
    EXITED = "exited"
    """Every process of the run was seen gone; the scrub may run."""
    FAILED = "failed"
    """It never reached RUNNING and nothing of it is left; `failure` says why."""
    SILENT = "silent"
    """It was there and gives no evidence now: not the same as gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What the engine has seen of a run. All instants come from evidence, none is assumed."""

    run_id: str
    workload_id: str
    phase: Phase
    started_at: datetime | None = None
    """When it reached RUNNING: where the meter opens."""
    term_at: datetime | None = None
    """When SIGTERM was sent, by us."""
    term_reason: str | None = None
    """`notice`, `stop:<reason>`, `control_lost`, `disk`, … of that SIGTERM; None if it ended itself."""
    exited_at: datetime | None = None
    exit_code: int | None = None
    """0–255 as a shell has it: 128 + n for signal n."""
    last_evidence_at: datetime | None = None
    """Seen alive by its own supervisor at that instant: a meter never passes it."""
    deadline_at: datetime | None = None
    """The SIGTERM that a published notice has fixed."""
    runway_until: datetime | None = None
    """Where the paid runway ends that the supervisor knows of."""
    cpu_ms: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    failure: str | None = None
    scrubbed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ScrubReport:
    """Clean means checked: no process, scratch and /dev/shm empty, device memory in use ≤ 1 GiB."""

    clean: bool
    at: datetime
    findings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """An interruption as the workload sees it at the metadata endpoint."""

    term_at: datetime
    action: Literal["stop", "requeue"]
    reason: str


class EngineError(Unavailable):
    """The engine could not do this; nothing was lost and it is tried again."""

    code = "engine_error"


class RunNotFound(NotFound):
    """The engine knows no such run."""

    code = "run_not_found"


class StartRefused(Conflict):
    """The engine refuses to start this: the message names the fence or limit in the way."""

    code = "start_refused"


class NotAttachable(Conflict):
    """The workload is not running, so nothing can be attached to it: look at its state."""

    code = "not_attachable"


@runtime_checkable
class Engine(Protocol):
    """The one port. Errors: EngineError (try again), RunNotFound, StartRefused."""

    def inventory(self) -> Inventory:
        """Devices, fences (by probes, cached per boot and engine version) and network, as of now."""
        ...

    def start(self, spec: StartSpec) -> None:
        """Begin a run and return; `observe` tells how it goes. A run id known already: no effect."""
        ...

    def observe(self) -> Mapping[str, Observation]:
        """Every run the engine has a trace of, by run id. One that was never started is absent."""
        ...

    def notice(self, run_id: str, notice: Notice) -> datetime:
        """Publish an interruption and fix its SIGTERM; returns the instant of SIGTERM as fixed.

        A later `notice` never moves it earlier. The runway is extended past SIGTERM + grace.
        """
        ...

    def withdraw(self, run_id: str) -> None:
        """Take a notice back, if SIGTERM has not been sent yet."""
        ...

    def extend(self, run_id: str, until: datetime) -> None:
        """Move the end of the paid runway; a published deadline is never undercut."""
        ...

    def publish_metadata(self, run_id: str, document: Mapping[str, Any]) -> None:
        """Replace the public metadata document (not the interruption)."""
        ...

    def signal(self, run_id: str, name: str) -> None:
        """Send a signal such as "SIGUSR1" to every process of the workload."""
        ...

    def stop(self, run_id: str, *, grace_seconds: int, reason: str) -> None:
        """SIGTERM to every process now, SIGKILL after the grace."""
        ...

    def logs(self, run_id: str, *, offset: int = 0, limit: int = 1 << 16) -> tuple[bytes, int]:
        """Output from a byte offset, and the offset to go on from. Kept until `forget`."""
        ...

    def door(self, run_id: str, name: str) -> str:
        """The host's path of a file in the run's home, such as the socket it listens on. Whether
        anything is there is for the caller to find out; the path may be too long for a socket's
        address."""
        ...

    def scrub(self, run_id: str) -> ScrubReport:
        """After EXITED or FAILED: wipe scratch and shared memory, check the devices, report."""
        ...

    def forget(self, run_id: str) -> None:
        """Drop logs and evidence of a scrubbed run."""
        ...

    def erase_home(self, home: str) -> None:
        """Delete a persistent folder for good. Unknown: no effect."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SpawnSpec:
    """A process to add to a running workload. `terminal`: the fds are one pty's inner end."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    terminal: bool = False


class Spawned(Protocol):
    """A process inside a workload."""

    def wait(self) -> int:
        """Block until it ends; the exit code as a shell has it. Run it in a thread."""
        ...

    def signal(self, name: str) -> None: ...

    def close(self) -> None:
        """Hang up: the process and what it started get SIGHUP, then SIGKILL."""
        ...


@runtime_checkable
class Attachable(Protocol):
    """An optional power: reach into a running workload. Every path and port is the workload's own.

    Errors: NotAttachable, and OSError of the inner operation with its errno.
    """

    def spawn(self, run_id: str, spec: SpawnSpec, fds: Sequence[int]) -> Spawned:
        """Start a process inside, with these three fds as stdin, stdout and stderr (kept open here)."""
        ...

    def connect(self, run_id: str, host: str, port: int) -> int:
        """Open a TCP connection from inside the workload's network; returns the socket's fd."""
        ...

    def file(self, run_id: str, operation: str, *args: Any) -> Any:
        """A file operation inside, as the tenant. `open(path, flags, mode)` returns an fd;
        `stat, lstat, fstatvfs, listdir (names + stats), mkdir, rmdir, unlink, rename, readlink,
        symlink, link, chmod, utime, truncate, realpath` answer with values."""
        ...


def follow_logs(
    engine: Engine, run_id: str, *, offset: int = 0, chunks: int = 1 << 20
) -> Iterator[bytes]:
    """Read what there is, from an offset to the present end, at most `chunks` pieces."""
    for _ in range(chunks):
        data, offset = engine.logs(run_id, offset=offset)
        if not data:
            return
        yield data


__all__ = [
    "FENCES",
    "STRANGERS_NEED",
    "Attachable",
    "Device",
    "Engine",
    "EngineError",
    "Fence",
    "Inventory",
    "NotAttachable",
    "Notice",
    "Observation",
    "Phase",
    "RunNotFound",
    "ScrubReport",
    "SpawnSpec",
    "Spawned",
    "StartRefused",
    "StartSpec",
    "SubletError",
    "follow_logs",
]
