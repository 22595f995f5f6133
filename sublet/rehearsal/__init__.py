"""The whole cloud under a virtual clock: the same services and loops on simulated metal.

Owns     the world (clock, engine, loops stepped in order), the people who act in it, the faults.
Always   one seed gives one history; the auditor looks after every step that changed something, or
         every n-th where a rehearsal says so; a broken invariant stops it with the seed, the
         instant and what came before.
Callers  `sublet rehearse`, the tests, the soak.
"""

from sublet.rehearsal.people import Consumer, Owner
from sublet.rehearsal.play import Report, play
from sublet.rehearsal.world import Broken, World

__all__ = ["Broken", "Consumer", "Owner", "Report", "World", "play"]
