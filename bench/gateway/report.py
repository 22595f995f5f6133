"""The figures that the issue of a gateway is judged by, out of gatewaybench's JSON."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OURS = "sublet"
TOKENS = 50
"""Of one stream."""
REQUEST, STREAM, LONG, FEW = "ns_c64", "st_d5_c64", "ns_64k", "st_d5_c4"

Result = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """One line of the page: what, ours beside whom, and what it must and should be."""

    name: str
    value: Callable[[Result], float | None]
    unit: str
    must: float
    aim: float | None
    at_least: bool = False

    def verdict(self, value: float) -> str:
        if self.aim is not None and self._holds(value, self.aim):
            return "aim"
        return "must" if self._holds(value, self.must) else "**missed**"

    def _holds(self, value: float, bound: float) -> bool:
        return value >= bound if self.at_least else value <= bound


def of(result: Result, name: str, scenario: str, *path: str) -> float | None:
    """One median of one candidate; None where it did not run or failed."""
    found: Any = result["results"].get(name, {}).get("scenarios", {}).get(scenario)
    if found is None or not found["ok"]:
        return None
    for part in path:
        found = found.get(part) if found else None
    return None if found is None else float(found)


def request(result: Result, name: str) -> float | None:
    return of(result, name, REQUEST, "cpu_us_per_req")


def token(result: Result, name: str) -> float | None:
    if not of(result, name, STREAM, "ok"):
        return None
    found: float | None = result["results"][name].get(f"cpu_us_per_token_{STREAM}")
    return found


def long(result: Result, name: str) -> float | None:
    return of(result, name, LONG, "cpu_us_per_req")


def added_first_token_ms(result: Result, name: str) -> float | None:
    found = of(result, name, FEW, "ttft_us", "p50")
    direct = of(result, "direct", FEW, "ttft_us", "p50")
    return None if found is None or direct is None else (found - direct) / 1000


def memory(result: Result, name: str) -> float | None:
    found: float | None = result["results"].get(name, {}).get("rss_loaded_mb")
    return found


def ratio(
    figure: Callable[[Result, str], float | None], over: str, under: str
) -> Callable[[Result], float | None]:
    def divided(result: Result) -> float | None:
        above, below = figure(result, over), figure(result, under)
        return above / below if above and below else None

    return divided


AIMS = (
    Aim(
        name="CPU per request ÷ nginx", value=ratio(request, OURS, "nginx"), unit="×", must=3, aim=2
    ),
    Aim(
        name="LiteLLM's CPU per request ÷ ours",
        value=ratio(request, "litellm", OURS),
        unit="×",
        must=150,
        aim=250,
        at_least=True,
    ),
    Aim(
        name="CPU per request ÷ vllm-router",
        value=ratio(request, OURS, "vllm-router"),
        unit="×",
        must=float("inf"),
        aim=1,
    ),
    Aim(
        name="CPU per streamed token ÷ nginx",
        value=ratio(token, OURS, "nginx"),
        unit="×",
        must=1.3,
        aim=1.1,
    ),
    Aim(
        name="CPU per request with a 64 KiB prompt ÷ nginx",
        value=ratio(long, OURS, "nginx"),
        unit="×",
        must=3.5,
        aim=2,
    ),
    Aim(
        name="added to the first token, p50",
        value=lambda result: added_first_token_ms(result, OURS),
        unit=" ms",
        must=0.3,
        aim=None,
    ),
    Aim(
        name="memory of the process, loaded",
        value=lambda result: memory(result, OURS),
        unit=" MB",
        must=60,
        aim=None,
    ),
)


def page(result: Result, command: str) -> str:
    """Markdown for docs/benchmarks.md: the verdicts, the candidates, the command."""
    rounds = result["rounds_done"]
    lines = [
        f"Medians of {rounds} interleaved rounds; {platform.machine()}, Python "
        f"{platform.python_version()}; proxy on one core, generator and upstream on another; our "
        "gateway in `ack` mode, keys, limits, credit and bill as in a cloud.",
        "",
        "| figure | ours | must | aim | |",
        "|---|---|---|---|---|",
    ]
    for aim in AIMS:
        value = aim.value(result)
        sign = "≥" if aim.at_least else "≤"
        must = "–" if aim.must == float("inf") else f"{sign} {aim.must:g}{aim.unit}"
        wanted = "–" if aim.aim is None else f"{sign} {aim.aim:g}{aim.unit}"
        shown = "not measured" if value is None else f"{value:.2f}{aim.unit}"
        verdict = "" if value is None else aim.verdict(value)
        lines.append(f"| {aim.name} | {shown} | {must} | {wanted} | {verdict} |")
    lines += [
        "",
        "| candidate | CPU µs/request | CPU µs/token | CPU µs/request, 64 KiB | requests/s | "
        "first token added p50 ms | memory MB | others' cores | bad |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_row(result, name) for name in result["results"] if name != "direct"]
    return "\n".join([*lines, "", f"`{command}`", ""])


def _row(result: Result, name: str) -> str:
    scenarios = result["results"][name]["scenarios"]
    figures = (
        (request(result, name), 1),
        (token(result, name), 1),
        (long(result, name), 1),
        (of(result, name, REQUEST, "rps"), 0),
        (added_first_token_ms(result, name), 3),
        (memory(result, name), 0),
        (of(result, name, REQUEST, "foreign_cores"), 2),
    )
    cells = ["–" if value is None else f"{value:,.{digits}f}" for value, digits in figures]
    bad = sum(found["bad"] for found in scenarios.values())
    return f"| {' | '.join([name, *cells, str(bad)])} |"


def by_round(result: Result) -> dict[str, list[float]]:
    """Ours beside each peer, round by round."""
    runs = result["runs"]

    def each(name: str, scenario: str) -> list[float | None]:
        return [found.get("cpu_us_per_req") for found in runs.get(f"{name}/{scenario}", [])]

    figures: dict[str, list[float]] = {}
    for scenario, what in ((REQUEST, "request"), (LONG, "request of 64 KiB")):
        figures[f"CPU µs per {what}"] = [x for x in each(OURS, scenario) if x]
        for name in result["results"]:
            if name in (OURS, "direct"):
                continue
            pairs = zip(each(OURS, scenario), each(name, scenario), strict=False)
            figures[f"CPU per {what} ÷ {name}"] = [a / b for a, b in pairs if a and b]
    for name in (OURS, *(n for n in result["results"] if n not in (OURS, "direct"))):
        pairs = zip(each(name, STREAM), each(name, REQUEST), strict=False)
        figures[f"CPU µs per token, {name}"] = [(a - b) / TOKENS for a, b in pairs if a and b]
    return {name: values for name, values in figures.items() if values}
