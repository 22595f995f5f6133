"""Who acts in a rehearsal: consumers and the owner, each with a key, through the services.

Every act is a Work of its own, in the name of the key's holder, as an edge opens it.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from sublet.base.kernel.interval import month_of
from sublet.base.kernel.money import Money
from sublet.capacity import allocation
from sublet.capacity.allocation import Claim, Party, Rank, Refused, Release
from sublet.money import billing
from sublet.records import ledger, metering, tenancy
from sublet.rights import market, owner
from sublet.shops import compute
from sublet.shops.compute import Run, StopAnswer, Workload, WorkloadSpec

if TYPE_CHECKING:
    from sublet.rehearsal.world import World


class Person:
    """Somebody with a key."""

    def __init__(self, world: World, secret: str) -> None:
        self.world = world
        self.secret = secret

    @property
    def identity(self) -> tenancy.Identity:
        """What the key may do now. Raises Unauthenticated once it may nothing."""
        return self.world.read(tenancy.authenticate, self.secret, self.world.now)

    @property
    def organisation_id(self) -> str:
        return self.identity.organisation.id

    # ---- renting ----------------------------------------------------------------------------

    def quote(self, offer: str, **terms: Any) -> market.Quote:
        identity = self.identity
        with self.world.work(identity.actor()) as work:
            return market.quote(work, identity, offer_id=offer, **terms)

    def take(
        self, quote: market.Quote | str, *, kind: Any = "instance", wait: bool = False, **spec: Any
    ) -> Workload:
        """Rent by a quote that was asked before."""
        identity = self.identity
        quote_id = quote if isinstance(quote, str) else quote.id
        with self.world.work(identity.actor()) as work:
            made = compute.rent(
                work,
                identity,
                kind=kind,
                quote_id=quote_id,
                spec=WorkloadSpec(**spec),
                wait=wait,
            )
        self.world.note(f"{identity.organisation.name} rents {made.id}")
        return made

    def rent(
        self,
        offer: str = "gpu-spot",
        *,
        kind: Any = "instance",
        notice: int | None = None,
        max_price: Money | None = None,
        grace: int = 30,
        wait: bool = False,
        **spec: Any,
    ) -> Workload:
        quote = self.quote(
            offer,
            notice_seconds=notice,
            max_price=max_price,
            stop_grace_seconds=grace,
        )
        return self.take(quote, kind=kind, wait=wait, **spec)

    def job(self, *command: str, offer: str = "gpu-spot", **options: Any) -> Workload:
        return self.rent(offer, kind="job", command=command or ("sleep", "600"), **options)

    def start(self, workload: Workload, *, wait: bool = False) -> Workload:
        identity = self.identity
        with self.world.work(identity.actor()) as work:
            return compute.start(work, identity, workload.id, wait=wait)

    def stop(self, workload: Workload) -> StopAnswer:
        identity = self.identity
        self.world.note(f"{identity.organisation.name} stops {workload.id}")
        with self.world.work(identity.actor()) as work:
            return compute.stop(work, identity, workload.id)

    def end(self, workload: Workload) -> Workload:
        """For good: terminate an instance, cancel a job."""
        identity = self.identity
        self.world.note(f"{identity.organisation.name} ends {workload.id}")
        with self.world.work(identity.actor()) as work:
            return compute.terminate(work, identity, workload.id)

    # ---- seeing -----------------------------------------------------------------------------

    def see(self, workload: Workload) -> Workload:
        return self.world.read(compute.get_workload, self.identity, workload.id)

    def state(self, workload: Workload) -> str:
        return str(self.see(workload).state)

    def workloads(self, *states: compute.State) -> list[Workload]:
        return self.world.read(
            compute.list_workloads,
            organisation_id=self.organisation_id,
            states=list(states) or None,
            limit=10_000,
        )

    def runs(self, workload: Workload) -> list[Run]:
        return self.world.read(compute.list_runs, workload.id)

    def run(self, workload: Workload) -> Run:
        """Its latest run."""
        return self.runs(workload)[-1]

    def path(self, workload: Workload) -> list[str]:
        """The states it went through."""
        steps = self.world.read(compute.list_transitions, workload.id)
        return [str(step.to_state) for step in steps]

    def meter(self, workload: Workload) -> metering.Meter | None:
        """Of its latest run."""
        return self.world.read(metering.find_meter, self.run(workload).id)

    def posted(self, workload: Workload, kind: str = market.USAGE) -> int:
        """Micros on the ledger for it."""
        return self.world.read(ledger.posted, workload.contract_id, kind).micros


class Consumer(Person):
    """A customer."""

    @property
    def balance(self) -> int:
        account = ledger.customer_account(self.organisation_id)
        return self.world.read(ledger.balance, account).micros

    @property
    def available(self) -> int:
        return self.world.read(ledger.available, self.organisation_id).micros

    def held(self, workload: Workload) -> ledger.Hold | None:
        return self.world.read(ledger.find_hold, workload.id)

    def top_up(self, amount: str, reference: str) -> None:
        with self.world.work() as work:
            billing.record_payment(
                work, self.organisation_id, Money.parse(amount), reference=reference
            )

    def invoice(self, at: datetime | None = None) -> billing.Invoice:
        """Of the month that `at` (or now) lies in, as issued or so far."""
        month = month_of(at or self.world.now)
        return self.world.read(billing.invoice_of, self.organisation_id, month)


class Owner(Person):
    """The owner of the capacity, and its own work."""

    def plan(
        self,
        count: int,
        *,
        devices: int = 1,
        by: datetime | None = None,
        until: datetime | None = None,
    ) -> owner.Recall:
        identity = self.identity
        with self.world.work(identity.actor()) as work:
            return owner.plan_recall(
                work,
                identity,
                pool_id=self.world.pool_id,
                devices=devices,
                count=count,
                by=by,
                until=until,
            )

    def accept(self, recall: owner.Recall, rows: Collection[int] | None = None) -> owner.Recall:
        self.world.note(f"the owner accepts {recall.id}")
        with self.world.work(self.identity.actor()) as work:
            return owner.accept_recall(work, recall.id, rows)

    def recall(self, count: int, **asked: Any) -> owner.Recall:
        """Plan and accept, all rows."""
        return self.accept(self.plan(count, **asked))

    def cancel(self, recall: owner.Recall) -> owner.Recall:
        self.world.note(f"the owner cancels {recall.id}")
        with self.world.work(self.identity.actor()) as work:
            return owner.cancel_recall(work, recall.id)

    def give_back(self, recall: owner.Recall) -> owner.Recall:
        self.world.note(f"the owner gives {recall.id} back")
        with self.world.work(self.identity.actor()) as work:
            return owner.return_recall(work, recall.id)

    def look(self, recall: owner.Recall) -> owner.Recall:
        return self.world.read(owner.get_recall, recall.id)

    def shortfalls(self) -> list[owner.Shortfall]:
        return self.world.read(owner.list_shortfalls, limit=10_000)

    def cordon(self, node: str, mode: Any = "cordon", *, break_notice: bool = False) -> None:
        identity = self.identity
        self.world.note(f"the owner cordons {node}: {mode}")
        with self.world.work(identity.actor()) as work:
            compute.cordon(work, identity, self.world.node_ids[node], mode, break_notice)

    def load_card(self, text: str, effective_from: datetime) -> int:
        with self.world.work(self.identity.actor()) as work:
            return market.load_rate_card(work, text, effective_from)

    def sell_block(
        self, holder: str, buyer: Consumer, *, devices: int, count: int, seconds: int
    ) -> Claim:
        """A dated block, filed as a claim with its end: no notice ends it. Refused is an error."""
        with self.world.work(self.identity.actor()) as work:
            decision = allocation.admit(
                work,
                Claim(
                    id=work.ids.new("clm"),
                    holder=holder,
                    organisation_id=buyer.organisation_id,
                    pool_id=self.world.pool_id,
                    party=Party.SALE,
                    rank=Rank.BLOCK,
                    devices=devices,
                    count=count,
                    starts_at=work.now,
                    release=Release(ends_at=work.now + timedelta(seconds=seconds)),
                ),
            )
            assert not isinstance(decision, Refused), decision
            for device_id in allocation.place(work, decision.claim.id) or ():
                metering.switch_device(work, device_id, metering.Use.SOLD_UNUSED, work.now)
        return decision.claim
