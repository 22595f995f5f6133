"""F2 on real processes: two API processes under one `up`, and everybody wants the last node."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from sublet.base.wire import rest
from sublet.sdk import ApiError

BUYERS, ASKS = 10, 50


def at_once(asks: list[Callable[[], Any]]) -> list[Any]:
    """Each in a thread of its own, let go at one instant; a refusal is an answer."""
    barrier = threading.Barrier(len(asks))
    answers: list[Any] = [None] * len(asks)

    def ask(number: int) -> None:
        barrier.wait()
        try:
            answers[number] = asks[number]()
        except ApiError as refused:
            answers[number] = refused

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(len(asks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


@pytest.mark.slow
def test_the_last_node_is_sold_once(make_cloud: Callable[..., Any]) -> None:
    cloud = make_cloud("--trusted-tenants", "--api-workers", "2")
    buyers = [cloud.consumer(f"buyer{n}") for n in range(BUYERS)]
    offers = [o for o in buyers[0].offers.list() if o.product == "spot"]
    whole = max(offers, key=lambda offer: offer.devices)
    body = rest.JobCreate(offer_id=whole.id, command=["sleep", "600"], max_run_seconds=600)

    def repeated() -> Any:
        return buyers[0].jobs.create(body, idempotency_key="the-same")

    asks = [repeated for _ in range(ASKS // 2)]
    for number in range(ASKS // 2):
        buyer = buyers[1 + number % (BUYERS - 1)]
        asks.append(lambda buyer=buyer: buyer.jobs.create(body))
    answers = at_once(asks)
    sold = {answer.id for answer in answers if isinstance(answer, rest.Workload)}
    refused = [answer for answer in answers if isinstance(answer, ApiError)]
    assert len(sold) == 1, "one node is sold once"
    assert {r.code for r in refused} <= {"insufficient_capacity"}
    assert all(r.details["earliest_at"] for r in refused)
    for buyer in buyers:
        held = buyer.money.balance().held.micros
        assert (held > 0) == any(job.id in sold for job in buyer.jobs.list())

    winner = next(b for b in buyers if any(j.id in sold for j in b.jobs.list()))
    if winner is buyers[0]:
        assert {a.id for a in answers[: ASKS // 2]} == sold
        with pytest.raises(ApiError) as other:
            buyers[0].jobs.create(
                rest.JobCreate(offer_id=whole.id, command=["true"]), idempotency_key="the-same"
            )
        assert (other.value.status, other.value.code) == (422, "idempotency_key_reused")
    with pytest.raises(ApiError) as open_ended:
        buyers[1].instances.create(rest.InstanceCreate(offer_id=whole.id))
    assert open_ended.value.code == "insufficient_capacity"
    (job,) = sold
    winner.jobs.cancel(job)
    assert cloud.owner().audit_books().sound
