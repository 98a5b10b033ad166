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
    if (largest := max([*bpe["vocab"].values(), *(each["id"] for each in read["added_tokens"])])) >= rows:
        raise InputError(f"GGUF with a tokenizer of token {largest:,}, and a vocabulary of {rows:,}")
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
        prepends = any(step.get("prepend_scheme", "never") != "never" for step in steps)
        writer.add_add_space_prefix(prepends or "Prepend" in str(read.get("normalizer")))
    writer.add_token_list(tokens)
    for name in ("bos", "eos", "unk", "pad"):
        if (index := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            if name == "unk" and not by_bytes:
                kinds[index] = _UNKNOWN
            getattr(writer, f"add_{name}_token_id")(int(index))
    writer.add_token_types(kinds)
    writer.add_add_bos_token(tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id])
    if isinstance(template := getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(template)


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


_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}
"""Patterns by which texts are split, as tokenizers' files hold them, and llama.cpp's names."""


def _pre(steps: list[dict[str, Any]]) -> str:
    """Return llama.cpp's name of a pre-tokenizer of bytes.

    Raises:
        InputError: it has none for these steps.
    """
    *before, last = steps
    kinds = [step["type"] for step in before]
    plain = last["type"] == "ByteLevel" and not last.get("add_prefix_space")
    if plain and not kinds and last.get("use_regex", True):
        return "gpt-2"
    if plain and kinds == ["Digits"] and before[0].get("individual_digits") and last.get("use_regex", True):
        return "smollm"
    isolated = kinds == ["Split"] and before[0].get("behavior") == "Isolated" and not before[0].get("invert")
    pattern = before[0]["pattern"].get("Regex", "") if isolated else ""
    if plain and pattern in _SPLITS:
        return _SPLITS[pattern]
    raise InputError("GGUF with a tokenizer that splits texts in a way that llama.cpp has no name for")
