"""The schema: migrated equals declared, and a migration happens wholly or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from sublet.app.migrate import metadata, migrate
from sublet.base.store import bare_engine


def test_migrated_schema_equals_declared(tmp_path: Path) -> None:
    engine = bare_engine(f"sqlite:///{tmp_path}/sublet.db")
    migrate(engine)
    with engine.connect() as tx:
        assert compare_metadata(MigrationContext.configure(tx), metadata) == []
    engine.dispose()


def test_migrating_again_changes_nothing(tmp_path: Path) -> None:
    engine = bare_engine(f"sqlite:///{tmp_path}/sublet.db")
    migrate(engine)
    before = sa.inspect(engine).get_table_names()
    migrate(engine)
    assert sa.inspect(engine).get_table_names() == before
    engine.dispose()


@pytest.mark.parametrize("stop_at", [1, 2, 7, 20])
def test_an_interrupted_migration_leaves_nothing_behind(tmp_path: Path, stop_at: int) -> None:
    engine = bare_engine(f"sqlite:///{tmp_path}/sublet.db")
    created = 0

    def interrupt(_connection: Any, _cursor: Any, statement: str, *_rest: Any) -> None:
        nonlocal created
        if statement.strip().startswith("CREATE TABLE"):
            created += 1
            if created == stop_at:
                raise KeyboardInterrupt

    sa.event.listen(engine, "before_cursor_execute", interrupt)
    with pytest.raises(KeyboardInterrupt):
        migrate(engine)
    sa.event.remove(engine, "before_cursor_execute", interrupt)
    engine.dispose()
    again = bare_engine(f"sqlite:///{tmp_path}/sublet.db")
    assert sa.inspect(again).get_table_names() == []
    migrate(again)
    assert len(sa.inspect(again).get_table_names()) > 30
    again.dispose()
