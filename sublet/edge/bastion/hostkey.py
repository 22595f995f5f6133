"""The host key: made once, kept for good, so that a client can trust what it has seen."""

from __future__ import annotations

import os
from pathlib import Path

import asyncssh

NAME = "ssh_host_ed25519_key"


def load(folder: Path) -> asyncssh.SSHKey:
    """The key of this installation (file of mode 0600 in `folder`), made on the first call.

    Raises OSError where the folder cannot be written, asyncssh.KeyImportError where the file is
    no key: neither is mended silently, since a new key would make every client distrust the host.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / NAME
    if not path.exists():
        _make(path)
    path.chmod(0o600)
    return asyncssh.import_private_key(path.read_bytes())


def _make(path: Path) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519", comment="sublet")
    mine = path.with_name(f"{NAME}.{os.getpid()}")
    fd = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(key.export_private_key())
        file.flush()
        os.fsync(file.fileno())
    try:
        # A link never replaces: of two first starts one key wins, and both serve that one.
        os.link(mine, path)
    except FileExistsError:
        pass
    finally:
        mine.unlink()


def public_line(folder: Path) -> str:
    """`ssh-ed25519 AAAA…`: what a client keeps in its known hosts, without the host's name."""
    words = load(folder).export_public_key().decode("ascii").split()
    return " ".join(words[:2])
