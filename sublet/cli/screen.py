"""What a person or a script sees: tables, JSON, progress, questions."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sublet.cli.errors import UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console

PIPE_WIDTH = 200
"""Of a table that goes to a file: nobody wraps it there."""


def console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, soft_wrap=True)


def say(text: str = "") -> None:
    """A line beside the answer."""
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A line of the answer."""
    print(text, flush=True)


def show_json(found: BaseModel | Iterable[BaseModel]) -> None:
    """The API's own JSON: a thing, or all pages of a list as one page."""
    if hasattr(found, "model_dump_json"):
        print(found.model_dump_json(indent=2))
        return
    inner = ",".join(item.model_dump_json() for item in found)
    print(f'{{"data":[{inner}],"next":null}}')


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "", empty: str = ""
) -> None:
    """Columns that begin with `>` hold numbers and stand at the right."""
    from rich import box
    from rich.table import Table

    all_rows = [[str(cell) for cell in row] for row in rows]
    if not all_rows:
        show(empty or "none")
        return
    drawn = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        name = column.removeprefix(">")
        is_number = column.startswith(">")
        drawn.add_column(name, justify="right" if is_number else "left", overflow="fold")
    for row in all_rows:
        drawn.add_row(*row)
    console().print(drawn)


def facts(pairs: Iterable[tuple[str, Any]]) -> None:
    """Names and values, one a line; those without a value are left out."""
    kept = [(name, str(value)) for name, value in pairs if value not in (None, "")]
    width = max((len(name) for name, _ in kept), default=0)
    for name, value in kept:
        show(f"{name:<{width}}  {value}")


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something that costs or ends. Raises UsageError where nobody can answer, and
    ends the command on a no."""
    import typer

    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError(f"{question} Nobody can be asked here: give --yes to agree.")
    typer.confirm(question, abort=True, err=True)


class Progress:
    """A line at the terminal that says what is waited for; elsewhere a line at each change."""

    def __init__(self, text: str, after_seconds: float = 1.0) -> None:
        self._text = text
        self._status: Any = None
        self._lock = threading.Lock()
        self._timer = threading.Timer(after_seconds, self._begin)
        self._timer.daemon = True
        self._begun = False
        self._over = False
        self._timer.start()

    def update(self, text: str) -> None:
        with self._lock:
            changed, self._text = text != self._text, text
            if self._status is not None:
                self._status.update(text)
            elif self._begun and changed:
                say(f"  {text} ...")

    def _begin(self) -> None:
        with self._lock:
            if self._over:
                return
            self._begun = True
            if sys.stderr.isatty():
                self._status = console(stderr=True).status(self._text)
                self._status.start()
            else:
                say(f"  {self._text} ...")

    def end(self) -> None:
        with self._lock:
            self._over = True
            self._timer.cancel()
            if self._status is not None:
                self._status.stop()


@contextmanager
def progress(text: str) -> Iterator[Progress]:
    """Says what is going on once it has taken a second."""
    shown = Progress(text)
    try:
        yield shown
    finally:
        shown.end()


def poll(look: Callable[[], bool], *, every_seconds: float = 0.5) -> None:
    """Look again and again until it is true. Ctrl-C ends it."""
    pause = threading.Event()
    while not look():
        pause.wait(every_seconds)
