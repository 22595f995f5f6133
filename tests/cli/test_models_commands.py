"""Commands for models: what they send, what they say, and talking to a gateway over a socket."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sublet.base.wire import rest
from sublet.cli.errors import _GATEWAY_WAYS
from sublet.cli.models import SPOOL_FAULT_WAYS
from sublet.gateway.errors import KINDS

from .conftest import AT, Cloud, Run, sample

WHOLE = b"GGUFweights"


BUSY = {"message": "Busy: try again.", "type": "server_error", "code": "model_overloaded"}


@dataclass
class Talk:
    """A gateway that says one thing to everybody."""

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    status: int = 200
    refuses_after: int | None = None
    """So many answers, and from then on refusals."""
    pieces: tuple[str, ...] = ("A ", "river.")
    error: dict[str, Any] | None = None
    """In place of the answer, or at its end where the status is 200."""
    is_cut: bool = False

    def events(self) -> Iterator[bytes]:
        for piece in self.pieces:
            choice = {"index": 0, "delta": {"content": piece}, "finish_reason": None}
            yield b"data: %b\n\n" % json.dumps({"choices": [choice]}).encode()
        if self.error is not None:
            yield b"data: %b\n\n" % json.dumps({"error": self.error}).encode()
        elif not self.is_cut:
            usage = {"prompt_tokens": 9, "completion_tokens": len(self.pieces)}
            yield b"data: %b\n\n" % json.dumps({"choices": [], "usage": usage}).encode()
            yield b"data: [DONE]\n\n"


@pytest.fixture
def talk(cloud: Cloud) -> Iterator[Talk]:
    told = Talk()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["content-length"]))
            with lock:
                told.asked.append(json.loads(raw))
                told.keys.add(self.headers["authorization"])
                if told.refuses_after is not None and len(told.asked) > told.refuses_after:
                    told.status, told.error = 503, BUSY
            self.send_response(told.status)
            if told.status != 200:
                self.send_header("retry-after", "7")
            self.end_headers()
            if told.status != 200:
                self.wfile.write(json.dumps({"error": told.error}).encode())
                return
            for event in told.events():
                self.wfile.write(event)

        def log_message(self, format: str, *args: Any) -> None:
            """Nobody reads it."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    told.url = f"http://127.0.0.1:{server.server_address[1]}"
    cloud.answers["/v1/status"] = [sample(rest.Status).model_copy(update={"gateway_url": told.url})]
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


# Talking.


def test_chat_prints_what_the_model_says_and_what_it_took(run: Run, talk: Talk) -> None:
    done = run("chat", "tiny", "Where?", "--system", "Be brief.", "--max-tokens", "5")
    assert (done.code, done.out) == (0, "A river.\n")
    assert "9 tokens in, 2 out" in done.err
    (asked,) = talk.asked
    assert asked["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where?"},
    ]
    assert (asked["model"], asked["max_tokens"], asked["stream"]) == ("tiny", 5, True)
    assert "temperature" not in asked
    assert "service_tier" not in asked
    assert talk.keys == {"Bearer sk_test"}


def test_chat_takes_its_question_from_a_pipe_and_asks_for_flex(
    run: Run, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("From a pipe."))
    done = run("chat", "tiny", "-", "--tier", "flex", "--temperature", "0", "--json")
    said = json.loads(done.out)
    assert (said["answer"], said["input_tokens"], said["output_tokens"]) == ("A river.", 9, 2)
    (asked,) = talk.asked
    assert asked["messages"] == [{"role": "user", "content": "From a pipe."}]
    assert (asked["service_tier"], asked["temperature"]) == ("flex", 0)
    nothing = run("chat", "tiny")
    assert (nothing.code, "say what to ask" in nothing.err) == (2, True)


def test_a_conversation_keeps_what_was_said(
    run: Run, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["One?", "Two?", ""])
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert run("chat", "tiny").code == 0
    assert [m["content"] for m in talk.asked[1]["messages"]] == ["One?", "A river.", "Two?"]


