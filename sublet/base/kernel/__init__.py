"""Values without a home of their own: time, ids, money, intervals, price, errors.

Owns     the only readers of the wall clock, the boot clock and of chance.
Always   an instant is aware and UTC; an amount is integer micros of one currency; a duration is
         a difference on the boot clock; `price.rate` is the only function that turns usage into money.
Callers  everybody; it imports nothing of Sublet.
"""
