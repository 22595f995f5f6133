"""Runs in .venv-clients: asks by LiteLLM and prints what it got, as JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

import litellm
import openai

url, key, chat_model, embedding_model = sys.argv[1:]
litellm.suppress_debug_info = True
asked: dict[str, Any] = {
    "model": f"openai/{chat_model}",
    "api_base": url,
    "api_key": key,
    "max_tokens": 24,
    "temperature": 0,
    "messages": [{"role": "user", "content": "Say the name of the capital of France."}],
}
whole = litellm.completion(**asked)
stream = litellm.completion(**asked, stream=True, stream_options={"include_usage": True})
chunks = list(stream)
usages = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
texts = ["A cat sits on the mat.", "Interest rates rose."]
vectors = litellm.embedding(
    model=f"openai/{embedding_model}", input=texts, api_base=url, api_key=key
)
changes: dict[str, dict[str, Any]] = {
    "key": {"api_key": "sk-nobody"},
    "model": {"model": "openai/gpt-9"},
    "length": {"messages": [{"role": "user", "content": "many words " * 2000}]},
}
refused = {}
for name, change in changes.items():
    try:
        litellm.completion(**{**asked, **change}, num_retries=0)
    except openai.APIError as error:
        refused[name] = type(error).__name__
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "streamed": "".join(c.choices[0].delta.content or "" for c in chunks if c.choices),
            "usage": [whole.usage.prompt_tokens, whole.usage.completion_tokens],
            "streamed_usage": [usages[-1].prompt_tokens, usages[-1].completion_tokens],
            "sizes": [len(found["embedding"]) for found in vectors.data],
            "refused": refused,
        }
    )
)
