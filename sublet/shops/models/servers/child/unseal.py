"""Opening sealed weights, inside the sandbox: from ciphertext on disk to memory nobody else reads.

`receive_and_open` makes the process non-dumpable, waits on a socket for the data key, and decrypts
into a memory file that is locked, sealed and has no name. Nothing of the plaintext touches a disk:
a process killed in the middle leaves nothing. Root of the host can read all of it.

The form of a sealed file is read here and nowhere else, since the rest of Sublet is not in the
sandbox: `sealing` writes it. One file, standard library and cryptography only.

    SUBSEAL1 | length of the header, 4 bytes, big-endian | header, JSON | chunks
    chunk i = AES-256-GCM(key, nonce, plaintext, associated data), tag at its end
    nonce = prefix (8 bytes, from the header) | i (4 bytes)
    associated data = sha256(all before the chunks) | i (8 bytes) | 1 if it is the last, else 0

After the STREAM construction of Hoang, Reyhanitabar, Rogaway and Vizár, "Online Authenticated-
Encryption and its Nonce-Reuse Misuse-Resistance" (CRYPTO 2015): position and end are bound, so a
chunk that is cut off, moved, repeated or from another file does not open; nor does anything under
a changed header. The header names neither the key nor a digest of the plaintext: the file alone
tells its size and the names in it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import json
import mmap
import os
import resource
import signal
import socket
import stat
import struct
import time
from dataclasses import dataclass
from typing import BinaryIO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

MAGIC = b"SUBSEAL1"
ALGORITHM = "AES-256-GCM-STREAM"
KEY_BYTES, TAG_BYTES, PREFIX_BYTES = 32, 16, 8
LEAST_CHUNK, MOST_CHUNK = 16, 64 << 20
MOST_CHUNKS = 1 << 32
MOST_HEADER = 4096
_HEADER_LENGTH = struct.Struct(">I")

KEY_SECONDS = 600.0
"""How long it waits for its key: who starts a replica also watches it."""
GREETING = b"key?"
THANKS = b"have"
"""Said by the replica as somebody connects, and once it holds the key: 4 bytes each."""

_LOOK_SECONDS = 0.5
_CALLER_SECONDS = 10.0

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE = 3, 4
_F_ADD_SEALS = 1033
_SEAL, _SHRINK, _GROW, _WRITE = 1, 2, 4, 8
_PROT_READ, _MAP_SHARED = 1, 1
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Broken(ValueError):
    """These bytes are not what was sealed, or the key is another one."""


class Unsafe(RuntimeError):
    """Weights cannot be kept from others here: they are not opened."""


# -- the form


@dataclass(frozen=True)
class Header:
    """What a sealed file says of itself. `raw` is all before the chunks, as it lies there."""

    model: str
    key_id: str
    size_bytes: int
    chunk_bytes: int
    nonce_prefix: bytes
    raw: bytes

    @property
    def chunks(self) -> int:
        """At least one: that there is nothing is said under the key, too."""
        return max(1, -(-self.size_bytes // self.chunk_bytes))

    @property
    def sealed_bytes(self) -> int:
        return len(self.raw) + self.size_bytes + self.chunks * TAG_BYTES

    def span(self, index: int) -> tuple[int, int]:
        """Where chunk `index` lies in the plaintext."""
        start = index * self.chunk_bytes
        return start, min(start + self.chunk_bytes, self.size_bytes)


def read_header(source: BinaryIO) -> Header:
    """The header at the start of a stream, which is left before the first chunk. Raises Broken.

    Nothing in it is to be believed until a chunk has opened; it is bounded so that none of it can
    harm before.
    """
    start = source.read(len(MAGIC) + _HEADER_LENGTH.size)
    if not start.startswith(MAGIC):
        raise Broken("this is not a sealed file")
    if len(start) < len(MAGIC) + _HEADER_LENGTH.size:
        raise Broken("the sealed file is cut short in its header")
    (length,) = _HEADER_LENGTH.unpack(start[len(MAGIC) :])
    if length > MOST_HEADER:
        raise Broken("the sealed file's header is too long to be one")
    text = source.read(length)
    if len(text) < length:
        raise Broken("the sealed file is cut short in its header")
    try:
        values = json.loads(text)
        algorithm = values["algorithm"]
        header = Header(
            model=str(values["model"]),
            key_id=str(values["key_id"]),
            size_bytes=int(values["size_bytes"]),
            chunk_bytes=int(values["chunk_bytes"]),
            nonce_prefix=bytes.fromhex(values["nonce_prefix"]),
            raw=start + text,
        )
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise Broken("the sealed file's header cannot be read") from error
    if algorithm != ALGORITHM:
        raise Broken(f"the sealed file names an algorithm unknown here: {algorithm!r}")
    if not (
        header.size_bytes >= 0
        and LEAST_CHUNK <= header.chunk_bytes <= MOST_CHUNK
        and header.chunks <= MOST_CHUNKS
        and len(header.nonce_prefix) == PREFIX_BYTES
    ):
        raise Broken("the sealed file's header is out of bounds")
    return header


class Cipher:
    """One file's chunks, sealed or opened. The nonce never repeats: a prefix is drawn per file."""

    def __init__(self, header: Header, key: bytes | bytearray) -> None:
        self._header = header
        self._aead = AESGCM(key)
        self._digest = hashlib.sha256(header.raw).digest()

    def _bound(self, index: int) -> tuple[bytes, bytes]:
        is_last = index == self._header.chunks - 1
        nonce = self._header.nonce_prefix + struct.pack(">I", index)
        return nonce, self._digest + struct.pack(">Q?", index, is_last)

    def seal(self, index: int, plaintext: memoryview, into: memoryview) -> None:
        nonce, associated = self._bound(index)
        self._aead.encrypt_into(nonce, plaintext, associated, into)

    def open(self, index: int, ciphertext: memoryview, into: memoryview) -> None:
        """Raises Broken, and then leaves nothing that was not authenticated in `into`."""
        nonce, associated = self._bound(index)
        try:
            self._aead.decrypt_into(nonce, ciphertext, associated, into)
        except InvalidTag:
            into[:] = bytes(len(into))
            raise Broken(
                f"chunk {index} of {self._header.chunks} does not open: "
                "the file was changed or cut, or the key is another one"
            ) from None


