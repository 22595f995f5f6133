"""Raw compute: instances, jobs, and the replicas that serve models.

Owns     workloads, their runs, every transition.
Always   a workload has at most one run that is not over; a meter opens at the engine's own check
         and closes at SIGTERM when we end the run, at its observed exit when it ends by itself or
         its consumer stops it, at the last evidence when nobody saw its end; devices are given
         back only after their scrub; interruptions never count against retries; a sealed replica
         and a stranger's workload are never on one node at one time.
Callers  edges rent, start, stop and change; models rents replicas; billing extends runways and stops for its reasons; the
         loop runner steps `ComputeLoop`, which alone calls the engine.
"""

from sublet.shops.compute.loops import ComputeLoop
from sublet.shops.compute.model import (
    Desired,
    Location,
    MeterClosed,
    MeterOpened,
    NoticeProtected,
    Reason,
    Run,
    RunState,
    SealedNode,
    ServerSpec,
    ShutdownBegun,
    StopAnswer,
    StrangersPresent,
    Transition,
    Workload,
    WorkloadChanged,
    WorkloadNotFound,
    WorkloadSpec,
)
from sublet.shops.compute.replicas import rent_replica
from sublet.shops.compute.service import (
    begin_shutdown,
    cancel,
    change,
    cordon,
    count_live,
    extend_runway,
    get_workload,
    location,
    rent,
    start,
    stop,
    stop_for,
    stopped_costs_per_hour,
    terminate,
    uncordon,
)
from sublet.shops.compute.spec import from_document, to_document
from sublet.shops.compute.states import LIVE, TERMINAL, State, Step, WrongState
from sublet.shops.compute.store import (
    find_last_run,
    find_live_run,
    find_workload_of,
    list_live_runs,
    list_runs,
    list_transitions,
    list_workloads,
)

__all__ = [
    "LIVE",
    "TERMINAL",
    "ComputeLoop",
    "Desired",
    "Location",
    "MeterClosed",
    "MeterOpened",
    "NoticeProtected",
    "Reason",
    "Run",
    "RunState",
    "SealedNode",
    "ServerSpec",
    "ShutdownBegun",
    "State",
    "Step",
    "StopAnswer",
    "StrangersPresent",
    "Transition",
    "Workload",
    "WorkloadChanged",
    "WorkloadNotFound",
    "WorkloadSpec",
    "WrongState",
    "begin_shutdown",
    "cancel",
    "change",
    "cordon",
    "count_live",
    "extend_runway",
    "find_last_run",
    "find_live_run",
    "find_workload_of",
    "from_document",
    "get_workload",
    "list_live_runs",
    "list_runs",
    "list_transitions",
    "list_workloads",
    "location",
    "rent",
    "rent_replica",
    "start",
    "stop",
    "stop_for",
    "stopped_costs_per_hour",
    "terminate",
    "to_document",
    "uncordon",
]
