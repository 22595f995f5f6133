"""kill -9 of the control plane at random points during mixed work: nothing lost, nothing twice."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sublet.base.wire import rest
from sublet.sdk import ApiError, Client, Unreachable

LIVE = ("pending", "awaiting_capacity", "provisioning", "running", "interrupting", "stopping")


class Players:
    """A consumer and the owner, doing things at random; an answer that got lost is asked again."""

    def __init__(self, cloud: Any, rng: random.Random) -> None:
        self.cloud = cloud
        self.rng = rng
        self.key = ""
        self.done: dict[str, int] = defaultdict(int)

    def consumer(self) -> Client:
        found: Client = self.cloud.client(self.key)
        return found

    def act(self) -> None:
        acts = [self.job, self.job, self.instance, self.stop, self.cancel, self.recall, self.back]
        act = self.rng.choice([*acts, self.own_job])
        try:
            act()
            self.done[act.__name__] += 1
        except ApiError as refused:
            # A refusal is a fine answer; a broken server is not, and is counted below.
            self.done[f"{refused.status} {act.__name__}: {refused.code}"] += 1
        except Unreachable:
            self.done["unreachable"] += 1

    def _offer(self) -> dict[str, Any]:
        return {"offer_id": "cpu-spot", "notice_seconds": 5, "stop_grace_seconds": 2}

    def job(self) -> None:
        seconds = self.rng.choice(["0.2", "1", "3", "30"])
        script = f"cat /proc/uptime; sleep {seconds}; cat /proc/uptime"
        self.consumer().jobs.create(
            rest.JobCreate(
                **self._offer(), command=["sh", "-c", script], wait=self.rng.random() < 0.5
            )
        )

    def instance(self) -> None:
        self.consumer().instances.create(rest.InstanceCreate(**self._offer(), auto_resume=True))

    def _pick(self, found: list[rest.Workload]) -> rest.Workload | None:
        live = [w for w in found if w.state in LIVE]
        return self.rng.choice(live) if live else None

    def stop(self) -> None:
        picked = self._pick(list(self.consumer().instances.list()))
        if picked is not None:
            self.consumer().instances.stop(picked.id)

    def cancel(self) -> None:
        picked = self._pick(list(self.consumer().jobs.list()))
        if picked is not None:
            self.consumer().jobs.cancel(picked.id)

    def recall(self) -> None:
        owner = self.cloud.owner()
        if any(r.state in ("accepted", "noticing", "draining") for r in owner.recalls.list()):
            return
        pool = next(iter(owner.pools.list()))
        plan = owner.recalls.plan(rest.RecallCreate(pool_id=pool.id, count=1))
        owner.recalls.accept(plan.id)

    def back(self) -> None:
        owner = self.cloud.owner()
        for recall in owner.recalls.list():
            if recall.state == "delivered":
                owner.recalls.give_back(recall.id)

    def own_job(self) -> None:
        self.cloud.owner().jobs.create(
            rest.JobCreate(offer_id="cpu-spot", command=["sleep", "1"], wait=True)
        )

    def calm(self, waiting: Callable[..., Any]) -> None:
        """End everything and see it ended."""
        owner, consumer = self.cloud.owner(), self.consumer()
        for recall in owner.recalls.list():
            if recall.state in ("accepted", "noticing", "draining"):
                owner.recalls.cancel(recall.id)
            elif recall.state == "delivered":
                owner.recalls.give_back(recall.id)
        for client in (owner, consumer):
            for workload in client.jobs.list():
                if workload.state in LIVE:
                    client.jobs.cancel(workload.id)
            for workload in client.instances.list():
                if workload.state not in ("terminated", "failed"):
                    client.instances.terminate(workload.id)

        def is_calm() -> bool:
            found = [*consumer.jobs.list(), *consumer.instances.list(), *owner.jobs.list()]
            devices = list(owner.devices.list())
            return all(w.state not in LIVE for w in found) and all(d.use == "idle" for d in devices)

        waiting(is_calm, 60, "everything ended")


def check_exactness(database: Path) -> dict[str, int]:
    """Device-seconds and money, counted again from the rows by other means than the product's."""
    tx = sqlite3.connect(database)
    tx.row_factory = sqlite3.Row
    used = tx.execute(
        "select coalesce(sum((ends_at/1000 - starts_at/1000) * devices), 0) n"
        " from metering_usage where kind = 'held'"
    ).fetchone()["n"]
    spans = {
        row["use"]: row["n"]
        for row in tx.execute(
            "select use, sum(ends_at/1000 - starts_at/1000) n from metering_span"
            " where ends_at is not null group by use"
        )
    }
    # First-party devices that idle inside a recall are first-party time without a meter.
    sold = tx.execute(
        "select coalesce(sum((u.ends_at/1000 - u.starts_at/1000) * u.devices), 0) n"
        " from metering_usage u join metering_meter m on m.run_id = u.run_id"
        " where u.kind = 'held' and m.party = 'sale'"
    ).fetchone()["n"]
    assert spans.get("sold_used", 0) == sold
    assert used >= sold
    # No meter is open; each run was billed from its start to its SIGTERM or exit, to the millisecond.
    for row in tx.execute("select * from metering_meter"):
        assert row["closed_at"] is not None, row["run_id"]
        run = tx.execute("select * from compute_run where id = ?", (row["run_id"],)).fetchone()
        assert row["opened_at"] == run["started_at"] // 1000 * 1000
        total = tx.execute(
            "select sum((ends_at - starts_at) * devices) n from metering_usage"
            " where kind = 'held' and run_id = ?",
            (row["run_id"],),
        ).fetchone()["n"]
        assert (total or 0) == (row["closed_at"] - row["opened_at"]) * row["devices"], row["run_id"]
        ends = {run["term_at"], run["exited_at"]} - {None}
        if row["close_reason"] != "node_fault":
            assert any(abs(end - row["closed_at"]) < 1000 for end in ends), dict(run)
    # Money: every line that was posted is its quantity times its price, rounded once.
    posted: dict[tuple[Any, ...], int] = defaultdict(int)
    latest: dict[tuple[Any, ...], sqlite3.Row] = {}
    for row in tx.execute("select * from market_posting"):
        latest[(row["contract_id"], row["kind"], row["month"], row["price_from"])] = row
    for row in tx.execute("select * from ledger_transfer where contract_id is not null"):
        kind = row["kind"]
        sign = 1 if row["debit"].startswith(("customer:", "first_party:")) else -1
        posted[(row["contract_id"], kind)] += sign * row["amount_micros"]
    by_contract: dict[tuple[Any, ...], int] = defaultdict(int)
    for (contract, kind, _, _), row in latest.items():
        by_contract[(contract, kind)] += row["micros"]
    for key, micros in posted.items():
        assert abs(by_contract[key]) == abs(micros), key
    quantity = sum(r["quantity"] for k, r in latest.items() if k[1] in ("usage", "loss"))
    contracts = tx.execute("select count(*) n from market_contract").fetchone()["n"]
    # What costs less than a micro is no transfer: at 0.016 an hour that is 225 ms a contract.
    assert 0 <= used - quantity <= 225 * contracts
    return {"device_ms": used, "runs": tx.execute("select count(*) from compute_run").fetchone()[0]}


