"""A model server inside a sandbox: llama.cpp on a Unix socket in its home, until SIGTERM.

One argument: its orders, as JSON. It is run by path, without the installation's own packages on
its path, and imports nothing of Sublet. Each step is one line of its log; prompts and answers
never are. What it has in hand at SIGTERM is lost: draining is done before, by the gateways.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

MOST_GATEWAYS = 64
"""Each may use all slots at once: what is too much for the model waits here, on its connection."""
MOST_CONNECTIONS = 512
"""A sandbox of one device holds 1536 threads and processes in all."""
SPARE_CONNECTIONS = 16
"""For what the control plane asks: whether it lives, its gauges, one real token."""
LEAST_BATCH = 512
CACHE_MIB = 64
"""Of prompts that left their slots, for those that come back."""
WARNINGS = 1


def main() -> NoReturn:
    orders: dict[str, Any] = json.loads(sys.argv[1])
    sys.path += [*orders["packages"], os.path.dirname(__file__)]
    if orders["key_socket"] is None:
        await_end(serve(orders, orders["model"]), orders)
    unseal = importlib.import_module("unseal")  # beside this file
    say(f"awaiting the key of {orders['alias']}")
    model = unseal.receive_and_open(orders["model"], orders["key_socket"])
    say("unsealed")
    server = serve(orders, model)
    unseal.let_go(model)
    await_end(server, orders)


def serve(orders: dict[str, Any], model: str) -> Any:
    """Load the model and listen; returns once both are done."""
    # Before the first of its threads is made, so that none of them takes the signal.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    import xllamacpp  # type: ignore[import-untyped]  # it has no types

    say(f"loading {orders['alias']}")
    given = xllamacpp.CommonParams()
    given.model.path, given.model_alias = model, {orders["alias"]}
    given.hostnames = [orders["socket"]]
    given.n_parallel, given.n_ctx = orders["slots"], orders["context"] * orders["slots"]
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = orders["threads"]
    given.n_threads_http = threads_of(orders["slots"])
    given.fit_params, given.kv_unified, given.offline = False, False, True
    given.cache_ram_mib = 0 if orders["is_embedding"] else CACHE_MIB
    given.embedding = orders["is_embedding"]
    if orders["is_embedding"]:
        # Embeddings see a whole input at once.
        given.n_batch = given.n_ubatch = max(orders["context"], LEAST_BATCH)
    if orders["key_socket"] is not None:
        # What was opened is locked where it lies: it is used there, and not laid out anew.
        given.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
        given.no_extra_bufts = True
    if orders["template"] is not None:
        with open(orders["template"]) as source:
            given.chat_template = source.read()
    given.endpoint_metrics, given.endpoint_slots, given.endpoint_props = True, False, False
    given.ui, given.verbosity = False, WARNINGS
    given.sse_ping_interval = -1  # the gateway keeps its clients' connections alive
    if os.path.exists(orders["socket"]):
        os.unlink(orders["socket"])
    before = os.umask(0o177)
    try:
        return xllamacpp.Server(given)
    finally:
        os.umask(before)


def threads_of(slots: int) -> int:
    """Threads that answer. A connection holds one for as long as it is open, idle ones too, and who
    finds none free waits: the question whether the server lives must never. A thread that waits
    takes some 10 KiB."""
    return min(slots * MOST_GATEWAYS, max(slots, MOST_CONNECTIONS)) + SPARE_CONNECTIONS


def await_end(server: Any, orders: dict[str, Any]) -> NoReturn:
    say(f"serving on {server.listening_address or orders['socket']}")
    signal.sigwait([signal.SIGTERM])
    say("ended by SIGTERM")
    os._exit(0)  # the server is not asked to wait for what it has in hand


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
