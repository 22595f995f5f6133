"""The book over time: whatever happens, in the owner's view it is never oversold.

After every step, with all sales taken to their free-by, locked + committed + urgent need minus the
shortfall on record never exceeds the supply; and nobody is ended before its release allows.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta

from allocation_builders import DAY, HOUR, MINUTE, NOW, a_book, a_need, a_sale, examples, seconds
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sublet.capacity.allocation.admit import admit, applied
from sublet.capacity.allocation.model import (
    Admitted,
    Claim,
    Rank,
    Urgency,
    earliest_term_at,
    lock_free_by,
)
from sublet.capacity.allocation.recall import plan
from sublet.capacity.allocation.roll import due_notices, next_look

SUPPLY = 8
FAR = timedelta(days=400)


def tell_at(claim: Claim) -> datetime:
    """The last moment to tell a pinned claim."""
    assert claim.term_at is not None
    return claim.term_at - seconds(claim.release.notice_seconds or 0)


class OwnersView(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.book = a_book(SUPPLY)
        self.shortfall: list[tuple[datetime, datetime, int]] = []
        self.owned_until = NOW

    # ---- what happens

    @rule(
        rank=st.sampled_from([Rank.FILLER, Rank.SPOT, Rank.ON_DEMAND, Rank.BLOCK]),
        devices=st.integers(1, 4),
        notice=st.sampled_from([30, 120, 1800]),
        lasting=st.sampled_from([None, 10 * MINUTE, 3 * HOUR]),
        ahead=st.sampled_from([0 * MINUTE, 0 * MINUTE, 20 * MINUTE, 2 * HOUR]),
    )
    def ask(
        self,
        rank: Rank,
        devices: int,
        notice: int,
        lasting: timedelta | None,
        ahead: timedelta,
    ) -> None:
        is_block = rank is Rank.BLOCK
        sale = a_sale(
            devices,
            rank=rank,
            notice=None if is_block else notice,
            firm=3600 if rank is Rank.ON_DEMAND else 0,
            start=self.now + ahead,
            lasting=3 * HOUR if is_block and lasting is None else lasting,
        )
        decision = admit(self.book, sale, now=self.now)
        if isinstance(decision, Admitted):
            self.book = applied(self.book.at(self.now), decision)
            self.open_what_has_begun()

    @rule(
        devices=st.integers(1, 3),
        ahead=st.sampled_from([0 * MINUTE, 20 * MINUTE, 3 * HOUR]),
        lasting=st.sampled_from([HOUR, 5 * HOUR]),
    )
    def need(self, devices: int, ahead: timedelta, lasting: timedelta) -> None:
        """Never refused: what cannot be had in time is a shortfall on record."""
        urgency = Urgency.COMMITTED if ahead else Urgency.URGENT
        claim = a_need(devices, urgency=urgency, start=self.now + ahead, lasting=lasting)
        before = self.excess()
        self.book = self.book.with_claim(claim)
        self.record(before)

    @precondition(lambda self: len(self.book.claims) > 0)
    @rule(data=st.data())
    def end_by_itself(self, data: st.DataObject) -> None:
        claim = data.draw(st.sampled_from(sorted(self.book.claims, key=lambda c: c.id)))
        self.book = self.book.without(claim.id)

    @rule(count=st.integers(1, 6), ahead=st.sampled_from([0 * MINUTE, 4 * MINUTE, 40 * MINUTE]))
    def recall(self, count: int, ahead: timedelta) -> None:
        """The owner's plan is accepted: its devices are a committed claim, its notices are given."""
        answer = plan(self.book, count, self.now + ahead, now=self.now)
        before = self.excess()
        for row in answer.rows:
            for victim in row.victims:
                claim = self.book.find(victim.claim_id)
                assert claim is not None
                assert victim.term_at >= earliest_term_at(claim, victim.notice_at)
                self.book = self.book.with_claim(
                    replace(claim, term_at=victim.term_at, free_by=victim.free_by)
                )
        for row in answer.rows:
            if row.devices:
                held = a_need(row.devices, start=row.free_by, lasting=5 * HOUR)
                self.book = self.book.with_claim(held)
        after = self.excess()
        assert all(after.get(at, 0) <= before.get(at, 0) for at in after), (before, after)

    @rule(ahead=st.sampled_from([seconds(40), 3 * MINUTE, 12 * MINUTE, 50 * MINUTE, 4 * HOUR]))
    def wait(self, ahead: timedelta) -> None:
        until = self.now + ahead
        while True:
            self.step()
            moments = [at for at in self.moments() if self.now < at < until]
            if not moments:
                break
            self.now = min(moments)
        self.now = until
        self.step()

    # ---- how time passes

    def moments(self) -> list[datetime]:
        found = [c.starts_at for c in self.book.claims]
        found += [end for c in self.book.claims if (end := c.held_until()) is not None]
        found += [tell_at(c) for c in self.book.claims if c.term_at is not None]
        look = next_look(self.book, now=self.now)
        return found if look is None else [*found, look]

    def step(self) -> None:
        for claim in list(self.book.claims):
            end = claim.held_until()
            if end is not None and end <= self.now:
                self.book = self.book.without(claim.id)
        self.book = self.book.at(self.now)
        self.open_what_has_begun()
        for claim in list(self.book.claims):
            if claim.term_at is not None and not claim.is_fixed and tell_at(claim) <= self.now:
                assert claim.term_at >= earliest_term_at(claim, self.now)
                self.book = self.book.with_claim(replace(claim, noticed_at=self.now))
        for due in due_notices(self.book, now=self.now):
            claim = self.book.find(due.pin.claim_id)
            assert claim is not None
            assert not claim.is_fixed
            assert due.pin.term_at >= earliest_term_at(claim, self.now)
            self.book = self.book.with_claim(
                replace(
                    claim,
                    noticed_at=self.now,
                    notice_reason="spot_interruption",
                    term_at=due.pin.term_at,
                    free_by=due.pin.free_by,
                )
            )

    def open_what_has_begun(self) -> None:
        for claim in list(self.book.claims):
            if claim.is_sale and claim.opened_at is None and claim.starts_at <= self.now:
                self.book = self.book.with_claim(replace(claim, opened_at=self.now))

    # ---- what must hold

    def excess(self) -> dict[datetime, int]:
        """By instant, what is locked and needed beyond the supply, less what is on record."""
        claims = list(self.book.claims)
        instants = {self.now, *(c.starts_at for c in claims if c.starts_at > self.now)}
        found = {}
        for at in instants:
            total = sum(c.size for c in claims if c.starts_at <= at < self.end_of(c))
            on_record = sum(n for low, high, n in self.shortfall if low <= at < high)
            if total - on_record > SUPPLY:
                found[at] = total - on_record - SUPPLY
        return found

    def end_of(self, claim: Claim) -> datetime:
        end = lock_free_by(claim, self.now) if claim.is_sale else claim.held_until()
        return self.now + FAR if end is None else end

    def record(self, before: dict[datetime, int]) -> None:
        for at, missing in self.excess().items():
            more = missing - before.get(at, 0)
            if more > 0:
                self.shortfall.append((at, self.now + FAR, more))

    @invariant()
    def never_oversold(self) -> None:
        assert self.excess() == {}


