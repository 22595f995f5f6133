"""Which cloud, with which key: the environment first, then a saved profile."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from sublet.cli.errors import CliError


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    url: str
    key: str | None


def folder() -> Path:
    """`$XDG_CONFIG_HOME/sublet`, private to its user."""
    home = os.environ.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(home) / "sublet"


def load() -> Profile:
    """The cloud to talk to. Raises CliError where nothing names one."""
    saved = _saved()
    url = os.environ.get("SUBLET_URL") or (saved.url if saved else None)
    key = os.environ.get("SUBLET_KEY") or None
    if key is None and saved and url == saved.url:
        # A saved key is for its own cloud: it is not sent to another address.
        key = saved.key
    if not url:
        raise CliError(
            "no cloud is named: set SUBLET_URL and SUBLET_KEY, "
            "or open one on this machine with `sublet up`."
        )
    return Profile(url=url, key=key)


def save(profile: Profile) -> Path:
    """Keep it (mode 0600) for the commands that follow. Replaces what was kept."""
    path = folder() / "profile.json"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    passing = path.with_name(f".profile.{os.getpid()}")
    fd = os.open(passing, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(fd, "w") as file:
        json.dump({"url": profile.url, "key": profile.key}, file)
    os.replace(passing, path)
    return path


def save_owner(url: str, key: str) -> bool:
    """Keep a new cloud's owner key, unless a profile of another cloud is kept already."""
    saved = _saved()
    if saved is not None and saved.url != url:
        return False
    save(Profile(url=url, key=key))
    return True


def _saved() -> Profile | None:
    path = folder() / "profile.json"
    try:
        found = json.loads(path.read_text())
        return Profile(url=str(found["url"]), key=found["key"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CliError(f"{path} cannot be read ({error}): delete it, or set SUBLET_URL.") from None
