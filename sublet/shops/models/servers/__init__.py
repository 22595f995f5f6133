"""Model servers: what serves a model on devices that a replica holds.

Owns     nothing kept: the adapters, and what runs inside the sandbox (`child`).
Always   readiness is a real answer, never an open port; a field that a server would silently
         ignore is in no list; what runs in a sandbox is no part of the installation's process.
Callers  the models shop spawns replicas by them, asks for readiness and gauges, and copies their
         field lists into routes.
"""

from sublet.shops.models.servers.llama_cpp import LlamaCpp
from sublet.shops.models.servers.port import (
    KEY_SOCKET,
    MODEL_SOCKET,
    Gauges,
    ModelFacts,
    ModelServer,
    NotServable,
)
from sublet.shops.models.servers.vllm import Vllm

SERVERS: dict[str, ModelServer] = {server.name: server for server in (LlamaCpp(), Vllm())}
"""By the name that a model's catalogue entry has for its server."""

__all__ = [
    "KEY_SOCKET",
    "MODEL_SOCKET",
    "SERVERS",
    "Gauges",
    "ModelFacts",
    "ModelServer",
    "NotServable",
]
