"""The link: snapshots, allowances and spools between real files, a real socket and real books."""

from __future__ import annotations

import os
import random
import sqlite3
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from linked import (
    SYSTEM,
    HandSpool,
    LinkedBooks,
    LinkProcess,
    ScriptedGateway,
    open_linked,
    wait_until,
)

from sublet.app import publish, spools
from sublet.app.control import LINE_LIMIT
from sublet.app.link import Link
from sublet.app.publish import Publisher, await_published
from sublet.base.kernel.interval import micros_since_epoch
from sublet.base.wire.gateway import Outcome, frame, read_snapshot
from sublet.records import metering, tenancy
from sublet.records.metering.tokens import FAULTS
from sublet.shops import models
from sublet.shops.models import store as model_rows

LONG_AGO = 1_790_000_000_000_000
"""An epoch that is no longer taken for one that is just starting."""
STALE = timedelta(seconds=60)


@pytest.fixture
def books(tmp_path: Path) -> Iterator[LinkedBooks]:
    # Deep enough that the control socket's path is longer than an address.
    deep = tmp_path / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    made = open_linked(deep)
    yield made
    made.store.close()


@pytest.fixture
def link(books: LinkedBooks) -> Iterator[Link]:
    """In this process; its installation's id makes the nudges reach it."""
    installation_id = books.fact("installation_id") or ""
    made = Link(books.store, books.folder, gateways=3, stale=STALE, installation_id=installation_id)
    books.store.on_commit = made.runner.nudge
    made.start()
    yield made
    made.stop()


@pytest.fixture
def gateway(link: Link, books: LinkedBooks) -> Iterator[ScriptedGateway]:
    made = ScriptedGateway(books.folder, "gw-0", LONG_AGO).connect()
    made.hello()
    yield made
    made.close()


# ---- snapshots ----------------------------------------------------------------------------------


def test_a_revoked_key_is_out_of_the_next_snapshot_and_gateways_are_nudged(
    books: LinkedBooks, gateway: ScriptedGateway
) -> None:
    key_id, _ = books.add_key()
    came = gateway.hear("snapshot")
    path = books.folder / "snapshot"
    with_key = read_snapshot(path.read_bytes())
    assert key_id in {policy.id for policy in with_key.keys.values()}
    assert with_key.gateways == 3
    assert with_key.number == came["number"]
    assert path.stat().st_mode & 0o777 == 0o600

    with books.store.work(SYSTEM) as work:
        tenancy.revoke_key(work, key_id)
    committed = books.store.clock.now()
    assert await_published(books.folder, committed)
    later = read_snapshot(path.read_bytes())
    assert key_id not in {policy.id for policy in later.keys.values()}
    assert later.number > with_key.number
    assert micros_since_epoch(committed) < later.made_us
    assert gateway.hear("snapshot")["number"] == later.number


def test_many_changes_are_few_snapshots(books: LinkedBooks, gateway: ScriptedGateway) -> None:
    before = books.snapshot_number()
    began = time.monotonic()
    for _ in range(40):
        books.add_key()
    took = time.monotonic() - began
    assert await_published(books.folder, books.store.clock.now())
    assert 1 <= books.snapshot_number() - before <= took / publish.SHORTEST.total_seconds() + 2


def test_a_number_is_used_once_whatever_is_lost(books: LinkedBooks) -> None:
    told: list[int] = []

    def publisher() -> Publisher:
        return Publisher(books.store, books.folder, gateways=1, stale=STALE, tell=told.append)

    def step(one: Publisher, key: bool = True) -> int:
        if key:
            books.add_key()
        one.step(books.store.clock.now())
        return books.snapshot_number()

    assert step(publisher()) == 1
    assert step(publisher()) == 2
    # The same content after a restart keeps its number, and is told anew: its age counts.
    made_us = read_snapshot((books.folder / "snapshot").read_bytes()).made_us
    assert step(publisher(), key=False) == 2
    assert read_snapshot((books.folder / "snapshot").read_bytes()).made_us > made_us
    # The file is gone: the books know how far it was.
    (books.folder / "snapshot").unlink()
    assert step(publisher()) == 3
    # The books are of yesterday: the file knows.
    tx = sqlite3.connect(books.data / "sublet.db")
    tx.execute("delete from models_snapshot")
    tx.commit()
    tx.close()
    assert step(publisher()) == 4
    # The file is damaged.
    (books.folder / "snapshot").write_bytes(b"half of it")
    assert step(publisher()) == 5
    assert told == [1, 2, 2, 3, 4, 5]


