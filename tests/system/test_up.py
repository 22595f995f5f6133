"""Opening and closing a cloud, and every way in which that can go wrong: one clear sentence each."""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sublet.base.wire import rest
from sublet.sdk import ApiError

SUBLET = str(Path(sys.executable).with_name("sublet"))


def sublet(
    folder: Path, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        [SUBLET, *arguments],
        capture_output=True,
        text=True,
        timeout=90,
        cwd=folder,
        env={**os.environ, "XDG_CONFIG_HOME": str(folder / "config"), **(env or {})},
        check=False,
    )


def up(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    ports = ["--port", "0", "--ssh-port", "0", "--gateway-port", "0"]
    options = ["--data", str(folder / "data"), *ports]
    return sublet(folder, "up", *options, *arguments)


def one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """It failed, without a traceback, and says these words."""
    said = done.stdout + done.stderr
    assert done.returncode in (1, 2), said
    assert "Traceback" not in said
    flat = " ".join(said.replace("│", " ").split())
    for word in words:
        assert word in flat, said


@pytest.mark.slow
def test_open_use_close(
    make_cloud: Callable[..., Any],
    waiting: Callable[..., Any],
    left_running: Callable[[str], list[str]],
    tmp_path: Path,
) -> None:
    cloud = make_cloud("--trusted-tenants")
    ada = cloud.consumer("ada")
    offer = {"offer_id": "cpu-spot", "notice_seconds": 5, "stop_grace_seconds": 2}
    job = ada.jobs.create(rest.JobCreate(**offer, command=["sh", "-c", "echo hello; exit 3"]))
    waiting(lambda: ada.jobs.get(job.id).state == "failed", 20, "the job ended")
    assert ada.jobs.get(job.id).exit_code == 3
    assert "".join(ada.jobs.logs(job.id)) == "hello\n"
    box = ada.instances.create(rest.InstanceCreate(**offer))
    waiting(lambda: ada.instances.get(box.id).state == "running", 20, "the instance runs")

    # A second `up` on the same data is refused, and the first goes on.
    second = up(cloud.folder)
    one_sentence(second, "Another `sublet up`", "--data")
    assert ada.instances.get(box.id).state == "running"

    # The owner's key can be made anew, and the old one dies.
    made = sublet(cloud.folder, "recover-owner", "--data", str(cloud.data), "--json")
    assert made.returncode == 0, made.stderr
    with pytest.raises(ApiError) as refused:
        cloud.owner().me()
    assert refused.value.code == "invalid_api_key"

    # Ctrl-C: workloads are ended and credited, nothing stays.
    assert cloud.close(signal.SIGINT) == 0
    assert left_running(str(tmp_path)) == []
    books = sublet(cloud.folder, "audit-books", "--data", str(cloud.data))
    assert books.returncode == 0, books.stdout + books.stderr
    tx = sqlite3.connect(cloud.data / "sublet.db")
    run = tx.execute("select reason, state from compute_run where workload_id = ?", (box.id,))
    assert run.fetchone() == ("shutdown", "scrubbed")
    charged = tx.execute(
        "select coalesce(sum(case when debit like 'customer:%' then amount_micros"
        " else -amount_micros end), 0) from ledger_transfer where subject = ?",
        (box.id,),
    ).fetchone()
    assert charged == (0,), "a young run that the owner's side ends is free"


@pytest.mark.slow
def test_a_restart_leaves_supervisors_running_and_adopts_them(
    make_cloud: Callable[..., Any], waiting: Callable[..., Any]
) -> None:
    cloud = make_cloud("--trusted-tenants")
    ada = cloud.consumer("ada")
    box = ada.instances.create(rest.InstanceCreate(offer_id="cpu-spot", notice_seconds=5))
    waiting(lambda: ada.instances.get(box.id).state == "running", 20, "it runs")
    before = ada.instances.get(box.id).run
    assert cloud.close(signal.SIGTERM) == 0
    assert box.id in cloud.said(), "each workload that goes on is named with its deadline"
    cloud.start()
    ada = cloud.client(cloud.keys["ada"])
    again = ada.instances.get(box.id)
    assert again.state == "running"
    assert (again.run.id, again.run.started_at) == (before.id, before.started_at)
    assert cloud.owner().audit_books().sound
    ada.instances.terminate(box.id)


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = sublet(tmp_path, "up", "--data", str(tmp_path / "data"), "--port", port)
        one_sentence(done, port, "--port 0")


def test_a_port_that_is_none_is_named(tmp_path: Path) -> None:
    done = sublet(tmp_path, "up", "--data", str(tmp_path / "data"), "--port", "70000")
    one_sentence(done, "port", "65535")


def test_a_misspelt_setting_is_named(tmp_path: Path) -> None:
    (tmp_path / "sublet.toml").write_text("prot = 8700\n")
    one_sentence(up(tmp_path), "prot", "Settings are")


def test_a_broken_settings_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "sublet.toml").write_text("this is not = = toml\n")
    one_sentence(up(tmp_path), "sublet.toml")


