"""Every command: help with examples, tables for people, the API's JSON for programs."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from sublet.base.wire import rest
from sublet.cli import main
from sublet.sdk import ApiError

from .conftest import AT, Cloud, Run, sample

HERE = {"up", "setup", "tour", "recover-owner", "down"}
"""Those that act on this machine and not through a cloud's API."""

CALLS = {
    "status": "",
    "top": "--once",
    "audit-books": "",
    "offers": "",
    "prices": "",
    "quote": "cpu-spot --for 1h --notice 2m --max-price 0.05",
    "rent": "cpu-spot --no-ssh --yes",
    "run": "cpu-spot --yes -- echo hello",
    "ls": "",
    "show": "ins_1",
    "exec": "ins_1 -- true",
    "logs": "ins_1",
    "stop": "ins_1 --yes",
    "start": "ins_1",
    "terminate": "ins_1 --yes",
    "cancel": "job_1 --yes",
    "models list": "",
    "models show": "tiny",
    "models download": "tiny --out {out}",
    "models add": "tiny --file {toml} --licence MIT --quantization Q8_0 --context 512",
    "models price": "tiny --input 0.04 --cached 0 --output 0.16 --from 1d",
    "models grant": "tiny --to org_1",
    "models revoke": "tiny",
    "models lifecycle": "tiny legacy --end-of-life-on 2027-06-01",
    "deploy": "tiny --min 1 --max 2",
    "deployments list": "",
    "deployments show": "words",
    "deployments scale": "words --max 3",
    "deployments retire": "words --yes",
    "tokens": "--last 5",
    "limits": "prj_1 --tokens-per-day 1000",
    "gateways": "",
    "usage": "",
    "balance": "",
    "invoice": "",
    "invoices": "",
    "signup": "--email ada@example.org --organisation Ada",
    "whoami": "",
    "keys list": "",
    "keys create": "--name ci --expires 30d",
    "keys revoke": "key_1 --yes",
    "projects list": "",
    "projects create": "training",
    "members list": "",
    "members add": "Grace --email grace@example.org",
    "budgets list": "",
    "budgets set": "organisation month 50",
    "recall plan": "--devices 2 --by 10m --until 1h",
    "recall accept": "rec_1 --row 0 --wait",
    "recall cancel": "rec_1",
    "recall wait": "rec_1",
    "recall return": "rec_1",
    "recall list": "",
    "recall show": "rec_1",
    "recall shortfalls": "",
    "nodes": "",
    "devices": "",
    "cordon": "--immediate --break-notice --yes",
    "uncordon": "",
    "drain": "",
    "pools": "",
    "excess": "",
    "firm-shelf": "2 --until 30d",
    "rate-card show": "",
    "rate-card set": "{toml}",
    "costs show": "",
    "costs set": "{toml}",
    "statement": "",
    "orgs": "",
    "standing": "org_1 good --why checked --yes",
    "credit": "org_1 5.00 --reference one",
    "payment": "org_1 5.00 --reference two",
    "audit": "",
}
WITH_A_GATEWAY = {"chat", "bench"}
"""Those that talk to models: tests/cli/test_models_commands.py."""
NO_ANSWER_OF_THEIR_OWN = {"exec", "logs", "excess", "rate-card show"}


def leaves() -> Iterator[tuple[str, Any]]:
    def walk(found: Any, words: str) -> Iterator[tuple[str, Any]]:
        below = getattr(found, "commands", None)
        if not below:
            yield words.strip(), found
        for name, sub in (below or {}).items():
            yield from walk(sub, f"{words} {name}")

    yield from walk(typer.main.get_command(main.app), "")


@pytest.fixture
def words(tmp_path: Path) -> Any:
    toml = tmp_path / "some.toml"
    toml.write_text("a = 1\n")

    def of(name: str, *more: str) -> list[str]:
        call = CALLS[name].format(toml=toml, out=tmp_path / "out.gguf")
        before, dashes, after = call.partition("-- ")
        return [*name.split(), *shlex.split(before), *more, *shlex.split(dashes + after)]

    return of


def test_every_command_is_tried_here() -> None:
    assert {name for name, _ in leaves()} - HERE - WITH_A_GATEWAY - {"ssh"} == set(CALLS)


