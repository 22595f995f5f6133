"""From what is asked to what the supervisor is told: the rules of this machine.

What the machine can do is found once, when the engine is made: bubblewrap, cgroups, filters,
a way out. A plan then says it all in plain values, so that the supervisor decides nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sublet.base.kernel.clock import Clock
from sublet.base.kernel.interval import micros_since_epoch
from sublet.capacity.engines.local.hardware import Hardware
from sublet.capacity.engines.local.reading import (
    check_lockable,
    checked_paths,
    most_locked,
    swaps,
)
from sublet.capacity.engines.local.supervise import addresses, cgroups, records, seccomp
from sublet.capacity.engines.port import StartRefused, StartSpec

PYTHON = "/usr/bin/python3"
"""The one inside the sandbox, where /usr is the host's."""
LEAST_MEMORY_BYTES = 48 << 20
"""The init inside takes some 12 MiB of it."""
BUBBLEWRAP_REMEDY = "apt-get install bubblewrap"
_HOST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")
_TUNNEL = "/dev/net/tun"

Outbound = Literal["pasta", "slirp4netns", "none"]


@dataclass(frozen=True)
class Rules:
    name: str
    """Of this installation on this machine: two may know a run by the same id."""
    trusted: bool
    without: frozenset[str]
    bubblewrap: str | None
    """Its path, where it is installed."""
    has_python: bool
    has_seccomp: bool
    cgroup_bases: dict[str, str]
    outbound: Outbound
    log_bytes: int
    disk_reserve_bytes: int
    pids: int | None = None
    """Processes and threads a run may have; None: by its devices."""
    is_exclusive: bool = True
    """One live run per device, home and workload. Only probes share."""

    @classmethod
    def found(
        cls,
        root: Path,
        *,
        trusted: bool,
        without: frozenset[str],
        log_bytes: int,
        disk_reserve_bytes: int | None,
    ) -> Rules:
        name = f"sublet-{hashlib.sha256(os.fsencode(root)).hexdigest()[:12]}"
        bases = {} if "cgroup" in without else cgroups.find(name)
        cgroups.remove({key: os.path.join(base, "none") for key, base in bases.items()})
        volume = os.statvfs(root)
        size = volume.f_blocks * volume.f_frsize
        return cls(
            name=name,
            trusted=trusted,
            without=without,
            bubblewrap=None if "bubblewrap" in without else shutil.which("bwrap"),
            has_python=os.access(PYTHON, os.X_OK),
            has_seccomp="seccomp" not in without and seccomp.is_supported(),
            cgroup_bases=bases,
            outbound=_way_out(without),
            log_bytes=log_bytes,
            disk_reserve_bytes=(
                min(size // 20, 10 << 30) if disk_reserve_bytes is None else disk_reserve_bytes
            ),
        )

    @property
    def rung(self) -> str:
        return "bare" if self.bubblewrap is None else "sandbox"

    def shown(self) -> dict[str, object]:
        """What of them decides how strong a fence is."""
        return {
            "rung": self.rung,
            "trusted": self.trusted,
            "seccomp": self.has_seccomp,
            "controllers": sorted(self.cgroup_bases),
            "outbound": self.outbound,
            "without": sorted(self.without),
        }

    def check_rung(self) -> None:
        """Raises StartRefused where nothing can be started, naming the way."""
        if not self.has_python:
            raise StartRefused(f"{PYTHON} is missing: apt-get install python3")
        if self.bubblewrap is None and not self.trusted:
            raise StartRefused(
                f"bubblewrap is missing, so workloads cannot be fenced: {BUBBLEWRAP_REMEDY}"
            )

    def plan(
        self,
        spec: StartSpec,
        found: Hardware,
        *,
        clock: Clock,
        home: str,
        scratch: str,
        disk_bytes: int,
    ) -> records.Plan:
        """`disk_bytes` is what all runs together may use. Raises StartRefused."""
        devices = {device.name: device for device in found.devices}
        unknown = [name for name in spec.devices if name not in devices]
        if unknown or not spec.devices:
            raise StartRefused(f"no such devices here: {', '.join(unknown) or 'none was named'}")
        if spec.memory_bytes < LEAST_MEMORY_BYTES:
            raise StartRefused(f"a run needs at least {LEAST_MEMORY_BYTES} bytes of memory")
        if not _HOST_NAME.fullmatch(spec.hostname):
            raise StartRefused(f"{spec.hostname!r} is no host name")
        if spec.kind != "instance" and not spec.command:
            raise StartRefused(f"a {spec.kind} needs a command")
        if spec.notice_signal is not None and spec.notice_signal not in signal.Signals.__members__:
            raise StartRefused(f"there is no signal {spec.notice_signal}")
        read_only = checked_paths(spec.read_only, has_sandbox=self.rung == "sandbox")
        if spec.lock_memory:
            check_lockable(spec.read_only, most=most_locked(), swaps=swaps())
        gpus = [gpu for gpu in found.gpus if gpu.name in spec.devices]
        count = len(spec.devices)
        cpus = [int(name[3:]) for name in spec.devices if devices[name].kind == "cpu"]
        share = len(found.cpus) * 100 * count // len(found.devices)
        now_ns = clock.boot_ns()
        return records.Plan(
            run_id=spec.run_id,
            workload_id=spec.workload_id,
            organisation_id=spec.organisation_id,
            kind=spec.kind,
            boot_id=clock.boot_id(),
            planned_ns=now_ns,
            planned_us=micros_since_epoch(clock.from_boot_ns(now_ns)),
            mark=f"{self.name}.{spec.run_id}",
            devices=list(spec.devices),
            cpus=sorted(cpus),
            cpu_percent=100 * count if cpus else share,
            gpus=[gpu.minor for gpu in gpus],
            gpu_ids=[gpu.uuid for gpu in gpus],
            memory_bytes=spec.memory_bytes,
            disk_bytes=spec.disk_bytes,
            disk_share_bytes=min(spec.disk_bytes, disk_bytes * count // len(found.devices)),
            disk_reserve_bytes=self.disk_reserve_bytes,
            pids=self.pids or 1024 + 512 * count,
            command=list(spec.command),
            script=spec.script,
            env=dict(spec.env),
            home=home,
            scratch=scratch,
            hostname=spec.hostname,
            uid=None,
            stop_grace_seconds=spec.stop_grace_seconds,
            notice_signal=spec.notice_signal,
            metadata=dict(spec.metadata),
            runway_ns=clock.to_boot_ns(spec.runway_until),
            log_bytes=self.log_bytes,
            rung=self.rung,
            bubblewrap=self.bubblewrap or "",
            cgroups=cgroups.folders(self.cgroup_bases, spec.run_id),
            own_network=self.rung == "sandbox" and "netns" not in self.without,
            seccomp=self.rung == "sandbox" and self.has_seccomp,
            outbound=self.outbound if spec.outbound else "none",
            blocked_routes=list(addresses.NOT_PUBLIC) if spec.outbound else [],
            python=PYTHON,
            read_only=read_only,
            lock_memory=spec.lock_memory,
        )

    def owned_by(self, plan: records.Plan, uid: int | None) -> records.Plan:
        return dataclasses.replace(plan, uid=uid)


def _way_out(without: frozenset[str]) -> Outbound:
    """A user-mode stack that is installed and may open its tunnel device, as root or as we are."""
    if "outbound" in without or not (os.geteuid() == 0 or os.access(_TUNNEL, os.R_OK | os.W_OK)):
        return "none"
    if "pasta" not in without and shutil.which("pasta"):
        return "pasta"
    if shutil.which("slirp4netns"):
        return "slirp4netns"
    return "none"
