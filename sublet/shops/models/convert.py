"""From a BERT embedding model as it is published to the one file that llama.cpp serves.

Reads `config.json`, `vocab.txt` and `model.safetensors` of a folder; writes GGUF: matrices as
16-bit floats, vectors and the tables that are added up as 32-bit ones. The same input gives the
same bytes, so its digest can be kept.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Tensor = NDArray[Any]

_KINDS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2")}
_MOST_HEADER_BYTES = 1 << 24
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "layer_norm_eps",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "type_vocab_size",
    "vocab_size",
)
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_CONTINUED = "##"
_WORD_START = "\u2581"
"""What begins a word, as the server's tokenizer has it; BERT marks what does not."""
_LAYER = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
    "layer_output_norm": "output.LayerNorm",
}
_TABLES = {
    "token_embd": "embeddings.word_embeddings",
    "position_embd": "embeddings.position_embeddings",
    "token_types": "embeddings.token_type_embeddings",
}
_HALVES = frozenset({"token_embd", "attn_q", "attn_k", "attn_v", "attn_output"}) | {
    "ffn_up",
    "ffn_down",
}


class NotConvertible(ValueError):
    """The folder does not hold what it should: the message names the file or tensor."""


def convert_bert(folder: Path, target: Path, *, name: str, licence: str) -> None:
    """Write `target` whole, or leave it as it was. Mean pooling, as sentence models want it.

    Raises NotConvertible, OSError.
    """
    passing = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        with (folder / "model.safetensors").open("rb") as source:
            _write(folder, Safetensors(source), passing, name, licence)
        os.replace(passing, target)
    finally:
        passing.unlink(missing_ok=True)


def _write(folder: Path, tensors: Safetensors, target: Path, name: str, licence: str) -> None:
    config = _config(folder)
    vocabulary = _vocabulary(folder, config["vocab_size"])
    writer = gguf.GGUFWriter(target, "bert")
    try:
        writer.add_name(name)
        writer.add_license(licence)
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_layer_norm_eps(config["layer_norm_eps"])
        writer.add_causal_attention(False)
        writer.add_pooling_type(gguf.PoolingType.MEAN)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        _add_tokenizer(writer, vocabulary, config["type_vocab_size"])
        for tensor_name, values in _tensors(tensors, config["num_hidden_layers"]):
            writer.add_tensor(tensor_name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _config(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "config.json").read_bytes())
    missing = [key for key in _SIZES if not isinstance(found.get(key), int | float)]
    if found.get("model_type") != "bert" or missing:
        raise NotConvertible(f"config.json is not that of a BERT model: {missing or 'model_type'}")
    return dict(found)


def _vocabulary(folder: Path, size: int) -> list[str]:
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
    if words and not words[-1]:
        words.pop()
    if len(words) != size or any(special not in words for special in _SPECIAL):
        raise NotConvertible(f"vocab.txt has {len(words)} words, not {size}, or lacks special ones")
    return words


def _add_tokenizer(writer: gguf.GGUFWriter, words: list[str], token_types: int) -> None:
    writer.add_token_type_count(token_types)
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("jina-v2-en")
    writer.add_token_list([_as_server_has_it(word) for word in words])
    kinds = dict.fromkeys(_SPECIAL, gguf.TokenType.CONTROL)
    writer.add_token_types([kinds.get(word, gguf.TokenType.NORMAL) for word in words])
    pad, unknown, start, end, mask = (words.index(special) for special in _SPECIAL)
    writer.add_bos_token_id(start)
    writer.add_eos_token_id(end)
    writer.add_sep_token_id(end)
    writer.add_unk_token_id(unknown)
    writer.add_pad_token_id(pad)
    writer.add_mask_token_id(mask)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(True)


def _as_server_has_it(word: str) -> str:
    if word in _SPECIAL:
        return word
    return word.removeprefix(_CONTINUED) if word.startswith(_CONTINUED) else f"{_WORD_START}{word}"


def _tensors(source: Safetensors, layers: int) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under the server's name, in the width that it gets there."""

    def taken(ours: str, theirs: str, part: str, place: str = "") -> tuple[str, Tensor]:
        values = source.read(f"{theirs}.{part}")
        is_half = part == "weight" and ours in _HALVES
        return f"{place}{ours}.{part}", values.astype(np.float16 if is_half else np.float32)

    for ours, theirs in _TABLES.items():
        yield taken(ours, theirs, "weight")
    for part in ("weight", "bias"):
        yield taken("token_embd_norm", "embeddings.LayerNorm", part)
    for layer in range(layers):
        for ours, theirs in _LAYER.items():
            for part in ("weight", "bias"):
                yield taken(ours, f"encoder.layer.{layer}.{theirs}", part, f"blk.{layer}.")


class Safetensors:
    """A file of tensors, read one by one."""

    def __init__(self, source: Any) -> None:
        self._source = source
        start = source.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 0 < length <= _MOST_HEADER_BYTES:
            raise NotConvertible("model.safetensors has no header")
        try:
            self._entries: dict[str, Any] = json.loads(source.read(length))
        except ValueError as error:
            raise NotConvertible(f"model.safetensors: {error}") from error
        self._begin = 8 + length
        # Some publish the encoder alone, some with the name of what it is part of.
        self._prefix = "" if "embeddings.word_embeddings.weight" in self._entries else "bert."

    def read(self, name: str) -> Tensor:
        entry = self._entries.get(self._prefix + name)
        kind = None if entry is None else _KINDS.get(entry["dtype"])
        if entry is None or kind is None:
            raise NotConvertible(f"model.safetensors has no {name} that can be read")
        start, end = entry["data_offsets"]
        self._source.seek(self._begin + start)
        data = self._source.read(end - start)
        if len(data) != end - start:
            raise NotConvertible(f"model.safetensors is cut short at {name}")
        flat: Tensor = np.frombuffer(data, dtype=kind)
        return flat.reshape(entry["shape"])
