"""Who: organisations, projects, principals, keys, budgets, the audit trail."""

from __future__ import annotations

from collections.abc import Iterator

from sublet.base.wire import rest
from sublet.sdk.transport import Transport


class Organisations:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Iterator[rest.Organisation]:
        """All of them; for the owner."""
        return self._transport.pages("/v1/organisations", rest.Organisation)

    def get(self, organisation_id: str) -> rest.Organisation:
        return self._transport.get(f"/v1/organisations/{organisation_id}", rest.Organisation)

    def set_standing(
        self, organisation_id: str, body: rest.StandingPut, *, version: int
    ) -> rest.Organisation:
        path = f"/v1/organisations/{organisation_id}/standing"
        return self._transport.change("PUT", path, rest.Organisation, body, version)

    def stop_workloads(
        self,
        organisation_id: str,
        body: rest.StopWorkloads,
        *,
        idempotency_key: str | None = None,
    ) -> rest.StoppedWorkloads:
        """End at once all that runs for it; for the owner. Suspend it first, or it starts anew."""
        return self._transport.post(
            f"/v1/organisations/{organisation_id}/stop-workloads",
            rest.StoppedWorkloads,
            body,
            idempotency_key=idempotency_key,
        )


class Projects:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self, body: rest.ProjectCreate, *, idempotency_key: str | None = None
    ) -> rest.Project:
        return self._transport.post(
            "/v1/projects", rest.Project, body, idempotency_key=idempotency_key
        )

    def list(self) -> Iterator[rest.Project]:
        return self._transport.pages("/v1/projects", rest.Project)

    def get(self, project_id: str) -> rest.Project:
        return self._transport.get(f"/v1/projects/{project_id}", rest.Project)


class Principals:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self, body: rest.PrincipalCreate, *, idempotency_key: str | None = None
    ) -> rest.Principal:
        return self._transport.post(
            "/v1/principals", rest.Principal, body, idempotency_key=idempotency_key
        )

    def list(self) -> Iterator[rest.Principal]:
        return self._transport.pages("/v1/principals", rest.Principal)

    def get(self, principal_id: str) -> rest.Principal:
        return self._transport.get(f"/v1/principals/{principal_id}", rest.Principal)

    def change(
        self, principal_id: str, body: rest.PrincipalPatch, *, version: int
    ) -> rest.Principal:
        path = f"/v1/principals/{principal_id}"
        return self._transport.change("PATCH", path, rest.Principal, body, version)

    def remove(self, principal_id: str) -> None:
        """Its keys are revoked with it."""
        self._transport.delete(f"/v1/principals/{principal_id}")


class Keys:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def create(
        self, body: rest.KeyCreate, *, idempotency_key: str | None = None
    ) -> rest.KeyCreated:
        """The secret is shown this once."""
        return self._transport.post(
            "/v1/keys", rest.KeyCreated, body, idempotency_key=idempotency_key
        )

    def list(self) -> Iterator[rest.Key]:
        return self._transport.pages("/v1/keys", rest.Key)

    def get(self, key_id: str) -> rest.Key:
        return self._transport.get(f"/v1/keys/{key_id}", rest.Key)

    def revoke(self, key_id: str) -> None:
        self._transport.delete(f"/v1/keys/{key_id}")


class Budgets:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def set(self, body: rest.BudgetPut) -> rest.Budget:
        return self._transport.change("PUT", "/v1/budgets", rest.Budget, body, None)

    def list(self) -> Iterator[rest.Budget]:
        return self._transport.pages("/v1/budgets", rest.Budget)


class Audit:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self, *, organisation_id: str | None = None) -> Iterator[rest.AuditEntry]:
        """Oldest first. The owner sees all; others their organisation."""
        return self._transport.pages("/v1/audit", rest.AuditEntry, organisation_id=organisation_id)