def open_into(source: BinaryIO, header: Header, key: bytes | bytearray, target: memoryview) -> None:
    """Every chunk after the header, into `target` of exactly the plaintext's size.

    Raises Broken at the first that does not open, and if anything follows the last.
    """
    assert len(target) == header.size_bytes
    cipher = Cipher(header, key)
    buffer = memoryview(bytearray(min(header.chunk_bytes, header.size_bytes) + TAG_BYTES))
    for index in range(header.chunks):
        start, end = header.span(index)
        ciphertext = buffer[: end - start + TAG_BYTES]
        if read_fully(source, ciphertext) < len(ciphertext):
            raise Broken(f"the sealed file is cut short in chunk {index} of {header.chunks}")
        cipher.open(index, ciphertext, target[start:end])
    if source.read(1):
        raise Broken("there are bytes after the sealed file's end")


def read_fully(source: BinaryIO, into: memoryview) -> int:
    """As much as there is, up to the length of `into`."""
    at = 0
    while at < len(into):
        got = source.readinto(into[at:])  # type: ignore[attr-defined]
        if not got:
            break
        at += got
    return at


# -- a process that keeps a secret


def receive_and_open(
    sealed_path: str, key_socket_path: str, *, wait_seconds: float = KEY_SECONDS
) -> str:
    """Open sealed weights with a key that comes over a socket; the path to load them from.

    The path is this process's own (`/proc/self/fd/N`). Load it mapped, not copied: the pages of
    the memory file are locked, a copy's are not. `let_go` when it is loaded.
    Raises Unsafe where the weights could be read by others, Broken for a file or a key that is not
    right, TimeoutError if no key comes.
    """
    harden()
    with open(sealed_path, "rb", buffering=0) as source:
        header = read_header(source)
        if os.fstat(source.fileno()).st_size != header.sealed_bytes:
            raise Broken("the sealed file is cut short, or there are bytes after its end")
        vault = _Vault(header.size_bytes)
        try:
            key = receive_key(key_socket_path, wait_seconds)
            try:
                vault.fill(source, header, key)
            finally:
                wipe(key)
        except BaseException:
            vault.close()
            raise
    path = f"/proc/self/fd/{vault.fd}"
    _vaults[path] = vault
    return path


def let_go(path: str) -> None:
    """The weights are mapped: close the descriptor. The pages stay, and stay locked."""
    vault = _vaults[path]
    if vault.fd >= 0:
        os.close(vault.fd)
        vault.fd = -1


def harden() -> None:
    """No core, and nobody of the same uid may trace this process or read it through /proc.

    Undone by exec, so it is for the process that holds the secret to call. Raises Unsafe.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if _libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise Unsafe("this process cannot be made non-dumpable: others of its uid could read it")


def wipe(secret: bytearray) -> None:
    """Overwrite it. The cipher's own copy goes with the cipher, freed and not overwritten."""
    secret[:] = bytes(len(secret))


