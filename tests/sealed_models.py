"""muse-tiny sealed and served in real processes, and probes that try to get at its weights."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sublet.base.wire.gateway import ModelRoute
from sublet.gateway import dialects
from sublet.gateway.dialects import Surface
from sublet.gateway.errors import Refusal
from sublet.shops.models import keys
from sublet.shops.models.servers import SERVERS, llama_cpp, unix

MUSE = Path(str(files("sublet.shops.models").joinpath("carried/muse-tiny.gguf")))
CHILD = Path(llama_cpp.__file__).parent / "child"
KEK = keys.KeyEncryptionKey(bytes(range(32)))
USER, OTHER_USER = 54_321, 54_322


def seal_muse(folder: Path) -> keys.Imported:
    return keys.import_sealed(KEK, source=MUSE, folder=folder, model="muse-tiny", key_id="key_1")


def route(*, is_sealed: bool) -> ModelRoute:
    """muse-tiny as a snapshot would route it, with every field that its server honours."""
    server = SERVERS["llama.cpp"]
    return ModelRoute(
        name="muse-tiny",
        kind="generate",
        deployment_id="dep_1",
        server=server.name,
        context=512,
        max_output=256,
        quantization="Q8_0",
        owned_by="owner",
        created_s=0,
        lifecycle="active",
        is_sealed=is_sealed,
        max_n=4,
        splits_n=server.splits_n,
        counters=server.counters,
        fields=server.fields,
        prices={},
    )


def refusal_of(surface: Surface, *, is_sealed: bool = True, **body: Any) -> Refusal | None:
    """What the gateway says to a request before any engine sees it; None: it passes."""
    models = {"muse-tiny": SimpleNamespace(route=route(is_sealed=is_sealed))}
    raw = json.dumps({"model": "muse-tiny", **body}).encode()
    try:
        dialects.prepare(surface, raw, models)
    except Refusal as refused:
        return refused
    return None


def traces_of(plain: bytes) -> list[bytes]:
    """What the plaintext would be known by anywhere: its beginning, and pieces all along it."""
    step = max(len(plain) // 16, 1)
    pieces = [plain[at : at + 32] for at in range(0, len(plain) - 32, step)]
    return [piece for piece in pieces if len(set(piece)) > 8]


def leaks(plain: bytes, *folders: Path) -> list[str]:
    """Files under these folders that hold a piece of the plaintext."""
    wanted = traces_of(plain)
    assert len(wanted) > 8
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and not path.is_symlink():
                with contextlib.suppress(FileNotFoundError):
                    data = path.read_bytes()
                    if data.startswith(b"GGUF") or any(piece in data for piece in wanted):
                        found.append(str(path))
    return found


def wait_until(happened: Callable[[], Any], seconds: float, what: str) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := happened():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {seconds} s")


# -- as somebody else

_ENTER = """
import ctypes, os, sys
uid, program, paths = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(os.pathsep)
libc = ctypes.CDLL(None, use_errno=True)
def closed(path):
    parts = path.split("/")
    for end in range(2, len(parts) + 1):
        if not os.stat("/".join(parts[:end])).st_mode & 1:
            return "/".join(parts[:end])
def mount(source, target, kind, flags, options):
    if libc.mount(source, os.fsencode(target), kind, flags, options) != 0:
        raise OSError(ctypes.get_errno(), "mount", target)
held = {p: os.open(p, os.O_PATH) for p in paths if closed(p)}
for path, fd in held.items():
    if os.path.exists(path) and (above := closed(path)):
        mount(b"none", above, b"tmpfs", 0, b"mode=755")
    if not os.path.exists(path):
        os.makedirs(path, mode=0o755)
        mount(b"/proc/self/fd/%d" % fd, path, None, 4096, None)  # MS_BIND
    os.close(fd)
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
os.execv(program, [program, *sys.argv[4:]])
"""


_OWN_NAMESPACE = """
import ctypes, os
here = os.geteuid()
if ctypes.CDLL(None, use_errno=True).unshare(0x10000000) != 0:
    raise OSError(ctypes.get_errno(), "no user namespace")
with open("/proc/self/uid_map", "w") as sink:
    sink.write(f"1000 {here} 1")
