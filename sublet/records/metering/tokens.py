"""What others call about tokens: usage events from spools, corrections, engines' own totals.

A gateway's event is kept once, by its id, in the transaction that moves its spool's mark: after a
crash at any point the spool is read again from the mark, and what is known already changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from datetime import datetime

from sqlalchemy import Connection

from sublet.base.store import Work
from sublet.base.store.installation import find_fact, keep_fact
from sublet.base.wire.gateway import Outcome, UsageEvent
from sublet.records.metering import token_store
from sublet.records.metering.token_model import (
    Epoch,
    EpochClosed,
    EpochState,
    Gap,
    Reading,
    ReplicaTotals,
    SpoolFault,
    Sums,
    TokenCorrectionRefused,
    TokenUsage,
    TokenUsageNotFound,
    UsageInconsistent,
)

FAULTS = "spool_faults"
"""The installation's fact: JSON, by the life's folder, why its spool is not read on."""
_CLASSES = ("input_uncached", "cache_read", "output", "made")


def ingest(
    work: Work,
    *,
    gateway: str,
    epoch: int,
    events: Sequence[UsageEvent],
    file: int,
    offset: int,
) -> list[UsageEvent]:
    """Keep what was read of a spool up to (`file`, `offset`), and the mark itself.

    Returns the events that are new, each once. A position that is not beyond the known one is a
    repeat: nothing changes. Raises EpochClosed.
    """
    known = open_epoch(work, gateway, epoch)
    if (file, offset) <= known.position:
        return []
    if known.state is EpochState.CLOSED:
        raise EpochClosed(gateway=gateway, epoch=epoch)
    fresh = _keep(work, gateway, epoch, events)
    token_store.update_epoch(work.tx, dataclasses.replace(known, file=file, offset=offset))
    return fresh


def _keep(work: Work, gateway: str, epoch: int, events: Sequence[UsageEvent]) -> list[UsageEvent]:
    by_id: dict[str, UsageEvent] = {}
    for event in events:
        by_id.setdefault(event.id, event)
    for event_id in token_store.known_ids(work.tx, list(by_id)):
        del by_id[event_id]
    fresh = [event if event.made >= event.output else _mended(event) for event in by_id.values()]
    token_store.insert_events(work.tx, gateway, epoch, fresh, work.now)
    for event in fresh:
        if event.is_inconsistent:
            work.emit(
                UsageInconsistent(
                    replica_id=event.replica_id,
                    event_id=event.id,
                    why="the engine's counters contradict each other",
                )
            )
    return fresh


def _mended(event: UsageEvent) -> UsageEvent:
    """What was delivered was made, whatever the counters say."""
    return dataclasses.replace(event, made=event.output, is_inconsistent=True)


def open_epoch(work: Work, gateway: str, epoch: int) -> Epoch:
    """A gateway's life as it is known; unknown, it begins now, at the start of its spool."""
    known = token_store.find_epoch(work.tx, gateway, epoch)
    if known is None:
        known = Epoch(
            gateway=gateway,
            epoch=epoch,
            file=0,
            offset=0,
            state=EpochState.OPEN,
            opened_at=work.now,
            closed_at=None,
        )
        token_store.insert_epoch(work.tx, known)
    return known


def close_epoch(
    work: Work, gateway: str, epoch: int, lost: Sequence[UsageEvent] = ()
) -> list[UsageEvent] | None:
    """Nothing more comes of this life: keep what was open as it ended, as lost.

    Returns those that are new (one that had reached the spool was settled); None: it was closed
    before, and nothing changes. What is lost is billed to nobody, whatever it says itself.
    """
    known = open_epoch(work, gateway, epoch)
    if known.state is EpochState.CLOSED:
        return None
    unbilled = [
        dataclasses.replace(
            event,
            outcome=Outcome.LOST,
            input_uncached=0,
            cache_read=0,
            output=0,
            made=max(event.made, event.output),
            micros=0,
        )
        for event in lost
    ]
    fresh = _keep(work, gateway, epoch, unbilled)
    closed = dataclasses.replace(known, state=EpochState.CLOSED, closed_at=work.now)
    token_store.update_epoch(work.tx, closed)
    return fresh


