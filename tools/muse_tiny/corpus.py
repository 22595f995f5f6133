"""What muse-tiny reads: the documentation in the Python that runs this."""

from __future__ import annotations

import importlib
import inspect
import pydoc_data.topics
from collections.abc import Iterator

LIBRARY = (
    "argparse",
    "asyncio",
    "collections",
    "contextlib",
    "csv",
    "datetime",
    "decimal",
    "email",
    "functools",
    "heapq",
    "http.client",
    "inspect",
    "itertools",
    "json",
    "logging",
    "pathlib",
    "pickle",
    "random",
    "re",
    "shutil",
    "socket",
    "sqlite3",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "threading",
    "typing",
    "unittest",
    "urllib.parse",
    "uuid",
    "zipfile",
)
_SHORTEST = 80
"""Shorter docstrings teach little but their punctuation."""


def read() -> str:
    """About a million characters, the same for the same Python."""
    return "\n\n".join(_paragraphs())


def _paragraphs() -> Iterator[str]:
    topics = pydoc_data.topics.topics
    for name in sorted(topics):
        yield topics[name].strip()
    seen: set[str] = set()
    for name in LIBRARY:
        module = importlib.import_module(name)
        if module.__doc__:
            yield inspect.cleandoc(module.__doc__)
        for _, thing in sorted(vars(module).items()):
            text = getattr(thing, "__doc__", None)
            if isinstance(text, str) and len(text) > _SHORTEST and text not in seen:
                seen.add(text)
                yield inspect.cleandoc(text)
