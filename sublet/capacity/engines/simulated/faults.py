"""Troubles that a simulated node can have, and plans of them that repeat with their seed: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol


class Rng(Protocol):
    """Where chance comes from: `kernel.ids.seeded_rng`."""

    def random(self) -> float: ...

    def randrange(self, stop: int, /) -> int: ...


class FaultKind(StrEnum):
    START_FAILS = "start_fails"
    """The next start on the node is accepted and fails before it runs."""
    START_UNREACHABLE = "start_unreachable"
    """The next start on the node is answered with an error, and nothing runs."""
    START_ANSWER_LOST = "start_answer_lost"
    """The next start on the node is answered with an error, and it runs all the same."""
    SILENCE = "silence"
    """The node gives no evidence and takes no orders for a while; what runs there goes on."""
    DEVICE_LOST = "device_lost"
    """A device is missing from the inventory for a while."""
    DIRTY = "dirty"
    """A device cannot be scrubbed clean for a while."""
    REBOOT = "reboot"
    """Everything on the node ends unseen; its last evidence is from just before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`target` is a node's name, for DEVICE_LOST and DIRTY a device's."""

    at: datetime
    kind: FaultKind
    target: str
    seconds: float = 0.0


def seeded_faults(
    rng: Rng,
    *,
    nodes: Mapping[str, Sequence[str]],
    start: datetime,
    end: datetime,
    per_node_day: float = 1.0,
    kinds: Sequence[FaultKind] = tuple(FaultKind),
    longest_seconds: float = 900.0,
) -> tuple[Fault, ...]:
    """Faults scattered over `[start, end)`, in order of time; the same seed gives the same ones."""
    names = sorted(nodes)
    days = (end - start) / timedelta(days=1)
    count = round(per_node_day * days * len(names))
    found = []
    for _ in range(count):
        kind = kinds[rng.randrange(len(kinds))]
        node = names[rng.randrange(len(names))]
        on_device = kind in (FaultKind.DEVICE_LOST, FaultKind.DIRTY)
        found.append(
            Fault(
                at=start + (end - start) * rng.random(),
                kind=kind,
                target=nodes[node][rng.randrange(len(nodes[node]))] if on_device else node,
                seconds=longest_seconds * rng.random(),
            )
        )
    return tuple(sorted(found, key=lambda fault: (fault.at, fault.target, fault.kind)))
