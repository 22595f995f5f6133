"""Identifiers and secrets. The only place (with `clock`) that makes chance."""

from __future__ import annotations

import base64
import random
import secrets
from typing import Protocol


class Ids(Protocol):
    """Makes new identifiers: `prefix_` and 16 characters, 80 bits of chance."""

    def new(self, prefix: str) -> str: ...

    def secret(self, prefix: str) -> str:
        """A secret to show once: `prefix_` and 32 characters, 160 bits of chance."""
        ...


def _text(raw: bytes) -> str:
    return base64.b32encode(raw).decode("ascii").lower().rstrip("=")


class SystemIds:
    """Identifiers from the operating system's generator."""

    def new(self, prefix: str) -> str:
        return f"{prefix}_{_text(secrets.token_bytes(10))}"

    def secret(self, prefix: str) -> str:
        return f"{prefix}_{_text(secrets.token_bytes(20))}"


class SeededIds:
    """Identifiers that repeat with their seed: for the rehearsal and for tests."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)

    def new(self, prefix: str) -> str:
        return f"{prefix}_{_text(self._rng.randbytes(10))}"

    def secret(self, prefix: str) -> str:
        return f"{prefix}_{_text(self._rng.randbytes(20))}"


def seeded_rng(seed: int) -> random.Random:
    """Chance that repeats: what simulations and fault plans draw from."""
    return random.Random(seed)
