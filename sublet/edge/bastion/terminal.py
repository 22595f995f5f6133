"""Pseudo-terminals: their size, and the modes that a client's own terminal has (RFC 4254, 8)."""

from __future__ import annotations

import fcntl
import struct
import termios
from collections.abc import Mapping
from contextlib import suppress

TermSize = tuple[int, int, int, int]

_CHARACTERS = {
    1: termios.VINTR,
    2: termios.VQUIT,
    3: termios.VERASE,
    4: termios.VKILL,
    5: termios.VEOF,
    6: termios.VEOL,
    7: termios.VEOL2,
    8: termios.VSTART,
    9: termios.VSTOP,
    10: termios.VSUSP,
    12: termios.VREPRINT,
    13: termios.VWERASE,
    14: termios.VLNEXT,
}
_INPUT, _OUTPUT, _LOCAL = 0, 1, 3
_FLAGS = {
    30: (_INPUT, termios.IGNPAR),
    34: (_INPUT, termios.INLCR),
    35: (_INPUT, termios.IGNCR),
    36: (_INPUT, termios.ICRNL),
    38: (_INPUT, termios.IXON),
    39: (_INPUT, termios.IXANY),
    40: (_INPUT, termios.IXOFF),
    41: (_INPUT, termios.IMAXBEL),
    42: (_INPUT, 0o40000),  # IUTF8, which termios does not name
    50: (_LOCAL, termios.ISIG),
    51: (_LOCAL, termios.ICANON),
    53: (_LOCAL, termios.ECHO),
    54: (_LOCAL, termios.ECHOE),
    55: (_LOCAL, termios.ECHOK),
    56: (_LOCAL, termios.ECHONL),
    57: (_LOCAL, termios.NOFLSH),
    59: (_LOCAL, termios.IEXTEN),
    60: (_LOCAL, termios.ECHOCTL),
    61: (_LOCAL, termios.ECHOKE),
    70: (_OUTPUT, termios.OPOST),
    72: (_OUTPUT, termios.ONLCR),
    73: (_OUTPUT, termios.OCRNL),
    74: (_OUTPUT, termios.ONOCR),
    75: (_OUTPUT, termios.ONLRET),
}
_DISABLED = 255


def set_size(fd: int, size: TermSize) -> None:
    """Tell the terminal its size; its foreground processes get SIGWINCH where it changed."""
    columns, rows, x_pixels, y_pixels = (min(max(n, 0), 0xFFFF) for n in size)
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, x_pixels, y_pixels))


def set_modes(fd: int, modes: Mapping[int, int]) -> None:
    """Take over the client's modes; those that Linux does not have are left out.

    A courtesy: where the terminal refuses them, it keeps those it has.
    """
    attributes = termios.tcgetattr(fd)
    characters = attributes[6]
    for code, value in modes.items():
        if code in _CHARACTERS:
            characters[_CHARACTERS[code]] = b"\0" if value == _DISABLED else bytes([value & 0xFF])
        elif code in _FLAGS:
            group, flag = _FLAGS[code]
            attributes[group] = attributes[group] | flag if value else attributes[group] & ~flag
    with suppress(termios.error):
        termios.tcsetattr(fd, termios.TCSANOW, attributes)
