"""Data keys at rest and on their way out: wrapped in the table, written down before they leave."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublet.base.kernel.clock import VirtualClock
from sublet.base.kernel.errors import SubletError
from sublet.base.kernel.ids import SeededIds
from sublet.base.store import Actor, Store, metadata, open_store
from sublet.records import tenancy
from sublet.shops.models import keys, sealing

START = datetime(2026, 11, 2, 12, tzinfo=UTC)
SYSTEM = Actor.system("models")
KEK = keys.KeyEncryptionKey(bytes(range(32)))
OTHER = keys.KeyEncryptionKey(bytes(range(1, 33)))
DATA_KEY = bytes(range(100, 132))
PEER = keys.Peer(pid=4711, uid=200_003)
PLAIN = b"GGUF" + bytes(range(256)) * 5000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = open_store(f"sqlite:///{tmp_path}/books.db", VirtualClock(START), SeededIds(1))
    metadata.create_all(made.engine)
    yield made
    made.close()


def asked(**fields: Any) -> keys.Asked:
    values: dict[str, Any] = {
        "replica_id": "rep_1",
        "model": "muse-tiny",
        "node_id": "node_1",
        "is_starting": True,
        "is_granted": True,
        "is_third_party": False,
        "is_own_site": True,
    }
    return keys.Asked(**{**values, **fields})


def kept(store: Store, model: str = "muse-tiny", key_id: str = "key_1") -> keys.WrappedKey:
    wrapped = KEK.wrap(DATA_KEY, key_id=key_id, model=model)
    with store.work(SYSTEM) as work:
        keys.keep(work, wrapped)
    return wrapped


# -- wrapped


@given(st.binary(min_size=32, max_size=32), st.text(max_size=20), st.text(max_size=20))
def test_what_is_wrapped_comes_back(data_key: bytes, key_id: str, model: str) -> None:
    wrapped = KEK.wrap(data_key, key_id=key_id, model=model)
    assert bytes(KEK.unwrap(wrapped)) == data_key
    assert data_key not in wrapped.wrapped


@given(st.integers(0, 59), st.integers(1, 255))
def test_a_row_that_was_changed_does_not_open(at: int, change: int) -> None:
    wrapped = KEK.wrap(DATA_KEY, key_id="key_1", model="muse-tiny")
    touched = bytearray(wrapped.wrapped)
    assert len(touched) == 60
    touched[at] ^= change
    with pytest.raises(keys.SealingKeyOther):
        KEK.unwrap(dataclasses.replace(wrapped, wrapped=bytes(touched)))


@pytest.mark.parametrize("change", [{"id": "key_2"}, {"model": "other"}])
def test_a_row_cannot_be_passed_off_as_anothers(change: dict[str, str]) -> None:
    wrapped = KEK.wrap(DATA_KEY, key_id="key_1", model="muse-tiny")
    with pytest.raises(keys.SealingKeyOther, match="changed"):
        KEK.unwrap(dataclasses.replace(wrapped, **change))


def test_another_key_is_named_and_opens_nothing() -> None:
    wrapped = KEK.wrap(DATA_KEY, key_id="key_1", model="muse-tiny")
    with pytest.raises(keys.SealingKeyOther) as refused:
        OTHER.unwrap(wrapped)
    assert KEK.id in refused.value.message
    assert OTHER.id in refused.value.message
    assert KEK.secret.hex()[:8] not in KEK.id + repr(KEK)


def test_the_database_holds_no_key(store: Store, tmp_path: Path) -> None:
    kept(store)
    with store.work(SYSTEM) as work:
        keys.release(work, KEK, asked(), peer=PEER)
    store.close()
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert any(b"muse-tiny" in data for data in files)
    for secret in (DATA_KEY, KEK.secret):
        for form in (secret, secret.hex().encode(), secret.hex().upper().encode()):
            assert not any(form in data for data in files)


# -- import


def test_an_import_is_ciphertext_under_a_key_of_its_own(store: Store, tmp_path: Path) -> None:
    source, folder = tmp_path / "plain.gguf", tmp_path / "sealed"
    source.write_bytes(PLAIN)
    folder.mkdir()
    first, second = (
        keys.import_sealed(KEK, source=source, folder=folder, model="muse-tiny", key_id=name)
        for name in ("key_1", "key_2")
    )
    assert first.sha256 == hashlib.sha256(PLAIN).hexdigest()
    assert first.size_bytes == len(PLAIN)
    assert KEK.unwrap(first.wrapped) != KEK.unwrap(second.wrapped)
    assert sorted(folder.iterdir()) == [first.path, second.path]
    for imported in (first, second):
        assert PLAIN[:64] not in imported.path.read_bytes()
        with imported.path.open("rb") as sealed:
            header = sealing.read_header(sealed)
            opened = bytearray(header.size_bytes)
            sealing.open_into(sealed, header, KEK.unwrap(imported.wrapped), memoryview(opened))
        assert (opened, header.key_id, header.model) == (PLAIN, imported.wrapped.id, "muse-tiny")
    with store.work(SYSTEM) as work:
        assert not keys.has_keys(work.tx)
        keys.keep(work, first.wrapped)
        keys.keep(work, second.wrapped)
        assert keys.find_key(work.tx, "muse-tiny") == second.wrapped
        assert keys.find_key(work.tx, "other") is None
        assert keys.has_keys(work.tx)


# -- released


def test_a_release_is_a_row_and_an_audit_entry(store: Store) -> None:
    kept(store)
    with store.work(SYSTEM) as work:
        assert bytes(keys.release(work, KEK, asked(), peer=PEER)) == DATA_KEY
    with store.read() as tx:
        [row] = keys.list_releases(tx, model="muse-tiny")
        [entry] = tenancy.list_audit(tx, None)
        assert keys.list_releases(tx, model="other") == []
    assert row == keys.Release(
        id=row.id,
        replica_id="rep_1",
        model="muse-tiny",
        key_id="key_1",
        node_id="node_1",
        peer=PEER,
        at=START,
    )
    assert (entry.action, entry.target, entry.result) == ("key_release", "rep_1", "ok")
    assert entry.detail["release_id"] == row.id
    assert DATA_KEY.hex() not in str(entry)


REFUSALS = {
    "release_refused": {"is_starting": False},
    "grant_missing": {"is_granted": False},
    "attestation_required": {"is_third_party": True},
}


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_leaves_its_audit_entry_and_no_release(store: Store, code: str) -> None:
    kept(store)
    wish = asked(**REFUSALS[code])
    with pytest.raises(SubletError) as refused, store.work(SYSTEM) as work:
        keys.release(work, KEK, wish, peer=PEER)
    assert refused.value.code == code
    with store.work(SYSTEM) as work:
        keys.note_refusal(work, wish, refused.value)
    with store.read() as tx:
        assert keys.list_releases(tx) == []
        [entry] = tenancy.list_audit(tx, None)
    assert (entry.action, entry.target, entry.result) == ("key_release", "rep_1", code)


@given(
    st.builds(
        keys.Asked,
        replica_id=st.just("rep_1"),
        model=st.just("muse-tiny"),
        node_id=st.just("node_1"),
        is_starting=st.booleans(),
        is_granted=st.booleans(),
        is_third_party=st.booleans(),
        is_own_site=st.booleans(),
        has_verifier=st.booleans(),
    )
)
def test_no_key_leaves_without_start_grant_and_a_place_to_trust(wish: keys.Asked) -> None:
    is_home = wish.is_own_site and not wish.is_third_party
    allowed = wish.is_starting and wish.is_granted and (is_home or wish.has_verifier)
    assert (keys.refuse(wish) is None) == allowed


def test_without_the_wrapping_key_sealed_models_stay_closed(store: Store) -> None:
    kept(store)
    cases = (
        (None, asked(), "sealing_key_missing"),
        (OTHER, asked(), "sealing_key_other"),
        (KEK, asked(model="unknown"), "model_key_not_found"),
    )
    for kek, wish, code in cases:
        with pytest.raises(SubletError) as refused, store.work(SYSTEM) as work:
            keys.release(work, kek, wish, peer=PEER)
        assert refused.value.code == code
    with store.read() as tx:
        assert keys.list_releases(tx) == []


def test_nonces_never_come_from_a_seed(store: Store) -> None:
    """Ids may repeat with their seed; the cipher may not."""
    wrapped = [KEK.wrap(DATA_KEY, key_id="key_1", model="m").wrapped for _ in range(8)]
    assert len(set(wrapped)) == 8
