"""Replicas: model servers as workloads, on the owner's own account.

One runs until it is ended or fails, and is never queued again: whoever wants another makes one.
"""

from __future__ import annotations

from sublet.base.kernel.errors import Invalid
from sublet.base.store import Work
from sublet.capacity import fleet
from sublet.capacity.allocation import Refused
from sublet.rights import market
from sublet.shops.compute import admission, life, sealed
from sublet.shops.compute.model import Desired, ServerSpec, Workload, WorkloadSpec
from sublet.shops.compute.states import State


def rent_replica(
    work: Work,
    *,
    deployment_id: str,
    pool_id: str,
    devices: int,
    memory_bytes: int | None,
    is_filler: bool,
    drain_seconds: int,
    value_micros: int,
    server: ServerSpec,
    organisation_id: str,
    is_sealed: bool = False,
) -> Workload:
    """Devices for one model server: contract, claim and intent in this one Work.

    `value_micros`: what a device-hour of it is taken to earn. A sealed one takes a whole node where
    the pool has more than one. Raises NoCapacity (StrangersPresent for a sealed one beside others'
    workloads), Invalid naming the field, PoolNotFound; then the Work is to be rolled back.
    """
    roster = fleet.get_roster(work.tx, pool_id)
    if devices < 1:
        raise Invalid("`devices` is a whole number from 1.", param="devices")
    most = roster.pool.memory_bytes * devices
    if memory_bytes is not None and not 0 < memory_bytes <= most:
        raise Invalid(
            f"`memory_bytes` is at most what {devices} devices bring: {most}.",
            param="memory_bytes",
        )
    whole_node = is_sealed and len(roster.nodes) > 1
    replica_id = work.ids.new("rep")
    contract = market.serve(
        work,
        organisation_id=organisation_id,
        subject=replica_id,
        pool_id=pool_id,
        devices=roster.largest_node if whole_node else devices,
        is_filler=is_filler,
        drain_seconds=drain_seconds,
        value_micros=value_micros,
        whole_node=whole_node,
    )
    replica = life.requested(
        work,
        Workload(
            id=replica_id,
            seq=0,
            organisation_id=organisation_id,
            project_id=None,
            key_id=None,
            kind="replica",
            spec=WorkloadSpec(
                name=deployment_id,
                stop_grace_seconds=contract.stop_grace_seconds,
                requeue=False,
                server=server,
                memory_bytes=memory_bytes,
                is_sealed=is_sealed,
            ),
            contract_id=contract.id,
            party="sale",
            pool_id=pool_id,
            devices=contract.units,
            rank=admission.rank_of(contract),
            state=State.PENDING,
            desired=Desired.RUNNING,
            reason=None,
            claim_id=None,
            waiting_since=None,
            retries=0,
            start_failures=0,
            failure=None,
            exit_code=None,
            created_at=work.now,
            ended_at=None,
            has_home=True,
            version=1,
        ),
    )
    # Its own autoscaler asks again by itself, and would ask for the ways on in vain.
    decision = admission.admit(work, replica, contract, with_ways_on=False)
    if isinstance(decision, Refused):
        raise admission.refusal(decision)
    if is_sealed and not whole_node:
        # The pool's row is held now: nobody comes between this look and the commit.
        sealed.check_sealed(work, replica, is_filler=is_filler)
    return admission.begin(work, replica, decision)
