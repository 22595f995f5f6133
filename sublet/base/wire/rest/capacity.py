"""Where it runs: sites, pools, nodes, devices, and who holds them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from sublet.base.wire.rest.common import Body, Flag, Instant, Shape, Whole

NodeState = Literal[
    "onboard",
    "burn_in",
    "production",
    "cordoned",
    "draining",
    "scrubbing",
    "triage",
    "repair",
]


class Site(Shape):
    id: str
    name: str
    region: str
    pue: str
    """Power usage effectiveness, a decimal as text."""
    tariff_micros_per_kwh: int


class ExcessPoint(Shape):
    """`devices` can be lent now so that the owner has them back `notice_seconds` after asking."""

    notice_seconds: int
    devices: int


class FirmShelf(Shape):
    """What the owner has decided to sell for longer than the forecast can vouch for."""

    devices: int
    until: Instant | None


class FirmShelfPut(Body):
    """`until` null: until changed."""

    devices: Annotated[Whole, Field(ge=0, le=10_000_000)]
    until: Instant | None = None


class Pool(Shape):
    id: str
    site_id: str
    name: str
    device_kind: Literal["cpu", "gpu"]
    device_model: str
    memory_bytes_per_device: int
    head_room_percent: int
    scrub_seconds: int
    return_promise_seconds: int
    outbound: str
    sellable_devices: int
    free_devices: int
    first_party_devices: int
    sold_devices: int
    firm_shelf: FirmShelf
    excess: list[ExcessPoint]
    version: int
    """The book's generation."""


class FenceRow(Shape):
    """How strong one fence is, shown by which probe, and the way to more."""

    fence: str
    strength: Literal["enforced", "watched", "none"]
    by: str
    evidence: str
    remedy: str


class Node(Shape):
    id: str
    site_id: str
    pool_id: str
    name: str
    engine: str
    state: NodeState
    may_become: list[NodeState]
    fences: list[FenceRow]
    missing_for_strangers: list[str]
    """Fences that strangers need and that are not enforced here."""
    trusted_tenants: bool
    start_failures: int
    devices: int
    version: int


class CordonCreate(Body):
    """`drain`: also end what runs, each by its own notice. `break_notice` (with
    `immediate`): end it now; audited, and the penalty is posted at once."""

    mode: Literal["cordon", "drain", "immediate"] = "cordon"
    break_notice: Flag = False


class Device(Shape):
    id: str
    node_id: str
    pool_id: str
    name: str
    kind: Literal["cpu", "gpu"]
    healthy: bool
    use: str
    """down, overhead, first_party, sold_used, sold_unused, serving or idle."""
    holder: str | None
    """The claim's holder: a workload, for example."""
    claim_id: str | None
    organisation_id: str | None
    party: Literal["sale", "first_party"] | None
    rank: str | None
    free_by: Instant | None


class DeviceTime(Shape):
    """How device time divides over one stretch: whole milliseconds that sum exactly."""

    start: Instant
    end: Instant
    milliseconds_by_use: dict[str, int]
