"""What others call: rent, start, stop, end, change, interrupt, cordon, and where things are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection

from sublet.base.kernel.errors import Invalid, Stale
from sublet.base.kernel.money import Money
from sublet.base.store import Work
from sublet.capacity import allocation, fleet
from sublet.capacity.allocation import Refused
from sublet.capacity.fleet import NodeState
from sublet.records import tenancy
from sublet.records.tenancy import Action, Identity
from sublet.rights import market
from sublet.shops.compute import admission, life, sealed, store
from sublet.shops.compute.model import (
    INTERRUPTIONS,
    Desired,
    Kind,
    Location,
    NoticeProtected,
    Reason,
    Run,
    RunState,
    ShutdownBegun,
    StopAnswer,
    Workload,
    WorkloadNotFound,
    WorkloadSpec,
)
from sublet.shops.compute.spec import checked
from sublet.shops.compute.states import State, Step, WrongState

CordonMode = Literal["cordon", "drain", "immediate"]
CHANGEABLE = ("name", "auto_resume", "requeue", "max_retries", "ssh_keys")
STOPPED_COSTS = (
    "A stopped instance holds no device and no credit and costs nothing; its files are kept until "
    "it is terminated. Starting it again is a new admission: there may be no capacity then."
)


# ---- for consumers ----------------------------------------------------------------------------


def rent(
    work: Work,
    identity: Identity,
    *,
    kind: Kind,
    quote_id: str,
    spec: WorkloadSpec,
    wait: bool = False,
) -> Workload:
    """Take a quote for a new workload: contract, hold, claim and intent in this one Work.

    With `wait` a refusal for capacity leaves it `awaiting_capacity`, holding nothing. Raises
    Invalid (naming the field), FencesMissing, NoCapacity, and what the market refuses.
    """
    quote = market.get_quote(work.tx, quote_id, identity, lock=True)
    tenancy.require(identity, Action.RENT, project_id=quote.project_id)
    spec = _fitting(checked(kind, spec), quote)
    if not identity.is_owner:
        _check_fences(work.tx, quote.pool_id)
    workload_id = work.ids.new("ins" if kind == "instance" else "job")
    contract = market.accept(work, identity, quote, subject=workload_id)
    workload = life.requested(
        work,
        Workload(
            id=workload_id,
            seq=0,
            organisation_id=contract.organisation_id,
            project_id=contract.project_id,
            key_id=contract.key_id,
            kind=kind,
            spec=spec,
            contract_id=contract.id,
            party="first_party" if contract.is_first_party else "sale",
            pool_id=contract.pool_id,
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
    return _admit(work, workload, contract, wait=wait)


def start(work: Work, identity: Identity, workload_id: str, *, wait: bool = False) -> Workload:
    """Start a stopped instance: a new admission on any node, under the same contract.

    One that starts or runs already is left as it is. Raises NoCapacity unless `wait`,
    PaymentRequired, WrongState.
    """
    workload = get_workload(work.tx, identity, workload_id, Action.RENT)
    if workload.desired is Desired.RUNNING and workload.state in (
        State.AWAITING_CAPACITY,
        State.PROVISIONING,
        State.RUNNING,
        State.INTERRUPTING,
    ):
        return workload
    if workload.state is not State.STOPPED:
        raise WrongState(
            f"It is {workload.state}: only a stopped instance can be started.",
            state=str(workload.state),
        )
    if not identity.is_owner:
        _check_fences(work.tx, workload.pool_id)
    market.rehold(work, workload.contract_id, identity)
    workload = store.update_workload(work, workload, desired=Desired.RUNNING, start_failures=0)
    contract = market.get_contract(work.tx, workload.contract_id)
    return _admit(work, workload, contract, wait=wait)


def stop(work: Work, identity: Identity, workload_id: str) -> StopAnswer:
    """Stop an instance: SIGTERM, grace, and its devices are given back. Its files stay.

    The answer says what it costs from then on. Raises WrongState for a job, or one that is over.
    """
    workload = get_workload(work.tx, identity, workload_id, Action.STOP)
    if workload.kind == "job":
        raise WrongState("A job cannot be stopped and kept: cancel it.", state=str(workload.state))
    workload = _halt(work, workload, Desired.STOPPED, Reason.USER)
    currency = market.get_contract(work.tx, workload.contract_id).currency
    return StopAnswer(
        workload=workload,
        still_costs_per_hour=stopped_costs_per_hour(currency),
        explanation=STOPPED_COSTS,
    )


def stopped_costs_per_hour(currency: str) -> Money:
    """What a stopped instance costs: its files are kept free of charge."""
    return Money(0, currency)


def terminate(work: Work, identity: Identity, workload_id: str) -> Workload:
    """End it for good; an instance's files are erased. Ending twice is ending once."""
    workload = get_workload(work.tx, identity, workload_id, Action.STOP)
    if workload.is_over:
        return workload
    return _halt(work, workload, Desired.TERMINATED, Reason.USER)