def test_what_did_not_change_is_not_written_for_ten_seconds(books: LinkedBooks) -> None:
    made = Publisher(books.store, books.folder, gateways=1, stale=STALE, tell=lambda _: None)
    path = books.folder / "snapshot"
    now = books.store.clock.now()
    due = made.step(now)
    first = path.stat().st_ino
    assert due == now + timedelta(seconds=10)
    assert made.step(now + timedelta(seconds=9)) == due
    assert path.stat().st_ino == first
    # It was looked at all the same, and who waits for that is told.
    assert await_published(books.folder, now + timedelta(seconds=8), seconds=0.1)
    assert not await_published(books.folder, now + timedelta(seconds=9), seconds=0.1)
    made.step(now + timedelta(seconds=10))
    assert path.stat().st_ino != first
    assert books.snapshot_number() == 1


def test_a_short_patience_of_gateways_makes_snapshots_fresher(books: LinkedBooks) -> None:
    made = Publisher(
        books.store, books.folder, gateways=1, stale=timedelta(seconds=4), tell=lambda _: None
    )
    now = books.store.clock.now()
    assert made.step(now) <= now + timedelta(seconds=2)


def test_a_drain_waits_for_every_life_that_may_hold_the_replica(
    books: LinkedBooks, link: Link, gateway: ScriptedGateway
) -> None:
    """A gateway that nobody has heard yet, and one that holds an old snapshot, count as holding it."""
    spool = HandSpool(books.folder, "gw-0", LONG_AGO)
    unheard = HandSpool(books.folder, "gw-1", LONG_AGO + 1)
    books.set_replica("rep_1", books.data / "m.sock", 4)
    with_replica = gateway.hear("snapshot")["number"]

    def is_dropped() -> bool:
        with books.store.read() as tx:
            return models.is_dropped(tx, "rep_1")

    with books.store.work(SYSTEM) as work:
        found = models.list_replicas(work.tx)[0]
        models_draining(work, found)
    without = gateway.hear("snapshot")["number"]
    assert without > with_replica
    gateway.gauge(snapshot=with_replica, in_flight={"rep_1": 2})
    wait_until(lambda: in_flight(books) == 2, 5, "the gauge is kept")
    assert not is_dropped()
    gateway.gauge(snapshot=without, in_flight={"rep_1": 1})
    wait_until(lambda: in_flight(books) == 1, 0.9, "another snapshot is written down at once")
    assert not is_dropped(), "gw-1 was never heard"
    unheard.die()
    wait_until(is_dropped, 5, "the one that is dead needs not be waited for")
    gateway.gauge(snapshot=without, in_flight={})
    wait_until(lambda: in_flight(books) == 0, 0.9, "so is a replica without calls")
    spool.die()


def models_draining(work, replica) -> None:  # type: ignore[no-untyped-def]
    model_rows.update_replica(work.tx, replica, state=models.ReplicaState.DRAINING)
    work.emit(models.ReplicaChanged(replica.id, replica.deployment_id, "draining"))


def in_flight(books: LinkedBooks) -> int:
    with books.store.read() as tx:
        return models.in_flight(tx, "rep_1")


