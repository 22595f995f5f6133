"""A model server for tests: OpenAI-ish, on a Unix socket, steered by words in the prompt.

    async with MockServer(path) as mock: ...                 in the test's own loop
    with mock_process(path) as process: ...                  in a process of its own
    python tests/gateway/mock_server.py PATH                 the same, by hand; SIGTERM ends it

It answers POST /v1/chat/completions, /v1/completions, /v1/embeddings, /tokenize,
/v1/chat/completions/input_tokens, and GET /health, /metrics (as llama.cpp names them), /stats.
POST /forget empties the stats.

Words in the prompt (the last message that has any; `name=value`, anywhere between blanks):
    n=50            tokens that it wants to make; the request's cap stops it (`finish_reason` length)
    delay=0.01      seconds between tokens
    silent=2        seconds before any byte, the head included
    pause=2         seconds between the head (and its comment, if any) and the first event
    comments=3      a comment line `: busy` before every third event; the first event has one
    status=503      an error in JSON and no more; `status=context`: as llama.cpp says it is too long
    die=0           the connection is reset before any byte; `die=head` after the head; `die=7` after
                    seven tokens (of a reply that is not streamed: half of its bytes are sent)
    end=7           the stream ends after seven tokens as if whole: no reason, no usage, no [DONE]
    usage=…         none: never told; zero: explicit zeros; cached: half of the prompt; over: more
                    cached than prompt; bad: words for numbers; beside: in the last choice's event
                    (vLLM's and llama.cpp's completions do so); lie: one token more than it made
    prompt=40       tokens of the prompt; else one a word
    counters=none   tells no counts in its events, though asked
    split=5         each event leaves in two writes, cut after five bytes; `split=each`: each byte alone
    cut=700         the whole stream of bytes (head included) is cut there, once, with a pause
    chunked=1       a reply that is not streamed comes in chunks
    calls=2         that many tool calls, in pieces and without `index` (needs `tools`)
    text=trap       tokens that look like the members that a gateway cuts out by byte search
    close=1         the connection is closed after the reply, without having said so

/stats: {"requests": {x-request-id: [{"made": tokens written, "prompt": N, "end": "whole" | "gone" |
"died" | "cut" | "error" | "open"}, …]}, "made": all, "prompt": all, "open": now, "connections": now}
A request without an id is counted under "". `made` counts a token as its bytes are written.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Self

LONGEST_PATH = 107
APART_SECONDS = 0.002
"""Between writes that are to arrive apart."""
TRAPS = (' ,"usage":{"x":1}', ' ,"timings":{"predicted_n":999}', " data: [DONE]\n\n", " \\", ' é"')


class _Died(Exception):
    """The server is to vanish now."""


class Steering(dict[str, str]):
    """The words of a prompt."""

    @classmethod
    def of(cls, body: dict[str, Any]) -> Steering:
        texts = [_text(message.get("content")) for message in body.get("messages", [])]
        texts += [_text(body.get("prompt")), _text(body.get("input")), _text(body.get("content"))]
        for text in reversed(texts):
            pairs = [word.partition("=") for word in text.split()]
            found = {name: value for name, sign, value in pairs if sign and value}
            if found:
                return cls(found)
        return cls()

    def number(self, name: str, default: float = 0) -> float:
        return float(self.get(name, default))


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return " ".join(p if isinstance(p, str) else str(p.get("text", "")) for p in content if p)
    return ""


class Connection:
    """One connection: requests one after the other, as they come."""

    def __init__(
        self, server: MockServer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.server = server
        self.reader = reader
        self.writer = writer
        self.steering = Steering()
        self.sent = 0
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        # Whoever closes a Unix socket sends an end and no error, which a stream would not tell of.
        for name in ("feed_eof", "set_exception"):
            setattr(reader, name, self.telling(getattr(reader, name)))

    def telling(self, end: Callable[..., None]) -> Callable[..., None]:
        def told(*given: Any) -> None:
            end(*given)
            if not self.closed.done():
                self.closed.set_result(None)

        return told

    async def serve(self) -> None:
        while True:
            head = await self.reader.readuntil(b"\r\n\r\n")
            line, *fields = head.decode("latin-1").split("\r\n")
            method, target, _ = line.split(" ", 2)
            headers = {}
            for field in fields:
                name, sign, value = field.partition(":")
                if sign:
                    headers[name.lower()] = value.strip()
            raw = await self.reader.readexactly(int(headers.get("content-length", 0)))
            self.sent = 0
            await self.answer(method, target, headers, raw)
            await self.writer.drain()
            if self.steering.get("close") or headers.get("connection") == "close":
                return

    async def answer(self, method: str, target: str, headers: dict[str, str], raw: bytes) -> None:
        self.steering = Steering()
        if method == "GET":
            await self.look(target)
            return
        if target == "/forget":
            self.server.forget()
            await self.reply(200, {})
            return
        body = json.loads(raw)
        self.steering = Steering.of(body)
        if target in ("/tokenize", "/v1/chat/completions/input_tokens"):
            count = self.prompt_tokens(body)
            await self.reply(200, {"tokens": list(range(count)), "input_tokens": count})
            return
        entry = self.server.begin(headers.get("x-request-id", ""), self.prompt_tokens(body))
        gone = asyncio.ensure_future(self.generate(target, body, entry))
        try:
            await self.until_gone(gone)
        except _Died:
            entry["end"] = "died"
            self.writer.transport.abort()
            raise
        except (ConnectionError, asyncio.CancelledError):
            entry["end"] = "gone"
            raise
        finally:
            self.server.open -= 1

    async def until_gone(self, work: asyncio.Future[None]) -> None:
        """Generation stops as soon as the other side closes, like a model server's."""
        try:
            await asyncio.wait({work, self.closed}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ConnectionResetError
            work.result()
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def look(self, target: str) -> None:
        if target == "/health":
            await self.reply(200, {"status": "ok"})
        elif target == "/stats":
            await self.reply(200, self.server.stats())
        elif target == "/metrics":
            await self.write_whole(200, self.server.metrics().encode(), "text/plain; version=0.0.4")
        else:
            await self.reply(404, {"error": {"message": "no such page", "type": "not_found"}})

    # ---- what it makes -------------------------------------------------------------------------

    def prompt_tokens(self, body: dict[str, Any]) -> int:
        if "prompt" in self.steering:
            return int(self.steering["prompt"])
        texts = [_text(message.get("content")) for message in body.get("messages", [])]
        texts += [_text(body.get("prompt")), _text(body.get("input")), _text(body.get("content"))]
        return max(sum(len(text.split()) for text in texts), 1)

    async def generate(self, target: str, body: dict[str, Any], entry: dict[str, Any]) -> None:
        words = self.steering
        if words.get("die") == "0":
            raise _Died
        await asyncio.sleep(words.number("silent"))
        if "status" in words:
            entry["end"] = "error"
            await self.refuse(words["status"], entry)
        elif target == "/v1/embeddings":
            await self.embed(body, entry)
        elif body.get("stream"):
            await self.stream(target, body, entry)
        else:
            await self.whole(target, body, entry)

    async def refuse(self, status: str, entry: dict[str, Any]) -> None:
        error: dict[str, Any] = {"code": 400, "message": "as asked", "type": "server_error"}
        if status == "context":
            error |= {"type": "exceed_context_size_error", "n_prompt_tokens": entry["prompt"]}
            error["n_ctx"] = 64
            status = "400"
        await self.reply(int(status), {"error": error})

    async def embed(self, body: dict[str, Any], entry: dict[str, Any]) -> None:
        inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
        data = [
            {"object": "embedding", "index": index, "embedding": [0.25, 0.5, 0.75, index + 0.5]}
            for index, _ in enumerate(inputs)
        ]
        usage = {"prompt_tokens": entry["prompt"], "total_tokens": entry["prompt"]}
        entry["end"] = "whole"
        await self.reply(
            200, {"object": "list", "data": data, "model": body.get("model"), "usage": usage}
        )

    def token(self, number: int) -> str:
        if self.steering.get("text") == "trap":
            return TRAPS[number % len(TRAPS)]
        return f" w{number}"

    def usage(self, entry: dict[str, Any]) -> dict[str, Any] | None:
        style, prompt, made = self.steering.get("usage", ""), entry["prompt"], entry["made"]
        cached = {"cached": prompt // 2, "over": prompt + 5}.get(style, 0)
        if style == "none":
            return None
        if style == "zero":
            prompt = made = 0
        if style == "lie":
            made += 1
        if style == "bad":
            return {"prompt_tokens": "many", "completion_tokens": None, "total_tokens": -1}
        found: dict[str, Any] = {
            "completion_tokens": made,
            "prompt_tokens": prompt,
            "total_tokens": prompt + made,
        }
        if cached:
            found["prompt_tokens_details"] = {"cached_tokens": cached}
        return found

    def timings(self, entry: dict[str, Any]) -> dict[str, Any]:
        cached = entry["prompt"] // 2 if self.steering.get("usage") == "cached" else 0
        return {
            "cache_n": cached,
            "prompt_n": entry["prompt"] - cached,
            "prompt_ms": 1.5,
            "predicted_n": entry["made"],
            "predicted_ms": 2.5,
        }

    def wanted(self, body: dict[str, Any]) -> tuple[int, str]:
        n = int(self.steering.number("n", 8))
        cap = body.get("max_completion_tokens") or body.get("max_tokens") or n
        return min(n, cap), "stop" if n <= cap else "length"

    def calls(self, body: dict[str, Any]) -> int:
        return int(self.steering.number("calls")) if body.get("tools") else 0

    # ---- a reply in one piece ------------------------------------------------------------------

    async def whole(self, target: str, body: dict[str, Any], entry: dict[str, Any]) -> None:
        n, reason = self.wanted(body)
        text = ""
        for number in range(n):
            if self.steering.get("delay"):
                await asyncio.sleep(self.steering.number("delay"))
            entry["made"] += 1
            self.server.made += 1
            text += self.token(number)
        usage = self.usage(entry)
        choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
        is_chat = target == "/v1/chat/completions"
        if is_chat:
            choice["message"] = {"role": "assistant", "content": text}
            if self.calls(body):
                choice["finish_reason"] = "tool_calls"
                choice["message"]["tool_calls"] = [
                    {
                        "type": "function",
                        "id": f"call_{number}",
                        "function": {"name": f"get_{number}", "arguments": '{"x":1}'},
                    }
                    for number in range(self.calls(body))
                ]
        else:
            choice["text"] = text
        reply: dict[str, Any] = {
            "choices": [choice],
            "created": 1700000000,
            "model": body.get("model"),
            "object": "chat.completion" if is_chat else "text_completion",
            "id": "mock-1",
            **({} if usage is None else {"usage": usage}),
            "timings": self.timings(entry),
        }
        data = json.dumps(reply, separators=(",", ":")).encode()
        if "die" in self.steering:
            head = (
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
            )
            await self.send(head % len(data) + data[: len(data) // 2])
            raise _Died
        entry["end"] = "whole"
        await self.write_whole(200, data, "application/json")

    # ---- a stream ------------------------------------------------------------------------------

    async def stream(self, target: str, body: dict[str, Any], entry: dict[str, Any]) -> None:
        words = self.steering
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
        await self.send(head + b"transfer-encoding: chunked\r\n\r\n")
        if words.get("die") == "head":
            raise _Died
        async for event in self.events(target, body, entry):
            await self.send(b"%x\r\n%b\r\n" % (len(event), event), words.get("split"))
        await self.send(b"0\r\n\r\n")
        if entry["end"] == "open":
            entry["end"] = "cut" if "end" in words else "whole"

    async def events(
        self, target: str, body: dict[str, Any], entry: dict[str, Any]
    ) -> AsyncIterator[bytes]:
        words = self.steering
        every = int(words.number("comments"))
        if every:
            yield b": busy\n\n"
        if "pause" in words:
            await asyncio.sleep(words.number("pause"))
        is_chat = target == "/v1/chat/completions"
        n, reason = self.wanted(body)
        last = int(words.number("end", n))
        delay = words.number("delay")
        if is_chat:
            yield self.event(body, is_chat, {"role": "assistant", "content": None}, None, entry)
        for number in range(min(n, last)):
            if delay:
                await asyncio.sleep(delay)
            elif number % 64 == 63:
                await self.writer.drain()
                await asyncio.sleep(0)
            entry["made"] += 1
            self.server.made += 1
            if every and number % every == every - 1:
                yield b": busy\n\n"
            is_last = number == n - 1 and not is_chat and not self.calls(body)
            yield self.event(
                body, is_chat, {"content": self.token(number)}, reason if is_last else None, entry
            )
            if words.get("die") == str(number + 1):
                raise _Died
        if "end" in words:
            return
        for number in range(self.calls(body)):
            for piece in self.call_pieces(number):
                yield self.event(body, is_chat, {"tool_calls": [piece]}, None, entry)
            reason = "stop"
        if is_chat:
            yield self.event(body, is_chat, {}, reason, entry)
        usage = self.usage(entry)
        asked = (body.get("stream_options") or {}).get("include_usage")
        if asked and usage is not None and words.get("usage") != "beside":
            told: dict[str, Any] = {**self.frame(body, is_chat), "choices": [], "usage": usage}
            if body.get("timings_per_token"):
                told["timings"] = self.timings(entry)
            yield self.line(told)
        yield b"data: [DONE]\n\n"

    def call_pieces(self, number: int) -> list[dict[str, Any]]:
        function = {"name": f"get_{number}", "arguments": ""}
        return [
            {"id": f"call_{number}", "type": "function", "function": function},
            {"id": f"call_{number}", "function": {"arguments": '{"x"'}},
            {"id": f"call_{number}", "function": {"arguments": f":{number}}}"}},
        ]

    def frame(self, body: dict[str, Any], is_chat: bool) -> dict[str, Any]:
        return {
            "id": "mock-1",
            "object": "chat.completion.chunk" if is_chat else "text_completion",
            "created": 1700000000,
            "model": body.get("model"),
        }

    def event(
        self,
        body: dict[str, Any],
        is_chat: bool,
        delta: dict[str, Any],
        reason: str | None,
        entry: dict[str, Any],
    ) -> bytes:
        choice: dict[str, Any] = {"finish_reason": reason, "index": 0}
        if is_chat:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        made: dict[str, Any] = {"choices": [choice], **self.frame(body, is_chat)}
        words = self.steering
        options = body.get("stream_options") or {}
        usage = self.usage(entry)
        if words.get("counters") == "none":
            pass
        elif body.get("timings_per_token") and (entry["made"] or reason):
            made["timings"] = self.timings(entry)
        if usage is not None and (
            (options.get("continuous_usage_stats") and words.get("counters") != "none")
            or (reason is not None and words.get("usage") == "beside")
        ):
            made["usage"] = usage
        return self.line(made)

    def line(self, values: dict[str, Any]) -> bytes:
        return b"data: " + json.dumps(values, separators=(",", ":")).encode() + b"\n\n"

    # ---- bytes ---------------------------------------------------------------------------------

    async def reply(self, status: int, body: dict[str, Any]) -> None:
        await self.write_whole(status, json.dumps(body).encode(), "application/json")

    async def write_whole(self, status: int, data: bytes, kind: str) -> None:
        head = f"HTTP/1.1 {status} Mock\r\ncontent-type: {kind}\r\n"
        if self.steering.get("chunked"):
            half = len(data) // 2
            await self.send(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
            for part in (data[:half], data[half:], b""):
                await self.send(b"%x\r\n%b\r\n" % (len(part), part), self.steering.get("split"))
        else:
            await self.send(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)

    async def send(self, data: bytes, split: str | None = None) -> None:
        """Write, cut apart where the prompt says so."""
        if split == "each":
            cuts = list(range(1, len(data)))
        else:
            cuts = [int(split)] if split and int(split) < len(data) else []
        whole_cut = int(self.steering.number("cut", -1)) - self.sent
        if 0 < whole_cut < len(data):
            cuts.append(whole_cut)
        self.sent += len(data)
        begin = 0
        for at in [*sorted(cuts), len(data)]:
            if self.writer.transport.is_closing():
                raise ConnectionResetError
            self.writer.write(data[begin:at])
            begin = at
            if at < len(data):
                await asyncio.sleep(APART_SECONDS)


class MockServer:
    """Serves on a Unix socket inside a running loop."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.requests: dict[str, list[dict[str, Any]]] = {}
        self.made = self.prompt = self.open = 0
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[Any]] = set()

    def begin(self, request_id: str, prompt: int) -> dict[str, Any]:
        entry: dict[str, Any] = {"made": 0, "prompt": prompt, "end": "open"}
        self.requests.setdefault(request_id, []).append(entry)
        self.prompt += prompt
        self.open += 1
        return entry

    def forget(self) -> None:
        self.requests.clear()
        self.made = self.prompt = 0

    def stats(self) -> dict[str, Any]:
        return {
            "requests": self.requests,
            "made": self.made,
            "prompt": self.prompt,
            "open": self.open,
            "connections": len(self._connections),
        }

    def metrics(self) -> str:
        values = {
            "prompt_tokens_total": self.prompt,
            "prompt_tokens_cached_total": 0,
            "tokens_predicted_total": self.made,
            "requests_processing": self.open,
            "requests_deferred": 0,
        }
        return "".join(f"llamacpp:{name} {value}\n" for name, value in values.items())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await Connection(self, reader, writer).serve()
        except (_Died, ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def start(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.unlink(missing_ok=True)
        folder = os.open(self.path.parent, os.O_PATH | os.O_DIRECTORY)
        try:
            path = os.fspath(self.path)
            if len(path) > LONGEST_PATH:
                path = f"/proc/self/fd/{folder}/{self.path.name}"
            self._server = await asyncio.start_unix_server(
                self._serve, path, limit=32 << 20, backlog=4096
            )
        finally:
            os.close(folder)
        self.path.chmod(0o600)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self.path.unlink(missing_ok=True)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()


@contextlib.contextmanager
def mock_process(path: Path | str) -> Iterator[subprocess.Popen[bytes]]:
    """The same in a process of its own, which serves when this returns."""
    process = subprocess.Popen([sys.executable, __file__, os.fspath(path)])
    try:
        end = time.monotonic() + 10
        while not Path(path).exists() and time.monotonic() < end:
            assert process.poll() is None, "the mock ended"
            threading.Event().wait(0.01)
        yield process
    finally:
        process.terminate()
        process.wait(10)


async def _main(path: str) -> None:
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    async with MockServer(path):
        await ended.wait()


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.run(_main(sys.argv[1]))
    except ImportError:
        asyncio.run(_main(sys.argv[1]))
