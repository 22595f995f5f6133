"""Whether a spec can be run, field by field: pure."""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Mapping
from typing import Any

from sublet.base.kernel.errors import Invalid
from sublet.shops.compute.model import Kind, ServerSpec, WorkloadSpec

SIGNALS = ("SIGHUP", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGCONT")
SSH_KEY_TYPES = (
    "ssh-ed25519",
    "ssh-rsa",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "ecdsa-sha2-nistp521",
    "sk-ssh-ed25519@openssh.com",
    "sk-ecdsa-sha2-nistp256@openssh.com",
)
MAX_NAME = 100
MAX_ARGUMENTS = 1024
MAX_ARGUMENT_BYTES = 128 * 1024 - 1
"""One argument of a program: the kernel's own limit, MAX_ARG_STRLEN."""
MAX_COMMAND_BYTES = 1 << 20
MAX_SCRIPT_BYTES = 1 << 16
MAX_ENV = 256
MAX_ENV_BYTES = 1 << 18
MAX_SSH_KEYS = 16
MAX_GRACE_SECONDS = 600
MAX_RETRIES = 100
MAX_RUN = 366 * 86_400

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_RESERVED = ("SUBLET_",)


def checked(kind: Kind, spec: WorkloadSpec) -> WorkloadSpec:
    """The spec, normalised. Raises Invalid naming the first field that is wrong and what is right."""
    _check(kind in ("instance", "job"), "kind", "is instance or job")
    _check(
        len(spec.name) <= MAX_NAME and spec.name.isprintable(),
        "name",
        f"is one line of at most {MAX_NAME} characters",
    )
    if kind == "job":
        _check_command(spec.command)
        _check(not spec.script, "script", "belongs to an instance; a job has a command")
        _check(not spec.ssh_keys, "ssh_keys", "belong to an instance; a job has no login")
    else:
        _check(not spec.command, "command", "belongs to a job; an instance has a script")
        _check(
            _is_text(spec.script) and len(spec.script.encode()) <= MAX_SCRIPT_BYTES,
            "script",
            f"is text without NUL of at most {MAX_SCRIPT_BYTES} bytes",
        )
    _check_env(spec.env)
    _check(not spec.image, "image", "is empty: this cloud runs the node's own system")
    _check(
        spec.notice_signal is None or spec.notice_signal in SIGNALS,
        "notice_signal",
        f"is one of {', '.join(SIGNALS)}, or left out",
    )
    grace = spec.stop_grace_seconds
    _check(
        grace is None or (type(grace) is int and 0 <= grace <= MAX_GRACE_SECONDS),
        "stop_grace_seconds",
        f"is a whole number from 0 to {MAX_GRACE_SECONDS}",
    )
    longest = spec.max_run_seconds
    _check(
        longest is None or (kind == "job" and type(longest) is int and 1 <= longest <= MAX_RUN),
        "max_run_seconds",
        f"is, for a job, a whole number from 1 to {MAX_RUN}, or left out",
    )
    _check(
        type(spec.max_retries) is int and 0 <= spec.max_retries <= MAX_RETRIES,
        "max_retries",
        f"is a whole number from 0 to {MAX_RETRIES}",
    )
    return _with_keys(spec)


def to_document(spec: WorkloadSpec) -> dict[str, Any]:
    """As it is kept and shown; what only replicas have is there only for them."""
    document = {
        "name": spec.name,
        "command": list(spec.command),
        "script": spec.script,
        "env": dict(spec.env),
        "ssh_keys": list(spec.ssh_keys),
        "image": spec.image,
        "outbound": spec.outbound,
        "notice_signal": spec.notice_signal,
        "stop_grace_seconds": spec.stop_grace_seconds,
        "max_run_seconds": spec.max_run_seconds,
        "max_retries": spec.max_retries,
        "requeue": spec.requeue,
        "auto_resume": spec.auto_resume,
    }
    if spec.server is not None:
        document["server"] = {
            "argv": list(spec.server.argv),
            "env": dict(spec.server.env),
            "read_only": [list(pair) for pair in spec.server.read_only],
            "lock_memory": spec.server.lock_memory,
        }
        document["memory_bytes"] = spec.memory_bytes
        document["is_sealed"] = spec.is_sealed
    return document


def from_document(document: Mapping[str, Any]) -> WorkloadSpec:
    values = {
        **document,
        "command": tuple(document["command"]),
        "ssh_keys": tuple(document["ssh_keys"]),
    }
    if "server" in document:
        values["server"] = _server(document["server"])
    return WorkloadSpec(**values)


def _server(document: Mapping[str, Any]) -> ServerSpec:
    return ServerSpec(
        argv=tuple(document["argv"]),
        env=document["env"],
        read_only=tuple((source, target) for source, target in document["read_only"]),
        lock_memory=document["lock_memory"],
    )


def parse_ssh_key(text: str) -> str:
    """The key on one line, blanks made single. Raises Invalid where it is no public key."""
    words = text.split(None, 2)
    right = "is a public key line: type, base64 and a comment, as in an id_ed25519.pub file"
    _check(len(words) >= 2 and text.isprintable(), "ssh_keys", right)
    _check(words[0] in SSH_KEY_TYPES, "ssh_keys", f"has a type among {', '.join(SSH_KEY_TYPES)}")
    try:
        blob = base64.b64decode(words[1], validate=True)
        (length,) = struct.unpack_from(">I", blob)
    except (binascii.Error, ValueError, struct.error):
        raise Invalid(f"ssh_keys: {right}.", param="ssh_keys") from None
    # The blob names its own type: a mismatch is a key cut or pasted together.
    _check(blob[4 : 4 + length] == words[0].encode() and len(blob) > 4 + length, "ssh_keys", right)
    return " ".join(words)


def _check(holds: bool, field: str, right: str) -> None:
    if not holds:
        raise Invalid(f"{field} {right}.", param=field)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value and _encodes(value)


def _encodes(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_command(command: tuple[str, ...]) -> None:
    right = "is a list of 1 to 1024 texts without NUL, the first one naming a program"
    _check(
        0 < len(command) <= MAX_ARGUMENTS
        and all(_is_text(word) for word in command)
        and bool(command[0].strip()),
        "command",
        right,
    )
    sizes = [len(word.encode()) for word in command]
    _check(
        max(sizes) <= MAX_ARGUMENT_BYTES and sum(sizes) <= MAX_COMMAND_BYTES,
        "command",
        f"has words of at most {MAX_ARGUMENT_BYTES} bytes, {MAX_COMMAND_BYTES} in all",
    )


def _check_env(env: Mapping[str, str]) -> None:
    _check(len(env) <= MAX_ENV, "env", f"has at most {MAX_ENV} variables")
    size = 0
    for name, value in env.items():
        field = f"env.{name}"
        _check(
            isinstance(name, str) and _ENV_NAME.fullmatch(name) is not None,
            field,
            "is named by letters, digits and _, not beginning with a digit",
        )
        _check(not name.startswith(_RESERVED), field, "is set by Sublet: choose another name")
        _check(_is_text(value), field, "is text without NUL")
        size += len(name) + len(value.encode())
    _check(size <= MAX_ENV_BYTES, "env", f"has at most {MAX_ENV_BYTES} bytes in all")


def _with_keys(spec: WorkloadSpec) -> WorkloadSpec:
    _check(len(spec.ssh_keys) <= MAX_SSH_KEYS, "ssh_keys", f"are at most {MAX_SSH_KEYS}")
    document = to_document(spec)
    document["ssh_keys"] = [parse_ssh_key(key) for key in spec.ssh_keys]
    return from_document(document)
