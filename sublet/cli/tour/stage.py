"""What the tour stands on: its promises as they are measured, where it plays, how it ends early."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sublet.base.kernel.clock import read_boot_ns

if TYPE_CHECKING:
    from sublet.base.wire import rest
    from sublet.cli.tour.work import Visitor
    from sublet.sdk import Client

LOOK_SECONDS = 0.2


class CannotTour(Exception):
    """This cloud cannot be toured now: the text names the way."""


class StoryBroken(Exception):
    """A step did not come to its end."""


@dataclass(slots=True)
class Promise:
    step: str
    promised: str
    measured: str
    kept: bool


@dataclass(slots=True)
class Tour:
    """What is known along the way."""

    url: str
    owner: Client
    visitor: Visitor
    quiet: bool
    began_ns: int = field(default_factory=read_boot_ns)
    step: str = ""
    number: int = 0
    promises: list[Promise] = field(default_factory=list)

    def begin(self, title: str) -> None:
        self.step = title
        self.number += 1
        self.tell(f"\n{self.number:>2}  {title}")

    def tell(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)

    def note(self, text: str) -> None:
        self.tell(f"      {text}")

    def promise(self, promised: str, measured: str, kept: bool) -> None:
        """Say what is promised and what was measured."""
        self.promises.append(Promise(self.step, promised, measured, kept))
        self.tell(f"      promised  {promised}")
        self.tell(f"      measured  {measured}   {'✓' if kept else '✗ NOT KEPT'}")

    def seconds(self) -> float:
        return (read_boot_ns() - self.began_ns) / 1e9

    def wait(self, true: Callable[[], bool], what: str, seconds: float) -> float:
        """Wait until it is true; how long it took. Raises StoryBroken past the limit."""
        start, pause = read_boot_ns(), threading.Event()
        while not true():
            taken = (read_boot_ns() - start) / 1e9
            if taken > seconds:
                raise StoryBroken(f"{what} did not come within {seconds:.0f} s")
            pause.wait(LOOK_SECONDS)
        return (read_boot_ns() - start) / 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Where it plays."""

    pool: rest.Pool
    spot: rest.Offer
    on_demand: rest.Offer | None
    notice_seconds: int
    trusted: bool

    @property
    def together(self) -> bool:
        """Instance and job at once; with one device, one after the other."""
        return self.pool.free_devices >= 2
