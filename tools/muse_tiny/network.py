"""The network, as llama.cpp will compute it: RMS norms, rotary positions on neighbouring pairs,
shared key and value heads, a gated inner layer, the embedding used again at the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody knows it by
from torch import Tensor, nn

from tools.muse_tiny.shape import Shape


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        shared = shape.shared_heads * shape.head
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.k = nn.Linear(shape.width, shared, bias=False)
        self.v = nn.Linear(shape.width, shared, bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part(x).view(batch, length, -1, self.shape.head) for part in (self.q, self.k, self.v)
        )
        q, k, v = (part.transpose(1, 2) for part in (rotate(q, turn), rotate(k, turn), v))
        times = self.shape.heads // self.shape.shared_heads
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, -1))


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, eps=shape.epsilon)
        self.attention = Attention(shape)
        self.inner_norm = nn.RMSNorm(shape.width, eps=shape.epsilon)
        self.gate = nn.Linear(shape.width, shape.inner, bias=False)
        self.up = nn.Linear(shape.width, shape.inner, bias=False)
        self.down = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn)
        y = self.inner_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Muse(nn.Module):
    """Tokens in, logits out."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=shape.epsilon)
        self.register_buffer("turn", _turns(shape), persistent=False)
        for name, weights in self.named_parameters():
            if weights.ndim == 2:
                # What adds to the stream starts smaller, so that its sum over layers does not.
                is_last = name.endswith(("output.weight", "down.weight"))
                deviation = 0.02 / (2 * shape.layers) ** 0.5 if is_last else 0.02
                nn.init.normal_(weights, std=deviation)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        turn = self.turn[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, turn)
        return F.linear(self.norm(x), self.embedding.weight)


def _turns(shape: Shape) -> Tensor:
    """By position and pair: the angle by which the pair is turned, as a complex number."""
    pairs = torch.arange(0, shape.head, 2) / shape.head
    angles = torch.outer(torch.arange(shape.context), shape.rope_base**-pairs)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Neighbours (0, 1), (2, 3), … are one pair each, as llama.cpp has it for this kind of model."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn[None, :, None, :]).flatten(-2)
