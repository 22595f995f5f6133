"""SSH: one door for every workload, on one port.

Owns     the host key, logins, and what passes between a client and the inside of a workload.
Always   the login name is a workload's id and the key one that its spec names; nothing a client
         asks for is done on the host: processes, files and connections are the engine's, inside the
         workload's own fences; what is buffered for a client has a bound.
Callers  app, which wires `lookup` to the shops and hands over an engine that is `Attachable`.
"""

from __future__ import annotations

from sublet.edge.bastion.hostkey import public_line
from sublet.edge.bastion.server import Bastion, Limits, Lookup, NoticeOf, Target

__all__ = ["Bastion", "Limits", "Lookup", "NoticeOf", "Target", "public_line"]
