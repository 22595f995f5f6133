"""What our gateway costs a request and a token, beside other gateways in one interleaved run.

Owns     the gateway that runs without a control plane (`alone`), the run of gatewaybench
         (`side_by_side`), its figures as a page (`report`).
Always   every row is billed and on disk before its answer is out (`ack`); the key has limits and
         credit, granted while it runs; ours and its peers meet the same mock on the same cores.
Callers  `python -m bench gateway`, `python -m bench.gateway`; tests use `alone`.

gatewaybench is a folder outside this repository: SUBLET_GATEWAYBENCH or --gatewaybench names it.
"""

from __future__ import annotations

from bench.gateway.report import by_round
from bench.gateway.side_by_side import Missing, find_bench, find_peers, measure


def run(rounds: int) -> dict[str, list[float]]:
    """Every round's ratios; nothing where gatewaybench is not there, and it says so."""
    try:
        bench = find_bench(None)
    except Missing as missing:
        print(f"gateway: left out: {missing}")
        return {}
    return by_round(measure(bench, find_peers(None), rounds=rounds).result)
