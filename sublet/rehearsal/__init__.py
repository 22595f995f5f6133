"""The whole cloud under a virtual clock: the same services and loops on simulated metal.

Owns     the world (clock, engine, loops stepped in order), the players who act in it, the faults.
Always   one seed gives one history; the auditor looks after every step; a broken invariant stops
         the rehearsal with the seed, the instant and what came before.
Callers  `sublet rehearse`, the tests, the soak.
"""

from sublet.rehearsal.play import Report, play
from sublet.rehearsal.world import Broken, World

__all__ = ["Broken", "Report", "World", "play"]
