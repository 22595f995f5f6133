"""Where it runs, and the owner's recalls."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from sublet.base.wire import rest
from sublet.sdk.transport import Transport


class Sites:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Iterator[rest.Site]:
        return self._transport.pages("/v1/sites", rest.Site)


class Pools:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Iterator[rest.Pool]:
        return self._transport.pages("/v1/pools", rest.Pool)

    def get(self, pool_id: str) -> rest.Pool:
        return self._transport.get(f"/v1/pools/{pool_id}", rest.Pool)

    def set_firm_shelf(self, pool_id: str, body: rest.FirmShelfPut, *, version: int) -> rest.Pool:
        path = f"/v1/pools/{pool_id}/firm-shelf"
        return self._transport.change("PUT", path, rest.Pool, body, version)


class Nodes:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(self) -> Iterator[rest.Node]:
        return self._transport.pages("/v1/nodes", rest.Node)

    def get(self, node_id: str) -> rest.Node:
        return self._transport.get(f"/v1/nodes/{node_id}", rest.Node)

    def cordon(self, node_id: str, body: rest.CordonCreate | None = None) -> rest.Node:
        return self._transport.post(
            f"/v1/nodes/{node_id}/cordon", rest.Node, body or rest.CordonCreate()
        )

    def drain(self, node_id: str) -> rest.Node:
        """Nothing new starts, and what runs ends by its own notice."""
        return self._transport.post(f"/v1/nodes/{node_id}/drain", rest.Node)

    def uncordon(self, node_id: str) -> rest.Node:
        return self._transport.post(f"/v1/nodes/{node_id}/uncordon", rest.Node)


class Devices:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def list(
        self, *, pool_id: str | None = None, node_id: str | None = None
    ) -> Iterator[rest.Device]:
        return self._transport.pages("/v1/devices", rest.Device, pool_id=pool_id, node_id=node_id)

    def time(
        self,
        *,
        start: datetime,
        end: datetime,
        pool_id: str | None = None,
        device_id: str | None = None,
    ) -> rest.DeviceTime:
        """How device time divided, in milliseconds that sum exactly; of all, a pool's, or one's."""
        return self._transport.get(
            "/v1/device-time",
            rest.DeviceTime,
            start=start,
            end=end,
            pool_id=pool_id,
            device_id=device_id,
        )


class Recalls:
    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def plan(self, body: rest.RecallCreate, *, idempotency_key: str | None = None) -> rest.Recall:
        """A plan for 60 seconds; nothing happens until it is accepted."""
        return self._transport.post(
            "/v1/recalls", rest.Recall, body, idempotency_key=idempotency_key
        )

    def list(self) -> Iterator[rest.Recall]:
        return self._transport.pages("/v1/recalls", rest.Recall)

    def get(self, recall_id: str) -> rest.Recall:
        return self._transport.get(f"/v1/recalls/{recall_id}", rest.Recall)

    def accept(self, recall_id: str, body: rest.RecallAccept | None = None) -> rest.Recall:
        """All rows, or those named. `plan_stale`: the new plan is in the error's details."""
        return self._transport.post(
            f"/v1/recalls/{recall_id}/accept", rest.Recall, body or rest.RecallAccept()
        )

    def cancel(self, recall_id: str) -> rest.Recall:
        return self._transport.post(f"/v1/recalls/{recall_id}/cancel", rest.Recall)

    def give_back(self, recall_id: str) -> rest.Recall:
        return self._transport.post(f"/v1/recalls/{recall_id}/return", rest.Recall)

    def shortfalls(self) -> Iterator[rest.Shortfall]:
        return self._transport.pages("/v1/shortfalls", rest.Shortfall)
