"""What all requests of one gateway process share: routes, queues, asks, time, counts."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import orjson

from sublet.base.kernel.clock import SystemClock, read_boot_ns
from sublet.base.kernel.interval import from_micros, micros_since_epoch
from sublet.base.wire.gateway import Gauge, Price
from sublet.gateway.dialects.prepared import model_not_found
from sublet.gateway.errors import Refusal
from sublet.gateway.limits import duration
from sublet.gateway.purse import Purse
from sublet.gateway.upstream import EJECTED_NS, Replica

if TYPE_CHECKING:
    from sublet.gateway.control import Control
    from sublet.gateway.dialects import Prepared
    from sublet.gateway.edge import Downstream, Request
    from sublet.gateway.exchange import Exchange
    from sublet.gateway.routes import Known, Model, Routes
    from sublet.gateway.spool import Spool

SILENCE_NS = 15_000_000_000
"""A stream without a byte for so long says that it lives."""
RETRY_NS = 1_000_000_000
NAMES_KEPT = 4096


class Gateway:
    """One process. All of it happens in one thread, but for the spool's writer."""

    def __init__(self, *, name: str, epoch: int, loop: asyncio.AbstractEventLoop) -> None:
        self.name = name
        self.epoch = epoch
        self.loop = loop
        self.routes: Routes
        self.spool: Spool
        self.control: Control
        self.body_limit = 16 << 20
        self.stale_ns = 60_000_000_000
        self.open: dict[Exchange, None] = {}
        """Requests that a model server works on, oldest first."""
        self.connections: dict[Downstream, None] = {}
        self.refusals: dict[str, int] = {}
        self.requests = 0
        self.date = self.ok = b""
        """How every head begins; made anew each second."""
        self.second_ns = read_boot_ns()
        self.fresh_ns = self.second_ns
        """When the routes in force were last known to be the newest."""
        self._prefix = b"req_%x%b" % (epoch, name.encode().replace(b"-", b""))
        self._serial = 0
        self.offset_us = 0
        """UTC less the boot clock."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._names: dict[tuple[str, str, str, str, str], bytes] = {}
        self.is_draining = False
        self.follows_books = False
        self._set_clock()

    # ---- time and names --------------------------------------------------------------------

    def _set_clock(self) -> None:
        """UTC beside the boot clock: the wall's until a snapshot comes, then the books' own, which
        a step of the wall does not move."""
        if not self.follows_books:
            now = SystemClock.unanchored().now()
            self.offset_us = micros_since_epoch(now) - read_boot_ns() // 1000
        shown = from_micros(self.now_us()).strftime("%a, %d %b %Y %H:%M:%S GMT")
        self.date = b"date: %b\r\n" % shown.encode()
        self.ok = b"HTTP/1.1 200 OK\r\n%bx-request-id: " % self.date

    def now_us(self) -> int:
        return self.offset_us + read_boot_ns() // 1000

    def next_id(self) -> bytes:
        """Unique for ever: the epoch is, and the gateway's name beside it."""
        self._serial += 1
        return b"%b%08x" % (self._prefix, self._serial)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def named(self, known: Known, price: Price, p: Prepared, replica: Replica) -> bytes:
        """The members of a usage event that name who, what and where: alike for many requests."""
        key = (known.key_id, price.version, p.tier, p.surface, replica.id)
        found = self._names.get(key)
        if found is None:
            named = {
                **known.payer,
                "model": p.route.name,
                "deployment_id": p.route.deployment_id,
                "replica_id": replica.id,
                "surface": p.surface,
                "tier": p.tier,
                "price_version": price.version,
            }
            if len(self._names) >= NAMES_KEPT:
                self._names.clear()
            found = self._names[key] = orjson.dumps(named)[1:-1]
        return found

    def adopt(self, routes: Routes) -> None:
        """New routes are in force: who waits for a replica may have one now, and who waits for a
        model that is served no more need not wait."""
        self.routes = routes
        self._names.clear()
        for model in routes.gone:
            for exchange in list(model.waiting):
                exchange.refuse(model_not_found(model.name))
        routes.gone = []
        for model in routes.models.values():
            for replica in model.replicas:
                if model.waiting:
                    self.slot_free(model, replica)

    # ---- who may ---------------------------------------------------------------------------

    def identify(self, request: Request, now_ns: int) -> Known:
        """Raises Refusal."""
        if now_ns - self.fresh_ns > self.stale_ns or self.spool.is_failing or self.is_draining:
            raise self._unable(now_ns)
        secret = request.secret
        known = self.routes.find_key(secret) if secret else None
        if known is None:
            raise Refusal(
                401,
                "invalid_api_key",
                "Send a valid key as `Authorization: Bearer KEY`."
                if secret is None
                else "This key is not valid: it is unknown, revoked or mistyped.",
            )
        policy = known.policy
        if policy.expires_us is not None and self.now_us() >= policy.expires_us:
            raise Refusal(401, "invalid_api_key", "This key has expired: use another one.")
        if policy.refused is not None:
            raise self._denied(policy.refused, policy.refused_why, policy.resets_us)
        return known

    def _unable(self, now_ns: int) -> Refusal:
        if now_ns - self.fresh_ns > self.stale_ns:
            return Refusal(
                503,
                "snapshot_stale",
                "This gateway has not heard from its control plane for too long: try again.",
                retry_after_s=5,
            )
        return Refusal(
            503, "unavailable", "This gateway cannot take requests now: try again.",
            retry_after_s=2,
        )  # fmt: skip

    def take_request(self, known: Known, now_ns: int) -> None:
        """One request from every bucket that binds the key, before its body is read."""
        self.requests += 1
        for bucket in known.request_buckets:
            if not bucket.take(1, now_ns):
                for taken in known.request_buckets:
                    if taken is bucket:
                        break
                    taken.give_back(1)
                raise self._limited(known, bucket, 1, "requests", now_ns)

    def charge(self, known: Known, tokens: int, now_ns: int) -> bytes:
        """So many tokens from every bucket that binds the key; what is left, as headers. Raises
        Refusal; then nothing was charged, the request neither."""
        for bucket in known.token_buckets:
            if not bucket.take(tokens, now_ns):
                for taken in known.token_buckets:
                    if taken is bucket:
                        break
                    taken.give_back(tokens)
                for taken in known.request_buckets:
                    taken.give_back(1)
                raise self._limited(known, bucket, tokens, "tokens", now_ns)
        return self.limit_headers(known, now_ns)

    def _limited(self, known: Known, bucket: Any, amount: int, unit: str, now_ns: int) -> Refusal:
        wait_ns = bucket.wait_ns(amount, now_ns)
        headers = self.limit_headers(known, now_ns)
        if wait_ns is None:
            return Refusal(
                400,
                "invalid_request",
                f"This may take {amount} tokens, and {bucket.limit} a minute are allowed: "
                "send less, or ask for less output.",
                headers=headers,
            )
        return Refusal(
            429,
            "rate_limit_exceeded",
            f"The limit of {bucket.limit} {unit} a minute is reached: try again in "
            f"{duration(wait_ns).decode()}.",
            retry_after_s=max(-(-wait_ns // 1_000_000_000), 1),
            headers=headers,
        )

    def limit_headers(self, known: Known, now_ns: int) -> bytes:
        """What is left, by the bucket that is nearest to its end."""
        requests, tokens = known.request_buckets, known.token_buckets
        r = requests[0] if len(requests) == 1 else _nearest(requests, now_ns)
        t = tokens[0] if len(tokens) == 1 else _nearest(tokens, now_ns)
        if r is None or t is None:
            # One is limited, the other is not.
            unit, bucket = (b"tokens", t) if r is None else (b"requests", r)
            return b"" if bucket is None else _told(unit, bucket, now_ns)
        return (
            b"x-ratelimit-limit-requests: %d\r\nx-ratelimit-remaining-requests: %d\r\n"
            b"x-ratelimit-reset-requests: %b\r\nx-ratelimit-limit-tokens: %d\r\n"
            b"x-ratelimit-remaining-tokens: %d\r\nx-ratelimit-reset-tokens: %b\r\n"
            % (r.limit, *r.told(now_ns), t.limit, *t.told(now_ns))
        )

    def give_back(self, known: Known, tokens: int) -> None:
        """Tokens that were charged at admission and not used (or, below zero, the other way)."""
        for bucket in known.token_buckets:
            bucket.settle(-tokens)

    def check_model(self, known: Known, p: Prepared) -> None:
        """Raises Refusal: the key may not call it, or the tier is not offered."""
        if not self.routes.may_call(known, p.route.name):
            raise Refusal(
                403, "model_not_allowed", f"This key may not call {p.route.name}.", param="model"
            )
        if p.tier not in p.route.prices:
            raise Refusal(
                400, "invalid_request", f"{p.route.name} is not offered as {p.tier}.",
                param="service_tier",
            )  # fmt: skip

    # ---- credit ----------------------------------------------------------------------------

    def ask(self, known: Known, exchange: Exchange, micros: int, tokens: int) -> None:
        """Ask for a key's credit, and be told when there is an answer (`allowance_came`)."""
        known.purse.waiting.append(exchange)
        if not self.want(known, micros, tokens) and self.is_denied(known):
            # It was denied a moment ago: the same answer, without asking.
            self.loop.call_soon(exchange.allowance_came)

    def want(self, known: Known, micros: int, tokens: int) -> bool:
        """Ask, if there is reason to: in time for the next ones, or for one that waits."""
        request = known.purse.want(micros, tokens, read_boot_ns())
        if request is None:
            return False
        self.control.ask(request)
        return True

    def is_denied(self, known: Known) -> bool:
        """The control plane has just said that there is no more."""
        return known.purse.refusal(read_boot_ns()) is not None

    def stop_asking(self, known: Known, exchange: Exchange) -> None:
        with contextlib.suppress(ValueError):
            known.purse.waiting.remove(exchange)

    def granted(self, purse: Purse) -> None:
        """An Allowance came: everyone who waits looks again, in order."""
        for exchange in list(purse.waiting):
            exchange.allowance_came()

    def denial(self, purse: Purse) -> Refusal:
        """Why no more can be held, as the control plane said; or that it says nothing."""
        if purse.denied is None:
            return Refusal(
                503,
                "credit_unknown",
                "The credit of this key cannot be asked for at the moment: try again.",
                retry_after_s=2,
            )
        return self._denied(purse.denied, purse.denied_why, purse.resets_us)

    def _denied(self, code: str, why: str, resets_us: int | None) -> Refusal:
        status = 402 if code == "insufficient_quota" else 403
        if resets_us is None:
            return Refusal(status, code, why or "Not with this key at the moment.")
        seconds = max(-(-(resets_us - self.now_us()) // 1_000_000), 1)
        return Refusal(status, code, why, retry_after_s=seconds)

    # ---- replicas and queues ---------------------------------------------------------------

    def pick(self, model: Model, tier: str, without: tuple[Replica, ...] = ()) -> Replica | None:
        """The least busy one that has a slot; flex only where nobody else waits, and on filler."""
        best: Replica | None = None
        least = 1 << 30
        is_flex = tier == "flex"
        for replica in model.replicas:
            if (
                replica.inflight < least
                and replica.inflight < replica.slots
                and not replica.is_leaving
                and (replica.is_filler or not is_flex)
                and (not replica.out_until_ns or replica.out_until_ns <= read_boot_ns())
                and replica not in without
            ):
                best = replica
                least = replica.inflight
        return best

    def has_other(self, model: Model, tries: tuple[Replica, ...]) -> bool:
        """One that was not tried is there, only busy."""
        now_ns = read_boot_ns()
        return any(
            not replica.is_leaving and replica.out_until_ns <= now_ns and replica not in tries
            for replica in model.replicas
        )

    def enqueue(self, model: Model, exchange: Exchange) -> None:
        """Wait for a slot, up to the route's limit: for a replica to start, too. Not where there are
        replicas and none can be reached: that is said at once, but for one that tries."""
        route = model.route
        if self.routes.models.get(model.name) is not model:
            exchange.refuse(model_not_found(model.name))
        elif model.replicas and not self.has_other(model, ()):
            replica = self._last_resort(model, exchange.tier)
            if replica is not None:
                exchange.placed(replica)
                return
            why = f"No model server of {model.name} can be reached: try again."
            exchange.refuse(Refusal(503, "no_replica", why, retry_after_s=2))
        elif len(model.waiting) >= route.queue_length:
            exchange.refuse(self._overloaded(model))
        else:
            exchange.timer = self.loop.call_later(
                route.queue_seconds, self._queue_ended, model, exchange
            )
            model.waiting.append(exchange)

    def _last_resort(self, model: Model, tier: str) -> Replica | None:
        """Where all are out, each is tried again a second after it was last: who is back, as after a
        crash of the whole node, is found at once."""
        now_ns = read_boot_ns()
        chosen: Replica | None = None
        for replica in model.replicas:
            if (
                not replica.is_leaving
                and replica.out_until_ns - now_ns <= EJECTED_NS - RETRY_NS
                and replica.inflight < replica.slots
                and (replica.is_filler or tier != "flex")
            ):
                chosen = replica
        if chosen is not None:
            chosen.out_until_ns = now_ns + EJECTED_NS
        return chosen

    def _queue_ended(self, model: Model, exchange: Exchange) -> None:
        exchange.timer = None
        exchange.refuse(self._overloaded(model))

    def _overloaded(self, model: Model) -> Refusal:
        if any(not replica.is_leaving for replica in model.replicas):
            why = f"All model servers of {model.name} are busy: try again."
            return Refusal(503, "model_overloaded", why, retry_after_s=5)
        why = f"No model server of {model.name} is ready yet: try again."
        return Refusal(503, "no_replica", why, retry_after_s=5)

    def forget(self, model: Model, exchange: Exchange) -> None:
        """It waits in the queue no more."""
        with contextlib.suppress(ValueError):
            model.waiting.remove(exchange)

    def slot_free(self, model: Model, replica: Replica) -> None:
        """The first who fits it goes on: default before flex."""
        if replica.is_leaving:
            replica.close_idle()
            if not replica.inflight:
                self.control.report()
            return
        waiting = model.waiting
        if waiting and replica.out_until_ns and replica.out_until_ns > read_boot_ns():
            return
        while waiting and replica.inflight < replica.slots:
            chosen = next((x for x in waiting if x.tier != "flex"), None)
            if chosen is None and replica.is_filler:
                chosen = waiting[0]
            if chosen is None:
                return
            chosen.stop_waiting()
            chosen.placed(replica)

    # ---- once a second ---------------------------------------------------------------------

    def sweep(self) -> None:
        """Pings, give-backs, queues whose replica came back, the clock."""
        now_ns = self.second_ns = read_boot_ns()
        self._set_clock()
        for exchange in list(self.open):
            if now_ns - exchange.wrote_ns >= SILENCE_NS:
                exchange.ping()
        for connection in list(self.connections):
            if connection.overdue(now_ns):
                connection.close()
        for request in self.routes.sweep(now_ns):
            self.control.ask(request)
        for model in self.routes.models.values():
            for replica in model.replicas if model.waiting else ():
                self.slot_free(model, replica)

    def refused(self, code: str) -> None:
        self.refusals[code] = self.refusals.get(code, 0) + 1

    def open_rows(self) -> list[bytes]:
        """Requests that have been open for a while, as they would be lost now."""
        return [exchange.open_row() for exchange in list(self.open)]

    def gauge(self) -> Gauge:
        file, offset = self.spool.position
        now_ns = read_boot_ns()
        replicas = self.routes.replicas.values()
        return Gauge(
            gateway=self.name,
            epoch=self.epoch,
            snapshot=self.routes.number,
            is_cut_off=not self.control.is_connected,
            # One that leaves is reported until it is empty: its end waits for that.
            in_flight=self.routes.in_flight(),
            waiting={m.name: len(m.waiting) for m in self.routes.models.values() if m.waiting},
            refusals=dict(self.refusals),
            requests=self.requests,
            spool_file=file,
            spool_offset=offset,
            ejected=tuple(r.id for r in replicas if r.out_until_ns > now_ns),
        )


def _nearest(buckets: Any, now_ns: int) -> Any:
    return min(buckets, key=lambda b: b.remaining(now_ns) / b.limit, default=None)


def _told(unit: bytes, bucket: Any, now_ns: int) -> bytes:
    remaining, reset = bucket.told(now_ns)
    return (
        b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %d\r\nx-ratelimit-reset-%b: %b\r\n"
        % (unit, bucket.limit, unit, remaining, unit, reset)
    )
