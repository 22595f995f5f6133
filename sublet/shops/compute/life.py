"""What happens to a workload, each thing whole in one Work.

Every function reads the rows afresh and does nothing if they have moved on: what it records was
true when it was decided, and is recorded once. Money first, then capacity, then the workload:
that is the order of locks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import structlog

from sublet.base.kernel.interval import floor_ms
from sublet.base.store import Work
from sublet.capacity import allocation, fleet
from sublet.capacity.fleet import NodeState
from sublet.records import ledger, metering
from sublet.records.metering import MeterParty, Use
from sublet.rights import market
from sublet.shops.compute import store
from sublet.shops.compute.model import (
    MeterClosed,
    MeterOpened,
    Reason,
    Run,
    RunState,
    Workload,
    WorkloadChanged,
)
from sublet.shops.compute.reconcile import End, Terminating, outcome
from sublet.shops.compute.states import TERMINAL, State, Step, next_state

log = structlog.get_logger()

STANDING = frozenset({RunState.INTENDED, RunState.STARTING, RunState.RUNNING})
"""A run that is on its devices and not on its way out."""
RUNWAY = timedelta(hours=1)
"""How far ahead the owner's own runs and replicas may go without hearing from us; sold runs go as
far as they are paid."""


def move(
    work: Work, workload: Workload, step: Step, *, reason: Reason | None = None, **changes: Any
) -> Workload:
    """One transition, with its row and its event. Raises WrongState where the table has none."""
    to = next_state(workload.state, step)
    if to in TERMINAL:
        changes["ended_at"] = work.now
    store.insert_transition(work, workload, step, workload.state, to, reason, work.now)
    work.emit(
        WorkloadChanged(
            workload_id=workload.id,
            organisation_id=workload.organisation_id,
            from_state=workload.state,
            to_state=to,
            reason=reason,
        )
    )
    return store.update_workload(work, workload, state=to, reason=reason, **changes)


def requested(work: Work, workload: Workload) -> Workload:
    """A workload comes to be: its first row, before anything is decided about it."""
    made = store.insert_workload(work, workload)
    store.insert_transition(work, made, "requested", None, made.state, None, work.now)
    return made


# ---- the beginning ----------------------------------------------------------------------------


def intend(work: Work, workload: Workload) -> Run | None:
    """Bind devices to the workload's claim and write down that a run is to be started there.

    None: its devices are not free yet, or its last run is not over. From here to its opening the
    devices' time is overhead.
    """
    assert workload.claim_id is not None, "only what was admitted gets devices"
    allocation.begin_early(work, workload.claim_id)
    device_ids = allocation.place(work, workload.claim_id)
    if device_ids is None:
        return None
    devices = fleet.get_devices(work.tx, device_ids)
    before = store.find_last_run(work.tx, workload.id)
    if before is not None and not before.is_over:
        _switch_all(work, devices, Use.OVERHEAD, work.now, workload.claim_id)
        return None
    node_ids = {device.node_id for device in devices}
    assert len(node_ids) == 1, "a run's devices lie on one node"
    claim = allocation.get_claim(work.tx, workload.claim_id)
    runway = first_runway(work, workload)
    run = store.insert_run(
        work,
        Run(
            id=work.ids.new("run"),
            seq=0,
            workload_id=workload.id,
            organisation_id=workload.organisation_id,
            number=1 if before is None else before.number + 1,
            claim_id=claim.id,
            contract_id=workload.contract_id,
            pool_id=workload.pool_id,
            node_id=node_ids.pop(),
            devices=tuple(device.name for device in devices),
            device_ids=tuple(device_ids),
            state=RunState.INTENDED,
            intended_at=work.now,
            ends_at=claim.release.ends_at,
            notice_seconds=claim.release.notice_seconds or 0,
            started_at=None,
            t0=None,
            notice_reason=None,
            term_at=None,
            published_at=None,
            stop_reason=None,
            stop_grace_seconds=workload.spec.stop_grace_seconds or 0,
            runway_until=runway,
            runway_sent=runway,
            exited_at=None,
            exit_code=None,
            reason=None,
            gone_at=None,
            failure=None,
            is_forgotten=False,
        ),
    )
    _switch_all(work, devices, Use.OVERHEAD, work.now, run.id)
    return run


def first_runway(work: Work, workload: Workload) -> datetime:
    """How far the run is paid at its start: as long as its hold stands, less the scrub, so that a
    SIGTERM that comes a moment late is still paid for."""
    hold = ledger.find_hold(work.tx, workload.id)
    if hold is None:
        return work.now + RUNWAY
    scrub = timedelta(seconds=fleet.get_pool(work.tx, workload.pool_id).scrub_seconds)
    return hold.expires_at - scrub


def adopted(work: Work, run_id: str) -> None:
    run = _run(work, run_id, RunState.INTENDED)
    if run is not None:
        store.update_run(work, run, state=RunState.STARTING)


def opened(work: Work, run_id: str, at: datetime) -> None:
    """The engine's check passed at `at`: the workload has its devices, and its meter opens there.

    A run that is to end before it was handed over is never billed.
    """
    run = _run(work, run_id, RunState.STARTING)
    if run is None or run.stop_reason is not None:
        return
    claim = allocation.get_claim(work.tx, run.claim_id)
    if claim.noticed_at is not None:
        _end_before_opening(work, run, _reason(claim.notice_reason))
        return
    at = floor_ms(at)
    try:
        allocation.opened(work, run.claim_id, at)
    except allocation.NoticeInForce:
        # Its end was fixed for another before it began: it goes without having been billed.
        _end_before_opening(work, run, Reason.SPOT_INTERRUPTION)
        return
    workload = store.get_workload(work.tx, run.workload_id)
    metering.open_meter(
        work,
        run_id=run.id,
        workload_id=workload.id,
        organisation_id=workload.organisation_id,
        project_id=workload.project_id,
        contract_id=run.contract_id,
        pool_id=run.pool_id,
        node_id=run.node_id,
        devices=len(run.device_ids),
        party=_meter_party(workload),
        opened_at=at,
    )
    fleet.note_start_success(work, run.node_id)
    _switch(work, run.device_ids, _used(workload), at, run.id)
    run = store.update_run(work, run, state=RunState.RUNNING, started_at=at)
    move(work, workload, Step.STARTED, start_failures=0, failure=None)
    work.emit(
        MeterOpened(
            run_id=run.id,
            workload_id=workload.id,
            organisation_id=workload.organisation_id,
            contract_id=run.contract_id,
            at=at,
        )
    )


def advanced(work: Work, run_id: str, to: datetime, cpu_ms: int) -> None:
    """Seen alive: the meter goes on to there, and what nobody pays for ahead gets more runway."""
    run = store.find_run(work.tx, run_id)
    if run is None or run.state not in (RunState.RUNNING, RunState.STOPPING):
        return
    meter = metering.get_meter(work.tx, run_id)
    if not meter.is_open:
        return
    metering.advance(work, run_id, to=to, cpu_ms=cpu_ms)
    if meter.party is MeterParty.FIRST_PARTY and run.runway_until - work.now < RUNWAY / 2:
        store.update_run(work, run, runway_until=work.now + RUNWAY)


def extended(work: Work, run_id: str, until: datetime) -> None:
    """The engine knows how far the run is paid."""
    run = store.find_run(work.tx, run_id)
    if run is not None and not run.is_over:
        store.update_run(work, run, runway_sent=until)


# ---- notices ----------------------------------------------------------------------------------


def give_notice(
    work: Work, workload: Workload, reason: Reason, *, at_earliest: datetime | None = None
) -> None:
    """The workload is to leave, with all the notice it was sold; noticed already: no effect.

    Raises what allocation refuses: a claim without notice, a notice withdrawn a moment ago.
    """
    if workload.claim_id is None or workload.state is State.STOPPING:
        return
    claim = allocation.get_claim(work.tx, workload.claim_id)
    if claim.noticed_at is not None:
        return
    term_at = allocation.earliest_term_at(claim, work.now)
    allocation.give_notice(
        work, claim.id, reason=str(reason), term_at=max(term_at, at_earliest or term_at)
    )


def drain(work: Work, run_id: str) -> None:
    """Notice for maintenance to a run on a node that is drained; sold without a notice: none, the
    node is drained when it ends. Raises NoticeRecentlyWithdrawn."""
    run = store.find_run(work.tx, run_id)
    if run is None or run.state not in STANDING or run.stop_reason is not None:
        return
    try:
        give_notice(work, store.get_workload(work.tx, run.workload_id), Reason.MAINTENANCE)
    except allocation.NotNoticeable:
        return


def noticed(work: Work, event: allocation.ClaimNoticed) -> None:
    """A claim's end is fixed. Before the meter opens it ends at once, unbilled; after it, at
    SIGTERM."""
    reason = _reason(event.reason)
    run = store.find_run_of_claim(work.tx, event.claim_id)
    if run is None:
        _end_unplaced(work, event.holder, event.claim_id, reason)
        return
    if run.stop_reason is not None:
        return
    if run.state in (RunState.INTENDED, RunState.STARTING):
        _end_before_opening(work, run, reason)
    elif run.state is RunState.RUNNING and run.term_at is None:
        workload = store.get_workload(work.tx, run.workload_id)
        # What is promised is paid for first: the hold reaches past the grace, and so the runway.
        grace_over = event.term_at + timedelta(seconds=run.stop_grace_seconds)
        if not market.cover(work, run.contract_id, event.free_by):
            # The credit ends before the notice would: it goes while its hold still covers it.
            log.warning("notice_not_covered", run_id=run.id, free_by=str(event.free_by))
            end_now(work, workload, Reason.CREDIT_EXHAUSTED)
            return
        store.update_run(
            work,
            run,
            t0=event.noticed_at,
            term_at=event.term_at,
            notice_reason=reason,
            published_at=None,
            runway_until=max(run.runway_until, grace_over),
        )
        move(work, workload, Step.NOTICED, reason=reason)


def published(work: Work, run_id: str, *, at: datetime, term_at: datetime) -> None:
    """The workload can see its notice; the engine has fixed its SIGTERM."""
    run = _run(work, run_id, RunState.RUNNING)
    if run is not None:
        store.update_run(work, run, published_at=at, term_at=term_at)


def withdrawn(work: Work, event: allocation.NoticeWithdrawn) -> None:
    """A notice is called off. It counts until it is seen to be taken back (`unpublished`): if its
    SIGTERM comes first, it was given."""
    run = store.find_run_of_claim(work.tx, event.claim_id)
    if run is None or run.state is not RunState.RUNNING or run.term_at is None:
        return
    store.update_run(work, run, term_at=None)
    workload = store.get_workload(work.tx, run.workload_id)
    if workload.state is State.INTERRUPTING:
        move(work, workload, Step.WITHDRAWN)


def unpublished(work: Work, run_id: str) -> None:
    """The notice is off the engine: there was none."""
    run = _run(work, run_id, RunState.RUNNING)
    if run is not None and run.term_at is None:
        store.update_run(work, run, t0=None, notice_reason=None, published_at=None)


# ---- the end ----------------------------------------------------------------------------------


def end_now(work: Work, workload: Workload, reason: Reason) -> Workload:
    """SIGTERM as soon as the loop gets to it; where no run was started, the end at once."""
    run = store.find_live_run(work.tx, workload.id)
    if run is None or run.claim_id != workload.claim_id:
        return _end_without_run(work, workload, reason)
    if run.stop_reason is None:
        store.update_run(work, run, stop_reason=reason)
    if workload.state is State.STOPPING:
        return workload
    return move(work, workload, Step.ENDING, reason=reason)


def end_all(work: Work, reason: Reason) -> int:
    """End whatever is live and not ending yet; returns how many."""
    ending = store.list_unending(work.tx)
    for workload in ending:
        end_now(work, workload, reason)
    return len(ending)


def device_lost(work: Work, device_id: str) -> None:
    """A device is down: what runs on it ends, and is not billed for what it no longer has."""
    for run in store.list_live_runs_on(work.tx, fleet.get_device(work.tx, device_id).node_id):
        workload = store.get_workload(work.tx, run.workload_id)
        if device_id in run.device_ids and workload.is_live:
            end_now(work, workload, Reason.NODE_FAULT)


def _end_before_opening(work: Work, run: Run, reason: Reason) -> None:
    store.update_run(work, run, stop_reason=reason)
    workload = store.get_workload(work.tx, run.workload_id)
    if workload.state is State.PROVISIONING:
        move(work, workload, Step.ENDING, reason=reason)


def _end_unplaced(work: Work, workload_id: str, claim_id: str, reason: Reason) -> None:
    workload = next(iter(store.get_workloads(work.tx, [workload_id]).values()), None)
    if workload is not None and workload.claim_id == claim_id and workload.is_live:
        _end_without_run(work, workload, reason)


def _end_without_run(work: Work, workload: Workload, reason: Reason) -> Workload:
    """It had a claim and no devices yet: nothing is metered, nothing to scrub."""
    assert workload.claim_id is not None
    drop_hold(work, workload)
    _give_back(work, workload.claim_id)
    end = End(
        reason=reason, by_itself=False, closes_at=None, exited_at=None, exit_code=None, cpu_ms=0
    )
    return _come_to_rest(work, move(work, workload, Step.ENDING, reason=reason), end)


def terminating(work: Work, run_id: str, seen: Terminating) -> None:
    """SIGTERM was seen. The meter closes there, unless it was the consumer who stopped it."""
    run = _run(work, run_id, RunState.RUNNING)
    if run is None:
        return
    if seen.closes_at is not None:
        _close(work, run, seen.closes_at, seen.reason, 0)
    store.update_run(work, run, state=RunState.STOPPING, term_at=seen.term_at, reason=seen.reason)
    workload = store.get_workload(work.tx, run.workload_id)
    if workload.state is not State.STOPPING:
        move(work, workload, Step.ENDING, reason=seen.reason)


def ended(work: Work, run_id: str, end: End) -> None:
    """Seen gone: the meter closes, the workload comes to rest or is queued again.

    Its devices stay held until they are scrubbed; the next run may be admitted elsewhere.
    """
    run = store.find_run(work.tx, run_id)
    if run is None or run.is_over or run.state is RunState.GONE:
        return
    _close(work, run, end.closes_at, end.reason, end.cpu_ms)
    workload = store.get_workload(work.tx, run.workload_id)
    drop_hold(work, workload)
    store.update_run(
        work,
        run,
        state=RunState.GONE,
        exited_at=end.exited_at,
        exit_code=end.exit_code,
        reason=run.reason or end.reason,
        term_at=end.term_at or run.term_at,
        gone_at=work.now,
        failure=end.failure,
    )
    if end.failure is not None:
        fleet.note_start_failure(work, run.node_id)
        keep_neighbours(work, run.node_id)
    if end.term_at is not None and workload.state is not State.STOPPING:
        # SIGTERM and exit lay between two looks.
        workload = move(work, workload, Step.ENDING, reason=end.reason)
    _come_to_rest(work, workload, end)


def _come_to_rest(work: Work, workload: Workload, end: End) -> Workload:
    step = outcome(
        kind=workload.kind,
        spec=workload.spec,
        desired=workload.desired,
        retries=workload.retries,
        start_failures=workload.start_failures,
        end=end,
    )
    changes: dict[str, Any] = {"claim_id": None}
    if step in (Step.REQUEUED, Step.RETRIED):
        changes["waiting_since"] = work.now
    if step is Step.RETRIED:
        changes["retries"] = workload.retries + 1
    if end.failure is not None:
        changes["start_failures"] = workload.start_failures + 1
        changes["failure"] = end.failure
    if workload.kind != "instance":
        changes["exit_code"] = end.exit_code
    rested = move(work, workload, step, reason=end.reason, **changes)
    if rested.is_over:
        close_contract(work, rested)
    return rested


def drop_hold(work: Work, workload: Workload) -> None:
    """What holds no devices holds no credit."""
    hold = ledger.find_hold(work.tx, workload.id)
    if hold is not None:
        ledger.release_hold(work, hold.id)


def close_contract(work: Work, workload: Workload) -> None:
    """Nothing more will run under it."""
    market.end_contract(work, workload.contract_id)


def break_notice(work: Work, run: Run, reason: Reason) -> None:
    """End a run against its notice: its meter closes at its last evidence, and the penalty of its
    contract is posted with it."""
    meter = metering.find_meter(work.tx, run.id)
    if meter is not None and meter.is_open:
        # It counts as noticed where its meter ends; a notice that was published before is void.
        t0 = run.t0 or meter.last_evidence_at
        run = store.update_run(work, run, t0=t0, notice_reason=reason, published_at=None)
        _close(work, run, None, reason, 0)
    end_now(work, store.get_workload(work.tx, run.workload_id), reason)


def _close(work: Work, run: Run, at: datetime | None, reason: Reason, cpu_ms: int) -> None:
    """Close the meter, if it is open, and settle in the same Work, the owner's credit included."""
    meter = metering.find_meter(work.tx, run.id)
    if meter is None or not meter.is_open:
        return
    closed_at = meter.last_evidence_at if at is None else at
    meter = metering.close_meter(work, run.id, at=closed_at, reason=reason, cpu_ms=cpu_ms)
    # A notice that was called off counts only if it ended the run all the same.
    is_void = run.is_called_off and reason is not run.notice_reason
    assert meter.closed_at is not None
    market.settle(
        work,
        run.contract_id,
        closed=market.Closed(
            t0=None if is_void else run.t0,
            opened_at=meter.opened_at,
            closed_at=meter.closed_at,
            reason=reason,
            notice_reason=None if is_void else run.notice_reason,
        ),
    )
    _switch(work, run.device_ids, Use.OVERHEAD, meter.closed_at, run.id)
    work.emit(
        MeterClosed(
            run_id=run.id,
            workload_id=run.workload_id,
            organisation_id=run.organisation_id,
            contract_id=run.contract_id,
            at=meter.closed_at,
            reason=reason,
        )
    )


