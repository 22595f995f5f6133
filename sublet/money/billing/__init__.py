"""Billing: accounts and their credit, what runs kept paid for, warnings, invoices.

Owns     billing accounts, invoices and their lines, warnings, when to look at a run again.
Always   a prepaid balance is never negative: what may still be posted for a run is held before it
         runs; a workload whose money ends is warned and stopped while its hold covers its grace;
         an invoice's lines sum to the ledger's change, and an issued invoice never changes.
Callers  the API signs up, grants, records payments and reads invoices; the loop runner steps.
"""

from sublet.money.billing.accounts import (
    SignedUp,
    default_trial,
    grant,
    open_owner,
    record_payment,
    sign_up,
)
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
    Warning,
)
from sublet.money.billing.store import list_warnings

__all__ = [
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
    "Warning",
    "default_trial",
    "get_invoice",
    "grant",
    "invoice_of",
    "invoice_so_far",
    "issue",
    "issue_due",
    "list_invoices",
    "list_warnings",
    "open_owner",
    "record_payment",
    "runway",
    "sign_up",
    "step",
]
