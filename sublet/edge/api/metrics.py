"""For Prometheus: the cloud as it is now, read at the scrape, and this process's answers."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection

from sublet.capacity import allocation, fleet
from sublet.edge.api.deps import Deps
from sublet.edge.api.show import earnings
from sublet.edge.api.show.fleet import use_of
from sublet.records import ledger, metering
from sublet.rights import owner
from sublet.shops import compute
from sublet.shops.compute.states import TERMINAL

SECONDS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0)
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
PAGE = 500
PAGES = 2000


class Metrics:
    """Counters of this process, and a collector that reads the store when asked."""

    def __init__(self, deps: Deps) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self._answers = Counter(
            "sublet_http_answers",
            "Answers of this process.",
            ("method", "route", "status"),
            registry=registry,
        )
        self._seconds = Histogram(
            "sublet_http_seconds",
            "Time to the end of the answer.",
            ("method", "route"),
            buckets=SECONDS,
            registry=registry,
        )
        registry.register(_Cloud(deps))

    def count_answer(self, method: str, route: str, status: int, seconds: float) -> None:
        known = method if method in METHODS else "other"
        self._answers.labels(known, route, str(status)).inc()
        self._seconds.labels(known, route).observe(seconds)

    def page(self) -> bytes:
        return generate_latest(self._registry)


class _Cloud(Collector):
    """Gauges over one consistent view of the store. They name no organisation."""

    def __init__(self, deps: Deps) -> None:
        self._deps = deps

    def describe(self) -> Iterator[Metric]:
        """Nothing ahead of time, so that registering reads no store."""
        return iter(())

    def collect(self) -> Iterator[Metric]:
        now = self._deps.store.clock.now()
        with self._deps.store.read() as tx:
            devices: Tally[tuple[str, ...]] = Tally()
            held: Tally[tuple[str, ...]] = Tally()
            for pool in fleet.list_pools(tx):
                ids = [device.id for device in fleet.list_devices(tx, pool.id)]
                for use in metering.Use:
                    devices[pool.name, use.value] = 0
                for name, count in use_of(tx, ids, now).items():
                    devices[pool.name, name] = count
                for claim in allocation.list_active_claims(tx, pool.id):
                    held[pool.name, claim.party.value, claim.rank.name.lower()] += claim.size
            yield _gauge("sublet_devices", "By use.", ("pool", "use"), devices)
            yield _gauge("sublet_claimed_devices", "By right.", ("pool", "party", "rank"), held)
            yield _gauge("sublet_workloads", "Not over, by state.", ("state",), _workloads(tx))
            yield _gauge("sublet_recalls", "By state.", ("state",), _recalls(tx))
            yield _plain(
                "sublet_ledger_trial_balance_micros",
                "The sum of all accounts: zero, or the books are broken.",
                ledger.trial_balance(tx).micros,
            )
            yield _plain(
                "sublet_spool_faults",
                "Lives of gateways whose usage is not booked on: zero, or somebody has to look.",
                len(metering.list_spool_faults(tx)),
            )
            yield _plain(
                "sublet_earning_micros_per_hour",
                "What open meters of sales come to.",
                earnings.earning_micros_per_hour(tx, now),
            )
            yield _plain(
                "sublet_cost_micros_per_hour",
                "Depreciation and power.",
                earnings.cost_micros_per_hour(tx, now),
            )
        lag = GaugeMetricFamily(
            "sublet_loop_lag_seconds", "How late each loop is.", labels=("loop",)
        )
        for name, seconds in self._deps.loop_lag_seconds().items():
            lag.add_metric((name,), seconds)
        yield lag


def _workloads(tx: Connection) -> Tally[tuple[str, ...]]:
    states = [state for state in compute.State if state not in TERMINAL]
    found: Tally[tuple[str, ...]] = Tally({(state.value,): 0 for state in states})
    after: int | None = None
    for _ in range(PAGES):
        part = compute.list_workloads(tx, states=states, after=after, limit=PAGE)
        found.update((workload.state.value,) for workload in part)
        if len(part) < PAGE:
            break
        after = part[-1].seq
    return found


def _recalls(tx: Connection) -> Tally[tuple[str, ...]]:
    found: Tally[tuple[str, ...]] = Tally({(state.value,): 0 for state in owner.RecallState})
    after: int | None = None
    for _ in range(PAGES):
        part = owner.list_recalls(tx, after=after, limit=PAGE)
        found.update((recall.state.value,) for recall in part)
        if len(part) < PAGE:
            break
        after = part[-1].seq
    return found


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Tally[tuple[str, ...]]) -> Metric:
    gauge = GaugeMetricFamily(name, text, labels=labels)
    for key, value in sorted(values.items()):
        gauge.add_metric(key, value)
    return gauge


def _plain(name: str, text: str, value: int) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
