"""The store: one Work is all or nothing, events reach their readers, readers wait for nobody."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import pytest
import sqlalchemy as sa

from sublet.base.kernel.clock import Anchor, VirtualClock
from sublet.base.kernel.ids import SeededIds
from sublet.base.store import (
    Actor,
    Event,
    Instant,
    Store,
    StoreUnavailable,
    advance,
    metadata,
    open_store,
    pending,
)
from sublet.base.store.installation import (
    find_fact,
    keep_anchor,
    keep_fact,
    last_seen,
    list_anchors,
)

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
ACTOR = Actor.system("test")


@dataclass(frozen=True, slots=True)
class Rung(Event):
    kind: ClassVar[str] = "test_rung"

    number: int
    at: datetime | None = None
    by: str | None = None


@dataclass(frozen=True, slots=True)
class Silenced(Event):
    kind: ClassVar[str] = "test_silenced"

    number: int


@pytest.fixture
def clock() -> VirtualClock:
    return VirtualClock(NOON)


@pytest.fixture
def store(tmp_path: Path, clock: VirtualClock) -> Iterator[Store]:
    opened = open_store(f"sqlite:///{tmp_path}/store.db", clock, SeededIds(1))
    metadata.create_all(opened.engine)
    yield opened
    opened.close()


def numbers(store: Store, consumer: str, **more: int) -> list[int]:
    with store.read() as tx:
        return [e.payload["number"] for e in pending(tx, consumer, [Rung, Silenced], **more)]


def ring(store: Store, *rung: int) -> None:
    with store.work(ACTOR) as work:
        for number in rung:
            work.emit(Rung(number))


def test_a_work_that_fails_leaves_neither_rows_nor_events(store: Store) -> None:
    rings: list[None] = []
    store.on_commit = lambda: rings.append(None)
    with contextlib.suppress(RuntimeError), store.work(ACTOR) as work:
        keep_fact(work, "colour", "red")
        work.emit(Rung(1))
        raise RuntimeError("half way")
    with store.read() as tx:
        assert find_fact(tx, "colour") is None
    assert numbers(store, "reader") == []
    assert rings == [], "nobody is told of what did not happen"


def test_a_work_has_one_now_and_one_actor(store: Store, clock: VirtualClock) -> None:
    with store.work(ACTOR) as work:
        clock.advance_to(NOON + timedelta(seconds=5))
        assert work.now == NOON
        other = work.acting(Actor(id="key_1", organisation_id="org_1"))
        assert (other.actor.id, other.now, other.tx) == ("key_1", NOON, work.tx)
        other.emit(Rung(1))
        assert work.emitted == [Rung(1)], "one Work, whoever acts in it"
        assert work.actor == ACTOR
    with store.work(ACTOR) as work:
        assert work.now == NOON + timedelta(seconds=5)


def test_the_bell_rings_once_after_a_commit_with_events(store: Store) -> None:
    seen: list[list[int]] = []
    store.on_commit = lambda: seen.append(numbers(store, "reader"))
    ring(store, 1, 2)
    with store.work(ACTOR) as work:
        keep_fact(work, "quiet", "yes")
    assert seen == [[1, 2]], "after the commit, and only for events"


def test_events_come_in_order_and_again_until_they_are_dealt_with(store: Store) -> None:
    ring(store, 1, 2, 3)
    with store.read() as tx:
        first, second, third = pending(tx, "reader", [Rung])
    assert first.seq < second.seq < third.seq
    # The handler dies after the first: its Work, effect and cursor, is rolled back.
    with contextlib.suppress(RuntimeError), store.work(ACTOR) as work:
        keep_fact(work, "handled", "1")
        advance(work, "reader", first.seq)
        raise RuntimeError("killed")
    assert numbers(store, "reader") == [1, 2, 3]
    with store.work(ACTOR) as work:
        advance(work, "reader", second.seq)
    assert numbers(store, "reader") == [3]
    assert numbers(store, "another") == [1, 2, 3], "each consumer has a cursor of its own"
    with store.work(ACTOR) as work:
        advance(work, "reader", first.seq)
    assert numbers(store, "reader") == [3], "a cursor never goes back"
    ring(store, 4)
    assert numbers(store, "reader") == [3, 4]
    assert numbers(store, "reader", limit=1) == [3]


def test_a_reader_sees_only_the_kinds_it_asks_for(store: Store) -> None:
    with store.work(ACTOR) as work:
        work.emit(Silenced(1))
        work.emit(Rung(2))
    with store.read() as tx:
        [envelope] = pending(tx, "reader", [Rung])
        assert envelope.at == NOON
        assert envelope.read(Rung) == Rung(2)
        with pytest.raises(AssertionError):
            envelope.read(Silenced)


def test_an_event_is_read_as_it_was_emitted(store: Store) -> None:
    event = Rung(7, at=NOON + timedelta(microseconds=3), by=None)
    with store.work(ACTOR) as work:
        work.emit(event)
    with store.read() as tx:
        [envelope] = pending(tx, "reader", [Rung])
    assert envelope.read(Rung) == event


def test_a_number_once_given_is_not_given_again(store: Store) -> None:
    ring(store, 1, 2)
    with store.read() as tx:
        *_, last = pending(tx, "reader", [Rung])
    with store.work(ACTOR) as work:
        work.tx.execute(sa.text("DELETE FROM base_outbox"))
    ring(store, 3)
    with store.read() as tx:
        [envelope] = pending(tx, "reader", [Rung])
    assert envelope.seq > last.seq


def test_a_reader_waits_for_no_writer_and_sees_what_was_committed(store: Store) -> None:
    with store.work(ACTOR) as work:
        keep_fact(work, "colour", "red")
    with store.work(ACTOR) as work:
        keep_fact(work, "colour", "blue")
        # The write lock is held here: a read that waited for it would never return.
        with store.read() as tx:
            assert find_fact(tx, "colour") == "red"
    with store.read() as tx:
        assert find_fact(tx, "colour") == "blue"


def test_a_read_sees_one_moment_though_others_write(store: Store) -> None:
    with store.work(ACTOR) as work:
        keep_fact(work, "colour", "red")
    with store.read() as tx:
        assert find_fact(tx, "colour") == "red"
        with store.work(ACTOR) as work:
            keep_fact(work, "colour", "blue")
        assert find_fact(tx, "colour") == "red"


def test_a_read_can_change_nothing(store: Store) -> None:
    with store.work(ACTOR) as work:
        keep_fact(work, "colour", "red")
    with store.read() as tx:
        with pytest.raises(sa.exc.OperationalError, match="readonly"):
            tx.execute(sa.text("UPDATE base_installation SET value = 'blue'"))
        assert find_fact(tx, "colour") == "red"


def test_a_writer_that_cannot_have_the_lock_is_told_to_try_again(
    store: Store, tmp_path: Path
) -> None:
    other = open_store(f"sqlite:///{tmp_path}/store.db", store.clock, SeededIds(2))

    @sa.event.listens_for(other.engine, "connect")
    def _be_impatient(connection: object, _record: object) -> None:
        connection.execute("PRAGMA busy_timeout=0")  # type: ignore[attr-defined]

    with (
        store.work(ACTOR),
        pytest.raises(StoreUnavailable) as refused,
        other.work(ACTOR),
    ):
        raise AssertionError("two Works at once")
    assert refused.value.code == "database_unavailable"
    assert "locked" in refused.value.message
    other.close()


def test_a_file_that_is_no_database_is_said_in_one_sentence(
    tmp_path: Path, clock: VirtualClock
) -> None:
    (tmp_path / "junk.db").write_bytes(b"not a database at all" * 100)
    store = open_store(f"sqlite:///{tmp_path}/junk.db", clock, SeededIds(1))
    with pytest.raises(StoreUnavailable, match="not a database"), store.work(ACTOR):
        raise AssertionError("opened junk")
    store.close()


def test_what_is_committed_is_there_after_a_restart(store: Store, tmp_path: Path) -> None:
    ring(store, 1)
    store.close()
    again = open_store(f"sqlite:///{tmp_path}/store.db", store.clock, SeededIds(2))
    assert numbers(again, "reader") == [1]
    again.close()


def test_instants_keep_their_microseconds_and_demand_a_zone(store: Store) -> None:
    at = datetime(2026, 3, 2, 13, 0, 0, 123457, tzinfo=UTC)
    with store.work(ACTOR) as work:
        kept = work.tx.execute(sa.select(sa.literal(at, Instant))).scalar_one()
        assert kept == at
        assert kept.tzinfo is UTC
        with pytest.raises(sa.exc.StatementError, match="time zone"):
            work.tx.execute(sa.select(sa.literal(at.replace(tzinfo=None), Instant)))


def test_the_installation_remembers_facts_and_when_it_was_last_seen(
    store: Store, clock: VirtualClock
) -> None:
    with store.read() as tx:
        assert last_seen(tx) is None
    with store.work(ACTOR) as work:
        keep_fact(work, "alive", "loops")
        keep_fact(work, "id", "sublet-1")
    clock.advance_to(NOON + timedelta(seconds=9))
    with store.work(ACTOR) as work:
        keep_fact(work, "alive", "loops")
    with store.read() as tx:
        assert last_seen(tx) == NOON + timedelta(seconds=9)
        assert find_fact(tx, "id") == "sublet-1"


def test_anchors_are_kept_by_boot_in_order(store: Store) -> None:
    first = Anchor(boot_id="a", boot_ns=10, utc_us=1_000)
    second = Anchor(boot_id="a", boot_ns=20, utc_us=2_000, rate_ppm=-500)
    other = Anchor(boot_id="b", boot_ns=5, utc_us=9_000)
    with store.work(ACTOR) as work:
        for anchor in (first, other, second):
            keep_anchor(work.tx, anchor, wall_us=anchor.utc_us + 1)
    with store.read() as tx:
        assert list_anchors(tx, "a") == [first, second]
        assert list_anchors(tx, "b") == [other]
        assert list_anchors(tx, "c") == []
