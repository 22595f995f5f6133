"""From a published BERT model to GGUF: what is written, what is refused, and that it works."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from sublet.shops.models.convert import NotConvertible, convert_bert
from sublet.shops.models.servers import SERVERS, ModelFacts

from .conftest import MINILM, Child, needed

HIDDEN, INNER, LAYERS, WORDS, PLACES = 8, 16, 2, 12, 32
CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": PLACES,
    "num_attention_heads": 2,
    "num_hidden_layers": LAYERS,
    "type_vocab_size": 2,
    "vocab_size": WORDS,
}
VOCABULARY = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[x]",
    "sea",
    "##s",
    "star",
    "##",
    "!",
    "é",
]


def tensors(prefix: str = "") -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(1)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (WORDS, HIDDEN),
        "embeddings.position_embeddings.weight": (PLACES, HIDDEN),
        "embeddings.token_type_embeddings.weight": (2, HIDDEN),
        "embeddings.LayerNorm.weight": (HIDDEN,),
        "embeddings.LayerNorm.bias": (HIDDEN,),
    }
    for layer in range(LAYERS):
        for name, out, into in (
            ("attention.self.query", HIDDEN, HIDDEN),
            ("attention.self.key", HIDDEN, HIDDEN),
            ("attention.self.value", HIDDEN, HIDDEN),
            ("attention.output.dense", HIDDEN, HIDDEN),
            ("intermediate.dense", INNER, HIDDEN),
            ("output.dense", HIDDEN, INNER),
        ):
            shapes[f"encoder.layer.{layer}.{name}.weight"] = (out, into)
            shapes[f"encoder.layer.{layer}.{name}.bias"] = (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            for part in ("weight", "bias"):
                shapes[f"encoder.layer.{layer}.{name}.{part}"] = (HIDDEN,)
    return {
        prefix + name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write(folder: Path, values: dict[str, np.ndarray[Any, Any]], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    body = b""
    for name, value in values.items():
        data = value.tobytes()
        kind = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16"}[value.dtype]
        header[name] = {
            "dtype": kind,
            "shape": list(value.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    head = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + body)
    return folder


def convert(folder: Path, target: Path) -> None:
    convert_bert(folder, target, name="a model", licence="apache-2.0")


def test_every_tensor_arrives_under_its_name_in_its_width(tmp_path: Path) -> None:
    values = tensors()
    convert(write(tmp_path / "in", values), tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == len(values)
    query = found["blk.1.attn_q.weight"]
    wanted = values["encoder.layer.1.attention.self.query.weight"]
    assert query.tensor_type is gguf.GGMLQuantizationType.F16
    assert np.array_equal(query.data, wanted.astype(np.float16))
    norm = found["blk.0.layer_output_norm.bias"]
    assert norm.tensor_type is gguf.GGMLQuantizationType.F32
    assert np.array_equal(norm.data, values["encoder.layer.0.output.LayerNorm.bias"])
    assert found["position_embd.weight"].tensor_type is gguf.GGMLQuantizationType.F32
    assert list(found["blk.0.ffn_up.weight"].data.shape) == [INNER, HIDDEN]


def test_words_and_figures_arrive_as_the_server_wants_them(tmp_path: Path) -> None:
    convert(write(tmp_path / "in", tensors()), tmp_path / "out.gguf")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    said = {name: field.contents() for name, field in fields.items()}
    words = said["tokenizer.ggml.tokens"]
    assert words[2] == "[CLS]"
    assert words[5:12] == ["▁[x]", "▁sea", "s", "▁star", "", "▁!", "▁é"]
    assert said["tokenizer.ggml.bos_token_id"] == 2
    assert said["tokenizer.ggml.seperator_token_id"] == said["tokenizer.ggml.eos_token_id"] == 3
    assert said["bert.attention.causal"] is False
    assert said["bert.pooling_type"] == gguf.PoolingType.MEAN
    assert said["bert.context_length"] == PLACES
    assert said["general.license"] == "apache-2.0"


def test_the_same_input_gives_the_same_bytes_and_a_prefix_changes_nothing(tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", tensors()), write(tmp_path / "b", tensors("bert."))]
    for number, folder in enumerate([*folders, folders[0]]):
        convert(folder, tmp_path / f"{number}.gguf")
    made = {(tmp_path / f"{number}.gguf").read_bytes() for number in range(3)}
    assert len(made) == 1


def test_half_floats_are_read_too(tmp_path: Path) -> None:
    halves = {name: value.astype(np.float16) for name, value in tensors().items()}
    convert(write(tmp_path / "in", halves), tmp_path / "out.gguf")
    found = {t.name: t for t in gguf.GGUFReader(tmp_path / "out.gguf").tensors}
    wanted = halves["embeddings.LayerNorm.weight"].astype(np.float32)
    assert np.array_equal(found["token_embd_norm.weight"].data, wanted)


def _without_one(folder: Path) -> None:
    values = tensors()
    del values["encoder.layer.1.output.dense.bias"]
    write(folder, values)


def _other_kind(folder: Path) -> None:
    write(folder, tensors(), model_type="t5")


def _no_size(folder: Path) -> None:
    write(folder, tensors(), hidden_size=None)


def _other_words(folder: Path) -> None:
    write(folder, tensors(), vocab_size=WORDS + 1)


def _cut_short(folder: Path) -> None:
    path = write(folder, tensors()) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def _no_header(folder: Path) -> None:
    (write(folder, tensors()) / "model.safetensors").write_bytes(b"\0" * 8)


def _bad_header(folder: Path) -> None:
    (write(folder, tensors()) / "model.safetensors").write_bytes(struct.pack("<Q", 3) + b"{,}")


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (_without_one, r"encoder\.layer\.1\.output\.dense\.bias"),
        (_other_kind, r"config\.json"),
        (_no_size, "hidden_size"),
        (_other_words, r"vocab\.txt has 12 words, not 13"),
        (_cut_short, "cut short"),
        (_no_header, "no header"),
        (_bad_header, "model.safetensors"),
    ],
)
def test_what_is_not_right_is_refused_and_leaves_what_was_there(
    tmp_path: Path, spoil: Callable[[Path], None], why: str
) -> None:
    target = tmp_path / "out.gguf"
    target.write_text("as it was")
    spoil(tmp_path / "in")
    with pytest.raises(NotConvertible, match=why):
        convert(tmp_path / "in", target)
    assert target.read_text() == "as it was"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out.gguf"]


def test_the_published_model_is_served_and_finds_what_is_alike(
    start: Callable[..., Child], tmp_path: Path
) -> None:
    target = tmp_path / "minilm.gguf"
    convert_bert(needed(MINILM), target, name="all-MiniLM-L6-v2", licence="apache-2.0")
    model = ModelFacts(name="minilm", path=str(target), kind="embed", context=256)
    child = start(SERVERS["llama.cpp"], model, slots=1)
    texts = ["A man is eating food.", "Someone eats a meal.", "The stars are far away."]
    answer = child.ask("/v1/embeddings", input=texts)
    eats, meal, stars = ([float(x) for x in row["embedding"]] for row in answer["data"])
    assert len(eats) == 384
    assert math.isclose(math.hypot(*eats), 1.0, rel_tol=1e-3)
    assert dot(eats, meal) > 0.6 > 0.3 > dot(eats, stars)
    assert answer["usage"]["prompt_tokens"] > 10
    coded = child.ask("/v1/embeddings", input=texts[0], encoding_format="base64")
    assert isinstance(coded["data"][0]["embedding"], str)
    long = child.ask("/v1/embeddings", input="word " * 200)
    assert len(long["data"][0]["embedding"]) == 384
    assert child.end() == 0


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))
