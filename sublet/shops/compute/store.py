"""Rows of workloads, runs and transitions ↔ values."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from sublet.base.kernel.errors import Conflict
from sublet.base.store import Instant, Json, Work, metadata
from sublet.shops.compute.model import (
    Desired,
    Kind,
    Reason,
    Run,
    RunState,
    Transition,
    Workload,
    WorkloadNotFound,
)
from sublet.shops.compute.spec import from_document, to_document
from sublet.shops.compute.states import LIVE, State

_Seq = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

workloads = sa.Table(
    "compute_workload",
    metadata,
    sa.Column("seq", _Seq, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("organisation_id", sa.String(40), nullable=False, index=True),
    sa.Column("project_id", sa.String(40)),
    sa.Column("key_id", sa.String(40)),
    sa.Column("kind", sa.String(24), nullable=False),
    sa.Column("spec", Json, nullable=False),
    sa.Column("contract_id", sa.String(40), nullable=False, index=True),
    sa.Column("party", sa.String(24), nullable=False),
    sa.Column("pool_id", sa.String(40), nullable=False),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("state", sa.String(24), nullable=False, index=True),
    sa.Column("desired", sa.String(24), nullable=False),
    sa.Column("reason", sa.String(24)),
    sa.Column("claim_id", sa.String(40)),
    sa.Column("waiting_since", Instant),
    sa.Column("retries", sa.Integer, nullable=False),
    sa.Column("start_failures", sa.Integer, nullable=False),
    sa.Column("failure", sa.Text),
    sa.Column("exit_code", sa.Integer),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("ended_at", Instant),
    sa.Column("has_home", sa.Boolean, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Index("ix_compute_workload_kind_state", "kind", "state"),
    sqlite_autoincrement=True,
)

runs = sa.Table(
    "compute_run",
    metadata,
    sa.Column("seq", _Seq, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("workload_id", sa.String(40), nullable=False, index=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("claim_id", sa.String(40), nullable=False, index=True),
    sa.Column("contract_id", sa.String(40), nullable=False),
    sa.Column("pool_id", sa.String(40), nullable=False),
    sa.Column("node_id", sa.String(40), nullable=False),
    sa.Column("devices", Json, nullable=False),
    sa.Column("device_ids", Json, nullable=False),
    sa.Column("state", sa.String(24), nullable=False, index=True),
    sa.Column("intended_at", Instant, nullable=False),
    sa.Column("ends_at", Instant),
    sa.Column("notice_seconds", sa.Integer, nullable=False),
    sa.Column("started_at", Instant),
    sa.Column("t0", Instant),
    sa.Column("notice_reason", sa.String(24)),
    sa.Column("term_at", Instant),
    sa.Column("published_at", Instant),
    sa.Column("stop_reason", sa.String(24)),
    sa.Column("stop_grace_seconds", sa.Integer, nullable=False),
    sa.Column("runway_until", Instant, nullable=False),
    sa.Column("runway_sent", Instant, nullable=False),
    sa.Column("exited_at", Instant),
    sa.Column("exit_code", sa.Integer),
    sa.Column("reason", sa.String(24)),
    sa.Column("gone_at", Instant),
    sa.Column("failure", sa.Text),
    sa.Column("is_forgotten", sa.Boolean, nullable=False),
    sqlite_autoincrement=True,
)

transitions = sa.Table(
    "compute_transition",
    metadata,
    sa.Column("seq", _Seq, primary_key=True),
    sa.Column("workload_id", sa.String(40), nullable=False, index=True),
    sa.Column("organisation_id", sa.String(40), nullable=False),
    sa.Column("from_state", sa.String(24)),
    sa.Column("event", sa.String(24), nullable=False),
    sa.Column("to_state", sa.String(24), nullable=False),
    sa.Column("at", Instant, nullable=False),
    sa.Column("actor", sa.String(80), nullable=False),
    sa.Column("reason", sa.String(24)),
    sqlite_autoincrement=True,
)

_OVER = (RunState.SCRUBBED, RunState.FAILED)


# ---- workloads --------------------------------------------------------------------------------


def insert_workload(work: Work, workload: Workload) -> Workload:
    values = _fields(workload)
    del values["seq"]
    values["spec"] = to_document(workload.spec)
    result = work.tx.execute(workloads.insert(), values)
    [seq] = result.inserted_primary_key or [0]
    return dataclasses.replace(workload, seq=seq)


# What every rent runs is built once: building a statement costs more than running it.
_UPDATE_WORKLOAD = workloads.update().where(
    workloads.c.id == sa.bindparam("workload"), workloads.c.version == sa.bindparam("read")
)
_WORKLOAD = sa.select(workloads).where(workloads.c.id == sa.bindparam("workload"))
_WORKLOADS = sa.select(workloads).where(workloads.c.id.in_(sa.bindparam("ids", expanding=True)))
_WAITING = (
    sa.select(workloads)
    .where(workloads.c.state == State.AWAITING_CAPACITY)
    .order_by(workloads.c.rank.desc(), workloads.c.waiting_since, workloads.c.seq)
    .limit(sa.bindparam("most"))
)
_UNPLACED = (
    sa.select(workloads)
    .where(
        workloads.c.state == State.PROVISIONING,
        workloads.c.claim_id.is_not(None),
        ~sa.select(runs.c.id)
        .where(runs.c.workload_id == workloads.c.id, runs.c.claim_id == workloads.c.claim_id)
        .exists(),
    )
    .order_by(workloads.c.rank.desc(), workloads.c.seq)
)


def update_workload(work: Work, before: Workload, **changes: Any) -> Workload:
    """Change a workload, one version on. Conflict: somebody else changed it since it was read."""
    after = dataclasses.replace(before, version=before.version + 1, **changes)
    values = {name: value for name, value in changes.items() if name != "spec"}
    if "spec" in changes:
        values["spec"] = to_document(after.spec)
    result = work.tx.execute(
        _UPDATE_WORKLOAD,
        {"workload": before.id, "read": before.version, "version": after.version, **values},
    )
    if result.rowcount != 1:
        raise Conflict("The workload was changed meanwhile: read it again.")
    return after


def get_workload(tx: Connection, workload_id: str) -> Workload:
    """Raises WorkloadNotFound."""
    row = tx.execute(_WORKLOAD, {"workload": workload_id}).first()
    if row is None:
        raise WorkloadNotFound
    return _workload(row)


def find_workload_of(tx: Connection, contract_id: str) -> Workload | None:
    row = tx.execute(sa.select(workloads).where(workloads.c.contract_id == contract_id)).first()
    return None if row is None else _workload(row)


def get_workloads(tx: Connection, ids: Collection[str]) -> dict[str, Workload]:
    found: dict[str, Workload] = {}
    for part in _parts(ids):
        rows = tx.execute(_WORKLOADS, {"ids": part})
        found |= {row.id: _workload(row) for row in rows}
    return found


def list_workloads(
    tx: Connection,
    *,
    organisation_id: str | None = None,
    project_id: str | None = None,
    kind: Kind | None = None,
    states: Collection[State] | None = None,
    after: int | None = None,
    limit: int = 100,
) -> list[Workload]:
    """In order of `seq`, past `after`. Replicas only where `kind` says so: nobody rented those."""
    query = sa.select(workloads).order_by(workloads.c.seq).limit(limit)
    if organisation_id is not None:
        query = query.where(workloads.c.organisation_id == organisation_id)
    if project_id is not None:
        query = query.where(workloads.c.project_id == project_id)
    if kind is not None:
        query = query.where(workloads.c.kind == kind)
    else:
        query = query.where(workloads.c.kind != "replica")
    if states is not None:
        query = query.where(workloads.c.state.in_(list(states)))
    if after is not None:
        query = query.where(workloads.c.seq > after)
    return [_workload(row) for row in tx.execute(query)]


def list_unending(tx: Connection) -> list[Workload]:
    """Live, and not on their way out."""
    rows = tx.execute(
        sa.select(workloads)
        .where(workloads.c.state.in_(list(LIVE - {State.STOPPING})))
        .order_by(workloads.c.seq)
    )
    return [_workload(row) for row in rows]


def list_waiting(tx: Connection, limit: int, *, after: Workload | None = None) -> list[Workload]:
    """Who waits, in the order of service: rank, then age; past `after`."""
    if after is None:
        return [_workload(row) for row in tx.execute(_WAITING, {"most": limit})]
    rank, since, seq = workloads.c.rank, workloads.c.waiting_since, workloads.c.seq
    is_alike = rank == after.rank
    query = _WAITING.where(
        (rank < after.rank)
        | (is_alike & (since > after.waiting_since))
        | (is_alike & (since == after.waiting_since) & (seq > after.seq))
    )
    return [_workload(row) for row in tx.execute(query, {"most": limit})]


def list_unplaced(tx: Connection) -> list[Workload]:
    """Admitted, and no run intended yet: their devices are still being freed."""
    return [_workload(row) for row in tx.execute(_UNPLACED)]


def count_live(tx: Connection) -> int:
    """Workloads that have a claim, and runs that are not over."""
    held = sa.select(sa.func.count()).where(workloads.c.state.in_(list(LIVE)))
    running = sa.select(sa.func.count()).where(runs.c.state.not_in(_OVER))
    return int(tx.execute(held).scalar_one()) + int(tx.execute(running).scalar_one())


_SEALED = sa.select(workloads).where(
    workloads.c.kind == "replica", workloads.c.pool_id == sa.bindparam("pool")
)
_SEALED_LIVE = _SEALED.where(workloads.c.state.in_(list(LIVE)))
_SEALED_GONE = _SEALED.where(
    workloads.c.id.in_(sa.select(runs.c.workload_id).where(runs.c.state == RunState.GONE))
)
_STRANGERS = sa.select(workloads.c.id).where(
    workloads.c.pool_id == sa.bindparam("pool"),
    workloads.c.organisation_id != sa.bindparam("owner"),
)
_STRANGERS_LIVE = _STRANGERS.where(workloads.c.state.in_(list(LIVE))).limit(1)
_STRANGERS_WAITING = _STRANGERS.where(workloads.c.state == State.AWAITING_CAPACITY).limit(1)
_STRANGERS_GONE = (
    sa.select(runs.c.id)
    .where(
        runs.c.pool_id == sa.bindparam("pool"),
        runs.c.organisation_id != sa.bindparam("owner"),
        runs.c.state == RunState.GONE,
    )
    .limit(1)
)


def list_sealed(tx: Connection, pool_id: str) -> list[Workload]:
    """Sealed replicas there, from their admission to the end of their scrub."""
    found = {
        row.id: row
        for statement in (_SEALED_LIVE, _SEALED_GONE)
        for row in tx.execute(statement, {"pool": pool_id})
        if row.spec.get("is_sealed")
    }
    return [_workload(row) for row in found.values()]


def has_strangers(tx: Connection, pool_id: str, owner_id: str) -> bool:
    """Another organisation's workload is there, from its admission to the end of its scrub."""
    return any(
        tx.execute(statement, {"pool": pool_id, "owner": owner_id}).first() is not None
        for statement in (_STRANGERS_LIVE, _STRANGERS_GONE)
    )


