"""The spool's form on disk: files of framed lines, so that a torn end is known for one.

    <folder>/<epoch>/<number, eight digits>.spool     one frame a line:
    crc32 of the body, eight hexadecimal digits, a space, the body (JSON, no line break), a line break

A frame whose check fails at the end of the last file was being written when its gateway died and
was never acknowledged to anybody; anywhere else it is damage, and is refused aloud.
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
    """After the last sound frame of this file; more than 0 is only a fault once nobody writes it."""
    is_last: bool
    """No later file exists."""


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
        """The next frames; an empty batch where there are none yet. A file that ends is followed
        by the next one."""
        files = self.files()
        if not files:
            return Batch(bodies=(), file=file, offset=offset, torn_bytes=0, is_last=True)
        if file not in files and all(number > file for number in files):
            file, offset = files[0], 0
        while True:
            later = [number for number in files if number > file]
            data = self._bytes(file, offset, most_bytes)
            bodies, used = read_frames(data)
            if not bodies and not data and later:
                file, offset = later[0], 0
                continue
            return Batch(
                bodies=tuple(bodies),
                file=file,
                offset=offset + used,
                torn_bytes=len(data) - used if len(data) < most_bytes else 0,
                is_last=not later,
            )

    def _bytes(self, file: int, offset: int, most: int) -> bytes:
        with (self._folder / file_name(file)).open("rb") as source:
            source.seek(offset)
            return source.read(most)

    def frames(self, file: int = 0, offset: int = 0) -> Iterator[bytes]:
        """Every sound frame from a position to the present end."""
        while True:
            batch = self.read(file, offset)
            if not batch.bodies:
                return
            yield from batch.bodies
            file, offset = batch.file, batch.offset
