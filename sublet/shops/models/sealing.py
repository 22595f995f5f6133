"""Sealing weights: from a plain file to one that is worth nothing without its data key.

Pure but for the two streams. The form, and the half that opens it, are in
`servers.child.unseal`, the one file of the two that goes into the sandbox. Memory use is two
chunks, however large the model.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sublet.shops.models.servers.child.unseal import (
    ALGORITHM,
    KEY_BYTES,
    LEAST_CHUNK,
    MAGIC,
    MOST_CHUNK,
    MOST_CHUNKS,
    MOST_HEADER,
    PREFIX_BYTES,
    TAG_BYTES,
    Broken,
    Cipher,
    Header,
    open_into,
    read_fully,
    read_header,
)

CHUNK_BYTES = 1 << 20
"""Large enough that 16 bytes of tag and a call weigh nothing, small enough for a cache."""


class SourceChanged(ValueError):
    """The file grew or shrank while it was sealed: nothing was kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """What came of it. `sha256` is the plaintext's: for the catalogue, not for the file."""

    header: Header
    sha256: str


def make_header(
    *,
    model: str,
    key_id: str,
    size_bytes: int,
    nonce_prefix: bytes,
    chunk_bytes: int = CHUNK_BYTES,
) -> Header:
    """The header as it will lie there. `nonce_prefix` is drawn for this file alone.

    Raises ValueError for names too long and sizes that the form does not hold.
    """
    values = {
        "algorithm": ALGORITHM,
        "chunk_bytes": chunk_bytes,
        "key_id": key_id,
        "model": model,
        "nonce_prefix": nonce_prefix.hex(),
        "size_bytes": size_bytes,
    }
    text = json.dumps(values, sort_keys=True, separators=(",", ":")).encode()
    header = Header(
        model=model,
        key_id=key_id,
        size_bytes=size_bytes,
        chunk_bytes=chunk_bytes,
        nonce_prefix=nonce_prefix,
        raw=MAGIC + len(text).to_bytes(4, "big") + text,
    )
    if len(nonce_prefix) != PREFIX_BYTES or not LEAST_CHUNK <= chunk_bytes <= MOST_CHUNK:
        raise ValueError("a nonce prefix is 8 bytes, a chunk 16 bytes to 64 MiB")
    if size_bytes < 0 or header.chunks > MOST_CHUNKS or len(text) > MOST_HEADER:
        raise ValueError("the model is too large for its chunks, or its name too long")
    return header


def seal(source: BinaryIO, sink: BinaryIO, header: Header, key: bytes | bytearray) -> Sealed:
    """Write header and chunks. Raises SourceChanged if the source is not as long as it says."""
    assert len(key) == KEY_BYTES
    cipher = Cipher(header, key)
    digest = hashlib.sha256()
    most = min(header.chunk_bytes, header.size_bytes)
    plain = memoryview(bytearray(most))
    sealed = memoryview(bytearray(most + TAG_BYTES))
    sink.write(header.raw)
    for index in range(header.chunks):
        start, end = header.span(index)
        plaintext, ciphertext = plain[: end - start], sealed[: end - start + TAG_BYTES]
        if read_fully(source, plaintext) < len(plaintext):
            raise SourceChanged("the file became shorter while it was sealed")
        digest.update(plaintext)
        cipher.seal(index, plaintext, ciphertext)
        sink.write(ciphertext)
    if source.read(1):
        raise SourceChanged("the file became longer while it was sealed")
    return Sealed(header=header, sha256=digest.hexdigest())


def seal_file(
    source: Path,
    target: Path,
    *,
    model: str,
    key_id: str,
    key: bytes | bytearray,
    nonce_prefix: bytes,
    chunk_bytes: int = CHUNK_BYTES,
) -> Sealed:
    """Seal a file beside the target, then put it in its place: whole or not at all, on disk.

    No byte of plaintext is written anywhere. The target is readable by everybody (0644), since
    runs of other uids read it and it is ciphertext. Raises OSError, SourceChanged; then what was
    begun is gone. Of one that was killed a hidden file of ciphertext stays, whose key nobody has
    kept, until the next attempt takes its place.
    """
    with source.open("rb", buffering=0) as plain:
        header = make_header(
            model=model,
            key_id=key_id,
            size_bytes=os.fstat(plain.fileno()).st_size,
            nonce_prefix=nonce_prefix,
            chunk_bytes=chunk_bytes,
        )
        with _replacing(target) as sink:
            return seal(plain, sink, header, key)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A new file that takes the target's name once it is whole and on disk."""
    draft = target.with_name(f".{target.name}.new")
    fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as sink:
        fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)  # two at once would mix
        if not os.path.samestat(os.fstat(fd), os.lstat(draft)):
            raise BlockingIOError("the same file is being sealed by another process")
        os.ftruncate(fd, 0)
        try:
            yield sink
            sink.flush()
            os.fchmod(fd, 0o644)
            os.fsync(fd)
            os.replace(draft, target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


__all__ = [
    "CHUNK_BYTES",
    "Broken",
    "Header",
    "Sealed",
    "SourceChanged",
    "make_header",
    "open_into",
    "read_header",
    "seal",
    "seal_file",
]