def test_a_refusal_of_the_gateway_is_a_sentence_with_its_code(run: Run, talk: Talk) -> None:
    talk.status = 402
    talk.error = {
        "message": "The organisation's credit is used up: add credit.",
        "type": "insufficient_quota",
        "code": "insufficient_quota",
        "param": None,
    }
    done = run("chat", "tiny", "Where?")
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "sublet: The organisation's credit is used up: add credit. (insufficient_quota)\n"
    )
    as_json = run("chat", "tiny", "Where?", "--json")
    assert json.loads(as_json.out)["error"]["code"] == "insufficient_quota"


@pytest.mark.parametrize("is_told", [True, False], ids=["with a last event", "without a word"])
def test_an_answer_that_breaks_off_is_no_success(run: Run, talk: Talk, is_told: bool) -> None:
    if is_told:
        talk.error = {"message": "It broke off.", "type": "x", "code": "stream_interrupted"}
    else:
        talk.is_cut = True
    done = run("chat", "tiny", "Where?")
    assert (done.code, done.out) == (1, "A river.\n")
    assert ("stream_interrupted" if is_told else "broke off before its end") in done.err


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("no_replica", "ask again in 7 s; the owner sees by `sublet deployments show tiny`"),
        ("model_overloaded", "`sublet deployments scale tiny --max N`"),
        ("snapshot_stale", "is `sublet up` running?"),
        ("credit_unknown", "ask again in 7 s; if it stays so"),
        ("unavailable", "`sublet gateways`"),
    ],
)
def test_a_gateway_that_cannot_serve_gets_advice_by_its_code(
    run: Run, talk: Talk, code: str, said: str
) -> None:
    talk.status = 503
    talk.error = {"message": "Not now.", "type": "server_error", "code": code}
    done = run("chat", "tiny", "Where?")
    refusal, advice = done.err.splitlines()
    assert (done.code, refusal) == (1, f"sublet: Not now. ({code})")
    assert advice.startswith("sublet: ")
    assert said in advice
    assert "the log has more under it" not in done.err


def test_a_stream_that_was_cut_is_advised_without_a_pause(run: Run, talk: Talk) -> None:
    talk.error = {"message": "Credit ended.", "type": "x", "code": "credit_exhausted"}
    done = run("chat", "tiny", "Where?")
    assert (done.code, done.out) == (1, "A river.\n")
    assert "`sublet balance`" in done.err


def test_every_fault_of_the_gateways_own_has_advice() -> None:
    own = {code for code, (kind, _) in KINDS.items() if kind == "server_error"}
    assert own <= set(_GATEWAY_WAYS) <= set(KINDS)


def test_without_a_gateway_it_says_so(cloud: Cloud, run: Run) -> None:
    cloud.answers["/v1/status"] = [sample(rest.Status).model_copy(update={"gateway_url": None})]
    done = run("chat", "tiny", "Where?")
    assert (done.code, "no gateway" in done.err) == (1, True)


# The bench.


def serving(replicas: int, devices: int, slots: int) -> rest.Deployment:
    ready = sample(rest.Replica).model_copy(update={"state": "ready"})
    return sample(rest.Deployment).model_copy(
        update={"model": "tiny", "devices": devices, "slots": slots, "replicas": [ready] * replicas}
    )


