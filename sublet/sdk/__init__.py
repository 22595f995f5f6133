"""The client of a Sublet cloud.

Owns     nothing: it speaks the shapes of `base.wire.rest` to the REST edge.
Always   a request that is repeated has its effect once; a refusal keeps its code, field, ways on
         and request id.
Callers  the command, the tour, and programs of customers.
"""

from sublet.sdk.client import Client
from sublet.sdk.errors import ApiError, ClientError, GatewayError, UnexpectedAnswer, Unreachable
from sublet.sdk.gateway import Gateway, Piece

__all__ = [
    "ApiError",
    "Client",
    "ClientError",
    "Gateway",
    "GatewayError",
    "Piece",
    "UnexpectedAnswer",
    "Unreachable",
]
