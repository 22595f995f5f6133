"""A system-call filter as bytes, for `bwrap --seccomp`: what a tenant has no use for, refused.

The namespaces are the walls; the filter keeps tenants away from doors in them: new user
namespaces (where they would get capabilities over mounts and networks of their own), kernel
keyrings and address families that no namespace separates (vsock reaches the hypervisor), large
and young interfaces that keep having holes. `sched_setaffinity` is refused only where affinity
is all that holds a workload to its CPUs.
"""

from __future__ import annotations

import errno
import platform
import struct

_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NR, _ARCH, _ARG0, _ARG1 = 0, 4, 16, 24
_CLONE_NEWUSER = 0x10000000
_X32 = 0x40000000
_FAMILIES = (1, 2, 10, 16)
"""AF_UNIX, AF_INET, AF_INET6, AF_NETLINK: those that the network namespace separates."""
_TERMINAL_TRICKS = (0x5412, 0x541C, 0x5423)
"""TIOCSTI, TIOCLINUX, TIOCSETD: typing into, and changing, a terminal from below."""

_YOUNG = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "fspick": 433,
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "io_uring_register": 427,
    "clone3": 435,
    "mount_setattr": 442,
    "quotactl_fd": 443,
}
"""The same number on every architecture."""

_NUMBERS = {
    "x86_64": (
        0xC000003E,
        {
            "ioctl": 16,
            "socket": 41,
            "clone": 56,
            "syslog": 103,
            "vhangup": 153,
            "modify_ldt": 154,
            "pivot_root": 155,
            "acct": 163,
            "settimeofday": 164,
            "mount": 165,
            "umount2": 166,
            "swapon": 167,
            "swapoff": 168,
            "reboot": 169,
            "iopl": 172,
            "ioperm": 173,
            "init_module": 175,
            "delete_module": 176,
            "quotactl": 179,
            "sched_setaffinity": 203,
            "clock_settime": 227,
            "kexec_load": 246,
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "unshare": 272,
            "perf_event_open": 298,
            "fanotify_init": 300,
            "open_by_handle_at": 304,
            "clock_adjtime": 305,
            "setns": 308,
            "finit_module": 313,
            "kexec_file_load": 320,
            "bpf": 321,
            "userfaultfd": 323,
            **_YOUNG,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "ioctl": 29,
            "umount2": 39,
            "mount": 40,
            "pivot_root": 41,
            "vhangup": 58,
            "quotactl": 60,
            "acct": 89,
            "unshare": 97,
            "kexec_load": 104,
            "init_module": 105,
            "delete_module": 106,
            "clock_settime": 112,
            "syslog": 116,
            "sched_setaffinity": 122,
            "reboot": 142,
            "settimeofday": 170,
            "socket": 198,
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "clone": 220,
            "swapon": 224,
            "swapoff": 225,
            "perf_event_open": 241,
            "fanotify_init": 262,
            "open_by_handle_at": 265,
            "clock_adjtime": 266,
            "setns": 268,
            "finit_module": 273,
            "bpf": 280,
            "userfaultfd": 282,
            "kexec_file_load": 294,
            **_YOUNG,
        },
    ),
}

_SPECIAL = ("ioctl", "socket", "clone", "unshare", "clone3", "sched_setaffinity")


def is_supported(machine: str | None = None) -> bool:
    return (machine or platform.machine()) in _NUMBERS


def program(*, pin_affinity: bool, machine: str | None = None) -> bytes:
    """The filter for this machine. Raises KeyError where its call numbers are not known."""
    arch, numbers = _NUMBERS[machine or platform.machine()]
    code: list[bytes] = [
        _op(_LOAD, _ARCH),
        _op(_EQUAL, arch, 1, 0),
        _refuse(errno.EPERM),
        _op(_LOAD, _NR),
        _op(_AT_LEAST, _X32, 0, 1),
        _refuse(errno.ENOSYS),
    ]
    for name in ("clone", "unshare"):  # threads and processes yes, user namespaces no
        code += _guarded(numbers[name], _ARG0, [(_ANY_BIT, _CLONE_NEWUSER)], errno.EPERM)
    code += _guarded(
        numbers["ioctl"], _ARG1, [(_EQUAL, request) for request in _TERMINAL_TRICKS], errno.EPERM
    )
    code += _families(numbers["socket"])
    # clone3 hides its flags behind a pointer: without it the C library uses clone.
    code += [_op(_EQUAL, numbers["clone3"], 0, 1), _refuse(errno.ENOSYS)]
    refused = [name for name in numbers if name not in _SPECIAL]
    if pin_affinity:
        refused.append("sched_setaffinity")
    for name in refused:
        code += [_op(_EQUAL, numbers[name], 0, 1), _refuse(errno.EPERM)]
    code.append(_op(_RETURN, _ALLOW))
    return b"".join(code)


def _op(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _refuse(number: int) -> bytes:
    return _op(_RETURN, _ERRNO | number)


def _guarded(call: int, argument: int, tests: list[tuple[int, int]], error: int) -> list[bytes]:
    """Refuse a call if its argument passes any of the tests; allow it otherwise."""
    block = [_op(_LOAD, argument)]
    for position, (code, value) in enumerate(tests):
        block.append(_op(code, value, len(tests) - position, 0))
    block += [_op(_RETURN, _ALLOW), _refuse(error)]
    return [_op(_EQUAL, call, 0, len(block)), *block]


def _families(call: int) -> list[bytes]:
    block = [_op(_LOAD, _ARG0)]
    for position, family in enumerate(_FAMILIES):
        block.append(_op(_EQUAL, family, len(_FAMILIES) - position, 0))
    block += [_refuse(errno.EAFNOSUPPORT), _op(_RETURN, _ALLOW)]
    return [_op(_EQUAL, call, 0, len(block)), *block]
