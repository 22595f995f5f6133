"""What no model answers: the list of models, health, metrics, and what is not there."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import orjson

from sublet.base.kernel.clock import read_boot_ns
from sublet.gateway.dialects import SURFACES, model_list, model_object
from sublet.gateway.errors import Refusal

if TYPE_CHECKING:
    from sublet.gateway.edge import Request
    from sublet.gateway.routes import Model
    from sublet.gateway.state import Gateway

MODELS = b"/v1/models"
LATER = (b"/v1/responses", b"/v1/files", b"/v1/batches", b"/v1/audio", b"/v1/images")
JSON = b"application/json"
BUCKETS = 17
"""Of the histogram, each twice the one before it: to 65 seconds."""
OLD_NS = 60_000_000_000
TEXT = b"text/plain; version=0.0.4"


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    status: int = 200
    kind: bytes = JSON
    head: bytes = b""
    body: bytes = b""


def answer(g: Gateway, request: Request) -> Page:
    """The page for a request that is no call of a model. Raises Refusal."""
    path, method = request.path, request.method
    allowed = _methods(path)
    if not allowed:
        if path.startswith(LATER):
            raise Refusal(
                404,
                "unsupported_surface",
                f"{path.decode(errors='replace')} is not offered yet: use /v1/chat/completions, "
                "/v1/completions, /v1/embeddings or /v1/messages.",
            )
        raise Refusal(404, "unknown_url", f"There is no {path.decode(errors='replace')} here.")
    if method == b"OPTIONS":
        return Page(status=204, head=b"allow: %b\r\n" % allowed)
    if method not in allowed.split(b", "):
        raise Refusal(
            405,
            "method_not_allowed",
            f"{method.decode()} is not for this path: use {allowed.decode()}.",
            headers=b"allow: %b\r\n" % allowed,
        )
    if path == b"/health":
        return _health(g)
    if path == b"/metrics":
        return Page(kind=TEXT, body=_metrics(g))
    now_ns = read_boot_ns()
    known = g.identify(request, now_ns)
    limits = g.limit_headers(known, now_ns)
    names = g.routes.list_names(known)
    if path == MODELS:
        body = model_list([g.routes.models[name].route for name in names])
        return Page(body=body, head=limits)
    name = path[len(MODELS) + 1 :].decode(errors="replace")
    if name not in names:
        raise Refusal(
            404, "model_not_found", f"There is no model {name} for this key.", param="model"
        )
    return Page(body=model_object(g.routes.models[name].route), head=limits)


def _methods(path: bytes) -> bytes:
    if path in SURFACES:
        return b"POST, OPTIONS"
    if path in (MODELS, b"/health", b"/metrics") or path.startswith(MODELS + b"/"):
        return b"GET, HEAD, OPTIONS"
    return b""


def _health(g: Gateway) -> Page:
    """200 while it sells; 503 with the reason while it refuses everything."""
    age_ns = read_boot_ns() - g.fresh_ns
    status = {
        "gateway": g.name,
        "snapshot": g.routes.number,
        "snapshot_age_seconds": max(age_ns // 1_000_000_000, 0),
        "is_snapshot_old": age_ns > OLD_NS,
        "is_cut_off": not g.control.is_connected,
        "is_spool_failing": g.spool.is_failing,
        "is_draining": g.is_draining,
        "in_flight": len(g.open),
        # Their names are for who has a key.
        "models": len(g.routes.models),
        "replicas": len(g.routes.replicas),
    }
    is_well = not (age_ns > g.stale_ns or g.spool.is_failing or g.is_draining)
    return Page(status=200 if is_well else 503, body=orjson.dumps({"ok": is_well, **status}))


def _first_bytes(model: Model) -> list[str]:
    """How long requests waited for their first byte."""
    name, label = "sublet_gateway_first_byte_seconds", f'model="{model.name}"'
    counts = list(itertools.accumulate(model.first_bytes))
    lines = [
        f'{name}_bucket{{{label},le="{2**k / 1000:g}"}} {count}'
        for k, count in enumerate(counts[:BUCKETS])
    ]
    return [
        *lines,
        f'{name}_bucket{{{label},le="+Inf"}} {counts[-1]}',
        f"{name}_sum{{{label}}} {model.first_us / 1e6:.6f}",
        f"{name}_count{{{label}}} {counts[-1]}",
    ]


def _metrics(g: Gateway) -> bytes:
    """Prometheus text: few names, all counters since this process began."""
    gauge = g.gauge()
    lines = [
        "# TYPE sublet_gateway_requests_total counter",
        f"sublet_gateway_requests_total {gauge.requests}",
        "# TYPE sublet_gateway_refusals_total counter",
    ]
    lines += [
        f'sublet_gateway_refusals_total{{code="{code}"}} {count}'
        for code, count in sorted(gauge.refusals.items())
    ]
    lines.append("# TYPE sublet_gateway_in_flight gauge")
    lines += [
        f'sublet_gateway_in_flight{{replica="{replica}"}} {count}'
        for replica, count in sorted(gauge.in_flight.items())
    ]
    lines.append("# TYPE sublet_gateway_waiting gauge")
    lines += [
        f'sublet_gateway_waiting{{model="{model}"}} {count}'
        for model, count in sorted(gauge.waiting.items())
    ]
    lines.append("# TYPE sublet_gateway_first_byte_seconds histogram")
    for model in g.routes.models.values():
        lines += _first_bytes(model)
    lines += [
        "# TYPE sublet_gateway_connections gauge",
        f"sublet_gateway_connections {len(g.connections)}",
        "# TYPE sublet_gateway_snapshot_number gauge",
        f"sublet_gateway_snapshot_number {gauge.snapshot}",
        "# TYPE sublet_gateway_snapshot_age_seconds gauge",
        f"sublet_gateway_snapshot_age_seconds {max(read_boot_ns() - g.fresh_ns, 0) // 1_000_000_000}",
        "# TYPE sublet_gateway_cut_off gauge",
        f"sublet_gateway_cut_off {int(gauge.is_cut_off)}",
        "# TYPE sublet_gateway_spool_failing gauge",
        f"sublet_gateway_spool_failing {int(g.spool.is_failing)}",
    ]
    return "\n".join(lines).encode() + b"\n"
