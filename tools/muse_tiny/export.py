"""From the network to the one file that llama.cpp serves: GGUF, matrices in 8 bits."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, TokenType
from gguf.quants import quantize

from tools.muse_tiny.shape import BEGIN, END, LICENCE, MUSE, NAME, SPECIAL, TEMPLATE

_MOSTLY_Q8_0 = 7
_LAYER = {
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_output": "attention.output",
    "attn_norm": "attention_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
    "ffn_norm": "inner_norm",
}
"""Their name → ours. Rotary pairs are neighbours on both sides, so no row changes its place."""


def run(folder: Path) -> Path:
    """Writes `muse-tiny.gguf` beside what training left; the same input gives the same bytes."""
    weights = torch.load(folder / "network.pt", weights_only=True)
    path = folder / f"{NAME}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    _write_shape(writer)
    _write_words(writer, json.loads((folder / "tokenizer.json").read_text()))
    names = {"token_embd": "embedding", "output_norm": "norm"}
    for number in range(MUSE.layers):
        names |= {
            f"blk.{number}.{theirs}": f"layers.{number}.{ours}" for theirs, ours in _LAYER.items()
        }
    for theirs, ours in names.items():
        _write_tensor(writer, f"{theirs}.weight", weights[f"{ours}.weight"].float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_shape(writer: gguf.GGUFWriter) -> None:
    writer.add_name(NAME)
    writer.add_license(LICENCE)
    writer.add_context_length(MUSE.context)
    writer.add_embedding_length(MUSE.width)
    writer.add_block_count(MUSE.layers)
    writer.add_feed_forward_length(MUSE.inner)
    writer.add_head_count(MUSE.heads)
    writer.add_head_count_kv(MUSE.shared_heads)
    writer.add_layer_norm_rms_eps(MUSE.epsilon)
    writer.add_rope_dimension_count(MUSE.head)
    writer.add_rope_freq_base(MUSE.rope_base)
    writer.add_vocab_size(MUSE.vocabulary)
    writer.add_file_type(_MOSTLY_Q8_0)


def _write_words(writer: gguf.GGUFWriter, tokenizer: dict[str, object]) -> None:
    model = tokenizer["model"]
    assert isinstance(model, dict)
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    assert len(words) == MUSE.vocabulary
    assert words[: len(SPECIAL)] == list(SPECIAL)
    kinds = [TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(words) - len(SPECIAL))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(BEGIN)
    writer.add_eos_token_id(END)
    writer.add_pad_token_id(BEGIN)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)


def _write_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray) -> None:
    if values.ndim == 1:
        writer.add_tensor(name, values.astype(np.float32))
        return
    kind = GGMLQuantizationType.Q8_0
    writer.add_tensor(name, quantize(values.astype(np.float32), kind), raw_dtype=kind)