@pytest.mark.parametrize("name", sorted({n for n, _ in leaves()}))
def test_help_says_what_it_does_and_shows_examples(run: Run, name: str) -> None:
    done = run(*name.split(), "--help")
    assert done.code == 0
    assert "Examples:" in done.out
    flat = " ".join(done.out.split())
    assert f"$ sublet {name}" in flat or f"sublet {name}" in flat.partition("Examples:")[2]


@pytest.mark.parametrize("name", sorted({n for n, _ in leaves()} - {"up", "setup"}))
def test_every_command_takes_json(name: str) -> None:
    found = dict(leaves())[name]
    assert any("--json" in option.opts for option in found.params)


@pytest.mark.parametrize("bare", [False, True], ids=["full", "bare"])
@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_person_gets_text(cloud: Cloud, run: Run, words: Any, name: str, bare: bool) -> None:
    _prepare(cloud, name, bare)
    done = run(*words(name))
    assert done.code in (0, 1), done.err
    assert done.code == 0 or name in ("exec", "audit-books")
    assert done.out or done.err
    assert "Traceback" not in done.err
    assert "this should not happen" not in done.err


@pytest.mark.parametrize("name", sorted(set(CALLS) - NO_ANSWER_OF_THEIR_OWN))
def test_a_program_gets_the_apis_json(cloud: Cloud, run: Run, words: Any, name: str) -> None:
    _prepare(cloud, name, bare=False)
    done = run(*words(name, "--json"))
    found = json.loads(done.out)
    assert isinstance(found, dict)


def _prepare(cloud: Cloud, name: str, bare: bool) -> None:
    cloud.bare = bare
    if bare:
        # A list may be empty, but one pool and one node there always are.
        cloud.answers["/v1/pools"] = [[sample(rest.Pool, bare=True)]]
        cloud.answers["/v1/nodes"] = [[sample(rest.Node, bare=True)]]
        cloud.answers["/v1/me"] = [sample(rest.Me)]
    if name == "models download":
        whole = hashlib.sha256(b"".join(cloud.file)).hexdigest()
        model = sample(rest.CatalogueModel, bare=bare).model_copy(update={"sha256": whole})
        cloud.answers["/v1/catalogue/tiny"] = [model]
    if name.startswith("deployments ") and name != "deployments list":
        cloud.answers["/v1/deployments"] = [[sample(rest.Deployment, bare=bare)]]
    if name == "cancel":
        job = sample(rest.Workload, bare=bare).model_copy(update={"kind": "job"})
        cloud.answers["/v1/jobs/job_1"] = [job]
    if name in ("recall accept", "recall wait"):
        waiting = sample(rest.Recall, bare=bare)
        cloud.answers["/v1/recalls/rec_1/accept"] = [waiting]
        cloud.answers["/v1/recalls/rec_1"] = [waiting]
        cloud.answers["/v1/recalls/words"] = [waiting.model_copy(update={"state": "delivered"})]


def test_json_is_what_the_api_said_to_the_letter(cloud: Cloud, run: Run) -> None:
    said = sample(rest.Balance)
    cloud.answers["/v1/balance"] = [said]
    assert json.loads(run("balance", "--json").out) == json.loads(said.model_dump_json())


# What is sent.


def test_rent_asks_for_a_price_and_accepts_that_quote(
    cloud: Cloud, run: Run, tmp_path: Path
) -> None:
    key = tmp_path / "id.pub"
    key.write_text("ssh-ed25519 AAAA me\n")
    done = run(
        *("rent", "cpu-spot", "--name", "box", "--ssh-key", str(key), "--notice", "2m"),
        *("--max-price", "0.05", "-e", "A=b=c", "--yes"),
    )
    assert done.code == 0, done.err
    quoted, rented = [body for method, _, body in cloud.asked if method == "POST"]
    assert (quoted.notice_seconds, quoted.max_price_micros_per_device_hour) == (120, 50_000)
    assert (rented.quote_id, rented.name, rented.env) == ("words", "box", {"A": "b=c"})
    assert rented.ssh_keys == ["ssh-ed25519 AAAA me"]


def test_a_price_of_nothing_has_to_be_said(cloud: Cloud, run: Run) -> None:
    """An empty word is a variable that is not set, and no gift of tokens."""
    price = ("models", "price", "mine", "--cached", "0", "--output", "0.16", "--input")
    for word in ("", ".", "-0"):
        assert run(*price, word).code == 2
    assert cloud.asked == []
    assert run(*price, "0.00").code == 0
    _, _, sent = cloud.last()
    assert (sent["input_micros"], sent["cached_micros"], sent["output_micros"]) == (0, 0, 160_000)


