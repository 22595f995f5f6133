"""The keys of sealed models: wrapped at rest, released by name, written down before they leave.

Envelope encryption: each sealed file has a data key of its own; the table keeps it wrapped by the
key-encryption key, which is in no table and no data folder (`app.keyfile`). A stolen file, a
stolen database, or both, are ciphertext. A release is a row and an audit entry in a Work that is
committed before the first byte of the key is sent.

Keys and nonces are drawn from the operating system and never from `ids`, which may be seeded: the
same chance twice would give the cipher away.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sqlalchemy import Connection

from sublet.base.kernel.errors import Conflict, Forbidden, NotFound, SubletError, Unavailable
from sublet.base.store import Instant, Work, metadata
from sublet.records import tenancy
from sublet.shops.models import sealing
from sublet.shops.models.servers.child import unseal
from sublet.shops.models.servers.unix import connect

RELEASE = "key_release"
"""The action in the audit."""
_NONCE_BYTES = 12
_CALL_SECONDS = 5.0

wrapped_keys = sa.Table(
    "models_key",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("model", sa.String(200), nullable=False, index=True),
    sa.Column("kek_id", sa.String(40), nullable=False),
    sa.Column("wrapped", sa.String(200), nullable=False),
    sa.Column("created_at", Instant, nullable=False),
)
"""`wrapped`: nonce and ciphertext of the data key, hexadecimal. The newest of a model is its key."""

releases = sa.Table(
    "models_release",
    metadata,
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(40), nullable=False, unique=True),
    sa.Column("replica_id", sa.String(40), nullable=False, index=True),
    sa.Column("model", sa.String(200), nullable=False, index=True),
    sa.Column("key_id", sa.String(40), nullable=False),
    sa.Column("node_id", sa.String(40), nullable=False),
    sa.Column("peer_pid", sa.BigInteger, nullable=False),
    sa.Column("peer_uid", sa.BigInteger, nullable=False),
    sa.Column("at", Instant, nullable=False),
)


class SealingKeyMissing(Unavailable):
    """Sublet runs without the key that opens sealed models: its start said why; other models work."""

    code = "sealing_key_missing"


class SealingKeyOther(Unavailable):
    """This model was sealed under another key-encryption key: bring that one back, or import anew."""

    code = "sealing_key_other"


class ModelKeyNotFound(NotFound):
    """There is no data key for this model: import its weights, sealed."""

    code = "model_key_not_found"


class ReleaseRefused(Conflict):
    """Only a replica that is starting gets a key, once, for the model of its deployment."""

    code = "release_refused"


class GrantMissing(Forbidden):
    """Nobody is granted this sealed model, or the grant was revoked: grant it first."""

    code = "grant_missing"


class AttestationRequired(Forbidden):
    """Foreign sealed model with no verifier: a third party's weights, or any at a site that is not
    the owner's, are loaded only where attested hardware vouches for the node."""

    code = "attestation_required"


@dataclass(frozen=True, slots=True, kw_only=True)
class WrappedKey:
    """A data key as it is kept: of use to nobody without the key-encryption key."""

    id: str
    model: str
    kek_id: str
    wrapped: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """A sealed file, and what the catalogue and the table keep of it."""

    path: Path
    wrapped: WrappedKey
    sha256: str
    """Of the plaintext."""
    size_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """The process that listens for a key, as the host's kernel names it."""

    pid: int
    uid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A replica that waits for its key, as its rows stand in the Work of the release."""

    replica_id: str
    model: str
    node_id: str
    is_starting: bool
    is_granted: bool
    """A grant on the model is in force for whom this replica serves."""
    is_third_party: bool
    """The weights are not the owner's own."""
    is_own_site: bool
    """The node is the owner's: neither leased nor foreign."""
    has_verifier: bool = False
    """Attested hardware has vouched for the node."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    id: str
    replica_id: str
    model: str
    key_id: str
    node_id: str
    peer: Peer
    at: datetime


@dataclass(frozen=True, slots=True)
class KeyEncryptionKey:
    """Wraps data keys. Its id is a fingerprint: it tells two keys apart and neither of them."""

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        assert len(self.secret) == unseal.KEY_BYTES

    @property
    def id(self) -> str:
        return (
            "kek_" + hashlib.sha256(b"sublet key-encryption key\0" + self.secret).hexdigest()[:16]
        )

    def wrap(self, data_key: bytes | bytearray, *, key_id: str, model: str) -> WrappedKey:
        """Bound to its id and model: a row cannot be passed off as another's."""
        nonce = os.urandom(_NONCE_BYTES)
        sealed = AESGCM(self.secret).encrypt(nonce, data_key, _bound(key_id, model))
        return WrappedKey(id=key_id, model=model, kek_id=self.id, wrapped=nonce + sealed)

    def unwrap(self, key: WrappedKey) -> bytearray:
        """Raises SealingKeyOther, also for a row that was changed."""
        if key.kek_id != self.id:
            raise SealingKeyOther(
                f"{key.model} was sealed under {key.kek_id}, this is {self.id}: bring the other "
                "key file back, or import the model anew."
            )
        nonce, sealed = key.wrapped[:_NONCE_BYTES], key.wrapped[_NONCE_BYTES:]
        try:
            opened = AESGCM(self.secret).decrypt(nonce, sealed, _bound(key.id, key.model))
        except InvalidTag:
            raise SealingKeyOther(
                f"The data key of {key.model} does not open: its row was changed. Import it anew."
            ) from None
        return bytearray(opened)


