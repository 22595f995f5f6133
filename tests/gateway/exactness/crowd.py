"""A crowd of clients that ask for all sorts of things, leave when they like, and write down what
they got."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

CONNECTIONS = 32
READ_SECONDS = 60.0
PAUSE_SECONDS = 0.2
"""Of a client that was told to come again later."""


@dataclass(slots=True)
class Seen:
    """One request as its client saw it."""

    kind: str
    key: str
    model: str
    is_stream: bool
    legs: int = 1
    rid: str = ""
    """Empty: no head came."""
    status: int = 0
    tokens: int = 0
    """Of a stream: those that came."""
    end: str = "open"
    """`whole`: all of the answer came; `error`: an error, at once or in the stream; `left`: the
    client went away; `cut`: the connection ended under it."""
    code: str = ""
    usage: tuple[int, int] | None = None
    """Prompt and output tokens, as the answer told."""


@dataclass(frozen=True, slots=True)
class Key:
    id: str
    secret: str


@dataclass
class Crowd:
    port: int
    keys: Sequence[Key]
    poor: Key
    models: Sequence[str]
    seed: int
    seen: list[Seen] = field(default_factory=list)

    async def ask(
        self, count: int, at: Mapping[int, Callable[[], Coroutine[None, None, None]]]
    ) -> None:
        """So many requests; `at`: what is done beside them after so many were begun."""
        rng = random.Random(self.seed)
        plans = [self._plan(rng) for _ in range(count)]
        begun = iter(enumerate(plans))
        beside: list[asyncio.Task[None]] = []

        async def client(number: int) -> None:
            mine = random.Random(self.seed * 1000 + number)
            connection: _Connection | None = None
            for index, (seen, path, body, leaves) in begun:
                if index in at:
                    beside.append(asyncio.ensure_future(at[index]()))
                self.seen.append(seen)
                if connection is None or mine.random() < 0.05:
                    if connection is not None:
                        connection.close()
                    connection = _Connection(self.port)
                try:
                    await asyncio.wait_for(
                        connection.ask(seen, path, body, self._secret(seen.key), leaves),
                        READ_SECONDS,
                    )
                except TimeoutError as error:
                    raise AssertionError(
                        f"no end after {READ_SECONDS} s: {seen} {body!r}"
                    ) from error
                if not connection.is_open:
                    connection = None
                if seen.code == "no_replica":
                    await asyncio.sleep(PAUSE_SECONDS)
            if connection is not None:
                connection.close()

        await asyncio.gather(*(client(number) for number in range(CONNECTIONS)))
        await asyncio.gather(*beside)

    def _secret(self, key_id: str) -> str:
        return next(key.secret for key in (*self.keys, self.poor) if key.id == key_id)

    def _plan(self, rng: random.Random) -> tuple[Seen, str, bytes, float | None]:
        """A request, and after how many seconds its client leaves."""
        kind, words, fields, leaves = _draw(rng)
        key = self.poor if rng.random() < 0.03 else rng.choice(self.keys)
        model = rng.choice(self.models)
        is_stream = bool(fields.get("stream"))
        path = "/v1/chat/completions"
        asked: dict[str, Any] = {"model": model, **fields}
        text = f"{words} " + "word " * rng.randrange(0, 20)
        surface = rng.random()
        if kind == "choices" or surface < 0.75:
            asked["messages"] = [{"role": "user", "content": text}]
        elif surface < 0.88:
            path, asked["prompt"] = "/v1/completions", text
        else:
            path = "/v1/messages"
            asked["messages"] = [{"role": "user", "content": text}]
            asked["max_tokens"] = 200
        if rng.random() < 0.2:
            asked["max_tokens"] = rng.randrange(1, 60)
        if rng.random() < 0.2 and path != "/v1/messages" and is_stream:
            asked["stream_options"] = {"include_usage": True}
        seen = Seen(kind, key.id, model, is_stream, legs=fields.get("n", 1))
        body = b'{"model": no JSON' if kind == "nonsense" else json.dumps(asked).encode()
        return seen, path, body, leaves


def _draw(rng: random.Random) -> tuple[str, str, dict[str, Any], float | None]:
    """Kind, words for the mock, fields of the request, when to leave."""
    n = rng.choice((1, 2, 3, 5, 8, 13, 40))
    place = rng.random()
    stream: dict[str, Any] = {"stream": True}
    either = stream if rng.random() < 0.5 else {}
    if place < 0.34:
        return "whole", f"n={n}", {}, None
    if place < 0.62:
        return "stream", f"n={n}", stream, None
    if place < 0.66:
        return "cached", f"n={n} usage=cached prompt={rng.randrange(2, 60)}", either, None
    if place < 0.70:
        return "choices", f"n={n}", {"n": rng.randrange(2, 4), **either}, None
    if place < 0.74:
        return "split", f"n={n} split={rng.randrange(1, 40)} comments=2", stream, None
    if place < 0.82:
        return "leaves", "n=200 delay=0.002", stream, rng.random() * 0.15
    if place < 0.86:
        return "leaves", "n=40 delay=0.002", {}, rng.random() * 0.1
    if place < 0.89:
        return "error", f"status={rng.choice((500, 503, 400, 'context'))}", either, None
    if place < 0.94:
        return "dies", f"n={n + 5} die={rng.choice((0, 'head', 1, 2, 4))}", stream, None
    if place < 0.96:
        return "dies", f"n={n} die=1", {}, None
    if place < 0.98:
        return "ends", f"n={n + 5} end={rng.choice((0, 1, 3))}", stream, None
    if place < 0.99:
        # Some are always open, so that a kill meets them.
        return "long", "n=900 delay=0.005", stream, None
    return "nonsense", "", {}, None


class _Connection:
    """One connection that is kept from request to request."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter | None = None
        self.is_open = True

    def close(self) -> None:
        self.is_open = False
        if self._writer is not None:
            self._writer.transport.abort()

    async def ask(
        self, seen: Seen, path: str, body: bytes, secret: str, leaves: float | None
    ) -> None:
        work = asyncio.ensure_future(self._ask(seen, path, body, secret))
        try:
            await asyncio.wait_for(work, leaves)
        except TimeoutError:
            seen.end = "left"
            self.close()
        except (OSError, EOFError):
            # An asyncio.IncompleteReadError is an EOFError.
            if seen.end == "open":
                seen.end = "cut"
            self.close()

    async def _ask(self, seen: Seen, path: str, body: bytes, secret: str) -> None:
        if self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(
                "127.0.0.1", self._port, limit=1 << 20
            )
        self._writer.write(
            b"POST %b HTTP/1.1\r\nhost: a\r\nauthorization: Bearer %b\r\ncontent-length: %d\r\n\r\n%b"
            % (path.encode(), secret.encode(), len(body), body)
        )
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in head[1:] if line)
        seen.status = int(head[0].split()[1])
        seen.rid = headers["x-request-id"]
        if "content-length" in headers:
            data = await self._reader.readexactly(int(headers["content-length"]))
            _note_whole(seen, json.loads(data))
        else:
            await self._stream(seen)
        if headers.get("connection") == "close" or (seen.end == "error" and seen.status == 200):
            self.close()  # A stream that broke ends its connection, too.

    async def _stream(self, seen: Seen) -> None:
        """Events as they come; what is not whole at the end does not count."""
        rest = b""
        while size := int((await self._reader.readuntil(b"\r\n"))[:-2], 16):
            data = rest + (await self._reader.readexactly(size + 2))[:-2]
            *events, rest = data.split(b"\n\n")
            for event in events:
                _note_event(seen, event)
        await self._reader.readexactly(2)
        assert not rest, "a stream that ends in the middle of an event"
        if seen.end == "open":
            seen.end = "cut"


