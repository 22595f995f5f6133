"""The data plane: one process that sells tokens to OpenAI and Anthropic clients.

Owns     connections on both sides, the dialects, purses and buckets of this epoch, the spool.
Always   a purse never spends more than it was granted; what refuses a request is known before its
         first byte; nothing on the hot path waits for a disk, a database or another process; every
         buffer has a bound; an answer's last byte leaves after its usage row is on disk (`ack`).
Callers  `python -m sublet.gateway`, started by app; it talks to the link by files and one socket.

Beside the house: imports `base.wire.gateway` and `base.kernel` only. One event-loop thread runs
everything but the spool's writer.
"""
