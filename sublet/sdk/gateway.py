"""The client of the model gateway: as much of OpenAI's protocol as our own commands need.

Programs use OpenAI's or Anthropic's SDK; this is for `sublet chat`, `sublet bench` and the tour.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx2

from sublet.sdk.errors import GatewayError, UnexpectedAnswer, Unreachable


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One event of an answer: some text, or at the end what was used."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str | None = None


class Gateway:
    """`Gateway(url, key)`. Raises GatewayError where it refuses or ends with an error, Unreachable
    where no answer came, UnexpectedAnswer where one broke off."""

    def __init__(self, url: str, key: str, *, timeout_seconds: float = 120.0) -> None:
        self.url = url.rstrip("/")
        self._http = httpx2.Client(
            base_url=self.url,
            headers={"authorization": f"Bearer {key}"},
            timeout=timeout_seconds,
            trust_env=False,
        )

    def __enter__(self) -> Gateway:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """The names that this key may call."""
        try:
            answer = self._http.get("/v1/models")
        except httpx2.TransportError as error:
            raise Unreachable(self.url, error) from error
        _check(answer, None)
        return [str(model["id"]) for model in answer.json()["data"]]

    def embed(self, model: str, texts: Sequence[str]) -> list[list[float]]:
        try:
            answer = self._http.post("/v1/embeddings", json={"model": model, "input": list(texts)})
        except httpx2.TransportError as error:
            raise Unreachable(self.url, error) from error
        _check(answer, model)
        return [item["embedding"] for item in answer.json()["data"]]

    def chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        *,
        max_tokens: int | None = None,
        tier: str | None = None,
        **more: Any,
    ) -> Iterator[Piece]:
        """A streamed answer, piece by piece; the last piece holds the counts."""
        body: dict[str, Any] = {
            "model": model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **more,
        }
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        if tier is not None:
            body["service_tier"] = tier
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    answer.read()
                    _check(answer, model)
                yield from _pieces(answer, model)
        except httpx2.TransportError as error:
            raise Unreachable(self.url, error) from error


def _pieces(answer: httpx2.Response, model: str) -> Iterator[Piece]:
    is_whole = False
    for line in answer.iter_lines():
        if not line.startswith("data: "):
            continue
        data = line[6:]
        if data == "[DONE]":
            is_whole = True
            break
        event = json.loads(data)
        if "error" in event:
            raise _error(answer, event["error"], model)
        usage = event.get("usage")
        if usage:
            yield Piece(
                prompt_tokens=usage["prompt_tokens"], completion_tokens=usage["completion_tokens"]
            )
        for choice in event["choices"]:
            yield Piece(
                text=choice["delta"].get("content") or "", finish_reason=choice["finish_reason"]
            )
    if not is_whole:
        raise UnexpectedAnswer("the answer broke off before its end: ask again")


def _check(answer: httpx2.Response, model: str | None) -> None:
    if answer.status_code == 200:
        return
    try:
        error = answer.json()["error"]
    except (ValueError, KeyError, TypeError):
        raise UnexpectedAnswer(
            f"the gateway answered {answer.status_code} without a reason"
        ) from None
    raise _error(answer, error, model)


def _error(answer: httpx2.Response, error: Mapping[str, Any], model: str | None) -> GatewayError:
    after = answer.headers.get("retry-after", "")
    return GatewayError(
        model=model,
        status=answer.status_code if answer.status_code != 200 else 503,
        type=str(error.get("type")),
        code=str(error.get("code")),
        message=str(error.get("message")),
        param=error.get("param"),
        request_id=answer.headers.get("x-request-id", ""),
        retry_after_seconds=int(after) if after.isdigit() else None,
    )
