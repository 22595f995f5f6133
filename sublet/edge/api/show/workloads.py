"""Instances, jobs, their runs and transitions as they are shown."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from sqlalchemy import Connection

from sublet.base.kernel.money import Money
from sublet.base.wire import rest
from sublet.capacity import allocation
from sublet.edge.api.deps import Deps
from sublet.records import ledger
from sublet.rights import market
from sublet.shops import compute
from sublet.shops.compute.spec import to_document

CHARGES = (market.USAGE, market.INTERRUPTION_CREDIT, market.FIRST_PARTY_CREDIT)
METERED = frozenset({compute.RunState.RUNNING, compute.RunState.STOPPING})

_PRODUCTS: dict[market.Product, Literal["spot", "on_demand", "first_party"]] = {
    market.Product.SPOT: "spot",
    market.Product.ON_DEMAND: "on_demand",
    market.Product.FIRST_PARTY: "first_party",
}


def workload(tx: Connection, found: compute.Workload, deps: Deps, now: datetime) -> rest.Workload:
    """With its latest run, what it costs now and what it has cost."""
    last = compute.find_last_run(tx, found.id)
    contract = market.get_contract(tx, found.contract_id) if found.contract_id else None
    price = None if contract is None else _price(tx, contract, now)
    assert found.kind != "replica", "those are shown with their deployment"
    product = _PRODUCTS[market.Product.FIRST_PARTY if contract is None else contract.product]
    is_metered = last is not None and last.state in METERED and last.started_at is not None
    return rest.Workload(
        id=found.id,
        seq=found.seq,
        kind=found.kind,
        name=found.name,
        organisation_id=found.organisation_id,
        project_id=found.project_id,
        state=found.state.value,
        desired=found.desired.value,
        reason=None if found.reason is None else found.reason.value,
        failure=found.failure,
        product=product,
        offer_id=None if contract is None else contract.offer_id,
        pool_id=found.pool_id,
        devices=found.devices,
        notice_seconds=None if contract is None else contract.notice_seconds,
        contract_id=found.contract_id,
        claim_id=found.claim_id,
        party=found.party,
        spec=to_document(found.spec),
        created_at=found.created_at,
        starts_at=_starts_at(tx, found, now),
        waiting_since=found.waiting_since,
        retries=found.retries,
        exit_code=found.exit_code,
        version=found.version,
        run=None if last is None else run(last),
        interruption=_interruption(found, last),
        ssh=_ssh(found, deps),
        price_micros_per_device_hour=price,
        burn_micros_per_hour=(price or 0) * found.devices if is_metered else 0,
        cost=rest.Money.of(_cost(tx, found.contract_id, deps.currency)),
        stopped_costs_per_hour=rest.Money.of(compute.stopped_costs_per_hour(deps.currency)),
    )


def _starts_at(tx: Connection, found: compute.Workload, now: datetime) -> datetime | None:
    if found.state is not compute.State.PROVISIONING or found.claim_id is None:
        return None
    starts_at = allocation.get_claim(tx, found.claim_id).starts_at
    return starts_at if starts_at > now else None


def _price(tx: Connection, contract: market.Contract, now: datetime) -> int:
    return market.terms_of(tx, contract, None).point_at(now).micros


def _cost(tx: Connection, contract_id: str | None, currency: str) -> Money:
    return Money(0, currency) if contract_id is None else ledger.posted(tx, contract_id, *CHARGES)


def _interruption(found: compute.Workload, last: compute.Run | None) -> rest.Interruption | None:
    if last is None or last.is_over or last.t0 is None or last.term_at is None:
        return None
    comes_back = found.spec.requeue if found.kind == "job" else found.spec.auto_resume
    return rest.Interruption(
        action="requeue" if comes_back else "stop",
        at=last.term_at,
        reason=(last.notice_reason or last.reason or compute.Reason.USER).value,
    )


def _ssh(found: compute.Workload, deps: Deps) -> rest.Ssh | None:
    if found.kind != "instance" or found.is_over or deps.ssh_host is None or not deps.ssh_port:
        return None
    return rest.Ssh(
        host=deps.ssh_host,
        port=deps.ssh_port,
        user=found.id,
        command=f"ssh -p {deps.ssh_port} {found.id}@{deps.ssh_host}",
    )


def run(found: compute.Run) -> rest.Run:
    return rest.Run(
        id=found.id,
        seq=found.seq,
        number=found.number,
        state=found.state.value,
        node_id=found.node_id,
        devices=list(found.devices),
        device_ids=list(found.device_ids),
        intended_at=found.intended_at,
        started_at=found.started_at,
        t0=found.t0,
        notice_reason=None if found.notice_reason is None else found.notice_reason.value,
        term_at=found.term_at,
        exited_at=found.exited_at,
        exit_code=found.exit_code,
        reason=None if found.reason is None else found.reason.value,
        failure=found.failure,
    )


def transition(found: compute.Transition) -> rest.Transition:
    return rest.Transition(
        seq=found.seq,
        at=found.at,
        from_state=None if found.from_state is None else found.from_state.value,
        event=found.event,
        to_state=found.to_state.value,
        actor=found.actor,
        reason=found.reason,
    )
