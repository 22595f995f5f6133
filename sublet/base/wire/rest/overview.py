"""The whole at a glance: status, the auditor's verdict, health."""

from __future__ import annotations

from sublet.base.wire.rest.common import Instant, Money, Shape
from sublet.base.wire.rest.recalls import Recall
from sublet.base.wire.rest.workloads import Workload


class UseCount(Shape):
    use: str
    devices: int


class HolderCount(Shape):
    """Devices that one organisation holds by one right."""

    organisation_id: str
    party: str
    rank: str
    devices: int


class PoolStatus(Shape):
    pool_id: str
    name: str
    devices: int
    by_use: list[UseCount]
    holders: list[HolderCount]


class OwnerStatus(Shape):
    """What only the owner sees."""

    pools: list[PoolStatus]
    earning_micros_per_hour: int
    cost_micros_per_hour: int
    recalls: list[Recall]
    trusted_tenants: bool


class Status(Shape):
    """What runs and what it costs now."""

    now: Instant
    version: str
    trusted_tenants: bool
    gateway_url: str | None
    """Where models are called, with the same key: OpenAI's and Anthropic's SDKs take it (OpenAI's
    with `/v1` after it)."""
    workloads: list[Workload]
    burn_micros_per_hour: int
    available: Money
    runs_out_at: Instant | None
    owner: OwnerStatus | None


class Violation(Shape):
    name: str
    statement: str
    detail: str


class AuditBooks(Shape):
    """The auditor's verdict on live state."""

    at: Instant
    sound: bool
    invariants: list[str]
    """The names of all that was checked."""
    violations: list[Violation]


class Health(Shape):
    """`ok` false comes with 503 and what is wrong."""

    ok: bool
    version: str
    now: Instant
    detail: str