"""


def python_as(uid: int | None, *arguments: str) -> list[str]:
    """An argv: our interpreter and its packages, as that user (None: as we are).

    Where root keeps them in a closed folder, that user is shown them in mounts of its own.
    """
    program = os.path.realpath(sys.executable)
    if uid is None or os.geteuid() != 0:
        return [program, *arguments]
    paths = os.pathsep.join([os.path.realpath(sys.base_prefix), packages()])
    enter = ["unshare", "--mount", "--propagation", "slave", sys.executable, "-c", _ENTER]
    return [*enter, str(uid), program, paths, *arguments]


def packages() -> str:
    return os.path.realpath(sysconfig.get_path("platlib"))


@dataclass
class Served:
    """A model server on a Unix socket in a home of its own, without a sandbox."""

    home: Path
    process: subprocess.Popen[bytes]
    data_key: bytes = field(default=b"", repr=False)

    @property
    def door(self) -> str:
        return str(self.home / "model.sock")

    def log(self) -> str:
        return (self.home / "log").read_text()

    def post(self, target: str, body: dict[str, Any], seconds: float = 60.0) -> Any:
        return unix.post(self.door, target, body, seconds=seconds)

    def unlock(self) -> keys.Peer:
        """Bring the data key."""

        def try_once() -> keys.Peer | None:
            assert self.process.poll() is None, self.log()
            try:
                with keys.knock(str(self.home / "key.sock")) as caller:
                    caller.deliver(bytearray(self.data_key))
                    return caller.peer
            except FileNotFoundError:
                return None

        peer: keys.Peer = wait_until(try_once, 20, "the replica asks for its key")
        return peer

    def until_ready(self, seconds: float = 30.0) -> None:
        body = {"prompt": "The", "max_tokens": 1}

        def answers() -> bool:
            assert self.process.poll() is None, self.log()
            return self.post("/v1/completions", body) is not None

        wait_until(answers, seconds, "the model answers")


@contextlib.contextmanager
def served(
    home: Path,
    *,
    uid: int | None = None,
    sealed: keys.Imported | None = None,
    slots: int = 1,
    namespace: bool = False,
    limits: Callable[[], None] | None = None,
) -> Iterator[Served]:
    """`serve.py` as an engine would start it, on muse-tiny, plain or sealed.

    `namespace`: in a user namespace that this uid owns, as the sandbox of an ordinary user is.
    """
    home.mkdir(mode=0o700)
    if uid is not None and os.geteuid() == 0:
        os.chown(home, uid, uid)
    orders = {
        "model": str(MUSE if sealed is None else sealed.path),
        "alias": "muse-tiny",
        "socket": "model.sock",
        "key_socket": None if sealed is None else "key.sock",
        "context": 512,
        "slots": slots,
        "threads": 1,
        "is_embedding": False,
        "template": None,
        "packages": [packages()],
    }
    words = ["-I", "-S", str(CHILD / "serve.py"), json.dumps(orders)]
    if namespace:
        again = "import sys\nos.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        words = ["-I", "-S", "-c", _OWN_NAMESPACE + again, *words]
    argv = python_as(uid, *words)
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(argv, cwd=home, stdout=log, stderr=log, preexec_fn=limits)
    found = Served(home, process)
    if sealed is not None:
        found.data_key = bytes(KEK.unwrap(sealed.wrapped))
    try:
        yield found
    finally:
        process.kill()
        process.wait()


# -- probes

_PROBE = r"""
import ctypes, json, os, sys
pid, address = int(sys.argv[1]), int(sys.argv[2], 16)
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
class Vec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")
    return result
def mem():
    fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    return os.pread(fd, 16, address)
def write_mem():
    os.open(f"/proc/{pid}/mem", os.O_RDWR)
def vm_read():
    here = ctypes.create_string_buffer(16)
    mine, theirs = Vec(ctypes.addressof(here), 16), Vec(address, 16)
    call(libc.process_vm_readv(pid, ctypes.byref(mine), 1, ctypes.byref(theirs), 1, 0))
def seize():
    call(libc.ptrace(0x4206, pid, None, None))
def attach():
    call(libc.ptrace(16, pid, None, None))
    os.waitpid(pid, 0x40000000)
    call(libc.ptrace(17, pid, None, None))
def take_descriptor():
    handle = os.pidfd_open(pid)
    call(libc.syscall(438, handle, 0, 0))
def open_descriptors():
    for name in os.listdir(f"/proc/{pid}/fd"):
        os.stat(f"/proc/{pid}/fd/{name}")
def read(name):
    with open(f"/proc/{pid}/{name}", "rb") as source:
        source.read(64)
ways = {"mem": mem, "write mem": write_mem, "vm_read": vm_read, "attach": attach, "seize": seize,
        "take a descriptor": take_descriptor, "descriptors": open_descriptors,
        "map_files": lambda: os.listdir(f"/proc/{pid}/map_files"),
        "environ": lambda: read("environ"), "maps": lambda: read("maps"),
        "root": lambda: os.listdir(f"/proc/{pid}/root")}
found = {}
for name, way in ways.items():
    try:
        way()
        found[name] = "open"
    except OSError as error:
        found[name] = "refused" if error.errno in (1, 13) else f"errno {error.errno}"
print(json.dumps(found))
"""


def probe(uid: int | None, pid: int, address: int, *, namespace: bool = False) -> dict[str, str]:
    """Every way to another process's memory, tried as that user: `open` or `refused`.

    `namespace`: from a user namespace of its own, as every sandbox has one, but with all of the
    machine's processes in sight.
    """
    script = _OWN_NAMESPACE + _PROBE if namespace else _PROBE
    argv = python_as(uid, "-I", "-S", "-c", script, str(pid), f"{address:x}")
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def weights_address(pid: int) -> int:
    """Where the weights lie, as only root can look it up for the probe's sake."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if "memfd:weights" in line:
            return int(line.split("-")[0], 16)
    raise AssertionError("no weights are mapped")


def run_python(script: str, *arguments: str, seconds: float = 60) -> Sequence[Any]:
    """A script beside `unseal`, in a process of its own; what it prints as JSON lines."""
    path = f"import sys; sys.path[:0] = [{str(CHILD)!r}]\n"
    argv = [sys.executable, "-c", path + script, *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