def test_a_database_that_is_none_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    database = tmp_path / "data" / "sublet.db"
    database.write_bytes(b"this is not a database, but somebody's file\n" * 100)
    before = database.read_bytes()
    one_sentence(up(tmp_path), "database", "cannot be read", "Nothing was changed")
    assert database.read_bytes() == before


def test_a_database_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    database = sqlite3.connect(tmp_path / "data" / "sublet.db")
    database.execute("create table alembic_version (version_num varchar(32) not null)")
    database.execute("insert into alembic_version values ('9999')")
    database.commit()
    database.close()
    one_sentence(up(tmp_path), "newer Sublet")


def test_a_data_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    one_sentence(up(tmp_path), "data folder", "--data")


def test_without_a_key_the_way_is_named(tmp_path: Path) -> None:
    done = sublet(tmp_path, "ls", env={"SUBLET_URL": "http://127.0.0.1:1", "SUBLET_KEY": ""})
    one_sentence(done, "SUBLET_KEY")


def test_without_a_cloud_the_way_is_named(tmp_path: Path) -> None:
    env = {"SUBLET_URL": "http://127.0.0.1:1", "SUBLET_KEY": "sk_nothing"}
    one_sentence(sublet(tmp_path, "ls", env=env), "127.0.0.1:1")


@pytest.mark.root
@pytest.mark.slow
def test_a_full_disk_refuses_starts_and_keeps_closing_meters(
    make_cloud: Callable[..., Any], waiting: Callable[..., Any], tmp_path: Path
) -> None:
    """On a small file system of its own, filled while a workload runs."""
    folder = tmp_path / "cloud"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=160m,mode=755", "tmpfs", str(folder)]
    if subprocess.run(mounted, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine does not let root mount a file system")
    try:
        (folder / "sublet.toml").write_text("disk_reserve_mb = 64\n")
        cloud = make_cloud("--trusted-tenants", start=False)
        cloud.start()
        ada = cloud.consumer("ada")
        offer = {"offer_id": "cpu-spot", "notice_seconds": 5, "stop_grace_seconds": 2}
        box = ada.instances.create(rest.InstanceCreate(**offer))
        waiting(lambda: ada.instances.get(box.id).state == "running", 20, "it runs")
        free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
        with (folder / "ballast").open("wb") as ballast:
            ballast.write(b"x" * (free - (40 << 20)))
        late = ada.jobs.create(rest.JobCreate(**offer, command=["true"], wait=True))
        waiting(
            lambda: (
                "disk" in (ada.jobs.get(late.id).failure or "")
                or ada.jobs.get(late.id).state in ("failed", "awaiting_capacity")
            ),
            30,
            "the start is refused",
        )
        assert ada.jobs.get(late.id).run is None or ada.jobs.get(late.id).run.started_at is None
        ada.instances.terminate(box.id)
        waiting(lambda: ada.instances.get(box.id).state == "terminated", 20, "its meter closes")
        assert cloud.owner().audit_books().sound
        (folder / "ballast").unlink()
        ada.jobs.cancel(late.id)
        assert cloud.close() == 0
    finally:
        subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)