def test_bench_fills_the_slots_and_reckons_a_device_hour(
    cloud: Cloud, run: Run, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    cloud.answers["/v1/deployments"] = [[serving(2, 3, 2)]]
    price = sample(rest.TokenPrice).model_copy(
        update={"tier": "default", "output_micros": 1_000_000}
    )
    model = sample(rest.CatalogueModel).model_copy(update={"prices": [price], "version": 4})
    cloud.answers["/v1/catalogue/tiny"] = [model]
    # Time passes by the look, so that the measuring ends without waiting.
    ticks = iter(range(0, 10_000_000_000_000, 250_000_000))
    lock = threading.Lock()

    def tick() -> int:
        with lock:
            return next(ticks)

    monkeypatch.setattr("sublet.cli.tokens.read_boot_ns", tick)
    done = run("bench", "tiny", "--seconds", "5", "--keep", "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert (told["replicas"], told["devices_each"], told["side_by_side"]) == (2, 3, 4)
    assert told["requests"] == len(talk.asked) > 0
    assert told["output_tokens"] == 2 * told["requests"]
    hourly = int(told["output_tokens"] / told["seconds"] * 3600 / 6)
    assert told["output_tokens_per_device_hour"] == pytest.approx(hourly, abs=1)
    assert told["output_revenue_micros_per_device_hour"] == told["output_tokens_per_device_hour"]
    assert cloud.last() == (
        "PATCH",
        "/v1/catalogue/tiny",
        {"tokens_per_device_hour": told["output_tokens_per_device_hour"]},
    )


def test_bench_says_why_nothing_was_measured(cloud: Cloud, run: Run, talk: Talk) -> None:
    cloud.answers["/v1/deployments"] = [[serving(0, 1, 4)]]
    done = run("bench", "tiny")
    assert (done.code, "no replica that is ready" in done.err) == (1, True)
    cloud.answers["/v1/deployments"] = [[serving(1, 1, 1)]]
    talk.status, talk.error = 503, BUSY
    done = run("bench", "tiny", "--seconds", "2")
    assert (done.code, "model_overloaded" in done.err) == (1, True)
    assert "`sublet deployments scale tiny --max N`" in done.err
    cloud.answers["/v1/deployments"] = [[]]
    done = run("bench", "tiny")
    assert (done.code, "is not deployed" in done.err) == (1, True)


def test_bench_gives_no_figure_where_some_were_refused(cloud: Cloud, run: Run, talk: Talk) -> None:
    """What the others made is too little, and a price may come from it."""
    cloud.answers["/v1/deployments"] = [[serving(1, 1, 4)]]
    cloud.answers["/v1/catalogue/tiny"] = [sample(rest.CatalogueModel)]
    talk.refuses_after = 8
    done = run("bench", "tiny", "--seconds", "20", "--keep", "--json")
    assert (done.code, json.loads(done.out)["error"]["code"]) == (1, "model_overloaded")
    assert all(method != "PATCH" for method, _, _ in cloud.asked)


# The catalogue.


def test_a_list_says_what_can_be_done_with_each(cloud: Cloud, run: Run) -> None:
    base = sample(rest.CatalogueModel).model_copy(update={"prices": [], "lifecycle": "active"})
    cloud.answers["/v1/catalogue"] = [
        [
            base.model_copy(update={"name": "a", "may_be_called": True}),
            base.model_copy(update={"name": "b", "may_be_called": False}),
            base.model_copy(update={"name": "c", "deployment_id": None, "may_be_deployed": False}),
            base.model_copy(update={"name": "d", "lifecycle": "end_of_life"}),
        ]
    ]
    told = [line for line in run("models", "list").out.splitlines() if line.strip()]
    lines = {line.split()[0]: line for line in told}
    assert "not for sale" in lines["a"]
    assert "deployed" in lines["a"]
    assert "no grant" in lines["b"]
    assert "weights missing" in lines["c"]
    assert "ended" in lines["d"]


def test_a_download_is_checked_before_it_has_its_name(
    cloud: Cloud, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "tiny.gguf"
    model = sample(rest.CatalogueModel).model_copy(
        update={"sha256": hashlib.sha256(WHOLE).hexdigest()}
    )
    cloud.answers["/v1/catalogue/tiny"] = [model]
    assert run("models", "download", "tiny", "--out", str(out)).code == 0
    assert out.read_bytes() == WHOLE
    out.unlink()
    cloud.file = [b"GGUF", b"something else"]
    done = run("models", "download", "tiny", "--out", str(out))
    assert (done.code, "its sha256 differs" in done.err) == (1, True)
    assert list(tmp_path.glob("*.gguf*")) == []


def test_prices_are_dollars_and_may_be_nothing(cloud: Cloud, run: Run) -> None:
    words = ("models", "price", "tiny", "--input", "0.04", "--output", "1.5")
    assert run(*words, "--cached", "0").code == 0
    body = {"tier": "default", "input_micros": 40_000, "cached_micros": 0}
    assert cloud.last()[2] == {**body, "output_micros": 1_500_000}
    assert run(*words, "--cached", "0.00", "--tier", "flex", "--from", "1d").code == 0
    sent = cloud.last()[2]
    assert (sent["tier"], sent["effective_from"] > AT.isoformat()[:4]) == ("flex", True)
    for wrong in ("", "much", "-1"):
        done = run(*words, "--cached", wrong)
        assert (done.code, "--cached" in done.err) == (2, True)


def test_a_file_of_ones_own_is_named_from_the_root(cloud: Cloud, run: Run, tmp_path: Path) -> None:
    words = ("--licence", "MIT", "--quantization", "Q8_0", "--context", "512", "--sealed")
    done = run("models", "add", "own", "--file", str(tmp_path / "x" / ".." / "m.gguf"), *words)
    assert done.code == 0, done.err
    method, path, body = cloud.last()
    assert (method, path) == ("POST", "/v1/catalogue")
    assert (body["path"], body["access"]) == (str(tmp_path / "m.gguf"), "sealed")
    assert (body["kind"], body["licence_allows_download"]) == ("generate", False)


def test_grants_are_everybodys_where_nobody_is_named(cloud: Cloud, run: Run) -> None:
    assert run("models", "grant", "tiny").code == 0
    assert cloud.last() == ("POST", "/v1/catalogue/tiny/grants", {"organisation_id": "*"})
    cloud.answers["/v1/catalogue/tiny/grants"] = [[]]
    done = run("models", "revoke", "tiny", "--to", "org_1")
    assert ("DELETE", "/v1/catalogue/tiny/grants/org_1", None) in cloud.asked
    assert "its replicas end" in done.out


def test_dates_are_announced_beside_the_stage(cloud: Cloud, run: Run) -> None:
    done = run(
        *("models", "lifecycle", "tiny", "active", "--legacy-on", "2027-01-01"),
        *("--end-of-life-on", "2027-06-01"),
    )
    assert done.code == 0, done.err
    assert cloud.last()[2] == {
        "lifecycle": "active",
        "legacy_on": "2027-01-01",
        "end_of_life_on": "2027-06-01",
    }
    assert run("models", "lifecycle", "tiny", "asleep").code == 2


# Deployments.


def test_deploy_asks_for_as_many_as_the_minimum_and_waits_for_the_first(
    cloud: Cloud, run: Run
) -> None:
    starting = serving(1, 1, 4).model_copy(update={"id": "dep_1", "failure": None})
    first = starting.replicas[0].model_copy(update={"state": "starting"})
    cloud.answers["/v1/deployments"] = [starting.model_copy(update={"replicas": [first]})]
    cloud.answers["/v1/deployments/dep_1"] = [
        starting.model_copy(update={"replicas": []}),
        starting,
    ]
    done = run("deploy", "tiny", "--min", "2", "--drain", "45s", "--idle", "10m", "--wait")
    assert done.code == 0, done.err
    (sent,) = [body for method, _, body in cloud.asked if method == "POST"]
    assert (sent.min_replicas, sent.max_replicas, sent.pool_id) == (2, 2, None)
    assert (sent.drain_seconds, sent.idle_seconds, sent.target) == (45, 600, 4)
    assert "ready" in done.out
    assert "each        1 device, 4 requests" in done.out


def test_a_deployment_is_named_by_its_model_or_its_id(cloud: Cloud, run: Run) -> None:
    found = serving(1, 1, 4).model_copy(update={"id": "dep_1", "version": 7})
    cloud.answers["/v1/deployments"] = [[found]]
    for word in ("tiny", "dep_1"):
        assert run("deployments", "scale", word, "--min", "0", "--max", "2").code == 0
        path = "/v1/deployments/dep_1"
        assert cloud.last() == ("PATCH", path, {"min_replicas": 0, "max_replicas": 2})
    nothing = run("deployments", "scale", "tiny")
    assert (nothing.code, "say what to change" in nothing.err) == (2, True)
    unknown = run("deployments", "show", "large")
    assert (unknown.code, "is not deployed" in unknown.err) == (1, True)


def test_retiring_asks_first(cloud: Cloud, run: Run) -> None:
    found = serving(1, 1, 4).model_copy(update={"id": "dep_1"})
    cloud.answers["/v1/deployments"] = [[found]]
    done = run("deployments", "retire", "tiny")
    assert (done.code, "--yes" in done.err) == (2, True)
    assert [method for method, _, _ in cloud.asked if method == "DELETE"] == []
    assert run("deployments", "retire", "tiny", "--yes").code == 0
    assert ("DELETE", "/v1/deployments/dep_1", None) in cloud.asked


# What was used, and by what.


def test_the_last_requests_are_shown_newest_last(cloud: Cloud, run: Run) -> None:
    base = sample(rest.TokenUsage)
    newest_first = [
        base.model_copy(update={"id": f"req_{n}", "outcome": "client_gone"}) for n in (4, 3, 2, 1)
    ]
    cloud.answers["/v1/token-usage"] = [newest_first]
    out = run("tokens", "--last", "2").out
    assert [word for word in out.split() if word.startswith("req_")] == ["req_3", "req_4"]
    assert "client_gone" in out
    # No more is asked for than is shown.
    assert cloud.queries["/v1/token-usage"] == {"limit": 2, "order": "newest"}
    told = json.loads(run("tokens", "--last", "3", "--json").out)["data"]
    assert [row["id"] for row in told] == ["req_2", "req_3", "req_4"]
    run("tokens", "--last", "5000")
    assert cloud.queries["/v1/token-usage"] == {"limit": rest.PAGE_LIMIT, "order": "newest"}


def test_tokens_of_one_project(cloud: Cloud, run: Run) -> None:
    assert run("tokens", "--project", "prj_1").code == 0
    assert cloud.queries["/v1/token-usage"]["project_id"] == "prj_1"


def test_usage_that_is_not_booked_is_said_with_the_ways_on(cloud: Cloud, run: Run) -> None:
    well = sample(rest.Gateway).model_copy(update={"name": "gw-0", "spool_faults": []})
    cloud.answers["/v1/gateways"] = [[well]]
    assert "booked" not in run("gateways").out
    fault = rest.SpoolFault(
        life="gw-1/1790000000000000", started_at=AT, why="gw-1/1790000000000000/1 at byte 9: torn"
    )
    hurt = well.model_copy(update={"name": "gw-1", "spool_faults": [fault]})
    cloud.answers["/v1/gateways"] = [[well, hurt]]
    done = run("gateways")
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    begun = lines.index(
        "usage of gw-1/1790000000000000 (since 2026-11-25 10:00:00Z) is not booked on:"
    )
    assert lines[begun + 1] == "  gw-1/1790000000000000/1 at byte 9: torn"
    assert "\n".join(lines[begun + 2 :]) == SPOOL_FAULT_WAYS
    told = json.loads(run("gateways", "--json").out)["data"]
    assert [row["spool_faults"] for row in told] == [[], [fault.model_dump(mode="json")]]


@pytest.mark.parametrize(
    ("is_alive", "is_cut_off", "word"),
    [(True, False, "alive"), (True, True, "cut off"), (False, True, "dead")],
)
def test_a_gateway_stands_in_one_word(
    cloud: Cloud, run: Run, is_alive: bool, is_cut_off: bool, word: str
) -> None:
    found = sample(rest.Gateway).model_copy(
        update={
            "is_alive": is_alive,
            "is_cut_off": is_cut_off,
            "snapshot": 6,
            "newest_snapshot": 7,
            "refusals": {"no_replica": 3, "model_overloaded": 1},
        }
    )
    cloud.answers["/v1/gateways"] = [[found]]
    out = run("gateways").out
    assert word in out
    assert "6 of 7" in out
    assert "model_overloaded 1, no_replica 3" in out


def test_limits_of_keys_projects_and_organisations_are_sent_to_their_scope(
    cloud: Cloud, run: Run
) -> None:
    assert run("limits", "prj_1", "--tokens-per-day", "1000", "--model", "tiny").code == 0
    expected = {"tokens_per_day": 1000, "models": ["tiny"]}
    assert cloud.last() == ("PUT", "/v1/limits/project/prj_1", expected)
    assert run("limits", "org_1", "--requests-per-minute", "60").code == 0
    assert cloud.last() == ("PUT", "/v1/limits/organisation/org_1", {"requests_per_minute": 60})
    done = run("keys", "create", "--name", "ci", "--tokens-per-minute", "500", "--model", "tiny")
    assert done.code == 0, done.err
    limits = cloud.last()[2]["limits"]
    assert (limits["tokens_per_minute"], limits["models"]) == (500, ["tiny"])
