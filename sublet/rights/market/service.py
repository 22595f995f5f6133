"""What others call: quote, accept, what a contract claims and costs, when it ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import Connection

from sublet.base.kernel.errors import Invalid
from sublet.base.kernel.interval import (
    floor_ms,
    months_between,
    period_end,
    period_start,
)
from sublet.base.kernel.money import Money
from sublet.base.kernel.price import DEVICE_HOUR_MS, PricePoint, Rated, Terms, Window, rate
from sublet.base.store import Work
from sublet.capacity import fleet
from sublet.capacity.allocation import Claim, Party, Rank, Release, Urgency, find_claim_of
from sublet.records import ledger, metering, tenancy
from sublet.rights.market import credit, prices, serving, store
from sublet.rights.market.model import (
    CURRENCY,
    BudgetExceeded,
    Contract,
    ContractEnded,
    ContractNotFound,
    ContractOver,
    ContractStarted,
    ContractState,
    DemandUnmet,
    FencesMissing,
    Offer,
    PriceAboveLimit,
    PriceVictim,
    Product,
    Quote,
    QuoteAccepted,
    QuoteExpired,
    QuoteNotFound,
    Unmet,
    hold_seconds,
    named,
    priced,
)
from sublet.rights.market.spotprice import HOUR, MAX_STOP_GRACE_SECONDS, hour_of

QUOTE_VALID = timedelta(minutes=5)
MAX_COUNT = 1000
MAX_DURATION_SECONDS = 366 * 86_400

RANKS = {
    Product.SPOT: Rank.SPOT,
    Product.ON_DEMAND: Rank.ON_DEMAND,
    # The owner's own claims stand outside the ranks of sales; the book reads their party.
    Product.FIRST_PARTY: Rank.SPOT,
}


def quote(
    work: Work,
    identity: tenancy.Identity,
    *,
    offer_id: str,
    count: int = 1,
    duration_seconds: int | None = None,
    notice_seconds: int | None = None,
    max_price: Money | None = None,
    stop_grace_seconds: int = 30,
    project_id: str | None = None,
) -> Quote:
    """State a price that stands for five minutes, with every term that goes with it.

    For the owner's own use it is the posted spot price, whatever the offer, and holds nothing.
    Raises OfferNotFound, Invalid (naming the field), FencesMissing, and what tenancy refuses.
    """
    project_id = project_id or identity.project_id
    tenancy.require(identity, tenancy.Action.RENT, project_id=project_id)
    if project_id is not None:
        project = tenancy.get_project(work.tx, project_id)
        if project.organisation_id != identity.organisation.id:
            raise tenancy.ProjectNotFound(param="project_id")
    offer = prices.get_offer(work.tx, offer_id, work.now)
    _check_numbers(count, duration_seconds, stop_grace_seconds)
    choice = offer.find_notice(notice_seconds or offer.default_notice_seconds)
    if choice is None:
        choices = named([n.seconds for n in offer.notices])
        raise Invalid(
            f"`notice_seconds` of {offer.id} is {choices}, not {notice_seconds}.",
            param="notice_seconds",
        )
    if not identity.is_owner:
        _check_fences(work.tx, offer)
    is_spot = offer.product is Product.SPOT or identity.is_owner
    if is_spot and not prices.is_posted(work.tx, offer.pool_id, work.now):
        # A first buyer may come before the first round of the loop.
        prices.post_spot_prices(work, work.now)
        offer = prices.get_offer(work.tx, offer_id, work.now)
    factor = 1000 if identity.is_owner else choice.factor_permille
    points, exact_until = _points(work, offer, factor, is_spot=is_spot)
    _check_max_price(max_price, points[0].micros, is_spot=is_spot)
    start = floor_ms(work.now)
    seconds = HOUR.seconds if duration_seconds is None else duration_seconds
    scrub = offer.scrub_seconds
    span = hold_seconds(choice.seconds, stop_grace_seconds, scrub)
    terms = Terms(product=offer.product, currency=CURRENCY, per=DEVICE_HOUR_MS, points=points)
    units = offer.devices * count
    total = rate(terms, [Window(start=start, end=start + timedelta(seconds=seconds), units=units)])
    product = Product.FIRST_PARTY if identity.is_owner else offer.product
    made = Quote(
        id=work.ids.new("quo"),
        organisation_id=identity.organisation.id,
        project_id=project_id,
        product=offer.product,
        offer_id=offer.id,
        pool_id=offer.pool_id,
        devices=offer.devices,
        count=count,
        whole_node=offer.whole_node,
        notice_seconds=0 if identity.is_owner else choice.seconds,
        factor_permille=factor,
        firm_seconds=0 if identity.is_owner else offer.firm_seconds,
        stop_grace_seconds=stop_grace_seconds,
        scrub_seconds=scrub,
        duration_seconds=duration_seconds,
        is_first_party=identity.is_owner,
        points=points,
        max_price_micros=None if max_price is None else max_price.micros,
        total_micros=total.amount.micros,
        lines=total.lines,
        exact_until=exact_until,
        hold_micros=0 if identity.is_owner else hold_for(terms, units, work.now, span).micros,
        hold_seconds=span,
        credit_rule=credit.SENTENCES[credit.RULES[product]],
        outbound=offer.outbound,
        missing_fences=offer.missing_fences,
        trusted_tenants=offer.trusted_tenants,
        created_at=work.now,
        expires_at=work.now + QUOTE_VALID,
        contract_id=None,
    )
    store.insert_quote(work.tx, made)
    return made


def _check_numbers(count: int, duration_seconds: int | None, stop_grace_seconds: int) -> None:
    given = {
        "count": (count, 1, MAX_COUNT),
        "duration_seconds": (duration_seconds, 1, MAX_DURATION_SECONDS),
        "stop_grace_seconds": (stop_grace_seconds, 0, MAX_STOP_GRACE_SECONDS),
    }
    for name, (value, low, high) in given.items():
        if value is not None and not low <= value <= high:
            raise Invalid(f"`{name}` is a whole number from {low} to {high}.", param=name)


def _check_fences(tx: Connection, offer: Offer) -> None:
    if offer.trusted_tenants or not offer.missing_fences:
        return
    nodes = fleet.list_nodes(tx, offer.pool_id)
    remedies = {
        str(node.fences[name].get("remedy", ""))
        for node in nodes
        for name in offer.missing_fences
        if name in node.fences
    }
    way = "; ".join(sorted(filter(None, remedies))) or "a package, root, or a delegated cgroup"
    raise FencesMissing(
        f"This pool does not fence strangers off from each other ({', '.join(offer.missing_fences)}"
        f" missing): the owner adds it ({way}) or serves trusted tenants only.",
        missing=list(offer.missing_fences),
    )


def _points(
    work: Work, offer: Offer, factor_permille: int, *, is_spot: bool
) -> tuple[tuple[PricePoint, ...], datetime | None]:
    """The price points of a quote, and until when they are certain (None: for good)."""
    if is_spot:
        points = prices.spot_points(work.tx, offer.pool_id, work.now, None, factor_permille)
        last = store.last_spot_price(work.tx, offer.pool_id)
        if last is not None:
            return points, last.hour + HOUR
    fixed = PricePoint(
        starts_at=floor_ms(work.now),
        micros=priced(offer.base_micros_per_device_hour, factor_permille),
        version=f"card {offer.card_version} {offer.id}",
    )
    return (fixed,), None


def _check_max_price(max_price: Money | None, price_micros: int, *, is_spot: bool) -> None:
    if max_price is None:
        return
    if not is_spot:
        raise Invalid(
            "`max_price` is for spot: an on-demand price does not change.", param="max_price"
        )
    if max_price.currency != CURRENCY or max_price.micros < price_micros:
        now = Money(price_micros, CURRENCY)
        raise Invalid(
            f"`max_price` is at least the present price of a device-hour, {now}.",
            param="max_price",
        )


def get_quote(
    tx: Connection,
    quote_id: str,
    identity: tenancy.Identity | None = None,
    *,
    lock: bool = False,
) -> Quote:
    """QuoteNotFound: there is none, or it is another's. `lock`: nobody else accepts it meanwhile."""
    found = store.find_quote(tx, quote_id, lock=lock)
    if found is None:
        raise QuoteNotFound(param="quote_id")
    if identity is not None:
        _require_mine(identity, tenancy.Action.READ, found)
    return found


