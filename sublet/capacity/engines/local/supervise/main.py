"""How a supervisor comes to life: away from its parent, with the run's lock, on record at once.

Arguments: the run's folder, the descriptor of its lock (held already), and one to report on:
`ok` when the run is on record, `known` when it has had its life before, nothing at all on a fault.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import traceback

from . import records, sandbox
from .supervisor import Supervisor

_PR_SET_CHILD_SUBREAPER = 36
_SPARED_BY_THE_KERNEL = "-900"


def main() -> None:
    folder, lock, ready = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    _detach(folder, {lock, ready})
    try:
        plan = records.read_plan(folder)
        if plan is None or plan.v != records.PROTOCOL:
            raise records.Damaged("the plan is not one this supervisor can read")
        if records.read_state(folder) is not None:
            _report(ready, b"known")  # a supervisor has been here: a run has one life
            return
        supervisor = Supervisor(folder, plan)
        _report(ready, b"ok")
        supervisor.serve()
    except BaseException:
        traceback.print_exc()  # whatever is left inside ends with this process
        raise


def _report(ready: int, word: bytes) -> None:
    """Whoever started us may be gone by now: then nobody needs to hear it."""
    try:
        os.write(ready, word)
    except BrokenPipeError:
        pass
    finally:
        os.close(ready)


def _detach(folder: str, kept: set[int]) -> None:
    """Another parent, no terminal, no descriptors but those given, no folder held."""
    if os.fork():
        os._exit(0)
    for ignored in (signal.SIGHUP, signal.SIGINT, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for name in os.listdir("/proc/self/fd"):
        if int(name) not in kept:
            try:
                os.close(int(name))
            except OSError:
                continue
    for fd in kept:
        os.set_inheritable(fd, False)
    null = os.open("/dev/null", os.O_RDWR)
    path = os.path.join(folder, "supervisor.err")
    errors = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number, fd in ((0, null), (1, null), (2, errors)):
        if number != fd:
            os.dup2(fd, number)
    os.chdir("/")
    os.umask(0o077)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, most), most))
    # Orphans of a bare run come here, where they are seen.
    sandbox.libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    sandbox.write_oom_adjust(_SPARED_BY_THE_KERNEL)