def test_run_sends_the_words_after_the_dashes_as_they_are(cloud: Cloud, run: Run) -> None:
    done = run("run", "cpu-spot", "--yes", "--", "sh", "-c", "echo --json 'a b'")
    assert done.code == 0, done.err
    assert cloud.last()[2]["command"] == ["sh", "-c", "echo --json 'a b'"]


def test_a_recall_is_planned_in_units_of_the_shape(cloud: Cloud, run: Run) -> None:
    assert run("recall", "plan", "--devices", "8", "--shape", "4").code == 0
    method, path, body = cloud.last()
    assert (method, path) == ("POST", "/v1/recalls")
    assert body == {"pool_id": "words", "devices": 4, "count": 2}
    done = run("recall", "plan", "--devices", "7", "--shape", "4")
    assert done.code == 2
    assert "no multiple" in done.err


def test_follow_shows_the_output_and_exits_as_the_job(cloud: Cloud, run: Run) -> None:
    over = sample(rest.Workload).model_copy(update={"id": "job_1", "state": "completed"})
    cloud.answers["/v1/jobs"] = [over]
    cloud.answers["/v1/jobs/job_1"] = [over.model_copy(update={"exit_code": 3})]
    done = run("run", "cpu-spot", "--yes", "--follow", "--", "false")
    assert (done.code, done.out) == (1, "line one\nline two\n")
    assert "exit code 3" in done.err
    cloud.answers["/v1/jobs/job_1"] = [over.model_copy(update={"exit_code": 0})]
    assert run("run", "cpu-spot", "--yes", "--wait", "--", "true").code == 0


def test_exec_exits_as_the_command(cloud: Cloud, run: Run) -> None:
    result = rest.ExecResult(
        exit_code=7, stdout="out", stderr="err", truncated=False, timed_out=False
    )
    cloud.answers["/v1/instances/words/exec"] = [result]
    done = run("exec", "ins_1", "--", "false")
    assert (done.code, done.out, done.err) == (7, "out", "err")


def test_a_name_means_the_one_that_lives(cloud: Cloud, run: Run) -> None:
    base = sample(rest.Workload).model_copy(update={"name": "box"})
    old = base.model_copy(update={"id": "ins_old", "state": "terminated"})
    new = base.model_copy(update={"id": "ins_new", "state": "running"})
    cloud.answers["/v1/instances"] = [[old, new]]
    cloud.answers["/v1/jobs"] = [[]]
    assert json.loads(run("show", "box", "--json").out)["id"] == "ins_new"
    missing = run("show", "bix")
    assert missing.code == 1
    assert "called 'bix'" in missing.err
    cloud.answers["/v1/instances"] = [[new, new.model_copy(update={"id": "ins_2"})]]
    several = run("show", "box")
    assert several.code == 2
    assert "ins_new, ins_2" in several.err


def test_a_distance_is_into_the_past_for_books_and_the_future_for_plans() -> None:
    from sublet.cli import values
    from sublet.cli.money import window

    start, end = window("1d", "1h")
    assert abs((end - start).total_seconds() - 23 * 3600) < 5
    assert end < values.now() < values.instant("10m", "--by")
    assert values.seconds("1h30m", "--for") == 5400


# Refusals and mistakes.


