"""Where the key lives that wraps the data keys of sealed models: never beside what it protects.

A file of mode 0600 outside the data folder, made on the first start, or one line of stdin. Who
steals the data folder, a backup of it or the database has ciphertext and wrapped keys. Who reads
as this user, or as root, has the key: docs/sealed.md.
Errors here close sealed models and nothing else: the cloud opens, and says the sentence.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sublet.base.kernel.errors import Unavailable

KEY_BYTES = 32
_MOST_TEXT = 4096


class KeyFileLost(Unavailable):
    """The key file is gone: sealed models stay closed until it is restored from its backup."""

    code = "key_file_lost"


class KeyFileUnsafe(Unavailable):
    """The key file can be read or changed by others, or lies beside what it protects."""

    code = "key_file_unsafe"


class KeyFileInvalid(Unavailable):
    """What should be the key is none: 64 hexadecimal digits are expected."""

    code = "key_file_invalid"


def locate(key_file: Path | None, installation_id: str, environment: Mapping[str, str]) -> Path:
    """The file of the setting `key_file`, else one named for the installation in the user's
    configuration folder."""
    if key_file is not None:
        return Path(os.path.abspath(key_file.expanduser()))
    configured = environment.get("XDG_CONFIG_HOME", "")
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".config"
    return base / "sublet" / f"{installation_id}.key"


def load(path: Path, *, data: Path, may_make: bool) -> bytes:
    """The key. `may_make`: nothing was ever wrapped, so a missing file is the first start.

    Raises KeyFileLost, KeyFileUnsafe, KeyFileInvalid: each says in one sentence what to do.
    """
    if path.resolve().is_relative_to(data.resolve()):
        raise KeyFileUnsafe(
            f"The key file {path} lies in the data folder, so whoever copies one has both: "
            "move it out and name it with the setting key_file. Sealed models stay closed until then."
        )
    try:
        return _read(path)
    except FileNotFoundError:
        if not may_make:
            raise KeyFileLost(
                f"The key file {path} is gone: sealed models stay closed until it is restored "
                "from its backup, or they are imported anew; all else works."
            ) from None
    except OSError as error:
        raise KeyFileUnsafe(
            f"The key file {path} cannot be read ({error.strerror}): sealed models stay closed."
        ) from error
    return _make(path)


def read_line(source: TextIO) -> bytes:
    """The key from one line, for `--key-stdin`. Raises KeyFileInvalid."""
    return _parse(source.readline(_MOST_TEXT), "the line on stdin")


def _read(path: Path) -> bytes:
    """Of the file that was opened, not of the name: nobody swaps it in between."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, encoding="utf-8", errors="replace") as file:
        seen = os.fstat(fd)
        mode = stat.S_IMODE(seen.st_mode)
        if not stat.S_ISREG(seen.st_mode):
            raise KeyFileUnsafe(f"The key file {path} is no plain file: sealed models stay closed.")
        if seen.st_uid != os.geteuid():
            raise KeyFileUnsafe(
                f"The key file {path} belongs to user {seen.st_uid}, not to {os.geteuid()}, who "
                f"runs Sublet: chown {os.geteuid()} {path}. Sealed models stay closed until then."
            )
        if mode & 0o077:
            raise KeyFileUnsafe(
                f"The key file {path} has mode {mode:04o}, so others may read it: "
                f"chmod 600 {path}. Sealed models stay closed until then."
            )
        return _parse(file.read(_MOST_TEXT), str(path))


def _parse(text: str, where: str) -> bytes:
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise KeyFileInvalid(
            f"{where} is no key (64 hexadecimal digits are expected): "
            "restore it from its backup. Sealed models stay closed until then."
        )
    return key


def _make(path: Path) -> bytes:
    """Written beside and linked: of two first starts one key wins, and both go by it."""
    key = AESGCM.generate_key(KEY_BYTES * 8)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w", encoding="utf-8") as file:
                os.fchmod(fd, 0o600)
                file.write(key.hex() + "\n")
                file.flush()
                os.fsync(fd)
            os.link(draft, path)
            _sync_folder(path.parent)
        except FileExistsError:
            return _read(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise KeyFileUnsafe(
            f"The key file {path} cannot be made ({error.strerror}): give another place with the "
            "setting key_file. Sealed models stay closed until then."
        ) from error
    return key


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
