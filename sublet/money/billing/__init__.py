"""Billing: accounts and their credit, what runs kept paid for, tokens, warnings, invoices.

Owns     billing accounts, invoices and their lines, warnings, when to look at a run again; lines of
         tokens, the allowances of gateways.
Always   a prepaid balance is never negative: what may still be posted for a run is held before it
         runs; a workload whose money ends is warned and stopped while its hold covers its grace;
         an invoice's lines sum to the ledger's change, and an issued invoice never changes; what is
         posted and lost for a line of tokens is `rate(all its tokens)`, and no more is posted than
         gateways spent; behind what a gateway may still spend is a hold.
Callers  the API signs up, grants, records payments and reads invoices; the loop runner steps; the
         link ingests spools, grants allowances and closes the lives of gateways.
"""

from sublet.money.billing.accounts import (
    SignedUp,
    default_trial,
    grant,
    open_owner,
    record_payment,
    sign_up,
)
from sublet.money.billing.allowances import grant_allowance
from sublet.money.billing.invoices import (
    get_invoice,
    invoice_of,
    invoice_so_far,
    issue,
    issue_due,
    list_invoices,
)
from sublet.money.billing.keeping import runway
from sublet.money.billing.loops import step
from sublet.money.billing.model import (
    AlreadySignedUp,
    Cause,
    Charge,
    ChargeClass,
    CreditAdded,
    CustomerCame,
    Invoice,
    InvoiceIssued,
    InvoiceLine,
    InvoiceNotFound,
    MonthNotClosed,
    ReferenceReused,
    Runway,
    RunwayWarned,
    TokenGapFound,
    Warning,
)
from sublet.money.billing.store import list_warnings
from sublet.money.billing.token_lines import TOKEN_LOSS, TOKEN_USAGE, TokenLine
from sublet.money.billing.tokens import (
    close_epoch,
    ingest_usage,
    list_token_lines,
    post_correction,
    reconcile_tokens,
)

__all__ = [
    "TOKEN_LOSS",
    "TOKEN_USAGE",
    "AlreadySignedUp",
    "Cause",
    "Charge",
    "ChargeClass",
    "CreditAdded",
    "CustomerCame",
    "Invoice",
    "InvoiceIssued",
    "InvoiceLine",
    "InvoiceNotFound",
    "MonthNotClosed",
    "ReferenceReused",
    "Runway",
    "RunwayWarned",
    "SignedUp",
    "TokenGapFound",
    "TokenLine",
    "Warning",
    "close_epoch",
    "default_trial",
    "get_invoice",
    "grant",
    "grant_allowance",
    "ingest_usage",
    "invoice_of",
    "invoice_so_far",
    "issue",
    "issue_due",
    "list_invoices",
    "list_token_lines",
    "list_warnings",
    "open_owner",
    "post_correction",
    "reconcile_tokens",
    "record_payment",
    "runway",
    "sign_up",
    "step",
]