def test_a_refusal_is_one_sentence_with_code_and_ways_on(cloud: Cloud, run: Run) -> None:
    refusal = ApiError(
        status=409,
        type="no_capacity",
        code="insufficient_capacity",
        message="No room for 4 devices now.",
        param="count",
        details={
            "earliest_at": "2026-11-25T12:00:00Z",
            "smaller_count": 2,
            "offer_to_wait": True,
        },
        request_id="req_1",
        retry_after_seconds=None,
    )
    cloud.answers["/v1/instances"] = [refusal]
    done = run("rent", "cpu-spot", "--no-ssh", "--yes")
    assert done.code == 1
    assert done.err == (
        "sublet: No room for 4 devices now. (insufficient_capacity; at count; "
        "earliest: 2026-11-25T12:00:00Z; now at most: --count 2; --queue waits for room)\n"
    )
    assert done.out == ""
    as_json = run("rent", "cpu-spot", "--no-ssh", "--yes", "--json")
    assert as_json.code == 1
    error = json.loads(as_json.out)["error"]
    assert (error["code"], error["details"]["smaller_count"]) == ("insufficient_capacity", 2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (["rent"], "Missing argument"),
        (["nonsense"], "No such command"),
        (["ls", "--nonsense"], "No such option"),
        (["quote", "x", "--for", "soon"], "--for is a duration"),
        (["quote", "x", "--max-price", "much"], "--max-price"),
        (["quote", "x", "--max-price", "-1"], "above zero"),
        (["rent", "x", "--no-ssh", "-e", "A", "--yes"], "--env is NAME=value"),
        (["usage", "--from", "2026-12-01", "--to", "2026-11-01"], "--from"),
        (["usage", "--from", "yesterday"], "--from is a time"),
        (["rate-card", "set", "/nowhere.toml"], "cannot be read"),
        (["budgets", "set", "planet", "day", "1"], "organisation, project or key"),
        (["signup", "--email", "nobody", "--organisation", "x"], "email"),
        (["rent", "x", "--no-ssh"], "--yes"),
    ],
)
def test_wrong_usage_exits_2_and_says_what_is_right(
    cloud: Cloud, run: Run, call: list[str], said: str
) -> None:
    done = run(*call)
    assert done.code == 2, done
    assert said in " ".join(done.err.split())
    assert "Traceback" not in done.err


def test_a_private_key_is_not_sent(cloud: Cloud, run: Run, tmp_path: Path) -> None:
    key = tmp_path / "id"
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nabc\n")
    done = run("rent", "x", "--yes", "--ssh-key", str(key))
    assert done.code == 2
    assert "private key" in done.err
    assert cloud.asked == []