def has_waiting_strangers(tx: Connection, pool_id: str, owner_id: str) -> bool:
    return tx.execute(_STRANGERS_WAITING, {"pool": pool_id, "owner": owner_id}).first() is not None


# ---- runs -------------------------------------------------------------------------------------


def insert_run(work: Work, run: Run) -> Run:
    values = _fields(run)
    del values["seq"]
    values["devices"], values["device_ids"] = list(run.devices), list(run.device_ids)
    result = work.tx.execute(runs.insert(), values)
    [seq] = result.inserted_primary_key or [0]
    return dataclasses.replace(run, seq=seq)


_UPDATE_RUN = runs.update().where(
    runs.c.id == sa.bindparam("run"), runs.c.state == sa.bindparam("in_state")
)
_RUN = sa.select(runs).where(runs.c.id == sa.bindparam("run"))
_LIVE_RUN = sa.select(runs).where(
    runs.c.workload_id == sa.bindparam("of"), runs.c.state.not_in(_OVER)
)
_LIVE_RUNS = sa.select(runs).where(runs.c.state.not_in(_OVER)).order_by(runs.c.seq)
_LAST_RUN = (
    sa.select(runs)
    .where(runs.c.workload_id == sa.bindparam("of"))
    .order_by(runs.c.number.desc())
    .limit(1)
)
_RUN_OF_CLAIM = sa.select(runs).where(runs.c.claim_id == sa.bindparam("of"))


