"""From POST to the first SSH command's answer ÷ (the same sandbox by hand + one bare login).

Sublet's side: a real cloud; one `POST /v1/instances`, then one `ssh` that waits at the door until
the instance runs and answers `true`. The peer: a bubblewrap sandbox with the same namespaces and
mounts, started by hand with `true` inside, then one `ssh` login with a command to a bare asyncssh
server without any sandbox. All by wall clock, since it is what a person waits for; rounds alternate.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def run(rounds: int) -> dict[str, list[float]]:
    from sublet.base.wire import rest
    from sublet.sdk import Client

    names = ("ratio", "sublet s", "sandbox by hand s", "bare login s")
    figures: dict[str, list[float]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chmod(folder, 0o755)
        key = folder / "id"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        public = key.with_suffix(".pub").read_text().strip()
        ready = folder / "ready.json"
        cloud = subprocess.Popen(
            [sys.executable, "-m", "sublet", "up", "--trusted-tenants", *_where(folder, ready)],
            stdout=subprocess.DEVNULL,
            env={**os.environ, "XDG_CONFIG_HOME": str(folder / "config")},
        )
        bare = subprocess.Popen(
            [sys.executable, "-m", "bench.first_ssh", str(key.with_suffix(".pub"))],
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert bare.stdout is not None
            bare_port = int(bare.stdout.readline())
            while not ready.exists():
                threading.Event().wait(0.1)
            facts = json.loads(ready.read_text())
            ssh_port = facts["ssh"]["port"]
            body = rest.SignUpCreate(email="a@example.org", organisation_name="A")
            with Client(facts["api_url"]) as door:
                secret = door.sign_up(body).secret
            with Client(facts["api_url"], secret) as client:
                _ssh(key, bare_port, "tenant")
                for _ in range(rounds):
                    began = time.monotonic()
                    box = client.instances.create(
                        rest.InstanceCreate(offer_id="cpu-spot", ssh_keys=[public])
                    )
                    _ssh(key, ssh_port, box.id)
                    ours = time.monotonic() - began
                    sandbox = _sandbox_by_hand(folder)
                    began = time.monotonic()
                    _ssh(key, bare_port, "tenant")
                    login = time.monotonic() - began
                    client.instances.terminate(box.id)
                    while client.instances.get(box.id).state != "terminated":
                        threading.Event().wait(0.1)
                    figures["ratio"].append(ours / (sandbox + login))
                    figures["sublet s"].append(ours)
                    figures["sandbox by hand s"].append(sandbox)
                    figures["bare login s"].append(login)
        finally:
            bare.terminate()
            bare.wait()
            if bare.stdout is not None:
                bare.stdout.close()
            cloud.send_signal(signal.SIGINT)
            cloud.wait()
    return figures


def _where(folder: Path, ready: Path) -> list[str]:
    data = str(folder / "data")
    ports = ["--port", "0", "--ssh-port", "0", "--gateway-port", "0"]
    return ["--data", data, *ports, "--ready-file", str(ready)]


def _ssh(key: Path, port: int, user: str) -> None:
    options = ["BatchMode=yes", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]
    command = ["ssh", "-q", "-i", str(key), "-p", str(port)]
    for option in options:
        command += ["-o", option]
    subprocess.run([*command, f"{user}@127.0.0.1", "true"], check=True)


def _sandbox_by_hand(folder: Path) -> float:
    """A sandbox with the same namespaces and mounts as a workload's, typed by hand."""
    home = folder / "home-by-hand"
    home.mkdir(exist_ok=True)
    command = ["bwrap", "--unshare-all", "--uid", "1000", "--gid", "1000", "--hostname", "by-hand"]
    command += ["--cap-drop", "ALL", "--die-with-parent", "--clearenv", "--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib64"):
        command += ["--symlink", f"usr/{name}", f"/{name}"]
    command += ["--proc", "/proc", "--dev", "/dev"]
    for name in ("/tmp", "/run", "/dev/shm"):
        command += ["--tmpfs", name]
    command += ["--bind", str(home), "/home/tenant", "--chdir", "/home/tenant", "/usr/bin/true"]
    began = time.monotonic()
    subprocess.run(command, check=True)
    return time.monotonic() - began


def serve_bare(public_key: str) -> None:
    import asyncssh

    async def handle(process: Any) -> None:
        child = await asyncio.create_subprocess_shell(process.command)
        process.exit(await child.wait())

    async def serve() -> None:
        server = await asyncssh.create_server(
            asyncssh.SSHServer,
            "127.0.0.1",
            0,
            server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            authorized_client_keys=public_key,
            process_factory=handle,
        )
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Event().wait()

    asyncio.run(serve())


if __name__ == "__main__":
    serve_bare(sys.argv[1])
