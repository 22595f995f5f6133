"""What it came to: the owner's books of a window, every figure with its formula.

Owns     no rows: depreciation, power and the statement are computed from facts of others.
Always   depreciation of any windows that meet sums to cost − residual; power is rounded once; the
         same window read twice gives the same statement, but for what was posted late into it.
Callers  the API and the tour read `statement`.
"""

from sublet.money.economics.depreciation import Asset, book_value, booked, booked_to
from sublet.money.economics.power import Draw
from sublet.money.economics.service import asset_of, draw_of, statement
from sublet.money.economics.statement import Figure, PoolFacts, Posted, Statement, compose

__all__ = [
    "Asset",
    "Draw",
    "Figure",
    "PoolFacts",
    "Posted",
    "Statement",
    "asset_of",
    "book_value",
    "booked",
    "booked_to",
    "compose",
    "draw_of",
    "statement",
]