def spool_position(tx: Connection, gateway: str, epoch: int) -> tuple[int, int]:
    """Where to read on: file and offset; the beginning of a spool that is not known."""
    known = token_store.find_epoch(tx, gateway, epoch)
    return (0, 0) if known is None else known.position


def list_epochs(tx: Connection, state: EpochState | str | None = None) -> list[Epoch]:
    states = list(EpochState) if state is None else [EpochState(state)]
    return token_store.list_epochs(tx, states)


def keep_spool_faults(work: Work, faults: Sequence[SpoolFault]) -> None:
    """These are all that there are now; none: every spool is read."""
    keep_fact(work, FAULTS, json.dumps({fault.life: fault.why for fault in faults}))


def list_spool_faults(tx: Connection) -> list[SpoolFault]:
    """Lives of gateways whose spools are not read on, by name and then the oldest first."""
    found = []
    for life, why in json.loads(find_fact(tx, FAULTS) or "{}").items():
        gateway, _, epoch = life.rpartition("/")
        found.append(SpoolFault(gateway=gateway, epoch=int(epoch), why=why))
    return sorted(found, key=lambda fault: (fault.gateway, fault.epoch))


def correct_tokens(
    work: Work,
    *,
    event_id: str,
    corrects: str,
    input_uncached: int = 0,
    cache_read: int = 0,
    output: int = 0,
    made: int = 0,
) -> TokenUsage:
    """Put a request's record right by a new one that holds the differences.

    The same `event_id` again gives the record that is there. Raises TokenUsageNotFound, and
    TokenCorrectionRefused where a class would fall below zero, more would be billed than was made,
    or the request is free: what failed or was lost is not billed after all.
    """
    known = token_store.find_usage(work.tx, event_id)
    if known is not None:
        return known
    first = token_store.find_usage(work.tx, corrects)
    if first is None:
        raise TokenUsageNotFound(param="corrects")
    if first.corrects is not None:
        raise TokenCorrectionRefused("`corrects` names a correction.", param="corrects")
    if first.outcome in token_store.UNBILLED and (input_uncached or cache_read or output):
        raise TokenCorrectionRefused(
            f"The request ended as {first.outcome.value} and is free.", param="corrects"
        )
    change = {
        "input_uncached": input_uncached,
        "cache_read": cache_read,
        "output": output,
        "made": made,
    }
    rows = [first, *token_store.list_corrections(work.tx, corrects)]
    after = {name: sum(getattr(row, name) for row in rows) + change[name] for name in _CLASSES}
    for name, left in after.items():
        if left < 0:
            raise TokenCorrectionRefused(f"`{name}` would be {left}.", param=name)
    if after["made"] < after["output"]:
        raise TokenCorrectionRefused(
            f"{after['output']} would be billed and {after['made']} made.", param="made"
        )
    usage = dataclasses.replace(
        first,
        event_id=event_id,
        input_uncached=input_uncached,
        cache_read=cache_read,
        output=output,
        made=made,
        micros=0,
        is_inconsistent=False,
        corrects=corrects,
        recorded_at=work.now,
    )
    return dataclasses.replace(usage, seq=token_store.insert_usage(work.tx, usage))


def find_token_usage(tx: Connection, event_id: str) -> TokenUsage | None:
    return token_store.find_usage(tx, event_id)


def list_token_usage(
    tx: Connection,
    *,
    organisation_id: str | None = None,
    project_id: str | None = None,
    key_id: str | None = None,
    replica_id: str | None = None,
    is_newest_first: bool = False,
    after: int | None = None,
    limit: int = 100,
) -> list[TokenUsage]:
    """Records in the order of recording, or against it, corrections included; None: of all."""
    narrowest_first = {
        "replica_id": replica_id,
        "key_id": key_id,
        "project_id": project_id,
        "organisation_id": organisation_id,
    }
    named = {name: value for name, value in narrowest_first.items() if value is not None}
    where = token_store.where_usage(named)
    return token_store.list_usage(
        tx, *where, is_newest_first=is_newest_first, after=after, limit=limit
    )


