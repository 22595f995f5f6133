"""Control-plane CPU per admitted rent ÷ the same rows by bare SQLAlchemy Core.

Sublet's side: `POST /v1/instances` on a quote, over HTTP, against one API process on a SQLite file,
with simulated devices (100 nodes of 8) so that every rent is admitted; CPU is user + system of
that process.
The peer: the inserts and updates that one such rent was seen to make, repeated by SQLAlchemy Core
in one transaction each, on a file with the same settings, in a process of its own. Rounds alternate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

RENTS = 120
NODES = 100


def run(rounds: int) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {"ratio": [], "sublet CPU ms per rent": [], "bare CPU ms": []}
    with tempfile.TemporaryDirectory() as folder:
        server = subprocess.Popen(
            [sys.executable, "-m", "bench.rent", "serve", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        bare = subprocess.Popen(
            [sys.executable, "-m", "bench.rent", "bare", folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            facts = json.loads(_line(server))
            _rents(facts, 20)
            written = _ask(server, "rows")
            for _ in range(rounds):
                ours = _rents(facts, RENTS, server.pid) / RENTS * 1000
                peer = float(_ask(bare, json.dumps({"rows": json.loads(written), "n": RENTS})))
                figures["ratio"].append(ours / peer)
                figures["sublet CPU ms per rent"].append(ours)
                figures["bare CPU ms"].append(peer)
        finally:
            for process in (server, bare):
                process.terminate()
                process.wait()
                for stream in (process.stdin, process.stdout):
                    if stream is not None:
                        stream.close()
    return figures


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def _ask(process: subprocess.Popen[str], question: str) -> str:
    assert process.stdin is not None
    process.stdin.write(question + "\n")
    process.stdin.flush()
    return _line(process)


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _rents(facts: dict[str, str], count: int, pid: int = 0) -> float:
    """Take quotes, then rent on them; returns the CPU seconds that the rents alone cost."""
    from sublet.base.wire import rest
    from sublet.sdk import Client

    with Client(facts["url"], facts["key"]) as client:
        quotes = [
            client.quotes.create(rest.QuoteCreate(offer_id="gpu-spot")).id for _ in range(count)
        ]
        before = _cpu(pid) if pid else 0.0
        for quote in quotes:
            client.instances.create(rest.InstanceCreate(quote_id=quote))
        return (_cpu(pid) - before) if pid else 0.0


# ---- Sublet's side ------------------------------------------------------------------------------


def serve(folder: str) -> None:
    import socket

    import sqlalchemy as sa
    import uvicorn

    from sublet.base.kernel.clock import SystemClock
    from sublet.base.kernel.ids import SystemIds
    from sublet.base.kernel.money import Money
    from sublet.base.store import Actor, metadata, open_store
    from sublet.capacity import allocation, fleet
    from sublet.capacity.engines.simulated import SimulatedEngine
    from sublet.edge.api import Deps, create_api
    from sublet.money import billing
    from sublet.rights import market

    clock = SystemClock.unanchored()
    store = open_store(f"sqlite:///{folder}/rent.db", clock, SystemIds())
    metadata.create_all(store.engine)
    engine = SimulatedEngine(clock, nodes=NODES, devices=8)
    with store.work(Actor.system("bench")) as work:
        fleet.load_costs(work, fleet.seed_costs())
        card = (Path(market.__file__).parent / "rate_card.toml").read_text()
        market.load_rate_card(work, card, effective_from=work.now)
        billing.open_owner(work, name="bench")
        for inventory in engine.inventories():
            node = fleet.enrol(work, inventory, site_name="bench", trusted_tenants=True)
        allocation.set_firm_shelf(work, node.pool_id, NODES * 8, until=None)
        market.post_spot_prices(work, work.now)
        opened = billing.sign_up(
            work, email="ada@example.org", organisation_name="Ada", trial=Money(10**12)
        )
    written: list[str] = []
    recent: list[str] = []

    @sa.event.listens_for(store.engine, "before_cursor_execute")
    def _note(_c: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        if statement.startswith(("INSERT", "UPDATE", "DELETE")):
            recent.append(statement.split("(")[0].split(" SET ")[0])
        elif statement.startswith("BEGIN"):
            recent.clear()

    @sa.event.listens_for(store.engine, "commit")
    def _keep(_connection: Any) -> None:
        written[:] = list(recent)

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(64)
    app = create_api(Deps(store=store, engine=engine, version="bench"))
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    threading.Thread(target=_answer, args=(written,), daemon=True).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    print(json.dumps({"url": url, "key": opened.secret}), flush=True)
    server.run(sockets=[listening])


def _answer(written: list[str]) -> None:
    for _ in sys.stdin:
        print(json.dumps(written), flush=True)


# ---- the peer -----------------------------------------------------------------------------------


def bare(folder: str) -> None:
    """Inserts and updates by SQLAlchemy Core, as many and into the same tables as one rent makes."""
    import sqlalchemy as sa

    from sublet.app.migrate import metadata
    from sublet.base.kernel.clock import SystemClock
    from sublet.base.kernel.ids import SystemIds
    from sublet.base.store import Actor, open_store

    ids = SystemIds()
    clock = SystemClock.unanchored()
    store = open_store(f"sqlite:///{folder}/bare.db", clock, ids)
    metadata.create_all(store.engine)
    now = clock.now()

    def values(table: sa.Table) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for column in table.c:
            is_number = isinstance(column.type, sa.Integer | sa.BigInteger)
            if column.primary_key and is_number and len(table.primary_key.columns) == 1:
                continue
            if isinstance(column.type, sa.String | sa.Text):
                found[column.name] = ids.new("row")[: getattr(column.type, "length", None) or 20]
            elif isinstance(column.type, sa.JSON):
                found[column.name] = {"a": 1, "b": ["c", "d"]}
            elif isinstance(column.type, sa.Boolean):
                found[column.name] = False
            elif isinstance(column.type, sa.TypeDecorator):
                found[column.name] = None if column.nullable else now
            else:
                found[column.name] = 1
        return found

    for line in sys.stdin:
        asked = json.loads(line)
        steps = [text.split() for text in asked["rows"]]
        before = time.process_time()
        for _ in range(asked["n"]):
            with store.work(Actor.system("bare")) as work:
                for words in steps:
                    table = metadata.tables[words[2] if words[0] != "UPDATE" else words[1]]
                    if words[0] == "INSERT":
                        work.tx.execute(table.insert().values(values(table)))
                    else:
                        key = next(iter(table.primary_key.columns))
                        work.tx.execute(table.update().where(key == 1).values({key.name: key}))
        spent = time.process_time() - before
        print(spent / asked["n"] * 1000, flush=True)


if __name__ == "__main__":
    {"serve": serve, "bare": bare}[sys.argv[1]](sys.argv[2])
