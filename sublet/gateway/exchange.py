"""One request, from its first byte to its settled row.

    admit → hold → replica → forward → counters → settle → row on disk → last bytes

What can be refused is refused before the first byte. After it a stream that cannot go on ends with
an error event, and is billed for what was delivered. The last bytes of an answer leave when its row
is on disk, so that no answer is ever unbilled and no bill is without its answer.

The budget is some ten microseconds of Python a request and three a token: here a check costs more
than it looks. The body is parsed once; everything else is cut by byte search.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import orjson

from sublet.base.kernel.clock import read_boot_ns
from sublet.base.wire.gateway import Counts, Outcome, normalise
from sublet.gateway import errors
from sublet.gateway.dialects import Events, cut_usage, prepare, splice_first
from sublet.gateway.errors import Refusal
from sublet.gateway.legs import Counting, Legs
from sublet.gateway.purse import cost
from sublet.gateway.upstream import Replica, Upstream, dial

if TYPE_CHECKING:
    from sublet.gateway.edge import Downstream, Request
    from sublet.gateway.routes import Model
    from sublet.gateway.state import Gateway

STEP_TOKENS = 256
"""A stream holds its input and so many tokens, and takes more when half of them are made."""
ALLOWANCE_SECONDS = 2.0
"""How long a request waits for the answer when its key's purse is too small."""
TRIES = 3
"""Attempts before the first byte."""
CARRY_LIMIT = 8 << 20
NAMES_KEPT = 4096
DONE = b"data: [DONE]\n\n"
TIMINGS = b',"timings":{'
PREDICTED = b'"predicted_n":'
NOTHING = Counts(input_uncached=0, cache_read=0, output=0)


