"""The vLLM adapter: what it says everywhere, what it does where vLLM is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sublet.shops.models.servers import MODEL_SOCKET, SERVERS, Gauges, ModelFacts, NotServable
from sublet.shops.models.servers.vllm import Vllm, read_gauges

from .conftest import Child

VLLM = SERVERS["vllm"]
PAGE = b"""# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="m"} 100.0
vllm:prompt_tokens_total{engine="1",model_name="m"} 50.0
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 30.0
vllm:prefix_cache_hits_total{engine="1",model_name="m"} 12.0
vllm:generation_tokens_total{engine="0",model_name="m"} 7.0
vllm:generation_tokens_total{engine="1",model_name="m"} 1.0
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 5.0
vllm:request_success_total{finished_reason="stop",model_name="a b"} nonsense
"""


def facts(path: Path, **fields: object) -> ModelFacts:
    values = {"name": "m", "path": str(path), "kind": "generate", "context": 4096}
    return ModelFacts(**{**values, **fields})  # type: ignore[arg-type]


def test_its_command_names_socket_alias_limits_and_devices(tmp_path: Path) -> None:
    argv = VLLM.spawn(facts(tmp_path), devices=4, slots=16).argv
    assert argv[:6] == (
        sys.executable,
        "-I",
        "-m",
        "vllm.entrypoints.cli.main",
        "serve",
        os.path.realpath(tmp_path),
    )
    options = dict(zip(argv[6::2], argv[7::2], strict=False))
    assert options["--uds"] == MODEL_SOCKET
    assert options["--served-model-name"] == "m"
    assert options["--max-model-len"] == "4096"
    assert options["--max-num-seqs"] == "16"
    assert options["--tensor-parallel-size"] == "4"


def test_an_embedding_model_is_served_as_one(tmp_path: Path) -> None:
    argv = VLLM.spawn(facts(tmp_path, kind="embed"), devices=1, slots=1).argv
    assert argv[argv.index("--runner") + 1] == "pooling"
    assert "--tool-call-parser" not in argv


def test_it_calls_nobody_and_sees_its_own_environment(tmp_path: Path) -> None:
    spec = VLLM.spawn(facts(tmp_path), devices=1, slots=1)
    assert spec.env["VLLM_NO_USAGE_STATS"] == spec.env["HF_HUB_OFFLINE"] == "1"
    targets = [target for _, target in spec.read_only]
    for path in (sys.prefix, str(tmp_path)):
        real = os.path.realpath(path)
        assert any(f"{real}/".startswith(f"{top}/") for top in ("/usr", *targets))


def test_sealed_weights_are_not_for_it(tmp_path: Path) -> None:
    assert not VLLM.takes_sealed
    with pytest.raises(NotServable):
        VLLM.spawn(facts(tmp_path, is_sealed=True), devices=1, slots=1)


def test_its_metrics_are_summed_over_engines_and_cached_tokens_taken_out() -> None:
    assert read_gauges(PAGE) == Gauges(
        prompt_total=108, cached_total=42, predicted_total=8, processing=2, deferred=5
    )
    assert read_gauges(b"") is None
    assert read_gauges(b"\xff\xfe nothing\n") is None


def test_what_reveals_a_model_is_named_among_its_fields() -> None:
    listed = {field for fields in VLLM.fields.values() for field in fields}
    assert VLLM.revealing <= listed


@pytest.fixture(scope="module")
def served(start: Callable[..., Child]) -> Child:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: its contract is tested where it is")
    folder = os.environ.get("SUBLET_TEST_VLLM_MODEL")
    if not folder:
        pytest.skip("SUBLET_TEST_VLLM_MODEL names no folder of a model for vLLM")
    return start(Vllm(), facts(Path(folder), context=1024))


def test_every_option_of_its_command_exists() -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: its contract is tested where it is")
    argv = VLLM.spawn(facts(Path("/m")), devices=1, slots=1).argv
    said = subprocess.run([*argv[:5], "--help=all"], capture_output=True, text=True, timeout=120)
    for option in [word for word in argv if word.startswith("--")]:
        assert option in said.stdout


def test_it_is_ready_and_counts(served: Child) -> None:
    before = VLLM.gauges(served.door)
    answer = served.ask("/v1/completions", prompt="a b c", max_tokens=5, ignore_eos=True)
    after = VLLM.gauges(served.door)
    assert before is not None
    assert after is not None
    assert answer["usage"]["completion_tokens"] == 5
    assert after.predicted_total - before.predicted_total == 5
