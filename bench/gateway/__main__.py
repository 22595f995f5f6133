"""Measures our gateway beside others: `python -m bench.gateway --peers DIR`.

DIR is what gatewaybench's `peers DIR` has installed. On a quiet machine of two cores one round of
all candidates takes about four minutes. What cannot be started is named and left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.gateway.report import page
from bench.gateway.side_by_side import MOCK_PORT, PEERS, Missing, find_bench, find_peers, measure


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench.gateway",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each run (default: 4)")
    parser.add_argument("--only", default=",".join(PEERS), help="peers, with commas")
    parser.add_argument("--scenarios", default="", help="gatewaybench's names, with commas (all)")
    parser.add_argument("--gatewaybench", metavar="DIR", help="its folder (SUBLET_GATEWAYBENCH)")
    parser.add_argument(
        "--peers", metavar="DIR", help="the installed peers (SUBLET_GATEWAYBENCH_PEERS)"
    )
    parser.add_argument("--no-ack", action="store_true", help="bills after the answer, not before")
    parser.add_argument("--quiet", type=float, metavar="CORES", help="how idle it waits to be")
    parser.add_argument("--work", type=Path, metavar="DIR", help="where the spool lies (a disk)")
    parser.add_argument("--mock-port", type=int, default=MOCK_PORT, help=f"({MOCK_PORT})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="gatewaybench's result, kept")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page, as Markdown")
    given = parser.parse_args()
    try:
        measured = measure(
            find_bench(given.gatewaybench),
            find_peers(given.peers),
            rounds=given.rounds,
            seconds=given.seconds,
            only=[name for name in given.only.split(",") if name],
            scenarios=given.scenarios,
            ack=not given.no_ack,
            quiet_cores=given.quiet,
            work=given.work,
            mock_port=given.mock_port,
        )
    except Missing as missing:
        raise SystemExit(str(missing)) from missing
    if given.json:
        given.json.write_text(json.dumps(measured.result, indent=1))
    text = page(measured.result, _command(given))
    if given.out:
        given.out.write_text(text)
    print(text)


def _command(given: argparse.Namespace) -> str:
    words = ["python -m bench.gateway", f"--rounds {given.rounds}", f"--seconds {given.seconds:g}"]
    if given.scenarios:
        words.append(f"--scenarios {given.scenarios}")
    if given.only != ",".join(PEERS):
        words.append(f"--only {given.only}")
    if given.no_ack:
        words.append("--no-ack")
    return " ".join([*words, "--peers DIR"])


if __name__ == "__main__":
    main()
