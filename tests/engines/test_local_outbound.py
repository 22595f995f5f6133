"""A way out that does not lead to the host. In network namespaces of the test's own only.

"host" is a namespace with an address of its own, a control plane on all its addresses and
something on its loopback; "peer" is a namespace behind it, which is the world. The engine runs in
"host", a workload inside tries both. No packet leaves the machine.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HOST = r"""
import json, os, shutil, socket, subprocess, sys, tempfile, threading, time
from datetime import timedelta
from pathlib import Path
from sublet.base.kernel.clock import SystemClock
from sublet.capacity.engines.local import LocalEngine
from sublet.capacity.engines.port import Phase, StartSpec

def ip(*words):
    subprocess.run(["ip", *words], check=True)

peer = subprocess.Popen(
    ["unshare", "-n", sys.executable, "-c", '''
import socket, subprocess, sys, time
sys.stdin.readline()
for words in (["link", "set", "lo", "up"], ["addr", "add", "10.99.0.2/24", "dev", "vpeer"],
              ["link", "set", "vpeer", "up"]):
    subprocess.run(["ip", *words], check=True)
server = socket.create_server(("10.99.0.2", 8080))
print("up", flush=True)
while True:
    c, _ = server.accept(); c.sendall(b"world"); c.close()
'''], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
time.sleep(0.3)
ip("link", "set", "lo", "up")
ip("link", "add", "vhost", "type", "veth", "peer", "name", "vpeer")
ip("link", "set", "vpeer", "netns", str(peer.pid))
ip("addr", "add", "10.99.0.1/24", "dev", "vhost")
ip("link", "set", "vhost", "up")
peer.stdin.write("\n"); peer.stdin.flush()
assert peer.stdout.readline() == "up\n"
ip("route", "add", "default", "via", "10.99.0.2")
private = socket.create_server(("127.0.0.1", 0))
public = socket.create_server(("0.0.0.0", 0))

TRY = '''
import json, os, socket, sys, urllib.request
def reach(host, port):
    try:
        with socket.create_connection((host, port), timeout=2) as peer:
            peer.settimeout(1)
            try: return peer.recv(10).decode()
            except TimeoutError: return "silent"
    except OSError as error: return type(error).__name__
found = {f"{h}:{p}": reach(h, p) for h, p in json.loads(sys.argv[1])}
found["metadata"] = urllib.request.urlopen(os.environ["SUBLET_METADATA_URL"] + "/v1/metadata").status
print(json.dumps(found))
'''
root = Path(tempfile.mkdtemp(prefix="sublet-test-"))
clock = SystemClock.unanchored()
without = frozenset(json.loads(sys.argv[1]))
engine = LocalEngine(root, clock, disk_reserve_bytes=0, without=without)
doors = [("10.99.0.2", 8080)]
for host in ("127.0.0.1", "10.99.0.1", "10.0.2.2", "169.254.1.1"):
    for listener in (private, public):
        doors.append((host, listener.getsockname()[1]))
engine.start(StartSpec(
    run_id="out", workload_id="out", organisation_id="org", kind="job",
    devices=(engine._hardware().devices[0].name,), memory_bytes=256 << 20, disk_bytes=1 << 20,
    command=("python3", "-c", TRY, json.dumps(doors)), script="", env={}, home="out",
    hostname="out", outbound=True, stop_grace_seconds=1, notice_signal=None, metadata={},
    runway_until=clock.now() + timedelta(minutes=1)))
while (seen := engine.observe()["out"]).phase not in (Phase.EXITED, Phase.FAILED):
    time.sleep(0.02)
said = engine.logs("out")[0].decode()
scrubbed = engine.scrub("out")
shutil.rmtree(root)
peer.kill(); peer.wait()
names = {str(private.getsockname()[1]): "private", str(public.getsockname()[1]): "public"}
found = json.loads(said) if seen.exit_code == 0 else {"failure": f"{seen.failure} {said}"}
print(json.dumps({
    "tool": engine._rules.outbound, "clean": scrubbed.clean,
    "found": {":".join([k.split(":")[0], names.get(k.split(":")[-1], k.split(":")[-1])]): v
              for k, v in found.items()}}))
"""


@pytest.mark.root
@pytest.mark.parametrize("tool", ["pasta", "slirp4netns"])
def test_the_world_is_reached_and_the_host_is_not(tool: str) -> None:
    for program in (tool, "bwrap", "ip", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    without = [] if tool == "pasta" else ["pasta"]
    done = subprocess.run(
        ["unshare", "-n", sys.executable, "-c", HOST, json.dumps(without)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["tool"], said["clean"]) == (tool, True)
    found = said["found"]
    assert found.pop("10.99.0.2:8080") == "world", found
    assert found.pop("metadata:metadata") == 200
    assert len(found) == 8
    assert not {door: answer for door, answer in found.items() if not answer.endswith("Error")}
