"""Rows of the models shop ↔ values."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection, Row

from sublet.base.kernel.errors import Conflict
from sublet.base.store import Event, Instant, Json, metadata
from sublet.base.store.work import outbox
from sublet.shops.models.model import (
    Access,
    Deployment,
    DeploymentNotFound,
    DeploymentState,
    GatewayStanding,
    Grant,
    Lifecycle,
    Model,
    ModelNotFound,
    Replica,
    ReplicaState,
    TierPrice,
)

_SEQ = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

models = sa.Table(
    "models_model",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("name", sa.String(200), nullable=False, unique=True),
    sa.Column("provider", sa.String(120), nullable=False),
    sa.Column("is_third_party", sa.Boolean, nullable=False),
    sa.Column("access", sa.String(24), nullable=False),
    sa.Column("kind", sa.String(24), nullable=False),
    sa.Column("licence", sa.String(120), nullable=False),
    sa.Column("licence_allows_download", sa.Boolean, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("path", sa.Text, nullable=False),
    sa.Column("sha256", sa.String(64), nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("quantization", sa.String(40), nullable=False),
    sa.Column("context", sa.Integer, nullable=False),
    sa.Column("max_output", sa.Integer, nullable=False),
    sa.Column("server", sa.String(40), nullable=False),
    sa.Column("template", sa.String(80), nullable=False),
    sa.Column("tokens_per_device_hour", sa.BigInteger, nullable=False),
    sa.Column("lifecycle", sa.String(24), nullable=False),
    sa.Column("legacy_on", sa.Date),
    sa.Column("end_of_life_on", sa.Date),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sqlite_autoincrement=True,
)

prices = sa.Table(
    "models_price",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("tier", sa.String(24), nullable=False),
    sa.Column("version", sa.String(40), nullable=False, unique=True),
    sa.Column("effective_from", Instant, nullable=False),
    sa.Column("input_micros", sa.BigInteger, nullable=False),
    sa.Column("cached_micros", sa.BigInteger, nullable=False),
    sa.Column("output_micros", sa.BigInteger, nullable=False),
    sa.Index(None, "model", "tier", "effective_from"),
    sqlite_autoincrement=True,
)

grants = sa.Table(
    "models_grant",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("model", sa.String(200), nullable=False, index=True),
    sa.Column("organisation_id", sa.String(40), nullable=False, index=True),
    sa.Column("granted_at", Instant, nullable=False),
    sa.Column("revoked_at", Instant),
    sqlite_autoincrement=True,
)

deployments = sa.Table(
    "models_deployment",
    metadata,
    sa.Column("seq", _SEQ, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("model", sa.String(200), nullable=False, index=True),
    sa.Column("pool_id", sa.String(40), nullable=False),
    sa.Column("devices", sa.Integer, nullable=False),
    sa.Column("min_replicas", sa.Integer, nullable=False),
    sa.Column("max_replicas", sa.Integer, nullable=False),
    sa.Column("slots", sa.Integer, nullable=False),
    sa.Column("target", sa.Integer, nullable=False),
    sa.Column("drain_seconds", sa.Integer, nullable=False),
    sa.Column("idle_seconds", sa.Integer, nullable=False),
    sa.Column("state", sa.String(24), nullable=False, index=True),
    sa.Column("wanted", sa.Integer, nullable=False),
    sa.Column("lower_since", Instant),
    sa.Column("last_asked_at", Instant, nullable=False),
    sa.Column("failure", sa.Text),
    sa.Column("failures", sa.Integer, nullable=False),
    sa.Column("retry_at", Instant),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sqlite_autoincrement=True,
)

replicas = sa.Table(
    "models_replica",
    metadata,
    sa.Column("id", sa.String(40), primary_key=True),
    sa.Column("deployment_id", sa.String(40), nullable=False, index=True),
    sa.Column("model", sa.String(200), nullable=False),
    sa.Column("is_filler", sa.Boolean, nullable=False),
    sa.Column("state", sa.String(24), nullable=False, index=True),
    sa.Column("door", sa.Text, nullable=False),
    sa.Column("has_key", sa.Boolean, nullable=False),
    sa.Column("created_at", Instant, nullable=False),
    sa.Column("ready_at", Instant),
    sa.Column("draining_at", Instant),
    sa.Column("gone_at", Instant),
    sa.Column("reason", sa.Text),
)

gauges = sa.Table(
    "models_gauge",
    metadata,
    sa.Column("gateway", sa.String(40), primary_key=True),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("snapshot", sa.BigInteger, nullable=False),
    sa.Column("is_alive", sa.Boolean, nullable=False),
    sa.Column("is_cut_off", sa.Boolean, nullable=False),
    sa.Column("in_flight", Json, nullable=False),
    sa.Column("waiting", Json, nullable=False),
    sa.Column("refusals", Json, nullable=False),
    sa.Column("requests", sa.BigInteger, nullable=False),
    sa.Column("ejected", Json, nullable=False),
    sa.Column("at", Instant, nullable=False),
)

snapshots = sa.Table(
    "models_snapshot",
    metadata,
    sa.Column("number", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("replicas", Json, nullable=False),
    sa.Column("made_at", Instant, nullable=False),
)
"""Which replicas each published snapshot names: by it a drain knows who may still send to one."""


# ---- the catalogue ----------------------------------------------------------------------------


def insert_model(tx: Connection, values: dict[str, Any]) -> None:
    tx.execute(models.insert().values(values))


def find_model(tx: Connection, name: str) -> Model | None:
    row = tx.execute(sa.select(models).where(models.c.name == name)).one_or_none()
    return None if row is None else _model(row)


def get_model(tx: Connection, name: str) -> Model:
    found = find_model(tx, name)
    if found is None:
        raise ModelNotFound()
    return found


def list_models(tx: Connection, after: int | None = None, limit: int = 1000) -> list[Model]:
    query = sa.select(models).order_by(models.c.seq).limit(limit)
    if after is not None:
        query = query.where(models.c.seq > after)
    return [_model(row) for row in tx.execute(query)]


def update_model(tx: Connection, model: Model, **changes: Any) -> Model:
    changed = dataclasses.replace(model, **changes, version=model.version + 1)
    tx.execute(
        models.update()
        .where(models.c.name == model.name)
        .values(**changes, version=changed.version)
    )
    return changed


def insert_price(tx: Connection, values: dict[str, Any]) -> None:
    tx.execute(prices.insert().values(values))


def find_price(tx: Connection, version: str) -> TierPrice | None:
    row = tx.execute(sa.select(prices).where(prices.c.version == version)).one_or_none()
    return None if row is None else TierPrice(**row._mapping)


def prices_in_force(tx: Connection, at: datetime) -> dict[tuple[str, str], TierPrice]:
    """By model and tier."""
    query = (
        sa.select(prices)
        .where(prices.c.effective_from <= at)
        .order_by(prices.c.effective_from, prices.c.seq)
    )
    return {(row.model, row.tier): TierPrice(**row._mapping) for row in tx.execute(query)}


def list_prices(tx: Connection, model: str) -> list[TierPrice]:
    query = sa.select(prices).where(prices.c.model == model).order_by(prices.c.seq)
    return [TierPrice(**row._mapping) for row in tx.execute(query)]


def insert_grant(tx: Connection, model: str, organisation_id: str, at: datetime) -> None:
    tx.execute(
        grants.insert().values(
            model=model, organisation_id=organisation_id, granted_at=at, revoked_at=None
        )
    )


def list_grants(tx: Connection, model: str | None = None) -> list[Grant]:
    """Those in force."""
    query = sa.select(grants).where(grants.c.revoked_at.is_(None)).order_by(grants.c.seq)
    if model is not None:
        query = query.where(grants.c.model == model)
    return [Grant(**row._mapping) for row in tx.execute(query)]


def end_grant(tx: Connection, seq: int, at: datetime) -> None:
    tx.execute(grants.update().where(grants.c.seq == seq).values(revoked_at=at))


# ---- deployments and replicas -----------------------------------------------------------------


def insert_deployment(tx: Connection, values: dict[str, Any]) -> None:
    tx.execute(deployments.insert().values(values))


def get_deployment(tx: Connection, deployment_id: str) -> Deployment:
    row = tx.execute(sa.select(deployments).where(deployments.c.id == deployment_id)).one_or_none()
    if row is None:
        raise DeploymentNotFound()
    return _deployment(row)


def list_deployments(
    tx: Connection, *, with_retired: bool = False, after: int | None = None, limit: int = 1000
) -> list[Deployment]:
    query = sa.select(deployments).order_by(deployments.c.seq).limit(limit)
    if not with_retired:
        query = query.where(deployments.c.state != DeploymentState.RETIRED)
    if after is not None:
        query = query.where(deployments.c.seq > after)
    return [_deployment(row) for row in tx.execute(query)]


def update_deployment(tx: Connection, deployment: Deployment, **changes: Any) -> Deployment:
    """What a person changes: it is a new version of it. Raises Conflict."""
    changed = dataclasses.replace(deployment, **changes, version=deployment.version + 1)
    found = tx.execute(
        deployments.update()
        .where(deployments.c.id == deployment.id, deployments.c.version == deployment.version)
        .values(**changes, version=changed.version)
    )
    if found.rowcount != 1:
        raise Conflict(f"{deployment.id} has changed meanwhile: read it again.")
    return changed


def note_deployment(tx: Connection, deployment: Deployment, **changes: Any) -> Deployment:
    """What the autoscaler keeps in mind: no new version."""
    tx.execute(deployments.update().where(deployments.c.id == deployment.id).values(**changes))
    return dataclasses.replace(deployment, **changes)


def insert_replica(tx: Connection, replica: Replica) -> None:
    tx.execute(replicas.insert().values(dataclasses.asdict(replica)))


def find_replica(tx: Connection, replica_id: str) -> Replica | None:
    row = tx.execute(sa.select(replicas).where(replicas.c.id == replica_id)).one_or_none()
    return None if row is None else _replica(row)


def list_replicas(
    tx: Connection,
    *,
    deployment_id: str | None = None,
    states: Collection[ReplicaState] | None = None,
    limit: int = 10_000,
) -> list[Replica]:
    """Oldest first."""
    query = sa.select(replicas).order_by(replicas.c.created_at, replicas.c.id).limit(limit)
    if deployment_id is not None:
        query = query.where(replicas.c.deployment_id == deployment_id)
    if states is not None:
        query = query.where(replicas.c.state.in_([str(state) for state in states]))
    return [_replica(row) for row in tx.execute(query)]


def update_replica(tx: Connection, replica: Replica, **changes: Any) -> Replica:
    tx.execute(replicas.update().where(replicas.c.id == replica.id).values(**changes))
    return dataclasses.replace(replica, **changes)


# ---- gateways ---------------------------------------------------------------------------------


def keep_gauge(tx: Connection, values: dict[str, Any]) -> None:
    found = tx.execute(gauges.update().where(gauges.c.gateway == values["gateway"]).values(values))
    if found.rowcount == 0:
        tx.execute(gauges.insert().values(values))


def set_alive(tx: Connection, alive: Iterable[str]) -> None:
    names = list(alive)
    tx.execute(gauges.update().where(gauges.c.gateway.in_(names)).values(is_alive=True))
    tx.execute(gauges.update().where(gauges.c.gateway.not_in(names)).values(is_alive=False))


def list_gateways(tx: Connection) -> list[GatewayStanding]:
    return [
        GatewayStanding(**{**row._mapping, "ejected": tuple(row.ejected)})
        for row in tx.execute(sa.select(gauges).order_by(gauges.c.gateway))
    ]


def keep_snapshot(
    tx: Connection, number: int, replica_ids: list[str], made_at: datetime, keep: int
) -> None:
    tx.execute(snapshots.insert().values(number=number, replicas=replica_ids, made_at=made_at))
    tx.execute(snapshots.delete().where(snapshots.c.number <= number - keep))


def last_snapshot(tx: Connection) -> int:
    return tx.execute(sa.select(sa.func.max(snapshots.c.number))).scalar() or 0


def last_naming(tx: Connection, replica_id: str) -> int:
    """The highest number of a snapshot that names the replica; 0: none that is still known."""
    query = sa.select(snapshots.c.number, snapshots.c.replicas).order_by(snapshots.c.number.desc())
    return next((row.number for row in tx.execute(query) if replica_id in row.replicas), 0)


def oldest_snapshot(tx: Connection) -> int:
    """The lowest number that is still known; 0: none is."""
    return tx.execute(sa.select(sa.func.min(snapshots.c.number))).scalar() or 0


def not_ready(tx: Connection, replica_ids: Collection[str]) -> list[str]:
    """Those of them that are to get no calls."""
    query = sa.select(replicas.c.id).where(
        replicas.c.id.in_(list(replica_ids)), replicas.c.state != ReplicaState.READY
    )
    return sorted(row.id for row in tx.execute(query))


def last_event(tx: Connection, kinds: Collection[type[Event]]) -> int:
    """The number of the newest event of these kinds; 0: there was none."""
    query = sa.select(sa.func.max(outbox.c.seq)).where(outbox.c.kind.in_([k.kind for k in kinds]))
    return tx.execute(query).scalar() or 0


def _model(row: Row[Any]) -> Model:
    return Model(
        **{
            **row._mapping,
            "access": Access(row.access),
            "lifecycle": Lifecycle(row.lifecycle),
        }
    )


def _deployment(row: Row[Any]) -> Deployment:
    return Deployment(**{**row._mapping, "state": DeploymentState(row.state)})


def _replica(row: Row[Any]) -> Replica:
    return Replica(**{**row._mapping, "state": ReplicaState(row.state)})
