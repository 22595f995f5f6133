"""The REST edge.

Owns     nothing in the store; in memory the request counters and the pace of each key.
Always   every answer to a request has `x-request-id` and every failure the one body; a change is one Work with
         its audit row and its kept answer, a refusal is audited in a Work of its own; another
         organisation's things are not found.
Callers  the app serves it; the sdk and everybody's programs speak to it.
"""

from sublet.edge.api.app import create_api
from sublet.edge.api.deps import Deps

__all__ = ["Deps", "create_api"]
