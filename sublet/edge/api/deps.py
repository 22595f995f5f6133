"""What the API is given: the store, the engine, and the few settings that it shows or obeys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sublet.base.kernel.money import Money
from sublet.base.store import Store
from sublet.capacity.engines.port import Engine
from sublet.shops.models.keys import KeyEncryptionKey


def _nothing() -> None:
    return None


def _at_once(_after: datetime) -> bool:
    return True


def _no_lag() -> Mapping[str, float]:
    return {}


def _no_gateway() -> str | None:
    return None


def _no_key() -> KeyEncryptionKey | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Deps:
    """Made by the app for each process that answers the API."""

    store: Store
    engine: Engine
    version: str
    nudge: Callable[[], None] = _nothing
    """Called after a change: wakes the loops."""
    trial_credit: Money | None = None
    """Granted at sign-up; None: the default by the rate card."""
    trials_per_day: int = 20
    """So many sign-ups in 24 hours get trial credit; those after them get none."""
    trusted_tenants: bool = False
    currency: str = "USD"
    ssh_host: str | None = None
    ssh_port: int | None = None
    """Where the bastion listens; None: SSH is not offered."""
    gateway_url: Callable[[], str | None] = _no_gateway
    """Where models are called; None: nowhere now."""
    models_folder: Path | None = None
    """Where sealed weights are kept; None: none can be added."""
    sealing_key: Callable[[], KeyEncryptionKey | None] = _no_key
    """With which they are sealed; None: there is none now."""
    loop_lag_seconds: Callable[[], Mapping[str, float]] = _no_lag
    """How late each loop is, by name, for the metrics."""
    await_snapshot: Callable[[datetime], bool] = _at_once
    """Waits a moment until gateways are told what was committed by then; False: not yet."""
    body_seconds: float = 20.0
    """A request's body that is not here by then is given up."""
    follow_poll_seconds: float = 0.5
    follow_polls: int = 14_400
    """A follower of logs looks this many times and is then told to come again: two hours."""
