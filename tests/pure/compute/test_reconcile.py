from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.capacity.engines.port import Observation, Phase
from sublet.shops.compute.model import (
    INTERRUPTIONS,
    Desired,
    Reason,
    Run,
    RunState,
    WorkloadSpec,
)
from sublet.shops.compute.reconcile import (
    Abandon,
    Adopt,
    Advance,
    Begin,
    End,
    Extend,
    Open,
    Publish,
    Published,
    Scrub,
    Seen,
    Stop,
    Terminating,
    Unpublished,
    Withdraw,
    decide,
    outcome,
    stray,
)
from sublet.shops.compute.states import Step

NOW = datetime(2026, 11, 2, 12, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def a_run(state: RunState = RunState.RUNNING, **fields: Any) -> Run:
    run = Run(
        id="run_1",
        seq=1,
        workload_id="job_1",
        organisation_id="org_1",
        number=1,
        claim_id="clm_1",
        contract_id="con_1",
        pool_id="pol_1",
        node_id="nod_1",
        devices=("n0001.gpu0",),
        device_ids=("dev_1",),
        state=state,
        intended_at=at(-100),
        ends_at=None,
        notice_seconds=120,
        started_at=at(-90) if state not in (RunState.INTENDED, RunState.STARTING) else None,
        t0=None,
        notice_reason=None,
        term_at=None,
        published_at=None,
        stop_reason=None,
        stop_grace_seconds=30,
        runway_until=at(900),
        runway_sent=at(900),
        exited_at=None,
        exit_code=None,
        reason=None,
        gone_at=None,
        failure=None,
        is_forgotten=False,
    )
    return dataclasses.replace(run, **fields)


def seen(phase: Phase | None, **fields: Any) -> Seen:
    observation = None
    if phase is not None:
        if phase not in (Phase.STARTING, Phase.FAILED):
            fields.setdefault("started_at", at(-90))
        observation = Observation(run_id="run_1", workload_id="job_1", phase=phase, **fields)
    return Seen(observation=observation, metered_to=at(-30))


def act(run: Run, view: Seen) -> tuple[Any, ...]:
    return decide(run, view, now=NOW)


def test_an_intent_without_trace_is_started() -> None:
    assert act(a_run(RunState.INTENDED), seen(None)) == (Begin(),)


def test_what_runs_after_a_crash_is_adopted_at_its_real_start() -> None:
    found = act(a_run(RunState.INTENDED), seen(Phase.RUNNING, started_at=at(-55)))
    assert found == (Adopt(), Open(at(-55)))


def test_a_job_that_ran_between_two_looks_is_opened_first() -> None:
    view = seen(Phase.EXITED, started_at=at(-5), exited_at=at(-2), exit_code=0)
    assert act(a_run(RunState.STARTING), view) == (Open(at(-5)),)


def test_a_start_that_failed_frees_its_place() -> None:
    [end] = act(a_run(RunState.STARTING), seen(Phase.FAILED, failure="no sandbox"))
    assert (end.failure, end.reason, end.closes_at) == ("no sandbox", Reason.NODE_FAULT, None)


def test_what_ends_before_it_was_handed_over_is_stopped_unopened() -> None:
    run = a_run(RunState.STARTING, stop_reason=Reason.OWNER_RECALL)
    assert act(run, seen(Phase.RUNNING)) == (Stop(Reason.OWNER_RECALL, 30),)
    [end] = act(run, seen(Phase.EXITED, term_at=at(-1), exited_at=at(0), exit_code=143))
    assert (end.closes_at, end.failure) == (None, None)


def test_an_intent_that_was_stopped_is_never_started() -> None:
    [end] = act(a_run(RunState.INTENDED, stop_reason=Reason.USER), seen(None))
    assert isinstance(end, End)


def test_a_notice_counts_from_when_it_can_be_seen() -> None:
    run = a_run(t0=at(-30), term_at=at(90), notice_reason=Reason.OWNER_RECALL)
    assert act(run, seen(Phase.RUNNING)) == (Publish(at(120)),)
    firm = dataclasses.replace(run, term_at=at(3000))
    assert act(firm, seen(Phase.RUNNING)) == (Publish(at(3000)),)


def test_a_notice_whose_record_was_lost_is_not_given_twice() -> None:
    run = a_run(t0=at(-30), term_at=at(90), notice_reason=Reason.OWNER_RECALL)
    assert act(run, seen(Phase.RUNNING, deadline_at=at(95))) == (Published(at(95)),)


def test_a_withdrawn_notice_is_taken_back_once() -> None:
    called_off = a_run(t0=at(-30), notice_reason=Reason.OWNER_RECALL, published_at=at(-10))
    assert act(called_off, seen(Phase.RUNNING, deadline_at=at(95))) == (Withdraw(),)
    assert act(called_off, seen(Phase.RUNNING)) == (Unpublished(),)
    assert act(a_run(), seen(Phase.RUNNING, deadline_at=at(95))) == (Withdraw(),)
    assert act(a_run(), seen(Phase.RUNNING)) == ()


def test_sigterm_before_the_withdrawal_is_the_notices() -> None:
    called_off = a_run(t0=at(-30), notice_reason=Reason.OWNER_RECALL, published_at=at(-10))
    late = seen(Phase.STOPPING, term_at=at(-1), term_reason="notice")
    assert act(called_off, late) == (Terminating(at(-1), Reason.OWNER_RECALL, at(-1)),)


def test_a_second_notice_is_not_taken_for_the_one_that_was_called_off() -> None:
    run = a_run(t0=at(0), term_at=at(120), notice_reason=Reason.OWNER_RECALL)
    assert act(run, seen(Phase.RUNNING, deadline_at=at(95))) == (Publish(at(120)),)


def test_evidence_and_runway_are_carried_on() -> None:
    run = a_run(runway_until=at(1800))
    assert act(run, seen(Phase.RUNNING, last_evidence_at=at(30), cpu_ms=5)) == (
        Extend(at(1800)),
        Advance(at(30), 5),
    )


@pytest.mark.parametrize(
    ("said", "reason", "closes"),
    [
        ("notice", Reason.OWNER_RECALL, at(-3)),
        ("stop:user", Reason.USER, None),
        ("stop:credit_exhausted", Reason.CREDIT_EXHAUSTED, at(-3)),
        ("control_lost", Reason.CONTROL_LOST, at(-3)),
        ("disk", Reason.ABUSE, at(-3)),
    ],
)
def test_the_meter_closes_at_sigterm_unless_the_consumer_stopped_it(
    said: str, reason: Reason, closes: datetime | None
) -> None:
    run = a_run(t0=at(-200), notice_reason=Reason.OWNER_RECALL, published_at=at(-200))
    found = act(run, seen(Phase.STOPPING, term_at=at(-3), term_reason=said))
    assert found == (Terminating(at(-3), reason, closes),)
    [end] = act(
        run,
        seen(Phase.EXITED, term_at=at(-3), term_reason=said, exited_at=at(-1), exit_code=143),
    )
    assert (end.reason, end.closes_at, end.by_itself) == (reason, closes or at(-1), False)


def test_its_own_exit_is_billed_to_the_exit() -> None:
    [end] = act(a_run(), seen(Phase.EXITED, exited_at=at(-1), exit_code=3))
    assert (end.closes_at, end.by_itself, end.exit_code) == (at(-1), True, 3)


def test_an_end_that_nobody_saw_is_a_fault_of_the_node() -> None:
    [end] = act(a_run(), seen(Phase.EXITED, exited_at=at(-40), exit_code=None))
    assert (end.reason, end.closes_at, end.by_itself) == (Reason.NODE_FAULT, at(-40), False)


def test_silence_is_not_death() -> None:
    quiet = seen(Phase.SILENT, last_evidence_at=at(-500))
    assert act(a_run(), quiet) == ()
    assert act(a_run(stop_reason=Reason.USER), quiet) == ()
    [end] = act(a_run(), dataclasses.replace(quiet, is_fenced=True))
    assert (end.reason, end.closes_at) == (Reason.NODE_FAULT, at(-500))


def test_one_empty_answer_is_not_death() -> None:
    assert act(a_run(), seen(None)) == ()
    [end] = act(a_run(), dataclasses.replace(seen(None), is_gone=True))
    assert (end.reason, end.closes_at) == (Reason.NODE_FAULT, None)


def test_a_bought_end_is_kept() -> None:
    assert act(a_run(ends_at=at(0)), seen(Phase.RUNNING)) == (Stop(Reason.BLOCK_END, 30),)
    assert act(a_run(ends_at=at(1)), seen(Phase.RUNNING)) == ()


def test_what_was_taken_for_gone_and_lives_is_ended_before_its_scrub() -> None:
    gone = a_run(RunState.GONE, gone_at=at(-5))
    assert act(gone, seen(Phase.RUNNING)) == (Stop(None, 0),)
    assert act(gone, seen(Phase.SILENT)) == ()
    assert act(gone, seen(Phase.EXITED)) == (Scrub(),)
    assert act(gone, seen(None)) == (Abandon(),)


def test_strays_are_ended_and_scrubbed() -> None:
    assert stray(seen(Phase.RUNNING).observation) == (Stop(None, 0),)
    assert stray(seen(Phase.EXITED).observation) == (Scrub(),)
    assert stray(seen(Phase.EXITED, scrubbed=True).observation) == ()


@given(
    state=st.sampled_from(RunState),
    phase=st.sampled_from([None, *Phase]),
    noticed=st.booleans(),
    stopped=st.booleans(),
    term=st.booleans(),
    fenced=st.booleans(),
    gone=st.booleans(),
)
def test_no_meter_opens_twice_and_nothing_starts_that_is_there(
    state: RunState,
    phase: Phase | None,
    noticed: bool,
    stopped: bool,
    term: bool,
    fenced: bool,
    gone: bool,
) -> None:
    run = a_run(
        state,
        t0=at(-10) if noticed else None,
        term_at=at(110) if noticed else None,
        notice_reason=Reason.PRICE if noticed else None,
        stop_reason=Reason.USER if stopped else None,
        gone_at=at(-5),
    )
    view = dataclasses.replace(
        seen(phase, **({"term_at": at(-1), "term_reason": "notice"} if term else {})),
        is_fenced=fenced,
        is_gone=gone,
    )
    found = act(run, view)
    kinds = [type(action) for action in found]
    assert len(kinds) == len(set(kinds))
    if Begin in kinds:
        assert phase is None
        assert state is RunState.INTENDED
        assert not stopped
    if Open in kinds:
        assert state in (RunState.INTENDED, RunState.STARTING)
        assert not stopped
    if Scrub in kinds:
        assert state in (RunState.GONE, RunState.SCRUBBED, RunState.FAILED)
        assert phase in (Phase.EXITED, Phase.FAILED)
    for action in found:
        if isinstance(action, Publish):
            assert action.term_at >= at(120)


def ended(**fields: Any) -> End:
    plain = End(
        reason=Reason.USER,
        by_itself=False,
        closes_at=None,
        exited_at=None,
        exit_code=None,
        cpu_ms=0,
    )
    return dataclasses.replace(plain, **fields)


def rest(kind: Any, end: End, **fields: Any) -> Step:
    spec = WorkloadSpec(
        max_retries=fields.pop("max_retries", 0),
        requeue=fields.pop("requeue", True),
        auto_resume=fields.pop("auto_resume", False),
    )
    values = {"desired": Desired.RUNNING, "retries": 0, "start_failures": 0, **fields}
    return outcome(kind=kind, spec=spec, end=end, **values)


@pytest.mark.parametrize("reason", list(Reason))
def test_interruptions_requeue_and_the_rest_ends(reason: Reason) -> None:
    end = ended(reason=reason)
    again = reason in INTERRUPTIONS
    assert (rest("job", end) is Step.REQUEUED) == again
    assert rest("job", end, requeue=False) in (Step.FAILED, Step.TERMINATED)
    assert rest("instance", end) is Step.RESTED
    assert (rest("instance", end, auto_resume=True) is Step.REQUEUED) == again
    assert rest("job", end, desired=Desired.TERMINATED) is Step.TERMINATED


def test_only_its_own_failures_spend_retries() -> None:
    failed = ended(by_itself=True, exit_code=1)
    assert rest("job", failed, max_retries=3, retries=2) is Step.RETRIED
    assert rest("job", failed, max_retries=3, retries=3) is Step.FAILED
    assert rest("job", ended(by_itself=True, exit_code=0)) is Step.COMPLETED
    for _ in range(8):
        assert rest("job", ended(reason=Reason.OWNER_RECALL), retries=3) is Step.REQUEUED


def test_a_failed_start_tries_another_place_three_times() -> None:
    failed = ended(reason=Reason.NODE_FAULT, failure="it did not start")
    assert rest("instance", failed) is Step.REQUEUED
    assert rest("instance", failed, start_failures=2) is Step.FAILED