def test_without_a_key_in_the_home_the_way_is_named(
    cloud: Cloud, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run("rent", "x", "--yes")
    assert done.code == 2
    assert "ssh-keygen -t ed25519" in done.err


def test_no_cloud_named_and_no_cloud_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run("ls")
    assert done.code == 1
    assert "SUBLET_URL" in done.err
    monkeypatch.setenv("SUBLET_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("sublet.sdk.transport.PAUSES_SECONDS", (0.0, 0.0, 0.0))
    done = run("ls")
    assert done.code == 1
    assert "SUBLET_KEY" in done.err
    monkeypatch.setenv("SUBLET_KEY", "sk_somebody")
    done = run("ls")
    assert done.code == 1
    assert "no answer from http://127.0.0.1:1" in done.err
    assert "sublet up" in done.err


def test_something_unforeseen_is_a_sentence_too(cloud: Cloud, run: Run) -> None:
    cloud.answers["/v1/balance"] = [ZeroDivisionError("odd")]
    done = run("balance")
    assert done.code == 1
    assert "ZeroDivisionError: odd" in done.err
    assert "Traceback" not in done.err


# The profile.


def test_signup_saves_a_private_profile_that_other_commands_use(
    cloud: Cloud, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run("signup", "--email", "a@b.c", "--organisation", "Ada", "--save")
    assert done.code == 0
    path = tmp_path / "config" / "sublet" / "profile.json"
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text()) == {"url": "http://cloud.test", "key": "words"}
    monkeypatch.delenv("SUBLET_URL")
    monkeypatch.delenv("SUBLET_KEY")
    assert run("whoami").code == 0


def test_a_saved_key_is_not_sent_to_another_address(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sublet.cli import profile

    profile.save(profile.Profile(url="http://one.test", key="sk_one"))
    assert profile.load() == profile.Profile(url="http://one.test", key="sk_one")
    monkeypatch.setenv("SUBLET_URL", "http://two.test")
    assert profile.load() == profile.Profile(url="http://two.test", key=None)


def test_an_owners_key_does_not_replace_another_clouds_profile() -> None:
    from sublet.cli import profile

    assert profile.save_owner("http://one.test", "sk_1")
    assert profile.save_owner("http://one.test", "sk_2")
    assert not profile.save_owner("http://two.test", "sk_3")
    assert profile.load().key == "sk_2"


def test_export_prints_lines_for_the_shell(cloud: Cloud, run: Run) -> None:
    done = run("signup", "--email", "a@b.c", "--organisation", "Ada", "--export")
    assert done.out == "export SUBLET_URL=http://cloud.test SUBLET_KEY=words\n"


# ssh.


def test_ssh_hands_over_to_the_systems_ssh(
    cloud: Cloud, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[list[str]] = []

    def execvp(file: str, argv: list[str]) -> None:
        seen.append(argv)
        raise SystemExit(0)

    monkeypatch.setattr("os.execvp", execvp)
    run("ssh", "ins_1", "-i", "/k", "-L", "1:localhost:2", "--", "nproc", "--all")
    (argv,) = seen
    assert argv[0] == "ssh"
    assert argv[-3:] == ["words", "nproc", "--all"]
    assert "HostKeyAlias=words" in argv
    assert f"UserKnownHostsFile={tmp_path / 'config' / 'sublet' / 'known_hosts'}" in argv
    for pair in (["-p", "1"], ["-l", "words"], ["-i", "/k"], ["-L", "1:localhost:2"]):
        assert argv[argv.index(pair[0]) + 1] == pair[1]


@pytest.mark.parametrize(
    ("state", "way"),
    [
        ("stopped", "sublet start"),
        ("terminated", "nothing left"),
        ("running", "sublet exec"),
        ("awaiting_capacity", "once it runs"),
    ],
)
def test_ssh_to_what_cannot_be_logged_in_to_names_the_way(
    cloud: Cloud, run: Run, state: str, way: str
) -> None:
    found = sample(rest.Workload).model_copy(update={"state": state, "ssh": None})
    cloud.answers["/v1/instances/ins_1"] = [found]
    done = run("ssh", "ins_1")
    assert done.code == 1
    assert way in done.err


def test_the_picture_of_top_shows_holders_money_and_recalls(cloud: Cloud, run: Run) -> None:
    uses = [rest.UseCount(use="sold_used", devices=3), rest.UseCount(use="idle", devices=1)]
    holders = [rest.HolderCount(organisation_id="org_a", party="sale", rank="spot", devices=3)]
    pool = rest.PoolStatus(pool_id="pol_1", name="home", devices=4, by_use=uses, holders=holders)
    recall = sample(rest.Recall).model_copy(update={"state": "noticing", "late": False})
    owner = rest.OwnerStatus(
        pools=[pool],
        earning_micros_per_hour=90_000,
        cost_micros_per_hour=40_000,
        recalls=[recall],
        trusted_tenants=False,
    )
    status = sample(rest.Status).model_copy(update={"owner": owner, "now": AT})
    cloud.answers["/v1/status"] = [status]
    out = run("top", "--once").out
    assert "sold 3" in out
    assert "idle 1" in out
    assert out.count("█") == 40
    assert "org_a" in out
    assert "earning 0.09 USD/h   cost 0.04 USD/h   margin 0.05 USD/h" in out
    assert "recall noticing" in out


def test_either_word_for_the_end_says_the_right_one(cloud: Cloud, run: Run) -> None:
    job = sample(rest.Workload).model_copy(update={"kind": "job"})
    cloud.answers["/v1/jobs/job_1"] = [job]
    done = run("terminate", "job_1", "--yes")
    assert (done.code, "sublet cancel job_1" in done.err) == (2, True)
    cloud.answers["/v1/instances/ins_1"] = [job.model_copy(update={"kind": "instance"})]
    done = run("cancel", "ins_1", "--yes")
    assert (done.code, "sublet terminate ins_1" in done.err) == (2, True)


def test_a_recall_is_the_newest_that_fits(cloud: Cloud, run: Run) -> None:
    old = sample(rest.Recall).model_copy(update={"id": "rec_old", "state": "delivered"})
    new = old.model_copy(update={"id": "rec_new", "state": "planned"})
    cloud.answers["/v1/recalls"] = [[old, new]]
    cloud.answers["/v1/recalls/rec_new/accept"] = [new.model_copy(update={"state": "noticing"})]
    cloud.answers["/v1/recalls/rec_old/return"] = [old.model_copy(update={"state": "returned"})]
    assert "rec_new" in run("recall", "accept").out
    assert "rec_old" in run("recall", "return").out
    cloud.answers["/v1/recalls"] = [[]]
    done = run("recall", "accept")
    assert (done.code, "sublet recall list" in done.err) == (1, True)
