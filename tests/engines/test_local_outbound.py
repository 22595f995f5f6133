"""A way out that leads to the public internet alone. In network namespaces of the test's own only.

"host" is a namespace with two public addresses, one private and a control plane on all of them;
"peer" is a namespace behind it, which is the world, the owner's LAN and the LAN's resolver. The
engine runs in "host"; a workload inside tries all doors in every way that needs no power. The
peer notes whatever arrives. No packet leaves the machine: neither namespace has a way out.
"""

from __future__ import annotations

import ipaddress
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sublet.capacity.engines.local.supervise import addresses

ROOT = Path(__file__).resolve().parents[2]

PEER = r"""
import json, select, socket, subprocess, sys, threading
sys.stdin.readline()
for words in (["link", "set", "lo", "up"], ["link", "set", "vpeer", "up"],
              *(["addr", "add", address, "dev", "vpeer"] for address in json.loads(sys.argv[1])),
              ["route", "add", "default", "via", "99.99.0.1"]):
    subprocess.run(["ip", *words], check=True)
server = socket.create_server(("", 8080))
resolver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
resolver.bind(("", 53))
wire = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
wire.bind(("vpeer", 0x0800))
seen = set()
print("up", flush=True)
while True:
    for source in select.select([server, resolver, wire, sys.stdin], [], [])[0]:
        if source is server:
            c, _ = server.accept(); c.sendall(b"world"); c.close()
        elif source is resolver:
            _, whence = resolver.recvfrom(100); resolver.sendto(b"name", whence)
        elif source is wire:
            packet = wire.recv(100)
            seen.add(f"{socket.inet_ntoa(packet[16:20])} {packet[9]}")
        elif sys.stdin.readline():
            print(json.dumps(sorted(seen)), flush=True)
        else:
            sys.exit()
"""

TRY = r"""
import json, os, socket, sys, time, urllib.request
from concurrent.futures import ThreadPoolExecutor
TUNNEL = "sublet0"
def plain(s, host): pass
def bound(s, host): s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, TUNNEL.encode())
def unicast(s, host): s.setsockopt(socket.SOL_IP, 50, socket.htonl(socket.if_nametoindex(TUNNEL)))
def direct(s, host): s.setsockopt(socket.SOL_SOCKET, socket.SO_DONTROUTE, 1)
def both(s, host): bound(s, host); direct(s, host)
def reach(way, host, port):
    with socket.socket() as s:
        s.settimeout(0.7)
        try:
            way(s, host)
            s.connect((host, port))
        except OSError as error: return type(error).__name__
        try: return s.recv(10).decode()
        except TimeoutError: return "silent"
def say(host):
    for way in (plain, bound, unicast):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            try: way(s, host); s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1); s.sendto(b"psst", (host, 9))
            except OSError: pass
def name():
    where = open("/etc/resolv.conf").read().split()[1]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.settimeout(2)
        s.sendto(b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\0\0\x01\0\x01", (where, 53))
        return s.recv(100).decode()
given = json.loads(sys.argv[1])
asked, pool = {}, ThreadPoolExecutor(16)
for label, (host, port) in given["doors"].items():
    for way in (plain, bound, unicast, direct, both):
        asked[f"{label} {way.__name__}"] = pool.submit(reach, way, host, port)
found = {label: one.result() for label, one in asked.items()}
for host in given["said to"]: say(host)
found["name"] = name()
found["metadata"] = urllib.request.urlopen(os.environ["SUBLET_METADATA_URL"] + "/v1/metadata").status
print(json.dumps(found), flush=True)
open("done", "w").close()
while not os.path.exists("go"): time.sleep(0.02)
give_up = time.monotonic() + 15
while (late := reach(plain, *given["late"])) == "silent" and time.monotonic() < give_up: time.sleep(0.1)
print(json.dumps({"late": late, "world": reach(plain, *given["world"])}), flush=True)
"""

