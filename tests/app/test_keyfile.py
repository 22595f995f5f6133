"""Where the wrapping key lives: made once, private or refused, and its loss closes little."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from sublet.app import keyfile
from sublet.app.keyfile import KeyFileInvalid, KeyFileLost, KeyFileUnsafe


@pytest.fixture
def data(tmp_path: Path) -> Path:
    made = tmp_path / "data"
    made.mkdir()
    return made


def test_it_is_named_for_the_installation_in_the_users_own_folder(tmp_path: Path) -> None:
    environment = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    found = keyfile.locate(None, "cloud_1", environment)
    assert found == tmp_path / "config" / "sublet" / "cloud_1.key"
    assert keyfile.locate(None, "cloud_1", {}) == Path.home() / ".config/sublet/cloud_1.key"
    relative = {"XDG_CONFIG_HOME": "here"}
    assert keyfile.locate(None, "cloud_1", relative) == Path.home() / ".config/sublet/cloud_1.key"
    assert keyfile.locate(tmp_path / "k", "cloud_1", environment) == tmp_path / "k"


def test_the_first_start_makes_it_and_later_ones_read_it(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "config" / "sublet" / "cloud_1.key"
    first = keyfile.load(path, data=data, may_make=True)
    assert len(first) == 32
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert list(path.parent.iterdir()) == [path]
    assert keyfile.load(path, data=data, may_make=False) == first
    assert keyfile.load(path, data=data, may_make=True) == first
    other = keyfile.load(tmp_path / "other.key", data=data, may_make=True)
    assert other != first


def test_of_two_first_starts_one_key_wins(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cloud_1.key"
    won = keyfile.load(path, data=data, may_make=True)
    # The second looked before the first had made it.
    assert keyfile._make(path) == won
    assert list(tmp_path.glob(".*")) == []


def test_a_lost_key_is_one_clear_line_and_is_not_made_anew(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "cloud_1.key"
    with pytest.raises(KeyFileLost) as lost:
        keyfile.load(path, data=data, may_make=False)
    assert not path.exists()
    for words in (str(path), "is gone", "sealed models stay closed", "all else works"):
        assert words in lost.value.message
    assert "\n" not in lost.value.message


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o666, 0o700 | 0o010])
def test_a_file_that_others_may_touch_is_refused(tmp_path: Path, data: Path, mode: int) -> None:
    path = tmp_path / "cloud_1.key"
    keyfile.load(path, data=data, may_make=True)
    path.chmod(mode)
    with pytest.raises(KeyFileUnsafe, match=f"mode 0{mode:o}.*chmod 600"):
        keyfile.load(path, data=data, may_make=False)


@pytest.mark.root
def test_a_file_of_somebody_else_is_refused(tmp_path: Path, data: Path) -> None:
    path = tmp_path / "cloud_1.key"
    keyfile.load(path, data=data, may_make=True)
    os.chown(path, 54_321, 54_321)
    with pytest.raises(KeyFileUnsafe, match="belongs to user 54321"):
        keyfile.load(path, data=data, may_make=False)


def test_links_and_pipes_are_not_followed(tmp_path: Path, data: Path) -> None:
    keyfile.load(tmp_path / "real.key", data=data, may_make=True)
    (tmp_path / "link.key").symlink_to(tmp_path / "real.key")
    os.mkfifo(tmp_path / "pipe.key", 0o600)
    for name in ("link.key", "pipe.key"):
        with pytest.raises(KeyFileUnsafe):
            keyfile.load(tmp_path / name, data=data, may_make=True)


def test_a_key_beside_what_it_protects_is_refused(tmp_path: Path, data: Path) -> None:
    (tmp_path / "way").symlink_to(data)
    for path in (data / "cloud_1.key", tmp_path / "way" / "deep" / "cloud_1.key"):
        with pytest.raises(KeyFileUnsafe, match="lies in the data folder"):
            keyfile.load(path, data=data, may_make=True)
    assert list(data.iterdir()) == []


@pytest.mark.parametrize("text", ["", "\n", "00" * 31, "00" * 33, "zz" * 32, "00" * 32 + "x"])
def test_what_is_no_key_is_refused(tmp_path: Path, data: Path, text: str) -> None:
    path = tmp_path / "cloud_1.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(KeyFileInvalid, match="64 hexadecimal digits"):
        keyfile.load(path, data=data, may_make=True)
    with pytest.raises(KeyFileInvalid, match="stdin"):
        keyfile.read_line(io.StringIO(text))
    assert path.read_text() == text, "it may be a damaged key: it is not written over"


def test_a_key_comes_by_stdin(tmp_path: Path) -> None:
    assert keyfile.read_line(io.StringIO("0f" * 32 + "\nmore\n")) == b"\x0f" * 32


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, data: Path) -> None:
    (tmp_path / "config").write_text("a file")
    with pytest.raises(KeyFileUnsafe, match="Not a directory"):
        keyfile.load(tmp_path / "config" / "cloud_1.key", data=data, may_make=True)
