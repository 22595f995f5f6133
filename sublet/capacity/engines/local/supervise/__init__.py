"""What stays with a run when the control plane is away: one supervisor per run.

The supervisor is a process of its own that outlives whoever started it, so everything here uses
the standard library alone and relative imports alone: it runs as `python -I -S`, without the
installation's packages, and costs little to start. `init` is the exception: it runs inside the
sandbox, on the Python that /usr has there (3.9 or newer), as a single file.

Always   the supervisor holds the deadlines, on the boot clock; it treats the init inside as
         somebody else's program; it never waits for anybody without a limit.
"""
