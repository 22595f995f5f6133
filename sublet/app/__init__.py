"""The installation: settings, wiring, processes, and the runner of loops.

Owns     the data folder's layout, the lock on it, the processes of `sublet up`, migrations.
Always   one `up` per data folder; a child never outlives its parent; what a stop leaves running
         is said, with its deadline; nothing here decides about capacity or money.
Callers  the command line; the rehearsal wires the same loops on a virtual clock.
"""
