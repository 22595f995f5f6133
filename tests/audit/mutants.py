"""For each invariant a change of a sound database that breaks it; docs/invariants.md quotes them.

The docstring says the change in words. A mutant that cannot but break another invariant as well
names it in `also`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy import Connection

from sublet.base.kernel.interval import month_of, next_month
from sublet.capacity.allocation.store import claims, placements
from sublet.money.billing.store import invoices, lines
from sublet.money.billing.token_store import allowances, token_lines
from sublet.records.ledger.store import accounts, holds, transfers
from sublet.records.metering.store import meters, spans, usage
from sublet.records.metering.token_store import spools, tokens
from sublet.records.tenancy.store import keys, organisations
from sublet.rights.market.store import postings
from sublet.rights.owner.store import recall_rows, shortfalls
from sublet.shops.compute.store import runs, transitions, workloads

SECOND = timedelta(seconds=1)
MILLISECOND = timedelta(milliseconds=1)
Mutate = Callable[[Connection], None]


@dataclass(frozen=True)
class Mutant:
    name: str
    breaks: str
    also: frozenset[str]
    said: str
    mutate: Mutate


MUTANTS: list[Mutant] = []


def breaks(invariant: str, *, also: tuple[str, ...] = ()) -> Callable[[Mutate], Mutate]:
    def keep(mutate: Mutate) -> Mutate:
        said = " ".join((mutate.__doc__ or "").split())
        MUTANTS.append(Mutant(mutate.__name__, invariant, frozenset(also), said, mutate))
        return mutate

    return keep


# Rows of the story.


def one(tx: Connection, table: sa.Table, *where: Any) -> Any:
    """The first such row."""
    query = sa.select(table).where(*where).limit(1)
    return tx.execute(query).one()


def change(tx: Connection, table: sa.Table, *where: Any, **values: Any) -> None:
    assert tx.execute(table.update().where(*where).values(**values)).rowcount == 1


def repeat(tx: Connection, table: sa.Table, row: Any, **values: Any) -> None:
    """The row once more, with other values where they are given."""
    copied = {name: value for name, value in row._mapping.items() if name != "seq"}
    tx.execute(table.insert().values(copied | values))


def workload(tx: Connection, name: str) -> Any:
    return next(w for w in tx.execute(sa.select(workloads)) if w.spec["name"] == name)


def run_of(tx: Connection, name: str, number: int = 1) -> Any:
    found = workload(tx, name)
    return one(tx, runs, runs.c.workload_id == found.id, runs.c.number == number)


def device_of(tx: Connection, name: str) -> str:
    (device,) = run_of(tx, name).device_ids
    return str(device)


def running(tx: Connection) -> Any:
    """A record of use of a run whose meter is open: nothing has been settled for good there."""
    run_id = run_of(tx, "also-firm").id
    return one(
        tx,
        usage,
        usage.c.run_id == run_id,
        usage.c.kind == "held",
        usage.c.corrects.is_(None),
    )


# The book.


@breaks("one_holder")
def a_device_is_given_out_before_it_is_free(tx: Connection) -> None:
    """The hold of an interrupted workload on its device ends a minute later than it did, when the
    owner had the device already."""
    held = one(tx, placements, placements.c.claim_id == run_of(tx, "train").claim_id)
    change(
        tx, placements, placements.c.seq == held.seq, ends_at=held.ends_at + timedelta(minutes=1)
    )


@breaks("children_stay_inside")
def a_child_sits_on_a_sold_device(tx: Connection) -> None:
    """What the owner runs inside a recall is moved to a device that is sold to somebody else."""
    child = one(tx, placements, placements.c.level == 1, placements.c.ends_at.is_(None))
    change(tx, placements, placements.c.seq == child.seq, device_id=device_of(tx, "also-firm"))


@breaks("claims_hold_what_they_may")
def a_claim_grows_without_devices(tx: Connection) -> None:
    """A claim that holds one device is made one for two."""
    change(tx, claims, claims.c.id == workload(tx, "also-firm").claim_id, devices=2)


@breaks("claims_hold_what_they_may")
def a_released_claim_keeps_its_device(tx: Connection) -> None:
    """A claim is marked as released and goes on holding its device."""
    claim = one(tx, claims, claims.c.id == workload(tx, "also-firm").claim_id)
    change(tx, claims, claims.c.id == claim.id, released_at=claim.opened_at + SECOND)


@breaks("releases_are_honoured")
def a_notice_is_cut_short(tx: Connection) -> None:
    """A noticed claim's SIGTERM, and all that follows, is set a second before its notice is over."""
    claim = one(tx, claims, claims.c.id == workload(tx, "box").claim_id)
    change(
        tx,
        claims,
        claims.c.id == claim.id,
        term_at=claim.term_at - SECOND,
        free_by=claim.free_by - SECOND,
    )


