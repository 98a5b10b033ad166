"""Tokenizers in GGUF files, as llama.cpp reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from layerfold.checkpoint.model import Model
from layerfold.errors import InputError

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Kinds of tokens."""


def write_tokenizer(writer: Any, model: Model) -> None:
    """Write a byte-pair encoding: of bytes, as GPT-2's, or of characters with bytes for the rest, as Llama 2's.

    Raises:
        InputError: another kind.
    """
    tokenizer = model.require_tokenizer()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    read: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {"model": {"type": "unknown"}}
    steps, bpe = _steps(read.get("pre_tokenizer")), read["model"]
    by_bytes = "ByteLevel" in [step["type"] for step in steps]
    if bpe["type"] != "BPE" or not (by_bytes or bpe.get("byte_fallback")):
        raise InputError(
            f"GGUF with a tokenizer of kind {bpe['type']}; accepted: BPE of bytes, or with bytes to fall back on"
        )
    rows = int(model.decoder.model.config.vocab_size)
    tokens, kinds = [f"[PAD{index}]" for index in range(rows)], [_UNUSED] * rows
    for token, index in bpe["vocab"].items():
        tokens[index] = token
        kinds[index] = _BYTE if not by_bytes and token.startswith("<0x") else _NORMAL
    for each in read["added_tokens"]:
        tokens[each["id"]], kinds[each["id"]] = each["content"], _CONTROL if each["special"] else _USER
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in bpe["merges"]]
    if by_bytes:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre(steps))
        writer.add_token_merges(merges)
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(bpe["vocab"], merges, rows))
        writer.add_add_space_prefix("Prepend" in str(read.get("normalizer")))
    writer.add_token_list(tokens)
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            if name == "unk" and not by_bytes:
                kinds[index] = _UNKNOWN
            getattr(writer, f"add_{name}_token_id")(int(index))
    writer.add_token_types(kinds)
    begins = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
    writer.add_add_bos_token(begins)


def _scores(vocabulary: Mapping[str, int], merges: list[str], rows: int) -> list[float]:
    """Return a score for each token: the earlier its merge, the higher."""
    scores = [-1e9] * rows
    for rank, merge in reversed(list(enumerate(merges))):
        if (index := vocabulary.get(merge.replace(" ", ""))) is not None:
            scores[index] = -float(rank)
    return scores


def _steps(pre: Any) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer."""
    if pre is None:
        return []
    steps: list[dict[str, Any]] = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    return steps


def _pre(steps: list[dict[str, Any]]) -> str:
    """Return llama.cpp's name of a pre-tokenizer; ``default`` for one that it may have under another name."""
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and r"\p{N}|" in str(steps[0]["pattern"]):
        return "qwen2"
    return "default"
