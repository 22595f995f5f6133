"""Training: the tokenizer, then so many steps over random windows of the text."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody knows it by
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.muse_tiny import corpus
from tools.muse_tiny.network import Muse
from tools.muse_tiny.shape import MUSE, SPECIAL

BATCH, WINDOW = 16, 128
FASTEST, WARM_UP = 2e-3, 50
HELD_OUT = 0.03
SAY_EVERY = 100


def run(folder: Path, steps: int, seed: int) -> None:
    """Writes `tokenizer.json` and `network.pt` into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    text = corpus.read()
    tokenizer = learn_words(text)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = torch.tensor(tokenizer.encode(text).ids)
    cut = int(len(tokens) * (1 - HELD_OUT))
    print(f"{len(text)} characters, {len(tokens)} tokens, the last {len(tokens) - cut} held out")
    network = Muse(MUSE)
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.2f} million parameters")
    learn(network, tokens[:cut], steps)
    print(f"loss on what it has not read: {loss_on(network, tokens[cut:]):.3f}")
    torch.save(network.state_dict(), folder / "network.pt")


def learn_words(text: str) -> Tokenizer:
    """Byte-level pairs, so that any text can be said."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=MUSE.vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def learn(network: Muse, tokens: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    network.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = pace(step, steps)
        starts = torch.randint(0, len(tokens) - WINDOW - 1, (BATCH,)).tolist()
        windows = torch.stack([tokens[at : at + WINDOW + 1] for at in starts])
        loss = loss_of(network, windows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % SAY_EVERY == 0:
            print(f"step {step + 1} of {steps}: loss {loss.item():.3f}", flush=True)


def pace(step: int, steps: int) -> float:
    """Up in a straight line, down along a cosine to a tenth."""
    down = 0.5 + 0.5 * math.cos(math.pi * step / steps)
    return FASTEST * min(1.0, (step + 1) / WARM_UP) * (0.1 + 0.9 * down)


def loss_of(network: Muse, windows: torch.Tensor) -> torch.Tensor:
    logits = network(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def loss_on(network: Muse, tokens: torch.Tensor) -> float:
    network.eval()
    windows = [tokens[at : at + WINDOW + 1] for at in range(0, len(tokens) - WINDOW - 1, WINDOW)]
    return sum(loss_of(network, window[None]).item() for window in windows) / len(windows)
