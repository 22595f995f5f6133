"""Raw compute: instances and jobs."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import BaseModel

from sublet.base.wire import rest
from sublet.sdk.transport import Transport


class Workloads:
    """What instances and jobs share."""

    def __init__(self, transport: Transport, root: str) -> None:
        self._transport = transport
        self._root = root

    def _create(self, body: BaseModel, idempotency_key: str | None) -> rest.Workload:
        return self._transport.post(
            self._root, rest.Workload, body, idempotency_key=idempotency_key
        )

    def _act(self, workload_id: str, verb: str) -> rest.Workload:
        return self._transport.post(f"{self._root}/{workload_id}/{verb}", rest.Workload)

    def list(
        self, *, state: str | None = None, project_id: str | None = None
    ) -> Iterator[rest.Workload]:
        """Oldest first."""
        return self._transport.pages(self._root, rest.Workload, state=state, project_id=project_id)

    def get(self, workload_id: str) -> rest.Workload:
        return self._transport.get(f"{self._root}/{workload_id}", rest.Workload)

    def change(self, workload_id: str, body: rest.WorkloadPatch, *, version: int) -> rest.Workload:
        path = f"{self._root}/{workload_id}"
        return self._transport.change("PATCH", path, rest.Workload, body, version)

    def transitions(self, workload_id: str) -> Iterator[rest.Transition]:
        return self._transport.pages(f"{self._root}/{workload_id}/transitions", rest.Transition)

    def runs(self, workload_id: str) -> Iterator[rest.Run]:
        return self._transport.pages(f"{self._root}/{workload_id}/runs", rest.Run)

    def logs(self, workload_id: str, *, offset: int = 0, follow: bool = False) -> Iterator[str]:
        """Output from a byte offset; with `follow` as it comes, until the workload is over."""
        return self._transport.stream_text(
            f"{self._root}/{workload_id}/logs", offset=offset, follow=follow
        )

    def exec(self, workload_id: str, body: rest.ExecCreate) -> rest.ExecResult:
        """A command inside. It is sent once: a lost answer may mean that it ran."""
        return self._transport.post_once(
            f"{self._root}/{workload_id}/exec",
            rest.ExecResult,
            body,
            timeout_seconds=body.timeout_seconds + 30.0,
        )


class Instances(Workloads):
    def create(
        self, body: rest.InstanceCreate, *, idempotency_key: str | None = None
    ) -> rest.Workload:
        return self._create(body, idempotency_key)

    def stop(self, workload_id: str) -> rest.Stopped:
        """Gives its devices back; the answer says what it still costs."""
        return self._transport.post(f"{self._root}/{workload_id}/stop", rest.Stopped)

    def start(
        self,
        workload_id: str,
        body: rest.StartCreate | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> rest.Workload:
        """A new admission, wherever there is room."""
        return self._transport.post(
            f"{self._root}/{workload_id}/start",
            rest.Workload,
            body or rest.StartCreate(),
            idempotency_key=idempotency_key,
        )

    def terminate(self, workload_id: str) -> rest.Workload:
        return self._act(workload_id, "terminate")


class Jobs(Workloads):
    def create(self, body: rest.JobCreate, *, idempotency_key: str | None = None) -> rest.Workload:
        return self._create(body, idempotency_key)

    def cancel(self, workload_id: str) -> rest.Workload:
        return self._act(workload_id, "cancel")
