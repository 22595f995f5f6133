"""What has to hold of a muse-tiny: by the file alone, and beside the network it came from."""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf

from tools.muse_tiny.shape import LICENCE, MUSE, NAME

TEXTS = ("The assignment statement", "Return a new list", "If the file does not exist,")
MOST_DIFFERENCE = 0.25
"""Of a likely token's log-probability: what 8 bits were seen to cost is 0.02 to 0.08."""
LIKELY = 20


def run(path: Path, folder: Path | None) -> None:
    """Says what it finds; AssertionError names what does not hold."""
    facts = gguf.GGUFReader(str(path)).fields
    expected = {
        "general.name": NAME,
        "general.license": LICENCE,
        "llama.context_length": MUSE.context,
        "llama.embedding_length": MUSE.width,
        "llama.block_count": MUSE.layers,
        "llama.vocab_size": MUSE.vocabulary,
    }
    for name, value in expected.items():
        found = facts[name].contents()
        assert found == value, f"{name} is {found!r}, not {value!r}"
    with served(path) as ask:
        answers = {text: ask(text) for text in TEXTS}
    for text, answer in answers.items():
        said = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        total = math.fsum(math.exp(token["logprob"]) for token in said)
        assert len(said) == MUSE.vocabulary, "not every token has a probability"
        assert abs(total - 1) < 1e-3, f"the probabilities after {text!r} add up to {total}"
        best = max(said, key=lambda token: token["logprob"])
        print(f"{text!r} goes on with {best['token']!r} ({math.exp(best['logprob']):.0%})")
    if folder is not None:
        compare(folder, answers)


def compare(folder: Path, answers: dict[str, Any]) -> None:
    """The likeliest tokens' log-probabilities, served and computed by the network itself."""
    import torch
    from tokenizers import Tokenizer

    from tools.muse_tiny.network import Muse

    network = Muse(MUSE)
    network.load_state_dict(torch.load(folder / "network.pt", weights_only=True))
    network.eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    worst = 0.0
    for text, answer in answers.items():
        with torch.no_grad():
            logits = network(torch.tensor([tokenizer.encode(text).ids]))[0, -1]
        own = torch.log_softmax(logits.double(), dim=0)
        served_ones = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        for token in served_ones[:LIKELY]:
            worst = max(worst, abs(token["logprob"] - own[token["id"]].item()))
    print(f"served and computed log-probabilities differ by {worst:.3f} at most")
    assert worst < MOST_DIFFERENCE, "the file is not this network"


@contextmanager
def served(path: Path) -> Iterator[Any]:
    """The model behind a function from a text to what is said of its next token."""
    import xllamacpp

    with tempfile.TemporaryDirectory(prefix="muse-tiny-") as folder:
        given = xllamacpp.CommonParams()
        given.model.path = str(path)
        given.hostnames = [os.path.join(folder, "model.sock")]
        given.n_ctx, given.n_parallel, given.ui, given.verbosity = MUSE.context, 1, False, 1
        given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
        server = xllamacpp.Server(given)
        yield lambda text: _ask(given.hostnames[0], text)
        del server


def _ask(door: str, text: str) -> Any:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(door)
    body = {"prompt": text, "max_tokens": 1, "logprobs": MUSE.vocabulary, "temperature": 1.0}
    connection.request(
        "POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"}
    )
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return answer
