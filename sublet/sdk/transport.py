"""One request and its answer: authority, retries, errors, pages.

A request that may be repeated safely is repeated when no answer came or the cloud says 503: reads,
deletes, and POSTs, which carry an Idempotency-Key made here and so are done once. PUT and PATCH
are not repeated: their If-Match would meet its own effect.
"""

from __future__ import annotations

import codecs
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from sublet.base.kernel.ids import Ids, SystemIds
from sublet.base.wire import rest
from sublet.sdk.errors import ApiError, ClientError, UnexpectedAnswer, Unreachable

S = TypeVar("S", bound=BaseModel)

TRIES = 4
PAUSES_SECONDS = (0.2, 0.6, 1.8)
LONGEST_PAUSE_SECONDS = 10
CONNECT_SECONDS = 30.0
_KEY = re.compile(r"[!-~]+")
REPEATABLE = frozenset({"GET", "DELETE", "POST"})


@dataclass(frozen=True, slots=True)
class Versioned:
    """The ETag that a change of this thing must name."""

    version: int

    def header(self) -> dict[str, str]:
        return {"if-match": f'"{self.version}"'}


class Transport:
    """Speaks to one cloud with one key. Threads may share it."""

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        http: httpx2.Client | None = None,
        ids: Ids | None = None,
        sleep: Callable[[float], None] = time.sleep,
        timeout_seconds: float = CONNECT_SECONDS,
    ) -> None:
        if key is not None and not _KEY.fullmatch(key):
            raise ClientError("the key is not one: a key looks like sk_… and has no blanks")
        self.url = url.rstrip("/")
        self._key = key
        self._http = http or httpx2.Client(timeout=timeout_seconds)
        self._ids = ids or SystemIds()
        self._sleep = sleep

    def close(self) -> None:
        self._http.close()

    def get(self, path: str, shape: type[S], **query: Any) -> S:
        return self._read(self.send("GET", path, query=query), shape)

    def post(
        self,
        path: str,
        shape: type[S],
        body: BaseModel | None = None,
        *,
        idempotency_key: str | None = None,
        timeout_seconds: float | None = None,
    ) -> S:
        answer = self.send(
            "POST",
            path,
            body=body,
            idempotency_key=idempotency_key,
            timeout_seconds=timeout_seconds,
        )
        return self._read(answer, shape)

    def post_once(self, path: str, shape: type[S], body: BaseModel, timeout_seconds: float) -> S:
        """A POST whose effect no key makes single, such as a command: sent one time only."""
        answer = self.send("POST", path, body=body, tries=1, timeout_seconds=timeout_seconds)
        return self._read(answer, shape)

    def change(
        self, method: str, path: str, shape: type[S], body: BaseModel, version: int | None
    ) -> S:
        headers = {} if version is None else Versioned(version).header()
        return self._read(self.send(method, path, body=body, headers=headers), shape)

    def delete(self, path: str) -> None:
        self.send("DELETE", path)

    def pages(self, path: str, shape: type[S], *, limit: int = 100, **query: Any) -> Iterator[S]:
        """All things of a list, fetched page by page as they are needed."""
        after: int | None = None
        while True:
            page = self.get(path, rest.Page[shape], after=after, limit=limit, **query)  # type: ignore[valid-type]
            yield from page.data
            if page.next is None:
                return
            after = page.next

    def text(self, path: str) -> str:
        return self.send("GET", path).text

    def stream_text(self, path: str, **query: Any) -> Iterator[str]:
        """A long answer as it comes, cut at characters and never inside one."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for chunk in self.stream_bytes(path, **query):
            if text := decoder.decode(chunk):
                yield text
        if rest_of_it := decoder.decode(b"", final=True):
            yield rest_of_it

    def stream_bytes(self, path: str, **query: Any) -> Iterator[bytes]:
        """A long answer as it comes."""
        request = self._request("GET", path, query, None, {})
        # A quiet workload says nothing for hours, and is followed all the same.
        request["timeout"] = httpx2.Timeout(CONNECT_SECONDS, read=None)
        try:
            with self._http.stream(**request) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    raise self._refusal(answer)
                yield from answer.iter_bytes()
        except httpx2.TransportError as error:
            raise Unreachable(self.url, error) from error

    def send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: BaseModel | None = None,
        headers: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
        tries: int = TRIES,
        timeout_seconds: float | None = None,
    ) -> httpx2.Response:
        """The answer of a request that succeeded; repeated where that is safe.

        Raises ApiError on a refusal and Unreachable when no answer came.
        """
        sent = dict(headers or {})
        if method == "POST":
            sent["idempotency-key"] = idempotency_key or self._ids.new("idk")
        request = self._request(method, path, query or {}, body, sent)
        if timeout_seconds is not None:
            request["timeout"] = timeout_seconds
        tries = tries if method in REPEATABLE else 1
        for turn in range(tries):
            is_last = turn == tries - 1
            try:
                answer = self._http.request(**request)
            except httpx2.TransportError as error:
                if is_last:
                    raise Unreachable(self.url, error) from error
                self._sleep(PAUSES_SECONDS[turn])
                continue
            if answer.status_code < 400:
                return answer
            refusal = self._refusal(answer)
            if answer.status_code != 503 or is_last:
                raise refusal
            pause = refusal.retry_after_seconds or PAUSES_SECONDS[turn]
            self._sleep(min(pause, LONGEST_PAUSE_SECONDS))
        raise AssertionError("the last turn returns or raises")

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, Any],
        body: BaseModel | None,
        headers: Mapping[str, str],
    ) -> dict[str, Any]:
        sent = {"accept": "application/json", **headers}
        if self._key is not None:
            sent["authorization"] = f"Bearer {self._key}"
        request: dict[str, Any] = {
            "method": method,
            "url": self.url + path,
            "params": {name: _word(value) for name, value in query.items() if value is not None},
            "headers": sent,
        }
        if body is not None:
            sent["content-type"] = "application/json"
            request["content"] = body.model_dump_json(exclude_unset=True).encode()
        return request

    def _read(self, answer: httpx2.Response, shape: type[S]) -> S:
        try:
            return shape.model_validate_json(answer.content)
        except ValidationError as error:
            raise UnexpectedAnswer(
                f"the answer of {self.url} is not a {shape.__name__} of this version of Sublet: {error}"
            ) from error

    def _refusal(self, answer: httpx2.Response) -> ApiError:
        after = answer.headers.get("retry-after", "")
        try:
            error = rest.ErrorBody.model_validate(json.loads(answer.content)).error
        except (ValueError, ValidationError):
            error = rest.ErrorDetail(
                message=f"{self.url} answered {answer.status_code} in a form that is not Sublet's",
                type="server_error",
                code="unexpected_answer",
            )
        return ApiError(
            status=answer.status_code,
            type=error.type,
            code=error.code,
            message=error.message,
            param=error.param,
            details=error.details or {},
            request_id=answer.headers.get("x-request-id", ""),
            retry_after_seconds=int(after) if after.isdigit() else None,
        )


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.isoformat() if isinstance(value, datetime) else str(value)
