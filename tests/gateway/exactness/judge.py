"""What must agree: what clients saw, what mocks counted, what the spools hold, what the books say.

Pure: lists in, a list of disagreements out. The rules are those of docs/tokens: an answer that
came whole is billed once and fully; one that was cut, for what was delivered; who leaves, for what
was counted; a failure costs nothing; what a dead gateway had open is free, and a loss.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from sublet.base.wire.gateway import PER_TOKENS, Outcome, Price, UsageEvent

from .counting import Made
from .crowd import Seen

BLIND_US = 1_500_000
"""What began so shortly before a kill may be in no file: open requests are written down each
second. (A mock may find it waiting in its socket a little later.)"""


@dataclass(frozen=True)
class Evidence:
    seen: Sequence[Seen]
    made: Mapping[str, Sequence[Made]]
    """By request id, over all mocks."""
    spooled: Sequence[UsageEvent]
    """Every frame of every life's spool, as it lies there."""
    open_at_death: Sequence[UsageEvent]
    """Rows of the files of open requests that killed lives left."""
    booked: Sequence[UsageEvent]
    """Rows of the books."""
    killed: Mapping[int, int]
    """Lives that were killed: their epochs, and when."""
    prices: Mapping[str, Price]
    """By version."""


def disagreements(found: Evidence) -> Iterator[str]:
    yield from _books_are_the_spools(found)
    events = {event.id: event for event in found.booked}
    yield from _answers_are_billed(found, events)
    yield from _bills_have_answers(found, events)
    yield from _nothing_made_is_forgotten(found, events)
    for event in found.booked:
        yield from _amounts_are_right(event, found.prices)


def _books_are_the_spools(found: Evidence) -> Iterator[str]:
    twice = [name for name, n in Counter(event.id for event in found.spooled).items() if n > 1]
    yield from (f"{name}: twice in the spool" for name in twice)
    twice = [name for name, n in Counter(event.id for event in found.booked).items() if n > 1]
    yield from (f"{name}: twice in the books" for name in twice)
    spooled = {event.id: event for event in found.spooled}
    lost = {event.id: event for event in found.open_at_death if event.id not in spooled}
    booked = {event.id: event for event in found.booked}
    told = {**lost, **spooled}
    for name, event in told.items():
        if name not in booked:
            yield f"{name}: in a spool ({event.outcome}) and not in the books"
        elif booked[name] != event:
            yield f"{name}: the books say {booked[name]}, the spool {event}"
    yield from (f"{name}: in the books only" for name in booked if name not in told)
    for name in lost:
        if booked.get(name) and booked[name].outcome != Outcome.LOST:
            yield f"{name}: was open when its gateway died, and is booked as {booked[name].outcome}"


def _answers_are_billed(found: Evidence, events: Mapping[str, UsageEvent]) -> Iterator[str]:
    for seen in found.seen:
        event = events.get(seen.rid)
        made = found.made.get(seen.rid, ())
        if seen.end == "whole":
            yield from _whole(seen, event, made)
        elif seen.end == "error" and seen.status == 200:
            if event is None or event.outcome not in (
                Outcome.INTERRUPTED,
                Outcome.CREDIT_EXHAUSTED,
            ):
                yield f"{seen}: cut with an error, and booked as {event and event.outcome}"
            elif event.output != seen.tokens and event.outcome == Outcome.INTERRUPTED:
                yield f"{seen}: {seen.tokens} tokens came, {event.output} are billed"
        elif seen.end == "error":
            if event is not None and event.outcome != Outcome.FAILED:
                yield f"{seen}: refused, and booked as {event.outcome}"
        elif seen.end == "left" and event is not None and event.output < seen.tokens:
            if event.outcome != Outcome.LOST:
                yield f"{seen}: {seen.tokens} tokens came before it left, {event.output} are billed"
        elif seen.end in ("open", "cut") and not _died_with_it(seen.rid, found):
            yield f"{seen}: the connection ended under it, and no gateway was killed"


def _whole(seen: Seen, event: UsageEvent | None, made: Sequence[Made]) -> Iterator[str]:
    if event is None or event.outcome != Outcome.OK:
        yield f"{seen}: answered and not billed ({event and event.outcome})"
        return
    if not made:
        yield f"{seen}: answered, and no mock knows of it"
        return
    last = made[-seen.legs :]
    output = sum(one.made for one in last)
    if event.output != output:
        yield f"{seen}: the mock made {output}, {event.output} are billed"
    if event.input_uncached + event.cache_read != last[0].prompt:
        yield f"{seen}: the mock read {last[0].prompt}, the bill says {event}"
    if seen.usage is not None and seen.usage != (
        event.input_uncached + event.cache_read,
        event.output,
    ):
        yield f"{seen}: was told other counts than {event}"
    if seen.is_stream and seen.tokens != event.output:
        yield f"{seen}: {seen.tokens} tokens came, {event.output} are billed"


