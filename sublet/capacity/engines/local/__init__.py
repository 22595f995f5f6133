"""This machine as an engine: its real devices, each run in a sandbox under its own supervisor.

Owns     the folder `root`: runs, homes, scratch, tenant uids, the cached fence table.
Always   a run id has at most one life and one supervisor; the supervisor keeps the deadlines
         and outlives the control plane; what is reported as gone was checked to be gone.
Callers  `app` makes one `LocalEngine`; everybody else meets it through `engines.port`.

Rungs: with bubblewrap a run has user, process, mount, network, IPC and host-name namespaces of
its own, a system-call filter, and cgroups where they can be written. Without it nothing starts,
unless the engine was made for trusted tenants: then a run is a session with limits, and the fence
table says so.
"""

from sublet.capacity.engines.local.engine import LocalEngine

__all__ = ["LocalEngine"]
