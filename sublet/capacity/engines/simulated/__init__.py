"""The simulated engine: nodes, runs and their troubles in memory, under whatever clock it is given.

Owns     simulated nodes and runs, the faults put upon them.
Always   the same clock readings, calls and seed give the same history; a device carries at most one
         live run; no SIGTERM before a published deadline but by `stop`.
Callers  the rehearsal and tests. It outlives control planes, as real supervisors do: whoever
         restarts one keeps the engine object.
"""

from sublet.capacity.engines.simulated.behaviour import Behaviour, behaviour_of
from sublet.capacity.engines.simulated.engine import SimulatedEngine
from sublet.capacity.engines.simulated.faults import Fault, FaultKind, seeded_faults

__all__ = [
    "Behaviour",
    "Fault",
    "FaultKind",
    "SimulatedEngine",
    "behaviour_of",
    "seeded_faults",
]
