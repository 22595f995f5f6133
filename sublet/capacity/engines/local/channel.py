"""The engine's end of a supervisor's control socket: one order, one answer, never a long wait."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from sublet.capacity.engines.local.supervise import records, wire
from sublet.capacity.engines.port import EngineError, NotAttachable

ANSWER_SECONDS = 5.0


class NoSupervisor(Exception):
    """Nobody listens: the run is over, or its supervisor is gone."""


class Channel:
    """A connection to the supervisor of one run. Raises NoSupervisor where there is none."""

    def __init__(self, folder: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            address, fd = wire.address(folder, records.SOCKET)
            try:
                self._socket.connect(address)
            finally:
                os.close(fd)
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            self._socket.close()
            raise NoSupervisor(folder) from None
        except OSError as error:
            self._socket.close()
            raise EngineError(f"the supervisor of {folder} did not answer: {error}") from error

    def __enter__(self) -> Channel:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def hang_up(self) -> None:
        """Wake whoever waits on it, from another thread."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def ask(self, order: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """The answer to an order. Raises NotAttachable, EngineError, OSError of what was inside."""
        self.send(order, fds)
        answer, out = self.receive()
        wire.close_all(out)
        return answer

    def send(self, order: dict[str, Any], fds: Sequence[int] = ()) -> None:
        try:
            wire.send(self._socket, {**order, "v": records.PROTOCOL}, fds)
        except (BrokenPipeError, ConnectionResetError):
            raise NoSupervisor from None
        except TimeoutError as error:
            raise EngineError("the supervisor does not listen") from error

    def receive(self, seconds: float | None = ANSWER_SECONDS) -> tuple[dict[str, Any], list[int]]:
        self._socket.settimeout(seconds)
        try:
            answer, fds = wire.receive(self._socket)
        except TimeoutError as error:
            raise EngineError("the supervisor did not answer in time") from error
        except ConnectionResetError:
            raise NoSupervisor from None
        if answer is None:
            raise NoSupervisor
        if "refused" in answer:
            wire.close_all(fds)
            if answer["refused"] == "not_attachable":
                raise NotAttachable
            raise EngineError(f"the supervisor refuses: {answer['refused']}")
        if "errno" in answer:
            wire.close_all(fds)
            number = int(answer["errno"]) or errno.EIO
            raise OSError(number, os.strerror(number))
        return answer, fds
