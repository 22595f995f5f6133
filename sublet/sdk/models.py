"""What may be called, how it is served, and how much of it may be used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from sublet.base.wire import rest
from sublet.sdk.transport import Transport

READ_SECONDS = 3600.0
"""How long a large file may take to be read through, before it is on the catalogue."""


class Catalogue:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Iterator[rest.CatalogueModel]:
        return self._transport.pages("/v1/catalogue", rest.CatalogueModel)

    def get(self, name: str) -> rest.CatalogueModel:
        return self._transport.get(f"/v1/catalogue/{name}", rest.CatalogueModel)

    def add(
        self, body: rest.ModelCreate, *, idempotency_key: str | None = None
    ) -> rest.CatalogueModel:
        """A file of the cloud's machine. It answers once the file was read through."""
        return self._transport.post(
            "/v1/catalogue",
            rest.CatalogueModel,
            body,
            idempotency_key=idempotency_key,
            timeout_seconds=READ_SECONDS,
        )

    def change(self, name: str, body: rest.ModelPatch, *, version: int) -> rest.CatalogueModel:
        path = f"/v1/catalogue/{name}"
        return self._transport.change("PATCH", path, rest.CatalogueModel, body, version)

    def prices(self, name: str) -> Iterator[rest.TokenPrice]:
        """Every version, oldest first."""
        return self._transport.pages(f"/v1/catalogue/{name}/prices", rest.TokenPrice)

    def set_price(
        self, name: str, body: rest.TokenPriceCreate, *, idempotency_key: str | None = None
    ) -> rest.TokenPrice:
        path = f"/v1/catalogue/{name}/prices"
        return self._transport.post(path, rest.TokenPrice, body, idempotency_key=idempotency_key)

    def grants(self, name: str) -> Iterator[rest.ModelGrant]:
        return self._transport.pages(f"/v1/catalogue/{name}/grants", rest.ModelGrant)

    def grant(self, name: str, organisation_id: str = rest.EVERYONE) -> rest.ModelGrant:
        """To one organisation, or to everyone. Twice is once."""
        path = f"/v1/catalogue/{name}/grants"
        body = rest.ModelGrantCreate(organisation_id=organisation_id)
        return self._transport.post(path, rest.ModelGrant, body)

    def revoke(self, name: str, organisation_id: str = rest.EVERYONE) -> None:
        """With the last grant the model's replicas end, too."""
        self._transport.delete(f"/v1/catalogue/{name}/grants/{organisation_id}")

    def weights(self, name: str) -> Iterator[bytes]:
        """The file, piece by piece; the model's `sha256` is its digest."""
        return self._transport.stream_bytes(f"/v1/catalogue/{name}/weights")


class Deployments:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self, body: rest.DeploymentCreate, *, idempotency_key: str | None = None
    ) -> rest.Deployment:
        return self._transport.post(
            "/v1/deployments", rest.Deployment, body, idempotency_key=idempotency_key
        )

    def list(self) -> Iterator[rest.Deployment]:
        return self._transport.pages("/v1/deployments", rest.Deployment)

    def get(self, deployment_id: str) -> rest.Deployment:
        return self._transport.get(f"/v1/deployments/{deployment_id}", rest.Deployment)

    def change(
        self, deployment_id: str, body: rest.DeploymentPatch, *, version: int
    ) -> rest.Deployment:
        path = f"/v1/deployments/{deployment_id}"
        return self._transport.change("PATCH", path, rest.Deployment, body, version)

    def retire(self, deployment_id: str) -> None:
        """Its replicas drain, and it is gone."""
        self._transport.delete(f"/v1/deployments/{deployment_id}")

    def replicas(self, deployment_id: str) -> Iterator[rest.Replica]:
        """All that it ever had, oldest first."""
        return self._transport.pages(f"/v1/deployments/{deployment_id}/replicas", rest.Replica)


class Gateways:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Iterator[rest.Gateway]:
        return self._transport.pages("/v1/gateways", rest.Gateway)


class TokenUsage:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(
        self,
        *,
        organisation_id: str | None = None,
        project_id: str | None = None,
        key_id: str | None = None,
    ) -> Iterator[rest.TokenUsage]:
        """Request by request, in the order of recording."""
        return self._transport.pages(
            "/v1/token-usage",
            rest.TokenUsage,
            organisation_id=organisation_id,
            project_id=project_id,
            key_id=key_id,
        )

    def last(
        self,
        count: int,
        *,
        organisation_id: str | None = None,
        project_id: str | None = None,
        key_id: str | None = None,
    ) -> Sequence[rest.TokenUsage]:
        """So many of the newest, in the order of recording. It costs no more pages than hold them."""
        newest = self._transport.pages(
            "/v1/token-usage",
            rest.TokenUsage,
            limit=min(count, rest.PAGE_LIMIT),
            order="newest",
            organisation_id=organisation_id,
            project_id=project_id,
            key_id=key_id,
        )
        return tuple(islice(newest, count))[::-1]


class Limits:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def get(self, scope_kind: str, scope_id: str) -> rest.ScopeLimits:
        """Those set on the scope itself."""
        return self._transport.get(f"/v1/limits/{scope_kind}/{scope_id}", rest.ScopeLimits)

    def set(self, scope_kind: str, scope_id: str, body: rest.LimitsPut) -> rest.ScopeLimits:
        """Replaces what was set there."""
        path = f"/v1/limits/{scope_kind}/{scope_id}"
        return self._transport.change("PUT", path, rest.ScopeLimits, body, None)
