"""What lies in a data folder is for its user's eyes: keys' digests, addresses, environments."""

from __future__ import annotations

import stat
from pathlib import Path

from sublet.app import first
from sublet.app.folder import Folder
from sublet.app.settings import read_settings


def test_database_and_log_are_private_from_their_first_byte(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data")
    folder.make()
    store, _ = first._open_store(read_settings({"data": folder.root}))
    with store.read():
        found = {path.name: path.stat() for path in folder.root.iterdir() if path.is_file()}
    store.close()
    assert {"sublet.db", "sublet.log"} <= set(found)
    assert {name: oct(stat.S_IMODE(f.st_mode)) for name, f in found.items()} == dict.fromkeys(
        found, "0o600"
    )


def test_files_that_were_open_to_others_are_closed(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "data")
    folder.make()
    folder.log.chmod(0o644)
    folder.make()
    assert stat.S_IMODE(folder.log.stat().st_mode) == 0o600