def kill_again_and_again(
    make_cloud: Callable[..., Any], waiting: Callable[..., Any], *, kills: int, seed: int
) -> dict[str, Any]:
    rng = random.Random(seed)
    cloud = make_cloud("--trusted-tenants")
    players = Players(cloud, rng)
    body = rest.SignUpCreate(email="ada@example.org", organisation_name="Ada")
    players.key = cloud.client(None).sign_up(body).secret
    me = players.consumer().me()
    cloud.owner().money.grant(
        rest.CreditCreate(
            organisation_id=me.organisation.id, amount_micros=50_000_000, reference="for the test"
        )
    )
    for _ in range(kills):
        stop = time.monotonic() + rng.uniform(0.3, 3.0)
        killer = threading.Timer(max(stop - time.monotonic(), 0), cloud.kill)
        killer.start()
        while killer.is_alive():
            players.act()
        killer.join()
        cloud.start()
        verdict = cloud.owner().audit_books()
        assert verdict.sound, (seed, verdict.violations)
    players.calm(waiting)
    verdict = cloud.owner().audit_books()
    assert verdict.sound, (seed, verdict.violations)
    assert cloud.close() == 0, cloud.said()
    broken = [what for what in players.done if what.startswith("5")]
    assert broken == [], (seed, broken)
    return {**check_exactness(cloud.data / "sublet.db"), "done": dict(players.done)}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills(
    make_cloud: Callable[..., Any],
    waiting: Callable[..., Any],
    left_running: Callable[[str], list[str]],
    tmp_path: Path,
) -> None:
    seed = 20261125
    found = kill_again_and_again(make_cloud, waiting, kills=20, seed=seed)
    assert found["runs"] >= 10, (seed, found)
    assert left_running(str(tmp_path)) == []


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
def test_twenty_more(
    make_cloud: Callable[..., Any], waiting: Callable[..., Any], seed: int
) -> None:
    """Ten seeds of twenty: two hundred kills."""
    found = kill_again_and_again(make_cloud, waiting, kills=20, seed=seed)
    print(seed, found)
