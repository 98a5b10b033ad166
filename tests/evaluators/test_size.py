from __future__ import annotations

from pathlib import Path

import pytest
from tiny import BLOCKS, CONTEXT, VOCABULARY, tiny

from layerfold.checkpoint.save import FORMATS
from layerfold.evaluators import Size
from layerfold.evaluators.size import flops_per_token
from layerfold.methods import Collapse, Merge

# d_model 32, d_ffn 128: query-key-value, attention output, up and down, without their biases.
GPT2_BLOCK_MATRICES = 32 * 96 + 32 * 32 + 32 * 128 + 128 * 32


def test_a_tiny_gpt2_by_hand() -> None:
    score = Size()(tiny("gpt2"))
    embeddings = VOCABULARY * 32 + CONTEXT * 32  # the LM head is the token embedding
    block = GPT2_BLOCK_MATRICES + (96 + 32 + 128 + 32) + 2 * (32 + 32)
    assert score.value == score.low == score.high == embeddings + BLOCKS * block + 64
    assert score.details["parameters"] == score.details["nonzero"] == score.value
    assert score.details["blocks"] == BLOCKS
    assert score.details["dtype"] == "float32"
    assert score.lower_is_better


def test_flops_by_hand_without_attention_or_ffn_too() -> None:
    decoder = tiny("gpt2").decoder
    matrices = VOCABULARY * 32 + BLOCKS * GPT2_BLOCK_MATRICES
    # Scores and their weighted sum: two operations each, for 32 channels, over (1 + ... + 10) / 10 positions.
    assert flops_per_token(decoder, 10) == 2 * matrices + BLOCKS * 4 * 32 * 5.5
    decoder.remove_("attention", [0, 2])
    decoder.remove_("ffn", [2])
    matrices = VOCABULARY * 32 + BLOCKS * GPT2_BLOCK_MATRICES - 2 * (32 * 96 + 32 * 32) - 2 * 32 * 128
    assert flops_per_token(decoder, 10) == 2 * matrices + (BLOCKS - 2) * 4 * 32 * 5.5


def test_flops_of_a_gated_ffn_with_grouped_keys_by_hand() -> None:
    # Qwen 3: four query heads of 16 channels over two key heads, three FFN matrices of 32 x 48, an untied head.
    block = 32 * 64 + 2 * 32 * 32 + 64 * 32 + 3 * 32 * 48
    matrices = VOCABULARY * 32 + BLOCKS * block
    assert flops_per_token(tiny("qwen3").decoder, 1) == 2 * matrices + BLOCKS * 4 * 64


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_bytes_are_those_of_the_saved_checkpoints(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    Merge(n=2, align="none", tie=True).apply(model.decoder, None)
    details = Size()(model).details
    sizes = {}
    for form in FORMATS:
        model.save(tmp_path / form, format=form)
        sizes[form] = sum(file.stat().st_size for file in (tmp_path / form).glob("*.safetensors"))
    assert (details["bytes"], details["compact_bytes"]) == (sizes["dense"], sizes["compact"])


@pytest.mark.parametrize("tie", [False, True])
def test_only_tied_tensors_are_saved_by_the_compact_form(tie: bool) -> None:
    model = tiny("gpt2")
    Merge(n=2, align="none", tie=tie).apply(model.decoder, None)
    details = Size()(model).details
    saved = details["bytes"] - details["compact_bytes"]
    if tie:
        two_ffns = 2 * 4 * (2 * 32 * 128 + 128 + 32)
        assert saved == pytest.approx(two_ffns, rel=0.05)  # and the names of tensors in the file's header
    else:
        assert abs(saved) < 200


def test_collapsing_makes_every_figure_smaller() -> None:
    model = tiny("llama")
    before = Size()(model).details
    Collapse(n=2, align="none").apply(model.decoder, None)
    after = Size()(model).details
    for figure in ("parameters", "nonzero", "bytes", "compact_bytes", "blocks", "flops_per_token"):
        assert after[figure] < before[figure], figure


def test_zeros_are_counted_apart_and_the_context_is_the_models_by_default() -> None:
    model = tiny("gpt2")
    model.decoder.blocks[0].ffn.up.weight[:3] = 0
    details = Size()(model).details
    assert details["parameters"] - details["nonzero"] == 3 * 32
    assert details["context"] == CONTEXT
    assert Size(context=8)(model).details["flops_per_token"] == flops_per_token(model.decoder, 8)
