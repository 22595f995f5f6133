"""The story itself, step by step: each says what is promised and what was measured."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from fractions import Fraction
from typing import Any

from sublet.base.kernel.clock import read_boot_ns
from sublet.base.kernel.interval import millis_between
from sublet.base.kernel.money import round_half_even
from sublet.base.wire import rest
from sublet.cli import values
from sublet.cli.tour import work
from sublet.cli.tour.stage import CannotTour, Scene, StoryBroken, Tour
from sublet.cli.tour.tokens import Models
from sublet.sdk import Client, ClientError

GRACE_SECONDS = 10
START_SECONDS = 20
"""A promise of the tour: from a yes to a running workload."""
LIMIT_SECONDS = 180
STEPS_AFTER = 48
"""Of the job, beyond its notice: so that it has something left to do when it comes back."""
OWN_STEPS = 8
PRICED_SECONDS = 20
"""Within which the owner's own use stands in the books, at its price."""
SLACK = timedelta(milliseconds=1)
"""Instants on the wire are cut to microseconds, meters to milliseconds."""


@dataclass(slots=True)
class Actors:
    """Consumer and owner, and what they hold."""

    tour: Tour
    scene: Scene
    consumer: Client
    signed: rest.SignUp
    credit: int
    """Micros that she was given."""
    box: rest.Workload | None = None
    job: rest.Workload | None = None
    own: rest.Workload | None = None
    recall: rest.Recall | None = None
    rented: set[str] = field(default_factory=set)
    """The devices that instance and job had."""
    steps: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    """The job's log by the number of its run."""

    models: Models = field(init=False)

    def __post_init__(self) -> None:
        assert self.signed.secret is not None, "a sign-up shows its key"
        self.models = Models(
            tour=self.tour, scene=self.scene, consumer=self.consumer, key=self.signed.secret
        )

    def play(self) -> None:
        scene = self.scene
        self._quotes()
        self.models.play()
        self._rent()
        self._log_in()
        if not scene.together:
            self._end_box()
        self._start_job()
        recall = self._plan()
        self._accept(recall)
        self._notice_inside()
        self._handed_over()
        self._own_job()
        self._hand_back()
        self._end_box()
        self._bill()
        self._statement()
        self.models.one_device(self.signed.organisation.created_at, self._now(), self.rented)
        self._verdict()
        self.tour.begin("Time")
        taken = self.tour.seconds()
        self.tour.promise("under 3 minutes", f"{taken:.0f} s", taken < LIMIT_SECONDS)

    # -- the consumer rents

    def _quotes(self) -> None:

        tour = self.tour
        tour.begin("Prices are quoted before anything is rented")
        if self.scene.on_demand is not None:
            other = self.consumer.quotes.create(
                rest.QuoteCreate(offer_id=self.scene.on_demand.id, duration_seconds=3600)
            )
            tour.note(
                f"on-demand {other.offer_id}: {values.money(other.total.micros)} an hour, notice "
                f"{values.length(other.notice_seconds)}, the first "
                f"{values.length(other.firm_seconds)} firm (shown, not rented)"
            )
        quote = self._quote()
        tour.note(
            f"spot {quote.offer_id}: {values.money(quote.total.micros)} an hour, notice "
            f"{values.length(quote.notice_seconds)}; {quote.credit_rule}"
        )
        available = self.consumer.me().available.micros
        stands = (quote.expires_at - self._now()).total_seconds()
        tour.promise(
            "a quote stands five minutes and takes nothing",
            f"it stands {stands:.0f} s more; credit still {values.money(available)}",
            stands > 290 and available == self.credit,
        )

    def _quote(self) -> rest.Quote:

        return self.consumer.quotes.create(
            rest.QuoteCreate(
                offer_id=self.scene.spot.id,
                notice_seconds=self.scene.notice_seconds,
                stop_grace_seconds=GRACE_SECONDS,
            )
        )

    def _now(self) -> datetime:
        return self.consumer.health().now

    def _rent(self) -> None:

        tour = self.tour
        tour.begin("She rents an instance by the second")
        quote = self._quote()
        self.box = self.consumer.instances.create(
            rest.InstanceCreate(
                name="box", quote_id=quote.id, ssh_keys=[self.tour.visitor.public_key]
            )
        )
        taken = tour.wait(lambda: self._is(self._box(), "running"), "the instance", START_SECONDS)
        run = self._run_of(self._box())
        asked = self.box.created_at
        assert run.started_at is not None
        tour.note(f"{self.box.id} on {', '.join(run.devices)}")
        tour.promise(
            f"running within {START_SECONDS} s, and metered only from when it ran",
            f"{taken:.1f} s; the meter opened "
            f"{(run.started_at - asked).total_seconds():.1f} s after the order",
            run.started_at >= asked - SLACK,
        )

    def _log_in(self) -> None:
        tour = self.tour
        tour.begin("She logs in over SSH and computes")
        box = self._box()
        if box.ssh is None:
            raise StoryBroken("the instance says no way to log in")

        start = read_boot_ns()
        answer = self.tour.visitor.run(box.ssh, work.COUNT_PRIMES)
        taken = (read_boot_ns() - start) / 1e9
        if answer.code != 0:
            raise StoryBroken(f"SSH answered {answer.code}: {answer.err.strip() or answer.out}")
        found = json.loads(answer.out)
        kind = "gpus" if self.scene.spot.device_kind == "gpu" else "cpus"
        tour.promise(
            "her key opens it; inside are the devices she rented and no others",
            f"login and work by {self.tour.visitor.client} in {taken:.2f} s: "
            f"{found['primes']} primes, {found[kind]} of {box.devices} {kind}",
            found["primes"] == work.PRIMES and found[kind] == box.devices,
        )

    def _end_box(self) -> None:
        if self.box is None or self._box().state in ("terminated", "failed"):
            return
        self.consumer.instances.terminate(self.box.id)
        self.tour.wait(
            lambda: self._is(self._box(), "terminated"), "the end of the instance", START_SECONDS
        )
        self._wait_for_device()

    def _wait_for_device(self) -> None:
        """Between two holders a device is scrubbed."""
        pool = self.scene.pool
        limit = START_SECONDS + pool.scrub_seconds
        if self.recall is None:
            free = lambda: self.tour.owner.pools.get(pool.id).free_devices > 0  # noqa: E731
            self.tour.wait(free, "the scrubbed device", limit)

    def _start_job(self) -> None:

        tour = self.tour
        tour.begin("She runs a spot job: a chain of hashes with checkpoints")
        self.steps = int(self.scene.notice_seconds / work.STEP_SECONDS) + STEPS_AFTER
        quote = self._quote()
        self.job = self.consumer.jobs.create(
            rest.JobCreate(name="chain", quote_id=quote.id, command=work.chain_command(self.steps))
        )
        taken = tour.wait(lambda: self._is(self._job(), "running"), "the job", START_SECONDS)
        tour.wait(lambda: bool(self._said("start")), "the job's first line", START_SECONDS)
        tour.note(f"{self.job.id} writes its log: {self._log().splitlines()[0]}")
        tour.promise(
            f"running within {START_SECONDS} s; its log can be followed",
            f"{taken:.1f} s",
            taken < START_SECONDS,
        )

    # -- the owner takes devices back

    def _plan(self) -> rest.Recall:

        tour = self.tour
        tour.begin("The owner wants devices back: first a plan")
        pool = self.tour.owner.pools.get(self.scene.pool.id)
        ours = [w for w in (self.box, self.job) if w is not None]
        live = [w for w in map(self._fresh, ours) if w.state == "running"]
        wanted = pool.free_devices + sum(w.devices for w in live)
        recall = self.tour.owner.recalls.plan(rest.RecallCreate(pool_id=pool.id, count=wanted))
        victims = {v.workload_id for row in recall.rows for v in row.victims}
        if victims - {w.id for w in live}:
            raise CannotTour(
                "others run work here that this recall would end: take the tour when nobody does."
            )
        for row in recall.rows:
            ended = ", ".join(v.workload_id for v in row.victims) or "idle"
            tour.note(f"row {row.number}: {row.devices} by {row.free_by:%H:%M:%S}Z ({ended})")
        tour.note(
            f"lost revenue {values.money(recall.lost_revenue.micros)}, "
            f"credits {values.money(recall.credits.micros)}"
        )
        untouched = all(self._fresh(w).interruption is None for w in live)
        tour.promise(
            "the plan names every device, date and victim, and nothing happens until it is accepted",
            f"{sum(r.devices for r in recall.rows)} of {wanted} devices, "
            f"{len(victims)} of {len(live)} workloads named, shortfall "
            f"{recall.shortfall_devices}; {'nobody' if untouched else 'somebody'} was told anything",
            untouched
            and victims == {w.id for w in live}
            and sum(row.devices for row in recall.rows) == wanted
            and recall.shortfall_devices == 0,
        )
        return recall

    def _accept(self, planned: rest.Recall) -> None:
        tour = self.tour
        tour.begin("She accepts it")
        self.recall = self.tour.owner.recalls.accept(planned.id)
        idle = sum(row.devices for row in self.recall.rows if not row.victims)

        def delivered_idle() -> bool:
            rows = self._recall().rows
            return all(row.delivered_at for row in rows if not row.victims)

        if idle:
            taken = tour.wait(delivered_idle, "the idle devices", START_SECONDS)
            tour.promise("idle devices are hers at once", f"{idle} in {taken:.1f} s", taken < 5)
        else:
            tour.note("none was idle: all of it comes from workloads, each with its notice")

    def _notice_inside(self) -> None:
        tour, notice = self.tour, self.scene.notice_seconds
        tour.begin("The workloads are told, inside")
        self.tour.wait(lambda: bool(self._said("notice")), "the notice in the job", notice + 30)
        told = self._said("notice")[0]
        tour.note(f"the job reads {json.dumps(told['found'])}")
        box = self._box() if self.box is not None else None
        if self.scene.together and box is not None and box.ssh is not None:
            answer = self.tour.visitor.run(box.ssh, work.READ_NOTICE)
            found = json.loads(answer.out) if answer.code == 0 else {"status": answer.err}
            tour.promise(
                "the metadata endpoint inside the instance says when and what",
                json.dumps(found),
                "time" in found and "action" in found,
            )
        tour.promise(
            "the metadata endpoint inside the job says when and what",
            f"action {told['found'].get('action')}, at {told['found'].get('time')}",
            bool(told["found"].get("time")) and bool(told["found"].get("action")),
        )
        limit = notice + GRACE_SECONDS + 30
        tour.wait(lambda: bool(self._said("sigterm")), "the SIGTERM in the job", limit)
        heard = self._said("sigterm")[0]["at"] - told["at"]
        first = next(run for run in self.consumer.jobs.runs(self._job().id) if run.t0)
        assert first.t0 is not None
        tour.wait(lambda: self._first_run().term_at is not None, "the end of the first run", limit)
        ended = self._first_run()
        assert ended.term_at is not None
        kept = (ended.term_at - first.t0).total_seconds()
        tour.promise(
            f"SIGTERM no earlier than {notice} s after the notice",
            f"{kept:.3f} s by the books; the job itself counted {heard:.1f} s from seeing it",
            kept >= notice and heard > notice - 2,
        )

    def _handed_over(self) -> None:
        tour = self.tour
        tour.begin("The devices are handed over")
        limit = GRACE_SECONDS + self.scene.pool.scrub_seconds + 60
        tour.wait(lambda: self._recall().state == "delivered", "the hand-over", limit)
        recall = self._recall()
        for row in recall.rows:
            assert row.delivered_at is not None
            early = (row.free_by - row.delivered_at).total_seconds()
            tour.promise(
                f"row {row.number}: {row.devices} scrubbed and hers by {row.free_by:%H:%M:%S}Z",
                f"{abs(early):.1f} s {'before' if early >= 0 else 'AFTER'} it",
                early >= 0,
            )
        tour.promise("not late", "late" if recall.late else "on time", not recall.late)

    def _own_job(self) -> None:

        tour = self.tour
        tour.begin("The owner's own job runs on them")
        self.own = self.tour.owner.jobs.create(
            rest.JobCreate(
                name="own",
                offer_id=self.scene.spot.id,
                command=work.chain_command(OWN_STEPS),
            )
        )
        own = self.own.id
        taken = tour.wait(
            lambda: self.tour.owner.jobs.get(own).state in ("completed", "failed"),
            "the end of the owner's job",
            START_SECONDS + 20,
        )
        done = self.tour.owner.jobs.get(own)
        run = self._run_of(done)
        recalled = {device for row in self._recall().rows for device in row.device_ids}
        ends = _events("".join(self.tour.owner.jobs.logs(own)), "end")
        right = bool(ends) and ends[0]["chain"] == work.chain_value(OWN_STEPS)
        tour.promise(
            "it runs as first-party work on a recalled device, before any sale",
            f"done in {taken:.1f} s on {', '.join(run.devices)}, exit {done.exit_code}, "
            f"{'the right' if right else 'A WRONG'} value",
            done.state == "completed"
            and done.exit_code == 0
            and done.party == "first_party"
            and right
            and (not recalled or set(run.device_ids) <= recalled),
        )

    # -- and gives them back

    def _hand_back(self) -> None:

        tour = self.tour
        tour.begin("The owner gives them back, and the job goes on")
        tour.wait(lambda: self._job().state == "awaiting_capacity", "the queue", START_SECONDS)
        waiting = self._job()
        tour.promise(
            "the interrupted job waits in the queue by itself",
            f"{waiting.state}, retries {waiting.retries}",
            waiting.state == "awaiting_capacity" and waiting.retries == 0,
        )
        assert self.recall is not None
        self.recall = self.tour.owner.recalls.give_back(self.recall.id)
        limit = START_SECONDS + self.scene.pool.scrub_seconds
        taken = tour.wait(lambda: len(self._said("start")) == 2, "the job's second run", limit)
        again = self._said("start")[1]["done"]
        left = (self.steps - again) * work.STEP_SECONDS * 2 + 20
        tour.note(f"it runs again after {taken:.1f} s, from checkpoint {again} of {self.steps}")
        tour.wait(lambda: self._job().state in ("completed", "failed"), "the job's end", left)
        done = self._job()
        ends = self._said("end")
        right = bool(ends) and ends[0]["chain"] == work.chain_value(self.steps)
        tour.promise(
            "it ends with what an uninterrupted run would have computed",
            f"{done.state}, exit {done.exit_code}, {'the same' if right else 'ANOTHER'} value",
            done.state == "completed" and done.exit_code == 0 and right and again > 0,
        )

    # -- what it came to

    def _bill(self) -> None:
        tour = self.tour
        tour.begin("Her invoice so far")
        invoice = self.consumer.money.invoice_so_far()
        for line in invoice.lines:
            tour.note(f"{line.text}")
        wrong = [line.number for line in invoice.lines if not _explains_itself(line)]
        total = sum(line.amount.micros for line in invoice.lines)
        tour.promise(
            "each line is quantity × price, rounded once, and the lines sum to the total",
            f"{len(invoice.lines)} lines, {values.money(invoice.total.micros)}",
            not wrong and total == invoice.total.micros and bool(invoice.lines),
        )
        balance = self.consumer.money.balance()
        given = self.credit
        tour.promise(
            "the bill equals the ledger",
            f"credit {values.money(given)} − invoice {values.money(invoice.total.micros)} = "
            f"balance {values.money(balance.balance.micros)}",
            given - invoice.total.micros == balance.balance.micros,
        )
        self._free_when_young(invoice)

    def _free_when_young(self, invoice: rest.Invoice) -> None:
        """What the recall ended in its first ten minutes costs nothing."""
        run = self._first_run()
        assert run.started_at is not None
        assert run.t0 is not None
        assert run.term_at is not None
        if run.t0 - run.started_at >= timedelta(minutes=10):
            return
        back = [line for line in invoice.lines if line.kind.endswith("credit")]
        freed = sum(line.quantity for line in back if line.subject == self._job().id)
        ran = millis_between(run.started_at, run.term_at)
        box = _of(invoice, self.box) if self.scene.together else 0
        instance = f"; the instance came to {values.money(box)}" if self.scene.together else ""
        self.tour.promise(
            "a run that the owner interrupts in its first ten minutes is free",
            f"{values.money(-sum(line.amount.micros for line in back))} given back: {freed} of the "
            f"{ran} ms of the job's first run{instance}",
            freed == ran and box == 0,
        )

    def _statement(self) -> None:
        tour = self.tour
        tour.begin("The owner's statement")
        start = self.signed.organisation.created_at
        statement = self.tour.owner.money.statement

        def priced() -> bool:
            return statement(start=start, end=self._now()).first_party.micros > 0

        with suppress(StoryBroken):
            tour.wait(priced, "the price of the owner's own use", PRICED_SECONDS)
        end = self._now()
        found = statement(start=start, end=end)
        tour.note(
            f"revenue {values.money(found.revenue.micros)}, "
            f"credits {values.money(found.credits.micros)}, "
            f"depreciation {values.money(found.depreciation.micros)}, "
            f"power {values.money(found.power.micros)}"
        )
        tour.note(f"first-party at its price {values.money(found.first_party.micros)}, credited")
        margin = (
            found.revenue.micros
            - found.credits.micros
            - found.depreciation.micros
            - found.power.micros
        )
        tour.promise(
            "margin = revenue − credits − depreciation − power; own use is priced",
            f"{values.money(found.margin.micros)}; own use {values.money(found.first_party.micros)}",
            margin == found.margin.micros and found.first_party.micros > 0,
        )
        time = self.tour.owner.devices.time(start=start, end=end)
        devices = len(list(self.tour.owner.devices.list()))
        whole = devices * millis_between(time.start, time.end)
        booked = sum(time.milliseconds_by_use.values())
        tour.promise(
            "device time is divided to the millisecond",
            f"{booked} ms booked of {devices} devices × {whole // max(devices, 1)} ms",
            booked == whole,
        )

    def _verdict(self) -> None:
        tour = self.tour
        tour.begin("The auditor's verdict")
        verdict = self.tour.owner.audit_books()
        for violation in verdict.violations:
            tour.note(f"BROKEN {violation.name}: {violation.detail}")
        tour.promise(
            "every invariant holds on the live state",
            f"{len(verdict.invariants)} checked, {len(verdict.violations)} broken",
            verdict.sound,
        )

    # -- looking

    def _box(self) -> rest.Workload:
        assert self.box is not None
        return self.consumer.instances.get(self.box.id)

    def _job(self) -> rest.Workload:
        assert self.job is not None
        return self.consumer.jobs.get(self.job.id)

    def _fresh(self, workload: rest.Workload) -> rest.Workload:
        return self._box() if workload.kind == "instance" else self._job()

    def _recall(self) -> rest.Recall:
        assert self.recall is not None
        return self.tour.owner.recalls.get(self.recall.id)

    def _first_run(self) -> rest.Run:
        """The job's run that was interrupted."""
        return next(iter(self.consumer.jobs.runs(self._job().id)))

    def _is(self, workload: rest.Workload, state: str) -> bool:
        if workload.state == "failed" and state != "failed":
            why = workload.failure or workload.reason or "no reason given"
            raise StoryBroken(f"{workload.id} failed: {why}")
        return workload.state == state

    def _run_of(self, workload: rest.Workload) -> rest.Run:
        if workload.run is None:
            raise StoryBroken(f"{workload.id} has no run")
        if workload.party == "sale":
            self.rented |= set(workload.run.device_ids)
        return workload.run

    def _log(self) -> str:
        """All that the job has said, over its runs, oldest first. The API shows the latest run's,
        so what was read of earlier ones is kept."""
        before = self._job()
        text = "".join(self.consumer.jobs.logs(before.id))
        after = self._job()
        if before.run and after.run and before.run.number == after.run.number:
            self.texts[before.run.number] = text
        return "".join(self.texts[number] for number in sorted(self.texts))

    def _said(self, event: str) -> list[dict[str, Any]]:
        return _events(self._log(), event)

    def leave(self) -> None:
        """Leave nothing behind, however the story ended."""
        self.models.leave()
        with suppress(ClientError):
            if self.recall is not None and self._recall().state not in ("returned", "cancelled"):
                recalls = self.tour.owner.recalls
                delivered = self._recall().state == "delivered"
                (recalls.give_back if delivered else recalls.cancel)(self.recall.id)
        with suppress(ClientError):
            if self.job is not None and self._job().state not in ("completed", "failed"):
                self.consumer.jobs.cancel(self.job.id)
        with suppress(ClientError):
            if self.box is not None and self._box().state not in ("terminated", "failed"):
                self.consumer.instances.terminate(self.box.id)


def _events(log: str, event: str) -> list[dict[str, Any]]:
    found = []
    for line in log.splitlines():
        with suppress(ValueError):
            said = json.loads(line)
            if isinstance(said, dict) and said.get("event") == event:
                found.append(said)
    return found


def _explains_itself(line: rest.InvoiceLine) -> bool:
    """Does quantity × price ÷ per, rounded once, give the amount? A sum has no price."""
    if line.price_micros is None or not line.per:
        return True
    exact = round_half_even(Fraction(line.quantity * line.price_micros, line.per))
    # A credit gives back what it names, so its amount has the other sign.
    return line.amount.micros == (-exact if line.kind.endswith("credit") else exact)


def _of(invoice: rest.Invoice, workload: rest.Workload | None) -> int:
    """What a workload comes to on the invoice, in micros."""
    if workload is None:
        return 0
    return sum(line.amount.micros for line in invoice.lines if line.subject == workload.id)
