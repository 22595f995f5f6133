"""From sign-up to the invoice, with the refusals on the way."""

from __future__ import annotations

from datetime import timedelta

import pytest

from sublet.base.wire import rest
from sublet.sdk import ApiError


def test_a_stranger_signs_up_rents_uses_and_is_billed_to_the_micro(world) -> None:
    client, made = world.newcomer()
    assert made.organisation.standing == "good"
    assert made.trial_credit.text == "20.000000 USD"
    assert client.me().available == made.trial_credit

    [spot] = [o for o in client.offers.list() if o.id == "gpu-spot"]
    assert [n.notice_seconds for n in spot.notices] == [30, 120]
    quote = client.quotes.create(rest.QuoteCreate(offer_id="gpu-on-demand", duration_seconds=1800))
    assert quote.is_exact
    assert quote.total.micros == 1_800_000
    job = client.jobs.create(
        rest.JobCreate(quote_id=quote.id, command=["sh", "-c", "echo hello; sleep 1800"])
    )
    assert job.state == "provisioning"
    assert client.quotes.get(quote.id).contract_id == job.contract_id

    running = world.settle(client, job.id, "running")
    assert running.price_micros_per_device_hour == 3_600_000
    assert running.burn_micros_per_hour == 3_600_000
    assert client.status().burn_micros_per_hour == 3_600_000
    balance = client.money.balance()
    assert balance.held.micros > 0
    assert balance.available.micros == balance.balance.micros - balance.held.micros

    world.advance(1900, step=60)
    done = world.settle(client, job.id, "completed")
    assert done.exit_code == 0
    assert done.burn_micros_per_hour == 0
    assert "hello" in "".join(client.jobs.logs(job.id))
    states = [t.to_state for t in client.jobs.transitions(job.id)]
    assert states == ["pending", "provisioning", "running", "completed"] or states[-3:] == [
        "provisioning",
        "running",
        "completed",
    ]

    invoice = client.money.invoice_so_far()
    assert invoice.issued_at is None
    assert invoice.total.micros == sum(line.amount.micros for line in invoice.lines)
    assert invoice.total == done.cost
    assert invoice.total == quote.total
    [use] = client.money.usage(start=quote.created_at, end=world.clock.now())
    assert use.held_device_ms == 1_800_000
    after = client.money.balance()
    assert after.held.micros == 0
    assert after.balance.micros == 20_000_000 - invoice.total.micros

    verdict = world.owner.audit_books()
    assert verdict.sound, verdict.violations
    statement = world.owner.money.statement(start=quote.created_at, end=world.clock.now())
    assert statement.revenue.micros == invoice.total.micros


def test_out_of_stock_names_the_ways_on_and_is_kept_as_unmet_demand(world) -> None:
    client, _ = world.newcomer()
    first = client.jobs.create(
        rest.JobCreate(offer_id="gpu-on-demand", command=["sleep", "600"], max_run_seconds=600)
    )
    world.settle(client, first.id, "running")
    with pytest.raises(ApiError) as caught:
        client.jobs.create(
            rest.JobCreate(offer_id="gpu-on-demand-2", command=["sleep", "60"], max_run_seconds=60)
        )
    refusal = caught.value
    assert (refusal.status, refusal.code) == (409, "insufficient_capacity")
    assert refusal.details["earliest_at"] is not None
    assert refusal.details["offer_to_wait"] in (True, False)
    others = {way["offer_id"] for way in refusal.details["alternatives"]}
    assert "gpu-on-demand" in others
    # What is named is then admitted.
    way = client.jobs.create(rest.JobCreate(offer_id="gpu-on-demand", command=["true"]))
    assert way.state == "provisioning"
    refused = [e for e in client.audit.list() if e.result == "insufficient_capacity"]
    assert [e.action for e in refused] == ["create_job"]


def test_with_wait_there_is_no_refusal(world) -> None:
    client, made = world.newcomer()
    first = client.jobs.create(
        rest.JobCreate(offer_id="gpu-spot-2", command=["sleep", "60"], max_run_seconds=60)
    )
    world.settle(client, first.id, "running")
    answer = world.ask(
        "POST",
        "/v1/jobs",
        made.secret,
        {"offer_id": "gpu-spot-2", "command": ["true"], "wait": True},
    )
    assert answer.status_code == 202
    waiting = answer.json()
    assert waiting["state"] == "awaiting_capacity"
    assert waiting["waiting_since"] == world.clock.now().isoformat().replace("+00:00", "Z")
    world.advance(120)
    assert world.settle(client, waiting["id"], "completed").exit_code == 0