def _bound(key_id: str, model: str) -> bytes:
    return b"\0".join((b"models_key", key_id.encode(), model.encode()))


# -- import


def import_sealed(
    kek: KeyEncryptionKey, *, source: Path, folder: Path, model: str, key_id: str
) -> Imported:
    """Seal a plain file into `folder` under a new data key. Slow: call it outside a Work, then `keep`.

    The file is named for its key, so the one in use stays until the row of the new one is
    committed; a crash in between leaves ciphertext whose key nobody has. Raises OSError,
    `sealing.SourceChanged`.
    """
    data_key = bytearray(AESGCM.generate_key(unseal.KEY_BYTES * 8))
    path = folder / f"{key_id}.sealed"
    try:
        wrapped = kek.wrap(data_key, key_id=key_id, model=model)
        sealed = sealing.seal_file(
            source,
            path,
            model=model,
            key_id=key_id,
            key=data_key,
            nonce_prefix=os.urandom(unseal.PREFIX_BYTES),
        )
    finally:
        unseal.wipe(data_key)
    return Imported(
        path=path, wrapped=wrapped, sha256=sealed.sha256, size_bytes=sealed.header.size_bytes
    )


def keep(work: Work, key: WrappedKey) -> None:
    """From now on the model's key. Those before it stay, for files that are still open."""
    work.tx.execute(
        wrapped_keys.insert().values(
            id=key.id,
            model=key.model,
            kek_id=key.kek_id,
            wrapped=key.wrapped.hex(),
            created_at=work.now,
        )
    )


def find_key(tx: Connection, model: str) -> WrappedKey | None:
    """The newest of a model."""
    row = tx.execute(
        sa.select(wrapped_keys)
        .where(wrapped_keys.c.model == model)
        .order_by(wrapped_keys.c.seq.desc())
        .limit(1)
    ).one_or_none()
    if row is None:
        return None
    return WrappedKey(
        id=row.id, model=row.model, kek_id=row.kek_id, wrapped=bytes.fromhex(row.wrapped)
    )


def has_keys(tx: Connection) -> bool:
    """Whether anything was ever wrapped: then a key file that is missing is lost, not new."""
    return tx.execute(sa.select(wrapped_keys.c.seq).limit(1)).scalar() is not None


# -- release


def refuse(asked: Asked) -> ReleaseRefused | GrantMissing | AttestationRequired | None:
    """Why this replica gets no key; None: it may have it."""
    if not asked.is_starting:
        return ReleaseRefused(f"{asked.replica_id} is not starting: it gets no key.")
    if not asked.is_granted:
        return GrantMissing(
            f"No grant on {asked.model} is in force: {asked.replica_id} gets no key."
        )
    if (asked.is_third_party or not asked.is_own_site) and not asked.has_verifier:
        return AttestationRequired()
    return None


