"""The command in this process, against a cloud that answers with a sample of every shape."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from sublet.cli import main
from sublet.sdk import transport

AT = datetime(2026, 11, 25, 10, 0, tzinfo=UTC)


def sample(annotation: Any, *, bare: bool = False) -> Any:
    """A value of that type; `bare` leaves out what may be left out."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return sample(args[0], bare=bare)
    if origin in (Union, types.UnionType):
        if bare and type(None) in args:
            return None
        return sample(next(a for a in args if a is not type(None)), bare=bare)
    if origin is Literal:
        return args[0]
    if origin is list:
        return [] if bare else [sample(args[0])]
    if origin is dict:
        return {} if bare else {"first": sample(args[1])}
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = annotation.model_fields.items()
        return annotation(**{n: sample(f.annotation, bare=bare) for n, f in fields})
    known: dict[Any, Any] = {
        str: "words",
        int: 1,
        bool: True,
        float: 1.0,
        datetime: AT,
        Any: "any",
        date: AT.date(),
    }
    return known[annotation]


@dataclass
class Cloud:
    """What the fake cloud was asked, and what it answers otherwise than with a sample."""

    asked: list[tuple[str, str, Any]] = field(default_factory=list)
    queries: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By path: what the last list of it was asked for."""
    answers: dict[str, list[Any]] = field(default_factory=dict)
    bare: bool = False
    text: list[str] = field(default_factory=lambda: ["line one\n", "line two\n"])
    file: list[bytes] = field(default_factory=lambda: [b"GGUF", b"weights"])

    def answer(self, method: str, path: str, shape: Any, body: Any) -> Any:
        self.asked.append((method, path, body))
        told = self.answers.get(path)
        if told:
            found = told.pop(0) if len(told) > 1 else told[0]
            if isinstance(found, Exception):
                raise found
            return found
        return b"" if shape is bytes else sample(shape, bare=self.bare)

    def last(self) -> tuple[str, str, Any]:
        method, path, body = self.asked[-1]
        return method, path, json.loads(body.model_dump_json(exclude_unset=True)) if body else None


@dataclass
class Done:
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Cloud:
    told = Cloud()

    class FakeTransport(transport.Transport):
        def get(self, path: str, shape: Any, **query: Any) -> Any:
            return told.answer("GET", path, shape, None)

        def post(self, path: str, shape: Any, body: Any = None, **_: Any) -> Any:
            return told.answer("POST", path, shape, body)

        def post_once(self, path: str, shape: Any, body: Any, timeout_seconds: float) -> Any:
            return told.answer("POST", path, shape, body)

        def change(self, method: str, path: str, shape: Any, body: Any, version: Any) -> Any:
            return told.answer(method, path, shape, body)

        def delete(self, path: str) -> None:
            told.answer("DELETE", path, int, None)

        def pages(self, path: str, shape: Any, **query: Any) -> Iterator[Any]:
            told.queries[path] = {name: v for name, v in query.items() if v is not None}
            found = told.answer("GET", path, list[shape], None)
            yield from found

        def stream_text(self, path: str, **query: Any) -> Iterator[str]:
            told.answer("GET", path, str, None)
            yield from told.text

        def stream_bytes(self, path: str, **query: Any) -> Iterator[bytes]:
            told.answer("GET", path, bytes, None)
            yield from told.file

    monkeypatch.setattr("sublet.sdk.client.Transport", FakeTransport)
    monkeypatch.setenv("SUBLET_URL", "http://cloud.test")
    monkeypatch.setenv("SUBLET_KEY", "sk_test")
    return told


@pytest.fixture(autouse=True)
def own_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("SUBLET_URL", raising=False)
    monkeypatch.delenv("SUBLET_KEY", raising=False)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def command(*words: str, stdin: str = "") -> Done:
        monkeypatch.setattr("sys.argv", ["sublet", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main.run()
        said = capsys.readouterr()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, said.out, said.err)

    return command
