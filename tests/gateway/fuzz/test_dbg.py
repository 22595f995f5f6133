"""A fuzzer on raw sockets, for a bounded time: SUBLET_FUZZ_SECONDS (5), or `make soak` (600).

Several attackers at once send requests that are broken at random places, cut, late, half-closed or
reset, while a client that is in order asks all along. What must hold: the gateway lives, every
answer is HTTP, the client in order gets its own answers and no others', memory stays bounded.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest

from .conftest import Target
from .defects import DEFECTS
from .wire import SMUGGLED, Chat, Malformed, Wire, cut

SECONDS = float(os.environ.get("SUBLET_FUZZ_SECONDS", "5"))
SOAK_SECONDS = 600.0
ATTACKERS = 4
GROWTH_MB = 48
STATUSES = frozenset(
    {200, 204, 400, 401, 402, 403, 404, 405, 408, 413, 417, 429, 431, 500, 501, 503}
)
ODD = (
    b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b"0", b"-1", b"\xff", b"Content-Length: 3\r\n",
    b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n", b"HTTP/1.0", b"Connection: close\r\n",
    b"Expect: 100-continue\r\n", b"\r\n\r\n", b"{", b'"', b"stream", b"GET / HTTP/1.1\r\n\r\n",
)  # fmt: skip
# A smuggled request would be lawful where a change took away what hid it.
BROKEN = [
    made()
    for made in DEFECTS.values()
    if b"prompt=%d" % SMUGGLED not in made() and len(made()) < 10_000
]


def a_chat(rng: random.Random) -> Chat:
    return Chat(
        rng.randrange(1, 60),
        is_stream=rng.random() < 0.5,
        chunk_sizes=tuple(rng.randrange(1, 80) for _ in range(rng.randrange(0, 3))),
        is_upper=rng.random() < 0.3,
    )


def change(rng: random.Random, data: bytes) -> bytes:
    """The same with a few things wrong."""
    made = bytearray(data)
    for _ in range(rng.randrange(0, 4)):
        at = rng.randrange(len(made) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(made):
            made[at] = rng.randrange(256)
        elif kind == 1:
            made[at:at] = rng.choice(ODD)
        elif kind == 2:
            del made[at : at + rng.randrange(1, 30)]
        elif kind == 3:
            made[at:at] = made[at : at + rng.randrange(1, 200)]
        else:
            made[at : at + 2] = made[at : at + 2][::-1]
    return bytes(made)


@dataclass
class Fight:
    target: Target
    until: float
    seen: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def attack(self, seed: int) -> None:
        rng = random.Random(seed)
        number = 0
        while time.monotonic() < self.until and not self.failures:
            number += 1
            state = rng.getstate()
            try:
                self._one(rng)
            except Exception as error:
                rng.setstate(state)
                self.failures.append(
                    f"seed {seed}, attack {number}: {error!r}\n{self._data(rng)!r}"
                )

    def _data(self, rng: random.Random) -> bytes:
        parts = [a_chat(rng).bytes() for _ in range(rng.randrange(1, 4))]
        if rng.random() < 0.4:
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(BROKEN))
        return change(rng, b"".join(parts))

    def _one(self, rng: random.Random) -> None:
        data = self._data(rng)
        pieces = list(cut(data, [rng.randrange(1 << 16) for _ in range(rng.randrange(0, 6))]))
        with Wire(self.target.port) as wire:
            wire.socket.settimeout(0.2)
            for piece in pieces:
                wire.send(piece)
                if rng.random() < 0.2:
                    time.sleep(rng.random() * 0.01)
            end = rng.randrange(5)
            self.dbg=(end,len(pieces),[len(p) for p in pieces])
            if end == 0:
                wire.abort()
                return
            if end == 1:
                return  # Closed, and nothing was read.
            if end == 2:
                wire.half_close()
            try:
                while (answer := wire.answer()) is not None:
                    self.seen[answer.status] += 1
                    assert answer.status in STATUSES, answer
                    if end == 3 and rng.random() < 0.5:
                        wire.abort()
                        return
            except TimeoutError:
                pass  # It waits for the rest of a request.
            except Malformed as error:
                # Who closes its side is taken for gone, and what it waited for is stopped.
                if end != 2 or "in the middle" not in str(error):
                    raise

    def behave(self, seed: int) -> None:
        """Ask in order all along, on connections that are kept and on fresh ones."""
        rng = random.Random(seed)
        wire: Wire | None = None
        while time.monotonic() < self.until and not self.failures:
            if wire is None or rng.random() < 0.1:
                if wire is not None:
                    wire.socket.close()
                wire = Wire(self.target.port)
            chats = [a_chat(rng) for _ in range(rng.randrange(1, 4))]
            try:
                wire.send(b"".join(chat.bytes() for chat in chats))
                answers = wire.answers(len(chats))
                assert [answer.status for answer in answers] == [200] * len(chats)
                assert [answer.words for answer in answers] == [chat.words for chat in chats]
            except Exception as error:
                self.failures.append(f"a client in order: {error!r}, asked {chats}")
            self.seen[-1] += len(chats)
        if wire is not None:
            wire.socket.close()


def fight(target: Target, seconds: float, seed: int) -> Fight:
    target.check()
    before = target.memory_mb()
    made = Fight(target, time.monotonic() + seconds)
    threads = [
        threading.Thread(target=made.attack, args=(seed + number,)) for number in range(ATTACKERS)
    ]
    threads.append(threading.Thread(target=made.behave, args=(seed,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not made.failures, "\n".join([*made.failures, target.gateway.said()[-3000:]])
    target.await_quiet()
    target.check()
    assert target.memory_mb() - before < GROWTH_MB
    return made


def test_attacked_for_a_while(target: Target) -> None:
    made = fight(target, SECONDS, seed=1)
    assert made.seen[-1] > 20, "the client in order was served"
    assert made.seen[200], "some attacks were lawful"
    assert made.seen[400], "some were not"


@pytest.mark.soak
@pytest.mark.timeout(SOAK_SECONDS * 2)
def test_attacked_for_long(target: Target) -> None:
    for seed in range(1000, 1000 + int(SOAK_SECONDS), 30):
        fight(target, 30, seed=seed * 10)
