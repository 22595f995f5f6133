"""Invariants of workloads: one live run, meters that match runs, transitions by the table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import sqlalchemy as sa

from sublet.audit.registry import Look, invariant
from sublet.records.metering.store import meters
from sublet.shops.compute.model import OVER, RunState
from sublet.shops.compute.states import LIVE, TABLE, State, Step
from sublet.shops.compute.store import runs, transitions, workloads


@invariant("A workload has at most one live run.")
def one_live_run(look: Look) -> Iterator[str]:
    live: dict[str, list[str]] = defaultdict(list)
    query = sa.select(runs.c.workload_id, runs.c.id).where(runs.c.state.not_in([*OVER]))
    for row in look.tx.execute(query):
        live[row.workload_id].append(row.id)
    for workload_id, found in live.items():
        if len(found) > 1:
            yield f"{workload_id} lives twice: {', '.join(found)}"


@invariant("Runs of one workload never overlap: the next starts when the last was seen gone.")
def runs_do_not_overlap(look: Look) -> Iterator[str]:
    last: dict[str, sa.Row[tuple[object, ...]]] = {}
    for row in look.tx.execute(sa.select(runs).order_by(runs.c.workload_id, runs.c.number)):
        before = last.get(row.workload_id)
        if before is not None and row.started_at is not None:
            gone = before.exited_at or before.gone_at
            if gone is not None and row.started_at < gone:
                yield f"{row.id} started at {row.started_at}, {before.id} was gone at {gone}"
        last[row.workload_id] = row


@invariant("A meter is open exactly while its run is handed over and not yet ended.")
def meters_match_runs(look: Look) -> Iterator[str]:
    by_run = {row.id: row for row in look.tx.execute(sa.select(runs))}
    found = {row.run_id: row for row in look.tx.execute(sa.select(meters))}
    for run_id, meter in found.items():
        run = by_run.get(run_id)
        if run is None or run.started_at is None:
            yield f"{run_id}: metered, and never handed over"
        elif meter.closed_at is None and run.state in (*OVER, RunState.GONE):
            yield f"{run_id}: {run.state}, and its meter runs on"
        elif meter.opened_at != run.started_at:
            yield f"{run_id}: handed over at {run.started_at}, metered from {meter.opened_at}"
    for run_id, run in by_run.items():
        if run.started_at is not None and run_id not in found:
            yield f"{run_id}: handed over at {run.started_at}, and never metered"


@invariant("Every change of state is one that the table allows, and they form one chain.")
def transitions_form_a_chain(look: Look) -> Iterator[str]:
    at: dict[str, str | None] = {}
    for row in look.tx.execute(sa.select(transitions).order_by(transitions.c.seq)):
        before = at.get(row.workload_id)
        if row.from_state != before:
            yield f"{row.workload_id}: step {row.seq} leaves {row.from_state}, it was {before}"
        elif before is not None:
            allowed = TABLE.get((State(before), Step(row.event)))
            if allowed != row.to_state:
                yield f"{row.workload_id}: {before} became {row.to_state} by {row.event}"
        at[row.workload_id] = row.to_state
    for row in look.tx.execute(sa.select(workloads.c.id, workloads.c.state)):
        if at.get(row.id) != row.state:
            yield f"{row.id} is {row.state}, its last transition says {at.get(row.id)}"


@invariant("Only a workload that is being served holds a claim, and such a one has it.")
def claims_follow_states(look: Look) -> Iterator[str]:
    columns = (workloads.c.id, workloads.c.state, workloads.c.claim_id)
    for row in look.tx.execute(sa.select(*columns)):
        if (row.claim_id is not None) != (row.state in LIVE):
            yield f"{row.id} is {row.state} with claim {row.claim_id}"


@invariant("Nobody ended by a notice got SIGTERM before the instant that the notice had named.")
def no_sigterm_before_its_time(look: Look) -> Iterator[str]:
    query = sa.select(runs).where(
        runs.c.published_at.is_not(None),
        runs.c.t0.is_not(None),
        runs.c.reason == runs.c.notice_reason,
        runs.c.state.in_([RunState.STOPPING, RunState.GONE, RunState.SCRUBBED]),
    )
    for row in look.tx.execute(query):
        told = (row.term_at - row.published_at).total_seconds()
        if row.term_at is not None and told < row.notice_seconds - 0.001:
            yield f"{row.id} was told {told:.3f} s before SIGTERM, sold were {row.notice_seconds} s"