def release(work: Work, kek: KeyEncryptionKey | None, asked: Asked, *, peer: Peer) -> bytearray:
    """Write down that the model's data key goes to that process, and open it.

    The key is for `Caller.deliver` once this Work is committed, so that none is ever sent that is
    not in the table; one that was written and not sent (a crash in between) does no harm.
    Raises ReleaseRefused, GrantMissing, AttestationRequired, ModelKeyNotFound, SealingKeyMissing,
    SealingKeyOther: the caller audits them with `note_refusal` in a Work of its own.
    """
    refused = refuse(asked)
    if refused is not None:
        raise refused
    key = find_key(work.tx, asked.model)
    if key is None:
        raise ModelKeyNotFound(f"There is no data key for {asked.model}: import it, sealed.")
    if kek is None:
        raise SealingKeyMissing()
    data_key = kek.unwrap(key)
    release_id = work.ids.new("rel")
    work.tx.execute(
        releases.insert().values(
            id=release_id,
            replica_id=asked.replica_id,
            model=asked.model,
            key_id=key.id,
            node_id=asked.node_id,
            peer_pid=peer.pid,
            peer_uid=peer.uid,
            at=work.now,
        )
    )
    tenancy.audit(
        work,
        action=RELEASE,
        target=asked.replica_id,
        result="ok",
        detail={
            "release_id": release_id,
            "model": asked.model,
            "key_id": key.id,
            "node_id": asked.node_id,
            "pid": peer.pid,
            "uid": peer.uid,
        },
    )
    return data_key


def note_refusal(work: Work, asked: Asked, refused: SubletError) -> None:
    """A release that was refused is audited, too; its own Work was rolled back."""
    tenancy.audit(
        work,
        action=RELEASE,
        target=asked.replica_id,
        result=refused.code,
        detail={"model": asked.model, "node_id": asked.node_id},
    )


def list_releases(tx: Connection, *, model: str | None = None, limit: int = 100) -> list[Release]:
    """The newest first."""
    chosen = sa.select(releases).order_by(releases.c.seq.desc()).limit(limit)
    if model is not None:
        chosen = chosen.where(releases.c.model == model)
    return [
        Release(
            id=row.id,
            replica_id=row.replica_id,
            model=row.model,
            key_id=row.key_id,
            node_id=row.node_id,
            peer=Peer(pid=row.peer_pid, uid=row.peer_uid),
            at=row.at,
        )
        for row in tx.execute(chosen)
    ]


# -- the call at a replica's door


class Caller:
    """A connection to a replica that waits for its key; `peer` is who listens there."""

    def __init__(self, connection: socket.socket, peer: Peer) -> None:
        self._connection = connection
        self.peer = peer

    def deliver(self, data_key: bytearray) -> None:
        """Send the key, see it received, wipe it here. Raises OSError: whether the replica has it is
        then unknown, and it is started anew."""
        try:
            self._connection.sendall(data_key)
            if _receive(self._connection, len(unseal.THANKS)) != unseal.THANKS:
                raise ConnectionResetError("the replica broke off before it had the key")
        finally:
            unseal.wipe(data_key)


@contextlib.contextmanager
def knock(door: str) -> Iterator[Caller]:
    """Call at a replica's `key.sock` (`Engine.door`), outside a Work. Raises OSError: nobody listens
    there yet, or the listener is not the run: then nothing is ever sent.

    The run's home belongs to its uid and is closed to all others, so who made a 0600 socket there
    under that uid is the run; the kernel says which process it was.
    """
    home, made = os.stat(os.path.dirname(door)), os.lstat(door)
    if not stat.S_ISSOCK(made.st_mode) or made.st_mode & 0o077 or home.st_mode & 0o022:
        raise PermissionError(f"{door} is not a socket of the run alone")
    connection = connect(door, _CALL_SECONDS)
    with connection:
        connection.settimeout(_CALL_SECONDS)
        packed = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, _ = struct.unpack("3I", packed)
        if not uid == made.st_uid == home.st_uid:
            raise PermissionError(f"uid {uid} listens at {door}, which belongs to {home.st_uid}")
        if _receive(connection, len(unseal.GREETING)) != unseal.GREETING:
            raise ConnectionResetError("the replica broke off before it asked for its key")
        yield Caller(connection, Peer(pid=pid, uid=uid))


def _receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length and (more := connection.recv(length - len(data))):
        data += more
    return data
