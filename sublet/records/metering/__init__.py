"""Use that happened: meters of runs, and what every device was doing.

Owns     meters, usage (immutable; a correction is a new row), spans of devices.
Always   the usage of a run is contiguous and without overlap from its opening to `metered_to`, and
         never passes the last evidence; the spans of a device partition time in whole milliseconds.
Callers  compute opens, advances and closes meters and switches devices, fleet begins them, market
         rates `windows`, economics reads `partition`. Ids mean nothing here; no money is known.
"""

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
from sublet.records.metering.service import (
    advance,
    begin_device,
    close_meter,
    correct,
    find_beginning,
    find_meter,
    get_meter,
    list_meters,
    list_open_meters,
    list_spans,
    list_usage,
    open_meter,
    partition,
    switch_device,
    windows,
    windows_of_run,
)

__all__ = [
    "CorrectionRefused",
    "Meter",
    "MeterClosed",
    "MeterNotFound",
    "MeterParty",
    "Span",
    "Usage",
    "UsageKind",
    "Use",
    "advance",
    "begin_device",
    "close_meter",
    "correct",
    "find_beginning",
    "find_meter",
    "get_meter",
    "list_meters",
    "list_open_meters",
    "list_spans",
    "list_usage",
    "open_meter",
    "partition",
    "switch_device",
    "windows",
    "windows_of_run",
]