# ---- the scrub --------------------------------------------------------------------------------


def released(work: Work, run_id: str) -> None:
    """Clean: the devices are free again."""
    run = _run(work, run_id, RunState.GONE)
    if run is None:
        return
    _give_back(work, run.claim_id)
    store.update_run(work, run, state=_over(run))


def given_up(work: Work, run_id: str, findings: tuple[str, ...]) -> None:
    """Not clean in time: the node goes to triage, and nobody gets these devices before a person
    has looked."""
    run = _run(work, run_id, RunState.GONE)
    if run is None:
        return
    why = f"{run.id} could not be scrubbed: {'; '.join(findings)}"
    node = fleet.get_node(work.tx, run.node_id)
    if node.state is not NodeState.TRIAGE and NodeState.TRIAGE in fleet.reachable_states(
        node.state
    ):
        fleet.set_node_state(work, run.node_id, NodeState.TRIAGE, why)
        keep_neighbours(work, run.node_id)
    _give_back(work, run.claim_id)
    store.update_run(work, run, state=_over(run), failure=why)


def keep_neighbours(work: Work, node_id: str) -> None:
    """What still runs on a node that was taken out runs on, and its devices' time is its own."""
    for run in store.list_live_runs_on(work.tx, node_id):
        meter = metering.find_meter(work.tx, run.id)
        if meter is not None and meter.is_open:
            workload = store.get_workload(work.tx, run.workload_id)
            _switch(work, run.device_ids, _used(workload), work.now, run.id)


