"""Models, deployments, gateways and token usage as they are shown."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime

from sublet.base.kernel.interval import from_micros
from sublet.base.wire import rest
from sublet.records import metering
from sublet.shops import models


def model(
    found: models.Model,
    prices: Sequence[models.TierPrice],
    *,
    deployment_id: str | None,
    may_be_called: bool,
    hint: str | None,
    now: datetime,
) -> rest.CatalogueModel:
    return rest.CatalogueModel(
        name=found.name,
        provider=found.provider,
        access=found.access.value,
        kind=found.kind,
        licence=found.licence,
        may_be_downloaded=found.licence_allows_download and not found.is_sealed,
        source=found.source,
        sha256=found.sha256,
        size_bytes=found.size_bytes,
        quantization=found.quantization,
        context=found.context,
        max_output=found.max_output,
        server=found.server,
        tokens_per_device_hour=found.tokens_per_device_hour,
        lifecycle=models.stage_on(found, now.date()).value,
        legacy_on=found.legacy_on,
        end_of_life_on=found.end_of_life_on,
        prices=[price(one) for one in prices],
        deployment_id=deployment_id,
        may_be_called=may_be_called,
        may_be_deployed=hint is None,
        hint=hint,
        created_at=found.created_at,
        version=found.version,
    )


def price(found: models.TierPrice) -> rest.TokenPrice:
    return rest.TokenPrice(
        model=found.model,
        tier=found.tier,
        version=found.version,
        effective_from=found.effective_from,
        input_micros=found.input_micros,
        cached_micros=found.cached_micros,
        output_micros=found.output_micros,
    )


def grant(found: models.Grant) -> rest.ModelGrant:
    return rest.ModelGrant(
        model=found.model, organisation_id=found.organisation_id, granted_at=found.granted_at
    )


def deployment(
    found: models.Deployment,
    replicas: Sequence[models.Replica],
    gateways: Sequence[models.GatewayStanding],
) -> rest.Deployment:
    living = [gateway for gateway in gateways if gateway.is_alive]
    return rest.Deployment(
        id=found.id,
        model=found.model,
        pool_id=found.pool_id,
        devices=found.devices,
        min_replicas=found.min_replicas,
        max_replicas=found.max_replicas,
        slots=found.slots,
        target=found.target,
        drain_seconds=found.drain_seconds,
        idle_seconds=found.idle_seconds,
        state=found.state.value,
        wanted=found.wanted,
        replicas=[replica(one, [g.in_flight for g in living]) for one in replicas],
        waiting=sum(gateway.waiting.get(found.model, 0) for gateway in living),
        failure=found.failure,
        retry_at=found.retry_at,
        created_at=found.created_at,
        version=found.version,
    )


def replica(found: models.Replica, in_flight: Collection[Mapping[str, int]]) -> rest.Replica:
    return rest.Replica(
        id=found.id,
        is_filler=found.is_filler,
        state=found.state.value,
        in_flight=sum(counts.get(found.id, 0) for counts in in_flight),
        created_at=found.created_at,
        ready_at=found.ready_at,
        draining_at=found.draining_at,
        gone_at=found.gone_at,
        reason=found.reason,
    )


def gateways(
    found: Sequence[models.GatewayStanding],
    newest_snapshot: int,
    faults: Sequence[metering.SpoolFault],
) -> list[rest.Gateway]:
    """By name, with those that died before they said anything and have left a spool all the same."""
    of: dict[str, list[metering.SpoolFault]] = {}
    for fault in faults:
        of.setdefault(fault.gateway, []).append(fault)
    shown = [gateway(one, newest_snapshot, of.pop(one.gateway, [])) for one in found]
    for name, left in of.items():
        silent = models.GatewayStanding.silent(name, left[-1].epoch)
        shown.append(gateway(silent, newest_snapshot, left))
    return sorted(shown, key=lambda one: one.name)


def gateway(
    found: models.GatewayStanding, newest_snapshot: int, faults: Sequence[metering.SpoolFault]
) -> rest.Gateway:
    return rest.Gateway(
        name=found.gateway,
        started_at=from_micros(found.epoch),
        is_alive=found.is_alive,
        is_cut_off=found.is_cut_off,
        snapshot=found.snapshot,
        newest_snapshot=newest_snapshot,
        requests=found.requests,
        in_flight=sum(found.in_flight.values()),
        waiting=dict(found.waiting),
        refusals=dict(found.refusals),
        ejected=list(found.ejected),
        spool_faults=[
            rest.SpoolFault(life=fault.life, started_at=from_micros(fault.epoch), why=fault.why)
            for fault in faults
        ],
        at=found.at,
    )


def token_usage(found: metering.TokenUsage) -> rest.TokenUsage:
    return rest.TokenUsage(
        id=found.event_id,
        organisation_id=found.organisation_id,
        project_id=found.project_id,
        key_id=found.key_id,
        model=found.model,
        deployment_id=found.deployment_id,
        surface=found.surface,
        tier=found.tier,
        price_version=found.price_version,
        outcome=found.outcome.value,
        started_at=from_micros(found.started_us),
        ended_at=from_micros(found.ended_us),
        first_byte_at=None if found.first_us is None else from_micros(found.first_us),
        input_uncached=found.input_uncached,
        cache_read=found.cache_read,
        output=found.output,
        corrects=found.corrects,
    )
