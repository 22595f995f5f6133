"""The tour: whole, on a real cloud; and what it says where it cannot be taken."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sublet.base.wire import rest
from sublet.cli import tour
from sublet.cli.tour.stage import StoryBroken, Tour

from .conftest import Cloud, Run, sample

SUBLET = [sys.executable, "-m", "sublet"]
READY_SECONDS = 90


@pytest.fixture
def opened() -> Iterator[tuple[Path, dict[str, Any]]]:
    """A cloud opened by the command, as a person would."""
    with tempfile.TemporaryDirectory(prefix="sublet-test-") as name:
        data, ready = Path(name) / "data", Path(name) / "ready.json"
        log = (Path(name) / "out").open("wb")
        cloud = subprocess.Popen(
            [
                *(*SUBLET, "up", "--data", str(data), "--port", "0", "--ssh-port", "0"),
                *("--gateway-port", "0", "--trusted-tenants", "--ready-file", str(ready)),
            ],
            stdout=log,
            stderr=log,
        )
        log.close()
        pause = threading.Event()
        for _ in range(READY_SECONDS * 10):
            if ready.exists() or cloud.poll() is not None:
                break
            pause.wait(0.1)
        assert ready.exists(), (Path(name) / "out").read_text()
        try:
            yield data, json.loads(ready.read_text())
        finally:
            if cloud.poll() is None:
                cloud.send_signal(signal.SIGINT)
            cloud.wait(60)


def sublet(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*SUBLET, *words], env=env, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.slow
def test_every_promise_is_kept_on_a_real_cloud(
    opened: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, facts = opened
    monkeypatch.setenv("SUBLET_URL", facts["api_url"])
    monkeypatch.setenv("SUBLET_KEY", facts["owner_key"])
    done = sublet("tour", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["kept"]
    assert told["seconds"] < 180
    assert len(told["promises"]) >= 19
    assert all(promise["kept"] for promise in told["promises"])
    assert json.loads(sublet("recall", "list", "--json").stdout)["data"][0]["state"] == "returned"
    assert {d["use"] for d in json.loads(sublet("devices", "--json").stdout)["data"]} == {"idle"}

    closed = sublet("down", "--data", str(data))
    assert closed.returncode == 0, closed.stderr
    assert _processes_of(data) == []
    books = sublet("audit-books", "--data", str(data))
    assert books.returncode == 0, books.stdout
    key = json.loads(sublet("recover-owner", "--data", str(data), "--json").stdout)["owner_key"]
    assert key.startswith("sk_")
    assert key != facts["owner_key"]


def _processes_of(data: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode("utf-8", "replace")
        except OSError:
            continue
        if str(data) in words:
            found.append(words)
    return found


# Where it cannot be taken: exit 2, naming the way.


def prepared(cloud: Cloud, **told: Any) -> None:
    node = sample(rest.Node).model_copy(
        update={"missing_for_strangers": [], "trusted_tenants": False}
    )
    offer = sample(rest.Offer).model_copy(update={"product": "spot", "pool_id": "words"})
    answers: dict[str, Any] = {
        "/v1/me": sample(rest.Me).model_copy(update={"is_owner": True}),
        "/v1/nodes": [node],
        "/v1/offers": [offer],
        "/v1/pools": [sample(rest.Pool).model_copy(update={"free_devices": 2})],
    }
    for path, answer in {**answers, **told}.items():
        cloud.answers[path] = [answer]


def test_a_consumers_key_is_not_enough(cloud: Cloud, run: Run) -> None:
    me = sample(rest.Me).model_copy(update={"is_owner": False})
    prepared(cloud, **{"/v1/me": me})
    done = run("tour")
    assert done.code == 2
    assert "owner's key" in done.err


def test_where_strangers_would_be_refused_the_way_is_named(cloud: Cloud, run: Run) -> None:
    fence = sample(rest.FenceRow).model_copy(
        update={"fence": "files", "strength": "none", "remedy": "apt-get install bubblewrap."}
    )
    node = sample(rest.Node).model_copy(
        update={"missing_for_strangers": ["files"], "trusted_tenants": False, "fences": [fence]}
    )
    prepared(cloud, **{"/v1/nodes": [node]})
    done = run("tour", "--url", "http://cloud.test")
    assert done.code == 2
    assert "files" in done.err
    assert "apt-get install bubblewrap" in done.err
    assert "--trusted-tenants" in done.err
    assert not [path for method, path, _ in cloud.asked if method == "POST"]


def test_where_nothing_is_idle_it_waits_for_nobody(cloud: Cloud, run: Run) -> None:
    pool = sample(rest.Pool).model_copy(update={"free_devices": 0})
    prepared(cloud, **{"/v1/pools": [pool]})
    done = run("tour")
    assert done.code == 2
    assert "no device is idle" in done.err


def test_without_a_spot_offer_of_one_device_the_rate_card_is_named(cloud: Cloud, run: Run) -> None:
    prepared(cloud, **{"/v1/offers": []})
    done = run("tour")
    assert done.code == 2
    assert "rate-card" in done.err


def test_without_any_key_the_way_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBLET_URL", "http://cloud.test")
    done = run("tour")
    assert done.code == 1
    assert "SUBLET_KEY" in done.err


@pytest.mark.parametrize(("trusted", "notice"), [(True, 5), (False, 30)])
def test_the_notice_is_30_seconds_or_5_among_trusted_tenants(
    cloud: Cloud, run: Run, monkeypatch: pytest.MonkeyPatch, trusted: bool, notice: int
) -> None:
    seen = []
    monkeypatch.setattr(tour, "_story", lambda told, scene: seen.append(scene.notice_seconds))
    choices = [
        rest.NoticeChoice(notice_seconds=n, price_micros_per_device_hour=1)
        for n in (5, 30, 120)
        if trusted or n != 5
    ]
    offer = sample(rest.Offer).model_copy(update={"product": "spot", "notices": choices})
    node = sample(rest.Node).model_copy(
        update={"missing_for_strangers": [], "trusted_tenants": trusted}
    )
    prepared(cloud, **{"/v1/offers": [offer], "/v1/nodes": [node]})
    assert run("tour").code == 0
    assert seen == [notice]


def test_one_broken_promise_is_exit_1_and_named(
    cloud: Cloud, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def story(told: Tour, scene: Any) -> None:
        told.begin("A step")
        told.promise("the sun rises", "it did", True)
        told.promise("the moon stays", "it set", False)

    monkeypatch.setattr(tour, "_story", story)
    prepared(cloud)
    done = run("tour")
    assert done.code == 1
    assert "1 of 2 promises were NOT kept" in done.out
    assert "the moon stays (measured: it set)" in done.out
    as_json = run("tour", "--json")
    assert as_json.code == 1
    assert [p["kept"] for p in json.loads(as_json.out)["promises"]] == [True, False]


def test_a_story_that_does_not_end_is_exit_1(
    cloud: Cloud, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def story(told: Tour, scene: Any) -> None:
        told.begin("A step")
        raise StoryBroken("the sun did not come within 5 s")

    monkeypatch.setattr(tour, "_story", story)
    prepared(cloud)
    done = run("tour")
    assert done.code == 1
    assert "stopped at step 1: the sun did not come within 5 s." in done.err
