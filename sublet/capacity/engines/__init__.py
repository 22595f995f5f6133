"""Adapters to metal: what starts, watches and ends runs on devices.

Owns     nothing of the domain: no claim, contract or price; only runs on devices and their evidence.
Always   a run id is started at most once; a published SIGTERM never moves earlier; *gone* is what
         was checked to be gone, everything else that gives no sign is *silent*.
Callers  fleet and compute, through `port`; only `app` names an adapter (`local`, `simulated`).
"""
