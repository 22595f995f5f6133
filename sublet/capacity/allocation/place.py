"""Which devices: units on nodes, as a pure choice.

Where there is one node it is a fraction node and its whole-node shape is all its devices. Sizes 1,
2, 4 and 8 prefer aligned places (device i of a block of n begins at a multiple of n); any free
devices of one node do where no aligned place is left, for what was admitted is placed. Claims that
can leave together live together; then the fullest node that fits, so that empty nodes stay whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

Rung = tuple[int, int]
FIRST_PARTY_RUNG: Rung = (-1, 0)
"""The owner's own work leaves at once, and lives together too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One sellable device of a node. `rung` is its holder's; None: free."""

    device_id: str
    rung: Rung | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeView:
    """A node's sellable devices in their order. `is_whole`: none of its devices is missing."""

    node_id: str
    slots: tuple[Slot, ...]
    is_whole: bool = True
    free: int = field(init=False, repr=False, compare=False)
    is_untouched: bool = field(init=False, repr=False, compare=False)
    """Whole and empty. Found once, as `free` is: every choice asks every node."""

    def __post_init__(self) -> None:
        free = sum(slot.rung is None for slot in self.slots)
        object.__setattr__(self, "free", free)
        object.__setattr__(self, "is_untouched", self.is_whole and free == len(self.slots))


def choose_devices(
    nodes: Sequence[NodeView],
    *,
    devices: int,
    count: int,
    rung: Rung,
    whole_node: bool,
    kept_empty: int = 0,
) -> tuple[str, ...] | None:
    """Devices for `count` units of `devices`, each unit on one node; None if they are not free.

    `kept_empty`: whole nodes that are promised to claims not bound yet, and not broken for this.
    """
    if whole_node and len(nodes) > 1:
        return _whole_nodes(nodes, count)
    views = {node.node_id: node for node in nodes}
    spare = sum(node.is_untouched for node in nodes) - kept_empty
    found: list[str] = []
    for _ in range(count):
        fitting = [
            node
            for node in views.values()
            if node.free >= devices and (len(nodes) == 1 or spare > 0 or not node.is_untouched)
        ]
        if not fitting:
            return None
        node = _preferred(fitting, devices, rung)
        if node.is_untouched:
            spare -= 1
        unit = _unit(node, devices)
        found.extend(unit)
        views[node.node_id] = replace(
            node,
            slots=tuple(
                replace(slot, rung=rung) if slot.device_id in unit else slot for slot in node.slots
            ),
        )
    return tuple(found)


def _whole_nodes(nodes: Sequence[NodeView], count: int) -> tuple[str, ...] | None:
    empty = sorted((n for n in nodes if n.is_untouched), key=lambda n: n.node_id)
    if len(empty) < count:
        return None
    return tuple(slot.device_id for node in empty[:count] for slot in node.slots)


def _preferred(fitting: Sequence[NodeView], devices: int, rung: Rung) -> NodeView:
    """Nodes begun before empty ones, aligned, its own rung, then the fullest.

    Empty ones are as good as each other, and there may be many: nothing else is asked of them.
    """
    begun = [node for node in fitting if not node.is_untouched]
    if not begun:
        return min(fitting, key=lambda node: (node.free, node.node_id))
    return min(begun, key=lambda node: _preference(node, devices, rung))


def _preference(node: NodeView, devices: int, rung: Rung) -> tuple[bool, bool, int, str]:
    """Least first."""
    is_alone = all(slot.rung != rung for slot in node.slots)
    return _aligned(node, devices) is None, is_alone, node.free, node.node_id


def _aligned(node: NodeView, devices: int) -> int | None:
    """Where an aligned block begins whose neighbourhood is already the fullest; None if none."""
    if devices not in (1, 2, 4, 8):
        return None
    free = [slot.rung is None for slot in node.slots]
    begins = [
        at for at in range(0, len(free) - devices + 1, devices) if all(free[at : at + devices])
    ]
    if not begins:
        return None

    def neighbourhood(at: int) -> tuple[int, ...]:
        around = []
        block = devices * 2
        while block <= 8:
            start = at // block * block
            around.append(sum(free[start : start + block]))
            block *= 2
        return (*around, at)

    return min(begins, key=neighbourhood)


def _unit(node: NodeView, devices: int) -> tuple[str, ...]:
    begin = _aligned(node, devices)
    if begin is not None:
        return tuple(slot.device_id for slot in node.slots[begin : begin + devices])
    return tuple(slot.device_id for slot in node.slots if slot.rung is None)[:devices]