@breaks("releases_are_honoured")
def firm_time_is_broken(tx: Connection) -> None:
    """An on-demand claim is told, with its whole notice, to end within its firm hour."""
    claim = one(tx, claims, claims.c.id == workload(tx, "also-firm").claim_id)
    early = claim.opened_at + timedelta(seconds=claim.firm_seconds) - SECOND
    change(
        tx,
        claims,
        claims.c.id == claim.id,
        noticed_at=early - timedelta(seconds=claim.notice_seconds),
        notice_reason="owner_recall",
        term_at=early,
        free_by=early + timedelta(seconds=claim.stop_seconds),
    )


@breaks("free_by_covers_the_stop")
def the_stop_is_forgotten(tx: Connection) -> None:
    """A noticed claim's devices are promised for the instant of its SIGTERM."""
    claim = one(tx, claims, claims.c.id == workload(tx, "box").claim_id)
    change(tx, claims, claims.c.id == claim.id, free_by=claim.term_at)


@breaks("need_is_met_or_recorded")
def a_shortfall_is_hidden(tx: Connection) -> None:
    """The Shortfall of a need that was not met in time is deleted."""
    claim = one(tx, claims, claims.c.holder == "ned_research")
    tx.execute(shortfalls.delete().where(shortfalls.c.claim_id == claim.id))
    promise = timedelta(hours=1)
    change(tx, claims, claims.c.id == claim.id, starts_at=claim.starts_at - promise)


@breaks("recalls_are_on_time_or_late")
def a_late_hand_over_is_not_marked(tx: Connection) -> None:
    """A row of a recall was handed over a second after its date, and the recall is not late."""
    row = one(tx, recall_rows, recall_rows.c.delivered_at.is_not(None))
    where = (recall_rows.c.recall_id == row.recall_id, recall_rows.c.number == row.number)
    change(tx, recall_rows, *where, delivered_at=row.free_by + SECOND)


@breaks("recalls_are_on_time_or_late")
def an_overdue_row_is_not_marked(tx: Connection) -> None:
    """A row that still waits was due a minute ago, and the recall is not late."""
    row = one(tx, recall_rows, recall_rows.c.delivered_at.is_(None))
    where = (recall_rows.c.recall_id == row.recall_id, recall_rows.c.number == row.number)
    change(tx, recall_rows, *where, free_by=row.free_by - timedelta(hours=1))


@breaks("uses_match_holders")
def a_held_device_counts_as_idle(tx: Connection) -> None:
    """The time of a device that is sold is counted as idle."""
    device = device_of(tx, "also-firm")
    change(tx, spans, spans.c.device_id == device, spans.c.ends_at.is_(None), use="idle")


@breaks("placements_run_forward")
def a_placement_ends_before_it_begins(tx: Connection) -> None:
    """A device was given back a millisecond before it was given."""
    held = one(tx, placements, placements.c.claim_id == run_of(tx, "done").claim_id)
    change(tx, placements, placements.c.seq == held.seq, ends_at=held.starts_at - MILLISECOND)


# Money.


@breaks("transfers_balance", also=("balances_are_sums",))
def money_appears(tx: Connection) -> None:
    """A micro-dollar is added to one account, and nowhere taken."""
    change(tx, accounts, accounts.c.name == "trial", balance_micros=accounts.c.balance_micros + 1)


@breaks("balances_are_sums")
def money_moves_without_a_transfer(tx: Connection) -> None:
    """A micro-dollar goes from one account to another and no transfer says so."""
    change(tx, accounts, accounts.c.name == "trial", balance_micros=accounts.c.balance_micros + 1)
    change(
        tx, accounts, accounts.c.name == "payments", balance_micros=accounts.c.balance_micros - 1
    )


@breaks("credit_is_never_negative")
def credit_is_promised_twice(tx: Connection) -> None:
    """A hold is raised by a thousand million dollars, which its customer does not have."""
    much = 10**15
    hold = one(tx, holds, holds.c.state == "open")
    change(tx, holds, holds.c.id == hold.id, amount_micros=hold.amount_micros + much)
    change(
        tx,
        accounts,
        accounts.c.name == hold.account,
        held_micros=accounts.c.held_micros + much,
    )


