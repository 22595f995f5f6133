"""Devices for model servers: a contract without a price, for it is tokens that are sold.

Up to a deployment's minimum a replica stands as firm as what is sold on demand; above it, it is
filler: every sale and the owner may have its devices back after its drain.
"""

from __future__ import annotations

from sublet.base.kernel.errors import Invalid
from sublet.base.kernel.interval import floor_ms
from sublet.base.kernel.price import PricePoint
from sublet.base.store import Work
from sublet.capacity import fleet
from sublet.capacity.allocation import Rank
from sublet.rights.market import credit, store
from sublet.rights.market.model import (
    Contract,
    ContractStarted,
    ContractState,
    Product,
)

FILLER, MINIMUM = "serving-filler", "serving-minimum"
MAX_DRAIN_SECONDS = 60
MINIMUM_NOTICE_SECONDS = 3600
"""As what is sold on demand has by default."""
STOP_GRACE_SECONDS = 5
"""A model server that is drained has nothing left to do, and one that is not is ended all the
same: it loses what it had in hand."""


def serve(
    work: Work,
    *,
    organisation_id: str,
    subject: str,
    pool_id: str,
    devices: int,
    is_filler: bool,
    drain_seconds: int,
    value_micros: int,
    whole_node: bool = False,
) -> Contract:
    """Agree on devices for a replica: no price, no hold, no budget; nothing of it becomes money.

    `value_micros`: what a device-hour of it is taken to earn, by which a recall chooses. A filler
    has its drain as notice, at most 60 s. Raises Invalid, PoolNotFound.
    """
    if not 0 <= drain_seconds <= MAX_DRAIN_SECONDS:
        raise Invalid(
            f"`drain_seconds` is a whole number from 0 to {MAX_DRAIN_SECONDS}.",
            param="drain_seconds",
        )
    pool = fleet.get_pool(work.tx, pool_id)
    contract_id = work.ids.new("con")
    free = PricePoint(starts_at=floor_ms(work.now), micros=0, version=str(Product.SERVING))
    contract = store.insert_contract(
        work.tx,
        Contract(
            id=contract_id,
            seq=0,
            organisation_id=organisation_id,
            project_id=None,
            key_id=None,
            quote_id=contract_id,
            subject=subject,
            product=Product.SERVING,
            offer_id=FILLER if is_filler else MINIMUM,
            pool_id=pool_id,
            devices=devices,
            count=1,
            whole_node=whole_node,
            notice_seconds=drain_seconds if is_filler else MINIMUM_NOTICE_SECONDS,
            factor_permille=1000,
            firm_seconds=0,
            stop_grace_seconds=STOP_GRACE_SECONDS,
            scrub_seconds=pool.scrub_seconds,
            rule=credit.RULES[Product.SERVING],
            younger_than_seconds=0,
            price_micros=value_micros,
            points=(free,),
            max_price_micros=None,
            state=ContractState.ACTIVE,
            started_at=work.now,
            ended_at=None,
        ),
    )
    work.emit(ContractStarted(contract.id, organisation_id, subject))
    return contract


def rank_of(contract: Contract) -> Rank:
    """Among sales."""
    return Rank.FILLER if contract.offer_id == FILLER else Rank.ON_DEMAND