def _bills_have_answers(found: Evidence, events: Mapping[str, UsageEvent]) -> Iterator[str]:
    by_id = {seen.rid: seen for seen in found.seen if seen.rid}
    if len(by_id) != sum(bool(seen.rid) for seen in found.seen):
        yield "two requests with one id"
    for event in events.values():
        made = found.made.get(event.id, ())
        if event.outcome in (Outcome.FAILED, Outcome.LOST):
            if event.micros or event.input_uncached or event.cache_read or event.output:
                yield f"{event}: costs something"
            continue
        if not made and (event.micros or event.made):
            yield f"{event}: billed, and no mock knows of it"
        if event.output > sum(one.made for one in made):
            yield f"{event}: billed for more than the mocks made: {made}"
        if event.made > sum(one.made for one in made):
            yield f"{event}: said to have been made, and the mocks made {made}"
        if event.outcome == Outcome.OK and not any(one.end == "whole" for one in made):
            yield f"{event}: whole, and no mock finished it: {made}"
        seen = by_id.get(event.id)
        if seen is None or event.outcome != Outcome.OK or seen.end in ("whole", "left"):
            continue
        if not _died_with_it(event.id, found):
            yield f"{event}: billed as whole, and its client saw {seen}"


def _nothing_made_is_forgotten(found: Evidence, events: Mapping[str, UsageEvent]) -> Iterator[str]:
    """What mocks made and nobody has a row for began just before its gateway was killed."""
    whole = {seen.rid for seen in found.seen if seen.end == "whole"}
    for name, made in found.made.items():
        if name in events:
            continue
        killed_us = _killed_us(name, found)
        if not name:
            yield f"a request without an id reached a mock: {made}"
        elif name in whole:
            yield f"{name}: answered, made {made}, and not in the books"
        elif killed_us is None:
            yield f"{name}: made {made}, in no file, and its gateway was not killed"
        elif abs(killed_us - made[0].begun_us) > BLIND_US:
            yield f"{name}: made {made}, in no file, and its gateway was killed at {killed_us}"


def _killed_us(name: str, found: Evidence) -> int | None:
    """When the life that a request was of was killed; None: it was not."""
    for epoch, at in found.killed.items():
        if name.startswith(f"req_{epoch:x}"):
            return at
    return None


def _died_with_it(name: str, found: Evidence) -> bool:
    """It was of a life that was killed. (A request without an id may have met any.)"""
    return not name or _killed_us(name, found) is not None


def _amounts_are_right(event: UsageEvent, prices: Mapping[str, Price]) -> Iterator[str]:
    price = prices[event.price_version]
    exact = (
        (event.input_uncached, price.input_micros),
        (event.cache_read, price.cached_micros),
        (event.output, price.output_micros),
    )
    micros = sum(-(-tokens * each // PER_TOKENS) for tokens, each in exact)
    if event.micros != micros and event.outcome not in (Outcome.FAILED, Outcome.LOST):
        yield f"{event}: {micros} micros by its price"


def posted(events: Sequence[UsageEvent], prices: Mapping[str, Price]) -> int:
    """What the ledger must have taken for these, of one organisation: each line's sum of tokens by
    its price, rounded once, half to even."""
    lines: dict[tuple[str, str, str, str, int, str], int] = defaultdict(int)
    for event in events:
        day = event.started_us // 86_400_000_000
        line = (event.key_id, event.model, event.tier, event.price_version, day)
        lines[(*line, "input")] += event.input_uncached
        lines[(*line, "cached")] += event.cache_read
        lines[(*line, "output")] += event.output
    total = 0
    for (_, _, _, version, _, token_class), tokens in lines.items():
        price = prices[version]
        each = {
            "input": price.input_micros,
            "cached": price.cached_micros,
            "output": price.output_micros,
        }[token_class]
        total += round(Fraction(tokens * each, PER_TOKENS))
    return total


def unattributed(found: Evidence, made_by: Mapping[str, int]) -> dict[str, int]:
    """By replica: tokens that it made beyond what the books know of it."""
    known: dict[str, int] = defaultdict(int)
    for event in found.booked:
        known[event.replica_id] += event.made
    return {replica: made - known[replica] for replica, made in made_by.items()}
