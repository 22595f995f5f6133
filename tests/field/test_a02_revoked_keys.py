"""Field case A2: a key that was revoked works nowhere two seconds later, cut off or not in time."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from gateway.mock_server import mock_process
from linked import (
    SYSTEM,
    GatewayProcess,
    Leash,
    LinkedBooks,
    LinkProcess,
    open_linked,
    wait_until,
)
from starlette.testclient import TestClient

from sublet.app.serving import create_app
from sublet.app.wiring import App, open_app
from sublet.records import tenancy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

STALE_SECONDS = 6
"""The promise is 60: what a gateway is told by its orders."""
EVERY_SECONDS = 0.1
GATEWAYS = ("gw-0", "gw-1", "gw-2")
CUT_OFF = "gw-2"


@dataclass
class Caller:
    """Uses one key at one gateway every tenth of a second, and keeps when each call began."""

    gateway: GatewayProcess
    secret: str
    calls: list[tuple[float, int, str]] = field(default_factory=list)

    def call(self) -> tuple[float, int, str]:
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.gateway.port, timeout=20)
        try:
            body = json.dumps(
                {"model": "mock", "messages": [{"role": "user", "content": "n=2"}], "max_tokens": 2}
            )
            headers = {"authorization": f"Bearer {self.secret}"}
            connection.request("POST", "/v1/chat/completions", body, headers)
            answer = connection.getresponse()
            said = json.loads(answer.read())
            code = "" if answer.status == 200 else said["error"]["code"]
            return began, answer.status, code
        finally:
            connection.close()

    def run(self, stopping: threading.Event) -> None:
        while not stopping.is_set():
            self.calls.append(self.call())
            stopping.wait(EVERY_SECONDS)

    def after(self, instant: float) -> list[tuple[int, str]]:
        return [(status, code) for began, status, code in self.calls if began > instant]

    def last_good(self) -> float:
        return max((began for began, status, _ in self.calls if status == 200), default=0.0)


@dataclass
class Place:
    books: LinkedBooks
    app: App
    gateways: dict[str, GatewayProcess]
    leash: Leash

    @contextlib.contextmanager
    def calling(self, secret: str) -> Iterator[dict[str, Caller]]:
        """The key in use at all three, answered with 200."""
        callers = {name: Caller(gateway, secret) for name, gateway in self.gateways.items()}
        stopping = threading.Event()
        threads = [threading.Thread(target=c.run, args=(stopping,)) for c in callers.values()]
        for thread in threads:
            thread.start()
        try:
            wait_until(
                lambda: all(any(s == 200 for _, s, _ in c.calls) for c in callers.values()),
                20,
                "the key works everywhere",
            )
            yield callers
        finally:
            stopping.set()
            for thread in threads:
                thread.join()

    def revoke(self, key_id: str) -> float:
        """Through the API, as a customer does; returns when it was answered."""
        secret = self.books.customer.secret
        with TestClient(create_app(self.app, None)) as api:
            answer = api.delete(f"/v1/keys/{key_id}", headers={"authorization": f"Bearer {secret}"})
        assert answer.status_code == 204, answer.text
        return time.monotonic()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    books = open_linked(tmp_path, gateway_stale_seconds=STALE_SECONDS, gateways=3)
    leash = Leash(books.folder, CUT_OFF)
    made = {
        name: GatewayProcess(
            leash.folder if name == CUT_OFF else books.folder, name, stale_seconds=STALE_SECONDS
        )
        for name in GATEWAYS
    }
    app = open_app(books.settings)
    with contextlib.ExitStack() as stack:
        stack.callback(books.store.close)
        stack.callback(app.close)
        stack.enter_context(mock_process(tmp_path / "mock.sock"))
        stack.enter_context(LinkProcess(books))
        for gateway in made.values():
            stack.callback(gateway.close)
            gateway.start()
        books.set_replica("rep_mock", tmp_path / "mock.sock", slots=64)
        yield Place(books, app, made, leash)


def test_a2_a_revoked_key_is_refused_everywhere_within_two_seconds(place: Place) -> None:
    key_id, secret = place.books.add_key()
    before = place.books.snapshot_number()
    with place.calling(secret) as callers:
        revoked_at = place.revoke(key_id)
        assert place.books.snapshot_number() > before, "the answer came after the snapshot"
        threading.Event().wait(3.0)
    for name, caller in callers.items():
        late = caller.after(revoked_at + 2.0)
        assert len(late) >= 5, name
        assert set(late) == {(401, "invalid_api_key")}, name
        print(f"{name}: last 200 began {caller.last_good() - revoked_at:+.3f} s from the answer")


def test_a2_one_that_is_cut_off_refuses_once_it_is_stale(place: Place) -> None:
    key_id, secret = place.books.add_key()
    with place.calling(secret) as callers:
        place.leash.cut()
        revoked_at = place.revoke(key_id)
        threading.Event().wait(STALE_SECONDS + 1.5)
        shown = place.gateways[CUT_OFF].health()
    for name in ("gw-0", "gw-1"):
        assert set(callers[name].after(revoked_at + 2.0)) == {(401, "invalid_api_key")}
    cut_off = callers[CUT_OFF]
    assert cut_off.last_good() > revoked_at, "it goes by what it has, for a while"
    late = cut_off.after(revoked_at + STALE_SECONDS)
    assert late
    assert {status for status, _ in late} == {503}
    assert "snapshot_stale" in {code for _, code in late}
    assert shown["is_cut_off"] is True
    assert shown["ok"] is False
    # Tied again, it learns of it, and takes other keys at once.
    place.leash.tie()
    _, other = place.books.add_key()
    caller = Caller(place.gateways[CUT_OFF], other)
    wait_until(lambda: caller.call()[1] == 200, 10, "it is back")
    assert Caller(place.gateways[CUT_OFF], secret).call()[1:] == (401, "invalid_api_key")


@pytest.mark.parametrize(
    "lose",
    [
        lambda work, principal_id: tenancy.remove_principal(work, principal_id),
        lambda work, principal_id: tenancy.change_role(work, principal_id, "viewer"),
    ],
    ids=["principal removed", "role lost"],
)
def test_a2_so_is_one_whose_right_was_taken_and_streams_end_normally(
    place: Place, lose: Callable[..., object]
) -> None:
    with place.books.store.work(SYSTEM) as work:
        person = tenancy.create_principal(
            work, place.books.org, kind="user", name="Bob", email="b@example.org", role="member"
        )
        _, secret = tenancy.create_key(work, person.id, name="bobs")
    gateway = place.gateways["gw-0"]
    with place.calling(secret) as callers:
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=20)
        body = {"model": "mock", "stream": True, "max_tokens": 60}
        body["messages"] = [{"role": "user", "content": "n=60 delay=0.05"}]
        headers = {"authorization": f"Bearer {secret}"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        stream = connection.getresponse()
        assert stream.status == 200
        with place.app.store.work(SYSTEM) as work:
            lose(work, person.id)
        lost_at = time.monotonic()
        threading.Event().wait(2.6)
    for name, caller in callers.items():
        late = caller.after(lost_at + 2.0)
        assert late, name
        assert {status for status, _ in late} <= {401, 403}, name
    text = stream.read()
    connection.close()
    assert text.endswith(b"data: [DONE]\n\n"), "what ran when it was taken ends as if it had not"
    assert text.count(b'"content":" w') == 60


def test_a2_a_new_key_works_within_two_seconds(place: Place) -> None:
    _, secret = place.books.add_key()
    made_at = time.monotonic()
    for gateway in place.gateways.values():
        caller = Caller(gateway, secret)
        wait_until(lambda c=caller: c.call()[1] == 200, 2.0, f"{gateway.name} knows it")  # type: ignore[misc]
    assert time.monotonic() - made_at < 2.0
