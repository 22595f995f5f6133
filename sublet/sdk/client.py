"""The client: everything that the REST edge can do, typed."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import TracebackType

import httpx2

from sublet.base.kernel.ids import Ids
from sublet.base.wire import rest
from sublet.sdk.capacity import Devices, Nodes, Pools, Recalls, Sites
from sublet.sdk.market import CostFacts, Offers, Quotes, RateCards
from sublet.sdk.models import Catalogue, Deployments, Gateways, Limits, TokenUsage
from sublet.sdk.money import Money
from sublet.sdk.people import Audit, Budgets, Keys, Organisations, Principals, Projects
from sublet.sdk.transport import Transport
from sublet.sdk.workloads import Instances, Jobs


class Client:
    """`Client(url, key)`. Without a key only `sign_up` and `health` answer.

    Raises ApiError where Sublet refuses, Unreachable where no answer came.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        http: httpx2.Client | None = None,
        ids: Ids | None = None,
        sleep: Callable[[float], None] = time.sleep,
        timeout_seconds: float = 30.0,
    ) -> None:
        transport = Transport(
            url, key, http=http, ids=ids, sleep=sleep, timeout_seconds=timeout_seconds
        )
        self._transport = transport
        self.organisations = Organisations(transport)
        self.projects = Projects(transport)
        self.principals = Principals(transport)
        self.keys = Keys(transport)
        self.budgets = Budgets(transport)
        self.audit = Audit(transport)
        self.offers = Offers(transport)
        self.rate_card = RateCards(transport)
        self.cost_facts = CostFacts(transport)
        self.quotes = Quotes(transport)
        self.instances = Instances(transport, "/v1/instances")
        self.jobs = Jobs(transport, "/v1/jobs")
        self.sites = Sites(transport)
        self.pools = Pools(transport)
        self.nodes = Nodes(transport)
        self.devices = Devices(transport)
        self.recalls = Recalls(transport)
        self.catalogue = Catalogue(transport)
        self.deployments = Deployments(transport)
        self.gateways = Gateways(transport)
        self.token_usage = TokenUsage(transport)
        self.limits = Limits(transport)
        self.money = Money(transport)

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def sign_up(
        self, body: rest.SignUpCreate, *, idempotency_key: str | None = None
    ) -> rest.SignUp:
        """A new organisation with its first user, key and trial credit. Needs no key."""
        return self._transport.post(
            "/v1/signup", rest.SignUp, body, idempotency_key=idempotency_key
        )

    def me(self) -> rest.Me:
        return self._transport.get("/v1/me", rest.Me)

    def status(self) -> rest.Status:
        """What runs and what it costs now; for the owner the whole cloud."""
        return self._transport.get("/v1/status", rest.Status)

    def audit_books(self) -> rest.AuditBooks:
        """Run the auditor on live state; for the owner."""
        return self._transport.get("/v1/audit-books", rest.AuditBooks)

    def health(self) -> rest.Health:
        return self._transport.get("/healthz", rest.Health)

    def metrics(self) -> str:
        """For Prometheus."""
        return self._transport.text("/metrics")