def _require_mine(identity: tenancy.Identity, action: tenancy.Action, found: Quote) -> None:
    is_mine = found.organisation_id == identity.organisation.id
    if not is_mine or identity.project_id not in (None, found.project_id):
        raise QuoteNotFound(param="quote_id")
    tenancy.require(identity, action, found.organisation_id, found.project_id)


def accept(work: Work, identity: tenancy.Identity, quote: str | Quote, *, subject: str) -> Contract:
    """Make a quote a contract for one subject (a workload), and take its hold.

    `quote`: its id, or itself as this Work has read it with `lock`. The same subject again gets
    the same contract. Raises QuoteExpired, QuoteAccepted (another subject has it), BudgetExceeded,
    InsufficientCredit, QuotaExceeded; then nothing has changed.
    """
    found = get_quote(work.tx, quote, lock=True) if isinstance(quote, str) else quote
    _require_mine(identity, tenancy.Action.RENT, found)
    if found.contract_id is not None:
        contract = get_contract(work.tx, found.contract_id)
        if contract.subject == subject:
            return contract
    if work.now >= found.expires_at:
        raise QuoteExpired(param="quote_id", expired_at=found.expires_at.isoformat())
    if found.contract_id is not None:
        raise QuoteAccepted(param="quote_id")
    contract = _agreed(work, identity, found, subject)
    if contract.takes_hold:
        _require_devices(work.tx, identity, contract)
    contract = store.insert_contract(work.tx, contract)
    store.keep_acceptance(work.tx, found.id, contract.id)
    _hold(work, contract)
    work.emit(ContractStarted(contract.id, contract.organisation_id, subject))
    return contract


