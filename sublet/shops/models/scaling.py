"""How many replicas a deployment should have. Pure.

    wanted = ⌈(running + waiting) ÷ target⌉, between the minimum and the maximum

Up at once, since somebody waits; down only when fewer would have done for half a minute, so that a
pause between two requests costs no start. Down to none when nobody has asked for `idle_seconds`.

What the n-th replica is worth decides nothing by itself: filler is the lowest rank, so whoever pays
more displaces it, with its drain as notice; an idle device earns nothing else meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sublet.shops.models.model import Deployment, DeploymentState

CALM = timedelta(seconds=30)
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


def retry_after(failures: int) -> timedelta:
    """After so many failed starts in a row."""
    return timedelta(seconds=BACK_OFF[min(max(failures, 1), len(BACK_OFF)) - 1])


def worth_micros(
    tokens_per_device_hour: int, output_micros: int, expected_share_permille: int
) -> int:
    """A device-hour of the n-th replica: what it makes when busy × price × how busy it will be."""
    return tokens_per_device_hour * output_micros // 1_000_000 * expected_share_permille // 1000


def expected_permille(load: Load, target: int, number: int) -> int:
    """How busy the n-th replica will be, by what is asked now: the share of its target that those
    before it leave."""
    return min(max((load.total - (number - 1) * target) * 1000 // target, 0), 1000)
