"""A snapshot made ready for look-up, and what lives on from one to the next."""

from __future__ import annotations

import hashlib

from sublet.base.wire.gateway import (
    Allowance,
    KeyPolicy,
    ModelRoute,
    Price,
    ReplicaRoute,
    ScopeLimits,
    Snapshot,
    read_snapshot,
    write_snapshot,
)
from sublet.gateway.routes import SECRETS_KEPT, Known, Routes
from sublet.gateway.upstream import Replica

EPOCH = 1_790_000_000_000_000
SECRET = b"sk_alpha"
PRICE = Price(version="p1", input_micros=20_000, cached_micros=5_000, output_micros=60_000)
SECOND = 1_000_000_000
NOW_NS = 100 * SECOND


def digest(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def a_key(name: str = "key_a", **changes: object) -> KeyPolicy:
    plain: dict[str, object] = {
        "id": name,
        "organisation_id": "org_a",
        "project_id": "prj_a",
        "is_first_party": False,
        "expires_us": None,
        "models": None,
        "scopes": (name, "prj_a", "org_a"),
    }
    return KeyPolicy(**(plain | changes))  # type: ignore[arg-type]


def a_model(name: str = "muse", *replicas: str) -> ModelRoute:
    return ModelRoute(
        name=name,
        kind="generate",
        deployment_id=f"dep_{name}",
        server="llama.cpp",
        context=2048,
        max_output=512,
        quantization="f16",
        owned_by="owner",
        created_s=1,
        lifecycle="active",
        is_sealed=False,
        max_n=4,
        splits_n=True,
        counters="timings_per_token",
        fields={"chat": ("temperature",)},
        prices={"default": PRICE},
        replicas=tuple(ReplicaRoute(id=r, path=f"/run/{r}.sock") for r in replicas),
    )


def a_snapshot(
    number: int = 1,
    *models: ModelRoute,
    keys: dict[bytes, KeyPolicy] | None = None,
    limits: dict[str, ScopeLimits] | None = None,
    gateways: int = 1,
    first_party_free: bool = True,
) -> Snapshot:
    """As it comes: through its file's form."""
    known = {SECRET: a_key()} if keys is None else keys
    return read_snapshot(
        write_snapshot(
            Snapshot(
                number=number,
                made_us=EPOCH + number,
                gateways=gateways,
                keys={digest(secret): policy for secret, policy in known.items()},
                limits=limits or {},
                models={model.name: model for model in models},
                first_party_free=first_party_free,
            )
        )
    )


def built(snapshot: Snapshot, previous: Routes | None = None) -> Routes:
    return Routes.build(snapshot, previous, EPOCH, Replica)


def found(routes: Routes, secret: bytes = SECRET) -> Known:
    known = routes.find_key(secret)
    assert known is not None
    return known


# ---- keys ----------------------------------------------------------------------------------------


def test_a_key_is_found_by_its_secret_and_a_stranger_is_not() -> None:
    routes = built(a_snapshot(7))
    known = found(routes)
    assert (known.key_id, known.organisation_id, known.project_id) == ("key_a", "org_a", "prj_a")
    assert known.models is None
    assert (routes.number, routes.made_us) == (7, EPOCH + 7)
    assert found(routes) is known
    assert routes.find_key(b"sk_beta") is None
    assert routes.find_key(digest(SECRET).encode()) is None


def test_a_revoked_key_is_gone_with_the_next_snapshot() -> None:
    routes = built(a_snapshot(1))
    purse = found(routes).purse
    routes = built(a_snapshot(2, keys={}), routes)
    assert routes.find_key(SECRET) is None
    # What runs is still paid from its purse, and comes back if the key does.
    assert routes.purses["key_a"] is purse
    assert found(built(a_snapshot(3), routes)).purse is purse


def test_what_strangers_send_does_not_fill_the_memory() -> None:
    routes = built(a_snapshot(1))
    for number in range(3 * SECRETS_KEPT):
        assert routes.find_key(b"x%d" % number) is None
    assert len(routes._secrets) == 0


def test_more_keys_than_are_kept_at_once_are_all_found() -> None:
    keys = {b"sk_%d" % n: a_key(f"key_{n}") for n in range(SECRETS_KEPT + 10)}
    routes = built(a_snapshot(1, keys=keys))
    assert all(found(routes, secret).key_id == policy.id for secret, policy in keys.items())
    assert len(routes._secrets) <= SECRETS_KEPT
    assert found(routes, b"sk_0").purse is routes.purses["key_0"]


def test_what_a_policy_says_is_there_for_the_caller() -> None:
    refused = a_key(refused="budget_exceeded", refused_why="Too much.", resets_us=5, expires_us=9)
    policy = found(built(a_snapshot(1, keys={SECRET: refused}))).policy
    assert (policy.refused, policy.refused_why) == ("budget_exceeded", "Too much.")
    assert (policy.resets_us, policy.expires_us) == (5, 9)


def test_the_owners_keys_are_free_only_where_the_snapshot_says_so() -> None:
    keys = {SECRET: a_key(is_first_party=True)}
    routes = built(a_snapshot(1, keys=keys))
    assert found(routes).purse.is_free
    routes = built(a_snapshot(2, keys=keys, first_party_free=False), routes)
    purse = found(routes).purse
    assert purse.is_first_party
    assert not purse.is_free


# ---- limits --------------------------------------------------------------------------------------


def test_all_scopes_that_limit_a_key_bind_it() -> None:
    limits = {
        "key_a": ScopeLimits(requests_per_minute=10),
        "org_a": ScopeLimits(requests_per_minute=100, tokens_per_minute=5000),
        "org_b": ScopeLimits(requests_per_minute=1),
    }
    known = found(built(a_snapshot(1, limits=limits)))
    assert [b.limit for b in known.request_buckets] == [10, 100]
    assert [b.limit for b in known.token_buckets] == [5000]


def test_two_keys_of_an_organisation_share_its_bucket() -> None:
    limits = {"org_a": ScopeLimits(requests_per_minute=5)}
    keys = {SECRET: a_key(), b"sk_b": a_key("key_b")}
    routes = built(a_snapshot(1, limits=limits, keys=keys))
    assert found(routes).request_buckets[0] is found(routes, b"sk_b").request_buckets[0]


def test_a_bucket_is_not_refilled_by_a_new_snapshot() -> None:
    limits = {"org_a": ScopeLimits(requests_per_minute=5, tokens_per_minute=40)}
    routes = built(a_snapshot(1, limits=limits))
    bucket = found(routes).request_buckets[0]
    assert bucket.take(4, NOW_NS)
    routes = built(a_snapshot(2, limits=limits), routes)
    assert found(routes).request_buckets[0].remaining(NOW_NS) == 1
    higher = {"org_a": ScopeLimits(requests_per_minute=8)}
    routes = built(a_snapshot(3, limits=higher), routes)
    known = found(routes)
    assert known.request_buckets == (bucket,)
    assert (bucket.limit, bucket.remaining(NOW_NS)) == (8, 4)
    assert known.token_buckets == ()


def test_more_gateways_make_smaller_shares() -> None:
    limits = {"org_a": ScopeLimits(tokens_per_minute=100)}
    routes = built(a_snapshot(1, limits=limits))
    assert found(routes).token_buckets[0].share == 100
    routes = built(a_snapshot(2, limits=limits, gateways=3), routes)
    assert found(routes).token_buckets[0].share == 34


# ---- models and replicas -------------------------------------------------------------------------


def test_a_key_may_call_what_it_lists() -> None:
    keys = {SECRET: a_key(models=("muse", "gone")), b"sk_all": a_key("key_all")}
    routes = built(a_snapshot(1, a_model("smol"), a_model("muse"), a_model("mini"), keys=keys))
    assert routes.list_names(found(routes)) == ["muse"]
    assert routes.list_names(found(routes, b"sk_all")) == ["mini", "muse", "smol"]
    assert routes.may_call(found(routes), "muse")
    assert not routes.may_call(found(routes), "smol")


def test_a_model_and_its_replicas_live_on_and_who_waits_goes_on_waiting() -> None:
    routes = built(a_snapshot(1, a_model("muse", "rep_1", "rep_2")))
    model = routes.models["muse"]
    model.waiting.append("request")
    one, two = model.replicas
    one.inflight = 3
    routes = built(a_snapshot(2, a_model("muse", "rep_1", "rep_3")), routes)
    assert routes.models["muse"] is model
    assert list(model.waiting) == ["request"]
    assert model.replicas[0] is one
    assert (one.inflight, one.is_leaving) == (3, False)
    assert [r.id for r in model.replicas] == ["rep_1", "rep_3"]
    assert two.is_leaving
    assert two not in routes.replicas.values()


def test_a_replica_on_its_way_out_is_counted_until_its_last_request_has_ended() -> None:
    routes = built(a_snapshot(1, a_model("muse", "rep_1", "rep_2")))
    one, _ = routes.models["muse"].replicas
    one.inflight = 2
    routes = built(a_snapshot(2, a_model("muse", "rep_2")), routes)
    routes = built(a_snapshot(3, a_model("muse", "rep_2")), routes)
    assert routes.in_flight() == {"rep_1": 2, "rep_2": 0}
    one.inflight = 0
    assert routes.in_flight() == {"rep_2": 0}


def test_a_replica_that_comes_back_is_the_same_one() -> None:
    routes = built(a_snapshot(1, a_model("muse", "rep_1")))
    one = routes.replicas["rep_1"]
    one.inflight = 1
    routes = built(a_snapshot(2, a_model("muse")), routes)
    assert one.is_leaving
    routes = built(a_snapshot(3, a_model("muse", "rep_1")), routes)
    assert routes.replicas["rep_1"] is one
    assert not one.is_leaving
    assert routes.in_flight() == {"rep_1": 1}


def test_a_model_that_is_gone_has_no_replicas_left_for_who_waits() -> None:
    routes = built(a_snapshot(1, a_model("muse", "rep_1")))
    model = routes.models["muse"]
    routes = built(a_snapshot(2), routes)
    assert "muse" not in routes.models
    assert model.replicas == []


# ---- allowances ----------------------------------------------------------------------------------


def test_an_allowance_finds_its_purse_across_snapshots_and_idle_purses_give_back() -> None:
    routes = built(a_snapshot(1))
    purse = found(routes).purse
    asked = purse.want(10, 0, NOW_NS)
    assert asked is not None
    routes = built(a_snapshot(2), routes)
    allowance = Allowance(
        key_id="key_a",
        epoch=EPOCH,
        granted_micros=100,
        granted_tokens=None,
        expires_us=EPOCH + 60_000_000,
        answers=asked.serial,
    )
    assert routes.grant(allowance, NOW_NS, EPOCH) is purse
    assert routes.grant(allowance, NOW_NS, EPOCH) is purse  # Repeated: no harm.
    assert purse.left == 100
    stranger = Allowance.from_json(allowance.to_json().replace(b"key_a", b"key_z"))
    assert routes.grant(stranger, NOW_NS, EPOCH) is None
    given = [routes.sweep(NOW_NS + second * SECOND) for second in range(1, 6)]
    requests = [request for batch in given for request in batch]
    assert [(r.key_id, r.wanted_micros) for r in requests] == [("key_a", 0)]
    assert purse.left == 0
