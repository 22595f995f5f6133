"""The control socket, against a real listener that comes and goes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from sublet.base.wire.gateway import Allowance, AllowanceRequest, Gauge
from sublet.gateway import control as control_module
from sublet.gateway.control import Control

EPOCH = 1_790_000_000_000_000


def a_request(key: str = "key_a", serial: int = 1) -> AllowanceRequest:
    return AllowanceRequest(
        key_id=key,
        epoch=EPOCH,
        wanted_micros=10,
        wanted_tokens=0,
        spent_micros=0,
        held_micros=0,
        spent_tokens=0,
        held_tokens=0,
        serial=serial,
    )


def an_allowance(key: str = "key_a", answers: int = 1) -> bytes:
    made = Allowance(
        key_id=key,
        epoch=EPOCH,
        granted_micros=100,
        granted_tokens=None,
        expires_us=EPOCH,
        answers=answers,
    )
    return b'{"type":"allowance",' + made.to_json()[1:] + b"\n"


def a_gauge() -> Gauge:
    return Gauge(
        gateway="gw-0",
        epoch=EPOCH,
        snapshot=3,
        is_cut_off=False,
        in_flight={"rep_1": 2},
        waiting={},
        refusals={},
        requests=7,
        spool_file=1,
        spool_offset=0,
    )


async def until(condition: Callable[[], object], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        await asyncio.sleep(0.005)


class Link:
    """The listener: keeps what it is told, says what it is made to say."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: list[dict[str, Any]] = []
        self.connections = 0
        self.greets = True
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def open(self) -> None:
        self.path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def vanish(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()
        await asyncio.sleep(0)

    def say(self, line: bytes) -> None:
        self._writers[-1].write(line)

    def kinds(self, kind: str) -> list[dict[str, Any]]:
        return [message for message in self.told if message["type"] == kind]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.append(writer)
        if self.greets:
            writer.write(b'{"type":"welcome"}\n')
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                self.told.append(json.loads(line))


class Story:
    """A control client, its link, and what the client passed on."""

    def __init__(self, link: Link, path: Path | None = None) -> None:
        self.link = link
        self.looks = 0
        self.allowances: list[Allowance] = []
        self.control = Control(
            path or link.path,
            name="gw-0",
            epoch=EPOCH,
            gauge=a_gauge,
            on_snapshot=self._look,
            on_allowance=self.allowances.append,
        )

    def _look(self) -> None:
        self.looks += 1


@contextlib.asynccontextmanager
async def a_story(folder: Path) -> AsyncIterator[Story]:
    story = Story(Link(folder / "control.sock"))
    story.control.start()
    try:
        yield story
    finally:
        await story.control.stop()
        if story.link._server is not None:
            await story.link.vanish()


def test_it_says_who_it_is_and_reads_the_snapshot_when_it_is_welcome(tmp_path: Path) -> None:
    async def run() -> None:
        async with a_story(tmp_path) as story:
            await story.link.open()
            await until(lambda: story.control.is_connected)
            await until(lambda: story.link.kinds("gauge"))
            assert story.link.told[0] == {
                "type": "hello", "gateway": "gw-0", "epoch": EPOCH, "pid": os.getpid(),
            }  # fmt: skip
            gauge = story.link.kinds("gauge")[0]
            assert gauge.pop("type") == "gauge"
            assert Gauge(**gauge).requests == 7
            assert story.looks == 1

    asyncio.run(run())


def test_a_nudge_is_followed_by_a_look_and_a_gauge_at_once(tmp_path: Path) -> None:
    async def run() -> None:
        async with a_story(tmp_path) as story:
            await story.link.open()
            await until(lambda: story.link.kinds("gauge"))
            before = len(story.link.kinds("gauge"))
            begun = time.monotonic()
            story.link.say(b'{"type":"snapshot","number":4}\n')
            await until(lambda: story.looks == 2)
            await until(lambda: len(story.link.kinds("gauge")) > before)
            assert time.monotonic() - begun < 0.9  # Not the one of the second.

    asyncio.run(run())


def test_how_it_stands_is_said_every_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_module, "GAUGE_SECONDS", 0.02)

    async def run() -> None:
        async with a_story(tmp_path) as story:
            await story.link.open()
            await until(lambda: len(story.link.kinds("gauge")) >= 5)

    asyncio.run(run())


