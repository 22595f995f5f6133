"""A cloud's books with customers whose keys call models, and gateways that spend for them.

The gateways' side is the real purse; what lies between is left out: requests, spools and sockets.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sublet.audit import Violation, check
from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.ids import SeededIds
from sublet.base.kernel.interval import micros_since_epoch
from sublet.base.kernel.money import Money
from sublet.base.store import Actor, Store, Work, metadata, open_store
from sublet.base.wire.gateway import Allowance, AllowanceRequest, Outcome, Price, UsageEvent
from sublet.gateway.purse import Purse, cost
from sublet.money import billing
from sublet.money.billing import token_store
from sublet.records import ledger, tenancy
from sublet.shops.models import store as model_rows

START = datetime(2026, 11, 2, 12, tzinfo=UTC)
SYSTEM = Actor.system("test")
MODEL = "smollm2-135m-instruct"
PRICES = {
    price.version: price
    for price in (
        Price(version="v1", input_micros=100_000, cached_micros=25_000, output_micros=400_000),
        Price(version="v2", input_micros=200_000, cached_micros=50_000, output_micros=800_000),
        # Half a micro a token: every odd number of tokens is a tie.
        Price(version="half", input_micros=500_000, cached_micros=500_000, output_micros=500_000),
    )
}
EPOCH = 1_793_000_000_000_000


@dataclass
class TokenBooks:
    store: Store
    clock: VirtualClock
    customer: billing.SignedUp
    owner: billing.SignedUp
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def org(self) -> str:
        return self.customer.organisation.id

    @property
    def key(self) -> str:
        return self.customer.key.id

    def now_us(self) -> int:
        return micros_since_epoch(self.clock.now())

    def wait(self, **length: float) -> None:
        self.clock.advance_to(self.clock.now() + timedelta(**length))

    def pay(self, amount: str) -> None:
        with self.store.work(SYSTEM) as work:
            billing.record_payment(
                work, self.org, Money.parse(amount), reference=f"bank-{next(self._numbers)}"
            )

    def add_key(self, limits: tenancy.Limits = tenancy.NO_LIMITS) -> str:
        with self.store.work(SYSTEM) as work:
            key, _ = tenancy.create_key(
                work, self.customer.principal.id, name="more", limits=limits
            )
        return key.id

    def set_budget(self, kind: str, scope_id: str, period: str, amount: str) -> None:
        with self.store.work(SYSTEM) as work:
            tenancy.set_budget(
                work,
                tenancy.Budget(
                    scope_kind=tenancy.ScopeKind(kind),
                    scope_id=scope_id,
                    period=period,  # type: ignore[arg-type]
                    limit_micros=Money.parse(amount).micros,
                ),
            )

    def event(
        self,
        uncached: int = 0,
        cached: int = 0,
        output: int = 0,
        *,
        made: int | None = None,
        key_id: str | None = None,
        version: str = "v1",
        outcome: Outcome = Outcome.OK,
        started: datetime | None = None,
        micros: int | None = None,
        replica_id: str = "ins_replica_1",
        event_id: str | None = None,
    ) -> UsageEvent:
        began = self.now_us() if started is None else micros_since_epoch(started)
        taken = cost(PRICES[version], uncached, cached, output)
        of_owner = key_id == self.owner.key.id
        return UsageEvent(
            id=event_id or f"req_{next(self._numbers)}",
            key_id=key_id or self.key,
            organisation_id=self.owner.organisation.id if of_owner else self.org,
            project_id=None,
            is_first_party=of_owner,
            model=MODEL,
            deployment_id="dep_1",
            replica_id=replica_id,
            surface="chat",
            tier="default",
            price_version=version,
            outcome=outcome,
            started_us=began,
            ended_us=began + 1000,
            first_us=began + 500,
            input_uncached=uncached,
            cache_read=cached,
            output=output,
            made=output if made is None else made,
            micros=taken if micros is None else micros,
        )

    def ask(
        self,
        wanted: int,
        *,
        gateway: str = "gw-0",
        key_id: str | None = None,
        serial: int = 1,
        spent: int = 0,
        held: int = 0,
        wanted_tokens: int = 0,
        spent_tokens: int = 0,
        held_tokens: int = 0,
    ) -> Allowance:
        request = AllowanceRequest(
            key_id=key_id or self.key,
            epoch=EPOCH,
            wanted_micros=wanted,
            wanted_tokens=wanted_tokens,
            spent_micros=spent,
            held_micros=held,
            spent_tokens=spent_tokens,
            held_tokens=held_tokens,
            serial=serial,
        )
        with self.store.work(SYSTEM) as work:
            return billing.grant_allowance(work, gateway=gateway, epoch=EPOCH, request=request)

    def ingest(
        self, events: Sequence[UsageEvent], offset: int, *, gateway: str = "gw-0", file: int = 0
    ) -> int:
        with self.store.work(SYSTEM) as work:
            return billing.ingest_usage(
                work, gateway=gateway, epoch=EPOCH, events=events, file=file, offset=offset
            )

    def close(self, gateway: str = "gw-0", lost: Sequence[UsageEvent] = ()) -> None:
        with self.store.work(SYSTEM) as work:
            billing.close_epoch(work, gateway=gateway, epoch=EPOCH, lost=lost)

    def lines(self) -> list[billing.TokenLine]:
        with self.store.read() as tx:
            return billing.list_token_lines(tx, limit=10_000)

    def line(self, token_class: str, kind: str = billing.TOKEN_USAGE) -> billing.TokenLine:
        [found] = [
            line
            for line in self.lines()
            if (line.key.token_class, line.key.kind) == (token_class, kind)
        ]
        return found

    def find_allowance(self, gateway: str, key_id: str) -> token_store.AllowanceRow | None:
        with self.store.read() as tx:
            return token_store.find_allowance(tx, gateway, EPOCH, key_id)

    def allowance(
        self, gateway: str = "gw-0", key_id: str | None = None
    ) -> token_store.AllowanceRow:
        found = self.find_allowance(gateway, key_id or self.key)
        assert found is not None
        return found

    def transfers(self, *kinds: str) -> list[ledger.Transfer]:
        far = self.clock.now() + timedelta(days=4000)
        with self.store.read() as tx:
            found = ledger.list_transfers(tx, None, datetime(1970, 1, 1, tzinfo=UTC), far)
        return [transfer for transfer in found if not kinds or transfer.kind in kinds]

    def balance(self) -> int:
        with self.store.read() as tx:
            return ledger.balance(tx, ledger.customer_account(self.org)).micros

    def available(self) -> int:
        with self.store.read() as tx:
            return ledger.available(tx, self.org).micros

    def violations(self) -> list[Violation]:
        with self.store.read() as tx:
            return check(tx, self.clock.now())


def seed_prices(work: Work) -> None:
    """Under names that tests can say; the catalogue gives each version one of its own."""
    for price in PRICES.values():
        model_rows.insert_price(
            work.tx,
            {
                "model": MODEL,
                "tier": "default",
                "version": price.version,
                "effective_from": work.now,
                "input_micros": price.input_micros,
                "cached_micros": price.cached_micros,
                "output_micros": price.output_micros,
            },
        )


def open_books(folder: Path, credit: str | None = "10") -> TokenBooks:
    """Owner and one customer with so much credit."""
    clock = VirtualClock(START)
    store = open_store(f"sqlite:///{folder / 'sublet.db'}", clock, SeededIds(1))
    metadata.create_all(store.engine)
    with store.work(SYSTEM) as work:
        owner = billing.open_owner(work, name="Owner")
        assert owner is not None
        customer = billing.sign_up(
            work, email="a@example.org", organisation_name="Acme", trial=Money(0)
        )
        seed_prices(work)
    books = TokenBooks(store, clock, customer, owner)
    if credit is not None:
        books.pay(credit)
    return books


@dataclass
class Gateway:
    """One gateway's life: purses that hold and spend, a spool that is read in parts."""

    books: TokenBooks
    name: str
    purses: dict[str, Purse] = field(default_factory=dict)
    spool: list[UsageEvent] = field(default_factory=list)
    read: int = 0
    running: list[tuple[str, int, int]] = field(default_factory=list)
    """Key, micros and tokens held."""
    line_is: str = "up"
    """`up`, `lost`: no request arrives, `late`: answers stay under way until `deliver`."""
    late: list[Allowance] = field(default_factory=list)

    def purse(self, key_id: str | None = None) -> Purse:
        key_id = key_id or self.books.key
        return self.purses.setdefault(key_id, Purse(key_id, EPOCH))

    @property
    def _now_ns(self) -> int:
        return self.books.now_us() * 1000

    def carry(self, request: AllowanceRequest | None) -> None:
        """To the control plane and back."""
        if request is None or self.line_is == "lost":
            return
        with self.books.store.work(SYSTEM) as work:
            answer = billing.grant_allowance(work, gateway=self.name, epoch=EPOCH, request=request)
        self.late.append(answer)
        if self.line_is == "up":
            self.deliver(len(self.late) - 1)

    def deliver(self, number: int) -> None:
        """One of the answers that are under way arrives, whatever was sent since."""
        answer = self.late.pop(number)
        self.purse(answer.key_id).grant(answer, self._now_ns, self.books.now_us())

    def begin(self, micros: int, tokens: int = 0, key_id: str | None = None) -> bool:
        """Hold for a request, asking for as long as answers bring more."""
        purse = self.purse(key_id)
        for _ in range(40):
            if purse.take(micros, tokens):
                self.carry(purse.want(0, 0, self._now_ns))
                self.running.append((purse.key_id, micros, tokens))
                return True
            before = purse.granted
            self.carry(purse.want(micros, tokens, self._now_ns))
            if purse.granted == before and purse.refusal(self._now_ns) is not None:
                return False
        return False

    def end(self, event: UsageEvent, number: int = 0) -> None:
        """A request has ended so: settled, and in the spool."""
        key_id, micros, tokens = self.running.pop(number)
        assert event.key_id == key_id
        used = event.input_uncached + event.cache_read + event.output
        self.purse(key_id).settle(micros, tokens, event.micros, used)
        self.spool.append(event)

    def flush(self, number: int | None = None, *, repeat: int = 0) -> int:
        """Have so many more events read, and the last `repeat` ones again."""
        end = len(self.spool) if number is None else min(self.read + number, len(self.spool))
        batch = self.spool[max(self.read - repeat, 0) : end]
        new = self.books.ingest(batch, end, gateway=self.name)
        self.read = max(self.read, end)
        return new

    def die(self, lost: Sequence[UsageEvent] = ()) -> None:
        """Killed: its spool is read to the end, then its life is closed."""
        self.flush()
        self.books.close(self.name, lost)