def test_what_is_admitted_for_later_says_when_it_starts(world) -> None:
    client, _ = world.newcomer()
    for _ in range(2):
        spot = client.jobs.create(rest.JobCreate(offer_id="gpu-spot", command=["sleep", "9000"]))
        world.settle(client, spot.id, "running")
    assert client.jobs.get(spot.id).starts_at is None
    firm = client.instances.create(rest.InstanceCreate(offer_id="gpu-on-demand"))
    assert firm.state == "provisioning"
    assert firm.starts_at is not None
    assert firm.starts_at > world.clock.now()


def test_without_credit_nothing_starts(worlds) -> None:
    world = worlds(trial="0.10")
    client, _ = world.newcomer()
    with pytest.raises(ApiError) as caught:
        client.instances.create(rest.InstanceCreate(offer_id="gpu-on-demand"))
    assert (caught.value.status, caught.value.code) == (402, "insufficient_credit")
    world.owner.money.record_payment(
        rest.PaymentCreate(
            organisation_id=client.me().organisation.id,
            amount_micros=50_000_000,
            reference="wire 4711",
        )
    )
    assert client.instances.create(rest.InstanceCreate(offer_id="gpu-on-demand")).id


def test_an_instance_is_stopped_started_changed_and_ended(world) -> None:
    client, _ = world.newcomer()
    made = client.instances.create(
        rest.InstanceCreate(offer_id="gpu-spot", notice_seconds=30, name="desk")
    )
    up = world.settle(client, made.id, "running")
    assert up.ssh is not None
    assert up.ssh.user == made.id
    told = client.instances.stop(made.id)
    assert told.workload.state == "stopping"
    assert told.still_costs_per_hour.micros == 0
    assert "files" in told.explanation
    world.settle(client, made.id, "stopped")
    again = client.instances.start(made.id)
    assert again.state == "provisioning"
    up = world.settle(client, made.id, "running")
    assert up.run is not None
    assert up.run.number == 2
    renamed = client.instances.change(made.id, rest.WorkloadPatch(name="bench"), version=up.version)
    assert renamed.name == "bench"
    client.instances.terminate(made.id)
    assert world.settle(client, made.id, "terminated").name == "bench"
    assert [run.number for run in client.instances.runs(made.id)] == [1, 2]


def test_a_budget_stops_before_the_spending(world) -> None:
    client, made = world.newcomer()
    client.budgets.set(
        rest.BudgetPut(
            scope_kind="project", scope_id=made.project.id, period="day", limit_micros=100_000
        )
    )
    with pytest.raises(ApiError) as caught:
        client.jobs.create(
            rest.JobCreate(offer_id="gpu-on-demand", command=["true"], project_id=made.project.id)
        )
    assert (caught.value.status, caught.value.code) == (403, "budget_exceeded")
    assert caught.value.details["resets_at"].startswith("2026-11-25T00:00:00")
    shown = list(client.budgets.list())
    assert shown == []
    [budget] = world.ask("GET", f"/v1/budgets?project_id={made.project.id}", made.secret).json()[
        "data"
    ]
    assert budget["limit"]["text"] == "0.100000 USD"
    assert budget["resets_at"] == "2026-11-25T00:00:00Z"


def test_the_month_is_invoiced_and_frozen(world) -> None:
    client, _ = world.newcomer()
    job = client.jobs.create(
        rest.JobCreate(offer_id="gpu-spot", notice_seconds=30, command=["sleep", "600"])
    )
    world.settle(client, job.id, "running")
    world.advance(700, step=60)
    done = world.settle(client, job.id, "completed")
    world.clock.advance_to(world.clock.now() + timedelta(days=10))
    world.tick()
    [summary] = client.money.invoices()
    frozen = client.money.invoice(summary.id)
    assert frozen.number is not None
    assert frozen.total == done.cost
    assert sum(line.shown_minor for line in frozen.lines) == frozen.total_minor
    assert client.money.invoice_so_far().total.micros == 0
