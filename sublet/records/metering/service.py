"""What others call. Every instant given is cut down to its millisecond first."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import Connection

from sublet.base.kernel.interval import cut, floor_ms, millis
from sublet.base.kernel.price import Window
from sublet.base.store import Work
from sublet.records.metering import store
from sublet.records.metering.model import (
    CorrectionRefused,
    Meter,
    MeterClosed,
    MeterNotFound,
    MeterParty,
    Span,
    Usage,
    UsageKind,
    Use,
)

_MICROSECOND = timedelta(microseconds=1)


def open_meter(
    work: Work,
    *,
    run_id: str,
    workload_id: str,
    organisation_id: str,
    project_id: str | None,
    contract_id: str | None,
    pool_id: str,
    node_id: str,
    devices: int,
    party: MeterParty | str,
    opened_at: datetime,
) -> Meter:
    """Open the meter of a run at the engine's own check. Opening it twice is opening it once."""
    if devices <= 0:
        raise ValueError("a meter counts at least one device")
    known = store.find_meter(work.tx, run_id)
    if known is not None:
        return known
    opened_at = floor_ms(opened_at)
    meter = Meter(
        run_id=run_id,
        workload_id=workload_id,
        organisation_id=organisation_id,
        project_id=project_id,
        contract_id=contract_id,
        pool_id=pool_id,
        node_id=node_id,
        devices=devices,
        party=MeterParty(party),
        opened_at=opened_at,
        metered_to=opened_at,
        closed_at=None,
        close_reason=None,
        cpu_ms=0,
        last_evidence_at=opened_at,
    )
    store.insert_meter(work.tx, meter)
    return meter


def advance(work: Work, run_id: str, *, to: datetime, cpu_ms: int | None = None) -> Meter:
    """Record use up to the evidence at `to`. Never backwards: an earlier `to` adds nothing.

    Raises MeterNotFound, MeterClosed.
    """
    meter = _locked(work, run_id)
    if not meter.is_open:
        raise MeterClosed(run_id=run_id)
    moved = _recorded(work, meter, floor_ms(to), cpu_ms)
    if moved != meter:
        store.update_meter(work.tx, moved)
    return moved


def close_meter(
    work: Work, run_id: str, *, at: datetime, reason: str, cpu_ms: int | None = None
) -> Meter:
    """Close the meter at the instant the use ended. Closing it twice is closing it once.

    Use already recorded after `at` is taken back by corrections; an `at` before the opening
    leaves nothing. Raises MeterNotFound.
    """
    meter = _locked(work, run_id)
    if not meter.is_open:
        return meter
    at = max(floor_ms(at), meter.opened_at)
    moved = _recorded(work, meter, at, cpu_ms)
    if at < moved.metered_to:
        _take_back(work, moved, at)
    closed = dataclasses.replace(moved, metered_to=at, closed_at=at, close_reason=reason)
    store.update_meter(work.tx, closed)
    return closed


def _locked(work: Work, run_id: str) -> Meter:
    meter = store.find_meter(work.tx, run_id, lock=True)
    if meter is None:
        raise MeterNotFound(run_id=run_id)
    return meter


def _recorded(work: Work, meter: Meter, to: datetime, cpu_ms: int | None) -> Meter:
    """Append `[metered_to, to)` as usage, held and ran alike: here nothing is suspended."""
    if to > meter.metered_to:
        store.insert_usage(
            work.tx,
            [
                {
                    "event_id": f"{meter.run_id}:{kind}:{millis(meter.metered_to)}",
                    "run_id": meter.run_id,
                    "organisation_id": meter.organisation_id,
                    "contract_id": meter.contract_id,
                    "kind": kind,
                    "starts_at": meter.metered_to,
                    "ends_at": to,
                    "devices": meter.devices,
                    "corrects": None,
                    "recorded_at": work.now,
                }
                for kind in UsageKind
            ],
        )
    return dataclasses.replace(
        meter,
        metered_to=max(to, meter.metered_to),
        last_evidence_at=max(to, meter.last_evidence_at),
        cpu_ms=max(meter.cpu_ms, cpu_ms or 0),
    )


