"""Who gets devices: a new workload, one that starts again, one that waited.

Each is a new admission with a new claim and a new hold, under the workload's contract.
"""

from __future__ import annotations

import dataclasses
from datetime import timedelta
from enum import StrEnum

from sublet.base.kernel.errors import Forbidden, NoCapacity, PaymentRequired
from sublet.base.store import Work
from sublet.capacity import allocation
from sublet.capacity.allocation import Claim, Refused
from sublet.records import ledger, tenancy
from sublet.rights import market, owner
from sublet.shops.compute import life, sealed, store
from sublet.shops.compute.model import Reason, Workload
from sublet.shops.compute.states import Step


def admit(
    work: Work, workload: Workload, contract: market.Contract, *, with_ways_on: bool = True
) -> Claim | Refused:
    """Ask for devices under the workload's contract; its hold is taken already.

    Raises SealedNode where it would stand beside a sealed model: then the Work is to be rolled
    back.
    """
    if contract.is_first_party:
        return owner.first_party_claim(
            work,
            pool_id=contract.pool_id,
            organisation_id=contract.organisation_id,
            devices=contract.devices,
            count=contract.count,
            urgency=allocation.Urgency.URGENT,
            holder=workload.id,
        )
    claim = market.claim_of(
        contract, claim_id=work.ids.new("clm"), holder=workload.id, now=work.now
    )
    longest = workload.spec.max_run_seconds
    if longest is not None:
        ends_at = work.now + timedelta(seconds=longest)
        claim = dataclasses.replace(
            claim, release=dataclasses.replace(claim.release, ends_at=ends_at)
        )
    decision = allocation.admit(work, claim, with_ways_on=with_ways_on)
    if isinstance(decision, Refused):
        return decision
    # The pool's row is held now: nobody comes between this look and the commit.
    sealed.check_stranger(work, workload, decision.claim.starts_at)
    return decision.claim


def rank_of(contract: market.Contract) -> int:
    """In which order waiters are served: first-party use before any sale, then as sales rank."""
    if contract.is_first_party:
        return max(allocation.Rank) + 1
    claim = market.claim_of(contract, claim_id="", holder="", now=contract.started_at)
    return int(claim.rank)


Kinship = tuple[object, ...]
"""What those have in common that one refusal speaks for."""


class Ground(StrEnum):
    """On what ground a waiter was not served."""

    ROOM = "room"
    PRICE = "price"
    MONEY = "money"
    STANDING = "standing"


def ground_of(refusal: NoCapacity | PaymentRequired | Forbidden) -> Ground:
    if isinstance(refusal, tenancy.StandingForbids):
        return Ground.STANDING
    is_price = isinstance(refusal, NoCapacity) and refusal.details.get("reason") == "price"
    if is_price or isinstance(refusal, market.PriceAboveLimit):
        return Ground.PRICE
    return Ground.ROOM if isinstance(refusal, NoCapacity) else Ground.MONEY


def kinships(workload: Workload, contract: market.Contract) -> dict[Ground, Kinship]:
    """Of a waiter, by ground: who shares the kinship of one that was refused is refused as well.

    Credit, budgets and quotas differ by organisation, project and key, and by what is asked for:
    who cannot pay for eight devices may pay for one.
    """
    shape = (workload.pool_id, workload.rank, contract.devices, contract.count, contract.whole_node)
    release = (contract.notice_seconds, contract.firm_seconds, contract.stop_grace_seconds)
    payer = (workload.organisation_id, contract.project_id, contract.key_id)
    limit = (contract.factor_permille, contract.max_price_micros)
    found: dict[Ground, Kinship] = {
        Ground.ROOM: (*shape, *release, workload.spec.max_run_seconds),
        Ground.PRICE: (workload.pool_id, *limit),
        Ground.MONEY: (*payer, contract.offer_id, *shape, *release),
        Ground.STANDING: (workload.organisation_id,),
    }
    return {ground: (ground, *kinship) for ground, kinship in found.items()}


def begin(work: Work, workload: Workload, claim: Claim) -> Workload:
    """Admitted: from here it is provisioning, and its run is intended if devices are free."""
    admitted = life.move(
        work, workload, Step.ADMITTED, claim_id=claim.id, waiting_since=None, failure=None
    )
    if not sealed.is_in_the_way(work.tx, workload):
        life.intend(work, admitted)
    return admitted


def wait(work: Work, workload: Workload) -> Workload:
    """In the queue: no device, no claim, no hold."""
    life.drop_hold(work, workload)
    return life.move(work, workload, Step.WAITED, waiting_since=work.now)


def refusal(refused: Refused) -> NoCapacity:
    """Out of stock, with every way on that is known."""
    if refused.reason is allocation.RefusalReason.OUT_OF_SERVICE:
        way = "its devices are out of service now: send `wait` to be served when they are back"
    elif refused.earliest_at is not None:
        way = f"the earliest is {refused.earliest_at.isoformat(timespec='seconds')}"
    elif refused.offer_to_wait:
        way = "when there is room again is not known: send `wait` to be served then"
    else:
        way = "ask for a smaller shape"
    return NoCapacity(
        f"No capacity for this now ({refused.reason}): {way}.",
        reason=str(refused.reason),
        earliest_at=None if refused.earliest_at is None else refused.earliest_at.isoformat(),
        offer_to_wait=refused.offer_to_wait,
        smaller_count=refused.smaller_count,
    )


def place(work: Work, workload: Workload) -> bool:
    """Devices for a workload that was admitted before they were free. True: something changed."""
    if workload.party == "sale" and ledger.find_hold(work.tx, workload.id) is None:
        try:
            market.rehold(work, workload.contract_id)
        except (PaymentRequired, Forbidden) as refused:
            reason = Reason.BUDGET if isinstance(refused, Forbidden) else Reason.CREDIT_EXHAUSTED
            life.end_now(work, workload, reason)
            return True
    if sealed.is_in_the_way(work.tx, workload):
        return False
    return life.intend(work, workload) is not None


def serve(work: Work, workload: Workload) -> None:
    """A waiter's turn. Raises NoCapacity, PaymentRequired or Forbidden: it goes on waiting, and
    the Work is to be rolled back."""
    standing = tenancy.get_organisation(work.tx, workload.organisation_id).standing
    if standing in (tenancy.Standing.SUSPENDED, tenancy.Standing.CLOSING):
        raise tenancy.StandingForbids
    contract = market.get_contract(work.tx, workload.contract_id)
    if contract.max_price_micros is not None:
        price = market.terms_of(work.tx, contract, None).point_at(work.now).micros
        if price > contract.max_price_micros:
            raise NoCapacity(
                "The posted price is above the workload's limit: it waits for a lower one.",
                reason="price",
            )
    market.rehold(work, workload.contract_id)
    decision = admit(work, workload, contract, with_ways_on=False)
    if isinstance(decision, Refused):
        raise refusal(decision)
    begin(work, store.get_workload(work.tx, workload.id), decision)
