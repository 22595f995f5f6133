"""`LocalEngine`: the port on this machine, over the folders of its runs and their supervisors.

It holds nothing that a second engine on the same folder, in another process or after a restart,
would miss: what runs is in the folders, and who lives is told by locks. So adopting is just
looking, and two engines at once are no more than one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import re
import select
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sublet.base.kernel.clock import Clock
from sublet.capacity.engines.local import attach, hardware, observing, planning, probes, uids
from sublet.capacity.engines.local.channel import Channel, NoSupervisor
from sublet.capacity.engines.local.party import PIDS
from sublet.capacity.engines.local.scrubbing import scrub_run
from sublet.capacity.engines.local.supervise import logs, records
from sublet.capacity.engines.local.wipe import wipe
from sublet.capacity.engines.port import (
    EngineError,
    Fence,
    Inventory,
    NotAttachable,
    Notice,
    Observation,
    Phase,
    RunNotFound,
    ScrubReport,
    Spawned,
    SpawnSpec,
    StartRefused,
    StartSpec,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_BOOTSTRAP = "import sys; sys.path.append(sys.argv.pop(1)); from supervise.main import main; main()"
_START_SECONDS = 15.0
_OVER = (Phase.EXITED, Phase.FAILED)


class LocalEngine:
    """Implements `Engine` and `Attachable`. May be used from many threads.

    `trusted` allows the rung without a sandbox where bubblewrap is missing. `without` takes
    things away that this machine has (`bubblewrap`, `cgroup`, `netns`, `seccomp`, `outbound`,
    `pasta`), to show what the fence table says then; it is for tests.
    """

    def __init__(
        self,
        root: Path,
        clock: Clock,
        *,
        trusted: bool = False,
        keep_for_sublet: bool = True,
        log_bytes: int = 16 << 20,
        disk_reserve_bytes: int | None = None,
        without: frozenset[str] = frozenset(),
    ) -> None:
        self._root = Path(root).resolve()
        self._clock = clock
        self._keep_for_sublet = keep_for_sublet
        for name in ("runs", "homes", "scratch"):
            (self._root / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self._rules = planning.Rules.found(
            self._root,
            trusted=trusted,
            without=without,
            log_bytes=log_bytes,
            disk_reserve_bytes=disk_reserve_bytes,
        )
        self._drop_beginnings()

    # -- what there is

    def inventory(self) -> Inventory:
        found = self._hardware()
        probed = self._probed(fresh=False)
        return Inventory(
            node=os.uname().nodename,
            devices=found.devices,
            disk_bytes=self._disk_bytes(),
            fences=probed.fences,
            outbound=self._rules.outbound if probed.is_outbound_shut else "none",
            boot_id=self._clock.boot_id(),
        )

    def probe(self) -> Mapping[str, Fence]:
        """Try to break out once more, whatever was found before; the table is kept anew."""
        return self._probed(fresh=True).fences

    def _probed(self, *, fresh: bool) -> probes.Probed:
        found = self._hardware()
        with (self._root / "probe.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # other processes look into the cache afterwards
            return probes.probe(
                self._root,
                self._clock,
                self._rules,
                [device.name for device in found.devices],
                self._sibling,
                cpus_each=len(found.cpus) / len(found.devices),
                fresh=fresh,
            )

    def _sibling(self, folder: Path) -> LocalEngine:
        """An engine for probes: the same powers in another folder, with small limits."""
        engine = LocalEngine(
            folder,
            self._clock,
            trusted=self._rules.trusted,
            keep_for_sublet=self._keep_for_sublet,
            disk_reserve_bytes=0,
            without=self._rules.without,
        )
        engine._rules = dataclasses.replace(engine._rules, is_exclusive=False, pids=PIDS)
        return engine

    def _hardware(self) -> hardware.Hardware:
        return hardware.find(keep_for_sublet=self._keep_for_sublet)

    def _disk_bytes(self) -> int:
        """What runs may use in all: what is free, what live runs use already, less the reserve."""
        used = sum(seen.disk_bytes for seen in self.observe().values() if seen.phase not in _OVER)
        return max(0, self._free_bytes() + used - self._rules.disk_reserve_bytes)

    def _free_bytes(self) -> int:
        volume = os.statvfs(self._root)
        return volume.f_bavail * volume.f_frsize

    # -- starting

    def start(self, spec: StartSpec) -> None:
        folder = self._folder(_checked(spec.run_id, "run id"))
        _checked(spec.home, "home")
        with self._one_start_at_a_time():
            folder.mkdir(mode=0o700, exist_ok=True)
            lock = records.open_lock(str(folder))
            try:
                if not records.take_lock(lock) or _has_lived(folder):
                    return
                plan = self._plan(spec)
                records.write_plan(str(folder), plan)
            except BaseException:
                os.close(lock)
                self._drop_if_empty(folder)
                raise
        try:
            self._launch(folder, lock)
        finally:
            os.close(lock)

    @contextlib.contextmanager
    def _one_start_at_a_time(self) -> Iterator[None]:
        """From the look at who holds what to the intent written down, over all processes."""
        with (self._root / "start.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _plan(self, spec: StartSpec) -> records.Plan:
        """Raises StartRefused."""
        self._rules.check_rung()
        if self._free_bytes() < self._rules.disk_reserve_bytes:
            raise StartRefused(
                f"the disk of {self._root} has less than the reserve of "
                f"{self._rules.disk_reserve_bytes} bytes free: make room, then start again"
            )
        for holder in self._holders(spec) if self._rules.is_exclusive else ():
            raise StartRefused(f"run {holder} still holds what run {spec.run_id} needs")
        home = self._root / "homes" / spec.home
        scratch = self._root / "scratch" / spec.run_id
        rules = self._proven_rules()
        plan = rules.plan(
            spec,
            self._hardware(),
            clock=self._clock,
            home=str(home),
            scratch=str(scratch),
            disk_bytes=self._disk_bytes(),
        )
        try:
            uid = uids.allocate(self._root, spec.home) if os.geteuid() == 0 else None
            for path in (home, scratch):
                path.mkdir(mode=0o700, exist_ok=True)
                if uid is not None:
                    os.chown(path, uid, uid, follow_symlinks=False)
        except (OSError, ValueError) as error:
            raise EngineError(f"home and scratch cannot be prepared: {error}") from error
        return rules.owned_by(plan, uid)

    def _proven_rules(self) -> planning.Rules:
        """A way out that the probes did not find open, or not shut to the host, is not used."""
        kept = probes.find_kept(self._root, self._clock, self._rules)
        if kept is None or kept.is_outbound_shut:
            return self._rules
        return dataclasses.replace(self._rules, outbound="none")

    def _holders(self, spec: StartSpec) -> Iterator[str]:
        """Live runs with the same workload, home or device: a last guard, not admission."""
        home = str(self._root / "homes" / spec.home)
        for run_id, seen in self.observe().items():
            if run_id == spec.run_id or seen.phase in _OVER:
                continue
            plan = self._find_plan(run_id)
            if plan is None:
                continue
            same = seen.workload_id == spec.workload_id or plan.home == home
            if same or set(plan.devices) & set(spec.devices):
                yield run_id

    def _launch(self, folder: Path, lock: int) -> None:
        """Start the supervisor, which takes the lock over, and wait until it is on record."""
        ready, tell = os.pipe2(os.O_CLOEXEC)
        free = max(lock, tell) + 1
        here = str(Path(__file__).parent)
        argv = [sys.executable, "-I", "-S", "-c", _BOOTSTRAP, here, str(folder)]
        try:
            pid = os.posix_spawn(
                sys.executable,
                [*argv, str(free), str(free + 1)],
                {"PATH": os.environ.get("PATH", os.defpath)},
                setsid=True,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, lock, free),
                    (os.POSIX_SPAWN_DUP2, tell, free + 1),
                ],
            )
            os.close(tell)
            tell = -1
            with contextlib.suppress(ChildProcessError):  # where SIGCHLD is ignored
                os.waitpid(pid, 0)  # it leaves a child behind and ends at once
            if not select.select([ready], [], [], _START_SECONDS)[0]:
                raise EngineError(f"the supervisor of {folder.name} did not report in time")
            if not os.read(ready, 16):
                raise EngineError(f"the supervisor of {folder.name} ended: {_said(folder)}")
        except OSError as error:
            raise EngineError(f"no supervisor could be started: {error}") from error
        finally:
            for fd in (ready, tell):
                if fd >= 0:
                    os.close(fd)

    def _drop_beginnings(self) -> None:
        """Folders of starts that got no further than the folder."""
        with self._one_start_at_a_time():
            for run_id in os.listdir(self._root / "runs"):
                self._drop_if_empty(self._root / "runs" / run_id)

    def _drop_if_empty(self, folder: Path) -> None:
        """A refused start leaves no trace."""
        if not (folder / records.PLAN).exists():
            shutil.rmtree(folder, ignore_errors=True)

    # -- watching

    def observe(self) -> Mapping[str, Observation]:
        seen = {}
        for run_id in os.listdir(self._root / "runs"):
            found = observing.observe(self._folder(run_id), self._clock)
            if found is not None:
                seen[run_id] = found
        return seen

    def _observed(self, run_id: str) -> Observation:
        folder = self._folder(run_id)
        found = observing.observe(folder, self._clock) if folder.is_dir() else None
        if found is None:
            raise RunNotFound(f"there is no run {run_id} here")
        return found

    # -- orders

    def notice(self, run_id: str, notice: Notice) -> datetime:
        # By duration, not by instant: while the clock is slewed an hour of it is not an hour.
        lead = notice.term_at - self._clock.now()
        at_ns = self._clock.boot_ns() + lead // timedelta(microseconds=1) * 1000
        shown = notice.term_at.isoformat(timespec="milliseconds")
        order = {
            "op": "notice",
            "at_ns": at_ns,
            "notice": {
                "action": notice.action,
                "time": shown.replace("+00:00", "Z"),
                "reason": notice.reason,
            },
        }
        answer = self._order(run_id, order)
        if answer is not None:
            return self._clock.from_boot_ns(int(answer["at_ns"]))
        seen = self._observed(run_id)
        return seen.term_at or seen.deadline_at or seen.exited_at or notice.term_at

    def withdraw(self, run_id: str) -> None:
        self._order(run_id, {"op": "withdraw"})

    def extend(self, run_id: str, until: datetime) -> None:
        self._order(run_id, {"op": "extend", "until_ns": self._clock.to_boot_ns(until)})

    def publish_metadata(self, run_id: str, document: Mapping[str, Any]) -> None:
        self._order(run_id, {"op": "metadata", "document": dict(document)})

    def signal(self, run_id: str, name: str) -> None:
        """Raises NotAttachable where nothing runs that could be signalled."""
        if self._order(run_id, {"op": "signal", "signum": int(signal.Signals[name])}) is None:
            raise NotAttachable

    def stop(self, run_id: str, *, grace_seconds: int, reason: str) -> None:
        self._order(run_id, {"op": "stop", "grace_seconds": grace_seconds, "reason": reason})

    def _order(self, run_id: str, order: dict[str, Any]) -> dict[str, Any] | None:
        """Tell the supervisor; None where the run is over and an order has no more effect."""
        folder = self._folder(run_id)
        try:
            with Channel(str(folder)) as channel:
                return channel.ask(order)
        except NoSupervisor:
            seen = self._observed(run_id)
            if seen.phase in _OVER:
                return None
            raise EngineError(f"run {run_id} has no supervisor that answers") from None
        except NotAttachable:
            return None
        except OSError as error:
            raise EngineError(f"run {run_id}: {order['op']}: {error}") from error

    # -- afterwards

    def logs(self, run_id: str, *, offset: int = 0, limit: int = 1 << 16) -> tuple[bytes, int]:
        folder = self._folder(run_id)
        try:
            return logs.read(str(folder), offset, limit)
        except FileNotFoundError:
            raise RunNotFound(f"there is no run {run_id} here") from None

    def door(self, run_id: str, name: str) -> str:
        assert _NAME.fullmatch(name), f"{name!r} is no name of a file"
        plan = self._find_plan(run_id)
        if plan is None:
            raise RunNotFound(f"there is no run {run_id} here")
        return os.path.join(plan.home, name)

    def scrub(self, run_id: str) -> ScrubReport:
        seen = self._observed(run_id)
        return scrub_run(self._folder(run_id), self._clock, seen)

    def forget(self, run_id: str) -> None:
        """No effect before the scrub."""
        folder = self._folder(run_id)
        seen = observing.observe(folder, self._clock) if folder.is_dir() else None
        if seen is not None and not seen.scrubbed:
            return
        scratch = self._root / "scratch" / run_id  # of a start that got no further than its plan
        left = [*wipe(str(scratch)), *wipe(str(folder))]
        if left:
            raise EngineError(f"the records of run {run_id} could not be deleted: {left[0]}")

    def erase_home(self, home: str) -> None:
        path = self._root / "homes" / _checked(home, "home")
        with self._one_start_at_a_time():
            for run_id, seen in self.observe().items():
                plan = self._find_plan(run_id)
                if plan is not None and plan.home == str(path) and seen.phase not in _OVER:
                    raise EngineError(f"run {run_id} still uses the home {home}: stop it first")
            left = wipe(str(path))
            if left:
                raise EngineError(f"the home {home} could not be deleted: {left[0]}")
            if os.geteuid() == 0:
                uids.release(self._root, home)

    # -- reaching in

    def spawn(self, run_id: str, spec: SpawnSpec, fds: Sequence[int]) -> Spawned:
        return attach.spawn(str(self._attachable(run_id)), spec, fds)

    def connect(self, run_id: str, host: str, port: int) -> int:
        return attach.connect(str(self._attachable(run_id)), host, port)

    def file(self, run_id: str, operation: str, *args: Any) -> Any:
        return attach.file(str(self._attachable(run_id)), operation, args)

    def _attachable(self, run_id: str) -> Path:
        folder = self._folder(run_id)
        if not folder.is_dir():
            raise NotAttachable(f"there is no run {run_id} here")
        return folder

    # -- folders

    def _folder(self, run_id: str) -> Path:
        if not _NAME.fullmatch(run_id):
            raise RunNotFound(f"{run_id!r} is not a run id")
        return self._root / "runs" / run_id

    def _find_plan(self, run_id: str) -> records.Plan | None:
        try:
            return records.read_plan(str(self._folder(run_id)))
        except records.Damaged:
            return None


def _checked(name: str, what: str) -> str:
    if not _NAME.fullmatch(name):
        raise StartRefused(f"the {what} {name!r} is not a name: letters, digits, '.', '_' and '-'")
    return name


def _has_lived(folder: Path) -> bool:
    try:
        return records.read_state(str(folder)) is not None
    except records.Damaged:
        return True


def _said(folder: Path) -> str:
    try:
        return (folder / "supervisor.err").read_text(errors="replace").strip()[-500:]
    except OSError:
        return "nothing is known"
