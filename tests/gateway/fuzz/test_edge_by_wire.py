"""The HTTP edge by raw sockets: what is lawful is served in any form, what is not is refused."""

from __future__ import annotations

import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import BODY_LIMIT, Target
from .defects import DEFECTS, ENDS_THE_CONNECTION
from .wire import Chat, Wire, chat_body, cut, write

EXAMPLES = 60
PLACES = st.lists(st.integers(0, 1 << 16), max_size=12)
CHATS = st.builds(
    Chat,
    words=st.integers(1, 40),
    is_stream=st.booleans(),
    chunk_sizes=st.just(()) | st.lists(st.integers(1, 90), min_size=1, max_size=3).map(tuple),
    extension=st.sampled_from([b"", b";a", b';name="value"', b";a=1;b=2"]),
    trailers=st.sampled_from([b"", b"X-Sum: 1\r\n", b"X-Sum: 1\r\nX-More: 2\r\n"]),
    headers=st.sampled_from(
        [
            (),
            ((b"X-Note", b""),),
            ((b"X-Note", b"caf\xe9 \x80"), (b"Accept", b"*/*")),
            ((b"Connection", b"keep-alive"),),
        ]
    ),
    is_upper=st.booleans(),
)


@settings(max_examples=EXAMPLES, deadline=None)
@given(chats=st.lists(CHATS, min_size=1, max_size=5), places=PLACES)
def test_what_is_lawful_is_answered_in_order(
    target: Target, chats: list[Chat], places: list[int]
) -> None:
    data = b"".join(chat.bytes() for chat in chats)
    with Wire(target.port) as wire:
        wire.send(*cut(data, places))
        answers = wire.answers(len(chats))
    assert [answer.status for answer in answers] == [200] * len(chats)
    assert [answer.words for answer in answers] == [chat.words for chat in chats]
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(chats)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    before=st.lists(CHATS, max_size=3),
    name=st.sampled_from(sorted(DEFECTS)),
    after=st.lists(CHATS, max_size=2),
    places=PLACES,
)
def test_what_is_not_lawful_ends_the_line(
    target: Target, before: list[Chat], name: str, after: list[Chat], places: list[int]
) -> None:
    """Requests before it are answered; it gets an error; if it made the line unreadable nothing
    after it is answered."""
    data = b"".join(chat.bytes() for chat in before) + DEFECTS[name]()
    data += b"".join(chat.bytes() for chat in after)
    with Wire(target.port) as wire:
        wire.send(*cut(data, places))
        wire.socket.settimeout(3)
        most = len(before) + 1 + (0 if name in ENDS_THE_CONNECTION else len(after))
        try:
            answers = wire.answers(most)
        except TimeoutError:
            # It waits for the rest of a request that is shorter than it says.
            answers = []
            assert name in ("no body", "a length above the limit"), name
    for chat, answer in zip(before, answers, strict=False):
        assert (answer.status, answer.words) == (200, chat.words)
    if len(answers) > len(before):
        assert 400 <= answers[len(before)].status < 600, name
    assert len(answers) <= len(before) + 1 or name not in ENDS_THE_CONNECTION, name
    target.check()


@pytest.mark.parametrize("name", DEFECTS)
def test_each_defect_alone(target: Target, name: str) -> None:
    with Wire(target.port) as wire:
        wire.send(DEFECTS[name]())
        wire.socket.settimeout(0.5)
        try:
            answer = wire.answer()
        except TimeoutError:
            answer = None
            assert name in ("no body", "a length above the limit"), "it waits, and need not"
        if answer is not None:
            assert 400 <= answer.status < 600
            assert answer.code
            if name in ENDS_THE_CONNECTION:
                wire.socket.settimeout(5)
                assert wire.is_closed(), "what follows would be read as a request"
    target.check()


def test_a_client_that_waits_to_be_told_to_go_on(target: Target) -> None:
    chat = Chat(5, headers=((b"Expect", b"100-continue"),))
    head, _, body = chat.bytes().partition(b"\r\n\r\n")
    with Wire(target.port) as wire:
        wire.send(head + b"\r\n\r\n")
        assert wire.socket.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        wire.send(body)
        answer = wire.answer()
        assert answer is not None
        assert (answer.status, answer.words) == (200, 5)


def test_a_refusal_comes_before_the_body_is_sent(target: Target) -> None:
    """Nothing is told to go on where the head alone is refused."""
    head = write(
        b"POST /v1/chat/completions HTTP/1.1",
        [(b"Expect", b"100-continue"), (b"Content-Length", b"10")],
    )
    with Wire(target.port) as wire:
        wire.send(head)
        answer = wire.answer()
        assert answer is not None
        assert answer.status == 400
        assert wire.is_closed()