def _agreed(work: Work, identity: tenancy.Identity, found: Quote, subject: str) -> Contract:
    product = Product.FIRST_PARTY if found.is_first_party else found.product
    rule = credit.RULES[product]
    is_fixed = product is Product.ON_DEMAND
    return Contract(
        id=work.ids.new("con"),
        seq=0,
        organisation_id=found.organisation_id,
        project_id=found.project_id,
        key_id=identity.key.id,
        quote_id=found.id,
        subject=subject,
        product=product,
        offer_id=found.offer_id,
        pool_id=found.pool_id,
        devices=found.devices,
        count=found.count,
        whole_node=found.whole_node,
        notice_seconds=found.notice_seconds,
        factor_permille=found.factor_permille,
        firm_seconds=found.firm_seconds,
        stop_grace_seconds=found.stop_grace_seconds,
        scrub_seconds=found.scrub_seconds,
        rule=rule,
        younger_than_seconds=credit.YOUNG_RUN_SECONDS if product is Product.SPOT else 0,
        price_micros=found.terms.point_at(work.now).micros,
        points=found.points if is_fixed or found.exact_until is None else (),
        max_price_micros=found.max_price_micros,
        state=ContractState.ACTIVE,
        started_at=work.now,
        ended_at=None,
    )


def _require_devices(tx: Connection, identity: tenancy.Identity, contract: Contract) -> None:
    """Devices held are those of contracts with an open hold, or a claim whose start lies ahead of
    the hold's end: a stopped instance has neither."""
    if identity.max_devices is None:
        return
    organisation_id = contract.organisation_id
    on_hold = {hold.subject for hold in ledger.list_holds(tx, organisation_id)}
    active = list_active_contracts(tx, organisation_id)
    tenancy.require_devices(
        identity,
        is_spot=contract.product is Product.SPOT,
        held=sum(
            c.units
            for c in active
            if c.subject != contract.subject
            and (c.subject in on_hold or find_claim_of(tx, c.subject) is not None)
        ),
        asked=contract.units,
    )


