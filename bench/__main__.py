"""`make bench`: every benchmark, or those named: `make bench ARGS="rent first_ssh --rounds 7"`."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable

from bench import first_ssh, gateway, rent
from bench.gateway import events

BENCHES: dict[str, Callable[[int], dict[str, list[float]]]] = {
    "rent": rent.run,
    "first_ssh": first_ssh.run,
    "events": events.run,
    "gateway": gateway.run,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("names", nargs="*", default=[], help=f"of: {', '.join(BENCHES)}")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--json", action="store_true", help="every round's figures")
    given = parser.parse_args()
    for name in given.names or BENCHES:
        figures = BENCHES[name](given.rounds)
        if given.json:
            print(json.dumps({name: figures}))
            continue
        print(f"{name} (median of {given.rounds} rounds, lowest and highest)")
        for figure, values in figures.items():
            low, middle, high = min(values), statistics.median(values), max(values)
            print(f"  {figure:<44} {middle:12.3f}   {low:.3f} – {high:.3f}")


if __name__ == "__main__":
    main()