@pytest.mark.parametrize("sizes", [(), (4096,)])
def test_a_body_over_the_limit(target: Target, sizes: tuple[int, ...]) -> None:
    chat = Chat(1, chunk_sizes=sizes, extra={"user": "x" * (BODY_LIMIT + 10)})
    before = target.memory_mb()
    with Wire(target.port) as wire:
        thread = threading.Thread(target=wire.send, args=(chat.bytes(),))
        thread.start()
        answer = wire.answer()
        assert answer is not None
        assert (answer.status, answer.code) == (413, "request_too_large")
        thread.join()
    assert target.memory_mb() - before < 16
    target.check()


def test_head_options_and_other_methods(target: Target) -> None:
    key = (b"Authorization", b"Bearer sk-fuzz")
    cases = [
        (b"HEAD", b"/v1/models", 200),
        (b"OPTIONS", b"/v1/chat/completions", 204),
        (b"HEAD", b"/v1/chat/completions", 405),
        (b"GET", b"/v1/chat/completions", 405),
        (b"DELETE", b"/v1/models", 405),
        (b"GET", b"/v1/models", 200),
        (b"GET", b"/v1/models/mock", 200),
        (b"GET", b"/v1/models/none", 404),
        (b"POST", b"/v1/responses", 404),
        (b"GET", b"/nothing", 404),
        (b"HEAD", b"/nothing", 404),
    ]
    with Wire(target.port) as wire:
        for method, path, status in cases:
            headers = [(b"Host", b"a"), key]
            if method == b"POST":
                headers.append((b"Content-Length", b"0"))
            wire.send(write(b"%b %b HTTP/1.1" % (method, path), headers))
            answer = wire.answer(is_head=method == b"HEAD")
            assert answer is not None
            assert answer.status == status, (method, path)
            assert answer.headers["x-request-id"]
            if status == 405:
                assert "POST" in answer.headers["allow"] or "GET" in answer.headers["allow"]


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("is_stream", [False, True])
def test_http_1_0(target: Target, is_kept: bool, is_stream: bool) -> None:
    headers = ((b"Connection", b"keep-alive"),) if is_kept else ()
    data = (
        Chat(4, is_stream=is_stream, headers=headers).bytes().replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    )
    with Wire(target.port) as wire:
        wire.send(data)
        answer = wire.answer()
        assert answer is not None
        assert (answer.status, answer.words) == (200, 4)
        assert "transfer-encoding" not in answer.headers, "1.0 knows no chunks"
        if is_kept and not is_stream:
            wire.send(data)
            assert wire.answer() is not None
        else:
            assert wire.is_closed()


def test_connection_close_is_kept(target: Target) -> None:
    data = Chat(2, headers=((b"Connection", b"close"),)).bytes()
    with Wire(target.port) as wire:
        wire.send(data + Chat(3).bytes())
        answers = wire.answers()
        assert [answer.words for answer in answers] == [2]
        assert answers[0].headers["connection"] == "close"


def test_trailers_change_nothing(target: Target) -> None:
    """What comes after the body is not a head: no other key, no other framing, no other length."""
    for trailers in (
        b"Authorization: Bearer sk-nobody\r\n",
        b"Host: other\r\n",
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Expect: a miracle\r\n",
        b"Content-Encoding: gzip\r\n",
        b"".join(b"X-%d: x\r\n" % number for number in range(200)),
    ):
        with Wire(target.port) as wire:
            wire.send(Chat(3, chunk_sizes=(64,), trailers=trailers).bytes())
            wire.socket.settimeout(5)
            answer = wire.answer()
            # Served as if they were not there, or refused aloud.
            assert answer is not None, trailers[:40]
            assert answer.status == 200 or 400 <= answer.status < 500
            assert answer.status != 200 or answer.words == 3
    target.check()


def test_a_client_that_sends_byte_by_byte(target: Target) -> None:
    data = Chat(7, chunk_sizes=(9,), extension=b";a=1", is_stream=True).bytes()
    with Wire(target.port) as wire:
        wire.send(*(data[at : at + 1] for at in range(len(data))))
        answer = wire.answer()
        assert answer is not None
        assert (answer.status, answer.words) == (200, 7)


@pytest.mark.parametrize("way", ["half-close", "close", "reset"])
@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_goes_ends_its_request(target: Target, way: str, is_stream: bool) -> None:
    """However it goes, and whether or not it had an answer yet; what it had sent after is not
    begun."""
    (epoch,) = target.gateway.epochs()
    rows = len(list(target.gateway.events(epoch)))
    made = target.stats()["made"]
    body = chat_body("n=400 delay=0.005", stream=is_stream)
    length = (b"Content-Length", b"%d" % len(body))
    asked = write(b"POST /v1/chat/completions HTTP/1.1", [*Chat(1).head(), length], body)
    with Wire(target.port) as wire:
        wire.send(asked + Chat(9).bytes())
        end = time.monotonic() + 10
        while target.stats()["made"] < made + 3:
            assert time.monotonic() < end
            time.sleep(0.01)
        if way == "half-close":
            wire.half_close()
        elif way == "reset":
            wire.abort()
        elif way == "close":
            wire.socket.close()
        gone = time.monotonic()
        while len(found := list(target.gateway.events(epoch))[rows:]) < 1:
            assert time.monotonic() < gone + 1.5, "it goes on for nobody"
            time.sleep(0.01)
    assert [event.outcome for event in found] == ["client_gone"]
    assert found[0].output < 400
    target.await_quiet()
    target.check()
    assert len(list(target.gateway.events(epoch))) == rows + 2, "its own and the check's, no more"