def test_an_allowance_is_passed_on_and_what_was_answered_is_not_asked_again(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        async with a_story(tmp_path) as story:
            await story.link.open()
            await until(lambda: story.control.is_connected)
            story.control.ask(a_request("key_a", 1))
            story.control.ask(a_request("key_b", 5))
            await until(lambda: len(story.link.kinds("ask")) == 2)
            story.link.say(an_allowance("key_a", 1) + an_allowance("key_b", 4))
            await until(lambda: len(story.allowances) == 2)
            assert story.allowances[0].granted_micros == 100
            await story.link.vanish()
            await until(lambda: not story.control.is_connected)
            story.link.told.clear()
            await story.link.open()
            await until(lambda: story.link.kinds("ask"))
            asked = [(m["key_id"], m["serial"]) for m in story.link.kinds("ask")]
            assert asked == [("key_b", 5)]

    asyncio.run(run())


def test_what_is_asked_without_a_link_is_asked_when_there_is_one_the_last_of_each_key(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        async with a_story(tmp_path) as story:
            story.control.ask(a_request("key_a", 1))
            story.control.ask(a_request("key_a", 2))
            story.control.ask(a_request("key_b", 1))
            await asyncio.sleep(0.05)
            await story.link.open()
            await until(lambda: len(story.link.kinds("ask")) == 2)
            asked = [(m["key_id"], m["serial"]) for m in story.link.kinds("ask")]
            assert asked == [("key_a", 2), ("key_b", 1)]

    asyncio.run(run())


def test_it_comes_back_within_a_second_or_so_however_long_the_link_was_away(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        async with a_story(tmp_path) as story:
            await story.link.open()
            await until(lambda: story.control.is_connected)
            await story.link.vanish()
            story.link.path.unlink(missing_ok=True)
            await asyncio.sleep(1.2)
            assert not story.control.is_connected
            begun = time.monotonic()
            await story.link.open()
            await until(lambda: story.control.is_connected)
            assert time.monotonic() - begun < 1.5

    asyncio.run(run())


@pytest.mark.parametrize(
    ("line", "connections"),
    [(b"no json\n", 2), (b"x" * (2 << 20), 2), (b"[1]\n", 1), (b'{"type":"later"}\n', 1)],
)
def test_nonsense_costs_a_connection_at_most_and_never_the_client(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], line: bytes, connections: int
) -> None:
    async def run() -> None:
        async with a_story(tmp_path) as story:
            await story.link.open()
            await until(lambda: story.control.is_connected)
            story.link.say(line)
            story.link.say(b'{"type":"snapshot","number":2}\n')
            await until(lambda: story.looks >= 2)
            assert story.control.is_connected
            assert story.link.connections == connections

    asyncio.run(run())
    said = [json.loads(text)["event"] for text in capfd.readouterr().err.splitlines()]
    assert said == ["control_connection_ended"] * (connections - 1)


def test_an_allowance_that_is_none_is_said_and_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def run() -> None:
        async with a_story(tmp_path) as story:
            await story.link.open()
            await until(lambda: story.control.is_connected)
            story.link.say(b'{"type":"allowance","key_id":"key_a"}\n' + an_allowance())
            await until(lambda: len(story.allowances) == 1)
            assert story.link.connections == 1

    asyncio.run(run())
    assert json.loads(capfd.readouterr().err)["event"] == "allowance_not_read"


def test_a_link_that_never_greets_is_no_connection_and_is_not_called_in_a_rush(
    tmp_path: Path,
) -> None:
    async def run() -> None:
        async with a_story(tmp_path) as story:
            story.link.greets = False
            await story.link.open()
            await until(lambda: story.link.connections == 1)
            for _ in range(20):
                await asyncio.sleep(0.05)
                for writer in story.link._writers:
                    writer.transport.abort()
            assert not story.control.is_connected
            assert story.link.connections <= 6

    asyncio.run(run())


def test_its_last_word_is_how_it_stands(tmp_path: Path) -> None:
    async def run() -> None:
        link = Link(tmp_path / "control.sock")
        story = Story(link)
        await link.open()
        story.control.start()
        await until(lambda: link.kinds("gauge"))
        before = len(link.kinds("gauge"))
        await story.control.stop()
        await until(lambda: len(link.kinds("gauge")) > before)
        await link.vanish()

    asyncio.run(run())


def test_a_path_too_long_for_a_socket_address_is_reached_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / ("d" * 60) / ("e" * 60)
    folder.mkdir(parents=True)

    async def run() -> None:
        short = tmp_path / "short"
        short.symlink_to(folder)
        link = Link(short / "control.sock")
        story = Story(link, folder / "control.sock")
        await link.open()
        story.control.start()
        await until(lambda: story.control.is_connected)
        await story.control.stop()
        await link.vanish()

    asyncio.run(run())