@breaks("open_meter_has_a_hold")
def a_hold_lapses_under_an_open_meter(tx: Connection) -> None:
    """The hold of a workload that runs is released."""
    subject = workload(tx, "also-firm").id
    hold = one(tx, holds, holds.c.state == "open", holds.c.subject == subject)
    change(tx, holds, holds.c.id == hold.id, state="released")
    change(
        tx,
        accounts,
        accounts.c.name == hold.account,
        held_micros=accounts.c.held_micros - hold.amount_micros,
    )


# Use.


@breaks("usage_is_contiguous")
def a_second_is_not_metered(tx: Connection) -> None:
    """A record of use begins a millisecond after the one before it ended."""
    row = running(tx)
    change(tx, usage, usage.c.seq == row.seq, starts_at=row.starts_at + MILLISECOND)


@breaks("meter_stays_within_evidence")
def a_silent_run_is_billed(tx: Connection) -> None:
    """A meter stands a second beyond the last sign of life of its run."""
    run_id = run_of(tx, "also-firm").id
    meter = one(tx, meters, meters.c.run_id == run_id)
    change(tx, meters, meters.c.run_id == run_id, last_evidence_at=meter.metered_to - SECOND)


@breaks("nothing_is_metered_twice")
def a_correction_takes_back_twice(tx: Connection) -> None:
    """A correction takes back one device more than was recorded."""
    row = running(tx)
    repeat(tx, usage, row, event_id="twice", corrects=row.event_id, devices=-row.devices - 1)


@breaks("nothing_is_metered_twice", also=("usage_is_contiguous",))
def a_record_is_written_twice(tx: Connection) -> None:
    """A record of use is there a second time under another event id."""
    row = running(tx)
    repeat(tx, usage, row, event_id="twice")


@breaks("device_time_partitions")
def a_device_has_a_gap(tx: Connection) -> None:
    """A millisecond of a device's time belongs to no use."""
    span = one(tx, spans, spans.c.ends_at.is_not(None))
    where = (spans.c.device_id == span.device_id, spans.c.seq == span.seq)
    change(tx, spans, *where, ends_at=span.ends_at - MILLISECOND)


# Who.


@breaks("secrets_are_digests")
def a_secret_is_kept(tx: Connection) -> None:
    """A key's secret lies in the place of its digest."""
    key = one(tx, keys)
    change(tx, keys, keys.c.id == key.id, digest="sk_an_open_secret")


@breaks("one_owner")
def a_second_owner_comes(tx: Connection) -> None:
    """A second organisation is the owner."""
    tx.execute(sa.text("DROP INDEX uq_tenancy_organisation_owner"))
    owner = one(tx, organisations, organisations.c.kind == "owner")
    repeat(tx, organisations, owner, id="org_second")


# Workloads.


@breaks("one_live_run")
def a_workload_runs_twice(tx: Connection) -> None:
    """A second run of a running workload is intended."""
    run = run_of(tx, "also-firm")
    repeat(tx, runs, run, id="run_second", number=run.number + 1, state="intended", started_at=None)


@breaks("runs_do_not_overlap")
def a_run_starts_before_the_last_is_gone(tx: Connection) -> None:
    """The first run of a workload was gone a second after its second one had started."""
    first, second = run_of(tx, "firm", 1), run_of(tx, "firm", 2)
    change(tx, runs, runs.c.id == first.id, exited_at=second.started_at + SECOND)


@breaks("meters_match_runs")
def a_meter_opens_before_the_hand_over(tx: Connection) -> None:
    """A run was handed over a second after its meter had opened."""
    run = run_of(tx, "also-firm")
    change(tx, runs, runs.c.id == run.id, started_at=run.started_at + SECOND)


@breaks("transitions_form_a_chain")
def a_step_is_missing(tx: Connection) -> None:
    """One of a workload's transitions is deleted."""
    row = one(
        tx,
        transitions,
        transitions.c.workload_id == workload(tx, "firm").id,
        transitions.c.event == "started",
    )
    tx.execute(transitions.delete().where(transitions.c.seq == row.seq))


@breaks("transitions_form_a_chain")
def a_state_is_written_by_hand(tx: Connection) -> None:
    """A workload that completed is put into another state, and no transition says so."""
    change(tx, workloads, workloads.c.id == workload(tx, "done").id, state="failed")