class _Vault:
    """A memory file without a name: locked before anything is in it, sealed once all is."""

    def __init__(self, size: int) -> None:
        self._size = size
        self.fd = -1
        writable = os.memfd_create("weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(writable, size)
            # Mapped from a descriptor that cannot write: a mapping that could would forbid the
            # seal, and between two mappings the pages would lie unlocked.
            self.fd = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY | os.O_CLOEXEC)
            self._writable = writable
            if size:
                self._lock()
        except BaseException:
            os.close(writable)
            if self.fd >= 0:
                os.close(self.fd)
            raise

    def _lock(self) -> None:
        address = _libc.mmap(None, self._size, _PROT_READ, _MAP_SHARED, self.fd, 0)
        if address == _MAP_FAILED:
            raise OSError(ctypes.get_errno(), "the weights cannot be mapped")
        if _libc.mlock(address, self._size) != 0 and swaps():
            _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
            raise Unsafe(
                f"{self._size} bytes of weights cannot be locked in memory (limit {most}), "
                "and this machine swaps: raise the limit, or swapoff -a"
            )

    def fill(self, source: BinaryIO, header: Header, key: bytearray) -> None:
        """Decrypt, then let nobody change it any more, us included. Raises Broken."""
        if self._size:
            with (
                mmap.mmap(self._writable, self._size) as mapped,
                memoryview(mapped) as target,
            ):
                open_into(source, header, key, target)
        else:
            open_into(source, header, key, memoryview(bytearray()))
        fcntl.fcntl(self._writable, _F_ADD_SEALS, _SHRINK | _GROW | _WRITE | _SEAL)
        os.close(self._writable)
        self._writable = -1

    def close(self) -> None:
        for fd in (self._writable, self.fd):
            if fd >= 0:
                os.close(fd)


_vaults: dict[str, _Vault] = {}
"""What was opened, by path: its locked mapping lives as long as the process."""


def swaps() -> bool:
    try:
        with open("/proc/swaps") as source:
            return len(source.read().splitlines()) > 1
    except OSError:
        return True


# -- the key's way in


def receive_key(path: str, wait_seconds: float = KEY_SECONDS) -> bytearray:
    """Listen on a socket of ours alone, take one key from its first rightful caller, unlink it.

    Whoever else calls is turned away, and the next one heard. Raises TimeoutError, Unsafe, and
    SystemExit if SIGTERM comes first, blocked or not.
    """
    with contextlib.closing(_listen(path)) as listening:
        try:
            end = time.monotonic() + wait_seconds
            while (left := end - time.monotonic()) > 0:
                if signal.SIGTERM in signal.sigpending():
                    raise SystemExit(128 + signal.SIGTERM)  # blocked by who waits for it later
                listening.settimeout(min(left, _LOOK_SECONDS))
                try:
                    caller, _ = listening.accept()
                except TimeoutError:
                    continue
                with caller:
                    caller.settimeout(_CALLER_SECONDS)
                    key = _take(caller) if is_rightful(_peer_uid(caller)) else None
                if key is not None:
                    return key
            raise TimeoutError(f"no key came within {wait_seconds:g} s")
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _listen(path: str) -> socket.socket:
    """Bound by way of its folder, since a socket's address has no room for a long path, and named
    once it listens: who sees the name can call."""
    folder, name = os.path.split(path)
    draft = os.path.join(folder, f".{name}")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    before = os.umask(0o177)
    try:
        fd = os.open(folder or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
            listening.bind(f"/proc/self/fd/{fd}/.{name}")
        finally:
            os.close(fd)
        _check_private(draft)
        listening.listen(8)
        os.rename(draft, path)
    except BaseException:
        listening.close()
        raise
    finally:
        os.umask(before)
    return listening


def _check_private(path: str) -> None:
    seen = os.lstat(path)
    if not stat.S_ISSOCK(seen.st_mode) or seen.st_mode & 0o077 or seen.st_uid != os.geteuid():
        raise Unsafe(f"{path} is not a socket of this user alone")


def _peer_uid(caller: socket.socket) -> int:
    """The caller's uid, as it is seen from inside."""
    packed = caller.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    uid: int = struct.unpack("3I", packed)[1]
    return uid


def is_rightful(uid: int) -> bool:
    """Whether a caller of that uid may bring the key: ourselves, or root.

    Inside a user namespace uids from outside are mapped. Our own outer uid shows as ours. Root of
    the host has no number here and shows as the overflow uid, as every stranger would; but the
    socket is ours and 0600, so of those without a number only root gets as far as this.
    """
    if uid in (0, os.geteuid()):
        return True
    return not _has_root_inside() and uid == _overflow_uid()


def _has_root_inside() -> bool:
    """Whether uid 0 of this user namespace stands for anybody."""
    with open("/proc/self/uid_map") as source:
        rows = [[int(word) for word in line.split()] for line in source]
    return any(first == 0 and count > 0 for first, _, count in rows)


def _overflow_uid() -> int:
    with open("/proc/sys/kernel/overflowuid") as source:
        return int(source.read())


def _take(caller: socket.socket) -> bytearray | None:
    """Exactly one key and the end of what is sent; None from a caller who breaks off."""
    key = bytearray(KEY_BYTES)
    try:
        caller.sendall(GREETING)
        at = 0
        while at < KEY_BYTES:
            got = caller.recv_into(memoryview(key)[at:])
            if not got:
                wipe(key)
                return None
            at += got
        caller.sendall(THANKS)
    except OSError:
        wipe(key)
        return None
    return key
