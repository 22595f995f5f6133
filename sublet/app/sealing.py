"""Who holds the key that seals models: the parent for the catalogue's start, the loops to unseal.

From its file it is read anew each time, so that one which was restored is found without a restart;
from stdin it lives in memory, and reaches a child by a pipe. Without it sealed models stay closed,
and nothing else does. A process that holds it leaves no core file: the key would lie in that.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import structlog

from sublet.app import keyfile
from sublet.app.settings import Settings
from sublet.app.wiring import App
from sublet.base.kernel.errors import SubletError
from sublet.base.store import Store
from sublet.base.store.installation import find_fact
from sublet.shops.models import keys
from sublet.shops.models.keys import KeyEncryptionKey

log = structlog.get_logger()

KeyOf = Callable[[], KeyEncryptionKey | None]


def key_at_start(
    settings: Settings, store: Store, given: bytes | None, say: Callable[[str], None]
) -> KeyEncryptionKey | None:
    """The key, made if nothing was ever sealed; None with a sentence where it cannot be had."""
    _leave_no_core()
    if given is not None:
        return KeyEncryptionKey(given)
    with store.read() as tx:
        may_make = not keys.has_keys(tx)
    try:
        secret = keyfile.load(_path(settings, store), data=settings.data, may_make=may_make)
    except SubletError as error:
        say(f"  {error.message}")
        return None
    return KeyEncryptionKey(secret)


def key_of_child(app: App, key_fd: int | None) -> KeyOf:
    """What the loops ask when a sealed model starts."""
    _leave_no_core()
    if key_fd is not None:
        with os.fdopen(key_fd, "rb") as pipe:
            given = KeyEncryptionKey(pipe.read())
        return lambda: given
    path = _path(app.settings, app.store)

    def read() -> KeyEncryptionKey | None:
        try:
            return KeyEncryptionKey(keyfile.load(path, data=app.settings.data, may_make=False))
        except SubletError as error:
            log.warning("sealing_key_missing", why=error.message)
            return None

    return read


def _leave_no_core() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, most))


def _path(settings: Settings, store: Store) -> Path:
    with store.read() as tx:
        installation_id = find_fact(tx, "installation_id") or ""
    return keyfile.locate(settings.key_file, installation_id, os.environ)