@breaks("claims_follow_states")
def a_running_workload_has_no_claim(tx: Connection) -> None:
    """A workload runs on and its claim is forgotten."""
    change(tx, workloads, workloads.c.id == workload(tx, "also-firm").id, claim_id=None)


@breaks("no_sigterm_before_its_time")
def a_workload_is_ended_too_soon(tx: Connection) -> None:
    """An interrupted run got its SIGTERM a second less than its notice after it was told."""
    run = run_of(tx, "train")
    early = run.published_at + timedelta(seconds=run.notice_seconds) - SECOND
    change(tx, runs, runs.c.id == run.id, term_at=early)


# Money.


@breaks("posted_quantity_is_metered")
def a_posting_forgets_a_second(tx: Connection) -> None:
    """What was posted for a finished job says a second less than was metered."""
    row = one(
        tx,
        postings,
        postings.c.contract_id == workload(tx, "done").contract_id,
        postings.c.kind == "usage",
    )
    change(
        tx,
        postings,
        postings.c.contract_id == row.contract_id,
        postings.c.kind == "usage",
        quantity=row.quantity - 1000,
    )


@breaks("posted_is_rated")
def a_job_is_charged_a_micro_more(tx: Connection) -> None:
    """A finished job was charged a millionth more than its price times its time, and both accounts
    agree on it."""
    row = one(
        tx,
        transfers,
        transfers.c.contract_id == workload(tx, "done").contract_id,
        transfers.c.kind == "usage",
    )
    more = row.amount_micros + 1
    change(tx, transfers, transfers.c.seq == row.seq, amount_micros=more, charge_micros=more)
    for name, sign in ((row.debit, -1), (row.credit, 1)):
        account = one(tx, accounts, accounts.c.name == name)
        change(tx, accounts, accounts.c.name == name, balance_micros=account.balance_micros + sign)


@breaks("credits_stay_within_usage")
def more_is_given_back_than_was_charged(tx: Connection) -> None:
    """The credit for an interrupted run is a dollar more than the run had cost, and both accounts
    agree on it."""
    row = one(
        tx,
        transfers,
        transfers.c.contract_id == workload(tx, "train").contract_id,
        transfers.c.kind == "interruption_credit",
    )
    dollar = 1_000_000
    change(
        tx,
        transfers,
        transfers.c.seq == row.seq,
        amount_micros=row.amount_micros + dollar,
        charge_micros=row.charge_micros - dollar,
    )
    for name, sign in ((row.debit, -1), (row.credit, 1)):
        account = one(tx, accounts, accounts.c.name == name)
        change(
            tx,
            accounts,
            accounts.c.name == name,
            balance_micros=account.balance_micros + sign * dollar,
        )


@breaks("invoices_equal_the_ledger")
def an_invoice_is_for_nothing(tx: Connection) -> None:
    """An invoice is issued whose one line no transfer of the ledger accounts for."""
    row = one(tx, transfers, transfers.c.kind == "usage")
    month = month_of(row.at)
    tx.execute(
        invoices.insert().values(
            id="inv_mutant",
            organisation_id=row.organisation_id,
            month=month,
            currency="USD",
            closes_at=next_month(month),
            issued_at=next_month(month),
            total_micros=5,
            total_minor=0,
        )
    )
    tx.execute(
        lines.insert().values(
            invoice_id="inv_mutant",
            number=1,
            organisation_id=row.organisation_id,
            kind="usage",
            product="spot",
            charge_class="usage",
            starts_at=row.at,
            ends_at=row.at,
            quantity=1,
            version="",
            amount_micros=5,
            shown_minor=0,
            text="five micros for nothing",
        )
    )


# Tokens.


def output_line(tx: Connection) -> Any:
    """The line of output that customers were charged for."""
    return one(
        tx,
        token_lines,
        token_lines.c.kind == "token_usage",
        token_lines.c.token_class == "output",
    )


def live_allowance(tx: Connection) -> Any:
    return one(tx, allowances, allowances.c.state == "open")


def transfer_more(tx: Connection, row: Any, micros: int) -> None:
    """A transfer is so much larger, and both accounts agree on it."""
    change(
        tx,
        transfers,
        transfers.c.seq == row.seq,
        amount_micros=row.amount_micros + micros,
        charge_micros=row.charge_micros + micros,
    )
    for name, sign in ((row.debit, -1), (row.credit, 1)):
        account = one(tx, accounts, accounts.c.name == name)
        change(
            tx,
            accounts,
            accounts.c.name == name,
            balance_micros=account.balance_micros + sign * micros,
        )


