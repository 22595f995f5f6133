"""What the engine is told to start: the spec of a run, out of rows."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection

from sublet.capacity import fleet
from sublet.capacity.engines.port import StartSpec
from sublet.shops.compute.model import Run, ServerSpec, Workload

DISK_BYTES_PER_DEVICE = 20 << 30
"""Scratch and home together, before the run is ended for filling the disk."""


def start_spec(tx: Connection, run: Run, workload: Workload) -> StartSpec:
    spec, count = workload.spec, len(run.devices)
    pool = fleet.get_pool(tx, run.pool_id)
    server = spec.server or ServerSpec(argv=spec.command, env=spec.env)
    return StartSpec(
        run_id=run.id,
        workload_id=workload.id,
        organisation_id=workload.organisation_id,
        kind=workload.kind,
        devices=run.devices,
        memory_bytes=spec.memory_bytes or pool.memory_bytes * count,
        disk_bytes=DISK_BYTES_PER_DEVICE * count,
        command=server.argv,
        script=spec.script,
        env={
            **server.env,
            "SUBLET_WORKLOAD_ID": workload.id,
            "SUBLET_RUN_NUMBER": str(run.number),
        },
        home=home_of(workload),
        hostname=workload.id.replace("_", "-"),
        outbound=spec.outbound,
        stop_grace_seconds=run.stop_grace_seconds,
        notice_signal=spec.notice_signal,
        metadata=metadata_document(tx, run, workload),
        runway_until=run.runway_until,
        read_only=server.read_only,
        lock_memory=server.lock_memory,
    )


def home_of(workload: Workload) -> str:
    """The folder that outlives a stop: one a workload."""
    return workload.id


def metadata_document(tx: Connection, run: Run, workload: Workload) -> dict[str, Any]:
    """What a workload may read about itself."""
    pool = fleet.get_pool(tx, run.pool_id)
    site = fleet.get_site(tx, pool.site_id)
    return {
        "id": workload.id,
        "name": workload.name,
        "kind": workload.kind,
        "organisation_id": workload.organisation_id,
        "project_id": workload.project_id,
        "run": run.number,
        "site": site.name,
        "region": site.region,
        "pool": pool.name,
        "devices": list(run.devices),
        "device_model": pool.device_model,
        "notice_seconds": run.notice_seconds,
        "stop_grace_seconds": run.stop_grace_seconds,
        "ends_at": None if run.ends_at is None else run.ends_at.isoformat(),
    }
