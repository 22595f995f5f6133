"""One authenticated request: who asks, what they may, how it is done once, how it is recorded.

`Call.act` is the only way in which a handler changes anything. In one Work it asks whether the key
may do this, looks for the answer that this Idempotency-Key already had, does the act, audits it and
keeps the answer; a refusal rolls that Work back and is audited in one of its own.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import structlog
from fastapi import Depends, Header, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from sqlalchemy import Connection
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from sublet.base.kernel.errors import (
    Invalid,
    NotFound,
    SubletError,
    Unauthenticated,
    Unavailable,
)
from sublet.base.store import Actor, Work
from sublet.edge.api.deps import Deps
from sublet.edge.api.pace import Pace
from sublet.edge.api.versions import etag
from sublet.records import tenancy

log = structlog.get_logger()

M = TypeVar("M", bound=BaseModel)

Status = int | Callable[[M], int]
"""An answer's status, or how it follows from what was made."""

IDEMPOTENCY_KEY = re.compile(r"[!-~]{1,200}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What of the HTTP request matters beyond its body."""

    method: str
    path: str
    address: str
    request_id: str
    body: bytes
    idempotency_key: str | None

    @classmethod
    def of(cls, request: Request, idempotency_key: str | None = None) -> Asked:
        if idempotency_key is not None and not IDEMPOTENCY_KEY.fullmatch(idempotency_key):
            raise Invalid(
                "idempotency-key: 1 to 200 visible ASCII characters", param="idempotency-key"
            )
        state = request.scope["state"]
        return cls(
            method=request.method,
            path=request.url.path,
            address=request.client.host if request.client else "",
            request_id=state["request_id"],
            body=state["body"],
            idempotency_key=idempotency_key,
        )

    def body_digest(self) -> str:
        """Of what the body says, so that blanks and the order of fields do not matter."""
        try:
            said = json.dumps(json.loads(self.body or b"null"), sort_keys=True).encode()
        except ValueError:
            said = self.body
        return hashlib.sha256(said).hexdigest()


def once(
    work: Work,
    asked: Asked,
    scope: str,
    status: Status[M],
    do: Callable[[], M],
    *,
    keep: Callable[[M], M] | None = None,
    headers: Callable[[M], Mapping[str, str]] | None = None,
) -> Response:
    """Do it, or give the answer that the same request already had. Part of the caller's Work.

    `keep`: what of the answer is stored, such as a key without its secret.
    """
    # The key is bound to method and path, so that it names one request and no other.
    name = f"{scope}|{asked.method}|{asked.path}"
    digest = asked.body_digest()
    if asked.idempotency_key is not None:
        found = tenancy.find_answer(work, name, asked.idempotency_key, digest)
        if found is not None:
            kept = json.loads(found.body)
            again = JSONResponse(kept["answer"], found.status, headers=kept["headers"])
            again.headers["idempotent-replayed"] = "true"
            return again
    made = do()
    code = _status(status, made)
    sent = dict(headers(made)) if headers else {}
    answer = made.model_dump(mode="json")
    if asked.idempotency_key is not None:
        kept = keep(made).model_dump(mode="json") if keep else answer
        kept_text = json.dumps({"answer": kept, "headers": sent})
        tenancy.keep_answer(work, name, asked.idempotency_key, digest, code, kept_text)
    return JSONResponse(answer, code, headers=sent)


def _status(status: Status[M], made: M) -> int:
    return status if isinstance(status, int) else status(made)


def versioned(made: Any) -> Mapping[str, str]:
    """The ETag of an answer that has a version."""
    return {"etag": etag(made.version)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request whose key is good."""

    deps: Deps
    identity: tenancy.Identity
    asked: Asked

    @property
    def organisation_id(self) -> str:
        return self.identity.organisation.id

    @property
    def actor(self) -> Actor:
        return self.identity.actor(self.asked.address)

    def read(self) -> AbstractContextManager[Connection]:
        return self.deps.store.read()

    def act(
        self,
        action: str,
        do: Callable[[Work], M],
        *,
        needs: tenancy.Action | None = None,
        target: str = "",
        about: str | None = None,
        status: Status[M] = 200,
        detail: Mapping[str, Any] | None = None,
        is_audited: bool = True,
        keep: Callable[[M], M] | None = None,
        headers: Callable[[M], Mapping[str, str]] | None = None,
        unmet: Callable[[Work, SubletError], None] | None = None,
    ) -> Response:
        """Do it in one Work with its audit row and its kept answer, or not at all.

        `needs`: what the key must be allowed to do. It is asked before the kept answer is looked
        for, so that nobody reads the answer of an act that is not theirs; `do` asks the rest, of
        the thing itself. `target` names what is acted on; left out, the id of what was made.
        `about`: another organisation, in whose audit the act belongs. `is_audited` False: the service writes
        the row of a success itself. `unmet` writes down the demand that a refusal leaves behind,
        in the refusal's own Work.
        """

        def noted(work: Work) -> M:
            made = do(work)
            if is_audited:
                named = target or str(getattr(made, "id", ""))
                tenancy.audit(
                    work,
                    action=action,
                    target=named,
                    result="ok",
                    detail=detail,
                    organisation_id=about,
                )
            return made

        # An answer may be kept for this key: it is of no use to say who may have it afterwards.
        assert needs is not None or self.asked.idempotency_key is None, action
        scope = self.identity.project_id or self.organisation_id
        try:
            if needs is not None:
                self.require(needs)
            with self.deps.store.work(self.actor) as work:
                response = once(
                    work,
                    self.asked,
                    scope,
                    status,
                    lambda: noted(work),
                    keep=keep,
                    headers=headers,
                )
        except SubletError as refusal:
            self.note_refusal(action, target, refusal, about=about, unmet=unmet)
            raise
        self.deps.nudge()
        return response

    def note_refusal(
        self,
        action: str,
        target: str,
        refusal: SubletError,
        *,
        about: str | None = None,
        unmet: Callable[[Work, SubletError], None] | None = None,
    ) -> None:
        """Audit an act that was refused, in a Work of its own."""
        # Who names another's organisation must not write into that one's audit.
        place = about if self.identity.is_owner else None
        try:
            with self.deps.store.work(self.actor) as work:
                tenancy.audit(
                    work,
                    action=action,
                    target=target,
                    result=refusal.code,
                    detail={"message": refusal.message, "param": refusal.param},
                    organisation_id=place,
                )
                if unmet is not None:
                    unmet(work, refusal)
        except Unavailable:
            # The caller hears the refusal all the same; a full disk must not hide it.
            log.exception("refusal_not_audited", action=action, request_id=self.asked.request_id)

    def require(
        self,
        action: tenancy.Action,
        *,
        of: Any | None = None,
        missing: type[NotFound] | None = None,
    ) -> None:
        """Pass if this key may do it, to the thing `of` where one is named.

        Another organisation's thing is `missing`, the same as one that does not exist.
        """
        if of is None:
            tenancy.require(self.identity, action)
            return
        try:
            tenancy.require(
                self.identity, action, of.organisation_id, getattr(of, "project_id", None)
            )
        except NotFound as hidden:
            raise (missing() if missing is not None else hidden) from None


_bearer = HTTPBearer(auto_error=False, description="A key: `sk_…`.")

Credentials = Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)]


def _authenticated(request: Request, credentials: Credentials) -> Call:
    """Whose key it is. Raises Unauthenticated, or TooMany by the key's own limit."""
    return _call(request, credentials, None)


def _authenticated_once(
    request: Request,
    credentials: Credentials,
    idempotency_key: Annotated[
        str | None,
        Header(description="The same key and body within 24 hours: the same answer, done once."),
    ] = None,
) -> Call:
    return _call(request, credentials, idempotency_key)


def _call(
    request: Request,
    credentials: HTTPAuthorizationCredentials | None,
    idempotency_key: str | None,
) -> Call:
    deps: Deps = request.app.state.deps
    pace: Pace = request.app.state.pace
    if credentials is None or not credentials.credentials:
        raise Unauthenticated(param="authorization")
    with deps.store.read() as tx:
        identity = tenancy.authenticate(tx, credentials.credentials, deps.store.clock.now())
    limit = identity.limits.requests_per_minute
    if limit is not None:
        pace.take(identity.key.id, limit)
    return Call(deps=deps, identity=identity, asked=Asked.of(request, idempotency_key))


Caller = Annotated[Call, Depends(_authenticated)]
"""For reads, and for changes that If-Match guards."""
Poster = Annotated[Call, Depends(_authenticated_once)]
"""For POSTs: takes an Idempotency-Key."""
