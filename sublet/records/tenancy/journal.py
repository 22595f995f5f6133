"""The audit of every act, and the answers kept for repeated requests."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection

from sublet.base.store import Work
from sublet.records.tenancy import store
from sublet.records.tenancy.model import Answer, AuditRow, IdempotencyKeyReused

ANSWERS_KEPT = timedelta(hours=24)


def audit(
    work: Work,
    *,
    action: str,
    target: str,
    result: str,
    detail: Mapping[str, Any] | None = None,
    organisation_id: str | None = None,
) -> None:
    """Note an act or a refused attempt by the Work's actor.

    `result` is `ok` or the code of the refusal. The row belongs to the actor's organisation, or
    to the one named. A refused act's Work is rolled back: its row is written in the next one.
    """
    store.insert(
        work.tx,
        store.audit,
        {
            "at": work.now,
            "actor_id": work.actor.id,
            "organisation_id": organisation_id or work.actor.organisation_id,
            "address": work.actor.address,
            "action": str(action),
            "target": target,
            "result": result,
            "detail": dict(detail or {}),
        },
    )


def list_audit(
    tx: Connection, organisation_id: str | None, after: int | None = None, limit: int = 100
) -> list[AuditRow]:
    """Rows in the order they were written; None: of all organisations."""
    return store.list_audit(tx, organisation_id, after, limit)


def find_answer(work: Work, scope: str, key: str, body_digest: str) -> Answer | None:
    """What this request was answered before, within 24 hours.

    `scope` names project, method and path. Raises IdempotencyKeyReused if the key came with
    another body. Called in the Work of the act, so that a second caller waits for the first.
    """
    row = store.find_answer(work.tx, scope, key, work.now - ANSWERS_KEPT)
    if row is None:
        return None
    if row.body_digest != body_digest:
        raise IdempotencyKeyReused(param="Idempotency-Key")
    return Answer(status=row.status, body=row.body)


def keep_answer(work: Work, scope: str, key: str, body_digest: str, status: int, body: str) -> None:
    """Keep the answer of an act in the act's own Work; what is no success is not kept.

    Never for an answer that shows a secret: the body is kept as it is.
    """
    if not 200 <= status < 300:
        return
    # The sweep also clears this key's own answer if it is older than 24 hours.
    store.sweep_answers(work.tx, work.now - ANSWERS_KEPT)
    work.tx.execute(
        store.answers.insert(),
        {
            "scope": scope,
            "key": key,
            "organisation_id": work.actor.organisation_id,
            "body_digest": body_digest,
            "status": status,
            "body": body,
            "at": work.now,
        },
    )
