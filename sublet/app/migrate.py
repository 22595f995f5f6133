"""Brings a database to this release's schema. Every table must be imported here."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from sublet.base.kernel.errors import Unavailable
from sublet.base.store import installation, metadata, outbox
from sublet.capacity.allocation import store as allocation_store
from sublet.capacity.fleet import store as fleet_store
from sublet.money.billing import store as billing_store
from sublet.money.billing import token_store as billing_token_store
from sublet.records.ledger import store as ledger_store
from sublet.records.metering import store as metering_store
from sublet.records.metering import token_store as metering_token_store
from sublet.records.tenancy import store as tenancy_store
from sublet.rights.market import store as market_store
from sublet.rights.owner import store as owner_store
from sublet.shops.compute import store as compute_store
from sublet.shops.models import keys as models_keys
from sublet.shops.models import store as models_store

TABLES = (
    installation,
    outbox,
    tenancy_store,
    ledger_store,
    metering_store,
    metering_token_store,
    fleet_store,
    allocation_store,
    market_store,
    owner_store,
    compute_store,
    models_store,
    models_keys,
    billing_store,
    billing_token_store,
)


class DatabaseTooNew(Unavailable):
    """The database was written by a newer Sublet: start that release, or restore a backup."""

    code = "database_too_new"


class DatabaseUnreadable(Unavailable):
    """The database cannot be read."""

    code = "database_unreadable"


def alembic_config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config


def migrate(engine: sa.Engine) -> None:
    """Upgrade to the newest schema, in one transaction: wholly or not at all.

    `engine` is a `bare_engine`. Raises DatabaseTooNew, DatabaseUnreadable; changes nothing then.
    """
    config = alembic_config()
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    try:
        with engine.begin() as tx:
            current = MigrationContext.configure(tx).get_current_revision()
            if current is not None and current not in known:
                raise DatabaseTooNew
            config.attributes["connection"] = tx
            command.upgrade(config, "head")
    except sa.exc.DatabaseError as error:
        raise DatabaseUnreadable(
            f"The database {engine.url.render_as_string()} cannot be read ({error.orig}): "
            "restore it from a copy, or give another folder with --data. Nothing was changed."
        ) from error


__all__ = ["TABLES", "DatabaseTooNew", "DatabaseUnreadable", "metadata", "migrate"]
