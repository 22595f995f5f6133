"""Shapes between processes.

Owns     `rest`: what the REST edge and the client say to each other.
Always   a request is strict (an unknown field or a value of another type is refused by name), an
         answer is lenient (a newer server may say more); money travels as micros with its text,
         instants as ISO 8601 in UTC.
Callers  edge.api and sdk.
"""
