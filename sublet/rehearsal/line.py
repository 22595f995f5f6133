"""The line between the control plane and its engine, and where it can be cut.

The engine outlives the control plane. A cut just after a call is the worst moment: the metal has
acted and nobody has written it down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from sublet.capacity.engines.port import Engine, Inventory
from sublet.capacity.engines.simulated import SimulatedEngine

Side = Literal["before", "after"]


class ControlPlaneDied(BaseException):
    """Nothing in the control plane may catch this, as nothing catches a kill."""


class Line:
    """Passes calls on to the engine until it is told to cut one."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self._engine = engine
        self._cuts: list[tuple[str, Side]] = []
        self.engine = cast(Engine, _Wire(engine, self._passing))

    def cut(self, call: str, side: Side = "after") -> None:
        """The control plane dies at the next such call (`*`: any but looking), on that side of it."""
        self._cuts.append((call, side))

    def inventories(self) -> Sequence[Inventory]:
        return self._engine.inventories()

    def _passing(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        cut = next((c for c in self._cuts if _cuts(c[0], name)), None)
        if cut is not None:
            self._cuts.remove(cut)
            if cut[1] == "after":
                call(*args, **kwargs)
            raise ControlPlaneDied(f"{cut[1]} {name}")
        return call(*args, **kwargs)


def _cuts(wanted: str, name: str) -> bool:
    return wanted == name or (wanted == "*" and name != "observe")


class _Wire:
    def __init__(self, engine: SimulatedEngine, passing: Callable[..., Any]) -> None:
        self._engine = engine
        self._passing = passing

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._engine, name)
        if not callable(found):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._passing(name, found, *args, **kwargs)

        return call
