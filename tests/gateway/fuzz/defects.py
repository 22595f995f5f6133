"""Requests that are not in order, each with what is wrong. Never is one of them answered by 200."""

from __future__ import annotations

from collections.abc import Callable

from .wire import Chat, chat_body, smuggled, write

LINE = b"POST /v1/chat/completions HTTP/1.1"
HOST, KEY, KIND = Chat(1).head()
BODY = chat_body("n=1")
LENGTH = (b"Content-Length", b"%d" % len(BODY))
CHUNKED = (b"Transfer-Encoding", b"chunked")
CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
USUAL = [HOST, KEY, KIND]


def _with(*headers: tuple[bytes, bytes], body: bytes = BODY) -> bytes:
    return write(LINE, [*USUAL, *headers], body)


def _raw(head: bytes, body: bytes = BODY) -> bytes:
    """Header lines as they are given, before the usual ones."""
    lines = b"".join(b"%b: %b\r\n" % pair for pair in USUAL)
    return b"%b\r\n%b%b\r\n%b" % (LINE, head, lines, body)


def _chunk(line: bytes) -> bytes:
    """A chunked body whose first chunk has this line."""
    return _with(CHUNKED, body=b"%b\r\n%b\r\n0\r\n\r\n" % (line, BODY))


DEFECTS: dict[str, Callable[[], bytes]] = {
    # Two ways to tell where a body ends: whoever stands before us may have read the other one.
    "length and chunked": lambda: _with(LENGTH, CHUNKED, body=CHUNKS + smuggled()),
    "chunked and length": lambda: _with(CHUNKED, LENGTH, body=CHUNKS + smuggled()),
    "length 0 and chunked": lambda: _with((b"Content-Length", b"0"), CHUNKED, body=CHUNKS),
    "two lengths": lambda: _with((b"Content-Length", b"0"), LENGTH, body=smuggled()),
    "two lengths the other way": lambda: _with(LENGTH, (b"Content-Length", b"1")),
    "the same length twice": lambda: _with(LENGTH, LENGTH),
    "a list of lengths": lambda: _with((b"Content-Length", b"%d, %d" % (len(BODY), len(BODY)))),
    "a negative length": lambda: _with((b"Content-Length", b"-1")),
    "a length with a sign": lambda: _with((b"Content-Length", b"+%d" % len(BODY))),
    "a length in hexadecimal": lambda: _with((b"Content-Length", b"0x%x" % len(BODY))),
    "a length with a blank in it": lambda: _with((b"Content-Length", b"1 0")),
    "no length after its name": lambda: _with((b"Content-Length", b"")),
    "a length beyond 64 bits": lambda: _with((b"Content-Length", b"9" * 30)),
    "a length above the limit": lambda: _with((b"Content-Length", b"%d" % (1 << 40))),
    "a blank before the colon": lambda: _raw(b"Content-Length : %d\r\n" % len(BODY)),
    "a tab before the colon": lambda: _raw(b"Transfer-Encoding\t: chunked\r\n", CHUNKS),
    "a folded header": lambda: _raw(b"X-Note: one\r\n two\r\n%b: %b\r\n" % LENGTH),
    "a folded framing": lambda: _raw(b"Transfer-Encoding:\r\n chunked\r\n", CHUNKS),
    "a folded first header": lambda: b"%b\r\n X: y\r\n%b" % (LINE, _with(LENGTH)[len(LINE) + 2 :]),
    "chunked twice": lambda: _with(CHUNKED, CHUNKED, body=CHUNKS),
    "a list of encodings": lambda: _with((b"Transfer-Encoding", b"identity, chunked"), body=CHUNKS),
    "chunked not last": lambda: _with((b"Transfer-Encoding", b"chunked, gzip"), body=CHUNKS),
    "nearly chunked": lambda: _with((b"Transfer-Encoding", b"xchunked"), LENGTH),
    "chunked with a mark": lambda: _with((b"Transfer-Encoding", b"\x0bchunked"), body=CHUNKS),
    "another encoding": lambda: _with((b"Transfer-Encoding", b"gzip"), LENGTH),
    "identity": lambda: _with((b"Transfer-Encoding", b"identity"), LENGTH),
    "chunked in HTTP/1.0 and length": lambda: _with(LENGTH, CHUNKED).replace(b"/1.1", b"/1.0", 1),
    # Chunks that are none.
    "a chunk without a size": lambda: _chunk(b""),
    "a chunk of words": lambda: _chunk(b"ten"),
    "a negative chunk": lambda: _chunk(b"-1"),
    "a chunk with a sign": lambda: _chunk(b"+%x" % len(BODY)),
    "a chunk in hexadecimal": lambda: _chunk(b"0x%x" % len(BODY)),
    "a chunk beyond 64 bits": lambda: _chunk(b"f" * 17),
    "a chunk with a blank before": lambda: _chunk(b" %x" % len(BODY)),
    "a chunk that is longer": lambda: _chunk(b"%x" % (len(BODY) - 3)),
    "a chunk ended by a line feed": lambda: _with(
        CHUNKED, body=b"%x\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
    ),
    # Lines that are none.
    "bare line feeds": lambda: _with(LENGTH).replace(b"\r\n", b"\n", 5),
    "a bare carriage return": lambda: _raw(b"X-Note: a\rb\r\n%b: %b\r\n" % LENGTH),
    "a NUL in a value": lambda: _raw(b"X-Note: a\0b\r\n%b: %b\r\n" % LENGTH),
    "a NUL in a name": lambda: _raw(b"X-\0Note: a\r\n%b: %b\r\n" % LENGTH),
    "a header without a colon": lambda: _raw(b"just words\r\n%b: %b\r\n" % LENGTH),
    "a header without a name": lambda: _raw(b": words\r\n%b: %b\r\n" % LENGTH),
    "a name beyond ASCII": lambda: _raw(b"X-N\xc3\xb6te: a\r\n%b: %b\r\n" % LENGTH),
    "no method": lambda: b" /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
    "a method of no kind": lambda: b"FETCH /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
    "a method in small letters": lambda: b"get /v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
    "no version": lambda: b"GET /v1/models\r\nHost: a\r\n\r\n",
    "a version of no kind": lambda: b"GET /v1/models HTTP/9.9\r\nHost: a\r\n\r\n",
    "another protocol": lambda: b"GET /v1/models RTSP/1.0\r\nHost: a\r\n\r\n",
    "HTTP/2 without asking": lambda: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "the start of TLS": lambda: bytes.fromhex("16030100f8010000f40303") + b"\x07" * 200,
    "a blank in the URL": lambda: b"GET /v1/mo dels HTTP/1.1\r\nHost: a\r\n\r\n",
    "a URL that is none": lambda: b"GET v1/models HTTP/1.1\r\nHost: a\r\n\r\n",
    "a tunnel": lambda: b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: a\r\n\r\n",
    "another kind of talk": lambda: _with(
        (b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), LENGTH
    ),
    # Heads that are not for us.
    "no host": lambda: write(LINE, [KEY, KIND, LENGTH], BODY),
    "two hosts": lambda: _with(HOST, LENGTH),
    "another expectation": lambda: _with((b"Expect", b"a miracle"), LENGTH),
    "a compressed body": lambda: _with((b"Content-Encoding", b"gzip"), LENGTH),
    "too many headers": lambda: _with(*((b"X-%d" % n, b"x") for n in range(200)), LENGTH),
    "a header that is too long": lambda: _with((b"X-Note", b"x" * 40_000), LENGTH),
    "a URL that is too long": lambda: b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"x" * 40_000),
    # What is well formed, and refused all the same.
    "no key": lambda: write(LINE, [HOST, KIND, LENGTH], BODY),
    "a key of nobody": lambda: write(
        LINE, [HOST, (b"Authorization", b"Bearer sk-nobody"), LENGTH], BODY
    ),
    "a body that is no JSON": lambda: _with((b"Content-Length", b"5"), body=b"{nope"),
    "a body that is no object": lambda: _with((b"Content-Length", b"2"), body=b"[]"),
    "a body that is not UTF-8": lambda: _with((b"Content-Length", b"4"), body=b'"\xff\xfe"'),
    "no body": lambda: _with(),
    "a body of nothing": lambda: _with((b"Content-Length", b"0"), body=b""),
    "depth without end": lambda: _with((b"Content-Length", b"%d" % 100_000), body=b"[" * 100_000),
}
ENDS_THE_CONNECTION = frozenset(
    name for name in DEFECTS if list(DEFECTS).index(name) < list(DEFECTS).index("no key")
)
"""After these nobody knows where the next request begins: nothing after them is answered."""
