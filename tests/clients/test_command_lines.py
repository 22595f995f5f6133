"""The `llm` command and the compliance tester, as their users run them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import SMOL, Shop
from .programs import run

BIN = Path(sys.executable).parent
ASKED = "Say the name of the capital of France."
FORMATS = {"openai-chat": "chat", "anthropic": "anth"}
NOT_OFFERED = frozenset({"image-input"})
"""These models read text: images are refused by name, which the SDKs' tests look at."""


@pytest.fixture
def llm_home(shop: Shop, tmp_path: Path) -> dict[str, str]:
    """A user's folder of `llm` in which the gateway is one of the places models come from."""
    lines = [
        "- model_id: sublet-smol",
        f"  model_name: {SMOL}",
        f"  api_base: {shop.v1}",
        "  api_key_name: sublet",
        "  supports_tools: true",
        "  supports_schema: true",
    ]
    (tmp_path / "extra-openai-models.yaml").write_text("\n".join(lines) + "\n")
    (tmp_path / "keys.json").write_text(json.dumps({"sublet": shop.key}))
    return {"LLM_USER_PATH": str(tmp_path), "LLM_LOAD_PLUGINS": ""}


def llm(home: dict[str, str], tmp_path: Path, *words: str) -> str:
    return run(BIN / "llm", *words, home=tmp_path, env=home)


@pytest.mark.parametrize("option", [(), ("--no-stream",)])
def test_llm_answers(llm_home: dict[str, str], tmp_path: Path, option: tuple[str, ...]) -> None:
    said = llm(
        llm_home, tmp_path, "-m", "sublet-smol", *option, "-o", "temperature", "0", "-o",
        "max_tokens", "24", ASKED,
    )  # fmt: skip
    assert "Paris" in said


def test_llm_keeps_the_usage_that_is_billed(
    llm_home: dict[str, str], tmp_path: Path, shop: Shop
) -> None:
    rows = shop.count()
    llm(llm_home, tmp_path, "-m", "sublet-smol", "-o", "max_tokens", "8", ASKED)
    (logged,) = json.loads(llm(llm_home, tmp_path, "logs", "list", "--json", "-n", "1"))
    row = [event for epoch in shop.gateway.epochs() for event in shop.gateway.events(epoch)][rows]
    assert (logged["input_tokens"], logged["output_tokens"]) == (
        row.input_uncached + row.cache_read,
        row.output,
    )


def test_llm_takes_a_schema(llm_home: dict[str, str], tmp_path: Path) -> None:
    said = llm(
        llm_home, tmp_path, "-m", "sublet-smol", "--schema", "city, people int", "-o",
        "max_tokens", "64", "-o", "temperature", "0", "Name a city and how many people live there.",
    )  # fmt: skip
    found = json.loads(said)
    assert isinstance(found["city"], str)
    assert isinstance(found["people"], int)


def test_llm_calls_a_tool(llm_home: dict[str, str], tmp_path: Path) -> None:
    """The small model need not choose to call it: what is offered must be taken by the gateway."""
    said = llm(
        llm_home, tmp_path, "-m", "sublet-smol", "-T", "llm_version", "-o", "max_tokens", "16",
        "-o", "temperature", "0", ASKED,
    )  # fmt: skip
    assert said.strip()


@pytest.mark.parametrize("form", FORMATS)
def test_the_compliance_tester_finds_no_failure(shop: Shop, tmp_path: Path, form: str) -> None:
    listed = run(BIN / "llm-comply", "--format", form, "--list", home=tmp_path)
    prefix = FORMATS[form]
    tests = {word for word in listed.split() if word.startswith(f"{prefix}-")}
    assert len(tests) == 9, "the tester has other tests now: look at each"
    offered = {test for test in tests if test.partition("-")[2] not in NOT_OFFERED}
    results = _comply(shop, tmp_path, form, offered)
    assert {found["id"] for found in results} == offered
    failed = [found for found in results if found["status"] == "failed"]
    assert not failed, failed
    assert sum(found["status"] == "passed" for found in results) == len(offered) - 1, (
        "the tester itself skips what a model without reasoning has not"
    )


def _comply(shop: Shop, home: Path, form: str, tests: set[str]) -> list[dict[str, Any]]:
    said = run(
        BIN / "llm-comply", "--format", form, "-u", shop.v1, "-k", shop.key, "-m", SMOL, "--json",
        "-f", ",".join(sorted(tests)), home=home,
    )  # fmt: skip
    found: list[dict[str, Any]] = json.loads(said)["results"]
    return found
