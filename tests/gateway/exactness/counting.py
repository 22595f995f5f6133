"""The mock as a process whose counts outlive it: what it made lies in a mapped file.

    python tests/gateway/exactness/counting.py SOCKET COUNTS

A row a request, written as its tokens are: kill -9 takes nothing of it back. A later process on the
same file goes on behind the rows that are there.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import signal
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(os.fspath(Path(__file__).parents[1]))

import mock_server

ROWS = 1 << 19
HEAD = struct.Struct("<Q")
ROW = struct.Struct("<40sQIIB")
ROW_SIZE = 64
ENDS = ("open", "whole", "gone", "died", "cut", "error")


@dataclass(frozen=True, slots=True)
class Made:
    """One request as a mock met it."""

    id: str
    begun_us: int
    prompt: int
    made: int
    end: str


def read_counts(path: Path) -> Iterator[Made]:
    """Every row, in the order in which requests came."""
    with path.open("rb") as file:
        (rows,) = HEAD.unpack(file.read(HEAD.size))
        for number in range(rows):
            file.seek(ROW_SIZE * (number + 1))
            name, begun_us, prompt, made, end = ROW.unpack(file.read(ROW.size))
            yield Made(name.rstrip(b"\0").decode(), begun_us, prompt, made, ENDS[end])


class Counts:
    """The mapped file."""

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, (ROWS + 1) * ROW_SIZE)
        self._map = mmap.mmap(descriptor, (ROWS + 1) * ROW_SIZE)
        os.close(descriptor)

    def add(self) -> int:
        """The place of a new row."""
        (rows,) = HEAD.unpack_from(self._map)
        assert rows < ROWS, "the file of counts is full"
        HEAD.pack_into(self._map, 0, rows + 1)
        return int(rows + 1) * ROW_SIZE

    def write(self, at: int, name: bytes, begun_us: int, entry: dict[str, Any]) -> None:
        end = ENDS.index(entry["end"])
        ROW.pack_into(self._map, at, name, begun_us, entry["prompt"], entry["made"], end)


class Entry(dict[str, Any]):
    """What the mock counts of a request; each change is written through."""

    def __init__(self, counts: Counts, name: str, prompt: int) -> None:
        super().__init__(made=0, prompt=prompt, end="open")
        self._counts, self._name, self._at = counts, name.encode(), counts.add()
        self._begun_us = time.time_ns() // 1000
        counts.write(self._at, self._name, self._begun_us, self)

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        self._counts.write(self._at, self._name, self._begun_us, self)


class CountingServer(mock_server.MockServer):
    def __init__(self, path: str, counts: Path) -> None:
        super().__init__(path)
        self._counts = Counts(counts)

    def begin(self, request_id: str, prompt: int) -> Entry:
        self.prompt += prompt
        self.open += 1
        return Entry(self._counts, request_id, prompt)


async def main(path: str, counts: str) -> None:
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    async with CountingServer(path, Path(counts)):
        await ended.wait()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main(sys.argv[1], sys.argv[2]))