class Exchange:
    """The life of one request that is served by a model."""

    __slots__ = (
        "cap", "carry", "counts", "covered", "down", "events", "first_us", "g", "has_begun",
        "held", "held_tokens", "is_asking", "is_over", "known", "legs", "limits", "made", "model",
        "p", "price", "replica", "request", "rid", "soft", "started_us", "status", "tail", "tier",
        "timer", "tries", "up", "wrote_ns",
    )  # fmt: skip

    def __init__(self, g: Gateway, down: Downstream, request: Request) -> None:
        self.g = g
        self.down = down
        self.request = request
        self.rid = g.next_id()
        self.started_us = g.now_us()
        self.up: Upstream | None = None
        self.replica: Replica | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.events: Events | None = None
        self.legs: Legs | Counting | None = None
        self.counts: Counts | None = None
        self.first_us: int | None = None
        self.tries: tuple[Replica, ...] = ()
        self.carry = self.limits = self.tail = b""
        self.held = self.held_tokens = self.covered = self.made = self.status = self.wrote_ns = 0
        self.has_begun = self.is_over = self.is_asking = False

    # ---- admission -------------------------------------------------------------------------

    def start(self) -> None:
        """Decide, hold, forward. Every refusal is known before the first byte."""
        g, request = self.g, self.request
        try:
            known = self.known = g.identify(request)
            g.take_request(known)
            p = self.p = prepare(request.surface, request.body, g.routes.models)
            request.body = b""
            self.model = g.routes.models[p.route.name]
            g.check_model(known, p)
            self.tier = p.tier
            self.price = p.route.prices[p.tier]
            self.cap = p.cap
            self.limits = g.charge(known, p.input_estimate + p.cap * p.n)
        except Refusal as refusal:
            self.refuse(refusal)
            return
        if self._take(self._first_step()):
            self._place()
        else:
            self._ask()

    def _first_step(self) -> int:
        """All of it for an answer in one piece; a step of it for a stream."""
        output = self.cap * self.p.n
        return STEP_TOKENS if self.p.stream and output > STEP_TOKENS else output

    def _take(self, output: int) -> bool:
        """Hold the input and so much output, in place of what is held."""
        p, purse = self.p, self.known.purse
        micros = cost(self.price, p.input_estimate, 0, output)
        tokens = p.input_estimate + output
        if not purse.take(micros - self.held, tokens - self.held_tokens):
            return False
        self.held = micros
        self.held_tokens = tokens
        self.covered = output
        self.soft = output - (STEP_TOKENS >> 1) if output < self.cap * p.n else output
        self.g.ask_ahead(self.known)
        return True

    def _ask(self) -> None:
        """The purse is too small: ask for more, and wait a moment for the answer."""
        p = self.p
        output = self._first_step()
        self.is_asking = True
        self.timer = self.g.loop.call_later(ALLOWANCE_SECONDS, self._unanswered)
        self.g.ask(
            self.known,
            self,
            cost(self.price, p.input_estimate, 0, output) - self.held,
            p.input_estimate + output - self.held_tokens,
        )

    def allowance_came(self) -> None:
        """The purse has changed: take what is needed, or what there is, or say why not."""
        if not self.is_asking or self.is_over:
            return
        if self.replica is not None:
            self._topped_up()
            return
        if not self._take(self._first_step()):
            purse = self.known.purse
            if purse.denied is None:
                return  # The timer decides.
            output = self._affordable()
            if (output < self.p.n and self.cap > 0) or not self._take(output):
                self._stop_asking()
                self.refuse(self.g.denial(purse))
                return
            if not self.p.stream:
                self.cap = output // self.p.n
        self._stop_asking()
        self._place()

    def _affordable(self) -> int:
        """Output tokens that what is left pays for after the input, in whole choices."""
        p, purse = self.p, self.known.purse
        left = purse.left - cost(self.price, p.input_estimate, 0, 0)
        if left < 0:
            return 0
        output = self._first_step()
        if self.price.output_micros:
            output = min(output, left * 1_000_000 // self.price.output_micros)
        left_tokens = purse.left_tokens
        if left_tokens is not None:
            output = min(output, left_tokens - p.input_estimate)
        return max(output // p.n * p.n, 0)

    def _unanswered(self) -> None:
        self.timer = None
        if self.replica is not None:
            self.is_asking = False
            return
        self.g.stop_asking(self.known, self)
        self.is_asking = False
        self.refuse(self.g.denial(self.known.purse))

    def _stop_asking(self) -> None:
        self.is_asking = False
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        self.g.stop_asking(self.known, self)

    # ---- to a replica ----------------------------------------------------------------------

    def _place(self) -> None:
        """The least busy replica; none free: the model's queue."""
        replica = self.g.pick(self.model, self.tier)
        if replica is None:
            self.g.enqueue(self.model, self)
        else:
            self.placed(replica)

    def placed(self, replica: Replica) -> None:
        """A slot is ours: forward on a connection that is there, or on a new one."""
        self.replica = replica
        replica.inflight += 1
        self.wrote_ns = self.g.second_ns
        self.g.open[self] = None
        if self.p.needs_count:
            self.p.needs_count = False
            self.legs = Counting(self, replica)
        else:
            self.send()

    def send(self) -> None:
        """To the replica, on one connection or several."""
        replica = self.replica
        assert replica is not None
        if self.p.legs > 1:
            self.legs = Legs(self, replica, self.p.legs)
        elif replica.idle:
            self._forward(replica.idle.popitem()[0])
        else:
            self.g.spawn(self._dial(replica))

    async def _dial(self, replica: Replica) -> None:
        try:
            up = await dial(replica)
        except (OSError, TimeoutError):
            replica.failed(read_boot_ns())
            if not self.is_over:
                self._again("no connection")
            return
        if self.is_over:
            up.close()
        else:
            self._forward(up)

    def _forward(self, up: Upstream) -> None:
        self.up = up
        body = self.p.render(self.cap)
        up.send(
            self,
            b"POST %b HTTP/1.1\r\nhost: replica\r\ncontent-type: application/json\r\n"
            b"x-request-id: %b\r\ncontent-length: %d\r\n\r\n%b"
            % (self.p.path, self.rid, len(body), body),
        )

    def _again(self, why: str) -> None:
        """Before the first byte: another replica, or a fresh connection to the same one."""
        replica = self.replica
        assert replica is not None
        self._leave()
        self.up = self.legs = None
        self.tries = (*self.tries, replica)
        if len(self.tries) < TRIES:
            other = self.g.pick(self.model, self.tier, self.tries)
            if other is None and self.tries.count(replica) < 2:
                other = self.g.pick(self.model, self.tier)
            if other is not None:
                self.placed(other)
                return
        self.refuse(
            Refusal(
                503,
                "no_replica",
                f"No model server could answer this ({why}): try again.",
                retry_after_s=2,
            ),
            Outcome.FAILED,
        )

    def _leave(self) -> None:
        replica, self.replica = self.replica, None
        if replica is not None:
            replica.inflight -= 1
            self.g.open.pop(self, None)
            if self.model.waiting or replica.is_leaving:
                self.g.slot_free(self.model, replica)

    # ---- what the engine says: `upstream.Reader` ----------------------------------------------

    def answered(self, up: Upstream, status: int, is_stream: bool) -> None:
        if status != 200 or is_stream is not self.p.stream:
            self.status = status
            up.is_stream = False  # Whatever it is, it is read whole and mapped in `ended`.

    def ended(self, up: Upstream, body: bytes) -> None:
        self.up = None
        if self.status:
            self.refused(self.status, body)
        elif self.p.stream:
            self.cut(Outcome.INTERRUPTED, "The model server ended the stream before its end.")
        else:
            self._reply(body)

    def lost(self, up: Upstream, why: str) -> None:
        self.up = None
        if self.first_us is not None:
            self.cut(Outcome.INTERRUPTED, f"The stream was interrupted: {why}.")
            return
        # A connection that was used before may just have come to its idle end.
        if up.uses < 2 and self.replica is not None:
            self.replica.failed(read_boot_ns())
        self._again(why)

    def legs_failed(self, why: str) -> None:
        if self.first_us is None:
            self._again(why)
        else:
            self.cut(Outcome.INTERRUPTED, f"The stream was interrupted: {why}.")

    def refused(self, status: int, body: bytes) -> None:
        """The engine answered with an error, or with another kind of answer than was asked."""
        self.status = 0
        if (status >= 500 and status != 501) or status == 200:
            self._again(f"it answered {status}")
        else:
            self.refuse(self.p.refusal(status, body), Outcome.FAILED)

    def _reply(self, raw: bytes) -> None:
        try:
            body, counts = self.p.reply(raw, self.tier)
        except ValueError:
            self._again("its answer could not be read")
            return
        self.answer(body, counts)

    def answer(self, body: bytes, counts: Counts) -> None:
        """A whole answer: settled now, sent once its row is on disk."""
        self.first_us = self.g.now_us()
        self.counts = counts
        self.made = counts.output
        self.tail = b"%bcontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
            self._head(),
            len(body),
            body,
        )
        self._settle(Outcome.OK)

    def streamed(self, data: bytes) -> None:
        """A read of the engine's stream: whole events go on, the rest waits for the next read."""
        if self.carry:
            data = self.carry + data
            self.carry = b""
        if data[-2:] != b"\n\n":
            end = data.rfind(b"\n\n") + 2
            if end == 1:
                self.carry = data
                if len(data) > CARRY_LIMIT:
                    self.cut(Outcome.INTERRUPTED, "An event of the model server is too long.")
                return
            self.carry = data[end:]
            data = data[:end]
        if data[0] == 58 or b"\n:" in data:  # ":", a comment
            data = without_comments(data)
            if not data:
                return
        if self.p.is_parsed:
            self._rewrite(data)
            return
        if self.first_us is None:
            self.first_us = self.g.now_us()
            data = splice_first(data, self.tier)
        at = data.find(TIMINGS)
        if at >= 0:
            data = self._cut_timings(data, at)
        elif not self.p.is_counted:
            self.made += data.count(b"\n\n")
        if b'"usage":{' in data:
            data, usage = cut_usage(data, self.p.wants_usage)
            if usage is not None:
                self.counts = normalise(self.p.route.server, usage)
                self.made = self.counts.output
        if data[-14:] == DONE:
            self._finish(data)
        else:
            if data:
                self.write(data)
            if self.made >= self.soft:
                self._top_up()

    def _cut_timings(self, data: bytes, at: int) -> bytes:
        """Take each event's own count, and take it out: an object of numbers, so the next `}` ends
        it. Inside a string its quotes would be escaped, so it is never found there."""
        parts = []
        begin = 0
        while at >= 0:
            end = data.find(b"}", at) + 1
            parts.append(data[begin:at])
            n = data.find(PREDICTED, at, end)
            if n >= 0:
                self.made = int(data[n + 14 : data.find(b",", n, end)])
                if self.counts is None:
                    self._note_input(data[at + 11 : end])
            begin = end
            at = data.find(TIMINGS, end)
        parts.append(data[begin:])
        return b"".join(parts)

    def _note_input(self, timings: bytes) -> None:
        """The input as the engine counts it, for a stream that may be cut before its usage."""
        found = orjson.loads(timings)
        self.counts = Counts(
            input_uncached=found.get("prompt_n", 0), cache_read=found.get("cache_n", 0), output=0
        )

    def _rewrite(self, data: bytes) -> None:
        """The slow path: events are parsed and written anew."""
        if self.first_us is None:
            self.first_us = self.g.now_us()
        events = self.events
        if events is None:
            events = self.events = self.p.events(self.tier, self.rid)
        self.pass_on(events, events.feed(data))

    def pass_on(self, events: Events, out: bytes) -> None:
        self.made = events.made
        if events.counts is not None:
            self.counts = events.counts
        if events.is_done:
            self._finish(out)
            return
        if out:
            self.write(out)
        if self.made >= self.soft:
            self._top_up()

    # ---- holds while it runs -----------------------------------------------------------------

    def _top_up(self) -> None:
        """Hold more before the engine makes it; where there is no more, end with what is paid."""
        most = self.cap * self.p.n
        if self.covered >= most:
            self.soft = 1 << 62
            return
        if self._take(min(max(self.covered, self.made) + STEP_TOKENS, most)):
            return
        if self.made >= self.covered:
            self.cut(
                Outcome.CREDIT_EXHAUSTED,
                "The credit of this key is used up: add credit to go on.",
            )
            return
        self.soft = self.covered
        if not self.is_asking:
            self._ask_more()

    def _ask_more(self) -> None:
        self.is_asking = True
        self.g.ask(
            self.known,
            self,
            cost(self.price, 0, 0, STEP_TOKENS),
            STEP_TOKENS,
        )

    def _topped_up(self) -> None:
        self.is_asking = False
        self.g.stop_asking(self.known, self)
        self._take(min(self.covered + STEP_TOKENS, self.cap * self.p.n))

    # ---- to the client -----------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """A chunk of whole events, with the head before the first of them."""
        t = self.down.t
        if t is None:
            return
        if not self.has_begun:
            self.has_begun = True
            t.write(self._stream_head() + self._chunk(data))
        elif self.down.is_chunked:
            t.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            t.write(data)
        self.wrote_ns = self.g.second_ns

    def _chunk(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self.down.is_chunked else data

    def hold_back(self, is_stalled: bool) -> None:
        """The client does not keep up: neither does its engine, until it does again."""
        ups = [self.up] if self.legs is None else self.legs.connections()
        for up in ups:
            if up is not None:
                if is_stalled:
                    up.pause()
                else:
                    up.resume()

    def ping(self) -> None:
        """Nothing came for a while: say that the request lives, between events."""
        if self.p.stream and not self.is_over and self.replica is not None:
            self.write(self.p.ping)

    def _head(self) -> bytes:
        g = self.g
        return b"HTTP/1.1 200 OK\r\n%b%bx-request-id: %b\r\n%b%b" % (
            g.date,
            self.down.connection,
            self.rid,
            g.served_by(self.p.route, self.tier),
            self.limits,
        )

    def _stream_head(self) -> bytes:
        framing = b"transfer-encoding: chunked\r\n\r\n" if self.down.is_chunked else b"\r\n"
        return (
            self._head()
            + b"content-type: text/event-stream\r\ncache-control: no-cache\r\n"
            + b"x-accel-buffering: no\r\n"
            + framing
        )

    # ---- the end ---------------------------------------------------------------------------

    def _finish(self, data: bytes) -> None:
        """The stream is whole: its last events leave once its row is on disk."""
        up, self.up = self.up, None
        if up is not None:
            up.let_go()
        tail = self._chunk(data)
        if self.down.is_chunked:
            tail += b"0\r\n\r\n"
        self.tail = tail if self.has_begun else self._stream_head() + tail
        self.has_begun = True
        self._settle(Outcome.OK)

    def cut(self, outcome: Outcome, message: str) -> None:
        """After the first byte: an error event, no end mark, and the bill so far."""
        self._let_engine_go()
        if not self.has_begun and not self.p.stream:
            self.refuse(Refusal(503, "stream_interrupted", message, retry_after_s=2), outcome)
            return
        code = "credit_exhausted" if outcome is Outcome.CREDIT_EXHAUSTED else "stream_interrupted"
        events = self.events or self.p.events(self.tier, self.rid)
        tail = self._chunk(events.fail(code, message))
        self.tail = tail if self.has_begun else self._stream_head() + tail
        if self.down.is_chunked:
            self.tail += b"0\r\n\r\n"
        self.has_begun = True
        self.down.is_last = True
        self._settle(outcome)

    def shut(self) -> None:
        """The gateway ends: what cannot be finished is cut, and billed so far."""
        if not self.is_over:
            self.cut(Outcome.INTERRUPTED, "This gateway is being restarted: try again.")

    def client_gone(self) -> None:
        """Nobody listens: the engine stops at once; what it had told of is billed."""
        if self.is_over:
            return
        self._let_engine_go()
        if self.is_asking:
            self._stop_asking()
        if self.replica is None:
            self.g.forget(self.model_or_none(), self)
            self._close_unbilled()
        else:
            self.tail = b""
            self._settle(Outcome.CLIENT_GONE)

    def model_or_none(self) -> Model | None:
        return getattr(self, "model", None)

    def refuse(self, refusal: Refusal, outcome: Outcome | None = None) -> None:
        """An error answer in place of the reply. `outcome`: an engine was asked, so there is a row
        (of nothing billed)."""
        self._let_engine_go()
        self.g.refused(refusal.code)
        if self.has_begun:
            self.cut(Outcome.FAILED, refusal.message)  # The head left with a keep-alive.
            return
        body = errors.body(self.request.surface, refusal)
        tail = self.down.error(refusal, body, self.rid, self.limits)
        if outcome is None:
            self._close_unbilled()
            self.down.answer(self, tail)
            return
        self.tail = tail
        self.counts = NOTHING
        self._settle(outcome)

    def _let_engine_go(self) -> None:
        up, self.up = self.up, None
        if up is not None:
            up.close()
        legs, self.legs = self.legs, None
        if legs is not None:
            legs.close()

    def _close_unbilled(self) -> None:
        self.is_over = True
        if self.held or self.held_tokens:
            self.known.purse.settle(self.held, self.held_tokens, 0, 0)
            self.held = self.held_tokens = 0
        self._leave()

    def _settle(self, outcome: Outcome) -> None:
        """The bill: what was counted, within what is held. Then its row, then the last bytes."""
        self.is_over = True
        g, p, purse = self.g, self.p, self.known.purse
        replica = self.replica or self.tries[-1]
        if self.is_asking:
            self._stop_asking()
        counts = self.counts or NOTHING
        uncached, cached = counts.input_uncached, counts.cache_read
        output = made = self.made
        if outcome is Outcome.FAILED:
            uncached = cached = output = 0
        elif output > self.covered:
            # Several steps came in one read. What cannot be held any more is the owner's loss.
            self._take(min(output, self.cap * p.n))
            output = min(output, self.covered)
        spent = cost(self.price, uncached, cached, output)
        if spent > self.held:
            # The engine counts more input than can be: never more than was held.
            cached = min(cached, p.input_estimate)
            uncached = min(uncached, p.input_estimate - cached)
            spent = min(cost(self.price, uncached, cached, output), self.held)
        tokens = uncached + cached + output
        purse.settle(self.held, self.held_tokens, spent, tokens)
        self.held = self.held_tokens = 0
        g.give_back(self.known, p.input_estimate + p.cap * p.n - tokens)
        row = b'{"id":"%b",%b,"outcome":"%b","started_us":%d,"ended_us":%d,"first_us":%b,"input_uncached":%d,"cache_read":%d,"output":%d,"made":%d,"micros":%d,"is_inconsistent":%b}' % (
            self.rid,
            self._named(replica),
            outcome.encode(),
            self.started_us,
            g.now_us(),
            b"null" if self.first_us is None else b"%d" % self.first_us,
            uncached,
            cached,
            output,
            made,
            spent,
            b"true" if counts.is_inconsistent else b"false",
        )  # fmt: skip
        self._leave()
        g.spool.append(row, self._on_disk)

    def _on_disk(self) -> None:
        self.down.answer(self, self.tail)

    def _named(self, replica: Replica) -> bytes:
        """The members of a usage event that name who, what and where: alike for many requests."""
        key = (self.known.key_id, self.price.version, self.p.surface, replica.id)
        found = self.g.names.get(key)
        if found is None:
            route = self.p.route
            named = {
                **self.known.payer,
                "model": route.name,
                "deployment_id": route.deployment_id,
                "replica_id": replica.id,
                "surface": self.p.surface,
                "tier": self.tier,
                "price_version": self.price.version,
            }
            if len(self.g.names) >= NAMES_KEPT:
                self.g.names.clear()
            found = self.g.names[key] = orjson.dumps(named)[1:-1]
        return found

    def open_row(self) -> bytes:
        """As it stands, for the file of what was open when a gateway died: lost, and free."""
        assert self.replica is not None
        return (
            b'{"id":"%b",%b,"outcome":"lost","started_us":%d,"ended_us":%d,"first_us":%b,'
            b'"input_uncached":0,"cache_read":0,"output":0,"made":%d,"micros":0}'
            % (
                self.rid,
                self._named(self.replica),
                self.started_us,
                self.g.now_us(),
                b"null" if self.first_us is None else b"%d" % self.first_us,
                self.made,
            )
        )


def without_comments(events: bytes) -> bytes:
    """Whole events, less the lines that begin with a colon; an event of comments alone is none."""
    kept = []
    for event in events.split(b"\n\n"):
        lines = [line for line in event.split(b"\n") if line and not line.startswith(b":")]
        if lines:
            kept.append(b"\n".join(lines) + b"\n\n")
    return b"".join(kept)
