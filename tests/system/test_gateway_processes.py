"""Gateways, the link and the parent as real processes: what each of them costs when it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import threading
import time
from pathlib import Path

import httpx2
import pytest
from serving_cloud import PLAIN, SMOL, Serving, needs_weights, serving
from system.conftest import SUBLET, RunningCloud, children_of, processes_naming, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def health(url: str) -> dict[str, object]:
    """Of whichever gateway takes a new connection."""
    found: dict[str, object] = httpx2.get(f"{url}/health", timeout=20, trust_env=False).json()
    return found


def healths(url: str, count: int) -> dict[str, dict[str, object]]:
    """Of each of so many gateways, by its name."""
    found: dict[str, dict[str, object]] = {}

    def are_all() -> bool:
        seen = health(url)
        found[str(seen["gateway"])] = seen
        return len(found) == count

    wait_until(are_all, 20, f"{count} gateways on one port")
    return found


def gateway_pids(cloud: RunningCloud) -> list[int]:
    assert cloud.process is not None
    found = []
    for pid in children_of(cloud.process.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"sublet.gateway" in words:
            found.append(pid)
    return sorted(found)


def lives(cloud: RunningCloud) -> list[str]:
    """Folders of gateways' lives that are not closed."""
    return sorted(str(path) for path in (cloud.data / "gateway").glob("gw-*/*"))


def rows(cloud: RunningCloud) -> list[tuple[str, int]]:
    """Outcome and output of each request, as a closed cloud's books say."""
    tx = sqlite3.connect(cloud.data / "sublet.db")
    found = tx.execute("select outcome, output from metering_token order by seq").fetchall()
    tx.close()
    return found