HOST = r"""
import json, os, shutil, socket, subprocess, sys, tempfile, time
from datetime import timedelta
from pathlib import Path
from sublet.base.kernel.clock import SystemClock
from sublet.capacity.engines.local import LocalEngine
from sublet.capacity.engines.port import Phase, StartSpec

tool, without, peer_source, try_source = json.loads(sys.argv[1])
def ip(*words):
    subprocess.run(["ip", *words], check=True)
def ask_peer():
    peer.stdin.write("\n"); peer.stdin.flush()
    return peer.stdout.readline()

LAN = ["10.99.0.2", "172.16.7.2", "192.168.7.2", "100.64.7.2", "198.18.7.2"]
root = Path(tempfile.mkdtemp(prefix="sublet-test-"))
(root / "resolv.conf").write_text("nameserver 10.99.0.2\n")
subprocess.run(["mount", "--bind", str(root / "resolv.conf"), "/etc/resolv.conf"], check=True)
peer = subprocess.Popen(
    ["unshare", "-n", sys.executable, "-c", peer_source,
     json.dumps(["99.99.0.2/24", *(f"{address}/24" for address in LAN)])],
    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
time.sleep(0.3)
ip("link", "set", "lo", "up")
ip("link", "add", "vhost", "type", "veth", "peer", "name", "vpeer")
ip("link", "set", "vpeer", "netns", str(peer.pid))
for address in ("99.99.0.1/24", "99.99.0.9/24", "10.99.0.1/24"):
    ip("addr", "add", address, "dev", "vhost")
ip("link", "set", "vhost", "up")
assert ask_peer() == "up\n"
ip("route", "add", "default", "via", "99.99.0.2")
private = socket.create_server(("127.0.0.1", 0)).detach()
everywhere = socket.create_server(("0.0.0.0", 0))
port = everywhere.getsockname()[1]
hidden = socket.socket(fileno=private).getsockname()[1]
doors = {"world": ("99.99.0.2", 8080)}
for address in ("127.0.0.1", "99.99.0.1", "99.99.0.9", "10.99.0.1", "10.0.2.2", "198.51.100.2",
                "198.51.100.53", "169.254.1.1"):
    doors[f"{address} public"] = (address, port)
for address in ("127.0.0.1", "10.0.2.2", "198.51.100.2", "198.51.100.53"):
    doors[f"{address} private"] = (address, hidden)
for address in LAN:
    doors[address] = (address, 8080)

clock = SystemClock.unanchored()
engine = LocalEngine(root, clock, disk_reserve_bytes=0, without=frozenset(without))
given = {"doors": doors, "late": ("99.99.0.77", port), "world": doors["world"],
         "said to": [*LAN, "224.0.0.251", "239.1.2.3", "255.255.255.255", "10.99.0.255"]}
engine.start(StartSpec(
    run_id="out", workload_id="out", organisation_id="org", kind="job",
    devices=(engine._hardware().devices[0].name,), memory_bytes=256 << 20, disk_bytes=1 << 20,
    command=("python3", "-c", try_source, json.dumps(given)), script="", env={}, home="out",
    hostname="out", outbound=True, stop_grace_seconds=1, notice_signal=None, metadata={},
    runway_until=clock.now() + timedelta(minutes=2)))
over = (Phase.EXITED, Phase.FAILED)
while (seen := engine.observe()["out"]).phase not in over and not (root / "homes/out/done").exists():
    time.sleep(0.02)
ip("addr", "add", "99.99.0.77/24", "dev", "vhost")
(root / "homes/out/go").touch()
while (seen := engine.observe()["out"]).phase not in over:
    time.sleep(0.02)
said = engine.logs("out", limit=1 << 20)[0].decode()
arrived = json.loads(ask_peer())
scrubbed = engine.scrub("out")
fences = engine.inventory()
subprocess.run(["umount", "/etc/resolv.conf"], check=True)
shutil.rmtree(root)
peer.stdin.close(); peer.wait()
print(json.dumps({
    "tool": engine._rules.outbound, "clean": scrubbed.clean, "failure": seen.failure,
    "exit_code": seen.exit_code, "said": said, "arrived": arrived,
    "outbound": fences.outbound, "strength": fences.fences["network"].strength,
    "evidence": fences.fences["network"].evidence}))
"""


