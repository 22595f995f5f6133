"""The data folder: who may use it, what lies where, and the lock that keeps a second `up` out."""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sublet.base.kernel.errors import Conflict, Unavailable


class FolderInUse(Conflict):
    """Another `sublet up` runs on this data folder."""

    code = "data_folder_in_use"


class FolderUnusable(Unavailable):
    """The data folder cannot be used."""

    code = "data_folder_unusable"


@dataclass(frozen=True, slots=True)
class Folder:
    """Paths under one data folder. What lies in it is private to its user."""

    root: Path

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def engine(self) -> Path:
        return self.root / "engine"

    @property
    def bastion(self) -> Path:
        return self.root / "bastion"

    @property
    def gateway(self) -> Path:
        """The snapshot, the control socket, and a folder of spools for each gateway."""
        return self.root / "gateway"

    @property
    def models(self) -> Path:
        """Weights that were converted or sealed here."""
        return self.root / "models"

    @property
    def log(self) -> Path:
        return self.root / "sublet.log"

    @property
    def running(self) -> Path:
        """What `down` and `status` need of a running cloud: pid and addresses."""
        return self.root / "running.json"

    def make(self) -> None:
        """Create what is missing. Raises FolderUnusable in one sentence."""
        try:
            for path in (self.root, self.engine, self.bastion, self.gateway):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # The engine's homes are entered by tenants' own user ids; the folder itself stays shut.
            os.chmod(self.root, 0o711 if os.geteuid() == 0 else 0o700)
            probe = self.root / ".probe"
            probe.write_text("x")
            probe.unlink()
            keep_private(self.log)
        except OSError as error:
            raise FolderUnusable(
                f"The data folder {self.root} cannot be used ({error.strerror}): "
                "give another with --data, or make room and check its owner."
            ) from error

    def acquire(self) -> int:
        """Lock the folder for one `up`; children inherit the descriptor, so that the lock lasts
        as long as any of them lives. Raises FolderInUse."""
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(descriptor)
            pid = (self.read_running() or {}).get("pid", "?")
            raise FolderInUse(
                f"Another `sublet up` (process {pid}) runs on {self.root}: "
                f"stop it with `sublet down --data {self.root}`, or give another folder with --data."
            ) from None
        return descriptor

    def read_running(self) -> dict[str, Any] | None:
        try:
            found = json.loads(self.running.read_text())
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def write_running(self, facts: dict[str, Any]) -> None:
        write_private(self.running, json.dumps(facts))


def write_private(path: Path, text: str) -> None:
    """Replace a file atomically, readable by its user alone."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def keep_private(path: Path) -> None:
    """A file that only its user reads, made if it is not there.

    As root the folder itself can be passed through, so the modes of its files are what counts.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)