# ---- the control socket -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nonsense",
    [
        b"what is this\n",
        b'{"no":"type"}\n',
        b"[]\n",
        b'{"type":"gauge"}\n',
        b'{"type":"hello","gateway":"../up","epoch":1}\n',
        b'{"type":"hello","gateway":"gw-0","epoch":"1"}\n',
        b'{"type":"hello","gateway":17,"epoch":1}\n',
        b"x" * (LINE_LIMIT + 1),
    ],
)
def test_who_talks_nonsense_is_hung_up_on_and_others_are_not(
    books: LinkedBooks, gateway: ScriptedGateway, nonsense: bytes
) -> None:
    stranger = ScriptedGateway(books.folder, "gw-9", LONG_AGO).connect()
    with pytest.raises(ConnectionError):
        stranger.shout(nonsense)
    stranger.close()
    gateway.ask(books.customer.key.id, 1000, 1)
    assert gateway.hear("allowance")["answers"] == 1


def test_a_newer_one_of_its_name_takes_its_place(
    books: LinkedBooks, gateway: ScriptedGateway
) -> None:
    newer = ScriptedGateway(books.folder, "gw-0", LONG_AGO + 5).connect()
    newer.hello()
    with pytest.raises(ConnectionError):
        gateway.hear("allowance")
    newer.ask(books.customer.key.id, 1000, 1)
    assert newer.hear("allowance")["granted_micros"] == 1000
    newer.close()


def test_words_of_a_newer_version_are_passed_over(
    books: LinkedBooks, gateway: ScriptedGateway
) -> None:
    gateway.say("sing", song="la")
    gateway.gauge(mood="fine")
    gateway.ask(books.customer.key.id, 1000, 1)
    assert gateway.hear("allowance")["granted_micros"] == 1000


def test_lines_cut_anywhere_are_read(books: LinkedBooks, gateway: ScriptedGateway) -> None:
    line = (
        b'{"type":"ask","key_id":"%b","epoch":%d,"wanted_micros":7,"wanted_tokens":0,'
        b'"spent_micros":0,"held_micros":0,"spent_tokens":0,"held_tokens":0,"serial":1}\n'
    ) % (books.customer.key.id.encode(), LONG_AGO)
    for at in range(0, len(line), 7):
        gateway.socket.sendall(line[at : at + 7])
        threading.Event().wait(0.002)
    assert gateway.hear("allowance")["granted_micros"] == 7


# ---- allowances ---------------------------------------------------------------------------------


def test_an_allowance_is_granted_given_back_and_refused(
    books: LinkedBooks, gateway: ScriptedGateway
) -> None:
    key_id = books.customer.key.id
    gateway.ask(key_id, 4_000_000, 1)
    said = gateway.hear("allowance")
    assert (said["granted_micros"], said["answers"], said["denied"]) == (4_000_000, 1, None)
    assert books.available() == 6_000_000
    gateway.ask(key_id, 4_000_000, 1)
    assert gateway.hear("allowance")["granted_micros"] == 4_000_000, "once a serial"
    gateway.ask(key_id, 0, 2, spent=1_000_000)
    assert gateway.hear("allowance")["granted_micros"] == 1_000_000
    gateway.ask(key_id, 99_000_000, 3, spent=1_000_000)
    said = gateway.hear("allowance")
    assert (said["granted_micros"], said["denied"]) == (10_000_000, "insufficient_quota")


def test_one_question_that_has_no_answer_keeps_none_of_the_others_waiting(
    books: LinkedBooks, gateway: ScriptedGateway
) -> None:
    for serial in range(1, 20):
        gateway.ask("key_of_nobody", 5, serial)
        gateway.ask(books.customer.key.id, 10, serial, held=10 * (serial - 1))
    answers = [gateway.hear("allowance") for _ in range(19)]
    assert [said["answers"] for said in answers][-1] == 19
    assert answers[-1]["granted_micros"] == 190


