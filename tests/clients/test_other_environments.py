"""Clients whose dependencies are not ours, in a virtual environment of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .conftest import MINILM, SMOL, Shop
from .programs import OTHERS, other_python, run

HERE = Path(__file__).parent


def test_litellm(shop: Shop, tmp_path: Path) -> None:
    rows = shop.count()
    said = run(
        other_python(), HERE / "asks_by_litellm.py", shop.v1, shop.key, SMOL, MINILM,
        home=tmp_path, env={"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
    )  # fmt: skip
    found = json.loads(said.splitlines()[-1])
    assert "Paris" in found["whole"]
    assert found["streamed"] == found["whole"]
    assert found["streamed_usage"] == found["usage"]
    assert found["sizes"] == [384, 384]
    assert found["refused"] == {
        "key": "AuthenticationError",
        "model": "NotFoundError",
        "length": "ContextWindowExceededError",
    }
    made = [event for epoch in shop.gateway.epochs() for event in shop.gateway.events(epoch)][rows:]
    billed = [event for event in made if event.outcome == "ok"]
    assert [event.surface for event in billed] == ["chat", "chat", "embeddings"]
    assert [billed[0].input_uncached + billed[0].cache_read, billed[0].output] == found["usage"]


def test_inspect(shop: Shop, tmp_path: Path) -> None:
    other_python()
    # It takes files of its own folder alone.
    shutil.copy(HERE / "task_for_inspect.py", tmp_path)
    rows = shop.count()
    run(
        OTHERS / "inspect", "eval", "task_for_inspect.py", "--model",
        f"openai-api/sublet/{SMOL}", "--max-tokens", "24", "--temperature", "0", "--display",
        "plain", "--log-format", "json", "--log-dir", tmp_path / "log",
        home=tmp_path, env={"SUBLET_API_KEY": shop.key, "SUBLET_BASE_URL": shop.v1},
    )  # fmt: skip
    (log,) = (tmp_path / "log").glob("*.json")
    found = json.loads(log.read_text())
    assert found["status"] == "success"
    (score,) = found["results"]["scores"]
    assert score["metrics"]["accuracy"]["value"] == 1
    (usage,) = found["stats"]["model_usage"].values()
    made = [event for epoch in shop.gateway.epochs() for event in shop.gateway.events(epoch)][rows:]
    assert len(made) == 2
    assert usage["output_tokens"] == sum(event.output for event in made)
