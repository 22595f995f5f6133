"""The spool's form on disk: files of framed lines, so that a torn end is known for one.

    <folder>/<epoch>/<number, eight digits>.spool     one frame a line:
    crc32 of the body, eight hexadecimal digits, a space, the body (JSON, no line break), a line break

A file may end in a torn frame: its gateway died as it wrote, or the write failed, could not be taken
back, and was repeated whole in the next file. Neither was acknowledged to anybody. So what is torn
at the end of a file is passed over once there is a later file. With a sound frame behind it, it is
damage: the reader stays before it and says so. A frame may be there twice, after a write that failed
late: events are told apart by their ids.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SUFFIX = ".spool"


def frame(body: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(body), body)


def read_frames(data: bytes) -> tuple[list[bytes], int]:
    """Whole sound frames from the start of `data`, and how many bytes they take.

    Stops before the first line that is not whole or does not check.
    """
    bodies: list[bytes] = []
    at = 0
    while True:
        end = data.find(b"\n", at)
        if end < 0:
            return bodies, at
        line = data[at:end]
        body = line[9:]
        if line[8:9] != b" " or line[:8] != b"%08x" % zlib.crc32(body):
            return bodies, at
        bodies.append(body)
        at = end + 1


def file_name(number: int) -> str:
    return f"{number:08d}{SUFFIX}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Frames read in a row, and the position to go on from once they are kept."""

    bodies: tuple[bytes, ...]
    file: int
    offset: int
    torn_bytes: int
    """After the last sound frame of this file, when nothing else is left of it. In the last file
    they may become a frame yet, as long as its gateway lives; elsewhere they are damage."""
    is_last: bool
    """No later file exists."""
    passed_bytes: int = 0
    """Torn at the ends of files before this one, and passed over to come here."""


class SpoolReader:
    """Reads one epoch's folder from a position on. Holds no state but the folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def files(self) -> list[int]:
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:
            return []
        return sorted(int(n[: -len(SUFFIX)]) for n in names if n.endswith(SUFFIX))

    def read(self, file: int, offset: int, *, most_bytes: int = 4 << 20) -> Batch:
        """The next frames; an empty batch where there are none yet.

        A file that ends is followed by the next one, also where its end is torn. A position beyond
        a file's end is one at its end: what was read there was taken back after a write that failed,
        and comes again in the next file.
        """
        files = self.files()
        if not files:
            return Batch(bodies=(), file=file, offset=offset, torn_bytes=0, is_last=True)
        if file not in files and all(number > file for number in files):
            file, offset = files[0], 0
        passed = 0
        while True:
            # Listed before it is read: a file that has a later one is not written any more.
            later = [number for number in files if number > file]
            data = self._bytes(file, offset, most_bytes)
            bodies, used = read_frames(data)
            if not bodies and len(data) == most_bytes:
                data = self._bytes(file, offset, -1)
                bodies, used = read_frames(data)
            if not bodies and later and not _has_frame(data):
                passed += len(data)
                file, offset = later[0], 0
                continue
            return Batch(
                bodies=tuple(bodies),
                file=file,
                offset=offset + used,
                torn_bytes=0 if bodies else len(data),
                is_last=not later,
                passed_bytes=passed,
            )

    def _bytes(self, file: int, offset: int, most: int) -> bytes:
        with (self._folder / file_name(file)).open("rb") as source:
            source.seek(offset)
            return source.read(most)

    def frames(self, file: int = 0, offset: int = 0) -> Iterator[bytes]:
        """Every sound frame from a position to the present end, or to the first damage."""
        while True:
            batch = self.read(file, offset)
            if not batch.bodies:
                return
            yield from batch.bodies
            file, offset = batch.file, batch.offset


def _has_frame(data: bytes) -> bool:
    """Whether a whole sound frame lies behind the first line."""
    at = data.find(b"\n") + 1
    while at:
        end = data.find(b"\n", at) + 1
        if end and read_frames(data[at:end])[0]:
            return True
        at = end
    return False