# ---- bounds ---------------------------------------------------------------------------------------


def flood(wire: Wire, data: bytes, *, most_bytes: int, seconds: float) -> int:
    """Send without reading until the other side stops taking it; how much it took."""
    wire.socket.settimeout(0.5)
    sent, end = 0, time.monotonic() + seconds
    try:
        while sent < most_bytes and time.monotonic() < end:
            sent += wire.socket.send(data)
    except (TimeoutError, ConnectionError):
        pass
    return sent


@pytest.mark.parametrize(
    "request_bytes",
    [
        write(b"GET /metrics HTTP/1.1", [(b"Host", b"a")]),
        write(b"GET /nothing HTTP/1.1", [(b"Host", b"a")]),
        Chat(30).bytes(),
        Chat(30, is_stream=True).bytes(),
    ],
    ids=["pages", "refusals", "chats", "streams"],
)
def test_a_pipeline_whose_answers_are_not_read(target: Target, request_bytes: bytes) -> None:
    before = target.memory_mb()
    with Wire(target.port) as wire:
        flood(wire, request_bytes * 64, most_bytes=24 << 20, seconds=4)
        assert target.memory_mb() - before < 24, "answers pile up for a client that reads none"
        target.check()
    target.await_quiet()
    target.check()


def test_trailers_without_end(target: Target) -> None:
    before = target.memory_mb()
    head = Chat(1, chunk_sizes=(64,)).bytes().rpartition(b"0\r\n")[0] + b"0\r\nX-Note: "
    with Wire(target.port) as wire:
        wire.send(head)
        flood(wire, b"x" * 65_536, most_bytes=48 << 20, seconds=4)
        assert target.memory_mb() - before < 24
    target.check()


def test_a_chunk_extension_without_end(target: Target) -> None:
    before = target.memory_mb()
    head = Chat(1, chunk_sizes=(64,)).bytes().partition(b"\r\n\r\n")[0] + b"\r\n\r\n5;"
    with Wire(target.port) as wire:
        wire.send(head)
        flood(wire, b"x" * 65_536, most_bytes=48 << 20, seconds=4)
        assert target.memory_mb() - before < 24
    target.check()


def test_a_head_without_end(target: Target) -> None:
    for start in (b"GET /", b"GET / HTTP/1.1\r\nHost: a\r\nX-Note: ", b"GET / HTTP/1.1\r\nX"):
        before = target.memory_mb()
        with Wire(target.port) as wire:
            wire.send(start)
            assert flood(wire, b"x" * 65_536, most_bytes=48 << 20, seconds=4) < 16 << 20
        assert target.memory_mb() - before < 8
    target.check()


def test_a_body_in_tiny_chunks(target: Target) -> None:
    """The bound of a body is one of memory, too: not so many bytes for each of its chunks."""
    before = target.memory_mb()
    head = Chat(1, chunk_sizes=(64,)).bytes().partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
    with Wire(target.port) as wire:
        wire.send(head, b"2\r\nxx\r\n" * (BODY_LIMIT // 2 - 10))
        assert target.ask(Chat(2)).status == 200
        assert target.memory_mb() - before < 24
    target.check()


def test_bodies_of_strangers_are_not_collected(target: Target) -> None:
    """A hundred connections without a valid key, each with nearly a whole body."""
    before = target.memory_mb()
    body = b"x" * (BODY_LIMIT - 10)
    head = write(
        b"POST /v1/chat/completions HTTP/1.1",
        [
            (b"Host", b"a"),
            (b"Authorization", b"Bearer sk-no"),
            (b"Content-Length", b"%d" % BODY_LIMIT),
        ],
    )
    wires = [Wire(target.port) for _ in range(100)]
    try:
        for wire in wires:
            wire.socket.settimeout(1)
            try:
                wire.socket.sendall(head + body)
            except (TimeoutError, ConnectionError):
                continue
        assert target.memory_mb() - before < 64
        target.check()
    finally:
        for wire in wires:
            wire.socket.close()
    target.check()


def test_a_reader_that_stops_slows_its_engine_down(target: Target) -> None:
    words = 60_000
    before = target.memory_mb()
    with Wire(target.port) as wire:
        wire.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        wire.send(Chat(words, is_stream=True).bytes())
        made = -1
        end = time.monotonic() + 20
        while (now := target.stats()["made"]) != made and time.monotonic() < end:
            made = now
            time.sleep(0.5)
        assert target.memory_mb() - before < 24
        answer = wire.answer()
        assert answer is not None
        assert answer.words == words
        assert answer.body.endswith(b"data: [DONE]\n\n")
    target.check()