def rehold(work: Work, contract_id: str, identity: tenancy.Identity | None = None) -> None:
    """Take the hold again for a new run under the same contract: a requeue, or a start.

    Without an identity its limits are those of the contract's key and organisation. A hold that is
    open already is left as it is. Raises ContractOver, PriceAboveLimit, BudgetExceeded, InsufficientCredit, QuotaExceeded.
    """
    contract = get_contract(work.tx, contract_id)
    if contract.state is not ContractState.ACTIVE:
        raise ContractOver(contract_id=contract_id)
    if not contract.takes_hold or ledger.find_hold(work.tx, contract.subject) is not None:
        return
    _require_devices(work.tx, identity or _identity_of(work.tx, contract), contract)
    _check_limit(work, contract)
    _hold(work, contract)


def _identity_of(tx: Connection, contract: Contract) -> tenancy.Identity:
    """Who agreed to it, as they stand now."""
    assert contract.key_id is not None, "a contract was agreed with a key"
    key = tenancy.get_key(tx, contract.key_id)
    return tenancy.Identity(
        organisation=tenancy.get_organisation(tx, contract.organisation_id),
        principal=tenancy.get_principal(tx, key.principal_id),
        key=key,
    )


def _check_limit(work: Work, contract: Contract) -> None:
    """A new run does not begin at a posted price above the contract's limit."""
    limit = contract.max_price_micros
    if limit is None:
        return
    row = store.spot_price_at(work.tx, contract.pool_id, work.now)
    assert row is not None, "a limit was set against a posted price"
    micros = priced(row.micros, contract.factor_permille)
    if micros > limit:
        raise PriceAboveLimit(
            f"The posted price of a device-hour is {Money(micros, contract.currency)}, above the "
            f"limit of {Money(limit, contract.currency)}: wait, or quote anew with a higher one.",
            price_micros=micros,
            limit_micros=limit,
        )


def _hold(work: Work, contract: Contract) -> None:
    if not contract.takes_hold:
        return
    terms = terms_of(work.tx, contract, None)
    amount = hold_for(terms, contract.units, work.now, contract.hold_seconds)
    check_budgets(work, contract, amount)
    ledger.hold(
        work,
        organisation_id=contract.organisation_id,
        account=ledger.customer_account(contract.organisation_id),
        amount=amount,
        subject=contract.subject,
        project_id=contract.project_id,
        key_id=contract.key_id,
        expires_at=work.now + timedelta(seconds=contract.hold_seconds),
    )


def check_budgets(
    work: Work, contract: Contract, amount: Money, *, without_hold: str | None = None
) -> None:
    """Pass if each budget on organisation, project and key has room for `amount` now.

    `without_hold` leaves out a hold that `amount` replaces. Raises BudgetExceeded, which names the
    window and when it ends (`resets_at`).
    """
    budgets = tenancy.list_budgets(
        work.tx,
        organisation_id=contract.organisation_id,
        project_id=contract.project_id,
        key_id=contract.key_id,
    )
    for budget in budgets:
        start = period_start(work.now, budget.period)
        end = period_end(work.now, budget.period)
        kind = budget.scope_kind
        spent = ledger.spent(
            work.tx,
            organisation_id=budget.scope_id if kind == tenancy.ScopeKind.ORGANISATION else None,
            project_id=budget.scope_id if kind == tenancy.ScopeKind.PROJECT else None,
            key_id=budget.scope_id if kind == tenancy.ScopeKind.KEY else None,
            start=start,
            end=end,
            without_hold=without_hold,
        )
        if spent.micros + amount.micros > budget.limit_micros:
            resets = "never" if end is None else end.isoformat()
            raise BudgetExceeded(
                f"The {budget.period} budget of this {kind.value} is "
                f"{Money(budget.limit_micros, CURRENCY)}; {spent} is spent or held and this needs "
                f"{amount}: it resets {resets}.",
                scope=kind.value,
                period=budget.period,
                limit_micros=budget.limit_micros,
                spent_micros=spent.micros,
                needed_micros=amount.micros,
                resets_at=None if end is None else end.isoformat(),
            )