def update_run(work: Work, before: Run, **changes: Any) -> Run:
    """Change a run. Conflict: it is no longer in the state it was read in."""
    result = work.tx.execute(_UPDATE_RUN, {"run": before.id, "in_state": before.state, **changes})
    if result.rowcount != 1:
        raise Conflict("The run went on meanwhile: read it again.")
    return dataclasses.replace(before, **changes)


def find_run(tx: Connection, run_id: str) -> Run | None:
    row = tx.execute(_RUN, {"run": run_id}).first()
    return None if row is None else _run(row)


def find_live_run(tx: Connection, workload_id: str) -> Run | None:
    """The one run of a workload that is not over, scrub included."""
    row = tx.execute(_LIVE_RUN, {"of": workload_id}).first()
    return None if row is None else _run(row)


def find_run_of_claim(tx: Connection, claim_id: str) -> Run | None:
    row = tx.execute(_RUN_OF_CLAIM, {"of": claim_id}).first()
    return None if row is None else _run(row)


def find_last_run(tx: Connection, workload_id: str) -> Run | None:
    row = tx.execute(_LAST_RUN, {"of": workload_id}).first()
    return None if row is None else _run(row)


def list_runs(tx: Connection, workload_id: str) -> list[Run]:
    rows = tx.execute(
        sa.select(runs).where(runs.c.workload_id == workload_id).order_by(runs.c.number)
    )
    return [_run(row) for row in rows]