def cancel(work: Work, identity: Identity, workload_id: str) -> Workload:
    """End a job, wherever it stands. One that is over stays as it ended."""
    return terminate(work, identity, workload_id)


def change(
    work: Work, identity: Identity, workload_id: str, *, version: int, **fields: Any
) -> Workload:
    """Change what may change while it lives: name, auto_resume, requeue, max_retries, ssh_keys.

    Raises Stale where `version` is not the present one, Invalid naming the field.
    """
    workload = get_workload(work.tx, identity, workload_id, Action.RENT)
    if workload.version != version:
        raise Stale(version=workload.version)
    unknown = [name for name in fields if name not in CHANGEABLE]
    if unknown:
        raise Invalid(f"{unknown[0]} cannot be changed.", param=unknown[0])
    if not fields:
        return workload
    spec = checked(workload.kind, dataclasses.replace(workload.spec, **fields))
    return store.update_workload(work, workload, spec=spec)


def get_workload(
    tx: Connection, identity: Identity, workload_id: str, action: Action = Action.READ
) -> Workload:
    """A workload that this key may see. Raises WorkloadNotFound, also for another's, and for a
    replica: those are their deployment's."""
    workload = store.get_workload(tx, workload_id)
    is_mine = workload.organisation_id == identity.organisation.id and workload.kind != "replica"
    if not is_mine or identity.project_id not in (None, workload.project_id):
        raise WorkloadNotFound
    tenancy.require(identity, action, project_id=workload.project_id)
    return workload


def location(tx: Connection, workload_id: str) -> Location:
    """Where the workload's latest run is, for its logs and its door. Raises WorkloadNotFound."""
    workload = store.get_workload(tx, workload_id)
    run = store.find_last_run(tx, workload_id)
    return Location(
        workload=workload,
        run_id=None if run is None else run.id,
        node_id=None if run is None else run.node_id,
        is_running=run is not None
        and run.state is RunState.RUNNING
        and workload.state in (State.RUNNING, State.INTERRUPTING),
    )


# ---- for packages above and for the owner ---------------------------------------------------------


def stop_for(work: Work, workload_id: str, reason: Reason | str) -> Workload:
    """End what runs now, without notice, for a reason that has its own warnings or needs none.

    After an interruption (shutdown, node fault) it may come back by itself; after anything else an
    instance stays stopped and a job is over. A replica is over after all of them.
    """
    workload, why = store.get_workload(work.tx, workload_id), Reason(reason)
    if not workload.is_live:
        return workload
    comes_back = why in INTERRUPTIONS or workload.kind != "instance"
    if workload.desired is Desired.RUNNING and not comes_back:
        workload = store.update_workload(work, workload, desired=Desired.STOPPED)
    return life.end_now(work, workload, why)


def extend_runway(work: Work, workload_id: str, until: datetime) -> None:
    """The workload is paid up to then: the loop tells its engine. Never earlier than before."""
    run = store.find_live_run(work.tx, workload_id)
    if run is not None and until > run.runway_until:
        store.update_run(work, run, runway_until=until)


def begin_shutdown(work: Work) -> int:
    """End everything that runs, as if the owner had ended it; the loop starts nothing more until
    it is made anew. Returns how many are ended now. What is queued stays queued.
    """
    work.emit(ShutdownBegun())
    return life.end_all(work, Reason.SHUTDOWN)


def count_live(tx: Connection) -> int:
    """Workloads that hold something, and runs that are not scrubbed yet."""
    return store.count_live(tx)


def cordon(
    work: Work,
    identity: Identity,
    node_id: str,
    mode: CordonMode = "cordon",
    break_notice: bool = False,
) -> fleet.Node:
    """Take a node out of sale: `cordon` lets its workloads run, `drain` gives each its notice,
    `immediate` ends them now. Whose notice was withdrawn a moment ago gets its own from the loop.

    Immediate is refused (NoticeProtected) while a workload there is protected by its notice, unless
    `break_notice`: then each is audited, and its penalty is posted in this Work.
    """
    tenancy.require(identity, Action.ADMINISTER_FLEET)
    if mode not in ("cordon", "drain", "immediate"):
        raise Invalid("mode is cordon, drain or immediate.", param="mode")
    runs = [run for run in store.list_live_runs_on(work.tx, node_id) if run.state in life.STANDING]
    if mode == "immediate":
        _check_broken(work, runs, break_notice=break_notice)
    node = fleet.get_node(work.tx, node_id)
    for target in (NodeState.CORDONED, NodeState.DRAINING):
        if target is NodeState.DRAINING and mode == "cordon":
            continue
        if node.state is not NodeState.DRAINING:
            node = fleet.set_node_state(work, node_id, target, f"{mode} by {work.actor.id}")
    for run in runs:
        if mode == "drain":
            _drain(work, run)
        elif mode == "immediate":
            _break(work, run)
    return node


