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

from sublet.base.kernel.clock import read_boot_ns
from sublet.base.wire.gateway import PER_TOKENS, Counts, Outcome, Price, normalise
from sublet.gateway import errors
from sublet.gateway.dialects import (
    TIMINGS,
    Events,
    Prepared,
    count_texts,
    cut_counters,
    cut_usage,
    input_of,
    prepare,
    splice_first,
    without_comments,
)
from sublet.gateway.errors import Refusal
from sublet.gateway.legs import Counting, Legs, request_head
from sublet.gateway.purse import cost
from sublet.gateway.upstream import Replica, Upstream, dial

if TYPE_CHECKING:
    from sublet.gateway.edge import Downstream, Request
    from sublet.gateway.routes import Known, Model
    from sublet.gateway.state import Gateway

STEP_TOKENS = 256
"""A stream holds its input and so many tokens, and takes more when half of them are made."""
ALLOWANCE_SECONDS = 2.0
"""How long a request waits for the answer when its key's purse is too small."""
TRIES = 3
"""Attempts before the first byte."""
CARRY_LIMIT = 8 << 20
NEVER = 1 << 62
THEIR_ID = b"request-id"
QUOTE = 34
DONE = b"data: [DONE]\n\n"
USAGE = b'"usage":{'
OUTCOMES = {outcome: outcome.value.encode() for outcome in Outcome}


