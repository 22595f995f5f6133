"""A server that hangs is given up by what it failed to answer, never by how long nobody asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from models_cloud import START, Cloud, Inline, Server, clouds

from sublet.capacity import allocation
from sublet.shops import models
from sublet.shops.models.liveness import EVERY, SILENCE, Liveness
from sublet.shops.models.servers import ModelFacts

DOOR = "/a/door"


@pytest.fixture
def make_cloud(tmp_path: Path) -> Iterator[Callable[..., Cloud]]:
    yield from clouds(tmp_path)


def seconds(number: float) -> timedelta:
    return timedelta(seconds=number)


class Later(Inline):
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[Future[bool]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.asked.append(Future())
        return self.asked[-1]


@pytest.fixture
def server() -> Server:
    return Server()


def looks(liveness: Liveness, server: Server, begin: float, end: float) -> list[float]:
    """A look a second; when it was given up."""
    number = int(end - begin)
    at = [begin + n for n in range(number)]
    return [n for n in at if liveness.is_silent("rep_1", server, DOOR, START + seconds(n))]


def test_it_is_given_up_by_a_failed_answer_two_minutes_after_the_first(server: Server) -> None:
    liveness = Liveness(Inline())
    assert looks(liveness, server, 0, 10) == []
    server.silent.add(DOOR)
    found = looks(liveness, server, 10, 200)
    first = EVERY.total_seconds()
    assert found[0] == first + SILENCE.total_seconds() + 1


def test_one_good_answer_ends_a_silence(server: Server) -> None:
    liveness = Liveness(Inline())
    server.silent.add(DOOR)
    assert looks(liveness, server, 0, 110) == []
    server.silent.clear()
    assert looks(liveness, server, 110, 122) == []
    server.silent.add(DOOR)
    found = looks(liveness, server, 122, 400)
    assert found[0] >= 122 + SILENCE.total_seconds()


@pytest.mark.parametrize("was_silent", [False, True])
def test_a_loop_that_stood_still_gives_nobody_up(server: Server, was_silent: bool) -> None:
    """What was asked before is an answer of then, whenever it is read."""
    liveness = Liveness(Inline())
    assert looks(liveness, server, 0, 10) == []
    if was_silent:
        server.silent.add(DOOR)
        assert looks(liveness, server, 10, 31) == []  # Asked at 15, and again at 30.
        server.silent.clear()
    assert looks(liveness, server, 10_000, 10_100) == []


def test_what_is_not_answered_yet_is_no_answer(server: Server) -> None:
    later = Later()
    liveness = Liveness(later)
    assert looks(liveness, server, 0, 300) == []
    assert len(later.asked) == 1
    later.asked[0].set_result(False)
    assert looks(liveness, server, 300, 310) == []
    later.asked[1].set_exception(OSError("no more files"))
    assert looks(liveness, server, 310, 311) == [310], "asked more than two minutes after the first"


def test_forgotten_is_asked_anew(server: Server) -> None:
    later = Later()
    liveness = Liveness(later)
    looks(liveness, server, 0, 1)
    liveness.forget("rep_1")
    later.asked[0].set_result(False)
    assert looks(liveness, server, 200, 201) == []
    later.asked[1].set_result(False)
    assert looks(liveness, server, 201, 202) == []


# ---- in the loop --------------------------------------------------------------------------------


def serving(cloud: Cloud, **options: Any) -> models.Replica:
    cloud.add_model()
    cloud.deploy(min_replicas=1, **options)
    cloud.run(20)
    [found] = cloud.ready()
    return found


def test_a_loop_that_stalled_finds_its_replicas_sound(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud()
    replica = serving(cloud)
    cloud.clock.advance_to(cloud.now + seconds(150))
    cloud.run(60)
    assert cloud.ready() == [replica]


def test_a_notice_withdrawn_after_two_minutes_leaves_a_sound_replica(
    make_cloud: Callable[..., Cloud],
) -> None:
    cloud = make_cloud()
    replica = serving(cloud)
    cloud.gateways["gw-0"].in_flight = {replica.id: 1}
    claim = cloud.notice(replica)
    cloud.run(150)
    assert cloud.replicas("draining")[0].id == replica.id
    cloud.act(allocation.withdraw_notice, claim.id)
    cloud.run(60)
    assert replica.id in {one.id for one in cloud.ready()}
    assert cloud.replicas("draining") == []


class Slow(Server):
    """Its trial takes until it is let go; whether it lives is said at once, by a thread's name."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.tried = threading.Semaphore(0)
        self.named: list[str] = []

    def ready(self, door: str, model: ModelFacts) -> bool:
        if model.name == "slow":
            self.tried.release()
            assert self.go.wait(60)
        return True

    def lives(self, door: str) -> bool:
        self.named.append(threading.current_thread().name)
        return True


def test_starts_and_files_keep_no_such_question_waiting(make_cloud: Callable[..., Cloud]) -> None:
    cloud = make_cloud(devices=8)
    replica = serving(cloud)
    server = Slow()
    loop = models.ModelsLoop(cloud.books, cloud.engine, servers={"llama.cpp": server})
    cloud.models = loop
    try:
        cloud.add_model("slow")
        cloud.deploy("slow", min_replicas=6, max_replicas=6)
        end = time.monotonic() + 30
        before = 0
        while before < 4:  # All the threads there are for that.
            before += server.tried.acquire(blocking=False)
            assert time.monotonic() < end
            cloud.run(1)
        asked = len(server.named)
        while len(server.named) < asked + 2:
            assert time.monotonic() < end
            cloud.run(1)
        assert all(name.startswith("liveness") for name in server.named)
        assert replica.id in {one.id for one in cloud.ready()}
    finally:
        server.go.set()
        loop.close()
    threads = [one for one in threading.enumerate() if one.name.startswith(("liveness", "models"))]
    for one in threads:
        one.join(10)
        assert not one.is_alive(), "they end with the loop"


def test_with_an_executor_of_the_callers_all_is_asked_there() -> None:
    server = Slow()
    with ThreadPoolExecutor(1, thread_name_prefix="mine") as mine:
        liveness = Liveness(mine)
        liveness.is_silent("rep_1", server, DOOR, START)
    assert [name.partition("_")[0] for name in server.named] == ["mine"]
