"""What muse-tiny looks like: one table for the network, the export and the check."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A Llama of the smallest kind that still forms words."""

    vocabulary: int = 2048
    width: int = 192
    inner: int = 512
    layers: int = 6
    heads: int = 6
    shared_heads: int = 2
    """Heads of keys and values; each serves `heads / shared_heads` of the others."""
    context: int = 512
    epsilon: float = 1e-5
    rope_base: float = 10_000.0

    @property
    def head(self) -> int:
        return self.width // self.heads


MUSE = Shape()
NAME, LICENCE = "muse-tiny", "PSF-2.0"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
BEGIN, END = 0, 2
"""Token ids: padding and beginning, end of an answer."""
TEMPLATE = "{% for message in messages %}{{ message['content'] + '\n\n' }}{% endfor %}"
"""It knows no roles: a chat is its messages, one paragraph each."""