def test_two_gateways_share_a_port_and_any_process_may_be_killed(tmp_path: Path) -> None:
    with serving(tmp_path, "--gateways", "2") as made:
        cloud = made.cloud
        facts = json.loads((cloud.data / "running.json").read_text())
        assert facts["gateway_url"] == made.url
        assert f"models {made.url}/v1" in cloud.said()
        assert sorted(healths(made.url, 2)) == ["gw-0", "gw-1"]
        made.add_plain()
        made.deploy(PLAIN)
        whole = [made.stream(PLAIN, 20) for _ in range(4)]
        assert [one.failure for one in whole] == [None] * 4

        # Nobody else of this user may join the port, though the kernel would let them.
        port = made.url.rpartition(":")[2]
        done = subprocess.run(
            [SUBLET, "up", "--data", str(tmp_path / "other"), "--port", "0", "--ssh-port", "0",
             "--gateway-port", port],
            capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert "--gateway-port 0" in done.stdout + done.stderr

        # A gateway: its port never refuses, another life takes its place, the old one is closed.
        before = lives(cloud)
        first = gateway_pids(cloud)[0]
        os.kill(first, signal.SIGKILL)
        whole += [made.stream(PLAIN, 20) for _ in range(6)]
        assert [one.failure for one in whole] == [None] * 10
        wait_until(lambda: len(gateway_pids(cloud)) == 2, 20, "another gateway")
        wait_until(lambda: len(set(before) & set(lives(cloud))) == 1, 20, "the old life is closed")
        assert sorted(healths(made.url, 2)) == ["gw-0", "gw-1"]

        # The link: who has credit in hand goes on without it.
        made.kill("link")
        whole += [made.stream(PLAIN, 20) for _ in range(6)]
        assert [one.failure for one in whole] == [None] * 16
        wait_until(
            lambda: not any(h["is_cut_off"] for h in healths(made.url, 2).values()),
            10,
            "it is back",
        )
        made.await_books()
    assert lives(cloud) == [], "no spool is left unread"
    assert not (cloud.data / "gateway" / "control.sock").exists()
    assert processes_naming(str(tmp_path)) == []


def test_all_is_killed_at_once_and_the_last_spool_is_read(tmp_path: Path) -> None:
    with serving(tmp_path) as made:
        made.add_plain()
        made.deploy(PLAIN)
        whole = [made.stream(PLAIN, 30) for _ in range(5)]
        assert [one.failure for one in whole] == [None] * 5
        made.cloud.kill()
        number = json.loads((made.cloud.data / "gateway" / "snapshot").read_bytes().split(b"\n")[1])
        made.cloud.start()
        made.owner, made.consumer = made.cloud.owner(), made.cloud.client(made.key)
        made.url = made.owner.status().gateway_url or ""
        seen = healths(made.url, 1)["gw-0"]
        assert int(str(seen["snapshot"])) >= number["number"], "numbers only grow"
        made.await_books()
        wait_until(lambda: len(lives(made.cloud)) == 1, 20, "the life that was killed is closed")
        [deployment] = list(made.owner.deployments.list())
        made.until_ready(deployment.id)
        whole.append(made.stream(PLAIN, 30))
        made.await_books()


def test_ctrl_c_lets_streams_end_and_books_them(tmp_path: Path) -> None:
    made = Serving(tmp_path)
    try:
        needs_weights(made)
        made.deploy(SMOL)
        with made.streams(SMOL, 3, 60) as streams:
            closing = threading.Thread(target=made.cloud.close, args=(signal.SIGINT, 90))
            closing.start()
            host, port = made.url.removeprefix("http://").split(":")

            def is_shut() -> bool:
                with socket.socket() as knocking:
                    return knocking.connect_ex((host, int(port))) != 0

            wait_until(is_shut, 20, "nothing new comes in")
        closing.join()
        assert [one.failure for one in streams] == [None] * 3
        assert rows(made.cloud) == [("ok", one.output) for one in sorted_by_end(streams)]
        assert lives(made.cloud) == []
        assert processes_naming(str(tmp_path)) == []
        made.audit_command()
    finally:
        made.cloud.forget_clients()
        if not made.cloud.process_ended():
            made.cloud.close(signal.SIGINT, 90)


def sorted_by_end(streams):  # type: ignore[no-untyped-def]
    return sorted(streams, key=lambda one: one.ended_at)


def test_a_service_restart_ends_gateways_and_leaves_replicas(tmp_path: Path) -> None:
    with serving(tmp_path) as made:
        made.add_plain()
        deployment = made.deploy(PLAIN)
        [replica] = made.ready(deployment.id)
        whole = [made.stream(PLAIN, 20)]
        servers = made.server_pids(PLAIN)
        assert len(servers) == 1
        made.cloud.forget_clients()
        began = time.monotonic()
        assert made.cloud.close(signal.SIGTERM) == 0
        assert time.monotonic() - began < 15
        assert "gateways end too" in made.cloud.said()
        assert lives(made.cloud) == []
        assert len(rows(made.cloud)) == 1
        assert made.server_pids(PLAIN) == servers, "the model server goes on"
        made.cloud.start()
        made.owner, made.consumer = made.cloud.owner(), made.cloud.client(made.key)
        made.url = made.owner.status().gateway_url or ""
        assert [r.id for r in made.until_ready(deployment.id)] == [replica.id]
        wait_until(lambda: health(made.url)["replicas"] == 1, 20, "it is routed to")
        whole.append(made.stream(PLAIN, 20))
        made.await_books()


def test_without_weights_the_cloud_opens_and_says_which_are_missing(tmp_path: Path) -> None:
    (tmp_path / "sublet.toml").write_text('weights = "none"\n')
    cloud = RunningCloud(tmp_path, "--trusted-tenants", "--gateway-port", "0")
    cloud.start()
    try:
        said = cloud.said()
        for model in ("smollm2-135m-instruct", "all-minilm-l6-v2"):
            [line] = [line for line in said.splitlines() if f"model {model}" in line]
            assert "make setup" in line
        assert "The cloud is open" in said
    finally:
        cloud.forget_clients()
        assert cloud.close() == 0


def test_a_key_by_stdin_that_is_none_is_refused_in_a_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [SUBLET, "up", "--data", str(tmp_path / "data"), "--key-stdin"],
        input="not a key\n", capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    said = " ".join((done.stdout + done.stderr).replace("│", " ").split())
    assert "64 hexadecimal digits" in said
    assert "Traceback" not in said
