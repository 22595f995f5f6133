"""Deleting a tenant's folder, whatever the tenant made of it.

Names, links and nesting are chosen by a stranger: every step goes by descriptor, follows no link,
and a folder found deep down is first moved up, so that depth costs neither recursion nor a long
path.
"""

from __future__ import annotations

import os
import stat

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def wipe(path: str) -> list[str]:
    """Delete a folder and all in it; what could not be deleted comes back."""
    try:
        top = _open(path, None)
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"{path}: {error.strerror}"]
    try:
        left = _empty(top)
    finally:
        os.close(top)
    try:
        os.rmdir(path)
    except OSError as error:
        left.append(f"{path}: {error.strerror}")
    return left


def _empty(top: int) -> list[str]:
    left: dict[str, str] = {}
    moved = 0
    while True:
        names = [name for name in os.listdir(top) if name not in left]
        if not names:
            return [f"{name!r}: {why}" for name, why in left.items()]
        for name in names:
            try:
                if not _is_folder(name, top):
                    os.unlink(name, dir_fd=top)
                    continue
                fd = _open(name, top)
                try:
                    for inner in os.listdir(fd):
                        if _is_folder(inner, fd):
                            moved += 1
                            _move_up(inner, fd, f".sublet-{moved}", top)
                        else:
                            os.unlink(inner, dir_fd=fd)
                finally:
                    os.close(fd)
                os.rmdir(name, dir_fd=top)
            except FileExistsError:
                continue  # the tenant had that name too: the next round takes the next number
            except OSError as error:
                left[name] = error.strerror or str(error)


def _move_up(name: str, folder: int, target: str, top: int) -> None:
    try:
        os.stat(target, dir_fd=top, follow_symlinks=False)
    except FileNotFoundError:
        _make_writable(name, folder)  # its `..` changes, which takes write permission on itself
        os.rename(name, target, src_dir_fd=folder, dst_dir_fd=top)
    else:
        raise FileExistsError(target)


def _is_folder(name: str, folder: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)


def _open(name: str, folder: int | None) -> int:
    _make_writable(name, folder)
    return os.open(name, _FOLDER, dir_fd=folder)


def _make_writable(name: str, folder: int | None) -> None:
    """A tenant may have taken away their own permission; the owner may give it back."""
    mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    if stat.S_ISDIR(mode) and mode & 0o700 != 0o700:
        os.chmod(name, 0o700, dir_fd=folder)  # a swap for a link between the two needs a process
