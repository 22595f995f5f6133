"""The routes, one module a subject."""

from sublet.edge.api.routes import (
    budgets,
    capacity,
    market,
    money,
    people,
    recalls,
    signup,
    system,
    workloads,
)

ROUTERS = (
    signup.router,
    people.router,
    budgets.router,
    market.router,
    workloads.instances,
    workloads.jobs,
    capacity.router,
    recalls.router,
    money.router,
    system.router,
)