def list_live_runs(tx: Connection) -> list[Run]:
    rows = tx.execute(_LIVE_RUNS)
    return [_run(row) for row in rows]


def list_live_runs_on(tx: Connection, node_id: str) -> list[Run]:
    rows = tx.execute(
        sa.select(runs)
        .where(runs.c.node_id == node_id, runs.c.state.not_in(_OVER))
        .order_by(runs.c.seq)
    )
    return [_run(row) for row in rows]


def find_runs(tx: Connection, ids: Collection[str]) -> dict[str, Run]:
    found: dict[str, Run] = {}
    for part in _parts(ids):
        rows = tx.execute(sa.select(runs).where(runs.c.id.in_(part)))
        found |= {row.id: _run(row) for row in rows}
    return found


def list_forgettable(tx: Connection, before: datetime, limit: int) -> list[Run]:
    """Runs that were over before that instant and whose logs are still kept."""
    rows = tx.execute(
        sa.select(runs)
        .where(runs.c.state.in_(_OVER), ~runs.c.is_forgotten, runs.c.gone_at < before)
        .order_by(runs.c.seq)
        .limit(limit)
    )
    return [_run(row) for row in rows]


def list_homes_to_erase(tx: Connection, before: datetime, limit: int) -> list[Workload]:
    """Terminated instances and replicas that are over, and jobs that ended before that instant,
    whose files still lie there."""
    is_old = workloads.c.ended_at < before
    is_instance = (workloads.c.kind != "job") & workloads.c.ended_at.is_not(None)
    has_run = (
        sa.select(runs.c.id)
        .where(runs.c.workload_id == workloads.c.id, runs.c.state.not_in(_OVER))
        .exists()
    )
    rows = tx.execute(
        sa.select(workloads)
        .where(workloads.c.has_home, is_instance | is_old, ~has_run)
        .order_by(workloads.c.seq)
        .limit(limit)
    )
    return [_workload(row) for row in rows]


def keep_forgotten(work: Work, run_ids: Collection[str], workload_ids: Collection[str]) -> None:
    """The engine has dropped these runs' logs and these workloads' files."""
    for part in _parts(run_ids):
        work.tx.execute(runs.update().where(runs.c.id.in_(part)).values(is_forgotten=True))
    for part in _parts(workload_ids):
        work.tx.execute(workloads.update().where(workloads.c.id.in_(part)).values(has_home=False))


# ---- transitions ------------------------------------------------------------------------------


def insert_transition(
    work: Work,
    workload: Workload,
    event: str,
    before: State | None,
    to: State,
    reason: Reason | None,
    at: datetime,
) -> None:
    work.tx.execute(
        transitions.insert(),
        {
            "workload_id": workload.id,
            "organisation_id": workload.organisation_id,
            "from_state": before,
            "event": event,
            "to_state": to,
            "at": at,
            "actor": work.actor.id,
            "reason": reason,
        },
    )


def list_transitions(
    tx: Connection, workload_id: str, *, after: int | None = None, limit: int = 1000
) -> list[Transition]:
    query = (
        sa.select(transitions)
        .where(transitions.c.workload_id == workload_id)
        .order_by(transitions.c.seq)
        .limit(limit)
    )
    if after is not None:
        query = query.where(transitions.c.seq > after)
    return [
        Transition(
            seq=row.seq,
            workload_id=row.workload_id,
            from_state=State(row.from_state) if row.from_state else None,
            event=row.event,
            to_state=State(row.to_state),
            at=row.at,
            actor=row.actor,
            reason=row.reason,
        )
        for row in tx.execute(query)
    ]


# ---- rows -------------------------------------------------------------------------------------


def _fields(value: Workload | Run) -> dict[str, Any]:
    return {name: getattr(value, name) for name in type(value).__dataclass_fields__}


def _parts(ids: Collection[str], size: int = 500) -> Iterable[list[str]]:
    """In parts that every dialect takes as one list of parameters."""
    ordered = sorted(ids)
    return (ordered[i : i + size] for i in range(0, len(ordered), size))


def _reason(value: str | None) -> Reason | None:
    return None if value is None else Reason(value)


def _workload(row: Row[Any]) -> Workload:
    values = dict(row._mapping)
    values["spec"] = from_document(row.spec)
    values["state"], values["desired"] = State(row.state), Desired(row.desired)
    values["reason"] = _reason(row.reason)
    return Workload(**values)


def _run(row: Row[Any]) -> Run:
    values = dict(row._mapping)
    values["devices"], values["device_ids"] = tuple(row.devices), tuple(row.device_ids)
    values["state"] = RunState(row.state)
    for name in ("notice_reason", "stop_reason", "reason"):
        values[name] = _reason(values[name])
    return Run(**values)
