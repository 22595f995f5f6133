"""One request as several upstream ones: `n` choices from a server that counts only the first.

Each leg asks for one choice on a connection of its own, all on one replica. The input is billed
once, as the field does; the outputs add up. The first leg that fails ends the request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sublet.base.kernel.clock import read_boot_ns
from sublet.gateway.errors import Refusal
from sublet.gateway.upstream import Replica, Upstream, dial

CARRY_LIMIT = 8 << 20

if TYPE_CHECKING:
    from sublet.gateway.exchange import Exchange


class Legs:
    """All legs of one request."""

    __slots__ = ("bodies", "exchange", "is_over", "legs", "replica")

    def __init__(self, exchange: Exchange, replica: Replica, number: int) -> None:
        self.exchange = exchange
        self.replica = replica
        self.is_over = False
        self.bodies: list[bytes | None] = [None] * number
        self.legs = [Leg(self, index) for index in range(number)]
        # One slot is counted by the exchange itself.
        replica.inflight += number - 1
        for leg in self.legs:
            exchange.g.spawn(leg.begin())

    def close(self) -> None:
        """Whatever still runs stops at once."""
        if self.is_over:
            return
        self.is_over = True
        self.replica.inflight -= len(self.legs) - 1
        for leg in self.legs:
            if leg.up is not None:
                leg.up.close()

    def connections(self) -> list[Upstream | None]:
        return [leg.up for leg in self.legs]

    def ended(self, index: int, body: bytes) -> None:
        """A leg is complete; with the last of them the answer is."""
        exchange = self.exchange
        if exchange.p.stream:
            if exchange.events is None or not exchange.events.leg_is_done(index):
                self.failed("a model server ended the stream before its end")
            return
        self.bodies[index] = body
        bodies = [found for found in self.bodies if found is not None]
        if len(bodies) < len(self.bodies):
            return
        self.close()
        exchange.legs = None
        try:
            answer, counts = exchange.p.join(bodies, exchange.tier)
        except ValueError:
            exchange.interrupted("its answer could not be read")
            return
        exchange.answer(answer, counts)

    def failed(self, why: str) -> None:
        if self.is_over:
            return
        self.close()
        self.exchange.legs = None
        self.exchange.interrupted(why)

    def refused(self, status: int, body: bytes) -> None:
        self.close()
        self.exchange.legs = None
        self.exchange.refused(status, body)

    def streamed(self, index: int, data: bytes) -> None:
        """Whole events of one leg, with its own index, into the one stream."""
        exchange = self.exchange
        if exchange.first_us is None:
            exchange.first_us = exchange.g.now_us()
        events = exchange.events
        if events is None:
            events = exchange.events = exchange.p.events(exchange.tier, exchange.rid)
        out = events.feed(data, index)
        if events.is_done:
            self.close()
            exchange.legs = None
        exchange.pass_on(events, out)


class Leg:
    """One of them: an `upstream.Reader`."""

    __slots__ = ("carry", "index", "legs", "status", "up")

    def __init__(self, legs: Legs, index: int) -> None:
        self.legs = legs
        self.index = index
        self.up: Upstream | None = None
        self.carry = b""
        self.status = 0

    async def begin(self) -> None:
        legs = self.legs
        up = await connect(legs.exchange, legs.replica)
        if up is None:
            legs.failed("no connection")
            return
        if legs.is_over:
            up.close()
            return
        self.up = up
        exchange = legs.exchange
        body = exchange.p.render(exchange.cap, self.index)
        up.send(self, request_head(exchange.p.path, exchange.rid, len(body)), body)

    def answered(self, up: Upstream, status: int, is_stream: bool) -> None:
        if status != 200 or is_stream is not self.legs.exchange.p.stream:
            self.status = status
            up.is_stream = False

    def streamed(self, data: bytes, chunk: bytes = b"") -> None:
        data = self.carry + data
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            end = 0
        self.carry = data[end:]
        if len(self.carry) > CARRY_LIMIT:
            self.legs.failed("an event of the model server is too long")
            return
        if not end:
            return
        self.legs.streamed(self.index, data[:end])

    def ended(self, up: Upstream, body: bytes) -> None:
        self.up = None
        if self.status:
            self.legs.refused(self.status, body)
        else:
            self.legs.ended(self.index, body)

    def lost(self, up: Upstream, why: str) -> None:
        self.up = None
        self.legs.failed(why)


class Counting:
    """A question before the request: how many tokens its input has. An `upstream.Reader`.

    Asked only where the bound of the input and the cap together pass the context: then only the
    engine knows whether they fit, and would stop in the middle rather than refuse.
    """

    __slots__ = ("exchange", "is_over", "replica", "status", "up")

    def __init__(self, exchange: Exchange, replica: Replica) -> None:
        self.exchange = exchange
        self.replica = replica
        self.up: Upstream | None = None
        self.status = 200
        self.is_over = False
        exchange.g.spawn(self._begin())

    async def _begin(self) -> None:
        up = await connect(self.exchange, self.replica)
        if up is None:
            self._lost("no connection")
            return
        if self.is_over:
            up.close()
            return
        self.up = up
        p = self.exchange.p
        body = p.count_body()
        up.send(self, request_head(p.count_path, self.exchange.rid, len(body)), body)

    def close(self) -> None:
        self.is_over = True
        if self.up is not None:
            self.up.close()

    def connections(self) -> list[Upstream | None]:
        return [self.up]

    def _lost(self, why: str) -> None:
        if not self.is_over:
            self.is_over = True
            self.exchange.legs = None
            self.exchange.interrupted(why)

    def answered(self, up: Upstream, status: int, is_stream: bool) -> None:
        self.status = status
        up.is_stream = False

    def streamed(self, data: bytes, chunk: bytes = b"") -> None:
        """Never: it is read whole."""

    def ended(self, up: Upstream, body: bytes) -> None:
        self.up = None
        self.is_over = True
        exchange = self.exchange
        exchange.legs = None
        try:
            exchange.p.counted(self.status, body)
        except Refusal as refusal:
            exchange.refuse(refusal)
            return
        exchange.send(self.replica)

    def lost(self, up: Upstream, why: str) -> None:
        self.up = None
        self._lost(why)


async def connect(exchange: Exchange, replica: Replica) -> Upstream | None:
    """A connection from the pool, or a new one; None: the replica cannot be reached."""
    if replica.idle and replica not in exchange.tries:
        return replica.idle.popitem()[0]
    try:
        return await dial(replica)
    except (OSError, TimeoutError, ValueError):
        replica.failed(read_boot_ns())
        return None


def request_head(path: bytes, rid: bytes, length: int) -> bytes:
    """The head of a request to a model server."""
    return (
        b"POST %b HTTP/1.1\r\nhost: replica\r\ncontent-type: application/json\r\n"
        b"x-request-id: %b\r\ncontent-length: %d\r\n\r\n" % (path, rid, length)
    )
