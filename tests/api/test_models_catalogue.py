"""The catalogue over REST: what is listed, added, priced, granted and handed out, and to whom."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import struct
from datetime import timedelta
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from sublet.base.store import StoreUnavailable
from sublet.base.wire import rest
from sublet.sdk import ApiError, Client
from sublet.shops import models
from sublet.shops.models.keys import KeyEncryptionKey

MUSE = Path(str(files("sublet.shops.models") / "carried" / "muse-tiny.gguf"))
KEK = KeyEncryptionKey(bytes(range(32)))


def refused(call: Any, status: int, code: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call()
    assert (caught.value.status, caught.value.code) == (status, code), caught.value
    return caught.value


def a_model(**differs: Any) -> rest.ModelCreate:
    return rest.ModelCreate(
        **{
            "name": "my-model",
            "provider": "us",
            "licence": "PSF-2.0",
            "licence_allows_download": True,
            "path": str(MUSE),
            "quantization": "Q8_0",
            "context": 512,
            **differs,
        }
    )


def can_seal(world: Any, folder: Path) -> None:
    app = world.http.app
    app.state.deps = dataclasses.replace(
        app.state.deps, models_folder=folder, sealing_key=lambda: KEK
    )


def priced(owner: Client, name: str = "my-model", **differs: Any) -> rest.TokenPrice:
    body = {"input_micros": 40_000, "cached_micros": 20_000, "output_micros": 160_000}
    return owner.catalogue.set_price(
        name, rest.TokenPriceCreate(**{"tier": "default", **body, **differs})
    )


# ---- adding -------------------------------------------------------------------------------------


def test_a_model_is_added_with_its_digest_and_seen_by_everybody(world: Any) -> None:
    made = world.owner.catalogue.add(a_model())
    assert made.sha256 == hashlib.sha256(MUSE.read_bytes()).hexdigest()
    assert made.size_bytes == MUSE.stat().st_size
    assert (made.max_output, made.prices, made.deployment_id) == (512, [], None)
    assert (made.may_be_deployed, made.hint, made.may_be_downloaded) == (True, None, True)
    client, _ = world.newcomer()
    [seen] = client.catalogue.list()
    assert seen == made
    assert client.catalogue.get("my-model") == made
    assert str(MUSE) not in seen.model_dump_json()
    [entry] = [e for e in world.owner.audit.list() if e.action == "add_model"]
    assert (entry.target, entry.result) == ("my-model", "ok")


@pytest.mark.parametrize(
    ("differs", "param"),
    [
        ({"path": "/nowhere/at/all.gguf"}, "path"),
        ({"path": __file__}, "path"),
        ({"path": "/"}, "path"),
        ({"context": 513}, "context"),
        ({"max_output": 600}, "context"),
        ({"server": "other"}, "server"),
        ({"server": "vllm", "access": "sealed"}, "server"),
        ({"kind": "embed", "access": "sealed"}, "kind"),
    ],
)
def test_what_cannot_be_served_is_refused_by_its_field(
    world: Any, differs: dict[str, Any], param: str
) -> None:
    error = refused(lambda: world.owner.catalogue.add(a_model(**differs)), 422, "model_invalid")
    assert error.param == param
    assert list(world.owner.catalogue.list()) == []
    assert [e.result for e in world.owner.audit.list() if e.action == "add_model"] == [
        "model_invalid"
    ]


def test_a_file_that_is_damaged_is_no_model(world: Any, tmp_path: Path) -> None:
    for number, size in enumerate((4, 30, 400, 4000)):
        torn = tmp_path / f"{number}.gguf"
        torn.write_bytes(MUSE.read_bytes()[:size])
        error = refused(
            lambda torn=torn: world.owner.catalogue.add(a_model(path=str(torn))),
            422,
            "model_invalid",
        )
        assert error.param == "path"


def test_what_lies_there_is_not_waited_for(world: Any, tmp_path: Path) -> None:
    """A pipe that nobody writes to would hold a thread of the API for ever."""
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    nested = tmp_path / "nested.gguf"
    lists = struct.pack("<IQ", 9, 1) * 5000
    head = struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<I", 9)
    nested.write_bytes(b"GGUF" + head + lists)
    for path in (pipe, nested):
        add = partial(world.owner.catalogue.add, a_model(path=str(path)))
        assert refused(add, 422, "model_invalid").param == "path"


def test_another_file_than_was_meant_is_refused(world: Any, tmp_path: Path) -> None:
    error = refused(
        lambda: world.owner.catalogue.add(a_model(sha256="0" * 64)), 409, "weights_changed"
    )
    assert error.param == "sha256"
    can_seal(world, tmp_path)
    refused(
        lambda: world.owner.catalogue.add(a_model(sha256="0" * 64, access="sealed")),
        409,
        "weights_changed",
    )
    assert list(tmp_path.glob("*.sealed")) == []


def test_a_name_is_used_once_and_a_repeated_request_is_answered_as_before(world: Any) -> None:
    owner = world.owner
    made = owner.catalogue.add(a_model(), idempotency_key="once")
    assert owner.catalogue.add(a_model(), idempotency_key="once") == made
    refused(lambda: owner.catalogue.add(a_model()), 409, "model_exists")


def test_a_sealed_one_is_sealed_on_its_way_in(world: Any, tmp_path: Path) -> None:
    refused(lambda: world.owner.catalogue.add(a_model(access="sealed")), 503, "sealing_key_missing")
    can_seal(world, tmp_path)
    made = world.owner.catalogue.add(a_model(access="sealed"), idempotency_key="once")
    assert world.owner.catalogue.add(a_model(access="sealed"), idempotency_key="once") == made
    refused(lambda: world.owner.catalogue.add(a_model(access="sealed")), 409, "model_exists")
    [kept] = tmp_path.glob("*.sealed")
    data, plain = kept.read_bytes(), MUSE.read_bytes()
    assert plain[1000:1064] not in data
    assert not data.startswith(b"GGUF")
    assert (made.access, made.may_be_downloaded) == ("sealed", False)
    assert made.sha256 == hashlib.sha256(plain).hexdigest()
    with world.store.read() as tx:
        wrapped = models.keys.find_key(tx, "my-model")
        assert models.get_model(tx, "my-model").path == str(kept.resolve())
    assert wrapped is not None
    assert len(KEK.unwrap(wrapped)) == 32


def test_what_was_added_stays_though_its_answer_was_lost(world: Any, tmp_path: Path) -> None:
    can_seal(world, tmp_path)

    def lose() -> None:
        raise StoreUnavailable("The connection was lost as it was committed.")

    world.store.on_commit = lose
    # The client asks again, and is given the answer that was kept.
    assert world.owner.catalogue.add(a_model(access="sealed")).name == "my-model"
    world.store.on_commit = None
    with world.store.read() as tx:
        assert Path(models.get_model(tx, "my-model").path).is_file()
    refused(lambda: world.owner.catalogue.add(a_model(access="sealed")), 409, "model_exists")
    assert len(list(tmp_path.glob("*.sealed"))) == 1


# ---- who may ------------------------------------------------------------------------------------


def test_consumers_read_and_change_nothing(world: Any) -> None:
    world.owner.catalogue.add(a_model())
    client, _ = world.newcomer()
    for deed in (
        lambda: client.catalogue.add(a_model(name="x")),
        lambda: client.catalogue.change("my-model", rest.ModelPatch(lifecycle="legacy"), version=1),
        lambda: priced(client),
        lambda: client.catalogue.grant("my-model"),
        lambda: list(client.catalogue.grants("my-model")),
        lambda: client.catalogue.revoke("my-model"),
        lambda: client.deployments.create(rest.DeploymentCreate(model="my-model")),
        lambda: list(client.deployments.list()),
        lambda: list(client.gateways.list()),
    ):
        refused(deed, 403, "forbidden")
    refused(lambda: world.caller(None).catalogue.get("my-model"), 401, "invalid_api_key")
    tried = [entry.action for entry in client.audit.list() if entry.result == "forbidden"]
    assert tried == [
        "add_model",
        "change_model",
        "set_model_price",
        "grant_model",
        "revoke_model_grant",
        "deploy_model",
    ]


def test_the_owners_members_deploy_but_do_not_manage_the_catalogue(world: Any) -> None:
    owner = world.owner
    owner.catalogue.add(a_model())
    member = world.caller(owner.keys.create(rest.KeyCreate(name="m", role="member")).secret)
    refused(lambda: priced(member), 403, "forbidden")
    made = member.deployments.create(rest.DeploymentCreate(model="my-model"))
    assert owner.catalogue.get("my-model").deployment_id == made.id
    viewer = world.caller(owner.keys.create(rest.KeyCreate(name="v", role="viewer")).secret)
    assert [one.id for one in viewer.deployments.list()] == [made.id]
    refused(lambda: viewer.deployments.retire(made.id), 403, "forbidden")


# ---- prices and lifecycle -----------------------------------------------------------------------


def test_prices_are_versions_that_never_change(world: Any) -> None:
    owner = world.owner
    owner.catalogue.add(a_model())
    first = priced(owner)
    later = priced(owner, output_micros=99, effective_from=world.clock.now() + timedelta(hours=1))
    flex = priced(owner, tier="flex", input_micros=20_000, output_micros=80_000)
    assert owner.catalogue.get("my-model").prices == [first, flex]
    assert list(owner.catalogue.prices("my-model")) == [first, later, flex]
    world.clock.advance_to(world.clock.now() + timedelta(hours=2))
    assert owner.catalogue.get("my-model").prices == [later, flex]
    with world.store.read() as tx:
        assert models.price_of(tx, first.version).output_micros == 160_000
    past = world.clock.now() - timedelta(seconds=1)
    assert (
        refused(lambda: priced(owner, effective_from=past), 422, "invalid_request").param
        == "effective_from"
    )
    assert (
        refused(lambda: priced(owner, cached_micros=50_000), 422, "invalid_request").param
        == "cached_micros"
    )
    refused(lambda: priced(owner, "none-such"), 404, "model_not_found")


def test_a_lifecycle_is_announced_comes_true_and_refuses_at_its_end(world: Any) -> None:
    owner = world.owner
    owner.catalogue.add(a_model())
    today = world.clock.now().date()
    dates = {"legacy_on": today, "end_of_life_on": today + timedelta(days=1)}
    changed = owner.catalogue.change("my-model", rest.ModelPatch(**dates), version=1)
    assert (changed.lifecycle, changed.version) == ("legacy", 2)
    refused(
        lambda: owner.catalogue.change("my-model", rest.ModelPatch(**dates), version=1),
        412,
        "stale_version",
    )
    answer = world.ask("PATCH", "/v1/catalogue/my-model", world.owner_secret, {})
    assert answer.status_code == 428
    wrong = rest.ModelPatch(legacy_on=today + timedelta(days=3))
    error = refused(
        lambda: owner.catalogue.change("my-model", wrong, version=2), 422, "invalid_request"
    )
    assert error.param == "end_of_life_on"
    world.clock.advance_to(world.clock.now() + timedelta(days=1))
    ended = owner.catalogue.get("my-model")
    assert (ended.lifecycle, ended.may_be_deployed) == ("end_of_life", False)
    assert "end of life" in (ended.hint or "")
    refused(
        lambda: owner.deployments.create(rest.DeploymentCreate(model="my-model")),
        409,
        "model_ended",
    )


def test_what_was_measured_is_kept(world: Any) -> None:
    world.owner.catalogue.add(a_model())
    patch = rest.ModelPatch(tokens_per_device_hour=420_000)
    assert world.owner.catalogue.change("my-model", patch, version=1).tokens_per_device_hour == (
        420_000
    )


# ---- grants -------------------------------------------------------------------------------------


def test_a_sealed_model_is_called_by_grant(world: Any, tmp_path: Path) -> None:
    can_seal(world, tmp_path)
    owner = world.owner
    owner.catalogue.add(a_model(access="sealed"))
    client, made = world.newcomer()
    other, _ = world.newcomer("Other")
    assert owner.catalogue.get("my-model").may_be_called
    assert not client.catalogue.get("my-model").may_be_called
    grant = owner.catalogue.grant("my-model", made.organisation.id)
    assert owner.catalogue.grant("my-model", made.organisation.id) == grant
    assert client.catalogue.get("my-model").may_be_called
    assert not other.catalogue.get("my-model").may_be_called
    owner.catalogue.grant("my-model")
    assert other.catalogue.get("my-model").may_be_called
    assert [g.organisation_id for g in owner.catalogue.grants("my-model")] == [
        made.organisation.id,
        "*",
    ]
    owner.catalogue.revoke("my-model")
    owner.catalogue.revoke("my-model", made.organisation.id)
    assert not client.catalogue.get("my-model").may_be_called
    refused(lambda: owner.catalogue.revoke("my-model"), 404, "grant_not_found")
    refused(lambda: owner.catalogue.grant("my-model", "org_none"), 404, "organisation_not_found")
    done = [e.action for e in owner.audit.list() if e.target == "my-model" and e.result == "ok"]
    assert done.count("grant_model") == 3
    assert done.count("revoke_model_grant") == 2


def test_an_open_model_needs_no_grant(world: Any) -> None:
    world.owner.catalogue.add(a_model())
    refused(lambda: world.owner.catalogue.grant("my-model"), 422, "invalid_request")


# ---- weights ------------------------------------------------------------------------------------


def test_open_weights_are_downloaded_with_their_digest(world: Any) -> None:
    made = world.owner.catalogue.add(a_model())
    client, signed = world.newcomer()
    data = b"".join(client.catalogue.weights("my-model"))
    assert hashlib.sha256(data).hexdigest() == made.sha256
    path = "/v1/catalogue/my-model/weights"
    answer = world.ask("GET", path, signed.secret)
    assert answer.headers["x-sha256"] == made.sha256
    digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert answer.headers["content-length"] == str(len(data))
    assert "my-model.gguf" in answer.headers["content-disposition"]
    part = world.ask("GET", path, signed.secret, range="bytes=4-7")
    assert (part.status_code, part.content) == (206, data[4:8])
    rest_of_it = world.ask("GET", path, signed.secret, range="bytes=2999480-")
    assert (rest_of_it.status_code, rest_of_it.content) == (206, data[2999480:])
    actors = [e.actor for e in world.owner.audit.list() if e.action == "download_weights"]
    assert actors == [signed.key.id] * 4
    assert world.ask("HEAD", path, signed.secret).headers["content-length"] == str(len(data))


@pytest.mark.parametrize(
    "asked", ["bytes=9999999-", "bytes=5-4", "bytes=a-b", "lines=1-2", "bytes=0-1,4-5", "", "-"]
)
def test_a_range_that_cannot_be_had_is_the_whole_file(world: Any, asked: str) -> None:
    made = world.owner.catalogue.add(a_model())
    path = "/v1/catalogue/my-model/weights"
    answer = world.ask("GET", path, world.owner_secret, range=asked)
    assert (answer.status_code, len(answer.content)) == (200, made.size_bytes)


def test_sealed_and_forbidden_weights_are_not(world: Any, tmp_path: Path) -> None:
    can_seal(world, tmp_path)
    owner = world.owner
    owner.catalogue.add(a_model(access="sealed"))
    owner.catalogue.add(a_model(name="shy", licence_allows_download=False))
    client, _ = world.newcomer()
    for who in (client, owner):
        refused(lambda who=who: list(who.catalogue.weights("my-model")), 403, "weights_sealed")
        refused(lambda who=who: list(who.catalogue.weights("shy")), 403, "licence_forbids")
    results = [e.result for e in owner.audit.list() if e.action == "download_weights"]
    assert results.count("weights_sealed") == results.count("licence_forbids") == 2


def test_weights_that_are_gone_say_what_to_do(world: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(MUSE.read_bytes())
    owner = world.owner
    owner.catalogue.add(a_model(path=str(copy)))
    copy.write_bytes(b"GGUF of another length")
    refused(lambda: list(owner.catalogue.weights("my-model")), 409, "weights_changed")
    copy.unlink()
    refused(lambda: list(owner.catalogue.weights("my-model")), 409, "weights_missing")
    seen = owner.catalogue.get("my-model")
    assert not seen.may_be_deployed
    assert "make setup" in (seen.hint or "")
    refused(
        lambda: owner.deployments.create(rest.DeploymentCreate(model="my-model")),
        409,
        "weights_missing",
    )