class Exchange:
    """The life of one request that is served by a model."""

    __slots__ = (
        "cap", "carry", "charged", "counts", "covered", "down", "events", "first_us", "g",
        "has_begun", "heads", "held", "held_tokens", "is_asking", "is_left", "is_over", "is_starved", "known", "legs",
        "limits", "made", "model", "p", "passes_chunks", "price", "replica", "request", "rid", "soft", "started_us",
        "status", "tail", "tier", "timer", "tries", "up", "wrote_ns",
    )  # fmt: skip

    # Set as admission goes on: what is refused before has none of them.
    known: Known
    p: Prepared
    price: Price
    tier: str
    heads: tuple[bytes, bytes]
    """What the answer is headed with, in one piece and as a stream."""
    cap: int
    """Output tokens of each choice, as the engine is told."""
    soft: int
    """Tokens made at which more is held."""

    def __init__(self, g: Gateway, down: Downstream, request: Request) -> None:
        self.g = g
        self.down = down
        self.request = request
        self.rid = g.next_id()
        self.model: Model | None = None
        self.up: Upstream | None = None
        self.replica: Replica | None = None
        self.timer: asyncio.TimerHandle | None = None
        """Of the wait for an allowance, or of the wait in a queue."""
        self.events: Events | None = None
        self.legs: Legs | Counting | None = None
        self.counts: Counts | None = None
        self.first_us: int | None = None
        self.tries: tuple[Replica, ...] = ()
        self.carry = self.limits = self.tail = b""
        self.held = self.held_tokens = self.charged = self.covered = 0
        self.made = self.status = self.wrote_ns = self.started_us = 0
        self.has_begun = self.is_over = self.is_asking = self.is_starved = False
        self.is_left = self.passes_chunks = False

    # ---- admission -------------------------------------------------------------------------

    def start(self) -> None:
        """Decide, hold, forward. Every refusal is known before the first byte."""
        g, request = self.g, self.request
        now_ns = read_boot_ns()
        self.started_us = g.offset_us + now_ns // 1000
        try:
            known = self.known = g.identify(request, now_ns)
            g.take_request(known, now_ns)
            p = self.p = prepare(request.surface, request.body, g.routes.models)
            request.body = b""
            route = p.route
            tier = self.tier = p.tier
            if known.models is not None or tier not in route.prices:
                g.check_model(known, p)
            self.price = route.prices[tier]
            self.cap = p.cap
            charged = p.input_estimate + p.cap * p.n
            self.limits = g.charge(known, charged, now_ns)
            self.charged = charged
            if request.surface in errors.ANTHROPIC_SURFACES:
                self.limits += self._their_id()
            model = self.model = g.routes.models[route.name]
            self.heads = model.heads[tier]
        except Refusal as refusal:
            self.refuse(refusal)
            return
        if self._take(self._first_step(), now_ns):
            self._place()
        else:
            self._ask()

    def _first_step(self) -> int:
        """All of it for an answer in one piece; a step of it for a stream."""
        output = self.cap * self.p.n
        return STEP_TOKENS if output > STEP_TOKENS and self.p.stream else output

    def _take(self, output: int, begins_ns: int = 0) -> bool:
        """Hold the input and so much output, in place of what is held.

        `begins_ns`: now, for a request that begins; what runs goes on past an allowance's end.
        """
        p, purse = self.p, self.known.purse
        micros = cost(self.price, p.input_estimate, 0, output)
        tokens = p.input_estimate + output
        if not purse.take(micros - self.held, tokens - self.held_tokens, begins_ns):
            return False
        self.held = micros
        self.held_tokens = tokens
        self.covered = output
        self.soft = output - (STEP_TOKENS >> 1) if output < self.cap * p.n else output
        if purse.is_low or not begins_ns:
            ask = purse.want(0, 0, begins_ns or read_boot_ns())
            if ask is not None:
                self.g.control.ask(ask)
        return True

    def _ask(self) -> None:
        """The purse is too small: ask for more, and wait a moment for the answer."""
        self.is_asking = True
        self.timer = self.g.loop.call_later(ALLOWANCE_SECONDS, self._unanswered)
        self.g.ask(self.known, self, *self._lacking(self._first_step()))

    def _lacking(self, output: int) -> tuple[int, int]:
        """Micros and tokens that are to be held for so much output, beyond what is."""
        p = self.p
        micros = cost(self.price, p.input_estimate, 0, output) - self.held
        return micros, p.input_estimate + output - self.held_tokens

    def allowance_came(self) -> None:
        """The purse has changed: take what is needed, or what there is, or say why not."""
        if not self.is_asking or self.is_over:
            return
        if self.replica is not None:
            self._topped_up()
            return
        now_ns = read_boot_ns()
        output = self._first_step()
        if not self._take(output, now_ns):
            purse = self.known.purse
            if purse.denied is None:
                # Less than was asked for, and not the last word: there may be more.
                self.g.want(self.known, *self._lacking(output))
                return
            output = self._affordable(output)
            if (output < self.p.n and self.cap > 0) or not self._take(output, now_ns):
                self.refuse(self.g.denial(purse))
                return
            # The engine is not asked for more than the account affords.
            self.cap = output // self.p.n
        self.stop_waiting()
        self._place()

    def _affordable(self, most: int) -> int:
        """Output tokens, in whole choices, for which what is held and what is left pay."""
        p, purse = self.p, self.known.purse
        left = purse.left + self.held - cost(self.price, p.input_estimate, 0, 0)
        if left < 0:
            return 0
        output = most
        if self.price.output_micros:
            output = min(output, left * PER_TOKENS // self.price.output_micros)
        left_tokens = purse.left_tokens
        if left_tokens is not None:
            output = min(output, left_tokens + self.held_tokens - p.input_estimate)
        return max(output // p.n * p.n, 0)

    def _unanswered(self) -> None:
        """Nobody said in time whether there is more."""
        self.timer = None
        if self.replica is None:
            self.refuse(self.g.denial(self.known.purse))
        else:
            self._exhausted()

    def stop_waiting(self) -> None:
        """For an allowance, or in the queue: whatever it was, it is over."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        if self.is_asking:
            self.is_asking = False
            self.g.stop_asking(self.known, self)
        elif self.replica is None and self.model is not None:
            self.g.forget(self.model, self)

    # ---- to a replica ----------------------------------------------------------------------

    def _place(self) -> None:
        """The least busy replica; none free: the model's queue."""
        model = self.model
        assert model is not None
        replica = self.g.pick(model, self.tier)
        if replica is None:
            self.g.enqueue(model, self)
        else:
            self.placed(replica)

    def placed(self, replica: Replica) -> None:
        """A slot is ours: forward on a connection that is there, or on a new one."""
        self.replica = replica
        replica.inflight += 1
        g = self.g
        self.wrote_ns = g.second_ns
        g.open[self] = None
        p = self.p
        if p.needs_count:
            p.needs_count = False
            self.legs = Counting(self, replica)
        else:
            self.send(replica)

    def send(self, replica: Replica) -> None:
        """On one connection or several."""
        if self.p.legs > 1:
            self.legs = Legs(self, replica, self.p.legs)
            return
        if replica.idle and replica not in self.tries:
            self._forward(replica.idle.popitem()[0])
        else:
            # Where it was tried before, all that idle may be stale.
            self.g.spawn(self._dial(replica))

    async def _dial(self, replica: Replica) -> None:
        try:
            up = await dial(replica)
        except (OSError, TimeoutError, ValueError):
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
        p = self.p
        body = p.render(self.cap)
        # One write, so one packet; large bodies are not copied for it.
        up.send(self, request_head(p.path, self.rid, len(body)), body)

    def _again(self, why: str, *, is_stale: bool = False) -> None:
        """Before the first byte: another replica, or where the connection may just have come to its
        idle end, a new one to the same."""
        replica, model = self.replica, self.model
        assert replica is not None
        assert model is not None
        self.up = self.legs = None
        self.carry = b""
        self.status = 0
        self.tries = (*self.tries, replica)
        self._leave()
        if self.is_left:
            self._settle(Outcome.CLIENT_GONE, self.g.now_us())
            return
        if len(self.tries) < TRIES:
            other = self.g.pick(model, self.tier, self.tries)
            if other is None and is_stale and not replica.is_leaving:
                other = replica
            if other is not None:
                self.placed(other)
                return
            if self.g.has_other(model, self.tries):
                self.g.enqueue(model, self)
                return
        self.refuse(
            Refusal(
                503,
                "no_replica",
                f"No model server could answer this ({why}): try again.",
                retry_after_s=2,
            )
        )

    def _leave(self) -> None:
        replica = self.replica
        if replica is not None:
            self.replica = None
            replica.inflight -= 1
            del self.g.open[self]
            model = self.model
            if replica.is_leaving or (model is not None and model.waiting):
                assert model is not None
                self.g.slot_free(model, replica)

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
            self.interrupted("the model server ended it before its end")
        else:
            try:
                answer, counts = self.p.reply(body, self.tier)
            except ValueError:
                self._again("its answer could not be read")
                return
            self.answer(answer, counts)

    def lost(self, up: Upstream, why: str) -> None:
        self.up = None
        is_stale = up.uses > 1
        if not is_stale and self.replica is not None:
            self.replica.failed(read_boot_ns())
        self.interrupted(why, is_stale=is_stale)

    def interrupted(self, why: str, *, is_stale: bool = False) -> None:
        """The engine's answer broke off: before its first byte, or after it."""
        if self.first_us is None:
            self._again(why, is_stale=is_stale)
        else:
            self.cut(Outcome.INTERRUPTED, f"The stream was interrupted: {why}.")

    def refused(self, status: int, body: bytes) -> None:
        """The engine answered with an error, or with another kind of answer than was asked."""
        refusal = None if status == 200 else self.p.refusal(status, body)
        if refusal is None or refusal.status >= 500:
            self._again(f"it answered {status}")
        else:
            # The request is at fault, whatever status the engine has for that.
            self.refuse(refusal)

    def answer(self, body: bytes, counts: Counts) -> None:
        """A whole answer: settled now, sent once its row is on disk."""
        g = self.g
        now_us = self.first_us = g.offset_us + read_boot_ns() // 1000
        self.counts = counts
        self.made = counts.output
        self.tail = b"%b%b\r\n%b%b%b%d\r\n\r\n%b" % (
            g.ok,
            self.rid,
            self.down.connection,
            self.limits,
            self.heads[0],
            len(body),
            body,
        )
        self._settle(Outcome.CLIENT_GONE if self.is_left else Outcome.OK, now_us)

    def streamed(self, data: bytes, chunk: bytes = b"") -> None:
        """A read of the engine's stream: whole events go on, the rest waits for the next read."""
        if self.carry:
            data = self.carry + data
            self.carry = chunk = b""
        # An event of one line, and no comment, is what nearly all reads are: one search tells.
        if data.find(10) != len(data) - 2 or data[-1] != 10 or data[0] == 58:
            data = self._whole(data)
            chunk = b""
            if not data:
                return
        p = self.p
        if p.is_parsed:
            self._rewrite(data)
            return
        if self.first_us is None:
            self.first_us = self.g.now_us()
            data = splice_first(data, self.tier)
            chunk = b""
        if TIMINGS in data:
            chunk = b""
            if self.counts is None:
                self.counts = input_of(data)  # For a stream that may be cut before its usage.
            data, made = cut_counters(data)
            if made is not None:
                self.made = made
        elif not p.is_counted:
            if chunk:  # One event, in which one look is enough.
                at = data.find(p.text_mark)
                if at >= 0 and data[at + len(p.text_mark)] != QUOTE:
                    self.made += 1
            else:
                self.made += count_texts(data)
        if USAGE in data:
            chunk = b""
            data, usage = cut_usage(data, p.wants_usage)
            if usage is not None:
                counts = self.counts = normalise(p.route.server, usage)
                self.made = counts.output
        if data[-14:] == DONE:
            self._finish(data)
            return
        if chunk and self.passes_chunks:
            t = self.down.t
            if t is not None:
                t.write(chunk)  # As it came, framing and all.
                self.wrote_ns = self.g.second_ns
        elif data:
            self.write(data)
        if self.made >= self.soft:
            self._top_up()

    def _whole(self, data: bytes) -> bytes:
        """The whole events of a read, without comments. What is left of it is carried over."""
        end = data.rfind(b"\n\n") + 2
        if end == 1:
            end = 0
        if end < len(data):
            self.carry = data[end:]
            if len(self.carry) > CARRY_LIMIT:
                self.carry = b""
                self._let_engine_go()
                self.interrupted("an event of the model server is too long")
                return b""
            data = data[:end]
        if data[:1] == b":" or b"\n:" in data:
            data = without_comments(data)
        return data

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
        counts = events.counts
        if counts is not None:
            self.counts = counts
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
            self.soft = NEVER
            return
        wanted = min(max(self.covered, self.made) + STEP_TOKENS, most)
        if self._take(wanted):
            return
        self.soft = self.covered
        if self.made >= self.covered and not self.is_starved:
            # The answer is awaited with the engine held back: it makes little that nobody pays.
            self.is_starved = True
            self.hold_back()
            if self.timer is None:
                self.timer = self.g.loop.call_later(ALLOWANCE_SECONDS, self._unanswered)
        if not self.is_asking:
            self.is_asking = True
            self.g.ask(self.known, self, *self._lacking(wanted))

    def _topped_up(self) -> None:
        most = self.cap * self.p.n
        wanted = min(max(self.covered, self.made) + STEP_TOKENS, most)
        if not self._take(wanted):
            if self.known.purse.denied is None:
                self.g.want(self.known, *self._lacking(wanted))
                return
            rest = self._affordable(wanted)
            if rest > self.covered:
                self._take(rest)
            if self.made >= self.covered:
                self._exhausted()
                return
            self.soft = self.covered  # To the last token that is paid for.
        self.stop_waiting()
        if self.is_starved:
            self.is_starved = False
            if not self.down.is_stalled:
                self.go_on()

    def _exhausted(self) -> None:
        self.cut(
            Outcome.CREDIT_EXHAUSTED,
            "The credit of this key could not be extended in time: try again."
            if self.known.purse.denied is None
            else "The credit of this key is used up: add credit to go on.",
        )

    # ---- to the client -----------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """A chunk of whole events, with the head before the first of them."""
        down = self.down
        t = down.t
        if t is None:
            return
        if not self.has_begun:
            t.write(self._stream_head() + self._chunk(data))
        elif down.is_chunked:
            t.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            t.write(data)
        self.wrote_ns = self.g.second_ns

    def _chunk(self, data: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(data), data) if self.down.is_chunked else data

    def hold_back(self) -> None:
        """The client does not keep up: neither does its engine, until it does again."""
        for up in self._connections():
            if up is not None:
                up.pause()

    def go_on(self) -> None:
        if not self.is_starved:
            for up in self._connections():
                if up is not None:
                    up.resume()

    def _connections(self) -> list[Upstream | None]:
        return [self.up] if self.legs is None else self.legs.connections()

    def ping(self) -> None:
        """Nothing came for a while: say that the request lives, between events."""
        if (
            self.p.stream
            and not self.down.is_stalled
            and not isinstance(self.legs, Counting)  # It may still be refused.
        ):
            self.write(self.p.ping)

    def _stream_head(self) -> bytes:
        self.has_begun = True
        self.passes_chunks = self.down.is_chunked
        g, down = self.g, self.down
        if not down.is_chunked:
            down.ends_by_close()
        return b"%b%b\r\n%b%b%b%b" % (
            g.ok,
            self.rid,
            down.connection,
            self.limits,
            self.heads[1],
            b"transfer-encoding: chunked\r\n\r\n" if down.is_chunked else b"\r\n",
        )

    # ---- the end ---------------------------------------------------------------------------

    def _finish(self, data: bytes) -> None:
        """The stream is whole: its last events leave once its row is on disk."""
        up, self.up = self.up, None
        if up is not None:
            up.let_go()
        self._end(data)
        self._settle(Outcome.OK, self.g.now_us())

    def _end(self, data: bytes) -> None:
        """The last bytes of a stream, to be sent when it is settled."""
        head = b"" if self.has_begun else self._stream_head()
        end = b"0\r\n\r\n" if self.down.is_chunked else b""
        self.tail = b"".join((head, self._chunk(data), end))

    def cut(self, outcome: Outcome, message: str) -> None:
        """After the first byte: an error event, no end mark, and the bill so far. Where none has
        left, a refusal, and no bill."""
        self._let_engine_go()
        self.stop_waiting()
        if not self.has_begun:
            if outcome is Outcome.CREDIT_EXHAUSTED:
                self.refuse(self.g.denial(self.known.purse))
            else:
                self.refuse(Refusal(503, "stream_interrupted", message, retry_after_s=2))
            return
        code = "credit_exhausted" if outcome is Outcome.CREDIT_EXHAUSTED else "stream_interrupted"
        events = self.events or self.p.events(self.tier, self.rid)
        self._end(events.fail(code, message))
        self.down.ends_here()
        self._settle(outcome, self.g.now_us())

    def shut(self) -> None:
        """The gateway ends: what cannot be finished is cut, and billed so far."""
        if self.is_over:
            return
        why = "This gateway is being restarted: try again."
        if self.replica is None:
            self.refuse(Refusal(503, "unavailable", why, retry_after_s=2))
        else:
            self.cut(Outcome.INTERRUPTED, why)

    def fail(self) -> None:
        """A fault of ours: an error answer or an error event, and nothing billed."""
        if not self.is_over:
            self.refuse(Refusal(500, "unavailable", "This gateway made a mistake: try again."))

    def client_gone(self) -> None:
        """Nobody listens: the engine stops at once; what it had told of is billed. One that cannot be
        stopped is heard out, so that who hangs up takes neither its slot nor its work for nothing."""
        if self.is_over:
            return
        is_asked = self.up is not None or isinstance(self.legs, Legs)
        if is_asked and not self.p.stream and not self.p.route.stops_unstreamed:
            self.is_left = True
            return
        self._let_engine_go()
        self.stop_waiting()
        if self.replica is None:
            self._close_unbilled()
        else:
            self._settle(Outcome.CLIENT_GONE, self.g.now_us())

    def refuse(self, refusal: Refusal) -> None:
        """An error answer in place of the reply. Where an engine was asked there is a row of it, with
        nothing billed."""
        self._let_engine_go()
        self.stop_waiting()
        self.g.refused(refusal.code)
        if self.has_begun:
            self.cut(Outcome.FAILED, refusal.message)  # The head left with a keep-alive.
            return
        if not self.limits and hasattr(self, "known"):
            self.limits = self.g.limit_headers(self.known, read_boot_ns())
        surface = self.request.surface
        if surface in errors.ANTHROPIC_SURFACES and THEIR_ID not in self.limits:
            self.limits = (refusal.headers or self.limits) + self._their_id()
            refusal.headers = b""
        body = errors.body(surface, refusal)
        self.tail = self.down.error(refusal, body, self.rid, self.limits)
        if self.replica is None and not self.tries:
            self._close_unbilled()
            self._on_disk()
        else:
            self._settle(Outcome.FAILED, self.g.now_us())

    def _their_id(self) -> bytes:
        """The request's id where Anthropic's SDK looks for it."""
        return b"%b: %b\r\n" % (THEIR_ID, self.rid)

    def _let_engine_go(self) -> None:
        up, self.up = self.up, None
        if up is not None:
            up.close()
        legs, self.legs = self.legs, None
        if legs is not None:
            legs.close()

    def _close_unbilled(self) -> None:
        self.is_over = True
        if self.held_tokens or self.held:
            self.known.purse.settle(self.held, self.held_tokens, 0, 0)
            self.held = self.held_tokens = 0
        if self.charged:
            self.g.give_back(self.known, self.charged)

    def _settle(self, outcome: Outcome, now_us: int) -> None:
        """The bill: what was counted, within what is held. Then its row, then the last bytes."""
        self.is_over = True
        g, p, known = self.g, self.p, self.known
        replica = self.replica or self.tries[-1]
        if self.timer is not None or self.is_asking:
            self.stop_waiting()
        counts = self.counts
        output = made = self.made
        if counts is None:
            # Whole, and yet without any count of its input: nobody can be asked to pay for that.
            uncached = cached = 0
            is_odd = outcome is Outcome.OK
        else:
            uncached, cached, _, is_odd = counts
        if outcome is Outcome.FAILED:
            uncached = cached = output = 0
        elif output > self.covered:
            # Several steps came in one read. What cannot be held any more is the owner's loss.
            if not self._take(min(output, self.cap * p.n)):
                self._take(max(self._affordable(output), self.covered))
            output = min(output, self.covered)
        spent = cost(self.price, uncached, cached, output)
        if spent > self.held:
            # The engine counts more input than can be: never more than was held.
            cached = min(cached, p.input_estimate)
            uncached = min(uncached, p.input_estimate - cached)
            spent = min(cost(self.price, uncached, cached, output), self.held)
        tokens = uncached + cached + output
        known.purse.settle(self.held, self.held_tokens, spent, tokens)
        self.held = self.held_tokens = 0
        g.give_back(known, self.charged - tokens)
        first_us = self.first_us
        if first_us is not None:
            model = self.model
            assert model is not None
            waited_us = first_us - self.started_us
            model.first_bytes[(waited_us // 1000).bit_length()] += 1
            model.first_us += waited_us
        row = b'{"id":"%b",%b,"outcome":"%b","started_us":%d,"ended_us":%d,"first_us":%b,"input_uncached":%d,"cache_read":%d,"output":%d,"made":%d,"micros":%d,"is_inconsistent":%b}' % (
            self.rid,
            g.named(known, self.price, p, replica),
            OUTCOMES[outcome],
            self.started_us,
            now_us,
            b"null" if first_us is None else b"%d" % first_us,
            uncached,
            cached,
            output,
            made,
            spent,
            b"true" if is_odd else b"false",
        )  # fmt: skip
        if self.replica is not None:
            self._leave()
        g.spool.append(row, self._on_disk)

    def _on_disk(self) -> None:
        down = self.down
        if down.exchange is self:  # Else the client has gone meanwhile.
            down.done(self.tail)

    def open_row(self) -> bytes:
        """As it stands, for the file of what was open when a gateway died: lost, and free."""
        assert self.replica is not None
        return (
            b'{"id":"%b",%b,"outcome":"lost","started_us":%d,"ended_us":%d,"first_us":%b,'
            b'"input_uncached":0,"cache_read":0,"output":0,"made":%d,"micros":0}'
            % (
                self.rid,
                self.g.named(self.known, self.price, self.p, self.replica),
                self.started_us,
                self.g.now_us(),
                b"null" if self.first_us is None else b"%d" % self.first_us,
                self.made,
            )
        )