def test_a_question_is_answered_in_a_few_milliseconds(
    books: LinkedBooks, record_property: pytest.RecordProperty
) -> None:
    """Through the real process, one after the other, with every answer on the disk."""
    with LinkProcess(books):
        gateway = ScriptedGateway(books.folder, "gw-0", LONG_AGO).connect()
        gateway.hello()
        took = []
        for serial in range(1, 301):
            began = time.perf_counter()
            gateway.ask(books.customer.key.id, 10, serial, held=serial)
            gateway.hear("allowance")
            took.append((time.perf_counter() - began) * 1000)
        gateway.close()
    took = sorted(took[20:])
    p50, p99 = statistics.median(took), took[int(len(took) * 0.99)]
    record_property("ask_p50_ms", round(p50, 2))
    record_property("ask_p99_ms", round(p99, 2))
    print(f"ask: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
    assert p50 < 100, "on the busiest of machines"


# ---- spools -------------------------------------------------------------------------------------


def test_a_spool_is_read_as_it_grows_and_what_is_kept_is_deleted(
    books: LinkedBooks, gateway: ScriptedGateway
) -> None:
    spool = HandSpool(books.folder, "gw-0", LONG_AGO)
    gateway.ask(books.customer.key.id, 1_000_000, 1)
    gateway.hear("allowance")
    spool.write(*[books.event(n) for n in range(10)])
    wait_until(lambda: books.count() == 10, 5, "ten are kept")
    first = spool.path
    spool.roll()
    spool.write(*[books.event(n) for n in range(10, 15)])
    wait_until(lambda: books.count() == 15, 5, "the next file is read")
    wait_until(lambda: not first.exists(), 5, "the file before is deleted")
    assert spool.path.exists(), "the newest never is"
    [row] = books.open_allowances()
    assert row.settled_micros == 15 * 15
    assert books.balance() == 10_000_000 - 15 * 15
    line = frame(books.event(15).to_json())
    spool.write_raw(line[:40])
    threading.Event().wait(0.5)
    assert books.count() == 15
    assert books.fact(FAULTS) in (None, "{}"), "what is being written is no damage"
    spool.write_raw(line[40:])
    wait_until(lambda: books.count() == 16, 5, "it was only half there")
    spool.die()


@pytest.mark.parametrize("is_cut", [False, True], ids=["from a copy", "by cutting it out"])
def test_damage_in_the_middle_is_said_aloud_and_not_passed_over(
    books: LinkedBooks, link: Link, is_cut: bool
) -> None:
    hurt = HandSpool(books.folder, "gw-0", LONG_AGO)
    well = HandSpool(books.folder, "gw-1", LONG_AGO + 1)
    lines = [frame(books.event(n).to_json()) for n in range(6)]
    bad = lines[3].replace(b'"output":5', b'"output":9')
    hurt.write_raw(b"".join([*lines[:3], bad, *lines[4:]]))
    wait_until(lambda: books.count() == 3, 5, "up to the damage it is read")
    at = sum(map(len, lines[:3]))
    name = f"gw-0/{LONG_AGO}"
    wait_until(lambda: name in (books.fact(FAULTS) or ""), 5, "it is shown")
    assert f"at byte {at}" in (books.fact(FAULTS) or "")
    well.write(books.event(100))
    wait_until(lambda: books.count() == 4, 5, "others are read on")
    # Nor does its end close it: its hold stays, for nobody knows what it spent.
    hurt.die()
    threading.Event().wait(1.5)
    assert [e.state for e in books.epochs() if e.gateway == "gw-0"] == ["open"]
    # Put right by a person, it is read to its end and closed.
    if is_cut:
        del lines[3]
    hurt.path.write_bytes(b"".join(lines))
    wait_until(lambda: not hurt.folder.exists(), 15, "it is closed")
    assert sorted(u.event_id for u in books.usage()) == sorted(
        [f"req_{n}" for n in range(6) if n != 3 or not is_cut] + ["req_100"]
    )
    wait_until(lambda: books.fact(FAULTS) == "{}", 5, "nothing is wrong any more")
    well.die()


def test_a_damaged_life_whose_folder_was_taken_away_is_closed_at_the_next_start(
    books: LinkedBooks,
) -> None:
    """What `sublet gateways` tells the owner to do where there is no copy to mend it from."""
    link = LinkProcess(books).start()
    gateway = ScriptedGateway(books.folder, "gw-0", LONG_AGO).connect()
    gateway.hello()
    gateway.ask(books.customer.key.id, 5_000_000, 1)
    gateway.hear("allowance")
    spool = HandSpool(books.folder, "gw-0", LONG_AGO)
    spool.write(books.event(1))
    spool.write_raw(b"no frame\n" + frame(books.event(2).to_json()))

    def faults() -> list[metering.SpoolFault]:
        with books.store.read() as tx:
            return metering.list_spool_faults(tx)

    [fault] = wait_until(faults, 5, "it is shown")
    assert (fault.gateway, fault.epoch, fault.life) == ("gw-0", LONG_AGO, f"gw-0/{LONG_AGO}")
    assert "at byte" in fault.why
    gateway.close()
    spool.die()
    threading.Event().wait(1.2)
    link.kill()
    assert books.available() < books.balance(), "what it held stays held"
    spool.folder.rename(books.data / "aside")
    link = LinkProcess(books).start()
    try:
        wait_until(lambda: books.epochs("open") == [], 5, "its life is closed")
        wait_until(lambda: faults() == [], 5, "nothing is wrong any more")
    finally:
        link.kill()
    assert books.available() == books.balance() == 10_000_000 - 15
    assert [u.event_id for u in books.usage()] == ["req_1"]
    assert books.violations() == []


def test_a_damaged_life_whose_folder_is_taken_away_meanwhile_is_no_fault_any_more(
    books: LinkedBooks, link: Link
) -> None:
    gone = HandSpool(books.folder, "gw-0", LONG_AGO)
    stays = HandSpool(books.folder, "gw-1", LONG_AGO + 1)
    for one in (gone, stays):
        one.write_raw(b"no frame\n" + frame(books.event(1).to_json()))

    def faults() -> set[str]:
        with books.store.read() as tx:
            return {fault.life for fault in metering.list_spool_faults(tx)}

    wait_until(lambda: len(faults()) == 2, 5, "both are shown")
    gone.die()
    gone.folder.rename(books.data / "aside")
    wait_until(lambda: faults() == {f"gw-1/{LONG_AGO + 1}"}, 5, "the other is wrong still")
    stays.die()


def test_much_behind_the_damage_does_not_hide_it(books: LinkedBooks, link: Link) -> None:
    spool = HandSpool(books.folder, "gw-0", LONG_AGO)
    spool.write_raw(
        b"no frame at all\n" + b"".join(frame(books.event(n).to_json()) for n in range(1000))
    )
    wait_until(lambda: "at byte 0" in (books.fact(FAULTS) or ""), 5, "it is shown")
    assert books.usage() == []
    spool.die()


def test_a_file_after_one_whose_end_was_taken_back_is_read(books: LinkedBooks, link: Link) -> None:
    """A write that failed: its file ends torn, or shorter than it was read, and all comes again."""
    spool = HandSpool(books.folder, "gw-0", LONG_AGO)
    again = books.event(2)
    spool.write(books.event(1), again)
    wait_until(lambda: books.count() == 2, 5, "what was not yet safe was read")
    os.truncate(spool.path, len(frame(books.event(1).to_json())) + 9)
    spool.roll()
    spool.write(again, books.event(3))
    wait_until(lambda: books.count() == 3, 5, "the next file is read")
    assert books.posted("token_usage") == 45
    assert books.fact(FAULTS) in (None, "{}")
    spool.die()


def test_an_end_that_is_followed_by_sound_frames_is_damage(books: LinkedBooks, link: Link) -> None:
    spool = HandSpool(books.folder, "gw-0", LONG_AGO)
    spool.write(books.event(1))
    spool.write_raw(b"0000\n")
    spool.write(books.event(2))
    spool.roll()
    spool.write(books.event(3))
    wait_until(lambda: "sound frames follow" in (books.fact(FAULTS) or ""), 5, "it is shown")
    assert [u.event_id for u in books.usage()] == ["req_1"]
    spool.die()


def test_an_event_that_cannot_be_billed_is_said_and_kept(books: LinkedBooks, link: Link) -> None:
    spool = HandSpool(books.folder, "gw-0", LONG_AGO)
    spool.write(books.event(1, price_version="no such"))
    wait_until(lambda: "no such" in (books.fact(FAULTS) or ""), 5, "it is shown")
    assert books.usage() == []
    assert spool.path.exists()
    spool.die()


@pytest.mark.parametrize("torn", [b"", b"12", frame(b'{"half":1}')[:-3], b"\0" * 100, b"junk\n"])
def test_a_dead_gateway_is_read_to_its_end_and_closed(
    books: LinkedBooks, gateway: ScriptedGateway, torn: bytes
) -> None:
    """What it held comes free, what it had open is the owner's loss and free to the consumer."""
    spool = HandSpool(books.folder, "gw-0", LONG_AGO)
    gateway.ask(books.customer.key.id, 5_000_000, 1)
    gateway.hear("allowance")
    spool.write(books.event(1), books.event(2))
    lost = books.event(3, outcome=Outcome.LOST, output=0, made=40, input_uncached=0, micros=0)
    settled = books.event(2, outcome=Outcome.LOST, output=0, made=9, input_uncached=0, micros=0)
    spool.inflight(lost, settled)
    wait_until(lambda: books.count() == 2, 5, "it is read")
    threading.Event().wait(1.2)
    assert books.available() == 10_000_000 - 5_000_000, "while it lives its slice stays held"
    assert spool.folder.exists()
    spool.write(books.event(4))
    spool.write_raw(torn)
    spool.die()
    # A whole line that is wrong was damage for a moment, as long as it lived.
    wait_until(lambda: not spool.folder.exists(), 15, "it is closed")
    assert sorted((u.event_id, u.outcome, u.output) for u in books.usage()) == [
        ("req_1", "ok", 5),
        ("req_2", "ok", 5),
        ("req_3", "lost", 0),
        ("req_4", "ok", 5),
    ]
    assert books.open_allowances() == []
    assert books.available() == books.balance() == 10_000_000 - 45
    assert books.posted("token_loss") == 40
    assert books.violations() == []


def test_a_gateway_that_is_just_starting_is_not_taken_for_dead(
    books: LinkedBooks, link: Link
) -> None:
    """It has made its folder and not yet taken its lock."""
    epoch = micros_since_epoch(books.store.clock.now())
    folder = books.folder / "gw-0" / str(epoch)
    folder.mkdir(parents=True)
    threading.Event().wait(2.5)
    assert folder.exists()
    assert books.epochs() == []


def test_at_the_end_the_last_spools_are_read(books: LinkedBooks) -> None:
    made = Link(books.store, books.folder, gateways=1, stale=STALE, installation_id="x-end")
    made.start()
    spool = HandSpool(books.folder, "gw-0", micros_since_epoch(books.store.clock.now()))
    living = HandSpool(books.folder, "gw-1", micros_since_epoch(books.store.clock.now()))
    spool.write(books.event(1))
    living.write(books.event(2))
    spool.die()
    assert not made.stop(), "one lives, and is left to the next start"
    assert not spool.folder.exists()
    assert living.folder.exists()
    assert books.count() == 2
    living.die()


def test_at_the_end_a_long_spool_is_read_to_its_end(
    books: LinkedBooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What gathered while the books were away is more than one step takes."""
    monkeypatch.setattr(spools, "BATCH_BYTES", 1000)
    monkeypatch.setattr(spools, "ROUNDS", 2)
    spool = HandSpool(books.folder, "gw-0", LONG_AGO)
    spool.write(*(books.event(number) for number in range(1, 61)))
    spool.die()
    assert spools.Spools(books.store, books.folder).finish(books.store.clock.now())
    assert books.count() == 60
    assert not spool.folder.exists()


# ---- what goes wrong ----------------------------------------------------------------------------


def test_a_database_that_is_busy_loses_nothing(
    books: LinkedBooks, gateway: ScriptedGateway
) -> None:
    spool = HandSpool(books.folder, "gw-0", LONG_AGO)
    other = sqlite3.connect(books.data / "sublet.db", isolation_level=None)
    other.execute("begin immediate")
    gateway.ask(books.customer.key.id, 100, 1)
    spool.write(*[books.event(n) for n in range(30)])
    gateway.socket.settimeout(1.0)
    with pytest.raises(TimeoutError):
        gateway.hear("allowance")
    gateway.socket.settimeout(15.0)
    other.execute("rollback")
    other.close()
    assert gateway.hear("allowance")["granted_micros"] == 100
    wait_until(lambda: books.count() == 30, 10, "all are kept")
    spool.die()


@pytest.mark.slow
@pytest.mark.root
def test_a_full_disk_loses_nothing_and_is_said(tmp_path: Path) -> None:
    mounted = ["mount", "-t", "tmpfs", "-o", "size=24m,mode=755", "tmpfs", str(tmp_path)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let root mount a file system")
    try:
        books = open_linked(tmp_path)
        with LinkProcess(books) as link:
            spool = HandSpool(books.folder, "gw-0", LONG_AGO)
            spool.write(*[books.event(n) for n in range(400)])
            wait_until(lambda: books.count() == 400, 10, "before it is full")
            # On the disk already, and found by the link once there is no room left.
            hidden = tmp_path / "hidden"
            hidden.write_bytes(b"".join(frame(books.event(n).to_json()) for n in range(400, 4000)))
            free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
            with (tmp_path / "ballast").open("wb") as ballast:
                ballast.write(b"x" * free)
            spool.roll()
            hidden.rename(spool.path)
            threading.Event().wait(3)
            assert books.count() < 4000
            # The log has no room either: what could not be said is counted, and nobody ends for it.
            (tmp_path / "ballast").unlink()
            wait_until(lambda: books.count() == 4000, 30, "all are kept")
            assert books.posted("token_usage") == 15 * 4000
            spool.die()
        assert not spool.folder.exists()
        assert "log_lines_lost" in link.said()
        books.store.close()
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], capture_output=True, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_killed_at_random_points_nothing_is_lost_and_nothing_twice(
    books: LinkedBooks, seed: int
) -> None:
    """kill -9 of the link while lives begin, write, roll, ask and die."""
    rng = random.Random(seed)
    numbers = iter(range(1_000_000))
    written: set[str] = set()
    lost: set[str] = set()
    spools: list[HandSpool] = []
    link = LinkProcess(books)
    link.start()
    try:
        for round_ in range(8):
            if len(spools) < 4:
                spools.append(HandSpool(books.folder, f"gw-{round_ % 4}", LONG_AGO + round_))
                asking = ScriptedGateway(books.folder, f"gw-{round_ % 4}", LONG_AGO + round_)
                asking.connect().hello()
                asking.ask(books.customer.key.id, 400_000, 1)
                assert asking.hear("allowance")["granted_micros"] == 400_000
                asking.close()
            end = time.monotonic() + rng.uniform(0.05, 0.8)
            while time.monotonic() < end:
                spool = rng.choice(spools)
                events = [books.event(next(numbers)) for _ in range(rng.randrange(1, 60))]
                spool.write(*events)
                written |= {event.id for event in events}
                if rng.random() < 0.1:
                    spool.roll()
                threading.Event().wait(0.01)
            if rng.random() < 0.5 and len(spools) > 1:
                spool = spools.pop(rng.randrange(len(spools)))
                open_then = books.event(next(numbers), outcome=Outcome.LOST, output=0, made=3)
                spool.inflight(open_then)
                lost.add(open_then.id)
                spool.die()
            link.kill()
            link.start()
        for spool in spools:
            spool.die()
        wait_until(lambda: not list(books.folder.glob("gw-*/*")), 60, "every life is closed")
    finally:
        if link.process is not None and link.process.poll() is None:
            link.end()
    usage = books.usage()
    assert {u.event_id for u in usage if u.outcome == "ok"} == written
    assert {u.event_id for u in usage if u.outcome == "lost"} == lost
    assert len(usage) == len(written) + len(lost)
    assert books.posted("token_usage") == 15 * len(written)
    assert books.posted("token_loss") == 3 * len(lost)
    assert books.balance() == books.available() == 10_000_000 - 15 * len(written)
    assert books.epochs("open") == []
    assert books.violations() == []