def _take_back(work: Work, meter: Meter, at: datetime) -> None:
    """Correct, row by row, what was recorded after `at` and is not corrected yet."""
    for kind in UsageKind:
        rows = store.list_usage(
            work.tx,
            store.usage.c.run_id == meter.run_id,
            store.usage.c.kind == kind,
            store.usage.c.ends_at > at,
        )
        for row in (row for row in rows if row.corrects is None):
            left = _left(row, [other for other in rows if other.corrects == row.event_id])
            for begun, end, devices in left:
                start = max(begun, at)
                if start < end and devices > 0:
                    _append_correction(
                        work,
                        row,
                        start,
                        end,
                        -devices,
                        f"{row.event_id}:cut:{millis(start)}",
                    )


def _left(row: Usage, corrections: Collection[Usage]) -> list[tuple[datetime, datetime, int]]:
    """A usage row in pieces, each with the devices that its corrections leave."""
    edges = [edge for other in corrections for edge in (other.starts_at, other.ends_at)]
    pieces = []
    for piece in cut(row.starts_at, row.ends_at, edges):
        assert piece.end is not None
        taken = sum(c.devices for c in corrections if c.starts_at <= piece.start < c.ends_at)
        pieces.append((piece.start, piece.end, row.devices + taken))
    return pieces


def correct(
    work: Work,
    *,
    run_id: str,
    starts_at: datetime,
    ends_at: datetime,
    devices: int,
    corrects: str,
    event_id: str,
) -> None:
    """Take back `-devices` over a part of the usage event `corrects`, as a new record.

    The same `event_id` again changes nothing. What is left is never negative: CorrectionRefused.
    """
    starts_at, ends_at = floor_ms(starts_at), floor_ms(ends_at)
    if store.find_usage(work.tx, event_id) is not None:
        return
    _locked(work, run_id)
    row = store.find_usage(work.tx, corrects)
    if row is None or row.run_id != run_id or row.corrects is not None:
        raise CorrectionRefused("`corrects` names no usage of this run.", param="corrects")
    if devices >= 0:
        raise CorrectionRefused("A correction has negative devices.", param="devices")
    if not row.starts_at <= starts_at < ends_at <= row.ends_at:
        raise CorrectionRefused(
            f"The usage lasted from {row.starts_at.isoformat()} to {row.ends_at.isoformat()}.",
            param="starts_at",
        )
    others = store.list_usage(work.tx, store.usage.c.corrects == corrects)
    for start, end, left in _left(row, others):
        if start < ends_at and starts_at < end and left + devices < 0:
            raise CorrectionRefused(
                f"From {start.isoformat()} on only {left} devices are left.", param="devices"
            )
    _append_correction(work, row, starts_at, ends_at, devices, event_id)


def _append_correction(
    work: Work, row: Usage, start: datetime, end: datetime, devices: int, event_id: str
) -> None:
    store.insert_usage(
        work.tx,
        [
            {
                "event_id": event_id,
                "run_id": row.run_id,
                "organisation_id": row.organisation_id,
                "contract_id": row.contract_id,
                "kind": row.kind,
                "starts_at": start,
                "ends_at": end,
                "devices": devices,
                "corrects": row.event_id,
                "recorded_at": work.now,
            }
        ],
    )


def windows(tx: Connection, contract_id: str, kind: UsageKind | str = "held") -> list[Window]:
    """All use under a contract, for `price.rate`: one window a run, then each correction.

    A run's rows touch, so their sum rates as one window: rating stays cheap however often a long
    run was metered.
    """
    return _windows(tx, "contract_id", contract_id, kind)


