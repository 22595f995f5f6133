"""What this machine has: GPUs by NVML, else the logical CPUs it may use; memory and disk.

With GPUs each whole GPU is a device (multi-instance ones are shown unhealthy: slices of a GPU are
not sold by this engine). Memory of the machine, less a reserve for the system and Sublet, is
shared out equally. What limits this process (affinity, a cgroup) limits what is offered.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pynvml

from sublet.capacity.engines.local.supervise import cgroups
from sublet.capacity.engines.port import Device

KEPT_FROM = 4
"""With this many CPUs or more, the last one stays with Sublet itself."""
RESERVE_LEAST = 512 << 20
CLEAN_GPU_BYTES = 1 << 30


@dataclass(frozen=True)
class Gpu:
    minor: int
    uuid: str
    model: str
    memory_bytes: int
    is_whole: bool

    @property
    def name(self) -> str:
        return f"gpu{self.minor}"


@dataclass(frozen=True)
class Hardware:
    devices: tuple[Device, ...]
    cpus: tuple[int, ...]
    """The logical CPUs that workloads may use."""
    gpus: tuple[Gpu, ...]
    memory_bytes: int
    """For all workloads together."""


def find(*, keep_for_sublet: bool) -> Hardware:
    cpus = sorted(os.sched_getaffinity(0))
    if keep_for_sublet and len(cpus) >= KEPT_FROM:
        cpus = cpus[:-1]
    total = machine_memory_bytes()
    memory = total - min(max(total // 10, RESERVE_LEAST), total // 2)
    gpus = find_gpus()
    if gpus:
        share = memory // len(gpus)
        devices = tuple(
            Device(
                name=gpu.name,
                kind="gpu",
                model=gpu.model,
                memory_bytes=gpu.memory_bytes,
                healthy=gpu.is_whole,
                detail={"uuid": gpu.uuid, "host_memory_bytes": str(share)},
            )
            for gpu in gpus
        )
    else:
        model = _cpu_model()
        devices = tuple(
            Device(name=f"cpu{cpu}", kind="cpu", model=model, memory_bytes=memory // len(cpus))
            for cpu in cpus
        )
    return Hardware(devices, tuple(cpus), tuple(gpus), memory)


def find_gpus() -> list[Gpu]:
    """None where there is no driver."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [_gpu(index) for index in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        current, _ = pynvml.nvmlDeviceGetMigMode(handle)
    except pynvml.NVMLError:
        current = 0  # too old a model to be cut
    return Gpu(
        minor=pynvml.nvmlDeviceGetMinorNumber(handle),
        uuid=_text(pynvml.nvmlDeviceGetUUID(handle)),
        model=_text(pynvml.nvmlDeviceGetName(handle)),
        memory_bytes=pynvml.nvmlDeviceGetMemoryInfo(handle).total,
        is_whole=not current,
    )


def gpu_findings(uuids: Sequence[str]) -> list[str]:
    """What still holds GPUs that should be free."""
    if not uuids:
        return []
    findings = []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return [f"the GPUs cannot be asked: {error}"]
    try:
        for uuid in uuids:
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            used = pynvml.nvmlDeviceGetMemoryInfo(handle).used
            if used > CLEAN_GPU_BYTES:
                findings.append(f"{uuid}: {used} bytes of device memory are in use")
            holders = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            findings += [f"{uuid}: process {holder.pid} holds it" for holder in holders]
    except pynvml.NVMLError as error:
        findings.append(f"the GPUs cannot be asked: {error}")
    finally:
        pynvml.nvmlShutdown()
    return findings


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def machine_memory_bytes() -> int:
    """The machine's memory, or what a cgroup leaves us of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_own_limits()])


def _own_limits() -> list[int]:
    """Limits on our own group and those above it."""
    try:
        mounts = cgroups.mounts(Path("/proc/self/mountinfo").read_text())
        own = cgroups.own_paths(Path("/proc/self/cgroup").read_text())
    except OSError:
        return []
    limits = []
    for mount in mounts:
        if not mount.unified and "memory" not in mount.controllers:
            continue
        name = "memory.max" if mount.unified else "memory.limit_in_bytes"
        path = own.get(cgroups.UNIFIED if mount.unified else "memory", "/")
        folder = Path(mount.point) / os.path.relpath(path, mount.root)
        for above in (folder, *folder.parents):
            if not above.is_relative_to(mount.point):
                break
            try:
                limits.append(int((above / name).read_text()))
            except (OSError, ValueError):
                continue  # "max", or a root that has no limit
    return limits
