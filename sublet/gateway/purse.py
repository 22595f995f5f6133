"""A key's slice of credit in this gateway: what it may hold and spend without asking anybody.

Gateway and control plane each keep one ceiling on *spent + held*, a running total of the epoch:
G here (`granted`), g there (behind it a ledger hold of g − settled). Always G ≤ g, so that what all
gateways spend is money set aside, whatever message is lost, repeated, late or out of order:

1. A request has a serial, new for each message, and the totals spent and held at that moment.
2. A want raises g to spent + held + wanted, as far as credit goes. A give-back (wanted 0) lowers g
   to spent + held. Either only if its serial is above the last that was acted on.
3. An Allowance is g as it stands, and `answers`, the last serial that was acted on.
4. As a give-back leaves, G becomes spent + held, and no Allowance counts any more that was made
   before the control plane had acted on this or a later serial.

Only a give-back lowers g, to a total that G obeys already; and an Allowance made before it is not
accepted after it (4). So G ≤ g. A give-back that was lost leaves g too high for a while: it is sent
anew like a want, after a second without an answer.
The same rules hold for tokens a day; None there means that no limit binds.

How much is asked for follows the spending: a slice that lasted less than half a second is doubled,
one that lasted longer than two is halved, and more is asked for when half of it is left. So a busy
key has some seconds' worth in hand and never waits, an idle one ties up nothing after five seconds.
A slice that came smaller than asked counts as what it is, so that who is given little asks for little.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from sublet.base.wire.gateway import PER_TOKENS, Allowance, AllowanceRequest, Price

ANSWER_NS = 1_000_000_000
"""A request without an answer for so long is made anew; a denial is believed for so long."""
QUICK_NS = 500_000_000
SLOW_NS = 2_000_000_000
IDLE_SWEEPS = 5
"""Sweeps, a second apart, without a use before a slice is given back."""
AHEAD = 4
"""A first slice is so many times what the request needs."""
MOST = 1 << 50


def cost(price: Price, uncached: int, cached: int, output: int) -> int:
    """Micros for so many tokens, each class rounded up: never less than billing posts."""
    micros = -(-uncached * price.input_micros // PER_TOKENS)
    if cached:
        micros -= -cached * price.cached_micros // PER_TOKENS
    return micros - (-output * price.output_micros // PER_TOKENS)


class Purse:
    """What one key may spend here. Integers only; the caller passes the monotonic time.

    Spent and held never exceed granted, unless the key is the owner's own (`is_free`): then every
    hold succeeds, is counted all the same, and nothing is asked for.
    """

    __slots__ = (
        "_asked_ns",
        "_asked_serial",
        "_barrier",
        "_ceiling",
        "_ceiling_tokens",
        "_denied_ns",
        "_epoch",
        "_expires_ns",
        "_idle",
        "_low",
        "_low_tokens",
        "_renew_ns",
        "_seen",
        "_serial",
        "_short",
        "_short_tokens",
        "_slice",
        "_slice_ns",
        "_slice_tokens",
        "_swept",
        "denied",
        "denied_why",
        "expires_us",
        "granted",
        "granted_tokens",
        "held",
        "held_tokens",
        "is_awake",
        "is_first_party",
        "is_free",
        "is_low",
        "key_id",
        "resets_us",
        "spent",
        "spent_tokens",
        "takes",
        "waiting",
    )

    def __init__(self, key_id: str, epoch: int) -> None:
        self.key_id = key_id
        self._epoch = epoch
        self.is_first_party = False
        self.is_free = False
        self.is_low = False
        """After the last hold: it is time to ask ahead (`want`)."""
        self.is_awake = False
        """There is something to sweep: a slice in hand, or a request without its answer."""
        # Below zero until the first Allowance: without one not even a hold of nothing is taken,
        # since a limit of tokens a day may bind a model that costs nothing.
        self.granted = -1
        self.granted_tokens: int | None = None
        self.spent = self.spent_tokens = 0
        self.held = self.held_tokens = 0
        self.expires_us = 0
        self.denied: str | None = None
        self.denied_why = ""
        self.resets_us: int | None = None
        self.waiting: deque[Any] = deque()
        """Requests that wait for an Allowance: the caller's, kept here because they go with it."""
        self.takes = 0
        self._serial = 0
        self._barrier = 0  # The last give-back's serial.
        self._seen = 0  # The highest `answers` accepted.
        # At least the control plane's g, as far as it was said: what there is to give back.
        self._ceiling = self._ceiling_tokens = 0
        self._asked_serial = 0  # 0: nothing is outstanding.
        self._asked_ns = 0
        self._denied_ns = 0
        self._expires_ns = 0
        self._renew_ns = 0
        self._slice = self._slice_tokens = 0
        self._slice_ns = 0
        self._low = self._low_tokens = 0
        self._short = self._short_tokens = 0
        self._swept = 0
        self._idle = 0

    @property
    def left(self) -> int:
        """Micros that can still be held."""
        return max(self.granted - self.spent - self.held, 0)

    @property
    def left_tokens(self) -> int | None:
        """Tokens that can still be held; None: no limit binds."""
        if self.granted_tokens is None:
            return None
        return max(self.granted_tokens - self.spent_tokens - self.held_tokens, 0)

    # ---- the hot path ----------------------------------------------------------------------

    def take(self, micros: int, tokens: int, now_ns: int = 0) -> bool:
        """Hold so much, or change nothing and say so.

        `now_ns` for what begins: it is not begun on an Allowance that has expired.
        """
        if not self.is_free:
            if now_ns >= self._expires_ns:
                return False
            left = self.granted - self.spent - self.held - micros
            if left < 0:
                return False
            is_low = left < self._low or now_ns >= self._renew_ns
            limit = self.granted_tokens
            if limit is not None:
                left = limit - self.spent_tokens - self.held_tokens - tokens
                if left < 0:
                    return False
                is_low = is_low or left < self._low_tokens
            self.is_low = is_low
        self.held += micros
        self.held_tokens += tokens
        self.takes += 1
        return True

    def settle(
        self, held_micros: int, held_tokens: int, spent_micros: int, spent_tokens: int
    ) -> None:
        """Release a hold and book what was spent of it: the caller cuts the bill to the hold.

        Tokens may exceed theirs, where an engine counts more than was estimated.
        """
        assert spent_micros <= held_micros or self.is_free, "a bill beyond its hold"
        self.held -= held_micros
        self.held_tokens -= held_tokens
        self.spent += spent_micros
        self.spent_tokens += spent_tokens
        assert self.held >= 0, "released more than was held"

    def want(self, needed_micros: int, needed_tokens: int, now_ns: int) -> AllowanceRequest | None:
        """The request to send now, if any: call it after a hold that was not taken, and after one
        that left the purse low or went on with what runs.

        After one that was taken nothing is needed (0, 0): then it asks ahead. At most one request
        is outstanding; what others need meanwhile is added to the next.
        """
        if self.is_free:
            return None
        left = self.granted - self.spent - self.held
        limit = self.granted_tokens
        left_tokens = None if limit is None else limit - self.spent_tokens - self.held_tokens
        is_short = left < needed_micros or (left_tokens is not None and left_tokens < needed_tokens)
        if (
            not is_short
            and left >= self._low
            and (left_tokens is None or left_tokens >= self._low_tokens)
            and now_ns < self._renew_ns
        ):
            return None
        if self.denied is not None and now_ns - self._denied_ns < ANSWER_NS:
            return None
        if is_short:
            self._short += needed_micros
            self._short_tokens += needed_tokens
        # A give-back on its way holds up nobody: a want simply follows it.
        if self._asked_serial > self._barrier and now_ns - self._asked_ns < ANSWER_NS:
            return None
        self._resize(now_ns)
        return self._ask(self._slice, self._slice_tokens, now_ns)

    # ---- the slice -------------------------------------------------------------------------

    def _resize(self, now_ns: int) -> None:
        """The next slice, by how long the last one lasted."""
        lasted = now_ns - self._slice_ns
        if self._slice_ns and lasted < QUICK_NS:
            self._slice *= 2
            self._slice_tokens *= 2
        elif lasted > SLOW_NS:
            self._slice //= 2
            self._slice_tokens //= 2
        self._slice = min(max(self._slice, AHEAD * self._short, 1), MOST)
        self._slice_tokens = min(max(self._slice_tokens, AHEAD * self._short_tokens), MOST)
        self._short = self._short_tokens = 0

    def _ask(self, micros: int, tokens: int, now_ns: int) -> AllowanceRequest:
        self.is_awake = True
        self._serial += 1
        self._asked_serial = self._serial
        self._asked_ns = now_ns
        return AllowanceRequest(
            key_id=self.key_id,
            epoch=self._epoch,
            wanted_micros=micros,
            wanted_tokens=tokens,
            spent_micros=self.spent,
            held_micros=self.held,
            spent_tokens=self.spent_tokens,
            held_tokens=self.held_tokens,
            serial=self._serial,
        )

    def grant(self, allowance: Allowance, now_ns: int, now_us: int) -> bool:
        """Take over an Allowance; False: it is of another epoch, or overtaken by a newer word."""
        answers = allowance.answers
        if allowance.epoch != self._epoch or answers < self._barrier or answers < self._seen:
            return False
        self._seen = answers
        if allowance.granted_micros > self.granted:
            self.granted = allowance.granted_micros
        self.granted_tokens = allowance.granted_tokens
        tokens = allowance.granted_tokens or 0
        if answers == self._barrier:
            self._ceiling = allowance.granted_micros
            self._ceiling_tokens = tokens
        else:
            self._ceiling = max(self._ceiling, allowance.granted_micros)
            self._ceiling_tokens = max(self._ceiling_tokens, tokens)
        self.expires_us = allowance.expires_us
        lasts_ns = max(allowance.expires_us - now_us, 0) * 1000
        self._expires_ns = now_ns + lasts_ns
        self._renew_ns = now_ns + lasts_ns // 2
        self.denied = allowance.denied
        self.denied_why = allowance.denied_why
        self.resets_us = allowance.resets_us
        self._denied_ns = now_ns
        if self._asked_serial and answers >= self._asked_serial:
            self._asked_serial = 0
            self._short = self._short_tokens = 0  # Who still waits says so again.
        if answers > self._barrier:
            self._slice_ns = now_ns
            left, left_tokens = self.left, self.left_tokens
            self._slice = max(min(self._slice, left), 1)
            if left_tokens is not None:
                self._slice_tokens = min(self._slice_tokens, left_tokens)
            self._low = self._slice // 2
            self._low_tokens = self._slice_tokens // 2
        return True

    def refusal(self, now_ns: int) -> str | None:
        """The code under which the last answer granted less than was wanted, while it is fresh.

        None: ask and wait, since credit may have been added meanwhile.
        """
        return self.denied if now_ns - self._denied_ns < ANSWER_NS else None

    def sweep(self, now_ns: int) -> AllowanceRequest | None:
        """To be called once a second: gives back what idles, asks anew what was not answered."""
        if self.is_free:
            return None
        if now_ns >= self._expires_ns and self.granted > self.spent + self.held:
            # Let go, for running requests as well: the control plane counts on it at the end of a
            # budget's window. G may be lowered here at any time; the next Allowance raises it.
            self._drop()
        if self._swept != self.takes:
            self._swept = self.takes
            self._idle = 0
        else:
            self._idle += 1
        if self._asked_serial:
            if now_ns - self._asked_ns < ANSWER_NS:
                return None
            if self._idle >= IDLE_SWEEPS:
                return self._give_back(now_ns)
            if self._asked_serial > self._barrier:
                return self._ask(self._slice, self._slice_tokens, now_ns)
            self._asked_serial = 0  # In use again: what was not given back will be later.
        elif (
            self._ceiling > self.spent + self.held
            or self._ceiling_tokens > self.spent_tokens + self.held_tokens
        ):
            if self._idle >= IDLE_SWEEPS:
                return self._give_back(now_ns)
        elif self.held == 0:
            self.is_awake = False
        return None

    def _give_back(self, now_ns: int) -> AllowanceRequest:
        self._drop()
        self._low = self._low_tokens = 0
        self._slice = self._slice_tokens = 0
        self._slice_ns = 0
        request = self._ask(0, 0, now_ns)
        self._barrier = self._serial
        return request

    def _drop(self) -> None:
        self.granted = min(self.granted, self.spent + self.held)
        if self.granted_tokens is not None:
            self.granted_tokens = min(self.granted_tokens, self.spent_tokens + self.held_tokens)
