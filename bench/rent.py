"""Control-plane CPU per admitted rent ÷ the same rows by bare SQLAlchemy Core.

Sublet's side: `POST /v1/instances` on a quote, over HTTP, against one API process on a SQLite file,
with simulated devices, so that every rent is admitted; CPU is user + system of that process. It is
measured on 100 nodes of 8 devices and on one: there, eight are rented, ended and cleaned up, and
only the renting counts.
The peer: the rows that one such rent was seen to write (its own values, with new ids), written by
SQLAlchemy Core in one transaction each, on a file with the same settings, in a process of its own.
A statement for each row, built where it is used, as one writes it; the last ratio is to a peer that
builds its statements once. What writes no row (locks, sweeps that find nothing) and what is only
read is not asked of the peer. Rounds alternate.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RENTS = 120
DEVICES = 8
FLEETS = {"100 nodes": 100, "1 node": 1}
SAMPLE_AT = datetime(2026, 1, 1, tzinfo=UTC)


def run(rounds: int) -> dict[str, list[float]]:
    ratio = {name: f"ratio, {name}" for name in FLEETS}
    ours = {name: f"CPU ms per rent, {name}" for name in FLEETS}
    bare = {False: "bare Core CPU ms", True: "bare Core CPU ms, statements built once"}
    last = "ratio to statements built once, 100 nodes"
    names = (*ratio.values(), *ours.values(), *bare.values(), last)
    figures: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        servers = {
            name: _Server(stack.enter_context(_process("serve", folder, str(nodes))), nodes)
            for name, nodes in FLEETS.items()
        }
        peer = stack.enter_context(_process("bare", folder))
        for server in servers.values():
            server.rent(DEVICES)
        rows = servers["100 nodes"].ask("rows")
        servers["1 node"].ask("rows")
        for _ in range(rounds):
            for is_built_once, name in bare.items():
                asked = json.dumps({"rows": rows, "n": RENTS, "once": is_built_once})
                figures[name].append(float(_ask(peer, asked)))
            for name, server in servers.items():
                figures[ours[name]].append(server.rent(RENTS))
                figures[ratio[name]].append(figures[ours[name]][-1] / figures[bare[False]][-1])
            figures[last].append(figures[ours["100 nodes"]][-1] / figures[bare[True]][-1])
    return figures


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.rent", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _ask(process: subprocess.Popen[str], question: str) -> str:
    assert process.stdin is not None
    process.stdin.write(question + "\n")
    process.stdin.flush()
    return _line(process)


class _Server:
    """An API process with a fleet of its own."""

    def __init__(self, process: subprocess.Popen[str], nodes: int) -> None:
        self._process = process
        self._facts = json.loads(_line(process))
        self._at_a_time = nodes * DEVICES

    def ask(self, question: str) -> str:
        return _ask(self._process, question)

    def rent(self, count: int) -> float:
        """CPU milliseconds per rent: quotes are taken before, everything is ended after."""
        spent = 0.0
        for start in range(0, count, self._at_a_time):
            number = min(self._at_a_time, count - start)
            spent += self._batch(number)
            self.ask("clear")
        return spent / count * 1000

    def _batch(self, count: int) -> float:
        from sublet.base.wire import rest
        from sublet.sdk import Client

        with Client(self._facts["url"], self._facts["key"]) as client:
            quotes = [
                client.quotes.create(rest.QuoteCreate(offer_id="gpu-spot")).id for _ in range(count)
            ]
            before = float(self.ask("cpu"))
            for quote in quotes:
                client.instances.create(rest.InstanceCreate(quote_id=quote))
            return float(self.ask("cpu")) - before


# ---- Sublet's side ------------------------------------------------------------------------------


def serve(folder: str, nodes: str) -> None:
    import socket

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
    from sublet.shops import compute

    clock = SystemClock.unanchored()
    store = open_store(f"sqlite:///{folder}/rent-{nodes}.db", clock, SystemIds())
    metadata.create_all(store.engine)
    engine = SimulatedEngine(clock, nodes=int(nodes), devices=DEVICES)
    system = Actor.system("bench")
    with store.work(system) as work:
        fleet.load_costs(work, fleet.seed_costs())
        market.load_rate_card(work, market.seed_rate_card(), effective_from=work.now)
        billing.open_owner(work, name="bench")
        for inventory in engine.inventories():
            node = fleet.enrol(work, inventory, site_name="bench", trusted_tenants=True)
        fleet.set_pool(work, node.pool_id, scrub_seconds=0)
        allocation.set_firm_shelf(work, node.pool_id, int(nodes) * DEVICES, until=None)
        market.post_spot_prices(work, work.now)
        opened = billing.sign_up(
            work, email="ada@example.org", organisation_name="Ada", trial=Money(10**12)
        )
    loop = compute.ComputeLoop(store, engine)

    def clear() -> str:
        """End all that was rented, and clean up after it."""
        with store.work(system) as work:
            for found in compute.list_workloads(work.tx, states=compute.states.LIVE, limit=10_000):
                compute.stop_for(work, found.id, compute.Reason.USER)
        for _ in range(100):
            loop.step(clock.now())
            with store.read() as tx:
                if not compute.count_live(tx):
                    return "clear"
            time.sleep(0.02)
        raise RuntimeError("what was rented did not end")

    answers = {
        "cpu": lambda: str(time.process_time()),
        "clear": clear,
        "rows": _watched(store),
    }
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(64)
    app = create_api(Deps(store=store, engine=engine, version="bench"))
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    threading.Thread(target=_answer, args=(answers,), daemon=True).start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    print(json.dumps({"url": url, "key": opened.secret}), flush=True)
    uvicorn.Server(config).run(sockets=[listening])


def _answer(answers: dict[str, Callable[[], str]]) -> None:
    try:
        for line in sys.stdin:
            print(answers[line.strip()](), flush=True)
    finally:
        os._exit(0)


def _watched(store: Any) -> Callable[[], str]:
    """Notes what each rent writes, until it is asked: then what the last one wrote.

    Of an insert the rows, of an update the columns; what changed no row is left out.
    """
    import sqlalchemy as sa

    recent: list[dict[str, Any]] = []
    rented: list[dict[str, Any]] = []

    def began(_connection: Any) -> None:
        recent.clear()

    def wrote(_c: Any, cursor: Any, text: str, _p: Any, context: Any, _many: bool) -> None:
        if not (context.isinsert or context.isupdate) or cursor.rowcount == 0:
            return
        table = context.compiled.statement.table.name
        if context.isinsert:
            rows = [dict(row) for row in context.compiled_parameters]
            recent.append({"table": table, "rows": rows})
            return
        assigned = re.search(r" SET (.*?) WHERE ", text, re.DOTALL)
        assert assigned is not None
        set_ = dict(part.split("=", 1) for part in assigned[1].split(", "))
        if any(value != f"{table}.{name}" for name, value in set_.items()):
            recent.append({"table": table, "set": [name.strip('"') for name in set_]})

    def ended(_connection: Any) -> None:
        if any(step["table"] == "compute_run" and "rows" in step for step in recent):
            rented[:] = recent

    hooks = (("begin", began), ("after_cursor_execute", wrote), ("commit", ended))
    for name, hook in hooks:
        sa.event.listen(store.engine, name, hook)

    def answer() -> str:
        for name, hook in hooks:
            sa.event.remove(store.engine, name, hook)
        return base64.b64encode(pickle.dumps(rented)).decode()

    return answer


# ---- the peer -----------------------------------------------------------------------------------


def bare(folder: str) -> None:
    """Writes the rows of a rent, each by its own statement, as often as it is asked."""
    from sublet.app.migrate import metadata
    from sublet.base.kernel.clock import SystemClock
    from sublet.base.kernel.ids import SystemIds
    from sublet.base.store import Actor, open_store

    store = open_store(f"sqlite:///{folder}/bare.db", SystemClock.unanchored(), SystemIds())
    metadata.create_all(store.engine)
    actor = Actor.system("bare")
    for line in sys.stdin:
        asked = json.loads(line)
        steps = _steps(store, pickle.loads(base64.b64decode(asked["rows"])))
        write = _built_once(steps) if asked["once"] else _built_anew(steps)
        before = time.process_time()
        for _ in range(asked["n"]):
            with store.work(actor) as work:
                write(work.tx)
        print((time.process_time() - before) / asked["n"] * 1000, flush=True)


def _steps(store: Any, seen: list[dict[str, Any]]) -> list[tuple[Any, Callable[[], Any], Any]]:
    """Per statement its table, what makes its values, and the key of the row that it updates."""
    from sublet.app.migrate import metadata

    ids = store.ids
    steps: list[tuple[Any, Callable[[], Any], Any]] = []
    for step in seen:
        table = metadata.tables[step["table"]]
        if "rows" in step:
            unique = _named_apart(table)

            def values(rows: Any = step["rows"], unique: frozenset[str] = unique) -> Any:
                made = [{**row, **{c: ids.new("row") for c in unique & row.keys()}} for row in rows]
                return made if len(made) > 1 else made[0]

            steps.append((table, values, None))
            continue
        sample = _sample(table, ids)
        with store.engine.begin() as tx:
            key = tx.execute(table.insert(), sample).inserted_primary_key
        changed = {name: sample[name] for name in step["set"]}
        steps.append((table, changed.copy, key))
    return steps


def _named_apart(table: Any) -> frozenset[str]:
    """Columns of text that no two rows may share."""
    import sqlalchemy as sa

    found = {c.name for c in table.c if c.unique or c.primary_key}
    for index in table.indexes:
        found |= {c.name for c in index.columns} if index.unique else set()
    return frozenset(n for n in found if isinstance(table.c[n].type, sa.String) and n != "state")


def _sample(table: Any, ids: Any) -> dict[str, Any]:
    """A row to update."""
    import sqlalchemy as sa

    found: dict[str, Any] = {}
    for column in table.c:
        if column is table.autoincrement_column:
            continue
        if isinstance(column.type, sa.String):
            found[column.name] = ids.new("row")[: column.type.length or 20]
        elif isinstance(column.type, sa.JSON):
            found[column.name] = {}
        elif isinstance(column.type, sa.Boolean):
            found[column.name] = False
        elif isinstance(column.type, sa.TypeDecorator):
            found[column.name] = None if column.nullable else SAMPLE_AT
        else:
            found[column.name] = 1
    return found


def _built_anew(steps: list[Any]) -> Callable[[Any], None]:
    def write(tx: Any) -> None:
        for table, values, key in steps:
            if key is None:
                tx.execute(table.insert().values(values()))
            else:
                tx.execute(table.update().where(*_is(table, key)).values(values()))

    return write


def _built_once(steps: list[Any]) -> Callable[[Any], None]:
    made = [
        (table.insert() if key is None else table.update().where(*_is(table, key)), values)
        for table, values, key in steps
    ]

    def write(tx: Any) -> None:
        for statement, values in made:
            tx.execute(statement, values())

    return write


def _is(table: Any, key: Any) -> list[Any]:
    return [column == value for column, value in zip(table.primary_key, key, strict=True)]


if __name__ == "__main__":
    parts: dict[str, Callable[..., None]] = {"serve": serve, "bare": bare}
    parts[sys.argv[1]](*sys.argv[2:])
