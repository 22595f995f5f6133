"""The owner's right: first-party use, recalls, and what could not be met.

Owns     recalls, their rows, shortfalls.
Always   a plan is shown before anything happens and frees what it says by its own times; nobody
         gets notice for a part that cannot be delivered; a need that is not met has a Shortfall;
         what a recall frees is the owner's until it is given back.
Callers  the API plans, accepts, cancels and returns; compute draws first-party claims; the loop
         runner steps the schedule.
"""

from sublet.rights.owner.loops import step
from sublet.rights.owner.model import (
    PlanStale,
    Recall,
    RecallChanged,
    RecallRow,
    RecallState,
    RowState,
    Shortfall,
    Victim,
)
from sublet.rights.owner.service import (
    accept_recall,
    cancel_recall,
    first_party_claim,
    get_recall,
    list_recalls,
    list_shortfalls,
    plan_again,
    plan_recall,
    return_recall,
)

__all__ = [
    "PlanStale",
    "Recall",
    "RecallChanged",
    "RecallRow",
    "RecallState",
    "RowState",
    "Shortfall",
    "Victim",
    "accept_recall",
    "cancel_recall",
    "first_party_claim",
    "get_recall",
    "list_recalls",
    "list_shortfalls",
    "plan_again",
    "plan_recall",
    "return_recall",
    "step",
]
