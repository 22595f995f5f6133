"""Between the books and the engine: one look, the decisions, the calls, the records.

Engine calls lie outside every Work. What a call came to is read from the engine's next look and
never assumed from its answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog

from sublet.base.kernel.errors import Conflict, SubletError
from sublet.base.store import Actor, Store, Work
from sublet.capacity import fleet
from sublet.capacity.engines.port import (
    Engine,
    EngineError,
    Notice,
    Observation,
    Phase,
    RunNotFound,
    StartRefused,
)
from sublet.capacity.fleet import NodeState
from sublet.records import metering
from sublet.shops.compute import life, store
from sublet.shops.compute.model import Run, RunState, Workload
from sublet.shops.compute.orders import start_spec
from sublet.shops.compute.reconcile import (
    Abandon,
    Adopt,
    Advance,
    Begin,
    Call,
    End,
    Extend,
    Open,
    Publish,
    Published,
    Record,
    Scrub,
    Seen,
    Stop,
    Terminating,
    Unpublished,
    Withdraw,
    decide,
    would_requeue,
)
from sublet.shops.compute.reconcile import stray as decide_stray

log = structlog.get_logger()

ACTOR = Actor.system("compute")
LOOK = timedelta(seconds=1)
"""How often running workloads are looked at unless something is due: an exit is known this late,
and billed to its instant."""
SHORTEST_LOOK = timedelta(milliseconds=20)
"""How soon a start or an end is looked at again; then a tenth of the time it has taken so far."""
STRAY_LOOK = timedelta(seconds=10)
RETRY_START = timedelta(seconds=1)
MAX_START_CALLS = 3
RETRY_SCRUB = timedelta(seconds=5)
SCRUB_LIMIT = timedelta(seconds=120)
GONE_LOOKS = 3
GONE_AFTER = timedelta(seconds=10)
"""A run that the engine no longer names is gone after this many looks over this long: one empty
answer proves nothing."""
CLOSED_NODES = frozenset({NodeState.REPAIR})
"""States in which a person has the node in hand: nothing on it can come back by itself."""


@dataclass(slots=True)
class _Memory:
    """What is remembered of a run between looks; lost with the process, and found again."""

    absent_since: datetime | None = None
    absences: int = 0
    start_calls: int = 0
    start_failure: str | None = None
    not_before: datetime | None = None


@dataclass(slots=True)
class _Look:
    """The books and the engine at one moment."""

    runs: list[Run]
    workloads: Mapping[str, Workload]
    metered_to: Mapping[str, datetime]
    observed: Mapping[str, Observation] = field(default_factory=dict)
    fenced_nodes: frozenset[str] = frozenset()
    strays: Mapping[str, Run | None] = field(default_factory=dict)


class Driver:
    """Brings runs to where the books want them, and the books to where the runs are."""

    def __init__(self, books: Store, engine: Engine, look: timedelta = LOOK) -> None:
        self._books = books
        self._engine = engine
        self._look_every = look
        self._memory: dict[str, _Memory] = {}
        self._tried: set[tuple[str, type]] = set()
        self._strays_due: datetime | None = None
        self._runs: list[Run] = []
        self.has_released = False
        """A claim was released since this was last cleared: a waiter may fit now."""

    def begin_step(self) -> None:
        """Within one step no call to the engine is made twice for the same run."""
        self._tried.clear()

    def reconcile(self) -> bool:
        """One look and what follows from it. True: something changed, look again."""
        look = self._look()
        if look is None:
            return False
        changed = False
        advances: list[tuple[str, Advance]] = []
        for run in look.runs:
            actions = decide(run, self._seen(run, look), now=self._now())
            advances += [(run.id, action) for action in actions if isinstance(action, Advance)]
            records = [action for action in actions if isinstance(action, Record)]
            calls = [action for action in actions if isinstance(action, Call)]
            if records:
                changed = self._record(run, records) or changed
            for call in calls:
                changed = self._try(run, look.workloads[run.workload_id], call) or changed
        for run_id, known in look.strays.items():
            changed = self._end_stray(run_id, known, look.observed[run_id]) or changed
        if advances:
            self._advance(advances)
        return changed

    def _advance(self, advances: Sequence[tuple[str, Advance]]) -> None:
        """All in one Work; if that fails, each in its own, so that one keeps none of the others."""
        try:
            with self._books.work(ACTOR) as work:
                for run_id, advance in advances:
                    life.advanced(work, run_id, advance.to, advance.cpu_ms)
        except Exception:
            log.exception("runs_not_advanced", run_ids=[run_id for run_id, _ in advances])
            if len(advances) > 1:
                for one in advances:
                    self._advance([one])

    def next_due(self, now: datetime) -> datetime | None:
        """When to look again if nothing wakes us."""
        strays = [] if self._strays_due is None else [max(self._strays_due, now)]
        return min([*strays, *(self._next_look(run, now) for run in self._runs)], default=None)

    def _next_look(self, run: Run, now: datetime) -> datetime:
        since = None
        if run.state in (RunState.INTENDED, RunState.STARTING):
            since = run.intended_at
        elif run.state is RunState.STOPPING:
            since = run.term_at
        elif run.state is RunState.GONE:
            since = run.gone_at
        if since is None:
            wakes = [now + self._look_every]
            wakes += [at for at in (run.term_at, run.ends_at) if at is not None and at > now]
            return min(wakes)
        memory = self._memory.get(run.id)
        pause = min(max((now - since) / 10, SHORTEST_LOOK), self._look_every)
        soon = now + pause
        if memory is not None and memory.not_before is not None:
            return max(soon, memory.not_before)
        return soon

    def _now(self) -> datetime:
        return self._books.clock.now()

    # ---- looking ----------------------------------------------------------------------------

    def _look(self) -> _Look | None:
        """None: there is nothing to look at, or the engine does not answer."""
        with self._books.read() as tx:
            runs = store.list_live_runs(tx)
            self._runs = runs
            now = self._now()
            if not runs and self._strays_due is not None and now < self._strays_due:
                return None
            look = _Look(
                runs=runs,
                workloads=store.get_workloads(tx, {run.workload_id for run in runs}),
                metered_to={m.run_id: m.metered_to for m in metering.list_open_meters(tx)},
            )
        try:
            look.observed = self._engine.observe()
        except EngineError as error:
            log.warning("engine_not_observed", why=error.message)
            return None
        self._strays_due = now + STRAY_LOOK
        self._find_fenced(look)
        self._find_strays(look)
        return look

    def _find_fenced(self, look: _Look) -> None:
        """Only for runs that give no evidence does it matter whether their node was taken out."""
        quiet = {
            run.node_id
            for run in look.runs
            if run.id not in look.observed or look.observed[run.id].phase is Phase.SILENT
        }
        if quiet:
            with self._books.read() as tx:
                look.fenced_nodes = frozenset(
                    node_id
                    for node_id in quiet
                    if fleet.get_node(tx, node_id).state in CLOSED_NODES
                )

    def _find_strays(self, look: _Look) -> None:
        live = {run.id for run in look.runs}
        strange = {run_id for run_id, seen in look.observed.items() if not seen.scrubbed} - live
        if not strange:
            return
        with self._books.read() as tx:
            known = store.find_runs(tx, strange)
        # A run that was intended since the books were read is no stray: the next look has it.
        look.strays = {
            run_id: known.get(run_id)
            for run_id in sorted(strange)
            if run_id not in known or known[run_id].is_over
        }

    def _seen(self, run: Run, look: _Look) -> Seen:
        memory = self._memory.setdefault(run.id, _Memory())
        observation = look.observed.get(run.id)
        now = self._now()
        if observation is not None:
            memory.absent_since, memory.absences = None, 0
        else:
            memory.absent_since = memory.absent_since or now
            memory.absences += 1
        since = memory.absent_since
        return Seen(
            observation=observation,
            is_gone=since is not None
            and memory.absences >= GONE_LOOKS
            and now - since >= GONE_AFTER,
            is_fenced=run.node_id in look.fenced_nodes,
            start_failure=memory.start_failure,
            metered_to=look.metered_to.get(run.id),
        )

    # ---- recording --------------------------------------------------------------------------

    def _record(self, run: Run, records: list[Record]) -> bool:
        """The records of one decision, in one Work. What fails is said, keeps no other run waiting,
        and is tried again at the next step."""
        try:
            with self._books.work(ACTOR) as work:
                for record in records:
                    self._record_one(work, run.id, record)
        except Conflict as conflict:
            log.info("run_moved_on", run_id=run.id, why=conflict.message)
            return True
        except Exception:
            log.exception("run_not_recorded", run_id=run.id)
            return False
        if any(isinstance(record, End | Abandon) for record in records):
            self._memory.pop(run.id, None)
        return True

    def _record_one(self, work: Work, run_id: str, record: Record) -> None:
        match record:
            case Adopt():
                life.adopted(work, run_id)
            case Open():
                life.opened(work, run_id, record.at)
            case Published():
                life.published(work, run_id, at=work.now, term_at=record.term_at)
            case Unpublished():
                life.unpublished(work, run_id)
            case Terminating():
                life.terminating(work, run_id, record)
            case End():
                life.ended(work, run_id, record)
            case Abandon():
                life.released(work, run_id)
                self.has_released = True

    # ---- calling ----------------------------------------------------------------------------

    def _try(self, run: Run, workload: Workload, call: Call) -> bool:
        """One call, once a step for each run. True: it may have changed something."""
        memory = self._memory.setdefault(run.id, _Memory())
        is_early = memory.not_before is not None and self._now() < memory.not_before
        if is_early or (run.id, type(call)) in self._tried:
            return False
        self._tried.add((run.id, type(call)))
        try:
            return self._call(run, workload, call, memory)
        except RunNotFound:
            log.info("run_not_found", run_id=run.id, call=type(call).__name__)
        except EngineError as error:
            log.warning(
                "engine_call_failed", run_id=run.id, call=type(call).__name__, why=error.message
            )
        except Exception:
            log.exception("call_not_recorded", run_id=run.id, call=type(call).__name__)
        return False

    def _call(self, run: Run, workload: Workload, call: Call, memory: _Memory) -> bool:
        match call:
            case Begin():
                self._begin(run, workload, memory)
            case Publish():
                self._publish(run, workload, call)
            case Withdraw():
                # Its SIGTERM may have come first: only the next look says that it is taken back.
                self._engine.withdraw(run.id)
            case Stop():
                reason = "stray" if call.reason is None else str(call.reason)
                self._engine.stop(run.id, grace_seconds=call.grace_seconds, reason=reason)
            case Extend():
                self._engine.extend(run.id, call.until)
                with self._books.work(ACTOR) as work:
                    life.extended(work, run.id, call.until)
            case Scrub():
                return self._scrub(run, memory)
        return True

    def _begin(self, run: Run, workload: Workload, memory: _Memory) -> None:
        with self._books.read() as tx:
            spec = start_spec(tx, run, workload)
        try:
            self._engine.start(spec)
        except StartRefused as refused:
            memory.start_failure = refused.message
            log.warning("start_refused", run_id=run.id, why=refused.message)
        except EngineError as error:
            memory.start_calls += 1
            memory.not_before = self._now() + RETRY_START
            if memory.start_calls >= MAX_START_CALLS:
                memory.start_failure = error.message
            log.warning("start_failed", run_id=run.id, why=error.message)

    def _publish(self, run: Run, workload: Workload, call: Publish) -> None:
        """Let the workload see its notice, and count its time from when it could see it."""
        assert run.notice_reason is not None, "a notice has its reason"
        notice = Notice(
            term_at=call.term_at,
            action="requeue" if would_requeue(workload, run.notice_reason) else "stop",
            reason=str(run.notice_reason),
        )
        fixed = self._engine.notice(run.id, notice)
        seen_at = self._now()
        # On the boot clock: while UTC is slewed after the wall, its seconds are not of one length.
        clock = self._books.clock
        owed = clock.from_boot_ns(clock.to_boot_ns(seen_at) + run.notice_seconds * 1_000_000_000)
        if fixed < owed:
            # The call itself took time: the promise counts from when the notice was out.
            later = Notice(term_at=owed, action=notice.action, reason=notice.reason)
            fixed = self._engine.notice(run.id, later)
        with self._books.work(ACTOR) as work:
            life.published(work, run.id, at=seen_at, term_at=fixed)

    def _scrub(self, run: Run, memory: _Memory) -> bool:
        """Give the devices back once they are clean; past the limit, give the node to a person."""
        assert run.gone_at is not None, "what is scrubbed was seen gone"
        try:
            report = self._engine.scrub(run.id)
        except RunNotFound:
            report = None
        now = self._now()
        is_clean = report is None or report.clean
        if not is_clean and now - run.gone_at < SCRUB_LIMIT:
            assert report is not None
            log.warning("not_clean", run_id=run.id, findings=report.findings)
            # Whatever still carries its id is ended before the next check.
            self._engine.stop(run.id, grace_seconds=0, reason="scrub")
            memory.not_before = min(now + RETRY_SCRUB, run.gone_at + SCRUB_LIMIT)
            return False
        with self._books.work(ACTOR) as work:
            if is_clean:
                life.released(work, run.id)
            else:
                assert report is not None
                life.given_up(work, run.id, report.findings)
        self._memory.pop(run.id, None)
        self.has_released = True
        return True

    def _end_stray(self, run_id: str, known: Run | None, seen: Observation) -> bool:
        """A run that the books closed or never knew: ended and scrubbed, never billed."""
        memory = self._memory.setdefault(run_id, _Memory())
        if memory.not_before is not None and self._now() < memory.not_before:
            return False
        changed = False
        for action in decide_stray(seen):
            if (run_id, type(action)) in self._tried:
                continue
            self._tried.add((run_id, type(action)))
            log.warning("stray_run", run_id=run_id, phase=str(seen.phase))
            try:
                if isinstance(action, Stop):
                    self._engine.stop(run_id, grace_seconds=0, reason="stray")
                    self._strays_due = None
                    changed = True
                elif not self._engine.scrub(run_id).clean:
                    memory.not_before = self._now() + STRAY_LOOK
                else:
                    self._memory.pop(run_id, None)
                    if known is None:
                        self._engine.forget(run_id)
            except SubletError as error:
                memory.not_before = self._now() + STRAY_LOOK
                log.warning("stray_run_stays", run_id=run_id, why=error.message)
        return changed