def windows_of_run(tx: Connection, run_id: str, kind: UsageKind | str = "held") -> list[Window]:
    """The same for one run: the owner's own use has no contract."""
    return _windows(tx, "run_id", run_id, kind)


def _windows(tx: Connection, side: store.Side, of: str, kind: UsageKind | str) -> list[Window]:
    found = []
    for stretch in store.list_stretches(tx, side, of, kind):
        length_us = (stretch.ends_at - stretch.starts_at) // _MICROSECOND
        assert stretch.covered_us == length_us, f"usage of {stretch.run_id} has gaps or overlaps"
        found.append(Window(start=stretch.starts_at, end=stretch.ends_at, units=stretch.devices))
    corrections = store.list_corrections(tx, side, of, kind)
    found += [Window(start=c.starts_at, end=c.ends_at, units=c.devices) for c in corrections]
    return found


def find_meter(tx: Connection, run_id: str) -> Meter | None:
    return store.find_meter(tx, run_id)


def get_meter(tx: Connection, run_id: str) -> Meter:
    meter = store.find_meter(tx, run_id)
    if meter is None:
        raise MeterNotFound(run_id=run_id)
    return meter


def list_open_meters(tx: Connection) -> list[Meter]:
    """Meters that run, oldest first. The ledger must not let their holds lapse."""
    return store.list_open_meters(tx)


def list_meters(tx: Connection, *, contract_id: str) -> list[Meter]:
    """All meters of a contract, oldest first: a requeued job has one for each run."""
    return store.list_meters(tx, contract_id)


def list_usage(tx: Connection, run_id: str, kind: UsageKind | str = "held") -> list[Usage]:
    """The records of a run in the order of recording, corrections included."""
    return store.list_usage(tx, store.usage.c.run_id == run_id, store.usage.c.kind == kind)


def begin_device(work: Work, device_id: str, use: Use | str, at: datetime, ref: str = "") -> None:
    """Start accounting for a device. A device that has begun keeps the span it is in."""
    if store.find_open_span(work.tx, device_id) is None:
        store.insert_span(
            work.tx,
            Span(
                device_id=device_id,
                seq=1,
                use=Use(use),
                starts_at=floor_ms(at),
                ends_at=None,
                ref=ref,
            ),
        )


def switch_device(work: Work, device_id: str, use: Use | str, at: datetime, ref: str = "") -> None:
    """From `at` on the device does something else: its open span ends there, a new one begins.

    The past stays: an `at` before the open span's start is raised to it. The device has begun.
    """
    span = store.find_open_span(work.tx, device_id)
    assert span is not None, f"{device_id} was never begun"
    use, at = Use(use), max(floor_ms(at), span.starts_at)
    if (span.use, span.ref) == (use, ref):
        return
    if at == span.starts_at:
        # Nothing happened under the old name: name the span anew rather than keep an empty one.
        store.update_span(work.tx, dataclasses.replace(span, use=use, ref=ref))
        return
    store.update_span(work.tx, dataclasses.replace(span, ends_at=at))
    store.insert_span(
        work.tx,
        Span(device_id=device_id, seq=span.seq + 1, use=use, starts_at=at, ends_at=None, ref=ref),
    )


def list_spans(tx: Connection, device_id: str) -> list[Span]:
    """A device's whole history, in order."""
    return store.list_spans(tx, device_id)


def find_beginning(tx: Connection) -> datetime | None:
    """When the first device's time began to be kept; None while there is none."""
    return store.first_span_start(tx)


def partition(
    tx: Connection,
    *,
    device_ids: Collection[str] | None = None,
    start: datetime,
    end: datetime,
) -> dict[str, int]:
    """Device-milliseconds of `[start, end)` by use, every use named; None: all devices.

    For devices that had begun by `start` the values sum to devices × length.
    """
    found = store.sum_spans(tx, floor_ms(start), floor_ms(end), device_ids)
    return {use.value: found.get(use.value, 0) for use in Use}
