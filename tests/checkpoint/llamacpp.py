"""Reads GGUF files by llama.cpp, in a process of its own: prints each file's log probabilities after some prompts.

    python llamacpp.py REQUESTS

REQUESTS is a JSON file: by path of a GGUF file, its number of tokens and a list of prompts, texts or lists of ids.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import xllamacpp


def log_probabilities(server: Any, prompt: str | list[int], tokens: int) -> list[float]:
    """Return those of all tokens after a prompt."""
    request = {"prompt": prompt, "n_predict": 1, "n_probs": tokens, "temperature": 1.0, "cache_prompt": False}
    for seed in range(100):  # there are none where the drawn token ends the text
        answer = server.handle_completions({**request, "seed": seed})
        if "choices" not in answer:
            raise SystemExit(str(answer))
        if found := answer["choices"][0]["logprobs"]:
            by_id = {each["id"]: each["logprob"] for each in found["content"][0]["top_logprobs"]}
            return [by_id[index] for index in range(tokens)]
    raise SystemExit("every drawn token ends the text")


def opened(path: str) -> Any:
    """Return a server of a file, with the cache in float32."""
    options = xllamacpp.CommonParams()
    options.model.path = path
    options.n_ctx, options.n_parallel, options.verbosity, options.warmup = 64, 1, -1, False
    options.cache_type_k = options.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    options.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(options)


if __name__ == "__main__":
    requests = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {}
    for path, (tokens, prompts) in requests.items():
        server = opened(path)
        found[path] = [log_probabilities(server, prompt, tokens) for prompt in prompts]
    print(json.dumps(found))