def token_sums(
    tx: Connection,
    *,
    key_id: str,
    model: str,
    tier: str,
    price_version: str,
    start_us: int,
    end_us: int,
) -> Sums:
    """Tokens of the requests of a key that began in `[start, end)`, under one price."""
    rows = token_store.tokens.c
    return token_store.sums(
        tx,
        rows.key_id == key_id,
        rows.model == model,
        rows.tier == tier,
        rows.price_version == price_version,
        rows.started_us >= start_us,
        rows.started_us < end_us,
    )


def replica_totals(tx: Connection, replica_id: str) -> ReplicaTotals:
    """What all records of a replica come to, corrections included."""
    rows = token_store.tokens.c
    found = token_store.sums(tx, rows.replica_id == replica_id)
    return ReplicaTotals(
        input_uncached=found.input_uncached,
        cache_read=found.cache_read,
        output=found.output,
        made=found.output + found.lost,
    )


def begin_readings(
    work: Work, replica_id: str, *, prompt: int, cached: int | None, predicted: int
) -> None:
    """From here on an engine's totals are set against records: what it counted until it was ready
    was its own trial, and nobody's. A replica that has a reading keeps it."""
    if token_store.find_reading(work.tx, replica_id) is not None:
        return
    begun = Reading(
        replica_id=replica_id,
        prompt=prompt,
        cached=cached,
        predicted=predicted,
        input_uncached=prompt,
        cache_read=cached or 0,
        made=predicted,
        counted_seq=token_store.last_seq(work.tx),
        read_at=work.now,
    )
    token_store.put_reading(work.tx, begun)


def keep_reading(
    work: Work, replica_id: str, *, prompt: int, cached: int | None, predicted: int
) -> Gap:
    """Keep what an engine says of itself since its start, and set our records against it.

    `prompt`: tokens of prompts that it worked on, those it had in its cache not among them;
    `cached`: those, None where it does not count them; `predicted`: tokens that it made. Take the
    reading while nothing is in flight and the spools are read: what is on its way looks missing.
    A gap is found again, and put right, by the next reading. Too much names the replica at once
    (UsageInconsistent); money follows with billing's reconciliation.
    """
    before = token_store.find_reading(work.tx, replica_id)
    after = 0 if before is None else before.counted_seq
    uncached, read, made = token_store.counted_since(work.tx, replica_id, after)
    if before is not None:
        uncached, read, made = (
            before.input_uncached + uncached,
            before.cache_read + read,
            before.made + made,
        )
    reading = Reading(
        replica_id=replica_id,
        prompt=prompt,
        cached=cached,
        predicted=predicted,
        input_uncached=uncached,
        cache_read=read,
        made=made,
        counted_seq=token_store.last_seq(work.tx),
        read_at=work.now,
    )
    token_store.put_reading(work.tx, reading)
    gap = reading.gap
    if gap.is_excess and (before is None or before.gap != gap):
        work.emit(
            UsageInconsistent(
                replica_id=replica_id,
                event_id=None,
                why=f"more is recorded than the engine counted: {_words(gap)}",
            )
        )
    return gap


def _words(gap: Gap) -> str:
    parts = {
        "input": gap.input_uncached,
        "cached input": gap.cache_read,
        "output": gap.output,
    }
    return ", ".join(f"{-left} {name} tokens" for name, left in parts.items() if left < 0)


def list_readings(tx: Connection, since: datetime) -> list[Reading]:
    """The last readings of replicas, of those that were read at or after that instant."""
    return token_store.list_readings(tx, since)


def find_last_served(tx: Connection, replica_id: str) -> TokenUsage | None:
    """The replica's latest record: for which model it worked, and at which price."""
    return token_store.last_served(tx, replica_id)
