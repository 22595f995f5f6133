"""Who has an account with us, and the credit that is put on it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection

from sublet.base.kernel.errors import Invalid
from sublet.base.kernel.money import Money
from sublet.base.store import Work
from sublet.money.billing import store
from sublet.money.billing.model import (
    Account,
    AlreadySignedUp,
    CreditAdded,
    CustomerCame,
    ReferenceReused,
)
from sublet.records import ledger, tenancy
from sublet.records.tenancy import Key, Organisation, Principal, Project, Standing
from sublet.rights import market

TRIAL_HOURS = 2
DEFAULT_PROJECT = "default"
REFERENCE_LENGTH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedUp:
    """All that a newcomer gets. `secret` is the key's, shown this once."""

    organisation: Organisation
    project: Project
    principal: Principal
    key: Key
    secret: str
    trial: Money


def open_owner(work: Work, *, name: str, email: str | None = None) -> SignedUp | None:
    """The owner's organisation, on the first start of an installation; None: there is one."""
    if tenancy.find_owner(work.tx) is not None:
        return None
    organisation = tenancy.create_organisation(
        work, name=name, kind=tenancy.OrganisationKind.OWNER, standing=Standing.GOOD
    )
    return _furnish(work, organisation, email)


def sign_up(
    work: Work, *, email: str, organisation_name: str, trial: Money | None = None
) -> SignedUp:
    """A consumer's organisation with all it needs to begin, and its trial credit.

    `trial` None: two hours of the dearest one-device on-demand offer.
    Without trial credit the standing stays `unverified`. Raises AlreadySignedUp, Invalid.
    """
    address = tenancy.valid_email(email)
    if store.find_account_by_email(work.tx, address) is not None:
        raise AlreadySignedUp(param="email")
    organisation = tenancy.create_organisation(
        work,
        name=organisation_name,
        kind=tenancy.OrganisationKind.CONSUMER,
        standing=Standing.UNVERIFIED,
    )
    made = _furnish(work, organisation, address)
    credit = default_trial(work.tx, work.now) if trial is None else trial
    if credit.micros > 0:
        grant(work, organisation.id, credit, reference="trial", note="trial credit")
    work.emit(CustomerCame(organisation_id=organisation.id, trial_micros=credit.micros))
    return SignedUp(
        organisation=tenancy.get_organisation(work.tx, organisation.id),
        project=made.project,
        principal=made.principal,
        key=made.key,
        secret=made.secret,
        trial=credit,
    )


def _furnish(work: Work, organisation: Organisation, email: str | None) -> SignedUp:
    """Default project, admin user, key, account."""
    project = tenancy.create_project(work, organisation.id, DEFAULT_PROJECT)
    principal = tenancy.create_principal(
        work,
        organisation.id,
        kind=tenancy.PrincipalKind.USER,
        name="admin",
        email=email,
        role=tenancy.Role.ADMIN,
    )
    key, secret = tenancy.create_key(work, principal.id, name="first")
    store.insert_account(
        work.tx,
        Account(
            organisation_id=organisation.id,
            email=principal.email,
            currency=organisation.currency,
            opened_at=work.now,
        ),
    )
    return SignedUp(
        organisation=organisation,
        project=project,
        principal=principal,
        key=key,
        secret=secret,
        trial=Money(0, organisation.currency),
    )


def default_trial(tx: Connection, now: datetime) -> Money:
    """Two on-demand hours of the dearest one-device offer, so that one hold always fits.

    Zero where nothing of the kind is on the rate card.
    """
    hour = market.dearest_one_device_hour(tx, now)
    return Money(TRIAL_HOURS * hour.micros, hour.currency)


def grant(
    work: Work, organisation_id: str, amount: Money, *, reference: str, note: str = ""
) -> ledger.Transfer:
    """Give credit for nothing, once a reference. It makes an unverified organisation good.

    Raises ReferenceReused where the reference stands for another amount.
    """
    return _credit(work, organisation_id, amount, ledger.TRIAL, "grant", reference, note)


def record_payment(
    work: Work, organisation_id: str, amount: Money, *, reference: str, note: str = ""
) -> ledger.Transfer:
    """Record money that came in from outside, once a reference: the same again changes nothing.

    Raises ReferenceReused where the reference stands for another amount.
    """
    return _credit(work, organisation_id, amount, ledger.PAYMENTS, "payment", reference, note)


def _credit(
    work: Work,
    organisation_id: str,
    amount: Money,
    source: str,
    kind: str,
    reference: str,
    note: str,
) -> ledger.Transfer:
    organisation = tenancy.get_organisation(work.tx, organisation_id)
    if amount.micros <= 0:
        raise Invalid("An amount of credit is above zero.", param="amount_micros")
    if amount.currency != organisation.currency:
        raise Invalid(f"This account is kept in {organisation.currency}.", param="currency")
    if not 0 < len(reference) <= REFERENCE_LENGTH:
        raise Invalid("A reference has 1 to 100 characters.", param="reference")
    account = ledger.customer_account(organisation_id)
    before = ledger.balance(work.tx, account)
    try:
        made = ledger.post(
            work,
            key=f"{kind}:{organisation_id}:{reference}",
            debit=source,
            credit=account,
            amount=amount,
            kind=kind,
            organisation_id=organisation_id,
            detail={"reference": reference, "note": note},
        )
    except ledger.TransferKeyReused as error:
        raise ReferenceReused(param="reference") from error
    if ledger.balance(work.tx, account) != before:
        store.look_again(work.tx, organisation_id, work.now)
        work.emit(
            CreditAdded(
                organisation_id=organisation_id, amount_micros=amount.micros, reference=reference
            )
        )
    if organisation.standing is Standing.UNVERIFIED:
        tenancy.set_standing(work, organisation_id, Standing.GOOD, f"{kind} {reference}")
    return made
