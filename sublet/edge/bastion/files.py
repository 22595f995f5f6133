"""sftp and scp: every operation on a path is done inside the workload, as the tenant.

A file is opened inside and its descriptor handed out; only regular files are read or written
through it, so that no client can make this process wait on a pipe or a device. asyncssh's base
class works on the host's files: a test holds that no operation of it is left in force.
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import asyncssh
from asyncssh import sftp

from sublet.base.kernel.errors import SubletError

if TYPE_CHECKING:
    from sublet.edge.bastion.server import Login

READ_LIMIT_BYTES = 1 << 18
"""A longer read is answered short, as the protocol allows."""
OPEN_LIMIT = 64
"""Open files, and open directories, of one session."""
NANOSECONDS = 1_000_000_000


class OpenFile:
    """A regular file of a workload, opened inside it."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self.path = path

    def fileno(self) -> int:
        return self._fd

    def seek(self, offset: int, whence: int) -> int:
        return os.lseek(self._fd, offset, whence)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def write(self, data: bytes, offset: int) -> int:
        rest = memoryview(data)
        while rest:
            done = os.pwrite(self._fd, rest, offset)
            rest, offset = rest[done:], offset + done
        return len(data)

    def close(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class TenantFiles(asyncssh.SFTPServer):
    """The files of a workload as its tenant sees them."""

    def __init__(self, chan: asyncssh.SSHServerChannel[bytes], login: Login) -> None:
        super().__init__(chan)
        self._login = login
        self._open = 0
        self._listings: weakref.WeakSet[AsyncIterator[sftp.SFTPName]] = weakref.WeakSet()

    # Files.

    async def open(self, path: bytes, pflags: int, attrs: sftp.SFTPAttrs) -> OpenFile:
        if pflags & asyncssh.FXF_WRITE:
            flags = os.O_RDWR if pflags & asyncssh.FXF_READ else os.O_WRONLY
        else:
            flags = os.O_RDONLY
        for asked, flag in (
            (asyncssh.FXF_APPEND, os.O_APPEND),
            (asyncssh.FXF_CREAT, os.O_CREAT),
            (asyncssh.FXF_TRUNC, os.O_TRUNC),
            (asyncssh.FXF_EXCL, os.O_EXCL),
        ):
            if pflags & asked:
                flags |= flag
        mode = 0o666 if attrs.permissions is None else stat.S_IMODE(attrs.permissions)
        return await self._open_regular(_text(path), flags, mode)

    async def open56(
        self, path: bytes, desired_access: int, flags: int, attrs: sftp.SFTPAttrs
    ) -> OpenFile:
        raise asyncssh.SFTPOpUnsupported("version 3 of the protocol is spoken here")

    async def _open_regular(self, path: str, flags: int, mode: int) -> OpenFile:
        if self._open >= OPEN_LIMIT:
            raise asyncssh.SFTPFailure(f"{OPEN_LIMIT} files are open already: close one")
        # Without O_NONBLOCK the open itself would wait for the other end of a pipe.
        waiting = os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        fd: int = await self._inside("open", path, flags | waiting, mode)
        kind = os.fstat(fd).st_mode
        if not stat.S_ISREG(kind):
            os.close(fd)
            what = "a directory" if stat.S_ISDIR(kind) else "not a regular file"
            raise asyncssh.SFTPFailure(f"{path} is {what}")
        self._open += 1
        return OpenFile(fd, path)

    async def close(self, file_obj: object) -> None:
        if isinstance(file_obj, OpenFile):
            self._open -= 1
            file_obj.close()

    async def read(self, file_obj: object, offset: int, size: int) -> bytes:
        file = _file(file_obj)
        return await self._login.bastion.call(file.read, min(size, READ_LIMIT_BYTES), offset)

    async def write(self, file_obj: object, offset: int, data: bytes) -> int:
        file = _file(file_obj)
        return await self._login.bastion.call(file.write, data, offset)

    async def fstat(self, file_obj: object) -> sftp.SFTPAttrs:
        found = os.fstat(_file(file_obj).fileno())
        # Owners seen from out here are not those seen inside, so they are left out.
        return sftp.SFTPAttrs(
            size=found.st_size,
            permissions=found.st_mode,
            atime=int(found.st_atime),
            mtime=int(found.st_mtime),
        )

    async def fsetstat(self, file_obj: object, attrs: sftp.SFTPAttrs) -> None:
        file = _file(file_obj)
        if attrs.size is not None:
            await self._login.bastion.call(os.ftruncate, file.fileno(), attrs.size)
        # The rest by path, inside: out here this process may have more rights than the tenant.
        await self._change(file.path, attrs, size=None)

    async def fstatvfs(self, file_obj: object) -> sftp.SFTPVFSAttrs:
        return sftp.SFTPVFSAttrs.from_local(os.fstatvfs(_file(file_obj).fileno()))

    async def fsync(self, file_obj: object) -> None:
        await self._login.bastion.call(os.fsync, _file(file_obj).fileno())

    # Paths.

    async def stat(self, path: bytes) -> sftp.SFTPAttrs:
        return _attributes(await self._inside("stat", _text(path)))

    async def lstat(self, path: bytes) -> sftp.SFTPAttrs:
        return _attributes(await self._inside("lstat", _text(path)))

    async def setstat(self, path: bytes, attrs: sftp.SFTPAttrs) -> None:
        await self._change(_text(path), attrs, size=attrs.size)

    async def lsetstat(self, path: bytes, attrs: sftp.SFTPAttrs) -> None:
        found = await self.lstat(path)
        if stat.S_ISLNK(found.permissions or 0):
            raise asyncssh.SFTPOpUnsupported("attributes of a symbolic link cannot be set")
        await self.setstat(path, attrs)

    async def _change(self, path: str, attrs: sftp.SFTPAttrs, *, size: int | None) -> None:
        if size is not None:
            await self._inside("truncate", path, size)
        if attrs.permissions is not None:
            await self._inside("chmod", path, stat.S_IMODE(attrs.permissions))
        if attrs.atime is not None and attrs.mtime is not None:
            atime_ns = attrs.atime * NANOSECONDS + (attrs.atime_ns or 0)
            mtime_ns = attrs.mtime * NANOSECONDS + (attrs.mtime_ns or 0)
            await self._inside("utime", path, atime_ns, mtime_ns)

    def scandir(self, path: bytes) -> AsyncIterator[sftp.SFTPName]:
        if len(self._listings) >= OPEN_LIMIT:
            raise asyncssh.SFTPFailure(f"{OPEN_LIMIT} folders are open already: close one")
        listing = self._list(path)
        self._listings.add(listing)
        return listing

    async def _list(self, path: bytes) -> AsyncIterator[sftp.SFTPName]:
        for name, found in await self._inside("listdir", _text(path)):
            yield sftp.SFTPName(os.fsencode(name), attrs=_attributes(found))

    async def remove(self, path: bytes) -> None:
        await self._inside("unlink", _text(path))

    async def mkdir(self, path: bytes, attrs: sftp.SFTPAttrs) -> None:
        mode = 0o777 if attrs.permissions is None else stat.S_IMODE(attrs.permissions)
        await self._inside("mkdir", _text(path), mode)

    async def rmdir(self, path: bytes) -> None:
        await self._inside("rmdir", _text(path))

    async def realpath(self, path: bytes) -> bytes:
        return os.fsencode(await self._inside("realpath", _text(path)))

    async def rename(self, oldpath: bytes, newpath: bytes) -> None:
        """Rename; in this version of the protocol it does not replace."""
        try:
            await self._inside("lstat", _text(newpath))
        except FileNotFoundError:
            await self._inside("rename", _text(oldpath), _text(newpath))
            return
        raise asyncssh.SFTPFailure(f"{_text(newpath)} exists already")

    async def posix_rename(self, oldpath: bytes, newpath: bytes) -> None:
        await self._inside("rename", _text(oldpath), _text(newpath))

    async def readlink(self, path: bytes) -> bytes:
        return os.fsencode(await self._inside("readlink", _text(path)))

    async def symlink(self, oldpath: bytes, newpath: bytes) -> None:
        await self._inside("symlink", _text(oldpath), _text(newpath))

    async def link(self, oldpath: bytes, newpath: bytes) -> None:
        await self._inside("link", _text(oldpath), _text(newpath))

    async def statvfs(self, path: bytes) -> sftp.SFTPVFSAttrs:
        found: os.statvfs_result = await self._inside("fstatvfs", _text(path))
        return sftp.SFTPVFSAttrs.from_local(found)

    # The host's names of users are nobody's business inside.

    def format_user(self, uid: int | None) -> str:
        return "" if uid is None else str(uid)

    def format_group(self, gid: int | None) -> str:
        return "" if gid is None else str(gid)

    async def _inside(self, operation: str, *args: Any) -> Any:
        bastion = self._login.bastion
        try:
            return await bastion.call(bastion.engine.file, self._login.run_id, operation, *args)
        except SubletError as error:
            raise asyncssh.SFTPConnectionLost(await self._login.reason(error)) from error


def _text(path: bytes) -> str:
    if b"\0" in path:
        raise asyncssh.SFTPInvalidFilename("a path has no NUL in it")
    return os.fsdecode(path) or "."


def _file(file_obj: object) -> OpenFile:
    assert isinstance(file_obj, OpenFile)
    return file_obj


def _attributes(found: os.stat_result) -> sftp.SFTPAttrs:
    """As seen inside. The library's own conversion would add the host's names for the ids."""
    return sftp.SFTPAttrs(
        type=_kind(found.st_mode),
        size=found.st_size,
        uid=found.st_uid,
        gid=found.st_gid,
        permissions=found.st_mode,
        atime=found.st_atime_ns // NANOSECONDS,
        mtime=found.st_mtime_ns // NANOSECONDS,
        nlink=found.st_nlink,
    )


def _kind(mode: int) -> int:
    kinds = {
        stat.S_IFREG: asyncssh.FILEXFER_TYPE_REGULAR,
        stat.S_IFDIR: asyncssh.FILEXFER_TYPE_DIRECTORY,
        stat.S_IFLNK: asyncssh.FILEXFER_TYPE_SYMLINK,
    }
    return kinds.get(stat.S_IFMT(mode), asyncssh.FILEXFER_TYPE_SPECIAL)
