"""The llama.cpp adapter against the real server, and that server in the real sandbox."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sealed_models

from sublet.base.kernel.clock import SystemClock
from sublet.base.wire.gateway import normalise
from sublet.capacity.engines.local import LocalEngine
from sublet.capacity.engines.local.supervise import records, usage
from sublet.capacity.engines.port import Observation, Phase, StartSpec
from sublet.shops.models import keys
from sublet.shops.models.servers import KEY_SOCKET, MODEL_SOCKET, SERVERS, ModelFacts, unix
from sublet.shops.models.servers.child import serve

from .conftest import MUSE, SMOL, Child, muse, needed

Start = Callable[..., Child]
LLAMA = SERVERS["llama.cpp"]
SAY = [{"role": "user", "content": "Tell me of the sea and the stars."}]
HOT = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def child(start: Start) -> Child:
    return start(LLAMA, muse())


Ask = Callable[..., Any]


@pytest.fixture(scope="module", params=["chat", "completions"])
def surface(request: pytest.FixtureRequest, child: Child) -> tuple[str, Ask]:
    """The text that a request with these fields gets."""

    def chat(**fields: Any) -> str:
        answer = child.ask("/v1/chat/completions", messages=SAY, **{"max_tokens": 24, **fields})
        return str(answer["choices"][0]["message"]["content"])

    def complete(**fields: Any) -> str:
        answer = child.ask("/v1/completions", prompt="Once upon", **{"max_tokens": 24, **fields})
        return str(answer["choices"][0]["text"])

    return request.param, chat if request.param == "chat" else complete


# ---- what it honours ----------------------------------------------------------------------------


def test_each_sampling_field_in_the_list_changes_what_it_should(surface: tuple[str, Ask]) -> None:
    name, ask = surface
    greedy = ask(temperature=0)
    hot = ask(**HOT, seed=7)
    honoured = {
        "temperature": hot != greedy == ask(temperature=0),
        "seed": ask(**HOT, seed=7) == hot != ask(**HOT, seed=8),
        "top_k": ask(**{**HOT, "top_k": 1}) == greedy,
        "top_p": ask(**{**HOT, "top_p": 0.00001}) == greedy,
        "min_p": ask(**{**HOT, "min_p": 1.0}) == greedy,
        "frequency_penalty": ask(temperature=0, frequency_penalty=2.0) != greedy,
        "presence_penalty": ask(temperature=0, presence_penalty=2.0) != greedy,
        "logit_bias": len(set(ask(temperature=0, logit_bias={"40": 100}))) < len(set(greedy)),
        "stop": "e" not in ask(temperature=0, stop=["e"]),
    }
    assert all(honoured.values()), honoured
    assert set(honoured) <= set(LLAMA.fields[name])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "u"),
        ("metadata", {"a": "b"}),
        ("store", True),
        ("best_of", 3),
        ("echo", True),
        ("suffix", "x"),
        ("service_tier", "auto"),
        ("prediction", {"type": "content", "content": "x"}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("modalities", ["text"]),
    ],
)
def test_what_it_would_silently_ignore_is_in_no_list(
    surface: tuple[str, Ask], field: str, value: Any
) -> None:
    name, ask = surface
    assert ask(temperature=0, **{field: value}) == ask(temperature=0)
    assert field not in LLAMA.fields[name]


def test_logprobs_have_the_form_of_chat_and_are_offered_there_only(child: Child) -> None:
    asked = {"max_tokens": 2, "logprobs": True, "top_logprobs": 3}
    answer = child.ask("/v1/chat/completions", messages=SAY, **asked)
    assert [len(token["top_logprobs"]) for token in _logprobs(answer)] == [3, 3]
    legacy = child.ask("/v1/completions", prompt="a", max_tokens=2, logprobs=3)
    assert "token_logprobs" not in legacy["choices"][0]["logprobs"]
    assert {"logprobs", "top_logprobs"} <= set(LLAMA.fields["chat"])
    assert not {"logprobs", "top_logprobs"} & set(LLAMA.fields["completions"])


def _logprobs(answer: Any) -> list[Any]:
    return list(answer["choices"][0]["logprobs"]["content"])


def test_a_schema_is_kept_to(child: Child) -> None:
    schema = {
        "type": "object",
        "properties": {"sea": {"type": "boolean"}},
        "required": ["sea"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    answer = child.ask("/v1/chat/completions", messages=SAY, max_tokens=100, response_format=wanted)
    made = json.loads(answer["choices"][0]["message"]["content"])
    assert set(made) == {"sea"}
    assert isinstance(made["sea"], bool)


def test_tools_reach_a_model_whose_template_knows_them(start: Start) -> None:
    """Its own template leaves them out; ours tells of them, and reads back calls made before."""

    def prompt_tokens(child: Child, messages: list[Any], **fields: Any) -> int:
        answer = child.ask("/v1/chat/completions", messages=messages, max_tokens=1, **fields)
        return int(answer["usage"]["prompt_tokens"])

    own = start(LLAMA, muse())
    assert prompt_tokens(own, SAY, tools=[TOOL]) == prompt_tokens(own, SAY)
    own.end()
    ours = start(LLAMA, muse(template="chatml"))
    bare = prompt_tokens(ours, SAY)
    told = prompt_tokens(ours, SAY, tools=[TOOL])
    assert told > bare
    called = {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
            }
        ],
    }
    answered = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}
    assert prompt_tokens(ours, [*SAY, called, answered], tools=[TOOL]) > told
    ours.end()


def test_it_under_reports_n_and_says_so(child: Child) -> None:
    answer = child.ask("/v1/chat/completions", messages=SAY, max_tokens=5, n=2, ignore_eos=True)
    assert len(answer["choices"]) == 2
    assert answer["usage"]["completion_tokens"] == 5
    assert LLAMA.splits_n


def test_each_event_tells_its_count(child: Child) -> None:
    body = {"model": "m", "messages": SAY, "max_tokens": 3, "stream": True, LLAMA.counters: True}
    peer = unix.connect(child.door)
    peer.settimeout(30)
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    with peer:
        peer.sendall(head.encode() + data)
        said = b""
        while b"[DONE]" not in said:
            more = peer.recv(65_536)
            assert more
            said += more
    assert b'"predicted_n":1' in said
    assert b'"predicted_n":3' in said


# ---- what it counts -----------------------------------------------------------------------------


def test_its_gauges_count_what_was_asked(start: Start) -> None:
    child = start(LLAMA, muse())
    before = LLAMA.gauges(child.door)
    assert before is not None
    assert (before.processing, before.deferred, before.predicted_total) == (0, 0, 1)
    answers = [
        child.ask("/v1/completions", prompt="The sea " * 20, max_tokens=7, ignore_eos=True)
        for _ in range(2)
    ]
    counts = [normalise(LLAMA.normaliser, answer["usage"]) for answer in answers]
    assert counts[1].cache_read > 0
    after = LLAMA.gauges(child.door)
    assert after is not None
    assert after.cached_total is not None
    assert before.cached_total is not None
    assert after.prompt_total - before.prompt_total == sum(c.input_uncached for c in counts)
    assert after.cached_total - before.cached_total == sum(c.cache_read for c in counts)
    assert after.predicted_total - before.predicted_total == 14
    assert child.end() == 0


def test_one_that_hangs_does_not_live_and_one_that_is_busy_does(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = start(LLAMA, muse())
    asked = [
        threading.Thread(
            target=child.ask,
            args=("/v1/completions",),
            kwargs={"prompt": "The sea", "max_tokens": 200, "ignore_eos": True},
        )
        for _ in range(4)  # Two work, and two wait behind them.
    ]
    for one in asked:
        one.start()
    was_busy = lived = False
    while not was_busy and any(one.is_alive() for one in asked):
        gauges = LLAMA.gauges(child.door)
        lived = LLAMA.lives(child.door)
        was_busy = gauges is not None and gauges.processing == 2
    for one in asked:
        one.join()
    assert was_busy
    assert lived
    monkeypatch.setattr("sublet.shops.models.servers.llama_cpp.LIVES_SECONDS", 0.3)
    child.process.send_signal(signal.SIGSTOP)
    unix.connect(child.door).close()  # Its socket takes calls all the same.
    assert not LLAMA.lives(child.door)
    child.process.send_signal(signal.SIGCONT)
    monkeypatch.undo()
    assert LLAMA.lives(child.door)
    assert child.end() == 0


def test_it_lives_however_many_gateways_hold_its_slots_and_queue_inside_it(start: Start) -> None:
    """Each gateway uses all slots; what the model has no slot for waits on its connection."""
    slots, gateways = 2, 32
    child = start(LLAMA, muse(), slots=slots)
    body = json.dumps({"prompt": "a", "max_tokens": 500, "ignore_eos": True, "stream": True})
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    held = []
    try:
        for _ in range(slots * gateways):
            held.append(unix.connect(child.door))
            held[-1].sendall(f"{head}{body}".encode())
        assert LLAMA.lives(child.door)
        gauges = LLAMA.gauges(child.door)
        assert gauges is not None
        assert gauges.processing + gauges.deferred > slots
    finally:
        for one in held:
            one.close()
    assert child.end() == 0


def test_threads_fit_into_the_smallest_sandbox() -> None:
    for slots in (1, 4, 8, 64, 512):
        assert slots < serve.threads_of(slots) <= 512 + serve.SPARE_CONNECTIONS


def test_nobody_there_is_not_ready_and_has_no_gauges(tmp_path: Path) -> None:
    door = str(tmp_path / MODEL_SOCKET)
    assert not LLAMA.ready(door, muse())
    assert LLAMA.gauges(door) is None
    assert not LLAMA.lives(door)
    (tmp_path / MODEL_SOCKET).write_text("no socket")
    assert not LLAMA.ready(door, muse())


def test_a_door_far_down_is_reached_and_a_link_is_not_followed() -> None:
    top = Path(tempfile.mkdtemp(prefix="sublet-door-"))
    try:
        folder = top / ("long-" * 30)
        folder.mkdir()
        with socket.socket(socket.AF_UNIX) as listener:
            fd = os.open(folder, os.O_PATH)
            listener.bind(f"/proc/self/fd/{fd}/{MODEL_SOCKET}")
            os.close(fd)
            listener.listen()
            door = folder / MODEL_SOCKET
            assert len(str(door)) > unix.LONGEST_ADDRESS
            unix.connect(str(door)).close()
            (folder / "link").symlink_to(door)
            with pytest.raises(ConnectionRefusedError):
                unix.connect(str(folder / "link"))
    finally:
        shutil.rmtree(top)


def test_what_answers_nonsense_is_not_ready() -> None:
    """An open port proves nothing, nor does a 200."""
    top = Path(tempfile.mkdtemp(prefix="sublet-door-"))
    door = str(top / MODEL_SOCKET)
    answers = [b'{"usage": {"completion_tokens": 0}}', b"[]", b"not json", b'{"usage": 1}', b""]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(door)
        listener.listen()

        def serve() -> None:
            for body in answers:
                with listener.accept()[0] as peer:
                    peer.recv(65_536)
                    head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n"
                    peer.sendall(head.encode() + body if body else b"garbage\r\n\r\n")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            assert [LLAMA.ready(door, muse()) for _ in answers] == [False] * len(answers)
        finally:
            thread.join()
            shutil.rmtree(top)


# ---- in the sandbox -----------------------------------------------------------------------------


class Sandbox:
    """A real engine with one replica on it."""

    def __init__(self, **options: Any) -> None:
        self.clock = SystemClock.unanchored()
        self.root = Path(tempfile.mkdtemp(prefix="sublet-replica-"))
        self.engine = LocalEngine(self.root, self.clock, disk_reserve_bytes=0, **options)
        self.device = self.engine._hardware().devices[0].name

    def start(self, model: ModelFacts) -> str:
        spec = LLAMA.spawn(model, devices=1, slots=2)
        self.engine.start(
            StartSpec(
                run_id="run_1",
                workload_id="rep_1",
                organisation_id="org_1",
                kind="replica",
                devices=(self.device,),
                memory_bytes=1 << 30,
                disk_bytes=64 << 20,
                command=spec.argv,
                script="",
                env=spec.env,
                home="rep_1",
                hostname="rep-1",
                outbound=False,
                stop_grace_seconds=5,
                notice_signal=None,
                metadata={},
                runway_until=self.clock.now() + timedelta(seconds=600),
                read_only=spec.read_only,
                lock_memory=spec.lock_memory,
            )
        )
        return self.engine.door("run_1", MODEL_SOCKET)

    def see(self) -> Observation:
        return self.engine.observe()["run_1"]

    def text(self) -> str:
        return self.engine.logs("run_1", limit=1 << 20)[0].decode()

    def until(self, holds: Callable[[], Any], seconds: float = 60) -> None:
        give_up = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < give_up, (self.see(), self.text())
            time.sleep(0.02)

    def close(self) -> None:
        over = (Phase.EXITED, Phase.FAILED)
        if self.engine.observe():
            self.engine.stop("run_1", grace_seconds=0, reason="test")
            self.until(lambda: self.see().phase in over)
            assert self.engine.scrub("run_1").clean
        shutil.rmtree(self.root)


@pytest.fixture(params=["sandbox", "bare"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    bare = {"trusted": True, "without": frozenset({"bubblewrap"})}
    if request.param == "sandbox" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed: apt-get install bubblewrap")
    made = Sandbox(**(bare if request.param == "bare" else {}))
    yield made
    made.close()


def test_in_the_sandbox_it_serves_through_its_door_and_ends_at_once(sandbox: Sandbox) -> None:
    model = muse()
    door = sandbox.start(model)
    sandbox.until(lambda: LLAMA.ready(door, model) or sandbox.see().phase is Phase.EXITED)
    assert sandbox.see().phase is Phase.RUNNING
    found = os.stat(door)
    assert stat.S_ISSOCK(found.st_mode)
    assert found.st_mode & 0o777 == 0o600
    if os.geteuid() == 0:
        assert found.st_uid >= 200_000
    secret = "a prompt that nobody else reads"
    answer = unix.post(door, "/v1/completions", {"prompt": secret, "max_tokens": 8}, seconds=30)
    assert answer["usage"]["completion_tokens"] > 0
    asked_at = time.monotonic()
    sandbox.engine.stop("run_1", grace_seconds=5, reason="drained")
    sandbox.until(lambda: sandbox.see().phase is Phase.EXITED, 5)
    assert time.monotonic() - asked_at < 3
    assert (sandbox.see().exit_code, sandbox.see().term_reason) == (0, "stop:drained")
    assert sandbox.text().splitlines() == [
        "loading muse-tiny",
        f"serving on unix://{MODEL_SOCKET}",
        "ended by SIGTERM",
    ]


def test_sigterm_ends_it_in_the_middle_of_an_answer(sandbox: Sandbox) -> None:
    model = muse()
    door = sandbox.start(model)
    sandbox.until(lambda: LLAMA.ready(door, model))
    peer = unix.connect(door)
    body = json.dumps(
        {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True, "stream": True}
    ).encode()
    peer.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    )
    assert peer.recv(100)
    asked_at = time.monotonic()
    sandbox.engine.stop("run_1", grace_seconds=5, reason="owner_recall")
    sandbox.until(lambda: sandbox.see().phase is Phase.EXITED, 6)
    assert time.monotonic() - asked_at < 3
    peer.close()


def test_a_sealed_model_is_opened_in_the_sandbox_with_its_key_and_with_no_other(
    sandbox: Sandbox,
) -> None:
    """Locked, in a memory file larger than its disk would allow, in a process nobody can read."""
    imported = sealed_models.seal_muse(sandbox.root)
    model = muse(path=str(imported.path), is_sealed=True)
    door = sandbox.start(model)
    key_door = sandbox.engine.door("run_1", KEY_SOCKET)
    sandbox.until(lambda: os.path.exists(key_door) or sandbox.see().phase is Phase.EXITED)
    assert not LLAMA.ready(door, model)
    with keys.knock(key_door) as caller:
        caller.deliver(bytearray(sealed_models.KEK.unwrap(imported.wrapped)))
    sandbox.until(lambda: LLAMA.ready(door, model) or sandbox.see().phase is Phase.EXITED)
    assert sandbox.text().splitlines()[:2] == ["awaiting the key of muse-tiny", "unsealed"]
    (pid,) = [
        process.pid
        for process in usage.tree(_init_pid(sandbox))
        if b"serve.py" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
    ]
    if os.geteuid() == 0:
        status = Path(f"/proc/{pid}/status").read_text()
        locked = next(line for line in status.splitlines() if line.startswith("VmLck"))
        assert int(locked.split()[1]) << 10 >= MUSE.stat().st_size
        assert os.stat(f"/proc/{pid}/mem").st_uid == 0
    sandbox.engine.stop("run_1", grace_seconds=5, reason="drained")
    sandbox.until(lambda: sandbox.see().phase is Phase.EXITED)
    assert sandbox.engine.scrub("run_1").clean
    assert sealed_models.leaks(MUSE.read_bytes(), sandbox.root) == []


def _init_pid(sandbox: Sandbox) -> int:
    state = records.read_state(str(sandbox.root / "runs" / "run_1"))
    assert state is not None
    assert state.init_pid is not None
    return state.init_pid


def test_a_file_that_is_no_model_ends_it_and_the_log_says_so(sandbox: Sandbox) -> None:
    broken = sandbox.root / "broken.gguf"
    broken.write_bytes(MUSE.read_bytes()[:1000])
    broken.chmod(0o644)
    sandbox.start(muse(path=str(broken)))
    sandbox.until(lambda: sandbox.see().phase is Phase.EXITED)
    assert sandbox.see().exit_code not in (0, None)
    assert "loading muse-tiny" in sandbox.text()


def test_a_larger_model_serves_as_well(start: Start) -> None:
    model = ModelFacts(
        name="smollm2", path=str(needed(SMOL)), kind="generate", context=512, template="chatml"
    )
    child = start(LLAMA, model)
    answer = child.ask("/v1/chat/completions", messages=SAY, max_tokens=8, temperature=0)
    assert answer["choices"][0]["message"]["content"]
    assert child.end() == 0