def hold_for(terms: Terms, units: int, start: datetime, seconds: int) -> Money:
    """What `seconds` of use cost at most: the dearest price in force meanwhile, rounded up.

    Each cut of a line (price change, month's end) may round up by itself: one micro for each.
    """
    end = start + timedelta(seconds=seconds)
    inside = [p for p in terms.points if start < p.starts_at < end]
    dearest = max(p.micros for p in (terms.point_at(start), *inside))
    cuts = len(inside) + len(list(months_between(start, end)))
    return Money(-(-dearest * units * seconds // HOUR.seconds) + cuts, terms.currency)


def cover(work: Work, contract_id: str, until: datetime) -> bool:
    """Extend the contract's hold so that its run is paid for up to `until`; False: no credit.

    What was used and not yet posted is in it. A hold never shrinks here, nor ends earlier.
    First-party use and serving need none. It passes over budgets: a promise once given is kept.
    """
    contract = get_contract(work.tx, contract_id)
    if not contract.takes_hold:
        return True
    meters = [m for m in metering.list_meters(work.tx, contract_id=contract_id) if m.is_open]
    start = min((m.metered_to for m in meters), default=work.now)
    settled = ledger.posted(work.tx, contract_id, "usage") + ledger.lost(work.tx, contract_id)
    unposted = rate_so_far(work.tx, contract).amount - settled
    seconds = max(-((start - until) // timedelta(seconds=1)), 0)
    ahead = hold_for(terms_of(work.tx, contract, None), contract.units, start, seconds)
    # One micro: the line that is open may have been rounded down so far.
    needed = Money(ahead.micros + max(unposted.micros, 0) + 1, contract.currency)
    known = ledger.find_hold(work.tx, contract.subject)
    try:
        if known is not None:
            ledger.resize_hold(
                work,
                known.id,
                amount=max(known.amount, needed),
                expires_at=max(known.expires_at, until),
            )
        else:
            ledger.hold(
                work,
                organisation_id=contract.organisation_id,
                account=ledger.customer_account(contract.organisation_id),
                amount=needed,
                subject=contract.subject,
                project_id=contract.project_id,
                key_id=contract.key_id,
                expires_at=until,
            )
    except ledger.InsufficientCredit:
        return False
    return True


def claim_of(contract: Contract, *, claim_id: str, holder: str, now: datetime) -> Claim:
    """What the contract claims in the book of capacity, from `now` on."""
    return Claim(
        id=claim_id,
        holder=holder,
        organisation_id=contract.organisation_id,
        pool_id=contract.pool_id,
        party=Party.FIRST_PARTY if contract.is_first_party else Party.SALE,
        urgency=Urgency.URGENT if contract.is_first_party else None,
        rank=serving.rank_of(contract) if contract.is_serving else RANKS[contract.product],
        devices=contract.devices,
        count=contract.count,
        whole_node=contract.whole_node,
        starts_at=now,
        release=Release(
            notice_seconds=contract.notice_seconds,
            firm_seconds=contract.firm_seconds,
            stop_seconds=contract.stop_grace_seconds + contract.scrub_seconds,
            displacement=contract.displacement,
        ),
        value_micros_per_device_hour=contract.price_micros,
    )


def terms_of(tx: Connection, contract: Contract, until: datetime | None) -> Terms:
    """The contract's price as a step function: fixed, or what is posted for hours before `until`.

    `until` None is all that is posted. Points of the past are the same in every later answer.
    """
    points = contract.points or prices.spot_points(
        tx,
        contract.pool_id,
        contract.started_at,
        until,
        contract.factor_permille,
        contract.max_price_micros,
    )
    return Terms(
        product=contract.product, currency=contract.currency, per=DEVICE_HOUR_MS, points=points
    )


def rate_so_far(tx: Connection, contract: Contract) -> Rated:
    """All that was metered under the contract, priced."""
    windows = metering.windows(tx, contract.id, "held")
    return rate(terms_of(tx, contract, None), windows)


def get_contract(tx: Connection, contract_id: str) -> Contract:
    found = store.find_contract(tx, contract_id)
    if found is None:
        raise ContractNotFound(contract_id=contract_id)
    return found


def get_contracts(tx: Connection, ids: Collection[str]) -> dict[str, Contract]:
    """Those of these that there are, by id."""
    found = store.list_contracts(tx, store.contracts.c.id.in_(sorted(set(ids))))
    return {contract.id: contract for contract in found}


def find_contract_of(tx: Connection, subject: str) -> Contract | None:
    """The latest contract of a subject."""
    return store.find_contract_of(tx, subject)


def list_active_contracts(tx: Connection, organisation_id: str | None = None) -> list[Contract]:
    """Contracts in force, oldest first; None: of all organisations."""
    where = [store.contracts.c.state == ContractState.ACTIVE]
    if organisation_id is not None:
        where.append(store.contracts.c.organisation_id == organisation_id)
    return store.list_contracts(tx, *where)


def list_contracts(
    tx: Connection, organisation_id: str, after: int | None, limit: int
) -> list[Contract]:
    """An organisation's contracts, ended ones too, in order of `seq`."""
    mine = store.contracts.c.organisation_id == organisation_id
    return store.list_contracts(tx, mine, after=after, limit=limit)


def end_contract(work: Work, contract_id: str) -> Contract:
    """Nothing more will run under it: its hold goes free. What was metered is still settled.

    Ending twice is ending once.
    """
    contract = store.find_contract(work.tx, contract_id, lock=True)
    if contract is None:
        raise ContractNotFound(contract_id=contract_id)
    if contract.state is ContractState.ENDED:
        return contract
    release_hold(work, contract)
    store.end_contract(work.tx, contract_id, work.now)
    work.emit(ContractEnded(contract.id, contract.organisation_id, contract.subject))
    return dataclasses.replace(contract, state=ContractState.ENDED, ended_at=work.now)


def release_hold(work: Work, contract: Contract) -> None:
    """Free what the contract's subject holds; nothing held: no effect."""
    known = ledger.find_hold(work.tx, contract.subject)
    if known is not None:
        ledger.release_hold(work, known.id)


def price_victims(tx: Connection, now: datetime) -> list[PriceVictim]:
    """Contracts whose `max_price` a posted hour passes, each with its first such hour from now.

    Prices are posted early enough that `notice_by` lies ahead when a victim first shows here; one
    in the past (the cloud was down) means at once, with full notice: nothing above the limit is
    billed meanwhile.
    """
    spot = (
        store.contracts.c.state == ContractState.ACTIVE
    ) & store.contracts.c.max_price_micros.is_not(None)
    victims = []
    for contract in store.list_contracts(tx, spot):
        assert contract.max_price_micros is not None
        for row in store.list_spot_prices(tx, contract.pool_id, hour_of(now), None):
            micros = priced(row.micros, contract.factor_permille)
            if micros > contract.max_price_micros:
                term_at = row.hour - timedelta(seconds=contract.stop_grace_seconds)
                victims.append(
                    PriceVictim(
                        contract=contract,
                        hour=row.hour,
                        price_micros=micros,
                        notice_by=term_at - timedelta(seconds=contract.notice_seconds),
                        term_at=term_at,
                    )
                )
                break
    return victims


def note_unmet(
    work: Work,
    *,
    organisation_id: str,
    reason: str,
    offer_id: str | None = None,
    pool_id: str | None = None,
    devices: int,
    count: int = 1,
    starts_at: datetime | None = None,
    duration_seconds: int | None = None,
    price_micros: int | None = None,
) -> None:
    """Keep a refusal as unmet demand. Call it in a Work of its own: the refused one rolls back."""
    store.insert_unmet(
        work.tx,
        organisation_id=organisation_id,
        pool_id=pool_id,
        offer_id=offer_id,
        devices=devices,
        count=count,
        starts_at=starts_at or work.now,
        duration_seconds=duration_seconds,
        price_micros=price_micros,
        reason=reason,
        at=work.now,
    )
    work.emit(DemandUnmet(organisation_id=organisation_id, pool_id=pool_id, reason=reason))


def was_unmet(tx: Connection, pool_id: str, reason: str, *, since: datetime) -> bool:
    """Somebody was refused there for that reason since then."""
    return store.was_unmet(tx, pool_id, reason, since)


def list_unmet(tx: Connection, after: int | None, limit: int) -> list[Unmet]:
    """Unmet demand in the order it came."""
    return store.list_unmet(tx, after, limit)
