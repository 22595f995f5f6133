"""What the models shop asks of a model server, in values.

An adapter knows one kind of server: how it is started, asked, measured, and which request fields
it honours. It starts nothing itself: an engine runs what `spawn` says. All calls but `spawn` go
to the server's Unix socket with short limits, and never inside a database transaction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from sublet.base.kernel.errors import Conflict
from sublet.shops.compute import ServerSpec

MODEL_SOCKET = "model.sock"
"""In the home of a replica: where it serves."""
KEY_SOCKET = "key.sock"
"""In the home of a sealed replica: where it awaits its data key, before it serves."""

Fields = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What a server has to know of a model."""

    name: str
    """What clients ask for: the server's alias."""
    path: str
    """Its file (or folder) on the host; ciphertext where it is sealed."""
    kind: Literal["generate", "embed"]
    context: int
    """Tokens of one request, prompt and output."""
    is_sealed: bool = False
    template: str = ""
    """A chat template of ours in place of the model's own, by name; empty: its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gauges:
    """A server's own counts since it started, and what it has in hand."""

    prompt_total: int
    """Prompt tokens that were computed: without those met in its cache."""
    cached_total: int | None
    """Prompt tokens met in its cache; None: it does not count them."""
    predicted_total: int
    processing: int
    deferred: int
    """Taken on, and waiting inside the server."""


class NotServable(Conflict):
    """This model server cannot serve that model: deploy it with another one."""

    code = "not_servable"


class ModelServer(Protocol):
    """One kind of model server. Errors of `spawn`: NotServable. The others never raise."""

    name: str
    """As the route names it."""
    takes_sealed: bool
    """It can serve weights that exist in the clear only in its own locked memory."""
    fields: Fields
    """By surface, request fields that it honours and that are passed on as they are. What it would
    silently ignore is not among them."""
    revealing: frozenset[str]
    """Of those, what tells more of a model than its text: a sealed one never gets them."""
    counters: str
    """What is asked of it so that each event tells its count."""
    splits_n: bool
    """It under-reports `n`: the gateway asks n times."""
    stops_unstreamed: bool
    """It ends a generation that is not streamed when its asker goes."""
    normaliser: str
    """Of its usage, in `base.wire.gateway`."""

    def spawn(self, model: ModelFacts, *, devices: int, slots: int) -> ServerSpec:
        """What an engine runs. `slots`: requests side by side. The file must be there."""
        ...

    def ready(self, door: str, model: ModelFacts) -> bool:
        """It has just answered a real request, of one token or one input. It counts like others."""
        ...

    def lives(self, door: str) -> bool:
        """It answers at all, within seconds. It costs no token, and waits behind no request: a server
        has a free hand for it however many it works on, and however many wait inside it."""
        ...

    def gauges(self, door: str) -> Gauges | None:
        """None: it does not answer."""
        ...