def hold_of(tx: Connection, allowance: Any) -> Any:
    return one(tx, holds, holds.c.id == allowance.hold_id)


def resize(tx: Connection, hold: Any, micros: int, **values: Any) -> None:
    """A hold is so much larger, and its account agrees on it."""
    change(tx, holds, holds.c.id == hold.id, amount_micros=hold.amount_micros + micros, **values)
    more = micros if hold.state == "open" else hold.amount_micros + micros
    change(
        tx,
        accounts,
        accounts.c.name == hold.account,
        held_micros=accounts.c.held_micros + more,
    )


@breaks("token_lines_count_requests")
def a_token_is_not_billed(tx: Connection) -> None:
    """A request's record says one token more, made and delivered, than the lines count."""
    row = one(tx, tokens, tokens.c.event_id == "req_1")
    change(tx, tokens, tokens.c.seq == row.seq, output=row.output + 1, made=row.made + 1)


@breaks("token_lines_count_requests")
def a_stream_that_was_lost_is_not_booked(tx: Connection) -> None:
    """The record of a stream that ended with its gateway is deleted."""
    row = one(tx, tokens, tokens.c.outcome == "lost")
    assert tx.execute(tokens.delete().where(tokens.c.seq == row.seq)).rowcount == 1


@breaks("token_postings_are_rated")
def a_token_line_is_charged_a_micro_more(tx: Connection) -> None:
    """A transfer for tokens is a millionth more than their price, and both accounts agree on it."""
    line = output_line(tx)
    transfer_more(tx, one(tx, transfers, transfers.c.key == f"tokens:{line.seq}:1"), 1)


@breaks("token_postings_are_rated")
def a_token_line_forgets_what_was_lost(tx: Connection) -> None:
    """A line says that nothing of it was lost, and the ledger knows of a loss."""
    line = output_line(tx)
    assert line.lost_micros
    change(tx, token_lines, token_lines.c.seq == line.seq, lost_micros=0)


@breaks("no_more_is_posted_than_spent")
def a_cut_bill_is_charged_in_full(tx: Connection) -> None:
    """What a gateway took for a line was a millionth less than was charged for it."""
    line = output_line(tx)
    change(tx, token_lines, token_lines.c.seq == line.seq, spent_micros=line.posted_micros - 1)


@breaks("no_more_is_posted_than_spent")
def more_counts_as_spent_than_was(tx: Connection) -> None:
    """A line counts a dollar as spent that no gateway took."""
    line = output_line(tx)
    more = line.spent_micros + 1_000_000
    change(tx, token_lines, token_lines.c.seq == line.seq, spent_micros=more)


@breaks("spending_stays_granted")
def a_gateway_spends_what_nobody_granted(tx: Connection) -> None:
    """An allowance was for a millionth less than what came of it, and holds nothing."""
    row = live_allowance(tx)
    change(
        tx,
        allowances,
        allowances.c.gateway == row.gateway,
        granted_micros=row.settled_micros - 1,
    )


@breaks("spending_stays_granted")
def what_was_read_is_not_settled(tx: Connection) -> None:
    """A millionth that a gateway spent was read and not taken off what may still come; it is still
    held."""
    row = live_allowance(tx)
    change(
        tx,
        allowances,
        allowances.c.gateway == row.gateway,
        settled_micros=row.settled_micros - 1,
    )
    resize(tx, hold_of(tx, row), 1)


@breaks("allowances_are_held")
def an_allowance_is_held_for_in_part(tx: Connection) -> None:
    """The hold behind an allowance is a millionth less than what may still come of it."""
    resize(tx, hold_of(tx, live_allowance(tx)), -1)


@breaks("closed_gateways_hold_nothing")
def a_dead_gateway_holds_on(tx: Connection) -> None:
    """The hold of a gateway whose life is over is open again."""
    row = one(tx, allowances, allowances.c.state == "closed")
    resize(tx, hold_of(tx, row), 0, state="open")


@breaks("closed_gateways_hold_nothing")
def an_allowance_outlives_its_gateway(tx: Connection) -> None:
    """A gateway's life was closed before its allowances were, which hold what is left of them."""
    change(tx, spools, spools.c.gateway == "gw-0", state="closed")