def _note_whole(seen: Seen, answer: dict[str, Any]) -> None:
    if seen.status != 200:
        seen.end, seen.code = "error", str(answer["error"].get("code"))
        return
    usage = answer["usage"]
    if "prompt_tokens" in usage:
        seen.usage = usage["prompt_tokens"], usage["completion_tokens"]
    else:
        prompt = usage["input_tokens"] + (usage.get("cache_read_input_tokens") or 0)
        seen.usage = prompt, usage["output_tokens"]
    seen.end = "whole"


def _note_event(seen: Seen, event: bytes) -> None:
    lines = [line[6:] for line in event.split(b"\n") if line.startswith(b"data: ")]
    if not lines:
        return
    (line,) = lines
    if line == b"[DONE]":
        seen.end = "whole"
        return
    found = json.loads(line)
    if found.get("error"):
        seen.end, seen.code = "error", str(found["error"]["code"])
    elif found.get("type") == "message_stop":
        seen.end = "whole"
    elif found.get("type") == "content_block_delta":
        seen.tokens += 1
    elif found.get("type") == "message_delta":
        prompt = found["usage"]["input_tokens"] + (
            found["usage"].get("cache_read_input_tokens") or 0
        )
        seen.usage = prompt, found["usage"]["output_tokens"]
    else:
        for choice in found.get("choices", ()):
            text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            seen.tokens += bool(text)
        usage = found.get("usage")
        if usage:
            seen.usage = usage["prompt_tokens"], usage["completion_tokens"]