OwnersView.TestCase.settings = settings(examples(60), stateful_step_count=25)
TestOwnersView = OwnersView.TestCase


def test_who_is_pinned_for_later_still_leaves_for_an_earlier_need() -> None:
    spot = a_sale(4, rank=Rank.FILLER, start=NOW - DAY, opened=True)
    book = a_book(4).with_claim(spot)
    later = admit(book, a_sale(4, start=NOW + 2 * HOUR), now=NOW)
    assert isinstance(later, Admitted)
    assert [pin.free_by for pin in later.displaced] == [NOW + 2 * HOUR]
    book = applied(book, later).with_claim(a_need(1, start=NOW + HOUR, lasting=10 * MINUTE))
    (due,) = due_notices(book, now=NOW + HOUR - seconds(152))
    assert due.pin.free_by == NOW + HOUR
    (row,) = plan(book, 4, NOW + 30 * MINUTE, now=NOW, until=NOW + 40 * MINUTE).rows
    assert [victim.claim_id for victim in row.victims] == [spot.id]


def test_equals_in_excess_leave_one_by_one_and_no_more_than_needed() -> None:
    book = a_book(4)
    for _ in range(4):
        book = book.with_claim(a_sale(start=NOW - DAY, opened=True))
    book = book.with_claim(a_need(2, start=NOW + seconds(152)))
    due = due_notices(book, now=NOW)
    assert len(due) == 2
    assert all(d.for_owner and d.pin.free_by == NOW + seconds(152) for d in due)
    assert next_look(book, now=NOW - HOUR) == NOW


def test_too_late_or_too_early_is_no_last_moment() -> None:
    book = a_book(1).with_claim(a_sale(start=NOW - DAY, opened=True))
    book = book.with_claim(a_need(1, start=NOW + 10 * MINUTE))
    assert due_notices(book, now=NOW) == []
    assert due_notices(book, now=NOW + 9 * MINUTE) == []
    last = NOW + 10 * MINUTE - seconds(152)
    assert len(due_notices(book, now=last)) == 1
    assert len(due_notices(book, now=last + seconds(20))) == 1


def test_needs_that_another_loop_serves_are_left_to_it() -> None:
    need = a_need(1, start=NOW + seconds(152))
    book = a_book(1).with_claim(a_sale(start=NOW - DAY, opened=True)).with_claim(need)
    assert due_notices(book, now=NOW, except_for={need.id}) == []