def uncordon(work: Work, identity: Identity, node_id: str) -> fleet.Node:
    """Back to production: a drain is called off, and with it the notices that are not used up."""
    tenancy.require(identity, Action.ADMINISTER_FLEET)
    why = f"uncordon by {work.actor.id}"
    if fleet.get_node(work.tx, node_id).state is NodeState.DRAINING:
        fleet.set_node_state(work, node_id, NodeState.CORDONED, why)
    node = fleet.set_node_state(work, node_id, NodeState.PRODUCTION, why)
    for run in store.list_live_runs_on(work.tx, node_id):
        claim = allocation.get_claim(work.tx, run.claim_id)
        is_ours = claim.noticed_at is not None and claim.notice_reason == Reason.MAINTENANCE
        if is_ours and claim.term_at is not None and claim.term_at > work.now:
            allocation.withdraw_notice(work, claim.id)
    return node


def _check_broken(work: Work, runs: Sequence[Run], *, break_notice: bool) -> None:
    protected = [run for run in runs if run.state is RunState.RUNNING and _is_sale(work, run)]
    if not protected or break_notice:
        return
    claims = [allocation.get_claim(work.tx, run.claim_id) for run in protected]
    free_at = max(allocation.earliest_term_at(claim, work.now) for claim in claims)
    raise NoticeProtected(
        f"{len(protected)} workloads there are protected by their notice: drain instead (the last "
        f"SIGTERM then comes at {free_at.isoformat(timespec='seconds')}), or send break_notice, "
        "which is audited and posts the penalty.",
        workloads=[run.workload_id for run in protected],
        earliest_at=free_at.isoformat(),
    )


def _drain(work: Work, run: Run) -> None:
    try:
        life.drain(work, run.id)
    except allocation.NoticeRecentlyWithdrawn:
        return  # The loop gives it as soon as it may be given.


def _break(work: Work, run: Run) -> None:
    if _is_sale(work, run):
        tenancy.audit(
            work,
            action="break_notice",
            target=run.workload_id,
            result="ok",
            detail={"node_id": run.node_id, "run_id": run.id, "reason": str(Reason.MAINTENANCE)},
        )
    life.break_notice(work, run, Reason.MAINTENANCE)


def _is_sale(work: Work, run: Run) -> bool:
    return store.get_workload(work.tx, run.workload_id).party == "sale"


# ---- helpers ------------------------------------------------------------------------------------


def _admit(work: Work, workload: Workload, contract: market.Contract, *, wait: bool) -> Workload:
    if wait and sealed.is_in_the_way(work.tx, workload):
        return admission.wait(work, workload)
    decision = admission.admit(work, workload, contract)
    if not isinstance(decision, Refused):
        return admission.begin(work, workload, decision)
    if not wait:
        raise admission.refusal(decision)
    return admission.wait(work, workload)


def _halt(work: Work, workload: Workload, desired: Desired, reason: Reason) -> Workload:
    """Towards `desired`, from any state that is not an end."""
    if workload.is_over:
        raise WrongState(f"It is {workload.state} already.", state=str(workload.state))
    if workload.desired is not desired:
        workload = store.update_workload(work, workload, desired=desired)
    if workload.is_live:
        return life.end_now(work, workload, reason)
    if desired is Desired.TERMINATED:
        ended = life.move(work, workload, Step.TERMINATED, reason=reason, waiting_since=None)
        life.close_contract(work, ended)
        return ended
    if workload.state is State.AWAITING_CAPACITY:
        return life.move(work, workload, Step.RESTED, reason=reason, waiting_since=None)
    return workload


def _fitting(spec: WorkloadSpec, quote: market.Quote) -> WorkloadSpec:
    """The spec with what the quote fixes. Raises Invalid where they differ."""
    if quote.count != 1:
        raise Invalid(
            "count is 1: a workload runs on one node; rent several, or quote a larger shape.",
            param="count",
        )
    grace = spec.stop_grace_seconds
    if grace is not None and grace != quote.stop_grace_seconds:
        raise Invalid(
            f"stop_grace_seconds is {quote.stop_grace_seconds} in the quote: ask for a quote with "
            f"{grace}.",
            param="stop_grace_seconds",
        )
    if spec.outbound and quote.outbound == "none":
        raise Invalid(
            "outbound is false here: this pool has no way out to the network.", param="outbound"
        )
    return dataclasses.replace(spec, stop_grace_seconds=quote.stop_grace_seconds)


def _check_fences(tx: Connection, pool_id: str) -> None:
    """Strangers go only where the fences hold; the refusal names the way."""
    for node in fleet.get_roster(tx, pool_id).closed_to_strangers:
        missing = fleet.missing_for_strangers(node)
        ways = {str(node.fences.get(name, {}).get("remedy", "")) for name in missing}
        way = "; ".join(sorted(filter(None, ways))) or "a package, root or a delegated cgroup"
        raise market.FencesMissing(
            f"Node {node.name} does not fence strangers off ({', '.join(missing)} missing): "
            f"the owner adds it ({way}), or serves trusted tenants only.",
            missing=list(missing),
        )
