"""Puts the parts together: one `App` a process, on the real machine or in a rehearsal."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, cast

import structlog

from sublet.app.clockwork import anchored
from sublet.app.folder import Folder
from sublet.app.runner import Nudger
from sublet.app.settings import Settings
from sublet.base.kernel.clock import Clock
from sublet.base.kernel.ids import Ids, SystemIds
from sublet.base.kernel.money import Money
from sublet.base.store import Store, bare_engine, open_store
from sublet.base.store.installation import find_fact
from sublet.capacity.engines.local import LocalEngine
from sublet.capacity.engines.port import Engine


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """What a process of this installation needs."""

    settings: Settings
    folder: Folder
    clock: Clock
    ids: Ids
    store: Store
    engine: Engine
    installation_id: str
    nudger: Nudger | None = None
    """Tells the installation's runners of what this process commits."""

    def close(self) -> None:
        self.store.close()
        if self.nudger is not None:
            self.nudger.close()


def open_app(settings: Settings) -> App:
    """An App on this machine. The database must be migrated already."""
    folder = Folder(settings.data.resolve())
    bare = bare_engine(settings.database)
    try:
        clock = anchored(bare)
    finally:
        bare.dispose()
    ids = SystemIds()
    store = open_store(settings.database, clock, ids)
    with store.read() as tx:
        installation_id = find_fact(tx, "installation_id") or ""
    nudger = Nudger(installation_id) if installation_id else None
    store.on_commit = nudger
    return App(
        settings=settings,
        folder=folder,
        clock=clock,
        ids=ids,
        store=store,
        engine=local_engine(settings, folder, clock),
        installation_id=installation_id,
        nudger=nudger,
    )


def local_engine(settings: Settings, folder: Folder, clock: Clock) -> LocalEngine:
    return LocalEngine(
        folder.engine,
        clock,
        trusted=settings.trusted_tenants,
        disk_reserve_bytes=settings.disk_reserve_mb << 20,
    )


def trial_credit(settings: Settings) -> Money | None:
    """The sign-up credit that the settings name; None: the default by the rate card."""
    if settings.trial_credit is None:
        return None
    return Money.parse(settings.trial_credit, settings.currency)


LOG_BYTES = 20_000_000
LOGS_KEPT = 5


def rotate_log(path: Path) -> None:
    """Set a log that has grown large aside: `sublet.log.1` is the newest of five.

    For the parent alone, before its children start: they hold the file open, and would go on
    writing into the one that was set aside.
    """
    if not path.exists() or path.stat().st_size < LOG_BYTES:
        return
    for number in range(LOGS_KEPT - 1, 0, -1):
        older = path.with_name(f"{path.name}.{number}")
        if older.exists():
            older.replace(path.with_name(f"{path.name}.{number + 1}"))
    path.replace(path.with_name(f"{path.name}.1"))


class _Forward(logging.Handler):
    """What libraries log, as lines of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        structlog.get_logger().log(
            record.levelno,
            "library_said",
            library=record.name,
            said=record.getMessage(),
            exc_info=record.exc_info,
        )


class _LogFile:
    """Lines to a file, whole; on a full disk they are lost and counted. Nobody's work may end for
    what he says of it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(
            path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600
        )
        self._lost = 0

    def write(self, text: str) -> None:
        if self._lost:
            told = f'{{"event": "log_lines_lost", "count": {self._lost}, "level": "error"}}\n'
            text = told + text
        try:
            os.write(self._descriptor, text.encode(errors="replace"))
        except OSError:
            self._lost += 1
        else:
            self._lost = 0

    def flush(self) -> None:
        """Every line was written already."""


def log_to(path: Path, level: str, process: str) -> None:
    """Structured lines, one JSON object each, appended to the log of this installation."""
    file = _LogFile(path)
    logging.basicConfig(handlers=[_Forward()], level=logging.WARNING, force=True)
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.WriteLoggerFactory(file=cast(TextIO, file)),
    )
    structlog.contextvars.bind_contextvars(process=process)
