"""Money that moved: a double-entry ledger with holds. It only appends.

Owns     accounts with their running balance, transfers, holds.
Always   what is debited is credited, so all balances sum to zero; an account's kept balance is the
         sum of its transfers (`recount`); a customer's balance is never negative, and right after
         a hold neither is its balance less all open holds; a transfer's key posts once.
Callers  market holds and settles, billing grants, renews and invoices, economics reads; the names
         of organisations, projects, keys, contracts and workloads mean nothing here.
"""

from sublet.records.ledger.model import (
    CREDITS,
    LOSSES,
    PAYMENTS,
    TRIAL,
    Drift,
    Hold,
    HoldExists,
    HoldNotFound,
    HoldReleased,
    HoldState,
    InsufficientCredit,
    Transfer,
    TransferKeyReused,
    customer_account,
    first_party_account,
    revenue_account,
)
from sublet.records.ledger.service import (
    available,
    balance,
    changes,
    find_hold,
    hold,
    lapse,
    list_holds,
    list_own_transfers,
    list_transfers,
    lost,
    post,
    posted,
    recount,
    release_hold,
    resize_hold,
    spent,
    trial_balance,
)

__all__ = [
    "CREDITS",
    "LOSSES",
    "PAYMENTS",
    "TRIAL",
    "Drift",
    "Hold",
    "HoldExists",
    "HoldNotFound",
    "HoldReleased",
    "HoldState",
    "InsufficientCredit",
    "Transfer",
    "TransferKeyReused",
    "available",
    "balance",
    "changes",
    "customer_account",
    "find_hold",
    "first_party_account",
    "hold",
    "lapse",
    "list_holds",
    "list_own_transfers",
    "list_transfers",
    "lost",
    "post",
    "posted",
    "recount",
    "release_hold",
    "resize_hold",
    "revenue_account",
    "spent",
    "trial_balance",
]