# ---- helpers ----------------------------------------------------------------------------------


def _run(work: Work, run_id: str, state: RunState) -> Run | None:
    """The run if it is still in that state."""
    run = store.find_run(work.tx, run_id)
    return run if run is not None and run.state is state else None


def _over(run: Run) -> RunState:
    return RunState.FAILED if run.started_at is None else RunState.SCRUBBED


def _used(workload: Workload) -> Use:
    if workload.kind == "replica":
        return Use.SERVING
    return Use.FIRST_PARTY if workload.party == "first_party" else Use.SOLD_USED


def _meter_party(workload: Workload) -> MeterParty:
    """A sale's meter runs on held credit. A replica has none: what its devices earn is tokens."""
    is_sold = workload.party == "sale" and workload.kind != "replica"
    return MeterParty.SALE if is_sold else MeterParty.FIRST_PARTY


def _switch(work: Work, device_ids: Sequence[str], use: Use, at: datetime, reference: str) -> None:
    """The devices do that from `at` on; one that is lost stays down."""
    _switch_all(work, fleet.get_devices(work.tx, device_ids), use, at, reference)


def _switch_all(
    work: Work, devices: Iterable[fleet.Device], use: Use, at: datetime, reference: str
) -> None:
    for device in devices:
        if device.healthy:
            metering.switch_device(work, device.id, use, at, reference)


def _give_back(work: Work, claim_id: str) -> None:
    """Release a claim; its devices rest, or go on as the owner's where a recall holds them.

    Those stay the owner's on a node that was taken out as well, as all that is held does: nobody
    would make them the owner's again when the node comes back.
    """
    device_ids = [row.device_id for row in allocation.placements_of(work.tx, claim_id)]
    allocation.release(work, claim_id)
    for device_id in device_ids:
        holder = allocation.holder_of_device(work.tx, device_id)
        if holder is not None:
            metering.switch_device(work, device_id, Use.FIRST_PARTY, work.now, holder.holder)
        else:
            rest = fleet.resting_use(work.tx, device_id)
            metering.switch_device(work, device_id, rest, work.now)


def _reason(text: str | None) -> Reason:
    """The reason of a notice; one that is none of ours is the owner's will."""
    try:
        return Reason(text or "")
    except ValueError:
        return Reason.OWNER_RECALL
