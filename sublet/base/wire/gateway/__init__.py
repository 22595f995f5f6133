"""What a gateway and the control plane say to each other: five messages and no more.

    down   Snapshot (whole, numbered, a file)   Allowance (a slice of credit, for one key)
    up     UsageEvent (a line of the spool)     Gauge (once a second)    AllowanceRequest

Owns     the five messages, their JSON, the spool's line, the way from an engine's counters to ours.
Always   a message that cannot be read is refused whole; instants are UTC microseconds (int); money
         is integer micros, prices are micros per million tokens; no floats.
Callers  gateway on one side; shops.models, records.metering, money.billing and app on the other.
"""

from sublet.base.wire.gateway.messages import (
    PER_TOKENS,
    Allowance,
    AllowanceRequest,
    Gauge,
    KeyPolicy,
    Malformed,
    ModelRoute,
    Outcome,
    Price,
    ReplicaRoute,
    ScopeLimits,
    Snapshot,
    UsageEvent,
    read_snapshot,
    write_snapshot,
)
from sublet.base.wire.gateway.spool import SpoolReader, frame, read_frames
from sublet.base.wire.gateway.usage import Counts, normalise

__all__ = [
    "PER_TOKENS",
    "Allowance",
    "AllowanceRequest",
    "Counts",
    "Gauge",
    "KeyPolicy",
    "Malformed",
    "ModelRoute",
    "Outcome",
    "Price",
    "ReplicaRoute",
    "ScopeLimits",
    "Snapshot",
    "SpoolReader",
    "UsageEvent",
    "frame",
    "normalise",
    "read_frames",
    "read_snapshot",
    "write_snapshot",
]
