"""The routes, one module a subject."""

from sublet.edge.api.routes import (
    budgets,
    capacity,
    deployments,
    market,
    models,
    money,
    people,
    recalls,
    signup,
    system,
    tokens,
    workloads,
)

ROUTERS = (
    signup.router,
    people.router,
    budgets.router,
    market.router,
    workloads.instances,
    workloads.jobs,
    models.router,
    deployments.router,
    tokens.router,
    capacity.router,
    recalls.router,
    money.router,
    system.router,
)
