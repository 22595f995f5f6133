"""How many replicas a deployment should have. Pure.

    wanted = ⌈(running + waiting) ÷ target⌉, between the minimum and the maximum

Up at once, since somebody waits; down only when fewer would have done for half a minute, so that a
pause between two requests costs no start. Down to none when nobody has asked for `idle_seconds`.

What the n-th replica is worth decides nothing by itself: filler is the lowest rank, so whoever pays
more displaces it, with its drain as notice; an idle device earns nothing else meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sublet.shops.models.model import (
    Deployment,
    DeploymentState,
    Model,
    Replica,
    ReplicaState,
    TierPrice,
)

CALM = timedelta(seconds=30)
NO_ROOM = timedelta(seconds=2)
"""Until devices are asked for again, where there were none."""
BACK_OFF = (2, 5, 15, 30, 60)
"""Seconds until another start is tried, by how many failed in a row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What gateways say of a deployment's model now."""

    running: int
    waiting: int

    @property
    def total(self) -> int:
        return self.running + self.waiting


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """The decision, and what it is remembered by."""

    wanted: int
    lower_since: datetime | None
    last_asked_at: datetime


def decide(deployment: Deployment, load: Load, *, now: datetime) -> Scaled:
    """How many replicas should there be now, given how many were wanted before."""
    asked_at = now if load.total else deployment.last_asked_at
    if deployment.state is not DeploymentState.ACTIVE:
        return Scaled(wanted=0, lower_since=None, last_asked_at=asked_at)
    least, most = deployment.min_replicas, deployment.max_replicas
    needed = -(-load.total // deployment.target)
    is_idle = now - asked_at >= timedelta(seconds=deployment.idle_seconds)
    floor = least if is_idle else max(least, min(1, deployment.wanted))
    aim = min(max(needed, floor), most)
    before = min(max(deployment.wanted, least), most)
    if aim >= before:
        return Scaled(wanted=aim, lower_since=None, last_asked_at=asked_at)
    since = deployment.lower_since or now
    if now - since < CALM and not is_idle:
        return Scaled(wanted=before, lower_since=since, last_asked_at=asked_at)
    return Scaled(wanted=aim, lower_since=None, last_asked_at=asked_at)


def surplus(staying: Sequence[Replica], wanted: int, least: int) -> list[Replica]:
    """Who leaves, where fewer are wanted than stay: filler first, and of those who do not serve yet
    the newest first.

    None leaves that serves while what would stay serves no `wanted` of itself: who is to take its
    place is there first. Of firm ones `least` stay, while that many are wanted.
    """
    order = sorted(
        staying,
        key=lambda one: (
            one.is_filler,
            one.state is not ReplicaState.READY,
            one.created_at,
            one.id,
        ),
        reverse=True,
    )
    serving = sum(one.state is ReplicaState.READY for one in staying)
    firm = sum(not one.is_filler for one in staying)
    leaving: list[Replica] = []
    for one in order:
        serves = one.state is ReplicaState.READY
        if len(staying) - len(leaving) <= wanted:
            break
        if serves and serving <= wanted:
            continue
        if not one.is_filler and firm <= min(least, wanted):
            continue
        serving -= serves
        firm -= not one.is_filler
        leaving.append(one)
    return leaving


def next_is_filler(staying: Sequence[Replica], wanted: int, deployment: Deployment) -> bool | None:
    """Whether another replica is to be rented, and as which: filler, or firm. None: no other.

    A minimum that was raised is met by firm ones, which then take the place of filler.
    """
    firm = sum(not one.is_filler for one in staying)
    lacks_firm = firm < min(deployment.min_replicas, wanted)
    if len(staying) >= deployment.max_replicas or not (len(staying) < wanted or lacks_firm):
        return None
    return not lacks_firm


def blocks_firm(staying: Sequence[Replica], wanted: int, deployment: Deployment) -> Replica | None:
    """The filler that has to leave before a firm one may come, since the maximum is reached."""
    firm = sum(not one.is_filler for one in staying)
    filler = [one for one in staying if one.is_filler]
    if firm >= min(deployment.min_replicas, wanted) or len(staying) < deployment.max_replicas:
        return None
    return max(filler, key=lambda one: (one.created_at, one.id), default=None)


def retry_after(failures: int) -> timedelta:
    """After so many failed starts in a row."""
    return timedelta(seconds=BACK_OFF[min(max(failures, 1), len(BACK_OFF)) - 1])


def worth_micros(model: Model, price: TierPrice | None, expected_permille: int) -> int:
    """A device-hour of the n-th replica, in micros: what one makes when busy × price × how busy this
    one would be. 0 while nobody has measured it, or it is not for sale.

    An embedding model is measured, and paid, by its input.
    """
    if price is None:
        return 0
    micros = price.input_micros if model.kind == "embed" else price.output_micros
    return model.tokens_per_device_hour * micros * expected_permille // (1_000_000 * 1000)


def expected_permille(load: Load, target: int, number: int) -> int:
    """How busy the n-th replica will be, by what is asked now: the share of its target that those
    before it leave."""
    return min(max((load.total - (number - 1) * target) * 1000 // target, 0), 1000)