@pytest.fixture(scope="module", params=["pasta", "slirp4netns"])
def tried(request: pytest.FixtureRequest) -> dict[str, Any]:
    tool = request.param
    for program in (tool, "bwrap", "ip", "unshare"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    given = [tool, [] if tool == "pasta" else ["pasta"], PEER, TRY]
    done = subprocess.run(
        ["unshare", "-n", "-m", sys.executable, "-c", HOST, json.dumps(given)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    assert (answer["tool"], answer["clean"], answer["exit_code"]) == (tool, True, 0), answer
    lines = answer["said"].splitlines()
    first, second = (json.loads(line) for line in lines if line.startswith("{"))
    return {**answer, "found": first, "then": second}


@pytest.mark.root
def test_the_world_is_reached_and_neither_the_host_nor_its_lan(tried: dict[str, Any]) -> None:
    found = dict(tried["found"])
    for way in ("plain", "bound", "unicast"):
        assert found.pop(f"world {way}") == "world", found
    for way in ("direct", "both"):  # no gateway is asked, so nobody answers
        assert found.pop(f"world {way}").endswith("Error"), found
    assert found.pop("metadata") == 200
    assert found.pop("name") == "name", "the resolver is the one private address that answers"
    assert len(found) == 5 * 17
    assert not {door: answer for door, answer in found.items() if not answer.endswith("Error")}


@pytest.mark.root
def test_nothing_arrives_in_the_lan_but_questions_for_names(tried: dict[str, Any]) -> None:
    arrived = {line for line in tried["arrived"] if not line.endswith(" 2")}
    # Protocol 2 is the host's own kernel telling of its groups. Else: out to the world, to the
    # resolver, back from both, and what is sent to pasta's own address, which is nobody's.
    known = {"99.99.0.2 6", "10.99.0.2 17", "99.99.0.1 6", "99.99.0.1 17", "10.99.0.1 17"}
    assert arrived - {"198.51.100.53 6"} <= known


@pytest.mark.root
def test_an_address_that_the_host_gets_later_is_closed_off_too(tried: dict[str, Any]) -> None:
    assert tried["then"]["late"].endswith("Error")
    assert tried["then"]["world"] == "world"


@pytest.mark.root
def test_the_table_says_what_outbound_is(tried: dict[str, Any]) -> None:
    assert (tried["outbound"], tried["strength"]) == (tried["tool"], "enforced")
    assert "public internet only" in tried["evidence"]


@pytest.mark.root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="unshare is not installed")
def test_every_address_of_the_host_is_known() -> None:
    code = """
import json, subprocess
from sublet.capacity.engines.local.supervise import addresses
for words in ("link set lo up", "link add d0 type veth peer name d1", "link set d0 up",
              "addr add 99.99.0.1/24 dev d0", "addr add 99.99.0.9/24 dev d0",
              "addr add 192.168.7.1/32 dev lo", "addr add 99.98.0.1 peer 99.98.0.2 dev d0",
              "route add local 99.97.0.0/24 dev lo"):
    subprocess.run(["ip", *words.split()], check=True)
print(json.dumps(addresses.of_host()))
"""
    argv = ["unshare", "-n", sys.executable, "-c", code]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        "99.97.0.0/24",
        "99.98.0.1/32",
        "99.99.0.1/32",
        "99.99.0.9/32",
        "192.168.7.1/32",
    ]


def test_public_internet_only_leaves_out_what_is_nobodys_or_somebodys_own() -> None:
    shut = [ipaddress.IPv4Network(network) for network in addresses.NOT_PUBLIC]
    for network in shut:
        assert network.is_multicast or not network[0].is_global, network
    for address in (
        *("0.1.2.3", "10.0.0.1", "100.64.0.1", "127.0.0.2", "169.254.169.254", "172.31.255.1"),
        *("192.168.0.1", "198.18.0.1", "224.0.0.251", "240.0.0.1", "255.255.255.255"),
    ):
        assert any(ipaddress.IPv4Address(address) in network for network in shut), address
    for address in ("8.8.8.8", "100.128.0.1", "172.32.0.1", "99.99.0.1", "192.0.1.1"):
        assert not any(ipaddress.IPv4Address(address) in network for network in shut), address
