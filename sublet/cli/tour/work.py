"""The real work of the tour: what runs inside the workloads, and how one logs in to them."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sublet.cli.workloads import ssh_argv

if TYPE_CHECKING:
    from sublet.base.wire import rest

ROUNDS_A_STEP = 20_000
STEP_SECONDS = 0.25
SEED = b"sublet"
LOGIN_SECONDS = 30

COUNT_PRIMES = """
import glob, json, os
seen = bytearray([1]) * 200000
for n in range(2, 448):
    if seen[n]:
        seen[n * n :: n] = bytes(len(seen[n * n :: n]))
gpus = len(glob.glob("/dev/nvidia[0-9]*"))
print(json.dumps({"primes": sum(seen) - 2, "cpus": len(os.sched_getaffinity(0)), "gpus": gpus}))
"""
PRIMES = 17_984
"""Below 200,000."""

READ_NOTICE = """
import json, os, urllib.error, urllib.request
url = os.environ["SUBLET_METADATA_URL"] + "/v1/metadata/interruption"
try:
    print(json.dumps(json.load(urllib.request.urlopen(url, timeout=5))))
except urllib.error.HTTPError as error:
    print(json.dumps({"status": error.code}))
"""

CHAIN = """
import hashlib, json, os, signal, sys, time, urllib.request
steps, rounds, pace = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
path = os.path.join(os.environ["HOME"], "checkpoint")
url = os.environ["SUBLET_METADATA_URL"] + "/v1/metadata/interruption"

def now():
    return time.clock_gettime(time.CLOCK_BOOTTIME)

def say(**what):
    print(json.dumps(what), flush=True)

done, chain = 0, sys.argv[4].encode()
if os.path.exists(path):
    with open(path) as file:
        kept = json.load(file)
    done, chain = kept["done"], bytes.fromhex(kept["chain"])
say(event="start", done=done)

def told(*_):
    say(event="sigterm", done=done, at=now())
    sys.exit(143)

signal.signal(signal.SIGTERM, told)
noticed = False
while done < steps:
    until = now() + pace
    for _ in range(rounds):
        chain = hashlib.sha256(chain).digest()
    done += 1
    with open(path + ".new", "w") as file:
        json.dump({"done": done, "chain": chain.hex()}, file)
    os.replace(path + ".new", path)
    if not noticed:
        try:
            found = json.load(urllib.request.urlopen(url, timeout=1))
            say(event="notice", at=now(), found=found)
            noticed = True
        except OSError:
            pass
    time.sleep(max(0.0, until - now()))
say(event="end", done=done, chain=chain.hex())
"""
"""A chain of hashes with a checkpoint each step: it ends with the same value however often it is
interrupted. It also looks for its own notice, as a careful workload does."""


def chain_command(steps: int) -> list[str]:
    return [
        *("python3", "-u", "-c", CHAIN),
        *(str(steps), str(ROUNDS_A_STEP), str(STEP_SECONDS), SEED.decode()),
    ]


def chain_value(steps: int) -> str:
    """What the chain ends with when nothing interrupts it."""
    chain = SEED
    for _ in range(steps * ROUNDS_A_STEP):
        chain = hashlib.sha256(chain).digest()
    return chain.hex()


@dataclass(frozen=True, slots=True)
class Answer:
    code: int
    out: str
    err: str


class Visitor:
    """A person with a key of their own, made for the tour in a folder that goes with it."""

    def __init__(self, folder: Path) -> None:
        import asyncssh

        key = asyncssh.generate_private_key("ssh-ed25519", comment="tour")
        self._file = folder / "id_ed25519"
        self._file.touch(0o600)
        self._file.write_bytes(key.export_private_key())
        self.public_key = key.export_public_key().decode().strip()
        self.client = "OpenSSH" if shutil.which("ssh") else "asyncssh"

    def run(self, where: rest.Ssh, program: str) -> Answer:
        """Log in and run a Python program there: by the system's ssh, where there is one."""
        command = "python3 -"
        if self.client == "OpenSSH":
            options = ["-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-F", "none"]
            argv = ssh_argv(where, identity=self._file)
            argv[1:1] = options
            done = subprocess.run(
                [*argv, command],
                input=program,
                capture_output=True,
                text=True,
                timeout=LOGIN_SECONDS,
                check=False,
            )
            return Answer(done.returncode, done.stdout, done.stderr)
        return asyncio.run(self._run(where, command, program))

    async def _run(self, where: rest.Ssh, command: str, program: str) -> Answer:
        import asyncssh

        connecting = asyncssh.connect(
            where.host,
            where.port,
            username=where.user,
            client_keys=[str(self._file)],
            known_hosts=None,
            config=None,
        )
        async with connecting as connection:
            done = await connection.run(command, input=program, timeout=LOGIN_SECONDS)
        return Answer(done.exit_status or 0, str(done.stdout), str(done.stderr))
